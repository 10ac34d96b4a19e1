"""A million damaged messages through the decoders, and twenty thousand through a socket to a real server.

Whatever the bytes are, the outcome is a value or a `WireError`; a server answers each message and goes on
serving everybody else. `tests/mutation.py` makes the messages.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import zmq

from pool import AsyncClient, Client, wire
from pool.backends.drill import answer
from pool.client.core import ClientCore
from pool.errors import PoolError, WireError
from pool.signature import DTYPES, numpy_dtype
from pool.wire import Flag, Header, Kind, PredictMeta, ResultMeta, TensorMeta
from tests.mutation import Mutator
from tests.test_wire import documented_messages

MESSAGES = 1_000_000
SOCKET_MESSAGES = 20_000
SEEDS = (1, 2)


def of_every_dtype(kind, rows):
    """A message with a tensor of each dtype, of different ranks."""
    tensors, frames = [], []
    for i, dtype in enumerate(DTYPES):
        shape = (2, 3, 1)[: i % 4]
        tensors.append(TensorMeta(f"tensor {i}", dtype, shape))
        if dtype == "string":
            array = np.array([b"word " * (k % 3) for k in range(rows * int(np.prod(shape)))], object)
        else:
            array = np.ones((rows, *shape), numpy_dtype(dtype))
        frames.append(bytes(wire.encode_tensor(array, dtype)))
    if kind is Kind.PREDICT:
        meta = wire.encode_meta(PredictMeta("m", 1, "serving_default", tuple(tensors), ("y", "z")))
    else:
        meta = wire.encode_meta(ResultMeta(1, tuple(tensors)))
    return [wire.encode_header(Header(kind, 77, meta, rows=rows)), *frames]


REQUESTS = [frames for name, frames in documented_messages().items() if frames[0][3] < Kind.RESULT]
REPLIES = [frames for name, frames in documented_messages().items() if frames[0][3] >= Kind.RESULT]


# -- the decoders ----------------------------------------------------------------------------------


def decode_request(frames):
    """What a server does with a message before it knows any model."""
    wire.peek_id(frames[0])
    header = wire.decode_header(frames[0])
    tensors = frames[1:]
    if header.kind is Kind.PREDICT:
        meta = wire.decode_meta(PredictMeta, header.meta)
        if header.flags & Flag.BUNDLE:
            wire.split_parts(tensors[0] if tensors else b"", header.rows)
            tensors = tensors[1:]
        for tensor, payload in zip(meta.inputs, tensors, strict=False):
            wire.decode_tensor(payload, tensor.dtype, (header.rows, *tensor.shape))
    elif header.kind in (Kind.SIGNATURE, Kind.READY):
        wire.decode_meta(wire.SignatureMeta, header.meta)
    elif header.kind is Kind.RESULT:
        wire.decode_meta(ResultMeta, header.meta)
    elif header.kind is Kind.ERROR:
        wire.decode_error(header)
    elif header.kind is Kind.INFO:
        wire.decode_info(header.meta)


def decode_reply(core):
    def decode(frames):
        for reply in core.receive_all(frames):
            outcomes = (reply.outputs, reply.document, reply.error)
            assert sum(outcome is not None for outcome in outcomes) == 1
            if reply.error is not None:
                assert isinstance(reply.error, PoolError)
                raise WireError("told")

    return decode


def run(decode, good, count, seed):
    """Decode so many damaged messages; the share that still was a message."""
    mutator = Mutator(good, seed)
    values = 0
    for i in range(count):
        frames = mutator.next()
        try:
            decode(frames)
        except WireError:
            continue
        except BaseException as e:
            raise AssertionError(f"message {i} of seed {seed}: {[frame.hex() for frame in frames]}") from e
        values += 1
    return values / count


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_requests_are_values_or_wire_errors(seed):
    good = [*REQUESTS, *REQUESTS, of_every_dtype(Kind.PREDICT, 2)]
    share = run(decode_request, good, MESSAGES // 4, seed)
    assert 0.1 < share < 0.9, "the damage is too little, or too much, to find anything"


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_replies_are_values_or_wire_errors(seed):
    good = [*REPLIES, *REPLIES, of_every_dtype(Kind.RESULT, 2)]
    share = run(decode_reply(ClientCore()), good, MESSAGES // 4, seed)
    assert 0.1 < share < 0.9, "the damage is too little, or too much, to find anything"


# -- a real server ---------------------------------------------------------------------------------

# Answers are checked on a model of its own: what a damaged row asks the drill backend to do, it does.
MODELS = """
[models.fuzzed]
backend = "drill"
path = "{path}"
max_batch_size = 16

