"""What `Pool` and `AsyncClient` have in common: code written to it runs with either. Caller's process."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy.typing as npt

    from pool.client.core import ModelInfo
    from pool.client.retry import Retry

Self = TypeVar("Self", bound="Predictor")


class Predictor(Protocol):
    """Runs models: in this process's own pool (`pool.Pool`), or by a server (`pool.AsyncClient`).

    Any number of tasks of one event loop may share one. Times are in seconds. All calls raise subclasses of
    `pool.PoolError`; each method names those that mean the same in both.
    """

    async def predict(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        signature: str | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        cast: str | None = None,
        priority: int | None = None,
        retry: Retry | None = None,
        timeline: bool = False,
    ) -> dict[str, npt.NDArray[Any]]:
        """Run a model on a batch of rows; cancelling the call withdraws the request.

        Args:
            model: Name of the model.
            inputs: Name -> array of shape [rows, ...]; a bare array if the model has one input. A
                single example needs its row axis (`x[None]`). Strings are `bytes` or `str`.
            version: None for the version that is preferred.
            signature: None for `serving_default`, or the only one.
            outputs: Names of those wanted; None for all.
            timeout: For this call; None for the predictor's own.
            cast: `"safe"` or `"same_kind"`, for this call; None for the predictor's own.
            priority: 0 (first) to 3 (background work); None for what the configuration gives the model.
            retry: For this call; None for the predictor's own. `Retry(attempts=1)` is no retry.
            timeline: Whether to find out where the time went: the result is then a `pool.Answer`, a dict
                whose attribute `timeline` tells it.

        Returns:
            Name -> array of shape [rows, ...], writable and the caller's own. Strings are object
            arrays of `bytes`.

        Raises:
            InvalidInput: an input has a wrong name, dtype, rank or shape, or the priority is wrong; TooLarge
                if it has too many rows.
            ModelNotFound, VersionNotFound, SignatureNotFound: there is no such thing to call.
            ModelError: the model raised. WorkerLost: its process died.
            Overloaded: no room; try again after `retry_after_ms`.
            DeadlineExceeded: the timeout passed first.
            Unavailable: the model or the server is not ready, has failed, or is stopping.
            Cancelled: the predictor was closed.
            InternalError: a defect in pool.
        """
        ...

    async def signature(
        self, model: str, version: int | None = None, *, timeout: float | None = None
    ) -> ModelInfo:
        """What a model takes and gives.

        Raises:
            ModelNotFound, VersionNotFound: there is no such model. Unavailable, Cancelled: as for `predict`.
        """
        ...

    async def models(self, *, timeout: float | None = None) -> dict[str, dict[str, Any]]:
        """The models served: name -> `version`, `ready`, `signatures` (names).

        Raises:
            Unavailable, Cancelled: as for `predict`.
        """
        ...

    async def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """The status document (`docs/operations.md` 8).

        Raises:
            DeadlineExceeded, Unavailable, Cancelled: as for `predict`.
        """
        ...

    async def live(self, *, timeout: float | None = None) -> bool:
        """Whether there is something that answers.

        Raises:
            Cancelled: as for `predict`.
        """
        ...

    async def ready(self, model: str | None = None, *, timeout: float | None = None) -> bool:
        """Whether the model, or with None every model, can answer now.

        Raises:
            ModelNotFound: there is no such model. Cancelled: as for `predict`.
        """
        ...

    async def close(self) -> None:
        """Let go of everything; calls under way raise `Cancelled`. A second time, nothing happens."""
        ...

    async def __aenter__(self: Self) -> Self:
        """Itself, ready to be called."""
        ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        ...
