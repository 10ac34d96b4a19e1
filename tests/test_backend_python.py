"""Python functions as models: what a file may hold, and that a real server runs it as any other model."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from pool import AsyncClient, Client, InvalidInput, ModelError, WorkerLost
from pool.backends import BrokenPromise, python
from pool.config import Placement, load_config
from pool.errors import ConfigError, ModelLoadError
from pool.shm import weights as weights_memory
from pool.worker.loader import load_model

PATIENCE_S = 40.0

HEAD = """
import numpy as np
from pool.python import model
"""

ECHO = """
@model(inputs={"x": "float32 [any, 2]"}, outputs={"y": "float32 [any, 2]"})
def echo(x):
    return x
"""


def write(folder, text, name="glue.py"):
    file = folder / name
    file.write_text(HEAD + textwrap.dedent(text))
    return file


def loaded(folder, text, function="echo"):
    """The function as a worker has it."""
    return python.load(python.resolve(f"{write(folder, text)}:{function}")[1], None)


@pytest.fixture(autouse=True)
def _path():
    """To load a model in this process changes what only a worker's may."""
    kept = list(sys.path)
    yield
    sys.path[:] = kept
    sys.modules.pop("pool_model", None)


# -- what a file may hold --------------------------------------------------------------------------


def test_it_is_called_with_arrays_and_gives_some(tmp_path):
    model = loaded(
        tmp_path,
        """
        STATE = {"factor": 3}   # made when the file is imported

        @model(
            inputs={"text": "string [any]", "x": "float32 [any, 2]"},
            outputs={"words": "string [any]", "y": "float32 [any, 2]", "n": "int64 [any]"},
        )
        def both(x, text):
            assert not x.flags.writeable and not text.flags.writeable
            return {
                "y": x * np.float32(STATE["factor"]),
                "words": [t.decode() + "!" for t in text],
                "n": np.array([len(t) for t in text]),
            }
        """,
        "both",
    )
    (signature,) = model.signatures
    assert [spec.describe() for spec in signature.inputs] == ["string [any]", "float32 [any, 2]"]
    text = np.array([b"a", "é".encode()], object)
    x = np.array([[1, 2], [3, 4]], np.float32)
    call = model.bind("serving_default", [text, x])
    words, y, n = call()
    assert words.tolist() == [b"a!", "é!".encode()]
    assert (y == x * 3).all()
    assert n.tolist() == [1, 2]
    x[...] = 7  # the slot's next batch
    assert (call()[1] == 21).all()


def test_no_rows_and_whole_tensors(tmp_path):
    model = loaded(
        tmp_path,
        """
        @model(inputs={"n": "int64 []"}, outputs={"x": "float32 [any, 2]"}, batched=False)
        def echo(n):
            return np.ones((n, 2), np.float32)
        """,
    )
    assert not model.signatures[0].batched
    for n in (0, 3):
        assert model.bind("serving_default", [np.array(n)])()[0].shape == (n, 2)


def test_it_imports_what_lies_beside_it(tmp_path):
    (tmp_path / "beside.py").write_text("FACTOR = 2\n")
    text = ECHO.replace("return x", "import beside; return x * np.float32(beside.FACTOR)")
    call = loaded(tmp_path, text).bind("serving_default", [np.ones((1, 2), np.float32)])
    assert call()[0].tolist() == [[2, 2]]
    sys.modules.pop("beside")


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        (ECHO, "other", "glue.py: other: must be a function of the file, got echo"),
        ("", "echo", "glue.py: echo: must be a function of the file, got none that is declared with @model"),
        ("echo = 5", "echo", "glue.py: echo: must be a function, got int"),
        ("def echo(x): return x", "echo", "glue.py: echo: must be declared with @model (pool.python)"),
        (
            ECHO.replace("def echo(x)", "def echo(z)"),
            "echo",
            "glue.py: echo: must take its inputs as keywords (x), got (z)",
        ),
        ("1 / 0", "echo", "glue.py: line 4: must be importable, got ZeroDivisionError: division by zero"),
        ("def echo(", "echo", "glue.py: line 4: must be importable, got SyntaxError: "),
        ("import nothing_such", "echo", "must be importable, got ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", "echo", "must be importable, got SystemExit: 3"),
        (
            ECHO.replace("float32 [any, 2]", "float33 [any, 2]", 1),
            "echo",
            "glue.py: line 5: inputs.x: must have a dtype of bool",
        ),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, text, function, message):
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        loaded(tmp_path, text, function)


