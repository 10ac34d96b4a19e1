"""The configuration file: its structs, their defaults, and every rule a value must keep.

Used by the front and the commands. `decode_config` is pure (a parsed document in, structs or a
`ConfigError` out); only `load_config` touches the machine, to read the file and to see whether the
paths and the cores it names are there. `configs/reference.toml` tells each key to the user.

All mistakes of a file are reported at once, one a line: `file: key: rule, got value`.
"""

from __future__ import annotations

import difflib
import grp
import itertools
import json
import os
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pool.endpoints import check_endpoint, is_loopback
from pool.errors import ConfigError
from pool.keys import PUBLIC_SUFFIX, read_public_key, read_secret_key

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODEL_NAME = re.compile(r"[A-Za-z0-9_.-]+")
MAX_WORKERS = 1024
MAX_BATCH_ROWS = 65_536
MAX_CORE = 4095  # Linux's own limit is 8192; beyond any machine, and keeps "cpu:0-999999999" small
MIN_MESSAGE_BYTES = 65_536  # the longest header of the wire must fit
MAX_TIMEOUT_MS = 2**32 - 1  # the wire carries it as a u32
MAX_PRIORITY = 3
MAX_UID = 2**32 - 2  # the last one stands for none

Backend = Literal["tensorflow", "drill"]
AwakeUs = Annotated[float, Meta(ge=0, le=100_000)]
LogLevel = Literal["debug", "info", "warning", "error"]


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[server]` table.

    Attributes:
        endpoints: Where clients connect; empty for `pool.endpoints.default_endpoint()`.
        ipc_mode: Permissions of `ipc://` socket files, octal.
        ipc_group: Group of `ipc://` socket files, by name or number; None for the server's own.
        ipc_uids: Users that may use `ipc://` endpoints, beside the server's own; None for all whom the
            files let in.
        curve_secret_key: File of the key that `tcp://` endpoints are secured with; absolute after
            `load_config`. None for no security.
        authorized_keys: Directory of the public keys of clients that may use them; as above.
        insecure: Whether `tcp://` endpoints without security may be reached from other machines.
        max_message_bytes: Largest frame taken from a client.
        max_unread_bytes: Replies kept for a client that does not read them.
        start_timeout_s: Longest time for a model's workers to load and be ready.
        drain_timeout_s: Longest wait for admitted requests when stopping.
        log_level: Least severe line that is logged.
        awake_us: Longest the front stays awake for an event that came quickly the last time.
        metrics: `HOST:PORT` of the HTTP server for whoever watches; None for none.
        access_log: Whether each answer to a prediction is logged.
    """

    endpoints: tuple[str, ...] = ()
    ipc_mode: Annotated[str, Meta(pattern="^0?[0-7]{3}$")] = "0660"
    ipc_group: Annotated[str, Meta(min_length=1)] | None = None
    ipc_uids: tuple[Annotated[int, Meta(ge=0, le=MAX_UID)], ...] | None = None
    curve_secret_key: Annotated[str, Meta(min_length=1)] | None = None
    authorized_keys: Annotated[str, Meta(min_length=1)] | None = None
    insecure: bool = False
    max_message_bytes: Annotated[int, Meta(ge=MIN_MESSAGE_BYTES, le=2**40)] = 2**30
    max_unread_bytes: Annotated[int, Meta(ge=MIN_MESSAGE_BYTES, le=2**40)] = 2**26
    start_timeout_s: Annotated[float, Meta(ge=0.1, le=86_400)] = 300.0
    drain_timeout_s: Annotated[float, Meta(ge=0, le=86_400)] = 30.0
    log_level: LogLevel = "info"
    awake_us: AwakeUs = 300.0
    metrics: str | None = None
    access_log: bool = False

    @property
    def ipc_permissions(self) -> int:
        """`ipc_mode` as the number `chmod` takes."""
        return int(self.ipc_mode, 8)

    @property
    def ipc_gid(self) -> int | None:
        """`ipc_group` as the number `chown` takes.

        Raises:
            KeyError: this machine has no such group.
        """
        if self.ipc_group is None:
            return None
        if re.fullmatch(r"[0-9]{1,10}", self.ipc_group) and int(self.ipc_group) <= MAX_UID:
            return int(self.ipc_group)
        return grp.getgrnam(self.ipc_group).gr_gid


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `[models.NAME]` table.

    Attributes:
        path: The model's folder or file; absolute after `load_config`.
        backend: The framework that runs it.
        version: The numbered version served; None for the highest there is.
        workers: Processes that run it.
        devices: Where worker i runs: `devices[i % len(devices)]`; empty for anywhere.
        max_batch_size: Most rows that run together.
        max_queue_delay_ms: How long an open batch waits for company while a worker is idle.
        allowed_batch_sizes: Sizes a batch is padded up to; empty for no padding.
        slots: Batches the arena holds; None to let the front choose.
        max_rows_bytes: Bytes of one slot, inputs and outputs; None to take them from the signatures.
        share_weights: Whether workers map one copy of the weights.
        threads: Threads for one operation; None for the number of cores given.
        gpu_memory_mb: Hard limit on GPU memory in MiB; None for growth on demand.
        warm_up: Whether each batch size runs once before a worker counts as ready.
        awake_us: Longest a worker stays awake for the next batch, if the last one came quickly.
        timeout_ms: Longest run of a batch; its worker is killed then. 0 for no limit.
        request_timeout_ms: Deadline of requests that carry none; None for none.
        retry: Whether rows of a batch that failed may run again.
        poison_memory_s: How long a request that killed workers is refused at the door; 0 for never.
        priority: Of requests that carry none: 0 (first) to 3.
        priority_ageing_ms: Waiting for so long counts as much as one step of priority.
        max_inflight_rows: Most rows one client may have in the arena; None for all but one slot.
        max_worker_memory_mb: Private memory at which a worker is replaced; None for no limit.
        max_batches_per_worker: Batches after which a worker is replaced; None for no limit.
    """

    path: Annotated[str, Meta(min_length=1)]
    backend: Backend = "tensorflow"
    version: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    workers: Annotated[int, Meta(ge=1, le=MAX_WORKERS)] = 1
    devices: tuple[str, ...] = ()
    max_batch_size: Annotated[int, Meta(ge=1, le=MAX_BATCH_ROWS)] = 64
    max_queue_delay_ms: Annotated[float, Meta(ge=0, le=3_600_000)] = 0.0
    allowed_batch_sizes: tuple[Annotated[int, Meta(ge=1, le=MAX_BATCH_ROWS)], ...] = ()
    slots: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    max_rows_bytes: Annotated[int, Meta(ge=64, le=2**40)] | None = None
    share_weights: bool = True
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    gpu_memory_mb: Annotated[int, Meta(ge=1, le=2**24)] | None = None
    warm_up: bool = True
    awake_us: AwakeUs = 300.0
    timeout_ms: Annotated[float, Meta(ge=0, le=MAX_TIMEOUT_MS)] = 60_000.0
    request_timeout_ms: Annotated[float, Meta(ge=1, le=MAX_TIMEOUT_MS)] | None = None
    retry: bool = True
    poison_memory_s: Annotated[float, Meta(ge=0, le=86_400)] = 300.0
    priority: Annotated[int, Meta(ge=0, le=MAX_PRIORITY)] = 1
    priority_ageing_ms: Annotated[float, Meta(ge=0, le=3_600_000)] = 1000.0
    max_inflight_rows: Annotated[int, Meta(ge=1, le=2**32 - 1)] | None = None
    max_worker_memory_mb: Annotated[int, Meta(ge=1, le=2**24)] | None = None
    max_batches_per_worker: Annotated[int, Meta(ge=1, le=2**32)] | None = None


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole configuration file: `[server]`, and one `[models.NAME]` table per model."""

    server: ServerConfig = ServerConfig()
    models: dict[str, ModelConfig]


class Placement(msgspec.Struct, frozen=True):
    """Where one worker runs.

    Attributes:
        cores: CPU cores the process is pinned to; empty for no pinning.
        threads: Threads for one operation.
        gpu: Index of the one GPU the process may see, or None for none.
        gpu_memory_mb: Hard limit on that GPU's memory in MiB, or None for growth on demand.
    """

    cores: tuple[int, ...] = ()
    threads: int = 1
    gpu: int | None = None
    gpu_memory_mb: int | None = None


def placement(model: ModelConfig, worker_index: int, core_count: int) -> Placement:
    """The device of a model's worker.

    Args:
        model: A checked configuration.
        worker_index: 0 for the first worker.
        core_count: Cores this process may use; shared out among workers that are not pinned.
    """
    cores: tuple[int, ...] = ()
    gpu: int | None = None
    if model.devices:
        cores, gpu = _parse_device(model.devices[worker_index % len(model.devices)])
    threads = model.threads or len(cores) or max(1, core_count // model.workers)
    return Placement(cores, threads, gpu, model.gpu_memory_mb if gpu is not None else None)


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read and check a configuration file.

    Paths that are relative are taken from the file's own folder; the result's are absolute.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or not TOML, or breaks a rule; every
            mistake is one line of the message, `file: key: rule, got value`.
    """
    file = os.fspath(path)
    try:
        text = Path(file).read_bytes().decode("utf-8")
    except OSError as e:
        raise ConfigError(f"{file}: file: must be readable, got {e.strerror}") from None
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise ConfigError(f"{file}: line {line}: must be UTF-8, got byte 0x{e.object[e.start]:02x}") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{file}: {_syntax_mistake(str(e), text)}") from None
    config = decode_config(document, file)
    folder = Path(file).resolve().parent
    models = {
        name: msgspec.structs.replace(model, path=str((folder / Path(model.path).expanduser()).resolve()))
        for name, model in config.models.items()
    }
    server = msgspec.structs.replace(
        config.server,
        curve_secret_key=_absolute(folder, config.server.curve_secret_key),
        authorized_keys=_absolute(folder, config.server.authorized_keys),
    )
    config = msgspec.structs.replace(config, server=server, models=models)
    _raise(file, list(_machine_mistakes(config, os.sched_getaffinity(0))))
    return config


