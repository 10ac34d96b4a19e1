# pool's developer commands. Needs python3 (3.10 or newer) with venv, and a package index pip can reach.
#
#   make demo    train, serve and check a model that reads handwritten digits; writes demo.png
#   make test    the whole test suite
#   make lint    style, formatting, types and import rules
#   make bench   the measurements of bench/
#   make bench-peers   the same of other model servers, beside pool: each in an environment of its own, 4 GB in all;
#                needs h2load (Debian's nghttp2-client), and for PyTriton and Triton Python 3.10
#   make budget  instructions per request against bench/budget.json; needs valgrind
#   make install-service   what has systemd run servers from this checkout; DESTDIR=DIR for elsewhere than /
#   make clean   remove .venv and everything generated

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Constraints also hold for what builds the package (two names: pip 25.3 split the second off).
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench bench-peers budget install-service clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/pool demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-bench
	$(BIN)/python -m bench $(BENCH_ARGS)

bench-peers: $(VENV)/.installed-bench
	$(BIN)/python -m bench.peers $(BENCH_ARGS)

budget: $(VENV)/.installed-test
	$(BIN)/python -m bench.cpu_budget $(BUDGET_ARGS)

install-service: $(VENV)/.installed-service
	$(BIN)/pool install-service --root "$(or $(DESTDIR),/)" $(SERVICE_ARGS)

clean:
	rm -rf $(VENV) build dist demo demo.png *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp a set of extras, newer than what it was made from: nothing is installed twice.
EXTRAS_demo := tensorflow,demo
EXTRAS_test := tensorflow,demo,examples,test
EXTRAS_lint := tensorflow,demo,examples,test,lint
EXTRAS_bench := tensorflow,demo
EXTRAS_service := tensorflow

$(VENV)/.installed-%: pyproject.toml constraints.txt $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS_$*)]'
	@touch $@

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "pool needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: on Debian and Ubuntu, install the package python3-venv" >&2; exit 1; }
