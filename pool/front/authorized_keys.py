"""The public keys of clients that may use secured endpoints: a directory of NAME.pub files. Front.

Looked up when a client connects, so the directory is read again when it has changed: its modification time
tells when a file in it was added, removed or replaced. Of a file that was written over in place it does not
tell; whoever knows of that makes another `AuthorizedKeys`.
"""

from __future__ import annotations

import os
import time

from pool.errors import ConfigError
from pool.front.logs import Log
from pool.keys import PUBLIC_SUFFIX, read_public_key

log = Log("pool.access")

# Kernels stamp files by a clock of some milliseconds a tick, and file servers have clocks of their own: what
# was read this soon after a change may have another one behind it that the stamp does not show.
_SETTLED_NS = 2_000_000_000


class AuthorizedKeys:
    """The keys of a directory, as it is now.

    Args:
        directory: Its path. If it cannot be read, no key is authorized.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._names: dict[str, str] = {}
        self._stamp: tuple[int, int, int] | None = None  # None: to be read again
        self._faults: set[str] = set()
        self._refresh()

    @property
    def names(self) -> list[str]:
        """Whose keys they are, sorted."""
        self._refresh()
        return sorted(self._names.values())

    def name_of(self, public_key: str) -> str | None:
        """Whose key it is; None if it is not authorized."""
        self._refresh()
        return self._names.get(public_key)

    def _refresh(self) -> None:
        try:
            status = os.stat(self.directory)
            stamp = (status.st_dev, status.st_ino, status.st_mtime_ns)
            if stamp == self._stamp:
                return
            # Before they are read: what changes meanwhile is then seen the next time.
            is_settled = abs(time.time_ns() - status.st_mtime_ns) > _SETTLED_NS
            self._stamp = stamp if is_settled else None
            self._read()
        except OSError as e:
            self._stamp, self._names = None, {}
            self._tell({f"{self.directory}: {e.strerror}; no key is authorized"})

    def _read(self) -> None:
        names: dict[str, str] = {}
        faults: set[str] = set()
        with os.scandir(self.directory) as entries:
            files = sorted(entry.name for entry in entries if entry.name.endswith(PUBLIC_SUFFIX))
        for file in files:
            try:
                key = read_public_key(os.path.join(self.directory, file))
            except ConfigError as e:
                faults.add(f"{e.message}; it is passed over")
            else:
                names[key] = file.removesuffix(PUBLIC_SUFFIX)
        self._names = names
        self._tell(faults)

    def _tell(self, faults: set[str]) -> None:
        """Log what is wrong, once."""
        for fault in sorted(faults - self._faults):
            log.error("keys not authorized", reason=fault)
        self._faults = faults