def _absolute(folder: Path, path: str | None) -> str | None:
    """Symbolic links stay: what they point to may be exchanged while the server runs."""
    return None if path is None else os.path.abspath(folder / Path(path).expanduser())


def decode_config(document: dict[str, Any], file: str) -> Config:
    """Check a parsed document against every rule that does not depend on the machine.

    Args:
        document: What the TOML parser gave.
        file: The name the messages begin with.

    Raises:
        ConfigError: it breaks a rule; all mistakes are told, one a line.
    """
    mistakes: list[Mistake] = []
    server_table = _table(document, "server", mistakes)
    models_table = _table(document, "models", mistakes)
    for name in [name for name in document if name not in Config.__struct_fields__]:
        mistakes.append(_unknown_key(_quoted(name), name, document[name], Config))
    server = ServerConfig()
    if server_table is not None:
        checked = _decode(ServerConfig, server_table, "server", mistakes)
        if checked is not None:
            server = checked
            mistakes += _server_mistakes(server)
    models: dict[str, ModelConfig] = {}
    if "models" not in document or models_table == {}:
        mistakes.append(Mistake("models", "must hold at least one [models.NAME] table", _MISSING))
    for name, table in (models_table or {}).items():
        key = f"models.{_quoted(name)}"
        if MODEL_NAME.fullmatch(name) is None:
            rule = "must be a name of letters, digits, '_', '.' and '-'"
            mistakes.append(Mistake(key, rule, name))
        elif not isinstance(table, dict):
            mistakes.append(Mistake(key, "must be a table", table))
        else:
            model = _decode(ModelConfig, table, key, mistakes)
            if model is not None:
                models[name] = model
                mistakes += _model_mistakes(key, model)
    _raise(file, mistakes)
    return Config(server=server, models=models)


