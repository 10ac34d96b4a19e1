"""What killed a worker is not let in a second time. Pure; runs in the front, one memory per model.

A request is recognised by a hash of all its bytes: who asks, and under which id, does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

# Requests remembered. Looking is one look-up, so the number costs only memory: 100 kB.
_REMEMBERED_MAX = 1024
_DIGEST_BYTES = 16  # 2^64 requests until two are likely to be alike


class PoisonMemory:
    """Contents that killed workers, for a while.

    Args:
        memory_s: How long; 0 for not at all.

    Attributes:
        refused: Requests found again.
    """

    def __init__(self, memory_s: float) -> None:
        self.memory_s = memory_s
        self.refused = 0
        self._known: dict[bytes, tuple[float, str]] = {}  # digest -> until when, what it did

    def __bool__(self) -> bool:
        """Whether anything is remembered, so that looking is worth a hash."""
        return bool(self._known)

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._known)

    def remember(self, layout: int, payloads: Sequence[bytes | memoryview], how: str, now: float) -> None:
        """Bar a request that killed a worker.

        Args:
            layout: Number of its layout: signature and shapes.
            payloads: Its input tensors, in the order of the layout.
            how: What it did, for whoever sends it again.
            now: Monotonic seconds.
        """
        if self.memory_s <= 0:
            return
        digest = _digest(layout, payloads)
        self._known.pop(digest, None)  # so that they lie in the order in which they are forgotten
        if len(self._known) >= _REMEMBERED_MAX:
            del self._known[next(iter(self._known))]
        self._known[digest] = (now + self.memory_s, how)

    def find(
        self, layout: int, payloads: Sequence[bytes | memoryview], now: float
    ) -> tuple[str, float] | None:
        """What such a request did, and for how long it is still barred; None if it is not."""
        for digest, (until, _) in list(self._known.items()):
            if until > now:
                break  # the others came later, and stay as long
            del self._known[digest]
        known = self._known.get(_digest(layout, payloads)) if self._known else None
        if known is None:
            return None
        self.refused += 1
        return known[1], known[0] - now


def _digest(layout: int, payloads: Sequence[bytes | memoryview]) -> bytes:
    digest = blake2b(layout.to_bytes(8, "little"), digest_size=_DIGEST_BYTES)
    for payload in payloads:
        digest.update(memoryview(payload).nbytes.to_bytes(8, "little"))
        digest.update(payload)
    return digest.digest()
