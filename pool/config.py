"""The configuration file: its structs, their defaults, and how a file is read.

Used by the front and the commands. `decode_config` is pure (a parsed document in, structs or a
`ConfigError` out); only `load_config` touches the machine, to read the file and to see whether the
paths and the cores it names are there. `configs/reference.toml` tells each key to the user.

All mistakes of a file are reported at once, one a line: `file: key: rule, got value`.
"""

from __future__ import annotations

import grp
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pool.config_mistakes import (
    MISSING,
    Mistake,
    Places,
    decode_table,
    find_table,
    quoted,
    raise_all,
    syntax_mistake,
    unknown_key,
)
from pool.config_rules import machine_mistakes, model_mistakes, server_mistakes
from pool.devices import parse_device
from pool.endpoints import MAX_FRONTS
from pool.errors import ConfigError
from pool.pipelines import PipelineConfig, StepConfig, pipeline_mistakes
from pool.python import split_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODEL_NAME = re.compile(r"[A-Za-z0-9_.-]+")
MAX_WORKERS = 1024
MAX_BATCH_ROWS = 65_536
MIN_MESSAGE_BYTES = 65_536  # the longest header of the wire must fit
MAX_TIMEOUT_MS = 2**32 - 1  # the wire carries it as a u32
MAX_PRIORITY = 3
MAX_UID = 2**32 - 2  # the last one stands for none

