"""Predictions as steps: as many at the same time as the model has room for. Runs in the caller's process."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pool.errors import PoolError, error_from_code
from pool.flow.pipeline import Pipeline, Step
from pool.predictor import Predictor

if TYPE_CHECKING:
    import numpy.typing as npt

    from pool.client.core import ModelInfo
    from pool.client.retry import Retry

# Where a model has no limit of its own.
_IN_FLIGHT = 1024


class Model:
    """A model of a predictor, shared by all pipelines that use it.

    A server refuses what it has no room for. Here messages wait for room instead, in order, and their
    pipelines with them: back-pressure, end to end.

    Args:
        predictor: A `Pool` or an `AsyncClient`.
        name: Of the model.
        in_flight: Most predictions under way; None for as many single rows as the model takes of one client.

    Raises:
        ValueError: `in_flight` is not 1 or more.
    """

    def __init__(self, predictor: Predictor, name: str, *, in_flight: int | None = None) -> None:
        if in_flight is not None and in_flight < 1:
            raise ValueError(f"in_flight is {in_flight}; wanted 1 or more")
        self._predictor = predictor
        self.name = name
        self._free = in_flight
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._learning: asyncio.Future[ModelInfo | PoolError] | None = None

    def predict(
        self,
        *,
        version: int | None = None,
        signature: str | None = None,
        outputs: Sequence[str] | None = None,
        cast: str | None = None,
        priority: int | None = None,
        retry: Retry | None = None,
    ) -> Step[Any, Any, dict[str, npt.NDArray[Any]]]:
        """A step from inputs to outputs, with row axes, as `Predictor.predict` takes and gives them.

        Its timeout is what remains of the message's.
        """

        async def run(pipeline: Pipeline[Any, Any, Any], inputs: Any) -> dict[str, npt.NDArray[Any]]:
            if not self._free:
                await self._wait()
            else:
                self._free -= 1
            try:
                return await self._predictor.predict(
                    self.name,
                    inputs,
                    version=version,
                    signature=signature,
                    outputs=outputs,
                    timeout=pipeline.remaining(),
                    cast=cast,
                    priority=priority,
                    retry=retry,
                )
            finally:
                self._pass_on()

        return Step(run)

    async def _wait(self) -> None:
        """Wait for a place, which is the caller's then."""
        if self._free is None:
            await self._learn()
        if self._free:
            self._free -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():
                self._pass_on()
            elif place in self._waiting:
                self._waiting.remove(place)
            raise

    async def _learn(self) -> None:
        """Ask how many places there are, once for all that want to know."""
        if self._learning is None or self._learning.done():
            self._learning = asyncio.ensure_future(self._ask())
        learning = self._learning
        await asyncio.wait([learning])
        info = learning.result()
        if isinstance(info, PoolError):  # an error each: whoever raises one writes its traceback into it
            raise error_from_code(info.code, info.message, retry_after_ms=info.retry_after_ms)
        if self._free is None:
            self._free = info.max_rows or _IN_FLIGHT

    async def _ask(self) -> ModelInfo | PoolError:
        try:
            return await self._predictor.signature(self.name)
        except PoolError as e:
            return e

    def _pass_on(self) -> None:
        """A place is free: the next one's."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():  # done: cancelled
                place.set_result(None)
                return
        assert self._free is not None, "a place was taken"
        self._free += 1
