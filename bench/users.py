"""Many users with a pipeline each, all on one event loop: the application that is measured.

`python -m bench.users PATH USERS MESSAGES` runs it with the model called in this process, one message after
the other, as TensorFlow documents it; for each line on its standard input it runs once and prints messages/s.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import numpy as np

from pool.flow import Model, Pipeline, Pipelines, Step
from pool.predictor import Predictor

WIDTH = 784  # of the MLP's input
_ROWS = 64

Outputs = dict[str, np.ndarray[Any, Any]]


class User:
    """The state of a pipeline: what the user was told."""

    __slots__ = ("answers",)

    def __init__(self) -> None:
        self.answers = 0


Talk = Pipeline[User, Any, Any]
_pictures = np.random.default_rng(5).random((_ROWS, WIDTH), np.float32)


async def _look(_: Talk, number: int) -> np.ndarray[Any, Any]:
    at = number % _ROWS
    return _pictures[at : at + 1]


async def _tell(talk: Talk, outputs: Outputs) -> int:
    (scores,) = outputs.values()
    if scores.shape != (1, 10):
        raise RuntimeError(f"answer of shape {scores.shape}")
    talk.state.answers += 1
    return talk.state.answers


def pipelines(predict: Step[Any, Any, Outputs]) -> Pipelines[User, int, int]:
    """Pipelines of three steps, the second of which is this one."""
    return Pipelines(Step(_look) | predict | Step(_tell), lambda _: User())


def embedded(predictor: Predictor) -> Pipelines[User, int, int]:
    """Pipelines whose predictions are made by a predictor's model `model`."""
    return pipelines(Model(predictor, "model").predict())


async def talk(users: Pipelines[User, int, int], count: int, messages: int) -> float:
    """So many users send so many messages each, the next when the last is answered; gives messages/s.

    Raises:
        RuntimeError: an answer is missing, or not in order.
    """

    async def one(user: int) -> None:
        before = (await users.get(user)).state.answers
        for number in range(messages):
            if await users.send(user, number) != before + number + 1:
                raise RuntimeError(f"user {user} was not answered in order")

    began = time.perf_counter()
    await asyncio.gather(*(one(user) for user in range(count)))
    return count * messages / (time.perf_counter() - began)


def main() -> None:
    path, count, messages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    loaded = tf.saved_model.load(path)
    function = loaded.signatures["serving_default"]
    (name,) = function.structured_input_signature[1]

    async def predict(_: Talk, x: np.ndarray[Any, Any]) -> Outputs:
        return {key: tensor.numpy() for key, tensor in function(**{name: tf.constant(x)}).items()}

    async def run() -> float:
        users = pipelines(Step(predict))
        rate = await talk(users, count, messages)
        await users.close()
        return rate

    asyncio.run(run())
    print(json.dumps({"warm": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(asyncio.run(run())), flush=True)


if __name__ == "__main__":
    main()
