"""The web application: a page, and a websocket to one's conversation. Starlette, in the pool's event loop.

    GET /                  the page
    GET /status            how many conversations there are, and how full the models' batches were
    WEBSOCKET /chat?id=ID  a conversation; whoever knows the ID may go on with it

A line is `{"n": 7, "text": "hello"}`. What is said to it has the same `n`, and the fields of `Answer`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from examples.chatbot.conversation import Answer, Conversation, Memory
from examples.chatbot.talk import load
from pool import Pool, PoolError, Retry
from pool.flow import Ref, Registry, Supervision, System

PAGE = Path(__file__).with_name("page")
MOST_CONVERSATIONS = 100_000
PATIENCE_S = 15.0  # with a conversation
KEY = re.compile(r"[0-9a-f]{32}")  # too many to guess one
FORGOTTEN = "Something in me broke. I have started over, and forgotten all that we said."

# Whoever fails is restarted, with nothing remembered. Restarts are counted over all conversations, and each
# takes a line of somebody's: any number of them is no reason to end the conversations of others.
SUPERVISION = Supervision(max_restarts=sys.maxsize)

Conversations = Registry[str, Ref[str, Answer]]


class Line(msgspec.Struct):
    """What a user writes."""

    n: int
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]


def application(config: Path, idle_s: float) -> Starlette:
    """The application.

    Args:
        config: Of the pool.
        idle_s: Seconds of silence after which a conversation is let go.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        talk = load()
        async with Pool.from_file(config, retry=Retry()) as pool, System(SUPERVISION) as system:
            app.state.pool = pool
            app.state.conversations = system.registry(
                lambda _: Conversation(pool, talk), idle_s=idle_s, limit=MOST_CONVERSATIONS
            )
            yield

    routes = [
        WebSocketRoute("/chat", chat),
        Route("/status", status),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def chat(websocket: WebSocket) -> None:
    """Answer the lines of one page, one after the other."""
    key = websocket.query_params.get("id", "")
    await websocket.accept()
    if not KEY.fullmatch(key):
        await websocket.close(1008, "wanted ?id= with 32 hexadecimal digits")
        return
    while (message := await websocket.receive())["type"] == "websocket.receive":
        text = message.get("text")
        if text is None:
            await websocket.close(1003, "wanted text")
            return
        try:
            line = msgspec.json.decode(text, type=Line)
        except msgspec.DecodeError as e:
            await websocket.close(1007, str(e)[:120])  # a reason has 123 bytes at most
            return
        said = await answer(websocket.app.state.conversations, key, line.text)
        await websocket.send_json({"n": line.n, **asdict(said)})


async def answer(conversations: Conversations, key: str, line: str) -> Answer:
    """What a conversation says, or what has become of it."""
    try:
        conversation = await conversations.get(key)
        return await conversation.ask(line, timeout=PATIENCE_S)
    except PoolError as e:  # there are too many of them, or it took too long
        return Answer("busy", f"I have too much to do ({e.code}). Say that again, please.", None)
    except Exception:  # its supervisor has logged it, and put another one in its place
        return Answer("restarted", FORGOTTEN, Memory().shown())


async def status(request: Request) -> JSONResponse:
    """Figures for whoever wants to know."""
    state = request.app.state
    models = (await state.pool.status())["models"]
    figures = {name: {key: model[key] for key in ("rows", "batches")} for name, model in models.items()}
    return JSONResponse({"conversations": len(state.conversations), "models": figures})
