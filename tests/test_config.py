"""The rules of the configuration file, and the reference file against the structs."""

from __future__ import annotations

import grp
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.config import (
    Config,
    ModelConfig,
    Placement,
    ServerConfig,
    decode_config,
    load_config,
    placement,
    tomllib,
)
from pool.errors import ConfigError
from pool.keys import write_pair
from pool.pipelines import PipelineConfig, StepConfig

PAIR = ("Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID", "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs")
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def decode(text: str) -> Config:
    return decode_config(tomllib.loads(text), "f.toml")


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        decode(text)
    return caught.value.message.splitlines()


def model_mistake(line: str) -> str:
    """The one mistake of a model with this extra line, without `file: models.m.`."""
    (found,) = mistakes(f'[models.m]\npath = "p"\n{line}\n')
    assert found.startswith("f.toml: models.m."), found
    return found.removeprefix("f.toml: models.m.")


# -- what is accepted ------------------------------------------------------------------------------


def test_path_alone_is_enough() -> None:
    config = decode('[models.m]\npath = "somewhere"\n')
    assert config.server == ServerConfig()
    assert config.models == {"m": ModelConfig(path="somewhere")}


def test_every_key_is_taken() -> None:
    config = decode(
        """
        [server]
        endpoints = ["ipc:///run/pool.sock", "tcp://127.0.0.1:5555"]
        ipc_mode = "600"
        max_message_bytes = 1_000_000
        max_unread_bytes = 1_000_000
        start_timeout_s = 10
        drain_timeout_s = 0
        log_level = "debug"
        [models."a.b-c_1"]
        path = "p"
        backend = "tensorflow"
        version = 7
        workers = 3
        devices = ["cpu:0", "cpu:1-3", "gpu:0"]
        max_batch_size = 32
        max_queue_delay_ms = 2
        allowed_batch_sizes = [1, 8, 32]
        slots = 9
        max_rows_bytes = 4096
        share_weights = false
        threads = 2
        gpu_memory_mb = 512
        warm_up = false
        timeout_ms = 0
        request_timeout_ms = 250.5
        retry = false
        poison_memory_s = 0
        priority = 0
        priority_ageing_ms = 50
        max_inflight_rows = 100
        max_worker_memory_mb = 900
        max_batches_per_worker = 10000
        """
    )
    assert config.server.ipc_permissions == 0o600
    assert config.server.start_timeout_s == 10.0
    model = config.models["a.b-c_1"]
    assert model == ModelConfig(
        path="p",
        version=7,
        workers=3,
        devices=("cpu:0", "cpu:1-3", "gpu:0"),
        max_batch_size=32,
        max_queue_delay_ms=2.0,
        allowed_batch_sizes=(1, 8, 32),
        slots=9,
        max_rows_bytes=4096,
        share_weights=False,
        threads=2,
        gpu_memory_mb=512,
        warm_up=False,
        timeout_ms=0.0,
        request_timeout_ms=250.5,
        retry=False,
        poison_memory_s=0.0,
        priority=0,
        priority_ageing_ms=50.0,
        max_inflight_rows=100,
        max_worker_memory_mb=900,
        max_batches_per_worker=10_000,
    )


