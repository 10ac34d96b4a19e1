"""Environments of the peers: one each, with pinned packages, and TensorFlow shared between them.

They lie in `bench/.venvs`, or where `POOL_BENCH_VENVS` says. One is made again when its requirements change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements")
FOLDER = Path(os.environ.get("POOL_BENCH_VENVS") or Path(__file__).parent.parent / ".venvs")

# PyTriton's python stub runs on this one only; the others on what runs the bench.
PYTHONS = {"pytriton": "3.10"}
_CREATE_TIMEOUT_S, _INSTALL_TIMEOUT_S = 120.0, 900.0


class Missing(Exception):
    """A peer cannot be had here; the sentence says why."""


def python(name: str) -> str:
    """The interpreter of a peer's environment, which is made if need be.

    Raises:
        Missing: it cannot be made.
    """
    version = PYTHONS.get(name, f"{sys.version_info[0]}.{sys.version_info[1]}")
    base = _make(f"base-{version}", version, "base.txt", None)
    return str(_make(name, version, f"{name}.txt", base) / "bin" / "python")


def packages(folder: Path) -> Path:
    """Where the packages of an environment are."""
    (found,) = folder.glob("lib/python3*/site-packages")
    return found


def analyzer() -> tuple[str, dict[str, str]]:
    """Triton's perf_analyzer, and what of the environment it needs: libraries that PyTriton's wheel carries.

    Raises:
        Missing: it cannot be had here.
    """
    program = Path(python("triton-client")).with_name("perf_analyzer")
    carried = packages(Path(python("pytriton")).parent.parent) / "nvidia_pytriton.libs"
    libraries = program.parent.parent / "libraries"
    libraries.mkdir(exist_ok=True)
    for name, pattern in (("libcudart.so.12", "libcudart-*"), ("libb64.so.0d", "libb64-*")):
        if not (libraries / name).exists():
            (found,) = carried.glob(pattern)
            (libraries / name).symlink_to(found)
    return str(program), {"LD_LIBRARY_PATH": str(libraries)}


def versions(name: str) -> dict[str, str]:
    """What is pinned for a peer."""
    lines = [line.split("#")[0].strip() for line in (REQUIREMENTS / f"{name}.txt").read_text().splitlines()]
    return {key: value for key, _, value in (line.partition("==") for line in lines if line)}


@cache
def _make(name: str, version: str, requirements: str, base: Path | None) -> Path:
    folder = FOLDER / name
    wanted = (REQUIREMENTS / requirements).read_text()
    stamp = folder / "installed"
    digest = hashlib.sha256(f"{version}\n{wanted}\n{base}".encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    _run([_interpreter(version), "-m", "venv", str(folder)], _CREATE_TIMEOUT_S)
    if base is not None:
        # Behind the environment's own packages: what a peer wants in another version comes first.
        (packages(folder) / "base.pth").write_text(f"{packages(base)}\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "-r", str(REQUIREMENTS / requirements)], _INSTALL_TIMEOUT_S)
    stamp.write_text(digest)
    return folder


def _interpreter(version: str) -> str:
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    installed = Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")
    for candidate in (shutil.which(f"python{version}"), *map(str, installed)):
        if candidate is not None:
            done = subprocess.run([candidate, "-c", ""], capture_output=True, check=False)
            if done.returncode == 0:
                return candidate
    raise Missing(f"needs Python {version}, which is not installed")


def _run(command: list[str], timeout_s: float) -> None:
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "PYTHONPATH")
    }
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise Missing(f"does not install within {timeout_s:g} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        raise Missing(f"does not install: {' '.join(lines[-2:])[-300:]}")
