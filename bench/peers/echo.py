"""A naked ROUTER and its client: messages like a prediction's, answered by what came with nothing done to it.

`python -m bench.peers.echo serve ENDPOINT ANSWER_BYTES BYTES` answers messages of so many bytes;
`python -m bench.peers.echo load ENDPOINT BYTES IN_FLIGHT SECONDS` prints messages/s and the p50 in ms.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import zmq

HEADER = bytes(64)
# Above this, frames are handed over rather than copied, as pool does.
_COPY_BYTES = 262_144


def serve(endpoint: str, answer_bytes: int, message_bytes: int) -> None:
    """Answer until killed."""
    answer = bytes(answer_bytes)
    is_small = message_bytes <= _COPY_BYTES
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.sndhwm = router.rcvhwm = 20_000
        router.bind(endpoint)
        while True:
            identity, header = router.recv(), router.recv()
            router.recv(copy=is_small)
            router.send(identity, zmq.SNDMORE)
            router.send(header, zmq.SNDMORE)
            router.send(answer)


def load(endpoint: str, message_bytes: int, in_flight: int, seconds: float) -> dict[str, float]:
    """Keep so many messages under way for so long."""
    payload = bytes(message_bytes)
    is_small = message_bytes <= _COPY_BYTES
    times: list[float] = []
    sent: list[float] = []
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.sndhwm = dealer.rcvhwm = 20_000
        dealer.linger = 0
        dealer.connect(endpoint)
        monotonic = time.monotonic

        def send() -> None:
            sent.append(monotonic())
            dealer.send(HEADER, zmq.SNDMORE)
            dealer.send(payload, 0, is_small)

        began = monotonic()
        for _ in range(in_flight):
            send()
        answered = 0
        # One client, one server: answers come in order.
        while (now := monotonic()) - began < seconds:
            dealer.recv()
            dealer.recv()
            times.append(monotonic() - sent[answered])
            answered += 1
            send()
    return {"messages_per_s": answered / (now - began), "p50_ms": float(np.median(times)) * 1e3}


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        print(json.dumps(load(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))))