# -- mistakes --------------------------------------------------------------------------------------

_MISSING: Any = object()


class Mistake(msgspec.Struct, frozen=True):
    """One broken rule: the dotted key, what the rule is, and the value found (`_MISSING`: none)."""

    key: str
    rule: str
    got: Any

    def __str__(self) -> str:
        if self.got is _MISSING:
            return f"{self.key}: {self.rule}, got nothing"
        shown = _shown(self.got)
        return f"{self.key}: {self.rule}, got {shown if len(shown) <= 120 else shown[:117] + '...'}"


def _shown(value: Any) -> str:
    """A value on one line, much as the file has it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isprintable() else json.dumps(value, default=str)


def _quoted(key: str) -> str:
    """A key as TOML writes it."""
    return key if re.fullmatch(r"[A-Za-z0-9_.-]+", key) else _shown(key)


def _raise(file: str, mistakes: list[Mistake]) -> None:
    if mistakes:
        raise ConfigError("\n".join(f"{file}: {mistake}" for mistake in mistakes))


def _table(document: dict[str, Any], key: str, mistakes: list[Mistake]) -> dict[str, Any] | None:
    found = document.get(key)
    if found is None or isinstance(found, dict):
        return found
    mistakes.append(Mistake(key, "must be a table", found))
    return None


Struct = typing.TypeVar("Struct", ServerConfig, ModelConfig)


def _decode(kind: type[Struct], table: dict[str, Any], key: str, mistakes: list[Mistake]) -> Struct | None:
    """Check each key by itself, so that one mistake does not hide the next."""
    types = typing.get_type_hints(kind, include_extras=True)
    required = {field.name for field in msgspec.structs.fields(kind) if field.required}
    before = len(mistakes)
    values = {}
    for name, value in table.items():
        if name not in types:
            mistakes.append(_unknown_key(f"{key}.{_quoted(name)}", name, value, kind))
            continue
        try:
            values[name] = msgspec.convert(value, types[name])
        except msgspec.ValidationError:
            rule = "must be " + _describe(msgspec.inspect.type_info(types[name]))
            mistakes.append(Mistake(f"{key}.{name}", rule, value))
    mistakes += [
        Mistake(f"{key}.{name}", "must be given", _MISSING) for name in sorted(required - table.keys())
    ]
    return kind(**values) if len(mistakes) == before else None


def _unknown_key(key: str, name: str, value: Any, kind: type[msgspec.Struct]) -> Mistake:
    valid = kind.__struct_fields__
    for other, place in ((ServerConfig, "[server]"), (ModelConfig, "[models.NAME]")):
        if name in other.__struct_fields__ and other is not kind:
            return Mistake(key, f"unknown key here; {name} belongs in {place}", value)
    nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]
    return Mistake(key, f"unknown key; the nearest valid key is {nearest}", value)


def _describe(kind: msgspec.inspect.Type) -> str:
    """What a value of this type is, in words."""
    match kind:
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(_describe(t) for t in types if not isinstance(t, msgspec.inspect.NoneType))
        case msgspec.inspect.IntType(ge=low, le=high):
            return f"an integer from {low} to {high}"
        case msgspec.inspect.FloatType(ge=low, le=high):
            return f"a number from {low:g} to {high:.10g}"
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.LiteralType(values=values):
            return "one of " + ", ".join(json.dumps(value) for value in values)
        case msgspec.inspect.StrType(pattern=str()):
            return 'three octal digits such as "0660"'
        case msgspec.inspect.StrType(min_length=low):
            return "a string that is not empty" if low else "a string"
        case msgspec.inspect.VarTupleType(item_type=item):
            inner = _describe(item)
            return "a list, each item " + inner
    raise AssertionError(f"no words for {kind}")  # pragma: no cover - a new field's type


def _syntax_mistake(message: str, text: str) -> str:
    """`line N: rule, got line`, of the parser's own message."""
    place = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    lines = text.split("\n")
    if place is not None:
        line = int(place[1])
        rule = f"must be TOML ({message[: place.start()]} at column {place[2]})"
    else:  # "(at end of document)"
        line = len(lines) - (len(lines) > 1 and not lines[-1])
        rule = f"must be TOML ({message})"
    return str(Mistake(f"line {line}", rule, lines[line - 1]))


