"""Instructions per request: `python -m bench.cpu_budget [--record]` (or `make budget`).

Times drift on a shared machine by more than most changes cost; instructions do not. Each part runs under
valgrind's callgrind, which counts what its main thread executes, interpreter and libraries included, in a
known number of turns after as many that are not counted. The front is a real one: its zygote and its worker
run uncounted, and a client next to it sends one message and awaits its answer before the next, so that the
front's loop takes the same turns every time.

`bench/budget.json` has what was recorded, and with which versions: another interpreter or library executes
other instructions, and is not compared. A part that takes 10 % more than recorded is a failure. Record on an
idle machine: on a busy one the front's loop takes fewer turns for a request that is alone, for more has come
by the time it looks, and 10 % fewer instructions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path

import zmq

from pool import Client, wire
from pool.client.line import Line
from pool.endpoints import side_path
from pool.errors import Unavailable
from pool.wire import Flag, Header, Kind, PredictMeta, TensorMeta

BUDGET = Path(__file__).with_name("budget.json")
TOLERANCE = 0.10
REPOSITORY = Path(__file__).resolve().parent.parent

ROWS = 64  # of a batch, and of a bundle
WIDTH = 784
TURNS = {"alone": 400, "batch": 50}
WARM_UP = 4  # the first turns make caches; so many fewer turns than are counted
READY_TIMEOUT_S, ANSWER_TIMEOUT_S = 120.0, 60.0

WHAT = {
    "front, alone": "a request and its answer, one at a time",
    "front, batch": "one of a bundle of 64",
    "front, line": "a request and its answer, one at a time, past ZeroMQ",
    "front, line batch": "one of a bundle of 64, past ZeroMQ",
    "client core, alone": "a request encoded, its reply decoded",
    "client core, batch": "one of 64 that travel together",
    "worker, alone": "a batch of one row, doorbell to doorbell",
    "worker, batch": "a row of a batch of 64",
}


class Counted:
    """A process under callgrind.

    Args:
        folder: Where callgrind writes.
        arguments: Of `bench.counted`.
        pipes: Whether it is spoken to.
    """

    def __init__(self, folder: str, *arguments: str, pipes: bool = True) -> None:
        self._folder = Path(folder)
        pipe = subprocess.PIPE if pipes else subprocess.DEVNULL
        command = [
            "valgrind",
            "--tool=callgrind",
            "--instr-atstart=no",
            "--separate-threads=yes",
            "--fair-sched=yes",
            "--quiet",
            f"--callgrind-out-file={folder}/counts",
            f"--vgdb-prefix={folder}/vgdb",
        ]
        # A hash decides where a name lies in a dictionary, and how often it is compared.
        environment = os.environ | {"PYTHONHASHSEED": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.process = subprocess.Popen(
            [*command, sys.executable, "-m", "bench.counted", *arguments],
            cwd=REPOSITORY,
            env=environment,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
        )

    def monitor(self, *command: str) -> None:
        """Tell callgrind something, which it does before it goes on."""
        where = [f"--vgdb-prefix={self._folder}/vgdb", f"--pid={self.process.pid}", "--wait=10"]
        subprocess.run(["vgdb", *where, *command], check=True, capture_output=True, timeout=ANSWER_TIMEOUT_S)

    def count(self, turns: Callable[[], object]) -> int:
        """Instructions of its main thread while it takes these turns."""
        self.monitor("zero")
        turns()
        before = set(self._folder.glob("counts*"))
        self.monitor("dump")
        dumped = set(self._folder.glob("counts*")) - before
        (main,) = (file for file in dumped if re.search(r"-0*1$", file.name))
        return totals(main.read_text())

    def ask(self, line: str) -> None:
        """Have it do something, and wait until it has."""
        process = self.process
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()
        self.await_word("done")

    def await_word(self, word: str) -> None:
        """Wait for a line."""
        assert self.process.stdout is not None
        got = self.process.stdout.readline().strip()
        if got != word:
            raise RuntimeError(f"the counted process said {got!r}; wanted {word!r}{self.last_words()}")

    def last_words(self) -> str:
        """What it wrote to its error output, once it has ended."""
        self.process.kill()
        _, errors = self.process.communicate()
        return f"\n{errors[-4000:]}"

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


def totals(dump: str) -> int:
    """Instructions of a file that callgrind wrote."""
    found = re.search(r"^(?:totals|summary): (\d+)", dump, re.MULTILINE)
    if found is None:
        raise ValueError("no totals in what callgrind wrote")
    return int(found[1])


@contextmanager
def counted(*arguments: str, pipes: bool = True) -> Iterator[Counted]:
    """Run `bench.counted ARGUMENTS` until the block ends."""
    with tempfile.TemporaryDirectory(prefix="pool-budget-") as folder:
        process = Counted(folder, *arguments, pipes=pipes)
        try:
            yield process
        finally:
            process.close()


def count_turns(what: str) -> dict[str, float]:
    """Instructions per request of a part that takes its turns by itself."""
    with counted(what) as process:
        process.await_word("ready")
        process.monitor("instrumentation", "on")
        figures = {}
        for how, turns in TURNS.items():
            process.ask(f"{how} {turns // WARM_UP}")
            instructions = process.count(partial(process.ask, f"{how} {turns}"))
            figures[how] = instructions / turns / (ROWS if how == "batch" else 1)
        return figures


def count_front() -> dict[str, float]:
    """Instructions per request of a front whose worker's model gives its input back."""
    with tempfile.TemporaryDirectory(prefix="pool-budget-") as folder:
        endpoint = f"ipc://{folder}/s"
        Path(folder, "model.toml").write_text(f"row_items = {WIDTH}\n")
        config = Path(folder, "config.toml")
        # Who stays awake looks at its descriptors as often as it can: so nobody does.
        config.write_text(
            f'[server]\nendpoints = ["{endpoint}"]\nawake_us = 0\nlog_level = "warning"\n'
            f'[models.model]\nbackend = "drill"\npath = "{folder}/model.toml"\n'
            f"max_batch_size = {ROWS}\nslots = 4\nawake_us = 0\n"
        )
        with counted("front", str(config), pipes=False) as process:
            _await_ready(process, endpoint)
            process.monitor("instrumentation", "on")
            figures = {}
            with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
                dealer.linger, dealer.rcvtimeo = 0, int(ANSWER_TIMEOUT_S * 1000)
                dealer.connect(endpoint)

                def by_zeromq(frames: list[bytes]) -> bytes:
                    dealer.send_multipart(frames)
                    return dealer.recv_multipart()[0]

                for how, rows in (("alone", 1), ("batch", ROWS)):
                    figures[how] = _count_exchange(process, by_zeromq, how, rows)
            side = side_path(endpoint)
            assert side is not None, "an ipc endpoint with a short path"
            line = Line(side)
            while not line.is_welcome():
                _await(line)

            def by_line(frames: list[bytes]) -> bytes:
                if not line.send(frames, sum(map(len, frames))):
                    raise RuntimeError("no room in a line over which nothing is under way")
                while (reply := line.receive()) is None:
                    _await(line)
                header: bytes = reply[0]
                return header

            for how, rows in (("alone", 1), ("batch", ROWS)):
                name = "line" if how == "alone" else "line batch"
                figures[name] = _count_exchange(process, by_line, how, rows)
            line.close()
            return figures


