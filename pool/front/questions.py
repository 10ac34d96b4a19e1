"""Answers to everything a client asks but predictions: LIVE, READY, MODELS, SIGNATURE, STATUS. Front."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from pool import wire
from pool.config import ServerConfig
from pool.errors import InternalError, WireError
from pool.front.clients import Client
from pool.front.engine import Engine
from pool.front.logs import Log
from pool.front.outbound import Outbound
from pool.wire import Header, Kind, SignatureMeta

log = Log("pool.endpoint")


class Questions:
    """Answers them.

    Args:
        engine: Knows the models.
        config: The `[server]` table.
        outbound: Sends the answers.
        ask_status: Gives the status document.
    """

    def __init__(
        self,
        engine: Engine,
        config: ServerConfig,
        outbound: Outbound,
        ask_status: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        self._engine = engine
        self._config = config
        self._outbound = outbound
        self._ask_status = ask_status
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def close(self) -> None:
        """Answer no more: the socket is about to close."""
        self._is_closed = True

    def answer(self, client: Client, header: Header) -> None:
        """Answer one, now or (STATUS) as soon as the figures are there.

        Raises:
            PoolError: the answer is this error, and is still to be sent.
        """
        engine = self._engine
        document: dict[str, Any]
        match header.kind:
            case Kind.LIVE:
                document = {"live": True}
            case Kind.READY:
                name = wire.decode_meta(SignatureMeta, header.meta).model
                models = engine.readiness()
                if name:
                    models = {name: models[engine.known(name)]}
                document = {"ready": all(models.values()), "models": models}
            case Kind.MODELS:
                document = {"models": engine.describe_models()}
            case Kind.SIGNATURE:
                wanted = wire.decode_meta(SignatureMeta, header.meta)
                document = engine.find(wanted.model, wanted.version).describe()
                document["max_frame_bytes"] = self._config.max_message_bytes
            case Kind.STATUS:
                task = self._loop.create_task(self._send_status(client, header.id))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                return
            case _:
                raise WireError(f"{header.kind.name} is a reply, not a request")
        self._outbound.inform(client, header.id, document)

    async def _send_status(self, client: Client, id_: int) -> None:
        try:
            document = await self._ask_status()
            if not self._is_closed:
                self._outbound.inform(client, id_, document)
        except Exception as e:  # such as file descriptors used up: whoever asks is to hear of it
            log.defect("cannot tell the status")
            if not self._is_closed:
                self._outbound.refuse(
                    client, id_, InternalError(f"the status cannot be read: {type(e).__name__}: {e}"), None
                )
