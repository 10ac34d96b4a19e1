"""The commands as a user calls them: a real server, exit codes, both outputs.

Each command runs as a process of its own at least once; where only its arguments or inputs differ from
that, it runs in this process, which has imported everything already.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pool.__main__ import main
from pool.cli import output, predict
from pool.errors import InvalidInput
from tests import models
from tests.conftest import Server, StartServer

X = np.linspace(-1, 1, 3 * 784, dtype=np.float32).reshape(3, 784)


def pool(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command as a process; its exit code is checked, and that no traceback was shown."""
    done = subprocess.run(
        [sys.executable, "-m", "pool", *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(models.REPOSITORY)},
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def call(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The same in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            ended = main([*map(str, args)])
        except SystemExit as e:  # argparse's way
            ended = e.code if isinstance(e.code, int) else 0
    assert ended == code, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess([], ended, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tables = [
        f'[models.{name}]\npath = "{models.path(name)}"\nslots = 4'
        for name in ("mlp", "scalars", "strings", "signatures")
    ]
    with start_server(tmp_path_factory.mktemp("cli"), "\n".join(tables)) as running:
        yield running


# -- the command line itself -----------------------------------------------------------------------


def test_help_names_every_command_and_imports_little() -> None:
    script = (
        "import sys; from pool.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for command in ("serve", "check", "predict", "status", "top", "bench", "chaos", "demo"):
        assert f"\n    {command} " in done.stdout
    for module in ("zmq", "numpy", "rich", "msgspec", "tensorflow"):
        assert f"'{module}'" not in done.stdout


@pytest.mark.parametrize("command", ["serve", "check", "predict", "status", "top", "bench", "chaos", "demo"])
def test_each_command_has_help(command: str) -> None:
    assert f"usage: pool {command}" in call(command, "--help").stdout


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("nonsense",),
        ("serve",),
        ("status", "extra"),
        ("status", "--endpoint", "http://x"),
        ("status", "--timeout", "0"),
        ("predict", "m"),
        ("predict", "m", "--input", "@absent.npy"),
        ("predict", "m", "--input", "x=not json"),
        ("predict", "m", "--input", "no value"),
        ("predict", "m", "--input", "1", "--json", "--output", "d"),
        ("bench", "m", "--concurrency", "0"),
        ("bench", "m", "--rate", "-1"),
        ("bench", "m", "--request-timeout-ms", "0.5"),
        ("bench", "m", "--input", "absent.npz"),
        ("chaos", "--minutes", "0"),
        ("chaos", "--faults", "kill,nonsense"),
    ],
)
def test_wrong_arguments(args: tuple[str, ...]) -> None:
    done = call(*args, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("usage: pool")


def test_bench_needs_work_for_each_client() -> None:
    assert "--clients" in call("bench", "m", "--clients", 3, "--concurrency", 2, code=2).stderr


def test_version() -> None:
    assert pool("--version").stdout.startswith("pool 0.")


# -- configuration files ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_mistake_in_the_file_is_exit_code_2(command: str, tmp_path: Path) -> None:
    file = tmp_path / "pool.toml"
    file.write_text('[models.m]\npath = "p"\nworkrs = 2\nmax_batch_size = 0\n')
    done = pool(command, file, code=2)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"{file}: models.m.workrs: unknown key; the nearest valid key is workers, got 2",
        f"{file}: models.m.max_batch_size: must be an integer from 1 to 65536, got 0",
    ]


@pytest.mark.parametrize("command", ["serve", "check"])
def test_no_file_is_exit_code_2(command: str, tmp_path: Path) -> None:
    done = pool(command, tmp_path / "absent.toml", code=2)
    assert done.stderr == f"{tmp_path}/absent.toml: file: must be readable, got No such file or directory\n"


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_model_that_cannot_be_loaded_is_exit_code_1(command: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = tmp_path / "pool.toml"
    table = '[models.m]\nbackend = "drill"\npath = "empty"\n'
    file.write_text(f'[server]\nendpoints = ["ipc://{tmp_path}/s"]\n{table}')
    assert re.search(r"MODEL_LOAD(:| reason=)", pool(command, file, code=1).stderr)


def test_check_reports(tmp_path: Path) -> None:
    file = tmp_path / "pool.toml"
    file.write_text(f'[models.mlp]\npath = "{models.path("mlp")}"\nmax_batch_size = 8\n')
    report = json.loads(pool("check", file, "--json").stdout)
    assert report["config"] == str(file)
    model = report["models"]["mlp"]
    assert {
        "version",
        "path",
        "signatures",
        "skipped",
        "weights_bytes",
        "weights_shared",
        "unshared_reason",
        "arena_bytes",
        "slots",
        "slot_bytes",
        "max_batch_size",
        "load_s",
    } <= model.keys()
    assert model["version"] == 1
    assert model["weights_shared"] is True
    assert model["weights_bytes"] >= 4 * (784 * 256 + 256 + 256 * 10 + 10)
    assert model["max_batch_size"] == 8
    assert model["arena_bytes"] == model["slots"] * model["slot_bytes"]


def test_check_shows_a_table(tmp_path: Path) -> None:
    (tmp_path / "drill.toml").write_text("row_items = 784")
    file = tmp_path / "pool.toml"
    file.write_text('[models.m]\nbackend = "drill"\npath = "."\n')
    shown = pool("check", file).stdout
    assert "float32 [any, 784]" in shown
    assert "one copy for all workers" in shown


# -- predict ---------------------------------------------------------------------------------------


def test_predict_from_npy_and_npz_and_literal_agree(server: Server, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "x.npz", other=X[:1], keras_tensor=X)
    signature = json.loads(call("status", "--endpoint", server.endpoint, "--json").stdout)["models"]["mlp"][
        "signatures"
    ]
    name = signature[0]["inputs"][0]["name"]
    np.savez(tmp_path / "named.npz", **{name: X})
    answers = [
        json.loads(run("predict", "mlp", "--endpoint", server.endpoint, "--json", "--input", given).stdout)
        for run, given in (
            (pool, f"@{tmp_path}/x.npy"),
            (call, f"{name}=@{tmp_path}/x.npy"),
            (call, f"@{tmp_path}/named.npz"),
            (call, f"{name}=@{tmp_path}/named.npz"),
            (call, json.dumps(X.tolist())),
            (call, f"{name}={json.dumps(X.tolist())}"),
        )
    ]
    (output_name,) = answers[0]
    values = np.array(answers[0][output_name])
    assert values.shape == (3, 10)
    for answer in answers[1:]:
        np.testing.assert_allclose(answer[output_name], values, rtol=0, atol=1e-5)


def test_predict_shows_several_inputs(server: Server) -> None:
    done = call(
        "predict", "scalars", "--endpoint", server.endpoint, "--input", "x=[1, 2]", "--input", "y=[0.5, 4]"
    )
    assert done.stdout == "sum: float32 [2]\n[1.5 6. ]\n"


def test_predict_strings(server: Server) -> None:
    done = call("predict", "strings", "--endpoint", server.endpoint, "--json", "--input", 'text=["a=b", "é"]')
    assert json.loads(done.stdout) == {"upper": ["A=B", "é"], "length": [3, 2]}


def test_predict_names_signature_and_version(server: Server) -> None:
    args = ("predict", "signatures", "--endpoint", server.endpoint, "--input", "[[1.0, 2.0]]", "--json")
    assert json.loads(call(*args).stdout) == {"y": [[3.0, 6.0]]}
    assert json.loads(call(*args, "--signature", "double", "--version", 1).stdout) == {"y": [[2.0, 4.0]]}
    assert "SIGNATURE_NOT_FOUND: " in call(*args, "--signature", "none", code=1).stderr
    assert "VERSION_NOT_FOUND: " in call(*args, "--version", 9, code=1).stderr


def test_predict_saves(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    args = ("predict", "strings", "--endpoint", server.endpoint, "--input", '["ab", "c"]', "--output", folder)
    assert sorted(call(*args).stdout.split()) == [f"{folder}/length.npy", f"{folder}/upper.npy"]
    assert np.load(folder / "length.npy").tolist() == [2, 1]
    assert np.load(folder / "upper.npy").tolist() == [b"AB", b"C"]


@pytest.mark.parametrize(
    ("args", "want"),
    [
        (("mlp", "--input", "[[1, 2]]"), "pool: INVALID_INPUT: input"),
        (("absent", "--input", "1"), "pool: MODEL_NOT_FOUND: "),
        (("scalars", "--input", "[1]"), "pool: INVALID_INPUT: "),
        (
            ("scalars", "--input", "x=[1]", "--input", "x=[1]"),
            "pool: INVALID_INPUT: input 'x' is given twice",
        ),
        (("scalars", "--input", "x=[1]", "--input", "[1]"), "pool: INVALID_INPUT: an input has no name"),
    ],
)
def test_predict_mistakes(server: Server, args: tuple[str, ...], want: str) -> None:
    done = call("predict", *args, "--endpoint", server.endpoint, code=1)
    assert done.stdout == ""
    assert done.stderr.startswith(want)


# -- status ----------------------------------------------------------------------------------------


def test_status(server: Server) -> None:
    status = json.loads(pool("status", "--endpoint", server.endpoint, "--json").stdout)
    assert status["front"]["pid"] == server.process.pid
    assert status["front"].keys() >= {"uptime_s", "cpu_s", "uss_bytes", "pss_bytes", "endpoints", "requests"}
    assert status["models"].keys() == {"mlp", "scalars", "strings", "signatures"}
    mlp = status["models"]["mlp"]
    assert mlp.keys() >= {
        "version",
        "signatures",
        "queue_rows",
        "batches",
        "rows",
        "weights_shared",
        "workers",
    }
    (worker,) = mlp["workers"]
    assert worker["state"] == "ready"
    assert worker.keys() >= {"index", "pid", "device", "batches", "uss_bytes", "pss_bytes", "restarts"}
    shown = call("status", "--endpoint", server.endpoint).stdout
    assert f"front {server.process.pid}, up " in shown
    assert "mlp worker 0" in shown


@pytest.mark.parametrize("args", [("status",), ("predict", "m", "--input", "1"), ("bench", "m"), ("chaos",)])
def test_no_server_is_exit_code_1(args: tuple[str, ...], tmp_path: Path) -> None:
    done = call(*args, "--endpoint", f"ipc://{tmp_path}/none.sock", "--timeout", "0.2", code=1)
    assert done.stdout == ""
    assert done.stderr.startswith("pool: UNAVAILABLE: ")


def test_output_that_nobody_reads_is_no_traceback(server: Server) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "pool", "status", "--endpoint", server.endpoint, "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == b""


# -- bench -----------------------------------------------------------------------------------------

BENCH_KEYS = {
    "requests_per_s",
    "steady_per_s",
    "goodput_per_s",
    "p50_ms",
    "p90_ms",
    "p99_ms",
    "p999_ms",
    "errors",
    "mean_batch_rows",
    "client_cpu_us_per_request",
    "server_cpu_us_per_request",
}


def bench(server: Server, *args: object) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(call("bench", *args, "--endpoint", server.endpoint, "--json").stdout)
    assert report.keys() == BENCH_KEYS
    assert report["errors"] == {}
    assert 0 < report["p50_ms"] <= report["p90_ms"] <= report["p99_ms"] <= report["p999_ms"]
    assert report["requests_per_s"] > 0
    assert report["steady_per_s"] > 0
    assert report["client_cpu_us_per_request"] > 0
    assert report["server_cpu_us_per_request"].keys() == {"front", "workers"}
    return report


def test_bench_closed_loop(server: Server) -> None:
    report = bench(server, "mlp", "--requests", 2000, "--concurrency", 65, "--clients", 2, "--rows", 2)
    assert report["mean_batch_rows"] >= 2


def test_bench_as_a_process(server: Server) -> None:
    done = pool("bench", "mlp", "--endpoint", server.endpoint, "--requests", 100, "--json")
    assert json.loads(done.stdout).keys() == BENCH_KEYS


def test_bench_one_at_a_time_makes_batches_of_one(server: Server) -> None:
    assert bench(server, "mlp", "--requests", 100, "--concurrency", 1)["mean_batch_rows"] == 1


def test_bench_open_loop(server: Server) -> None:
    args = ("--requests", 200, "--rate", 1000, "--clients", 2, "--request-timeout-ms", 30_000)
    report = bench(server, "mlp", *args)
    assert report["goodput_per_s"] == report["requests_per_s"] < 3000


def test_bench_makes_up_strings_and_takes_files(server: Server, tmp_path: Path) -> None:
    bench(server, "strings", "--requests", 100)
    np.savez(tmp_path / "x.npz", x=np.arange(10, dtype=np.int32), y=np.ones(10, np.float32))
    bench(server, "scalars", "--requests", 100, "--input", tmp_path / "x.npz", "--rows", 3)
    args = ("bench", "scalars", "--endpoint", server.endpoint, "--input", tmp_path / "x.npz", "--rows", 11)
    assert "has 10 rows; wanted at least 11" in call(*args, code=1).stderr


def test_bench_shows_a_table(server: Server) -> None:
    shown = call("bench", "mlp", "--endpoint", server.endpoint, "--requests", 50).stdout
    assert "requests/s" in shown
    assert "latency, 99.9 %" in shown


def test_bench_of_an_absent_model(server: Server) -> None:
    assert "MODEL_NOT_FOUND" in call("bench", "absent", "--endpoint", server.endpoint, code=1).stderr


@pytest.mark.parametrize("whom", ["alone", "group"])
def test_bench_interrupted(server: Server, whom: str) -> None:
    """As Ctrl-C does it (the whole group), and as a signal to the command alone: its children end, too."""
    args = (
        "bench",
        "mlp",
        "--endpoint",
        server.endpoint,
        "--requests",
        "100000000",
        "--clients",
        "2",
        "--concurrency",
        "2",
    )
    with subprocess.Popen(
        [sys.executable, "-m", "pool", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        before = rows(server)
        while rows(server) < before + 200:  # the load is under way
            assert process.poll() is None
        if whom == "group":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err) == (b"", b"")


def rows(server: Server) -> int:
    status = json.loads(call("status", "--endpoint", server.endpoint, "--json").stdout)
    return int(status["models"]["mlp"]["rows"])


# -- pieces ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "literal"),
    [
        ("x=1", "x", 1),
        ("[1, 2]", None, [1, 2]),
        ("-1.5", None, -1.5),
        ('"a=b"', None, "a=b"),
        ('x="a=b"', "x", "a=b"),
        ("dense/in:0=true", "dense/in:0", True),
    ],
)
def test_inputs_are_told_apart(text: str, name: str | None, literal: object) -> None:
    assert predict.parse_input(text) == predict.Given(name, literal=literal)


def test_files_of_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "t.npy").write_text("no array")
    for file in ("o.npy", "t.npy"):
        with pytest.raises(argparse.ArgumentTypeError, match="without objects"):
            predict.read_arrays(str(tmp_path / file))


def test_archives_that_are_broken_are_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "whole.npz", x=np.arange(1000))
    whole = (tmp_path / "whole.npz").read_bytes()
    at = len(whole) // 3
    (tmp_path / "cut.npz").write_bytes(whole[:at])
    (tmp_path / "spoilt.npz").write_bytes(whole[:at] + bytes(9) + whole[at + 9 :])
    for file in ("cut.npz", "spoilt.npz"):
        with pytest.raises(argparse.ArgumentTypeError, match=rf"{file}: wanted a \.npy or \.npz file"):
            predict.read_arrays(str(tmp_path / file))


def test_saving_keeps_every_value(tmp_path: Path) -> None:
    import ml_dtypes

    bfloat16 = np.array([1.5, -3.0], ml_dtypes.bfloat16)
    predict.save({"a/b": bfloat16}, tmp_path)
    assert np.load(tmp_path / "a_b.npy").tolist() == [1.5, -3.0]
    with pytest.raises(InvalidInput, match="zero bytes"):
        predict.save({"s": np.array([b"x\0"], object)}, tmp_path)


def test_json_has_every_value() -> None:
    assert output.jsonable(np.array([np.nan, np.inf, -np.inf, 1])) == ["NaN", "Infinity", "-Infinity", 1.0]
    assert output.jsonable(np.array([[1 + 2j]])) == [[[1.0, 2.0]]]
    assert output.jsonable(np.array([b"a", b"\xff"], object)) == ["a", {"b64": "/w=="}]
    assert output.jsonable(np.array(True)) is True


@pytest.mark.parametrize(
    ("count", "want"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (5 * 10**12, "5000.00 GB")],
)
def test_sizes(count: int, want: str) -> None:
    assert output.size(count) == want
