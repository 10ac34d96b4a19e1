"""A flood of requests for one model, and the turns that others get meanwhile.

Front and test share a loop here, so that its turns can be counted.
"""

from __future__ import annotations

import asyncio

import pytest

from pool import errors
from pool.config import decode_config
from pool.front.endpoint import Endpoint
from pool.front.engine import Engine
from tests.raw import Raw, drill, drill_bundle, ids

DRAIN = 256  # messages of a turn (docs/operations.md 4)
CLIENTS = 4
CONFIG = {
    "slow": {"max_batch_size": 8, "slots": 4},
    "quick": {"max_batch_size": 8, "slots": 4},
}


async def with_server(folder, scene):
    (folder / "slow.toml").write_text("batch_s = 0.2")
    (folder / "quick.toml").write_text("")
    endpoint = f"ipc://{folder}/pool.sock"
    tables = {
        name: {"backend": "drill", "path": f"{folder}/{name}.toml", "warm_up": False} | table
        for name, table in CONFIG.items()
    }
    config = decode_config({"server": {"endpoints": [endpoint]}, "models": tables}, "test")
    engine = Engine(config)
    served = Endpoint(engine, config.server, config.server.endpoints, dict)
    served.open()
    try:
        await engine.start()
        await scene(served, endpoint)
    finally:
        await engine.stop()
        served.close()


def handled(served):
    """Requests admitted or refused."""
    front = served.describe()
    return front["requests"] + sum(front["errors"].values())


@pytest.mark.parametrize(
    ("send", "most"),
    [
        (lambda raw: raw.send(drill("slow")), 3 * DRAIN),
        # Bundles count for less than their requests, as they cost less; the last of a turn goes beyond.
        (lambda raw: raw.send(drill_bundle("slow", [(next(ids), 0, 1) for _ in range(64)])), 2 * 64 * DRAIN),
    ],
    ids=["alone", "bundled"],
)
def test_another_models_answers_get_their_turn_in_a_flood(tmp_path, send, most):
    turns = []

    async def scene(served, endpoint):
        floods = [Raw(endpoint, sndhwm=0, rcvhwm=0) for _ in range(CLIENTS)]
        with Raw(endpoint, rcvtimeo=0) as asker:
            try:
                before, answers = handled(served), 0
                while answers < 20:
                    # It does not end before the answer is there.
                    for raw in floods:
                        for _ in range(2 * DRAIN // CLIENTS):
                            send(raw)
                    wanted = asker.send(drill("quick"))
                    while True:
                        await asyncio.sleep(0)
                        now = handled(served)
                        turns.append(now - before)
                        before = now
                        if asker.socket.poll(0):
                            ((id_, answer),) = asker.receive()
                            assert id_ == wanted
                            assert isinstance(answer, list)
                            answers += 1
                            break
                        for raw in floods:
                            send(raw)
                assert errors.Overloaded.code in served.describe()["errors"]
            finally:
                for raw in floods:
                    raw.close()

    asyncio.run(with_server(tmp_path, scene))
    assert DRAIN // 2 < max(turns) <= most
