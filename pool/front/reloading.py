"""Serving another configuration without a stop. Runs in the front.

The whole of it, or nothing: first every model that is new, or needs a new arena, is loaded and its workers
started beside what is served; if one fails, those are let go again and nothing has changed. Then all is
switched in one turn of the loop. What was admitted before is finished where it was admitted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec

from pool.config import Config, load_config
from pool.errors import ConfigError, PoolError
from pool.front import logs
from pool.front.changes import Change, Cost, compare, of_model
from pool.front.engine import Engine
from pool.front.logs import Log
from pool.front.serving import Serving
from pool.front.versions import newer_versions

log = Log("pool.reloading")

# Outcomes remembered. Whoever asked looks every 50 ms or so: another may be over by then, seldom two.
_REMEMBERED = 8


async def reload(engine: Engine, config: Config) -> list[Change]:
    """Have an engine serve `config`.

    Returns:
        What has changed.

    Raises:
        ConfigError: it has changes that need a restart; nothing was changed.
        PoolError: a model of it cannot be served, or a pipeline does not fit; nothing was changed.
    """
    failed = {name for name, serving in engine.models.items() if serving.state == "failed"}
    served = {name: m.serving.generation for name, m in engine.models.items() if m.serving is not None}
    newer = newer_versions(engine.config, {name: each.version for name, each in served.items()})
    slots = {name: len(each.batcher.slots) for name, each in served.items()}
    changes = compare(engine.config, config, slots, newer, failed)
    refused = [change for change in changes if change.cost is Cost.RESTART]
    if refused:
        raise ConfigError("; ".join(str(change) for change in refused))
    ready: dict[str, Serving] = {}
    try:
        for name, model in config.models.items():
            if name in failed or _costs(changes, name) & {Cost.ADD, Cost.GENERATION}:
                ready[name] = await engine.start_serving(name, model)
        pipelines = engine.wire(config, ready)
    except BaseException:
        for serving in ready.values():
            await engine.discard(serving)
        raise
    engine.apply_server(config.server)
    for name, serving in ready.items():
        engine.switch(name, serving)
    for name, model in config.models.items():
        if name not in ready and _costs(changes, name):
            engine.apply_model(name, model)
    for name in list(engine.models):
        if name not in config.models:
            engine.remove(name)
    engine.rewire(pipelines)
    engine.config = msgspec.structs.replace(engine.config, models=config.models, pipelines=config.pipelines)
    return changes


def _costs(changes: list[Change], name: str) -> set[Cost]:
    return {change.cost for change in of_model(changes, name)}


class Outcome(NamedTuple):
    """How a reload went.

    Attributes:
        number: Of the reload, from 1 on.
        error: Why it was refused; empty if it was not.
        changes: What it changed.
    """

    number: int
    error: str
    changes: list[Change]

    def describe(self) -> dict[str, object]:
        """For the status document."""
        return {
            "number": self.number,
            "error": self.error,
            "changes": [str(change) for change in self.changes],
        }


class Reloads:
    """The reloads of one front: asked for by SIGHUP, one at a time, and how the last ones went.

    A signal has no number by which to find its reload. But who has seen that n were begun, and asks then, may
    take number n + 1 for its own: it reads the file later than that, whoever else has asked for it too.

    Args:
        engine: To serve another configuration.
        path: Of the configuration file.
        tell: Called with True when a reload begins, and with False when it is over.
        follow: Awaited when another configuration is served: it returns when other fronts serve it, too; None
            if there are no others.

    Attributes:
        path: As above.
        begun: How many, the one under way included.
        outcomes: Of the last ones.
    """

    def __init__(
        self,
        engine: Engine,
        path: str,
        tell: Callable[[bool], None],
        follow: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._engine = engine
        self._tell = tell
        self._follow = follow
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._is_asked = False
        self.path = path
        self.begun = 0
        self.outcomes: deque[Outcome] = deque(maxlen=_REMEMBERED)

    @property
    def is_reloading(self) -> bool:
        """Whether one is under way."""
        return self._task is not None

    def ask(self) -> None:
        """Reload; once more after it if one is under way, for the file may have changed since it was read."""
        self._is_asked = True
        if self._task is None and not self._engine.is_draining:
            self._task = self._loop.create_task(self._work())

    async def _work(self) -> None:
        while self._is_asked and not self._engine.is_draining:
            self._is_asked = False
            self.begun += 1
            self._tell(True)
            log.info("reloading", file=self.path)
            changes, error = await self._reload()
            self.outcomes.append(Outcome(self.begun, error, changes))
            self._tell(False)
        self._task = None

    async def _reload(self) -> tuple[list[Change], str]:
        """What was changed, or why nothing was."""
        try:
            config = await self._loop.run_in_executor(None, load_config, self.path)
            changes = await reload(self._engine, config)
            if self._follow is not None:
                await self._follow()
        except PoolError as e:
            log.error("reload refused, nothing was changed", reason=e.message)
            return [], e.message
        except Exception as e:  # nobody foresaw it; whoever asks again is to be heard
            log.defect("cannot reload")
            return [], f"{type(e).__name__}: {e}"
        logs.apply(config.server.log_level, config.server.access_log)
        for change in changes:
            log.info("changed", key=change.key, change=str(change))
        log.info("reloaded", changes=len(changes))
        return changes, ""

    async def stop(self) -> None:
        """Give up one that is under way; what it had started is let go."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def describe(self) -> dict[str, object]:
        """For the status document."""
        last = self.outcomes[-1] if self.outcomes else Outcome(0, "", [])
        return {
            "file": self.path,
            "begun": self.begun,
            "count": last.number,
            "is_reloading": self.is_reloading,
            "error": last.error,
            "changes": [str(change) for change in last.changes],
            "outcomes": [outcome.describe() for outcome in self.outcomes],
        }
