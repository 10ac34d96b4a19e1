"""pool: serves TensorFlow models from one machine through a shared-memory worker pool.

    from pool import Client

    with Client() as client:
        outputs = client.predict("digits", images)  # images: float32 [rows, 8, 8, 1]

Only the error classes are imported at once; the rest when first used, so that a client never pays for
the server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pool.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidInput,
    ModelError,
    ModelLoadError,
    ModelNotFound,
    Overloaded,
    PoolError,
    ProtocolVersionError,
    SignatureNotFound,
    TooLarge,
    Unavailable,
    VersionNotFound,
    WireError,
    WorkerLost,
)

if TYPE_CHECKING:
    from pool.client.aio import AsyncClient
    from pool.client.retry import Retry
    from pool.client.sync import Client
    from pool.client.timeline import Answer, Timeline
    from pool.embedded.pool import Pool
    from pool.predictor import Predictor

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AsyncClient",
    "Cancelled",
    "Client",
    "ConfigError",
    "DeadlineExceeded",
    "Forbidden",
    "InternalError",
    "InvalidInput",
    "ModelError",
    "ModelLoadError",
    "ModelNotFound",
    "Overloaded",
    "Pool",
    "PoolError",
    "Predictor",
    "ProtocolVersionError",
    "Retry",
    "SignatureNotFound",
    "Timeline",
    "TooLarge",
    "Unavailable",
    "VersionNotFound",
    "WireError",
    "WorkerLost",
    "__version__",
]

_LAZY = {
    "Answer": "pool.client.timeline",
    "AsyncClient": "pool.client.aio",
    "Client": "pool.client.sync",
    "Pool": "pool.embedded.pool",
    "Predictor": "pool.predictor",
    "Retry": "pool.client.retry",
    "Timeline": "pool.client.timeline",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value
