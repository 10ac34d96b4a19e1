"""A naked ROUTER and its client: the frames of a prediction or a bundle, answered with nothing done to them.

`python -m bench.peers.echo serve ENDPOINT ROWS ROW_BYTES ANSWER_BYTES` answers messages of so many rows;
`python -m bench.peers.echo load ENDPOINT ROWS ROW_BYTES IN_FLIGHT SECONDS` prints messages/s, p50 in ms.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import zmq

HEADER_BYTES, TABLE_BYTES = 64, 16  # of a message; of each request of a bundle (docs/wire.md 3.9)
# Above this, frames are handed over rather than copied, as pool does.
_COPY_BYTES = 262_144


def frames(rows: int, row_bytes: int) -> list[bytes]:
    """A header, the table if it is a bundle, a tensor."""
    table = [bytes(TABLE_BYTES * rows)] if rows > 1 else []
    return [bytes(HEADER_BYTES), *table, bytes(rows * row_bytes)]


def serve(endpoint: str, rows: int, row_bytes: int, answer_bytes: int) -> None:
    """Answer until killed."""
    answer = bytes(answer_bytes * rows)
    is_small = rows * row_bytes <= _COPY_BYTES
    before = len(frames(rows, row_bytes)) - 1
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.sndhwm = router.rcvhwm = 20_000
        router.bind(endpoint)
        while True:
            kept = [router.recv() for _ in range(1 + before)]
            router.recv(copy=is_small)
            for frame in kept:
                router.send(frame, zmq.SNDMORE)
            router.send(answer)


def load(endpoint: str, rows: int, row_bytes: int, in_flight: int, seconds: float) -> dict[str, float]:
    """Keep so many messages under way for so long."""
    *first, payload = frames(rows, row_bytes)
    is_small = len(payload) <= _COPY_BYTES
    times: list[float] = []
    sent: list[float] = []
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.sndhwm = dealer.rcvhwm = 20_000
        dealer.linger = 0
        dealer.connect(endpoint)
        monotonic = time.monotonic

        def send() -> None:
            sent.append(monotonic())
            for frame in first:
                dealer.send(frame, zmq.SNDMORE)
            dealer.send(payload, 0, is_small)

        began = monotonic()
        for _ in range(in_flight):
            send()
        answered = 0
        # One client, one server: answers come in order.
        while (now := monotonic()) - began < seconds:
            for _ in range(len(first) + 1):
                dealer.recv()
            times.append(monotonic() - sent[answered])
            answered += 1
            send()
    return {"messages_per_s": answered / (now - began), "p50_ms": float(np.median(times)) * 1e3}


if __name__ == "__main__":
    _, what, endpoint, *numbers = sys.argv
    if what == "serve":
        serve(endpoint, *map(int, numbers))
    else:
        *counts, seconds = numbers
        print(json.dumps(load(endpoint, *map(int, counts), float(seconds))))