# -- rules that one type cannot tell ---------------------------------------------------------------


# What a tcp endpoint that others reach wants.
SECURED = "or have keys (curve_secret_key and authorized_keys), or insecure = true"


def _server_mistakes(server: ServerConfig) -> Iterator[Mistake]:
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
    if server.metrics is not None:
        try:
            check_endpoint(f"tcp://{server.metrics}", bind=True)
        except ConfigError:
            yield Mistake("server.metrics", 'must read "HOST:PORT", such as "127.0.0.1:9464"', server.metrics)
    if server.curve_secret_key is None and not server.insecure:
        for i, endpoint in enumerate(server.endpoints):
            if endpoint.startswith("tcp://") and not is_loopback(endpoint):
                yield Mistake(f"server.endpoints[{i}]", f"must be on loopback, {SECURED}", endpoint)
    if (server.curve_secret_key is None) != (server.authorized_keys is None):
        given, wanted = "curve_secret_key", "authorized_keys"
        if server.curve_secret_key is None:
            given, wanted = wanted, given
        yield Mistake(f"server.{wanted}", f"must be given with {given}", _MISSING)
    if server.insecure and server.curve_secret_key is not None:
        yield Mistake("server.insecure", "must be false where there are keys (curve_secret_key)", True)
    if server.ipc_uids == ():
        rule = "must name users, or be left out where the mode of the socket file is enough"
        yield Mistake("server.ipc_uids", rule, server.ipc_uids)