def test_a_file_that_has_changed_is_another_model(tmp_path):
    version, path = python.resolve(f"{write(tmp_path, ECHO)}:echo")
    python.load(path, None)
    file = write(tmp_path, ECHO + "# more")
    with pytest.raises(ModelLoadError, match=rf"must be as it was loaded \(version {version}\), got version"):
        python.load(path, None)
    file.unlink()
    for act in (lambda: python.load(path, None), lambda: python.resolve(f"{file}:echo")):
        with pytest.raises(ModelLoadError, match=r"glue\.py: must be readable, got No such file"):
            act()
    with pytest.raises(ModelLoadError, match=r'must read "FILE\.py:FUNCTION"'):
        python.resolve(str(file))


TWO = """
@model(inputs={"x": "float32 [any, 2]"}, outputs={"a": "float32 [any, 2]", "s": "string [any]"})
def echo(x):
    return RETURN
"""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x", "glue.py: echo: must return a dict of a, s, got ndarray"),
        ("None", "must return a dict of a, s, got NoneType"),
        ("{'a': x}", "glue.py: echo: must return a, s, got a"),
        ("{'a': x, 's': ['']*len(x), 't': x}", "must return a, s, got a, s, t"),
        (
            "{'a': x.astype(float), 's': ['']*len(x)}",
            "output 'a': must be float32 [3, 2] for 3 rows, got float64 [3, 2]",
        ),
        (
            "{'a': x[1:], 's': ['']*len(x)}",
            "output 'a': must be float32 [3, 2] for 3 rows, got float32 [2, 2]",
        ),
        ("{'a': x[:, :1], 's': ['']*len(x)}", "must be float32 [3, 2] for 3 rows, got float32 [3, 1]"),
        ("{'a': [[1], [1, 2]], 's': ['']*len(x)}", "output 'a': must be an array, got "),
        ("{'a': x, 's': x[:, 0]}", "output 's': must be string [3] for 3 rows, got float32 [3]"),
        (
            "{'a': x, 's': np.array([1]*len(x), object)}",
            "output 's': must hold bytes or str, got int",
        ),
    ],
)
def test_a_return_that_is_not_what_was_declared(tmp_path, value, message):
    """Told to requests as the model's error; and at the start, where nothing is to be served then."""
    text = TWO.replace("RETURN", value)
    call = loaded(tmp_path, text).bind("serving_default", [np.ones((3, 2), np.float32)])
    with pytest.raises(BrokenPromise, match=re.escape(message)):
        call()
    told = re.escape(message.split(", got")[0]).replace(r"\[3", r"\[2").replace("3\\ rows", "2\\ rows")
    with pytest.raises(ModelLoadError, match=told):
        load(tmp_path / "glue.py", "echo")


@pytest.mark.parametrize(
    "value",
    [
        r"[b'a\0', b'\0\0', '']",
        r"['a\0', '\0\0', b'']",
        r"(b'a\0', np.bytes_(b'\0\0'), np.str_(''))",
        r"np.array([b'a\0', b'\0\0', b''], object)",
    ],
)
def test_strings_keep_the_zero_bytes_that_they_end_in(tmp_path, value):
    text = f"""
        @model(inputs={{"x": "float32 [any, 2]"}}, outputs={{"s": "string [any]"}})
        def echo(x):
            return {value}
        """
    (strings,) = loaded(tmp_path, text).bind("serving_default", [np.ones((3, 2), np.float32)])()
    assert strings.tolist() == [b"a\0", b"\0\0", b""]


def load(file, function):
    fd = weights_memory.create()
    try:
        return load_model(python, f"{file}:{function}", fd, True)
    finally:
        os.close(fd)


def test_what_it_raises_is_told_with_its_line(tmp_path):
    text = ECHO.replace("return x", "raise ValueError('no such thing')")
    call = loaded(tmp_path, text).bind("serving_default", [np.ones((3, 2), np.float32)])
    with pytest.raises(ModelError, match=r"^ValueError: no such thing \(glue\.py, line 7\)$"):
        call()
    report = load(tmp_path / "glue.py", "echo")  # that it takes nothing made up does not forbid to serve it
    assert report.unobserved == {"serving_default": "ValueError: no such thing (glue.py, line 7)"}
    assert report.signatures[0].batched


def test_the_loader_finds_what_influences_other_rows(tmp_path):
    write(tmp_path, ECHO.replace("return x", "return x - x.mean(axis=0)"))
    (signature,) = load(tmp_path / "glue.py", "echo").signatures
    assert signature.unbatched_reason == "rows influence each other in output 'y'"


def test_state_is_never_shared(tmp_path):
    report = load(write(tmp_path, ECHO), "echo")
    assert (report.weights_shared, report.unshared_reason) == (
        False,
        "what a Python function keeps is its own",
    )