Backend = Literal["tensorflow", "python", "drill"]
AwakeUs = Annotated[float, Meta(ge=0, le=100_000)]
LogLevel = Literal["debug", "info", "warning", "error"]


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[server]` table.

    Attributes:
        endpoints: Where clients connect; empty for `pool.endpoints.default_endpoint()`.
        fronts: Processes that serve the endpoints.
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
    fronts: Annotated[int, Meta(ge=1, le=MAX_FRONTS)] = 1
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
        path: The model's folder or file, or `FILE.py:FUNCTION`; absolute after `load_config`.
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
        split_batches: Whether a worker runs a batch in pieces where that is faster.
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
    split_batches: bool = True
    timeout_ms: Annotated[float, Meta(ge=0, le=MAX_TIMEOUT_MS)] = 60_000.0
    request_timeout_ms: Annotated[float, Meta(ge=1, le=MAX_TIMEOUT_MS)] | None = None
    retry: bool = True
    poison_memory_s: Annotated[float, Meta(ge=0, le=86_400)] = 300.0
    priority: Annotated[int, Meta(ge=0, le=MAX_PRIORITY)] = 1
    priority_ageing_ms: Annotated[float, Meta(ge=0, le=3_600_000)] = 1000.0
    max_inflight_rows: Annotated[int, Meta(ge=1, le=2**32 - 1)] | None = None
    max_worker_memory_mb: Annotated[int, Meta(ge=1, le=2**24)] | None = None
    max_batches_per_worker: Annotated[int, Meta(ge=1, le=2**32)] | None = None

    @property
    def file(self) -> tuple[str, str]:
        """The part of `path` that names a file or folder, and the rest."""
        split = split_path(self.path) if self.backend == "python" else None
        return (self.path, "") if split is None else (split[0], f":{split[1]}")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole configuration file: `[server]`, and tables `[models.NAME]` and `[pipelines.NAME]`."""

    server: ServerConfig = ServerConfig()
    models: dict[str, ModelConfig]
    pipelines: dict[str, PipelineConfig] = {}


_PLACES: Places = {
    "[server]": ServerConfig,
    "[models.NAME]": ModelConfig,
    "[pipelines.NAME]": PipelineConfig,
}


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
        cores, gpu = parse_device(model.devices[worker_index % len(model.devices)])
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
    config = read_config(file)
    folder = Path(file).resolve().parent
    models = {
        name: msgspec.structs.replace(model, path=_resolved(folder, model))
        for name, model in config.models.items()
    }
    server = msgspec.structs.replace(
        config.server,
        curve_secret_key=_absolute(folder, config.server.curve_secret_key),
        authorized_keys=_absolute(folder, config.server.authorized_keys),
    )
    config = msgspec.structs.replace(config, server=server, models=models)
    raise_all(file, list(machine_mistakes(config, os.sched_getaffinity(0))))
    return config


def read_config(path: str | os.PathLike[str]) -> Config:
    """Read a configuration file and check every rule that does not depend on the machine.

    Paths are as they are written.

    Raises:
        ConfigError: as of `load_config`.
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
        raise ConfigError(f"{file}: {syntax_mistake(str(e), text)}") from None
    return decode_config(document, file)


def _resolved(folder: Path, model: ModelConfig) -> str:
    path, function = model.file
    # Which is, unlike Path.resolve, content with links in a circle: they are told of later.
    return os.path.realpath(folder / _expanded(path)) + function


def _absolute(folder: Path, path: str | None) -> str | None:
    """Symbolic links stay: what they point to may be exchanged while the server runs."""
    return None if path is None else os.path.abspath(folder / _expanded(path))


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user: nor will there be such a file
        return Path(path)


def decode_config(document: dict[str, Any], file: str) -> Config:
    """Check a parsed document against every rule that does not depend on the machine.

    Args:
        document: What the TOML parser gave.
        file: The name the messages begin with.

    Raises:
        ConfigError: it breaks a rule; all mistakes are told, one a line.
    """
    mistakes: list[Mistake] = []
    server_table = find_table(document, "server", mistakes)
    models_table = find_table(document, "models", mistakes)
    pipelines_table = find_table(document, "pipelines", mistakes)
    for name in [name for name in document if name not in Config.__struct_fields__]:
        mistakes.append(unknown_key(quoted(name), name, document[name], Config, _PLACES))
    server = ServerConfig()
    if server_table is not None:
        checked = decode_table(ServerConfig, server_table, "server", _PLACES, mistakes)
        if checked is not None:
            server = checked
            mistakes += server_mistakes(server)
    models: dict[str, ModelConfig] = {}
    if "models" not in document or models_table == {}:
        mistakes.append(Mistake("models", "must hold at least one [models.NAME] table", MISSING))
    for name, table in (models_table or {}).items():
        key = f"models.{quoted(name)}"
        if _check_name(key, name, table, mistakes):
            model = decode_table(ModelConfig, table, key, _PLACES, mistakes)
            if model is not None:
                models[name] = model
                mistakes += model_mistakes(key, model)
    pipelines: dict[str, PipelineConfig] = {}
    for name, table in (pipelines_table or {}).items():
        key = f"pipelines.{quoted(name)}"
        if name in (models_table or {}):
            mistakes.append(Mistake(key, "must not have the name of a model: clients ask for both", name))
        if _check_name(key, name, table, mistakes):
            pipeline = _decode_pipeline(key, table, mistakes)
            if pipeline is not None:
                pipelines[name] = pipeline
                mistakes += pipeline_mistakes(key, pipeline, tuple(models_table or {}))
    raise_all(file, mistakes)
    return Config(server=server, models=models, pipelines=pipelines)


def _check_name(key: str, name: str, table: Any, mistakes: list[Mistake]) -> bool:
    """Whether the table of something that clients ask for by name has a name, and is one."""
    if MODEL_NAME.fullmatch(name) is None:
        mistakes.append(Mistake(key, "must be a name of letters, digits, '_', '.' and '-'", name))
    elif not isinstance(table, dict):
        mistakes.append(Mistake(key, "must be a table", table))
    else:
        return True
    return False


def _decode_pipeline(key: str, table: dict[str, Any], mistakes: list[Mistake]) -> PipelineConfig | None:
    before = len(mistakes)
    steps = table.get("steps", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        mistakes.append(Mistake(f"{key}.steps", "must be a list of tables, each a step", steps))
    else:
        for i, step in enumerate(steps):
            decode_table(StepConfig, step, f"{key}.steps[{i}]", _PLACES, mistakes)
    # With the others checked all the same where a step is wrong.
    rest = table if len(mistakes) == before else table | {"steps": []}
    pipeline = decode_table(PipelineConfig, rest, key, _PLACES, mistakes)
    return pipeline if len(mistakes) == before else None
