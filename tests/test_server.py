"""A real server with TensorFlow workers: every kind of signature, many clients, shared weights."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import random
import socket
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pool import AsyncClient, Client, InvalidInput, ModelError, Overloaded
from tests import models, reference

# Slots are small, or the arenas of all these models together would be gigabytes.
MODELS = """
[models.exact]
path = "{mlp}"
workers = 2
threads = 1
max_batch_size = 16
allowed_batch_sizes = [16]
slots = 128

[models.free]
path = "{mlp}"
workers = 2
slots = 32

[models.delayed]
path = "{mlp}"
max_queue_delay_ms = 5
max_batch_size = 8
slots = 4

[models.keras]
path = "{mlp.keras}"

[models.shared]
path = "{medium}"
workers = 2

[models.own]
path = "{medium}"
share_weights = false

[models.counter]
path = "{counter}"
workers = 2
max_batch_size = 1
warm_up = false
"""

SMALL_ARENA = """
[models.{name}]
path = "{path}"
slots = 4
max_batch_size = 16
max_rows_bytes = 262144
"""

KINDS = (
    "dtypes",
    "scalars",
    "unknown_dims",
    "unknown_rank",
    "strings",
    "examples",
    "static_table",
    "mutable_table",
    "signatures",
    "fixed_rows",
    "unfollowing_output",
    "mixing_rows",
    "raising",
    "variable_dtypes",
    "slots",
    "tf1_reference",
    "tf1_table",
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    paths = {name: models.path(name) for name in ("mlp", "mlp.keras", "medium", "counter")}
    text = MODELS
    for name, path in paths.items():
        text = text.replace("{" + name + "}", str(path))
    text += "".join(SMALL_ARENA.format(name=name, path=models.path(name)) for name in KINDS)
    folder = tmp_path_factory.mktemp("house")
    endpoints = [f"ipc://{folder}/pool.sock", f"tcp://127.0.0.1:{free_port()}"]
    with start_server(folder, text, endpoints=endpoints) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with Client(server.endpoint) as made:
        yield made


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Rows for the MLP, and what TensorFlow says of each in a batch of 16."""
    x = np.random.default_rng(5).random((512, 784), np.float32)
    linear = np.concatenate([np.eye(4, dtype=np.float32), np.full((12, 4), 0.5, np.float32)])
    given = {"mlp": x, "tf1_reference": linear, "medium": np.ones((16, 1024), np.float32)}
    return x, linear, reference.answers(tmp_path_factory.mktemp("reference"), given)


# -- every kind of signature over the real wire ------------------------------------------------------


def strings(*items):
    array = np.empty(len(items), object)
    array[:] = items
    return array


def message(number, payload):
    """A length-delimited protobuf field."""
    size, prefix = len(payload), b""
    while size > 127:
        prefix, size = prefix + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + prefix + bytes([size]) + payload


def example(**features):
    """A serialized `tf.train.Example`, as a client without TensorFlow writes it."""
    entries = b""
    for name, values in features.items():
        if isinstance(values[0], float):
            listed = message(2, message(1, b"".join(struct.pack("<f", v) for v in values)))
        elif isinstance(values[0], int):
            listed = message(3, message(1, bytes(values)))
        else:
            listed = message(1, b"".join(message(1, v) for v in values))
        entries += message(1, message(1, name.encode()) + message(2, listed))
    return message(1, entries)


def negated(array, dtype):
    if dtype == "bool":
        return ~array
    if dtype == "string":
        return np.array([item + b"!" for item in array.reshape(-1)], object).reshape(array.shape)
    return ~array if dtype.startswith("u") else -array


@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_every_dtype(client, rows):
    generator = np.random.default_rng(rows)
    sent = {}
    for dtype in models.DTYPES:
        if dtype == "string":
            array = np.array([b"%d\0\xff" % i for i in range(3 * rows)], object).reshape(rows, 3)
        elif dtype == "bool":
            array = generator.integers(0, 2, (rows, 3)).astype(bool)
        elif dtype == "bfloat16":
            array = generator.normal(size=(rows, 3)).astype(ml_dtypes.bfloat16)
        elif "int" in dtype:
            limits = np.iinfo(dtype)
            array = generator.integers(limits.min, limits.max, (rows, 3), dtype, endpoint=True)
        elif "complex" in dtype:
            array = (generator.normal(size=(rows, 3)) + 1j * generator.normal(size=(rows, 3))).astype(dtype)
        else:
            array = generator.normal(size=(rows, 3)).astype(dtype)
        sent[dtype] = array
    got = client.predict("dtypes", sent)
    assert list(got) == [spec.name for spec in client.signature("dtypes").signatures[0].outputs]
    for dtype, array in sent.items():
        back = got[f"{dtype}_out"]
        with np.errstate(over="ignore"):
            want = negated(array, dtype)
        assert back.dtype == want.dtype
        assert back.shape == (rows, 3)
        assert back.tolist() == want.tolist() if dtype == "string" else back.tobytes() == want.tobytes()


