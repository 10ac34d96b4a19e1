"""What the CPU budget counts, each part alone in a process that does the same thing again and again.

`python -m bench.counted client|worker` says "ready"; for each line "HOW TURNS" on its standard input it
takes so many turns and says "done". `python -m bench.counted front CONFIG` is `pool serve CONFIG`, whose
turns are the requests that it is sent. `bench.cpu_budget` runs them under valgrind.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pool import wire
from pool.__main__ import main as pool
from pool.client.core import ClientCore
from pool.shm import doorbell
from pool.shm.doorbell import Message, Ring
from pool.signature import Signature, TensorSpec
from pool.wire import Flag, Header, Kind, ResultMeta, TensorMeta
from tests.rig import NumpyModel, Rig, generation

ROWS = 64
WIDTH, CLASSES = 784, 10

Turn = Callable[[], object]

_SIGNATURE = Signature(
    "serving_default",
    (TensorSpec("x", "float32", (None, WIDTH)),),
    (TensorSpec("y", "float32", (None, CLASSES)),),
)


def main() -> None:
    what = sys.argv[1]
    if what == "front":
        front(sys.argv[2])
        return
    turns = {"client": client, "worker": worker}[what]()
    print("ready", flush=True)
    for line in sys.stdin:
        how, count = line.split()
        turn = turns[how]
        for _ in range(int(count)):
            turn()
        print("done", flush=True)


def front(config: str) -> None:
    """Serve. valgrind knows no pidfds: children get a descriptor that never tells of an end."""
    kept = []

    def pidfd_open(pid: int, flags: int = 0) -> int:  # noqa: ARG001
        reading, writing = os.pipe()
        kept.append(writing)
        return reading

    os.pidfd_open = pidfd_open
    sys.exit(pool(["serve", config]))


def client() -> dict[str, Turn]:
    """A request encoded and its reply decoded: alone, or 64 that travel together."""
    core = ClientCore()
    core.learn(
        "model",
        None,
        {
            "model": "model",
            "version": 1,
            "max_rows": None,
            "max_frame_bytes": None,
            "signatures": [
                {
                    "name": _SIGNATURE.name,
                    "inputs": [{"name": "x", "dtype": "float32", "shape": [None, WIDTH]}],
                    "outputs": [{"name": "y", "dtype": "float32", "shape": [None, CLASSES]}],
                }
            ],
        },
    )
    meta = wire.encode_meta(ResultMeta(1, (TensorMeta("y", "float32", (CLASSES,)),)))
    alone = [wire.encode_header(Header(Kind.RESULT, 1, meta, rows=1)), bytes(4 * CLASSES)]
    together = [
        wire.encode_header(Header(Kind.RESULT, 0, meta, rows=ROWS, flags=Flag.BUNDLE)),
        b"".join(wire.PART.pack(id_ + 1, 0, 1) for id_ in range(ROWS)),
        bytes(4 * CLASSES * ROWS),
    ]
    x = np.zeros((1, WIDTH), np.float32)

    def one() -> None:
        request = core.request("model", x)
        assert request is not None
        for _ in core.bundle([request]):
            (reply,) = core.receive_all(alone)
        assert reply.error is None

    def many() -> None:
        requests = [core.request("model", x) for _ in range(ROWS)]
        ((_, count),) = core.bundle([request for request in requests if request is not None])
        assert count == ROWS
        assert core.receive_all(together)[-1].error is None

    return {"alone": one, "batch": many}


class Idle(NumpyModel):
    """Gives a part of its input back, which costs nothing."""

    def bind(self, _: str, inputs: Sequence[np.ndarray[Any, Any]]) -> Callable[[], list[Any]]:
        """A call that does nothing."""
        outputs = [inputs[0][:, :CLASSES]]
        return lambda: outputs


def worker() -> dict[str, Turn]:
    """A batch of 64 rows or 1, from doorbell to doorbell, with a model that does nothing."""
    rig = Rig(generation(_SIGNATURE, max_batch_size=ROWS, slots=4), Idle())
    for number in range(ROWS):
        rig.place(number, {"x": np.zeros((1, WIDTH), np.float32)})
    (slot,) = rig.start()
    rig.generation.arena.describe(slot.index, slot.tickets[0].route.layout)
    ours, theirs = doorbell.make_pair()
    waiter = doorbell.Waiter(theirs, 0.0)

    def run(rows: int) -> None:
        doorbell.ring(ours, Message(Ring.RUN, slot.index, rows, slot.generation, slot.layout))
        message = waiter.next()
        assert message is not None
        doorbell.ring(theirs, rig.runner.run(message))
        answer = doorbell.answer(ours)
        assert answer is not None
        assert answer.kind == Ring.DONE, answer.text

    return {"alone": lambda: run(1), "batch": lambda: run(ROWS)}


if __name__ == "__main__":
    main()