def _await(line: Line) -> None:
    ready, _, _ = select.select([line.fileno()], [], [], ANSWER_TIMEOUT_S)
    if not ready or line.is_lost:
        raise RuntimeError("the front does not answer over the line")


def _count_exchange(process: Counted, ask: Callable[[list[bytes]], bytes], how: str, rows: int) -> float:
    """Instructions per request of a front that is asked, message by message, for so many rows."""
    messages = _messages(rows)

    def exchange(turns: int) -> None:
        for frames in itertools.islice(messages, turns):
            header = wire.decode_header(ask(frames))
            if header.kind is Kind.ERROR:
                raise wire.decode_error(header)

    turns = TURNS[how]
    exchange(turns // WARM_UP)
    return process.count(partial(exchange, turns)) / turns / rows


def _messages(rows: int) -> Iterator[list[bytes]]:
    inputs = (
        TensorMeta("x", "float32", (WIDTH,)),
        TensorMeta("fault", "int32", ()),
        TensorMeta("argument", "float32", ()),
    )
    meta = wire.encode_meta(PredictMeta("model", None, None, inputs))
    tensors = [bytes(4 * WIDTH * rows), bytes(4 * rows), bytes(4 * rows)]
    for first in itertools.count(1, rows):
        if rows == 1:
            yield [wire.encode_header(Header(Kind.PREDICT, first, meta, rows=1)), *tensors]
        else:
            header = Header(Kind.PREDICT, 0, meta, rows=rows, flags=Flag.BUNDLE)
            table = b"".join(wire.PART.pack(first + place, 0, 1) for place in range(rows))
            yield [wire.encode_header(header), table, *tensors]


def _await_ready(process: Counted, endpoint: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with Client(endpoint, timeout=READY_TIMEOUT_S, connect_timeout=1.0) as client:
        while time.monotonic() < deadline:
            if process.process.poll() is not None:
                break
            try:
                if client.ready():
                    return
            except Unavailable:
                pass
            time.sleep(0.1)
    raise RuntimeError(f"the front is not ready{process.last_words()}")


def measure() -> dict[str, int]:
    """Every part, in instructions per request."""
    figures: dict[str, int] = {}
    for name, part in (
        ("front", count_front()),
        ("client core", count_turns("client")),
        ("worker", count_turns("worker")),
    ):
        figures |= {f"{name}, {how}": round(value) for how, value in part.items()}
    return figures


def versions() -> dict[str, str]:
    """Of what executes the instructions."""
    names = ("msgspec", "numpy", "pyzmq", "uvloop")
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def exceeded(figures: dict[str, int], budget: dict[str, int]) -> list[str]:
    """The parts that take too much; one that no budget was set for is none of them."""
    return [name for name, value in figures.items() if value > budget.get(name, value) * (1 + TOLERANCE)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_budget", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write what is measured to bench/budget.json")
    args = parser.parse_args()
    missing = [name for name in ("valgrind", "vgdb") if shutil.which(name) is None]
    if missing:
        print("CPU budget: not measured, valgrind is not installed (Debian's package of that name)")
        return 0
    figures, with_ = measure(), versions()
    if args.record:
        BUDGET.write_text(json.dumps({"versions": with_, "instructions": figures}, indent=2) + "\n")
    recorded = json.loads(BUDGET.read_text())
    budget = recorded["instructions"]
    print("CPU budget, instructions per request (main thread; valgrind)")
    for name, value in figures.items():
        was = f"{value / budget[name] - 1:+7.1%} of {budget[name]:,}" if name in budget else "new"
        print(f"  {name:20} {value:>9,}  {was:24} {WHAT[name]}")
    other = {name: version for name, version in recorded["versions"].items() if with_[name] != version}
    if other:
        print(f"  not compared: recorded with {other}")
        return 0
    over = exceeded(figures, budget)
    for name in over:
        print(f"  OVER: {name} takes more than {TOLERANCE:.0%} above its budget")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