def test_what_the_file_imports_is_told_its_place(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "unset")
    python.prepare(Placement(threads=3))
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]) == ("-1", "3")
    python.prepare(Placement(gpu=1))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


# -- the configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('path = "glue.py"', 'models.m.path: must read "FILE.py:FUNCTION" where backend is "python", got '),
        ('path = "none.py:echo"', r'models.m.path: must exist, got "[^"]*/none.py:echo"'),
        ('path = "glue.py:echo"\nversion = 1', "models.m.version: must be left out where backend is "),
        (
            'path = "glue.py:echo"\ndevices = ["gpu:0"]\ngpu_memory_mb = 5',
            "models.m.gpu_memory_mb: must be left out where backend is ",
        ),
    ],
)
def test_the_rules_of_its_keys(tmp_path, keys, message):
    write(tmp_path, ECHO)
    file = tmp_path / "pool.toml"
    file.write_text(f'[models.m]\nbackend = "python"\n{keys}\n')
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_its_path_is_relative_to_the_configuration(tmp_path):
    write(tmp_path, ECHO)
    (tmp_path / "pool.toml").write_text('[models.m]\nbackend = "python"\npath = "glue.py:echo"\n')
    assert load_config(tmp_path / "pool.toml").models["m"].path == f"{tmp_path}/glue.py:echo"