def test_nan_and_infinity_are_values_like_others(client):
    x = np.array([np.nan, np.inf, -np.inf, -0.0], np.float32)
    np.testing.assert_array_equal(client.predict("unknown_rank", x)["y"], x * 2)


def test_rank_0_rows(client):
    got = client.predict("scalars", {"x": np.arange(3, dtype=np.int32), "y": np.ones(3, np.float32)})
    assert got["sum"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("length", [0, 1, 7, 300])
def test_unknown_dimensions(client, length):
    ids = np.arange(3 * length, dtype=np.int32).reshape(3, length)
    mask = (ids % 2).astype(np.int32)
    got = client.predict("unknown_dims", {"ids": ids, "mask": mask})
    assert got["sum"].tolist() == (ids * mask).sum(1).tolist()
    np.testing.assert_array_equal(got["product"], ids * mask)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (3, 2, 2), (2, 1, 2, 3)])
def test_unknown_rank(client, shape):
    x = np.random.default_rng(1).random(shape, np.float32)
    np.testing.assert_array_equal(client.predict("unknown_rank", x)["y"], x * 2)


def test_strings(client):
    sent = [b"", b"abc", b"a\0b", b"x" * 1000, "é".encode()]
    got = client.predict("strings", strings(*sent))
    assert got["upper"].tolist() == [item.upper() for item in sent]
    assert got["length"].tolist() == [len(item) for item in sent]


def test_serialized_examples(client):
    sent = [example(a=[1.5, 2.0], b=[i], tags=[b"t"]) for i in range(20)]
    got = client.predict("examples", strings(*sent))
    assert got["y"].tolist() == [3.5 + i for i in range(20)]


def test_hash_tables(client):
    words = strings(b"two", b"one", b"many")
    assert client.predict("static_table", words)["number"].tolist() == [20, 10, -10]
    assert client.predict("mutable_table", words)["number"].tolist() == [20, 10, -10]
    status = client.status()["models"]["mutable_table"]
    assert not status["weights_shared"]
    assert status["unshared_reason"]


def test_a_tensorflow_1_model_with_a_table_and_examples(client):
    words = strings(*(example(word=[word]) for word in (b"two", b"one", b"many")))
    assert client.predict("tf1_table", words)["number"].tolist() == [20, 10, -10]


def test_several_signatures(client):
    x = np.array([[1, 2], [3, 4]], np.float32)
    np.testing.assert_array_equal(client.predict("signatures", x)["y"], x * 3)
    np.testing.assert_array_equal(client.predict("signatures", x, signature="double")["y"], x * 2)
    skipped = client.status()["models"]["signatures"]["skipped"]
    assert set(skipped) == {"nothing", "quantized"}
    assert all(skipped.values())


@pytest.mark.parametrize("kind", ["fixed_rows", "mixing_rows", "unfollowing_output"])
def test_what_cannot_be_batched_is_served_whole_and_says_why(client, kind):
    (signature,) = client.signature(kind).signatures
    assert not signature.batched
    assert signature.unbatched_reason
    x = (
        np.array([[1, 2, 3]], np.float32)
        if kind == "fixed_rows"
        else np.arange(12, dtype=np.float32).reshape(4, 3)
    )
    got = client.predict(kind, x)
    want = x - x.mean(0) if kind == "mixing_rows" else x * 2
    np.testing.assert_allclose(got["y"], want)
    if kind == "unfollowing_output":
        assert got["labels"].tolist() == [b"a", b"b", b"c", b"d"]


def test_variables_of_every_dtype(client):
    got = client.predict("variable_dtypes", np.zeros(2, np.float32))["y"]
    assert got.tolist() == [45.0, 45.0]  # 15 variables of three ones