# -- what is refused: key, rule and value ----------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("max_batchsize = 8", "max_batchsize: unknown key; the nearest valid key is max_batch_size, got 8"),
        ("zzz = 1", "zzz: unknown key; the nearest valid key is "),
        ('endpoints = ["x"]', 'endpoints: unknown key here; endpoints belongs in [server], got ["x"]'),
        ("workers = 0", "workers: must be an integer from 1 to 1024, got 0"),
        ("workers = true", "workers: must be an integer from 1 to 1024, got true"),
        ("workers = 1.5", "workers: must be an integer from 1 to 1024, got 1.5"),
        ('workers = "2"', 'workers: must be an integer from 1 to 1024, got "2"'),
        ("version = -1", "version: must be an integer from 0 to 9223372036854775807, got -1"),
        ("warm_up = 1", "warm_up: must be true or false, got 1"),
        ('backend = "torch"', 'backend: must be one of "drill", "python", "tensorflow", got "torch"'),
        ("request_timeout_ms = 0", "timeout_ms: must be a number from 1 to 4294967295, got 0"),
        ("max_queue_delay_ms = nan", "max_queue_delay_ms: must be a number from 0 to 3600000, got NaN"),
        ("max_queue_delay_ms = inf", "max_queue_delay_ms: must be a number from 0 to 3600000, got Infinity"),
        ("max_queue_delay_ms = 2020-01-01", 'got "2020-01-01"'),
        ('devices = "cpu:0"', 'devices: must be a list, each item a string, got "cpu:0"'),
        ("devices = [0]", "devices: must be a list, each item a string, got [0]"),
        (
            'devices = ["cpu:0", "cpu:1"]',
            'devices: must have at most one item a worker (workers is 1), got ["cpu:0", "cpu:1"]',
        ),
        ('devices = ["cpu"]', 'devices[0]: must read "cpu:0", "cpu:1-3", "cpu:0,2" or "gpu:0", got "cpu"'),
        ('devices = ["gpu:0-1"]', 'devices[0]: must read "cpu:0"'),
        ('devices = ["cpu:3-1"]', 'devices[0]: must have ranges that rise, not 3-1, got "cpu:3-1"'),
        ('devices = ["cpu:0,0-1"]', 'devices[0]: must not name a core twice, got "cpu:0,0-1"'),
        ('devices = ["cpu:0-9999"]', 'devices[0]: must name cores up to 4095, got "cpu:0-9999"'),
        (
            "allowed_batch_sizes = [1, 8, 8, 64]",
            "allowed_batch_sizes: must rise from one to the next, got [1, 8, 8, 64]",
        ),
        (
            "allowed_batch_sizes = [1, 8]",
            "allowed_batch_sizes: must end with max_batch_size (64), got [1, 8]",
        ),
        ("allowed_batch_sizes = [0]", "allowed_batch_sizes: must be a list, each item an integer from 1 to"),
        ("workers = 4\nslots = 3", "slots: must be at least workers (4), got 3"),
        ("gpu_memory_mb = 100", 'gpu_memory_mb: needs a "gpu:N" in devices, got 100'),
        ('gpu_memory_mb = 100\ndevices = ["cpu:0"]', 'gpu_memory_mb: needs a "gpu:N" in devices, got 100'),
    ],
)
def test_model_mistakes(line: str, want: str) -> None:
    assert want in model_mistake(line)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", "f.toml: models: must hold at least one [models.NAME] table, got nothing"),
        ("[models]\n", "f.toml: models: must hold at least one [models.NAME] table, got nothing"),
        ("models = 3\n", "f.toml: models: must be a table, got 3"),
        ("[models]\nm = 3\n", "f.toml: models.m: must be a table, got 3"),
        ("[models.m]\n", "f.toml: models.m.path: must be given, got nothing"),
        ('[models.m]\npath = ""\n', 'f.toml: models.m.path: must be a string that is not empty, got ""'),
        (
            '[models."a b"]\npath = "p"\n',
            "f.toml: models.\"a b\": must be a name of letters, digits, '_', '.' and '-', got \"a b\"",
        ),
    ],
)
def test_document_mistakes(text: str, want: str) -> None:
    assert mistakes(text) == [want]


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ('ipc_mode = "rw"', 'server.ipc_mode: must be three octal digits such as "0660", got "rw"'),
        ("ipc_mode = 660", 'server.ipc_mode: must be three octal digits such as "0660", got 660'),
        ("max_message_bytes = 1", "server.max_message_bytes: must be an integer from 65536 to 1099511627776"),
        ('log_level = "loud"', 'server.log_level: must be one of "debug", "error", "info", "warning", got'),
        ('endpoints = ["http://x"]', "server.endpoints[0]: must be an endpoint ("),
        ('metrics = "9464"', 'server.metrics: must read "HOST:PORT", such as "127.0.0.1:9464", got "9464"'),
        ('metrics = ""', 'server.metrics: must read "HOST:PORT"'),
        ('metrics = "[::1]:65536"', 'server.metrics: must read "HOST:PORT"'),
        (
            'endpoints = ["tcp://127.0.0.1:1", "tcp://*:2"]',
            "server.endpoints[1]: must be on loopback, or have keys (curve_secret_key and authorized_keys), "
            'or insecure = true, got "tcp://*:2"',
        ),
        ('endpoints = ["tcp://[::]:2"]', "server.endpoints[0]: must be on loopback, or have keys"),
        ('endpoints = ["tcp://10.0.0.1:2"]', "server.endpoints[0]: must be on loopback, or have keys"),
        ('endpoints = ["tcp://host.example:2"]', "server.endpoints[0]: must be on loopback, or have keys"),
        (
            'curve_secret_key = "k"',
            "server.authorized_keys: must be given with curve_secret_key, got nothing",
        ),
        ('authorized_keys = "k"', "server.curve_secret_key: must be given with authorized_keys, got nothing"),
        (
            'curve_secret_key = "k"\nauthorized_keys = "d"\ninsecure = true',
            "server.insecure: must be false where there are keys",
        ),
        ("ipc_uids = []", "server.ipc_uids: must name users, or be left out"),
        ("ipc_uids = [-1]", "server.ipc_uids: must be a list, each item an integer from 0 to 4294967294"),
        ('ipc_group = ""', "server.ipc_group: must be a string that is not empty"),
        ('endpoints = ["ipc:///a", "ipc:///a"]', "server.endpoints[1]: must not be given twice"),
        ("workers = 2", "server.workers: unknown key here; workers belongs in [models.NAME], got 2"),
        ("fronts = 0", "server.fronts: must be an integer from 1 to 16, got 0"),
        ("fronts = 17", "server.fronts: must be an integer from 1 to 16, got 17"),
        (
            f'fronts = 2\nendpoints = ["ipc:///{"x" * 105}"]',
            "server.endpoints[0]: must leave room for the numbers of the fronts: 107 bytes in all",
        ),
    ],
)
def test_server_mistakes(line: str, want: str) -> None:
    (found,) = mistakes(f'[server]\n{line}\n[models.m]\npath = "p"\n')
    assert want in found