def pool(*arguments):
    command = [sys.executable, "-m", "pool", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_check_tells_what_it_finds(tmp_path):
    write(tmp_path, ECHO + "print('imported')\n")
    (tmp_path / "pool.toml").write_text('[models.m]\nbackend = "python"\npath = "glue.py:echo"\n')
    done = pool("check", "--json", tmp_path / "pool.toml")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "imported\n", "once: in the loader, not in the front"
    (signature,) = json.loads(done.stdout)["models"]["m"]["signatures"]
    assert signature["inputs"] == [{"name": "x", "dtype": "float32", "shape": [None, 2]}]
    write(tmp_path, ECHO.replace("return x", "return x[:1]"))
    done = pool("check", tmp_path / "pool.toml")
    assert done.returncode == 1
    assert (
        "model 'm': glue.py: echo: output 'y': must be float32 [2, 2] for 2 rows, got float32 [1, 2]"
        in done.stderr
    )


# -- a real server ---------------------------------------------------------------------------------

CLASSIFIER = """
import io, os, time
from PIL import Image

NAMES = np.array(["dark", "light"])     # made once for each worker
os.write(2, b"imported in %d\\n" % os.getpid())

@model(
    inputs={"jpeg": "string [any]"},
    outputs={"name": "string [any]", "level": "float32 [any]", "pid": "int64 [any]"},
)
def classify(jpeg):
    if b"kill" in jpeg:
        os._exit(9)
    if b"slow" in jpeg:
        time.sleep(0.3)
    levels = [
        1.0 if data == b"slow" else np.asarray(Image.open(io.BytesIO(data)).convert("L")).mean() / 255
        for data in jpeg
    ]
    level = np.array(levels, np.float32)
    pids = np.full(len(jpeg), os.getpid())
    return {"name": NAMES[(level > 0.5).astype(int)], "level": level, "pid": pids}
"""


def jpeg(level):
    out = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    write(folder, CLASSIFIER)
    keys = f'[models.names]\nbackend = "python"\npath = "{folder}/glue.py:classify"\nworkers = 2\n'
    with start_server(folder, keys + "max_batch_size = 32\nmax_rows_bytes = 262144") as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    """Here workers are replaced within a test: stopping the server looks for what is left instead."""
    return


def test_pictures_in_names_out(server):
    with Client(server.endpoint) as client:
        got = client.predict("names", [jpeg(20), jpeg(230)])
        assert got["name"].tolist() == [b"dark", b"light"]
        assert got["level"] == pytest.approx([20 / 255, 230 / 255], abs=0.02)
        status = client.status()
        pids = {worker["pid"] for worker in status["models"]["names"]["workers"]}
        assert set(got["pid"].tolist()) <= pids
        assert [zygote["backend"] for zygote in status["zygotes"]] == ["python"]
    imported = re.findall(r"imported in (\d+)", server.log.read_text())
    assert len(imported) == len(set(imported)) == 3, "the loader and two workers, each once"
    assert pids < set(map(int, imported))
    assert str(server.process.pid) not in imported


def test_users_are_batched_and_one_bad_picture_fails_alone(server):
    levels = np.random.default_rng(0).integers(0, 256, 60)

    async def ask():
        async with AsyncClient(server.endpoint) as client:
            before = (await client.status())["models"]["names"]
            # Two that take a while: the others gather.
            slow = [asyncio.ensure_future(client.predict("names", [b"slow"])) for _ in range(2)]
            await asyncio.sleep(0)
            inputs = [b"no picture" if i % 20 == 7 else jpeg(level) for i, level in enumerate(levels)]
            calls = [client.predict("names", [each]) for each in inputs]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            await asyncio.gather(*slow)
            after = (await client.status())["models"]["names"]
            batches = after["batches"] - before["batches"]
            return answers, (after["rows"] - before["rows"]) / batches

    answers, mean = asyncio.run(ask())
    for i, (answer, level) in enumerate(zip(answers, levels, strict=True)):
        if i % 20 == 7:
            assert isinstance(answer, ModelError)
            assert str(answer).startswith("UnidentifiedImageError: cannot identify image file")
        else:
            assert answer["level"] == pytest.approx([level / 255], abs=0.02)
            assert answer["name"].tolist() == [b"light" if answer["level"][0] > 0.5 else b"dark"]
    assert mean > 1


def test_a_picture_that_kills_is_blamed_and_barred(server):
    with Client(server.endpoint, timeout=PATIENCE_S) as client:
        with pytest.raises(WorkerLost, match="exit code 9"):
            client.predict("names", [b"kill"])
        with pytest.raises(WorkerLost, match="the same request came before"):
            client.predict("names", [b"kill"])
        assert client.predict("names", [jpeg(250)])["name"].tolist() == [b"light"]
        with pytest.raises(InvalidInput):
            client.predict("names", {"png": [b""]})


def test_a_file_that_was_edited_is_served_after_a_reload(start_server, tmp_path):
    write(tmp_path, ECHO)
    keys = f'[models.m]\nbackend = "python"\npath = "{tmp_path}/glue.py:echo"\n'
    x = np.ones((1, 2), np.float32)
    with start_server(tmp_path, keys) as server, Client(server.endpoint) as client:
        assert client.predict("m", x)["y"].tolist() == [[1, 1]]
        write(tmp_path, ECHO.replace("return x", "return x + x"))
        reload = ("reload", "--endpoint", server.endpoint)
        assert "new arena and workers" in pool(*reload, "--dry-run").stdout
        assert client.predict("m", x)["y"].tolist() == [[1, 1]]
        done = pool(*reload)
        assert done.returncode == 0, done.stderr
        assert client.predict("m", x)["y"].tolist() == [[2, 2]]
        assert pool(*reload).stdout == "nothing changes\n"
        write(tmp_path, ECHO.replace("return x", "return x[:0]"))
        done = pool(*reload)
        assert done.returncode == 1
        assert "output 'y': must be float32 [2, 2] for 2 rows, got float32 [0, 2]" in done.stderr
        assert client.predict("m", x)["y"].tolist() == [[2, 2]]
        # What died meanwhile must not come back as something that nobody has looked at.
        (worker,) = client.status()["models"]["m"]["workers"]
        psutil.Process(worker["pid"]).kill()
        deadline = time.monotonic() + PATIENCE_S
        while "must be as it was loaded" not in client.status()["models"]["m"]["workers"][0]["last_error"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        write(tmp_path, ECHO.replace("return x", "return x * np.float32(3)"))
        assert pool(*reload).returncode == 0
        with contextlib.closing(Client(server.endpoint)) as again:
            assert again.predict("m", x)["y"].tolist() == [[3, 3]]


SLOW_TOGETHER = """
import time

@model(inputs={"x": "float32 [any, 16]"}, outputs={"y": "float32 [any, 16]"})
def slow_together(x):
    time.sleep(0.001 * len(x) ** 2)
    return x
"""


def test_the_status_tells_in_what_pieces_batches_are_run(start_server, tmp_path):
    write(tmp_path, SLOW_TOGETHER)
    keys = f'[models.m]\nbackend = "python"\npath = "{tmp_path}/glue.py:slow_together"\nmax_batch_size = 8\n'
    x = np.ones((8, 16), np.float32)
    with start_server(tmp_path, keys) as server, Client(server.endpoint) as client:
        deadline = time.monotonic() + PATIENCE_S
        seen = []
        while not seen or seen[-1] is None:
            assert time.monotonic() < deadline
            np.testing.assert_array_equal(client.predict("m", x)["y"], x)
            (worker,) = client.status()["models"]["m"]["workers"]
            seen.append(worker["piece_rows"])
        told = f"m worker 0: batches in pieces of {worker['piece_rows']} rows"
        assert told in pool("status", "--endpoint", server.endpoint).stdout
    assert seen[0] is None
    assert seen[-1] in (4, 2, 1)