[models.honest]
backend = "drill"
path = "{path}"
max_batch_size = 16
"""
ROW_ITEMS = 4
UNDER_WAY = 40  # messages without an answer at a time: few enough that their rows find room
PATIENCE_S = 40.0
RSS_GROWTH_BYTES = (
    32 << 20
)  # caches are bounded (4,096 entries of some kB), and the allocator keeps what it had
INPUTS = (
    TensorMeta("x", "float32", (ROW_ITEMS,)),
    TensorMeta("fault", "int32", ()),
    TensorMeta("argument", "float32", ()),
)
ids = itertools.count(1000)


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "drill.toml").write_text(f"row_items = {ROW_ITEMS}")
    with start_server(folder, MODELS.format(path=folder)) as running:
        yield running


def predict(rows, meta=None, table=(), **fields):
    meta = meta or PredictMeta("fuzzed", None, None, INPUTS)
    x = np.arange(rows * ROW_ITEMS, dtype=np.float32)
    header = Header(Kind.PREDICT, next(ids), wire.encode_meta(meta), rows=rows, **fields)
    return [
        wire.encode_header(header),
        *table,
        x.tobytes(),
        np.zeros(rows, np.int32).tobytes(),
        np.ones(rows, np.float32).tobytes(),
    ]


def good_messages():
    """Requests of every kind to the model `fuzzed`; few of STATUS, which takes the front milliseconds."""
    table = b"".join(wire.PART.pack(next(ids), 60_000, rows) for rows in (1, 3, 0, 2))
    few = [frames for frames in REQUESTS if frames[0][3] != Kind.STATUS]
    many = [
        predict(1),
        predict(3, millis=60_000),
        predict(40),
        predict(0),
        predict(2, PredictMeta("fuzzed", 1, "serving_default", INPUTS, ("pid", "y"))),
        predict(2, priority=2, flags=Flag.PRIORITY),
        predict(6, table=[table], flags=Flag.BUNDLE),
        [
            wire.encode_header(
                Header(Kind.SIGNATURE, next(ids), wire.encode_meta(wire.SignatureMeta("fuzzed")))
            )
        ],
        [*predict(1), *[b"!"] * 300],
        of_every_dtype(Kind.PREDICT, 2),
    ]
    return [*few, *many * 12, *REPLIES, [wire.encode_header(Header(Kind.STATUS, next(ids), b""))]]


def answers_due(frames):
    """How many replies a message is owed (docs/wire.md 5), at least and at most."""
    try:
        header = wire.decode_header(frames[0])
    except PoolError:
        return 1, 1
    if header.kind is Kind.CANCEL:
        return 0, 1  # none, but frames that it should not have are refused
    if header.kind is Kind.PREDICT and header.flags & Flag.BUNDLE:
        try:
            parts = wire.split_parts(frames[1] if len(frames) > 1 else b"", header.rows)[0]
        except WireError:
            return 1, 1
        return len(parts), len(parts)
    return 1, 1


class Dealer:
    """A client of no manners, which counts the replies it gets."""

    def __init__(self, endpoint):
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvhwm = self.socket.sndhwm = 0
        self.socket.connect(endpoint)
        self.replies = 0
        self.kinds = Counter()

    def close(self):
        self.socket.close()
        self._context.term()

    def take(self, timeout_s=0.0):
        """Take the replies that are there; the header of the last one, None if there was none."""
        header = None
        while self.socket.poll(timeout_s * 1000 if header is None else 0):
            frames = self.socket.recv_multipart()
            header = wire.decode_header(frames[0])
            count = 1
            if header.flags & Flag.BUNDLE:
                count = len(wire.split_parts(frames[1], header.rows)[0])
            self.kinds[header.kind] += count
            self.replies += count
        return header

    def await_replies(self, count):
        """Take replies until there are so many."""
        while self.replies < count:
            assert self.take(PATIENCE_S) is not None, f"{count - self.replies} replies are missing"

    def send(self, mutator, messages):
        """Send damaged messages as fast as they are answered, and await every answer that is due."""
        least, most = self.replies, self.replies
        for _ in range(messages):
            frames = mutator.next()
            low, high = answers_due(frames)
            least, most = least + low, most + high
            self.socket.send_multipart(frames)
            self.take()
            self.await_replies(least - UNDER_WAY)
        self.await_replies(least)
        # A question asked last, when nothing is under way any more, is answered last.
        self.socket.send(wire.encode_header(Header(Kind.LIVE, 1, b"")))
        while self.take(PATIENCE_S) is None or self.replies <= least:
            pass
        assert least < self.replies <= most + 1, "a message was answered twice"


class Honest:
    """Clients that ask and check until they are told to stop: a blocking one and an asyncio one."""

    def __init__(self, endpoint):
        self._endpoint = endpoint
        self._is_over = threading.Event()
        self.answered = [0, 0]
        self.failures = []
        self._threads = [
            threading.Thread(target=self._guard, args=(0, self._blocking)),
            threading.Thread(target=self._guard, args=(1, lambda: asyncio.run(self._asyncio()))),
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _guard(self, _place, play):
        try:
            play()
        except BaseException as e:
            self.failures.append(e)

    def _inputs(self, place):
        rows = self.answered[place] % 5 + 1
        x = np.random.default_rng((place, self.answered[place])).random((rows, ROW_ITEMS), np.float32)
        return {"x": x, "fault": np.zeros(rows, np.int32), "argument": np.zeros(rows, np.float32)}

    def _check(self, place, inputs, outputs):
        np.testing.assert_array_equal(outputs["y"], answer(inputs["x"], 1))
        self.answered[place] += 1

    def _blocking(self):
        with Client(self._endpoint) as local, Client(self._endpoint, share_memory=False) as plain:
            while not self._is_over.wait(0.002):
                inputs = self._inputs(0)
                client = (local, plain)[self.answered[0] % 2]
                self._check(0, inputs, client.predict("honest", inputs))

    async def _asyncio(self):
        async with AsyncClient(self._endpoint) as client:
            while not self._is_over.is_set():
                batch = [self._inputs(1) for _ in range(4)]
                for inputs, outputs in zip(
                    batch,
                    await asyncio.gather(*[client.predict("honest", each) for each in batch]),
                    strict=True,
                ):
                    self._check(1, inputs, outputs)
                await asyncio.sleep(0.01)

    def await_answers(self, count):
        """Wait until each has so many more answers."""
        wanted = [answered + count for answered in self.answered]
        deadline = time.monotonic() + PATIENCE_S
        while any(got < want for got, want in zip(self.answered, wanted, strict=True)):
            assert not self.failures
            assert time.monotonic() < deadline, "no answers"
            self._is_over.wait(0.01)


def test_a_server_answers_damaged_messages_and_serves_on(server):
    front = psutil.Process(server.process.pid)
    dealer = Dealer(server.endpoint)
    try:
        with Honest(server.endpoint) as honest, Client(server.endpoint) as client:
            honest.await_answers(10)
            mutator = Mutator(good_messages(), 3)
            dealer.send(mutator, SOCKET_MESSAGES // 2)
            half_bytes = front.memory_info().rss
            dealer.send(mutator, SOCKET_MESSAGES // 2)
            assert front.memory_info().rss - half_bytes < RSS_GROWTH_BYTES
            honest.await_answers(50)
            status = client.status()
        assert not honest.failures
        assert status["front"]["pid"] == server.process.pid
        assert server.process.poll() is None
        assert [w["restarts"] for model in status["models"].values() for w in model["workers"]] == [0, 0]
        assert "INTERNAL" not in status["front"]["errors"], status["front"]["errors"]
        assert "Traceback" not in server.log.read_text()
        # The damage reached deep: requests were run, questions answered, all sorts refused.
        assert (
            min(dealer.kinds[kind] for kind in (Kind.RESULT, Kind.INFO, Kind.ERROR)) > SOCKET_MESSAGES // 50
        )
        assert status["front"]["errors"].keys() >= {
            "MALFORMED",
            "INVALID_INPUT",
            "MODEL_NOT_FOUND",
            "TOO_LARGE",
        }
    finally:
        dealer.close()
