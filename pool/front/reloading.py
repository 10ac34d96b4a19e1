"""Serving another configuration without a stop. Runs in the front.

The whole of it, or nothing: first every model that is new, or needs a new arena, is loaded and its workers
started beside what is served; if one fails, those are let go again and nothing has changed. Then all is
switched in one turn of the loop. What was admitted before is finished where it was admitted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

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


async def reload(engine: Engine, config: Config) -> list[Change]:
    """Have an engine serve `config`.

    Returns:
        What has changed.

    Raises:
        ConfigError: it has changes that need a restart; nothing was changed.
        PoolError: a model of it cannot be served, or a pipeline does not fit; nothing was changed.
    """
    failed = {name for name, serving in engine.models.items() if serving.state == "failed"}
    newer = newer_versions(engine.config, engine.versions())
    changes = compare(engine.config, config, engine.slots(), newer, failed)
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


class Reloads:
    """The reloads of one front: asked for by SIGHUP, one at a time, and how the last one went.

    Args:
        engine: To serve another configuration.
        path: Of the configuration file.
        tell: Called with True when a reload begins, and with False when it is over.
        follow: Awaited when another configuration is served: it returns when other fronts serve it, too; None
            if there are no others.

    Attributes:
        path: As above.
        count: Done or refused so far.
        error: Why the last one was refused; empty if it was not.
        changes: What the last one changed.
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
        self.count = 0
        self.error = ""
        self.changes: list[Change] = []

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
            self._tell(True)
            log.info("reloading", file=self.path)
            try:
                config = await self._loop.run_in_executor(None, load_config, self.path)
                self.changes = await reload(self._engine, config)
                if self._follow is not None:
                    await self._follow()
            except PoolError as e:
                self.changes, self.error = [], e.message
                log.error("reload refused, nothing was changed", reason=e.message)
            except Exception as e:  # nobody foresaw it; whoever asks again is to be heard
                self.changes, self.error = [], f"{type(e).__name__}: {e}"
                log.defect("cannot reload")
            else:
                self.error = ""
                logs.apply(config.server.log_level, config.server.access_log)
                for change in self.changes:
                    log.info("changed", key=change.key, change=str(change))
                log.info("reloaded", changes=len(self.changes))
            self.count += 1
            self._tell(False)
        self._task = None

    async def stop(self) -> None:
        """Give up one that is under way; what it had started is let go."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def describe(self) -> dict[str, object]:
        """For the status document."""
        return {
            "file": self.path,
            "count": self.count,
            "is_reloading": self.is_reloading,
            "error": self.error,
            "changes": [str(change) for change in self.changes],
        }