def _model_mistakes(key: str, model: ModelConfig) -> Iterator[Mistake]:
    sizes = model.allowed_batch_sizes
    if any(a >= b for a, b in itertools.pairwise(sizes)):
        yield Mistake(f"{key}.allowed_batch_sizes", "must rise from one to the next", sizes)
    elif sizes and sizes[-1] != model.max_batch_size:
        rule = f"must end with max_batch_size ({model.max_batch_size})"
        yield Mistake(f"{key}.allowed_batch_sizes", rule, sizes)
    if model.slots is not None and model.slots < model.workers:
        yield Mistake(f"{key}.slots", f"must be at least workers ({model.workers})", model.slots)
    if len(model.devices) > model.workers:
        rule = f"must have at most one item a worker (workers is {model.workers})"
        yield Mistake(f"{key}.devices", rule, model.devices)
    has_gpu = False
    for i, device in enumerate(model.devices):
        try:
            _, gpu = _parse_device(device)
        except ValueError as e:
            yield Mistake(f"{key}.devices[{i}]", str(e), device)
        else:
            has_gpu = has_gpu or gpu is not None
    if model.gpu_memory_mb is not None and not has_gpu:
        rule = 'needs a "gpu:N" in devices'
        yield Mistake(f"{key}.gpu_memory_mb", rule, model.gpu_memory_mb)


def _machine_mistakes(config: Config, cores: set[int]) -> Iterator[Mistake]:
    yield from _access_mistakes(config.server)
    for name, model in config.models.items():
        if not Path(model.path).exists():
            yield Mistake(f"models.{name}.path", "must exist", model.path)
        for i, device in enumerate(model.devices):
            absent = sorted(set(_parse_device(device)[0]) - cores)
            if absent:
                rule = f"must name cores of this machine ({_ranges(cores)}), not {_ranges(set(absent))}"
                yield Mistake(f"models.{name}.devices[{i}]", rule, device)


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


def _parse_device(text: str) -> tuple[tuple[int, ...], int | None]:
    """The cores and the GPU of a device: exactly one of the two is there.

    Raises:
        ValueError: it is neither; the message is the rule.
    """
    if re.fullmatch(r"gpu:\d{1,4}", text):
        return (), int(text[4:])
    if re.fullmatch(r"cpu:\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text) is None:
        raise ValueError('must read "cpu:0", "cpu:1-3", "cpu:0,2" or "gpu:0"')
    cores: list[int] = []
    for part in text[4:].split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high:
            raise ValueError(f"must have ranges that rise, not {part}")
        if high > MAX_CORE:
            raise ValueError(f"must name cores up to {MAX_CORE}")
        cores.extend(range(low, high + 1))
    if len(set(cores)) != len(cores):
        raise ValueError("must not name a core twice")
    return tuple(sorted(cores)), None


def _ranges(cores: set[int]) -> str:
    """`0-3,5` of {0, 1, 2, 3, 5}."""
    parts: list[str] = []
    ordered = sorted(cores)
    start = 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i] != ordered[i - 1] + 1:
            first, last = ordered[start], ordered[i - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = i
    return ",".join(parts)