@pytest.mark.parametrize(
    "lines",
    [
        'endpoints = ["tcp://127.0.0.1:1", "tcp://127.8.9.1:*", "tcp://[::1]:1", "tcp://localhost:1"]',
        'endpoints = ["tcp://*:1"]\ninsecure = true',
        'endpoints = ["tcp://*:1"]\ncurve_secret_key = "k"\nauthorized_keys = "d"',
    ],
)
def test_tcp_endpoints_that_are_taken(lines: str) -> None:
    decode(f'[server]\n{lines}\n[models.m]\npath = "p"\n')


def test_all_mistakes_are_told_at_once() -> None:
    found = mistakes(
        "servr = 1\n[server]\nlog_level = 2\n[models.a]\nworkers = 0\nslot = 1\n[models.b]\npath = 1\n"
    )
    assert [line.split(": ")[1] for line in found] == [
        "servr",
        "server.log_level",
        "models.a.workers",
        "models.a.slot",
        "models.a.path",
        "models.b.path",
    ]
    assert "nearest valid key is server" in found[0]
    assert "nearest valid key is slots" in found[3]


def test_long_values_are_cut() -> None:
    assert len(model_mistake(f'backend = "{"x" * 500}"')) < 200


def told(document: dict[str, Any]) -> list[str]:
    """The lines of the error, if there is one."""
    try:
        decode_config(document, "f")
    except ConfigError as e:
        return e.message.splitlines()
    return []


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [*ModelConfig.__struct_fields__, *ServerConfig.__struct_fields__, "server", "models"]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=12,
    )
)
def test_any_document_gives_a_config_or_a_config_error(tree: Any) -> None:
    for document in (tree, {"models": tree}, {"models": {"m": tree}}, {"server": tree}):
        if not isinstance(document, dict):
            continue
        assert all(re.match(r"f: .+: .+, got ", line) for line in told(document))


