"""Every failure a user of pool can meet: one exception type per code, used by all processes.

An error crosses a process boundary as its *code* (a stable string, `docs/wire.md` section 6), one
English sentence that names what was got and what was wanted, and optional numeric details. It never
crosses as a pickled exception.

    PoolError
    ├── ConfigError            the TOML file is wrong (never on the wire)
    ├── WireError              the frames are not a message of this protocol
    │   └── ProtocolVersionError
    ├── ModelNotFound · VersionNotFound · SignatureNotFound
    ├── InvalidInput           a name, dtype, shape or rank the signature does not take
    │   └── TooLarge           more rows or bytes than the model is configured to hold
    ├── ModelError             the model itself raised
    ├── ModelLoadError         the model cannot be loaded (shown by `pool check` and `pool status`)
    ├── WorkerLost             the worker died with the request in its hands
    ├── Overloaded             no row free; retry after `retry_after_ms`     (retryable)
    ├── DeadlineExceeded       the timeout passed first
    ├── Cancelled              the caller withdrew the request
    ├── Forbidden              this user may not use the server
    ├── Unavailable            not started yet, draining, or unreachable      (retryable)
    └── InternalError          a bug in pool
"""

from __future__ import annotations

from typing import ClassVar


class PoolError(Exception):
    """Base of every error pool raises or sends.

    Attributes:
        code: Stable upper-case identifier, the one that travels on the wire.
        retryable: Whether the same request may succeed later without being changed.
        retry_after_ms: The server's advice on when to try again, in milliseconds, or None.
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms

    @property
    def message(self) -> str:
        """The sentence, without the code."""
        return str(self.args[0])


class ConfigError(PoolError):
    """The configuration file breaks a rule; the message reads `file: key: rule, got value`."""

    code = "CONFIG"


class WireError(PoolError):
    """The frames received are not a message of this protocol."""

    code = "MALFORMED"


class ProtocolVersionError(WireError):
    """The header names a protocol version this end does not speak."""

    code = "PROTOCOL_VERSION"


class ModelNotFound(PoolError):
    """No model of that name is configured."""

    code = "MODEL_NOT_FOUND"


class VersionNotFound(PoolError):
    """The model is served, but not in the version asked for."""

    code = "VERSION_NOT_FOUND"


class SignatureNotFound(PoolError):
    """The model has no signature of that name."""

    code = "SIGNATURE_NOT_FOUND"


class InvalidInput(PoolError):
    """An input's name, dtype, shape or size is not what the signature takes."""

    code = "INVALID_INPUT"


class TooLarge(InvalidInput):
    """More rows or bytes than the model can ever hold, however idle it is."""

    code = "TOO_LARGE"


class ModelError(PoolError):
    """The model raised while running; the message is the model's own."""

    code = "MODEL_ERROR"


class ModelLoadError(PoolError):
    """The model could not be loaded."""

    code = "MODEL_LOAD"


class WorkerLost(PoolError):
    """The worker process running the request died or was killed."""

    code = "WORKER_LOST"


class Overloaded(PoolError):
    """Every row of the model's arena is taken."""

    code = "OVERLOADED"
    retryable = True


class DeadlineExceeded(PoolError):
    """The request's timeout passed before its answer was ready."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(PoolError):
    """The caller withdrew the request."""

    code = "CANCELLED"


class Forbidden(PoolError):
    """The server does not serve the user that the client runs as."""

    code = "FORBIDDEN"


class Unavailable(PoolError):
    """The server is starting, draining, or cannot be reached."""

    code = "UNAVAILABLE"
    retryable = True


class InternalError(PoolError):
    """A defect in pool itself."""

    code = "INTERNAL"


_BY_CODE: dict[str, type[PoolError]] = {
    kind.code: kind
    for kind in (
        ConfigError,
        WireError,
        ProtocolVersionError,
        ModelNotFound,
        VersionNotFound,
        SignatureNotFound,
        InvalidInput,
        TooLarge,
        ModelError,
        ModelLoadError,
        WorkerLost,
        Overloaded,
        DeadlineExceeded,
        Cancelled,
        Forbidden,
        Unavailable,
        InternalError,
    )
}

CODES: frozenset[str] = frozenset(_BY_CODE)


def error_from_code(code: str, message: str, *, retry_after_ms: int | None = None) -> PoolError:
    """Build the exception that a code stands for.

    A code this version does not know (a newer server) becomes `InternalError` with the code kept in
    the message, so that a client never fails while reporting a failure.
    """
    kind = _BY_CODE.get(code)
    if kind is None:
        return InternalError(f"{code}: {message}", retry_after_ms=retry_after_ms)
    return kind(message, retry_after_ms=retry_after_ms)
