"""The status document while processes end."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace

from pool.front.status import read_status


def test_a_zygote_may_end_while_it_is_measured():
    async def main():
        pid = os.getppid()
        ending, changing = (SimpleNamespace(backend=name, pid=pid) for name in ("ends", "changes"))
        status = asyncio.ensure_future(read_status([], [ending, changing]))
        await asyncio.sleep(0)  # it is in its thread
        ending.pid, changing.pid = None, 1
        return pid, await status

    pid, document = asyncio.run(main())
    assert [(zygote["backend"], zygote["pid"]) for zygote in document["zygotes"]] == [
        ("ends", pid),
        ("changes", pid),
    ]
    assert document["front"]["pid"] == os.getpid()
