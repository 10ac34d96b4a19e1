"""A headless Chromium, spoken to in its own protocol (DevTools): pages, keys, clicks, pictures."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_S = 40.0

FLAGS = (
    "--headless",
    "--no-sandbox",  # which root cannot have
    "--remote-debugging-port=0",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-extensions",
    "--disable-component-update",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--no-first-run",
)


class Browser:
    """A running one."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read())

    async def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One call of the protocol."""
        self._number += 1
        reply = self._replies[self._number] = asyncio.get_running_loop().create_future()
        message = {"id": self._number, "method": method, "params": parameters}
        await self._socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        return await asyncio.wait_for(reply, PATIENCE_S)

    async def _read(self) -> None:
        while True:
            try:
                message = json.loads(await self._socket.recv())
            except ConnectionClosed:
                return  # it has ended, without ceremony
            reply = self._replies.pop(message.get("id"), None)
            if reply is None:
                continue  # an event
            if "error" in message:
                reply.set_exception(RuntimeError(message["error"]["message"]))
            else:
                reply.set_result(message["result"])

    async def open(self, url: str, width: int = 1100, height: int = 800) -> Page:
        """A new page, with nothing shared with others, loaded."""
        context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        target = await self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, attached["sessionId"])
        await page.resize(width, height)
        await page.call("Page.navigate", url=url)
        await page.until("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page


class Page:
    """A page of it."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call of the protocol, for this page."""
        return await self._browser.call(method, self._session, **parameters)

    async def get(self, script: str) -> Any:
        """What an expression gives; of a promise, what it comes to."""
        outcome = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in outcome, outcome["exceptionDetails"]
        return outcome["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until an expression is true."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while not await self.get(condition):
            if asyncio.get_running_loop().time() > deadline:
                text = await self.get("document.body?.innerText")
                raise AssertionError(f"never came true: {condition}; shown: {text}")
            await asyncio.sleep(0.01)

    async def click(self, selector: str) -> None:
        """Press the mouse where an element is."""
        element = f"document.querySelector({json.dumps(selector)})"
        await self.get(f"{element}.scrollIntoView()")
        box = await self.get(f"{element}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def type(self, text: str) -> None:
        """Write where the focus is, and press Enter."""
        await self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", windowsVirtualKeyCode=13
            )

    async def resize(self, width: int, height: int) -> None:
        """Give it the size of another screen."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    async def picture(self, file: Path) -> None:
        """Write what is seen as PNG."""
        taken = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(taken["data"]))


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """One without a window and with a new profile; gone at the end."""
    assert PROGRAM is not None, "the caller looked"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | {"HOME": profile},
        )  # fmt: skip
        try:
            url = await asyncio.wait_for(_address(process), PATIENCE_S)
            async with connect(url, max_size=None) as socket:
                browser = Browser(socket)
                yield browser
                await browser.call("Browser.close")
                await browser._reading
            await asyncio.wait_for(process.communicate(), PATIENCE_S)
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()


async def _address(process: asyncio.subprocess.Process) -> str:
    """Where it listens, of which it tells."""
    assert process.stderr is not None, "a pipe"
    told = b""
    async for line in process.stderr:
        told += line
        if line.startswith(b"DevTools listening on "):
            return line.split()[-1].decode()
    raise AssertionError(f"chromium ended: {told.decode(errors='replace')}")