def test_an_object_graph_that_cannot_be_revived(client):
    w = client.predict("slots", np.eye(4, dtype=np.float32))["y"]
    assert w.shape == (4, 3)
    assert len(np.unique(w)) == 12
    x = np.random.default_rng(2).random((9, 4), np.float32)
    np.testing.assert_allclose(client.predict("slots", x)["y"], x @ w, rtol=1e-5)


def test_a_tensorflow_1_model(client, digits):
    _, linear, answers = digits
    got = client.predict("tf1_reference", linear)
    np.testing.assert_array_equal(got["y"], got["z"])
    np.testing.assert_allclose(got["y"], answers["tf1_reference"], rtol=1e-5)


def test_a_keras_file(client, digits):
    x, _, answers = digits
    got = next(iter(client.predict("keras", x[:64]).values()))
    np.testing.assert_allclose(got, answers["mlp"][:64], rtol=1e-5, atol=1e-5)


def test_a_chosen_output_alone_is_sent(client):
    got = client.predict("strings", strings(b"a"), outputs=["length"])
    assert {name: array.tolist() for name, array in got.items()} == {"length": [1]}


# -- models that raise -------------------------------------------------------------------------------


def workers(client, model):
    return client.status()["models"][model]["workers"]


def test_a_model_that_raises_answers_its_message_and_its_worker_lives(client):
    (before,) = workers(client, "raising")
    for _ in range(20):
        with pytest.raises(ModelError, match="x must not be negative"):
            client.predict("raising", np.array([-1], np.float32))
        assert client.predict("raising", np.array([4], np.float32))["y"].tolist() == [2.0]
    (after,) = workers(client, "raising")
    assert (after["pid"], after["restarts"]) == (before["pid"], 0)
    assert after["state"] == "ready"


# -- many clients ------------------------------------------------------------------------------------

REQUESTS = 500
CLIENTS = 8


def plan(seed):
    """500 (start, rows): mostly single rows, some that are split over batches, some without rows."""
    generator = random.Random(seed)
    spans = []
    for _ in range(REQUESTS):
        rows = generator.choice([0, 1, 1, 1, 1, 2, 3, generator.randint(4, 16), generator.randint(17, 200)])
        spans.append((generator.randint(0, 512 - rows), rows))
    return spans


def check(model, got, want):
    (array,) = got.values()
    if model == "exact":
        assert array.tobytes() == want.tobytes(), "not the same bits as TensorFlow at the same batch size"
    else:
        np.testing.assert_allclose(array, want, rtol=1e-5, atol=1e-5)
    return len(want)


def one_at_a_time(endpoint, model, seed, x, want):
    rows = 0
    with Client(endpoint) as client:
        for start, n in plan(seed):
            while True:
                try:
                    got = client.predict(model, x[start : start + n])
                    break
                except Overloaded:
                    continue
            rows += check(model, got, want[start : start + n])
    return rows


def many_at_a_time(endpoint, model, seed, x, want):
    async def run():
        limit = asyncio.Semaphore(16)

        async def one(start, n):
            async with limit:
                got = await client.predict(model, x[start : start + n])
            return check(model, got, want[start : start + n])

        async with AsyncClient(endpoint) as client:
            return sum(await asyncio.gather(*(one(*span) for span in plan(seed))))

    return asyncio.run(run())


@pytest.mark.parametrize("model", ["exact", "free"])
def test_every_answer_to_many_clients_is_tensorflows_own(server, client, digits, model):
    x, _, answers = digits
    want = answers["mlp"]
    before = client.status()["models"][model]["rows"]
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as threads:
        running = [
            threads.submit(
                many_at_a_time if seed < 2 else one_at_a_time,
                server.endpoints[seed % 2],
                model,
                seed,
                x,
                want,
            )
            for seed in range(CLIENTS)
        ]
        rows = sum(each.result() for each in running)
    assert rows == sum(n for seed in range(CLIENTS) for _, n in plan(seed))
    status = client.status()["models"][model]
    assert status["rows"] - before == rows
    assert max(map(int, status["batch_sizes"])) <= status["max_batch_size"]
    assert status["queue_rows"] == 0
    assert all(each["batches"] > 0 for each in status["workers"]), "a worker idled throughout"
    assert len(status["batch_sizes"]) > 3, "requests did not run together"