# -- the file --------------------------------------------------------------------------------------


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "pool.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def file_mistakes(file: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    lines = caught.value.message.splitlines()
    assert all(line.startswith(f"{file}: ") for line in lines)
    return [line.removeprefix(f"{file}: ") for line in lines]


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    file = write(tmp_path, '[models.m]\npath = "m"\n')
    assert load_config(file).models["m"].path == str((tmp_path / "m").resolve())
    relative = os.path.relpath(file)
    assert load_config(relative).models["m"].path == str((tmp_path / "m").resolve())


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    file = write(tmp_path, '[models.m]\npath = "m"\n')
    assert file_mistakes(file) == [f'models.m.path: must exist, got "{tmp_path / "m"}"']


@pytest.mark.parametrize(
    ("path", "got", "why"),
    [
        ("x" * 300, "{folder}/" + "x" * 300, " and be within reach (File name too long)"),
        ("circle", "{folder}/circle", " and be within reach (Too many levels of symbolic links)"),
        ("file/m", "{folder}/file/m", ""),
        ("~nobody-of-this-name/m", "{folder}/~nobody-of-this-name/m", ""),
    ],
)
def test_a_path_that_cannot_be_looked_at(tmp_path: Path, path: str, got: str, why: str) -> None:
    """Told as any mistake: what a server that is to reload its file must not be ended by."""
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").write_text("")
    file = write(tmp_path, f'[models.m]\npath = "{path}"\n')
    (found,) = file_mistakes(file)
    shown = got.format(folder=tmp_path)
    assert found.startswith(f'models.m.path: must exist{why}, got "{shown}'[:100])


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_path_in_a_folder_that_is_closed(tmp_path: Path) -> None:
    (tmp_path / "closed" / "m").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    file = write(tmp_path, '[models.m]\npath = "closed/m"\n')
    (found,) = file_mistakes(file)
    assert found.startswith("models.m.path: must exist and be within reach (Permission denied), got ")


def test_a_zero_byte_is_in_no_path() -> None:
    shown = 'must not hold a zero byte, got "a\\u0000b"'
    assert mistakes('[models.m]\npath = "a\\u0000b"\n') == [f"f.toml: models.m.path: {shown}"]
    keys = 'curve_secret_key = "a\\u0000b"\nauthorized_keys = "a\\u0000b"'
    assert mistakes(f'[server]\n{keys}\n[models.m]\npath = "p"\n') == [
        f"f.toml: server.{name}: {shown}" for name in ("curve_secret_key", "authorized_keys")
    ]


def test_cores_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    file = write(tmp_path, '[models.m]\npath = "m"\ndevices = ["cpu:4090,4094-4095"]\n')
    (found,) = file_mistakes(file)
    cores = os.sched_getaffinity(0)
    assert found.startswith("models.m.devices[0]: must name cores of this machine (")
    assert found.endswith('), not 4090,4094-4095, got "cpu:4090,4094-4095"')
    assert str(min(cores)) in found


def access_mistakes(folder: Path, *lines: str) -> list[str]:
    file = folder / "pool.toml"
    file.write_text("\n".join(["[server]", *lines, "[models.m]", 'path = "."']))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    return [line.removeprefix(f"{file}: ") for line in caught.value.message.splitlines()]


KEYS = ('curve_secret_key = "pool.key"', 'authorized_keys = "clients"')


