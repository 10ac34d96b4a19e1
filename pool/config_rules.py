"""The rules of a configuration that no value's type can tell: of keys together, and of this machine.

Used by the front and the commands, through `pool.config`. Only `machine_mistakes` looks at the machine: for
the paths, keys, groups and cores that a configuration names.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pool.config_mistakes import MISSING, Mistake
from pool.devices import parse_device, ranges
from pool.endpoints import MAX_IPC_PATH_BYTES, check_endpoint, is_loopback
from pool.errors import ConfigError
from pool.keys import PUBLIC_SUFFIX, read_public_key, read_secret_key
from pool.python import split_path

if TYPE_CHECKING:
    from pool.config import Config, ModelConfig, ServerConfig

# What a tcp endpoint that others reach wants.
SECURED = "or have keys (curve_secret_key and authorized_keys), or insecure = true"


def server_mistakes(server: ServerConfig) -> Iterator[Mistake]:
    """Of the `[server]` table."""
    seen = set()
    for i, endpoint in enumerate(server.endpoints):
        key = f"server.endpoints[{i}]"
        try:
            check_endpoint(endpoint, bind=True)
        except ConfigError as e:
            wanted = e.message.removeprefix(f"endpoint {endpoint!r}").lstrip(":; ")
            yield Mistake(key, f"must be an endpoint ({wanted})", endpoint)
        if endpoint in seen:
            yield Mistake(key, "must not be given twice", endpoint)
        seen.add(endpoint)
        path = endpoint.removeprefix("ipc://")
        last = f"{path}.{server.fronts - 1}"
        if server.fronts > 1 and path != endpoint and len(os.fsencode(last)) > MAX_IPC_PATH_BYTES:
            rule = f"must leave room for the numbers of the fronts: {MAX_IPC_PATH_BYTES} bytes in all"
            yield Mistake(key, rule, endpoint)
    if server.metrics is not None:
        try:
            check_endpoint(f"tcp://{server.metrics}", bind=True)
        except ConfigError:
            yield Mistake("server.metrics", 'must read "HOST:PORT", such as "127.0.0.1:9464"', server.metrics)
    if server.curve_secret_key is None and not server.insecure:
        for i, endpoint in enumerate(server.endpoints):
            if endpoint.startswith("tcp://") and not is_loopback(endpoint):
                yield Mistake(f"server.endpoints[{i}]", f"must be on loopback, {SECURED}", endpoint)
    for name in ("curve_secret_key", "authorized_keys"):
        if "\0" in (getattr(server, name) or ""):
            yield Mistake(f"server.{name}", "must not hold a zero byte", getattr(server, name))
    if (server.curve_secret_key is None) != (server.authorized_keys is None):
        given, wanted = "curve_secret_key", "authorized_keys"
        if server.curve_secret_key is None:
            given, wanted = wanted, given
        yield Mistake(f"server.{wanted}", f"must be given with {given}", MISSING)
    if server.insecure and server.curve_secret_key is not None:
        yield Mistake("server.insecure", "must be false where there are keys (curve_secret_key)", True)
    if server.ipc_uids == ():
        rule = "must name users, or be left out where the mode of the socket file is enough"
        yield Mistake("server.ipc_uids", rule, server.ipc_uids)


def model_mistakes(key: str, model: ModelConfig) -> Iterator[Mistake]:
    """Of a `[models.NAME]` table, whose dotted key is `key`."""
    sizes = model.allowed_batch_sizes
    if any(a >= b for a, b in itertools.pairwise(sizes)):
        yield Mistake(f"{key}.allowed_batch_sizes", "must rise from one to the next", sizes)
    elif sizes and sizes[-1] != model.max_batch_size:
        rule = f"must end with max_batch_size ({model.max_batch_size})"
        yield Mistake(f"{key}.allowed_batch_sizes", rule, sizes)
    if "\0" in model.path:
        yield Mistake(f"{key}.path", "must not hold a zero byte", model.path)
    if model.backend == "python":
        yield from _function_mistakes(key, model)
    if model.slots is not None and model.slots < model.workers:
        yield Mistake(f"{key}.slots", f"must be at least workers ({model.workers})", model.slots)
    if len(model.devices) > model.workers:
        rule = f"must have at most one item a worker (workers is {model.workers})"
        yield Mistake(f"{key}.devices", rule, model.devices)
    has_gpu = False
    for i, device in enumerate(model.devices):
        try:
            _, gpu = parse_device(device)
        except ValueError as e:
            yield Mistake(f"{key}.devices[{i}]", str(e), device)
        else:
            has_gpu = has_gpu or gpu is not None
    if model.gpu_memory_mb is not None and not has_gpu:
        rule = 'needs a "gpu:N" in devices'
        yield Mistake(f"{key}.gpu_memory_mb", rule, model.gpu_memory_mb)


def _function_mistakes(key: str, model: ModelConfig) -> Iterator[Mistake]:
    if split_path(model.path) is None:
        yield Mistake(f"{key}.path", 'must read "FILE.py:FUNCTION" where backend is "python"', model.path)
    if model.version is not None:
        rule = 'must be left out where backend is "python": a file is its own version'
        yield Mistake(f"{key}.version", rule, model.version)
    if model.gpu_memory_mb is not None:
        rule = 'must be left out where backend is "python": the function allocates for itself'
        yield Mistake(f"{key}.gpu_memory_mb", rule, model.gpu_memory_mb)


def machine_mistakes(config: Config, cores: set[int]) -> Iterator[Mistake]:
    """What the configuration names and this machine, whose cores are given, does not have."""
    yield from _access_mistakes(config.server)
    for name, model in config.models.items():
        absence = _absence(model.file[0])
        if absence is not None:
            yield Mistake(f"models.{name}.path", f"must exist{absence}", model.path)
        for i, device in enumerate(model.devices):
            absent = sorted(set(parse_device(device)[0]) - cores)
            if absent:
                rule = f"must name cores of this machine ({ranges(cores)}), not {ranges(set(absent))}"
                yield Mistake(f"models.{name}.devices[{i}]", rule, device)


def _absence(path: str) -> str | None:
    """None if a path is there; else why not, where that says more than that it is not."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as e:  # such as of a folder that this user may not enter
        return f" and be within reach ({e.strerror})"
    return None


def _access_mistakes(server: ServerConfig) -> Iterator[Mistake]:
    try:
        _ = server.ipc_gid
    except KeyError:
        yield Mistake("server.ipc_group", "must be a group of this machine", server.ipc_group)
    if server.curve_secret_key is not None:
        try:
            read_secret_key(server.curve_secret_key)
        except ConfigError as e:
            rule = f"must be a file made by `pool keys new` ({e.message})"
            yield Mistake("server.curve_secret_key", rule, server.curve_secret_key)
    if server.authorized_keys is not None:
        directory = Path(server.authorized_keys)
        try:
            files = sorted(path for path in directory.iterdir() if path.suffix == PUBLIC_SUFFIX)
        except OSError as e:
            rule = f"must be a directory of NAME.pub files ({e.strerror})"
            yield Mistake("server.authorized_keys", rule, server.authorized_keys)
            return
        for file in files:
            try:
                read_public_key(file)
            except ConfigError as e:
                yield Mistake("server.authorized_keys", f"must hold public keys ({e.message})", file.name)
