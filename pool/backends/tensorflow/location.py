"""Which SavedModel a configured path means. Runs in loader processes; only an export imports TensorFlow.

A path is a SavedModel directory, a directory of numbered versions of one (the highest complete one is
served), or a `.keras` file. A `.keras` file is exported once to a SavedModel in the cache directory,
under the hash of its content, and found there from then on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from pool.errors import ModelLoadError

# Written last by every exporter, so a directory without one is still being written (or is none).
_COMPLETE = ("saved_model.pb", "saved_model.pbtxt")

# A signed 64-bit number, as in TensorFlow Serving: dates and hashes cut to size fit, longer digests do not.
_VERSION_MAX = 2**63 - 1

# Names shown of a directory that holds no model.
_SHOWN_MAX = 8


def resolve(path: str) -> tuple[int, str]:
    """The version and the SavedModel directory that `path` means.

    Returns:
        The version (a SavedModel directory with a numeric name has that number; otherwise 1), and the
        absolute path of a complete SavedModel directory.

    Raises:
        ModelLoadError: there is no model at `path`, or a `.keras` file cannot be exported.
    """
    # Links are followed now, so that a link switched to another version does not split the workers.
    given = Path(path).expanduser().resolve()
    if given.is_dir():
        if _is_complete(given):
            number = _number(given.name)
            return 1 if number is None else number, str(given)
        return _highest_version(given)
    if given.suffix == ".keras" and given.is_file():
        return 1, str(_exported(given))
    if given.exists():
        raise ModelLoadError(f"{given} is a file; wanted a SavedModel directory or a .keras file")
    raise ModelLoadError(f"{given} does not exist")


def _is_complete(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _COMPLETE)


def _number(name: str) -> int | None:
    if not (name.isascii() and name.isdigit()):
        return None
    number = int(name)
    return number if number <= _VERSION_MAX else None


def _highest_version(directory: Path) -> tuple[int, str]:
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise ModelLoadError(f"{directory} cannot be read: {error.strerror}") from None
    numbered = [(number, name) for name in names if (number := _number(name)) is not None]
    for number, name in sorted(numbered, reverse=True):
        if _is_complete(directory / name):
            return number, str((directory / name).resolve())
    found = ", ".join(names[:_SHOWN_MAX]) + (", ..." if len(names) > _SHOWN_MAX else "")
    raise ModelLoadError(
        f"{directory} holds neither a saved_model.pb nor a numbered version with one; "
        f"found {found or 'nothing'}"
    )


# -- .keras files ----------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where exports are kept: systemd's `$CACHE_DIRECTORY`, else `pool/` in the user's cache."""
    given = os.environ.get("CACHE_DIRECTORY")
    if given:
        return Path(given.split(":")[0])  # systemd joins several with colons
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "pool"


def _exported(keras_file: Path) -> Path:
    """The SavedModel directory of a `.keras` file, made now unless it is in the cache."""
    try:
        with keras_file.open("rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
        cache = cache_directory() / "keras"
        target = cache / digest.hexdigest()
        if _is_complete(target):
            return target
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Exported beside its place and renamed, so that nobody ever sees half of one.
        unfinished = Path(tempfile.mkdtemp(prefix=".export-", dir=cache))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ModelLoadError(f"{keras_file} cannot be exported: {error.strerror}{where}") from None
    try:
        _export(keras_file, unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            # Somebody else exported the same file meanwhile: theirs is as good.
            if not _is_complete(target):
                raise
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ModelLoadError(
            f"{keras_file} cannot be exported: {type(error).__name__}: {first_line}"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _export(keras_file: Path, directory: Path) -> None:
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras

    # safe_mode: a model file must not bring code that runs here.
    model = keras.saving.load_model(keras_file, compile=False, safe_mode=True)
    model.export(str(directory), format="tf_saved_model", verbose=False)