def test_keys_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    write_pair(str(tmp_path), "pool", *PAIR)
    write_pair(str(tmp_path / "clients"), "alice", *PAIR)
    file = tmp_path / "pool.toml"
    file.write_text("\n".join(["[server]", *KEYS, "[models.m]", 'path = "."']))
    server = load_config(file).server
    assert server.curve_secret_key == str(tmp_path / "pool.key")
    assert server.authorized_keys == str(tmp_path / "clients")


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    key, clients = access_mistakes(tmp_path, *KEYS)
    assert key.startswith("server.curve_secret_key: must be a file made by `pool keys new` (key file ")
    assert key.endswith(f'must be readable, got No such file or directory), got "{tmp_path}/pool.key"')
    assert clients == (
        "server.authorized_keys: must be a directory of NAME.pub files (No such file or directory), "
        f'got "{tmp_path}/clients"'
    )


def test_keys_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    write_pair(str(tmp_path), "pool", *PAIR)
    (tmp_path / "pool.key").chmod(0o644)
    (tmp_path / "clients" / "bob.pub").write_text("nothing")
    (tmp_path / "clients" / "README").write_text("nothing")
    key, client = access_mistakes(tmp_path, *KEYS)
    assert "must be open to its owner alone (mode 0600), got mode 0644" in key
    assert client.startswith("server.authorized_keys: must hold public keys (key file ")
    assert client.endswith('got "bob.pub"')


def test_a_group_that_is_not_there(tmp_path: Path) -> None:
    (found,) = access_mistakes(tmp_path, 'ipc_group = "no such group"')
    assert found == 'server.ipc_group: must be a group of this machine, got "no such group"'


def test_groups_by_name_and_number() -> None:
    name = grp.getgrgid(os.getgid()).gr_name
    assert ServerConfig(ipc_group=name).ipc_gid == os.getgid()
    assert ServerConfig(ipc_group="4711").ipc_gid == 4711
    assert ServerConfig().ipc_gid is None


def test_cores_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    core = min(os.sched_getaffinity(0))
    file = write(tmp_path, f'[models.m]\npath = "m"\ndevices = ["cpu:{core}"]\n')
    assert placement(load_config(file).models["m"], 0, 1) == Placement((core,), 1)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("[models.m]\npath = = 3\n", r'line 2: must be TOML \(.+ at column 8\), got "path = = 3"'),
        ("[models.m", r'line 1: must be TOML \(.+\), got "\[models.m"'),
        ("a = '''x\ny", r"line 2: must be TOML \(.+\), got \"y\""),
        ("a = 1\na = 2\n", r"line 2: must be TOML \(.+\), got \"a = 2\""),
        (b"a = 1\nb = '\xff'\n", r"line 2: must be UTF-8, got byte 0xff"),
    ],
)
def test_files_that_are_not_toml(tmp_path: Path, text: str | bytes, want: str) -> None:
    (found,) = file_mistakes(write(tmp_path, text))
    assert re.fullmatch(want, found), found


def test_no_file(tmp_path: Path) -> None:
    assert file_mistakes(tmp_path / "absent.toml") == [
        "file: must be readable, got No such file or directory"
    ]
    assert file_mistakes(tmp_path) == ["file: must be readable, got Is a directory"]


# -- placement -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "worker", "cores", "want"),
    [
        (ModelConfig(path="p"), 0, 8, Placement((), 8)),
        (ModelConfig(path="p", workers=3), 2, 8, Placement((), 2)),
        (ModelConfig(path="p", workers=4), 0, 2, Placement((), 1)),
        (ModelConfig(path="p", workers=4, threads=3), 0, 2, Placement((), 3)),
        (ModelConfig(path="p", workers=3, devices=("cpu:0", "cpu:1-3")), 0, 8, Placement((0,), 1)),
        (ModelConfig(path="p", workers=3, devices=("cpu:0", "cpu:1-3")), 1, 8, Placement((1, 2, 3), 3)),
        (ModelConfig(path="p", workers=3, devices=("cpu:0", "cpu:3,1")), 2, 8, Placement((0,), 1)),
        (ModelConfig(path="p", devices=("cpu:3,1",), threads=1), 0, 8, Placement((1, 3), 1)),
        (ModelConfig(path="p", devices=("gpu:1",), gpu_memory_mb=9), 0, 8, Placement((), 8, 1, 9)),
        (
            ModelConfig(path="p", workers=2, devices=("cpu:0", "gpu:1"), gpu_memory_mb=9),
            0,
            8,
            Placement((0,), 1),
        ),
    ],
)
def test_placement(model: ModelConfig, worker: int, cores: int, want: Placement) -> None:
    assert placement(model, worker, cores) == want