def test_a_delay_gathers_what_comes_apart(server, client, digits):
    x, _, answers = digits

    async def burst():
        async with AsyncClient(server.endpoint) as each:
            await each.predict("delayed", x[:1])
            return await asyncio.gather(*(each.predict("delayed", x[i : i + 1]) for i in range(8)))

    for i, got in enumerate(asyncio.run(burst())):
        np.testing.assert_allclose(next(iter(got.values()))[0], answers["mlp"][i], rtol=1e-5, atol=1e-5)
    sizes = client.status()["models"]["delayed"]["batch_sizes"]
    assert max(map(int, sizes)) > 1


def test_a_client_leaves_no_descriptor_behind(server):
    before = len(os.listdir("/proc/self/fd"))
    for endpoint in server.endpoints:
        with Client(endpoint) as each:
            each.predict("scalars", {"x": np.zeros(1, np.int32), "y": np.zeros(1, np.float32)})
    assert len(os.listdir("/proc/self/fd")) == before


# -- memory ------------------------------------------------------------------------------------------


def mapped(pid, name):
    """Rss, Pss and private bytes of a process's mappings of a memfd."""
    totals, inside = {"Rss": 0, "Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in totals and inside:
            totals[key] += int(rest.split()[0]) << 10
        elif "-" in line.split()[0]:
            inside = f"/memfd:{name}" in line
    return totals


def test_two_workers_share_one_copy_of_the_weights(client, digits):
    x = np.ones((1, 1024), np.float32)
    want = digits[2]["medium"][:1]
    for model in ("shared", "own"):
        np.testing.assert_allclose(client.predict(model, x)["y"], want, rtol=1e-5, atol=1e-6)
    status = client.status()["models"]
    size = status["shared"]["weights_bytes"]
    assert size == 6 * 1024 * 1024 * 4
    assert status["shared"]["weights_shared"]
    assert not status["own"]["weights_shared"]
    one, two = status["shared"]["workers"]
    (alone,) = status["own"]["workers"]
    for worker in (one, two):
        seen = mapped(worker["pid"], "pool-weights")
        assert seen["Rss"] >= size, "the warm-up has read all of them"
        assert seen["Pss"] <= 0.55 * size, "they count for half in each of two workers"
        assert seen["Private_Dirty"] + seen["Private_Clean"] < 0.05 * size
        # And there is no second copy elsewhere: a worker with its own has that much more to itself.
        assert alone["uss_bytes"] - worker["uss_bytes"] > 0.8 * size
    assert mapped(alone["pid"], "pool-weights")["Rss"] == 0


def test_a_model_that_writes_a_variable_writes_its_own_workers_alone(server, client):
    assert client.status()["models"]["counter"]["weights_shared"]
    zero = np.zeros(1, np.float32)

    def calls():
        with Client(server.endpoint) as each:
            return [float(each.predict("counter", zero)["y"][0]) for _ in range(100)]

    counts = []
    while True:  # until both have run some: which worker is idle is chance
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            for each in [threads.submit(calls) for _ in range(4)]:
                counts += each.result()
        ran = [worker["batches"] for worker in workers(client, "counter")]
        if min(ran) > 0:
            break
    # Each worker counts its own calls, after the one of its warm-up.
    expected = sorted(float(1 + call) for batches in ran for call in range(1, batches + 1))
    assert sorted(counts) == expected


# -- questions ---------------------------------------------------------------------------------------


def test_the_server_tells_what_it_serves(server, client):
    listed = client.models()
    assert set(listed) == {*KINDS, "exact", "free", "delayed", "keras", "shared", "own", "counter"}
    assert all(each["ready"] and each["version"] >= 1 for each in listed.values())
    status = client.status()
    assert status["front"]["pid"] == server.process.pid
    assert status["front"]["endpoints"] == server.endpoints
    assert all(len(model["workers"]) == (2 if name in ("exact", "free", "shared", "counter") else 1)
               for name, model in status["models"].items())  # fmt: skip
    assert client.live()
    assert client.ready("exact")


def test_the_front_never_imports_a_framework(client):
    front = client.status()["front"]
    maps = Path(f"/proc/{front['pid']}/maps").read_text()
    assert "tensorflow" not in maps
    assert "pool-weights" not in maps


def test_the_socket_file_is_for_owner_and_group(server):
    path = Path(server.endpoint.removeprefix("ipc://"))
    assert path.stat().st_mode & 0o777 == 0o660


def test_a_refused_input_costs_the_server_nothing(client):
    before = client.status()["front"]["requests"]
    with pytest.raises(InvalidInput):
        client.predict("exact", np.zeros((1, 7), np.float32))
    assert client.status()["front"]["requests"] == before
