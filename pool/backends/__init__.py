"""What pool asks of a framework: load a model, run it on slots. Runs in the zygote's forks only.

A backend is a module of this package with the functions of `Backend`. The zygote calls `preload` once
and nothing else; every other call happens in a fork of it (loader or worker), in this order:
`prepare` -> (loader: `resolve` ->) `load` -> `Model.bind` -> the bound call, again and again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy.typing as npt

from pool.config import Placement
from pool.errors import ConfigError, ModelError
from pool.signature import Signature

Array = npt.NDArray[Any]

# Runs the model once on the arrays it was bound to and gives the outputs in the signature's order.
# The arrays returned may alias the framework's memory: they are valid until the next call.
BoundCall = Callable[[], list[Array]]


class BrokenPromise(ModelError):
    """A model gave something other than its signature says, whatever it was given: no request is to blame."""


class Model(Protocol):
    """A loaded model in a loader or worker process."""

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """All servable signatures; `batched` as far as static shapes tell."""

    @property
    def skipped(self) -> dict[str, str]:
        """Signatures that cannot be served, each with the reason (`has an input 'x' of dtype qint8 ...`)."""

    def texts(self, signature: str) -> tuple[bytes, ...]:
        """Strings the signature is likely to parse, as far as the model's graph tells; often none."""

    def runs(self, signature: str) -> str:
        """The function behind a signature; several may have the same."""

    def weights(self) -> list[tuple[str, Array]]:
        """Name and value of every variable, in an order that is the same for every load.

        Raises:
            ModelLoadError: the model holds state that variables alone do not carry (the sentence
                says which), so its weights cannot be shared.
        """

    def bind(self, signature: str, inputs: Sequence[Array]) -> BoundCall:
        """Prepare a call of `signature` on exactly these arrays.

        Numeric arrays are aliased, not copied: the call reads what they hold when it runs. They are
        C-contiguous, 64-byte aligned and outlive the call. String inputs (object arrays of `bytes`)
        are copied at bind time.

        Raises (the bound call): ModelError with the model's own message; BrokenPromise.
        """


class Backend(Protocol):
    """The functions a backend module offers."""

    def preload(self) -> None:
        """Import the framework. Must not run an operation, list devices or start threads."""

    def prepare(self, placement: Placement) -> None:
        """After the fork, before the framework initialises: devices, threads, memory limits.

        Raises:
            ModelLoadError: the device asked for is not there.
        """

    def resolve(self, path: str) -> tuple[int, str]:
        """The version and the concrete model that a configured path means. May run the framework.

        Raises:
            ModelLoadError: there is no model at `path`; the sentence names what is there instead.
        """

    def load(self, path: str, weights: Sequence[Array] | None, is_lean: bool = False) -> Model:
        """Load the model at `path`, as `resolve` gave it.

        Args:
            path: A directory or file of the backend's format.
            weights: None to read the values from disk; otherwise one 64-byte aligned, writable,
                privately mapped array per entry of `Model.weights`, in that order, which the model
                then aliases instead of holding a copy.
            is_lean: Leave out all that running signatures on these weights does not take, where that is
                possible. Whoever asks for it compares the answers with those of a load in full.

        Raises:
            ModelLoadError: it cannot be loaded; the sentence says why.
        """


def find_backend(name: str) -> Backend:
    """The backend module `pool.backends.NAME`.

    Raises:
        ConfigError: there is none of that name, or what it needs is not installed.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} is not known; wanted one of {', '.join(BACKENDS)}")
    return cast(Backend, importlib.import_module(f"pool.backends.{name}"))


BACKENDS: tuple[str, ...] = ("tensorflow", "python", "drill")