# -- the files that ship ---------------------------------------------------------------------------


def reference_keys() -> dict[str, dict[str, Any]]:
    """Every key of reference.toml by table; those commented out hold the text after `=`."""
    text = (CONFIGS / "reference.toml").read_text()
    found: dict[str, dict[str, Any]] = {}
    table = ""
    for line in text.splitlines():
        if line.startswith("["):
            table = line.strip("[]")
            found[table] = {}
        elif match := re.fullmatch(r"(# )?([a-z_]+) = (.+)", line):
            value = tomllib.loads(f"x = {match[3]}")["x"]
            found[table][match[2]] = ("commented", match[3]) if match[1] else value
    return found


@pytest.mark.parametrize(
    ("table", "struct"),
    [
        ("server", ServerConfig),
        ("models.example", ModelConfig),
        ("pipelines.chain", PipelineConfig),
        ("pipelines.chain.steps", StepConfig),
    ],
)
def test_reference_has_each_key_with_its_default(table: str, struct: type[msgspec.Struct]) -> None:
    keys = reference_keys()[table]
    kind = msgspec.inspect.type_info(struct)
    assert isinstance(kind, msgspec.inspect.StructType)
    fields = [field for field in kind.fields if field.name != "steps"]  # which are tables of their own
    assert list(keys) == [field.name for field in fields]
    for field in fields:
        value = keys[field.name]
        if field.default is None:  # TOML has no none: the line is commented out, and its example is valid
            state, example = value
            assert state == "commented"
            extra = {
                "gpu_memory_mb": 'devices = ["gpu:0"]',
                "curve_secret_key": 'authorized_keys = "keys"',
                "authorized_keys": 'curve_secret_key = "pool.key"',
            }.get(field.name, "")
            steps = [
                {"name": name, "model": "m", "inputs": {"x": f"{source}.x"}}
                for name, source in (("first", "request"), ("second", "first"))
            ]
            document: dict[str, Any] = {
                "models": {"m": {"path": "p"}},
                "server": {},
                "pipelines": {"chain": {"steps": steps}},
            }
            where = {
                "server": document["server"],
                "models.example": document["models"]["m"],
                "pipelines.chain": document["pipelines"]["chain"],
                "pipelines.chain.steps": steps[0],
            }[table]
            where |= tomllib.loads(f"{field.name} = {example}\n{extra}")
            decode_config(document, "f")
        elif not field.required:
            default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            assert (tuple(value) if isinstance(value, list) else value) == default, field.name


def test_reference_tells_each_key() -> None:
    """Above each key stands a comment that tells its default, too."""
    lines = (CONFIGS / "reference.toml").read_text().splitlines()
    for i, line in enumerate(lines):
        if re.match(r"(# )?[a-z_]+ = ", line):
            start = i
            while lines[start - 1].startswith("#"):
                start -= 1
            comment = " ".join(lines[start:i])
            assert len(comment) > 60, line
            assert "efault" in comment, line


def test_reference_is_a_valid_configuration() -> None:
    config = decode((CONFIGS / "reference.toml").read_text())
    assert config.server == ServerConfig()
    assert config.models == {"example": ModelConfig(path="models/example")}
    step = StepConfig(model="example", inputs={"image": "request.image"})
    assert config.pipelines == {"chain": PipelineConfig(steps=(step,))}


def test_demo_is_a_valid_configuration() -> None:
    config = decode((CONFIGS / "demo.toml").read_text())
    assert config.models["digits"].workers == 2
