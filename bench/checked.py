"""Load whose every answer is checked: so many requests of one row are always under way.

`python -m bench.checked ENDPOINT FILE CONCURRENCY` sends rows of FILE to the model `model`, prints a line
when it has its first answer, and goes on until its standard input is closed. Then it awaits what is under way
and prints `{"tally": …, "slowest_s": …}`. FILE is a `.npz` with the inputs as `in.NAME` (a sole one may have
any name) and what the first output must be as `out`, row for row.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from typing import Any

import msgspec
import numpy as np

from pool import AsyncClient, DeadlineExceeded, PoolError
from pool.cli.chaos_tally import Tally

# A request without a reply for so long is lost.
PATIENCE_S = 10.0
# A batch of another size rounds in another order; a mixed-up or stale row is wrong by far more.
TOLERANCE = 1e-3


def is_close(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> bool:
    """Whether an answer is right, but for rounding."""
    return got.shape == want.shape and bool((np.abs(got - want) <= TOLERANCE * (1 + np.abs(want))).all())


class Load:
    """Requests under way and what became of the others."""

    def __init__(self, endpoint: str, file: str) -> None:
        self._endpoint = endpoint
        with np.load(file, allow_pickle=False) as arrays:
            self._want = arrays["out"]
            self._inputs = {name[3:]: arrays[name] for name in arrays.files if name.startswith("in.")}
        self._places = itertools.cycle(range(len(self._want)))
        self._is_stopping = asyncio.Event()
        self.tally = Tally()
        self.slowest_s = 0.0

    async def run(self, concurrency: int) -> None:
        """Ask until the standard input is closed."""
        async with AsyncClient(self._endpoint, timeout=PATIENCE_S) as client:
            await self._ask(client)
            print(json.dumps({"is_ready": True}), flush=True)
            asking = [asyncio.create_task(self._keep_asking(client)) for _ in range(concurrency)]
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
            self._is_stopping.set()
            await asyncio.gather(*asking)

    async def _keep_asking(self, client: AsyncClient) -> None:
        while not self._is_stopping.is_set():
            await self._ask(client)

    async def _ask(self, client: AsyncClient) -> None:
        place = next(self._places)
        inputs: Any = {name: array[place : place + 1] for name, array in self._inputs.items()}
        if len(inputs) == 1:
            (inputs,) = inputs.values()
        began = time.monotonic()
        try:
            outputs = await client.predict("model", inputs)
        except DeadlineExceeded as e:
            self.tally.lose(f"lost: {e.message}")
        except PoolError as e:
            self.tally.fail(e, is_innocent=True)
        else:
            got = next(iter(outputs.values()))
            is_right = is_close(got, self._want[place : place + 1])
            self.tally.answer("" if is_right else f"wrong: row {place} is answered {got.tolist()}")
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)


async def main() -> None:
    load = Load(sys.argv[1], sys.argv[2])
    await load.run(int(sys.argv[3]))
    print(json.dumps({"tally": msgspec.to_builtins(load.tally), "slowest_s": load.slowest_s}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
