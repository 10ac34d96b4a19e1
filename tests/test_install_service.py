"""Writing the units below a folder, as whoever runs the tests."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pool.__main__ import main
from pool.cli import install_service, visibility
from pool.config import read_config
from pool.errors import ConfigError

POOL = "/opt/pool/bin/pool"


def install(root, *args):
    return main(["install-service", "--root", str(root), "--executable", POOL, *args])


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_everything_is_written_where_systemd_reads_it(tmp_path, capsys):
    assert install(tmp_path) == 0
    assert files(tmp_path) == [
        "etc/systemd/system/pool@.service",
        "etc/systemd/system/pool@.socket",
        "etc/sysusers.d/pool.conf",
        "etc/tmpfiles.d/pool.conf",
    ]
    unit = (tmp_path / "etc/systemd/system/pool@.service").read_text()
    assert f"ExecStart={POOL} serve /etc/pool/%i.toml\n" in unit
    assert "@POOL@" not in unit
    assert stat.S_IMODE((tmp_path / "etc/sysusers.d/pool.conf").stat().st_mode) == 0o644
    assert "systemctl daemon-reload" in capsys.readouterr().out


def test_a_package_has_its_own_prefix_and_gpus_a_drop_in(tmp_path):
    assert install(tmp_path, "--prefix", "/usr/lib", "--gpu") == 0
    assert files(tmp_path)[0] == "usr/lib/systemd/system/pool@.service"
    assert "usr/lib/systemd/system/pool@.service.d/50-gpu.conf" in files(tmp_path)


def test_a_second_time_changes_nothing(tmp_path, capsys):
    install(tmp_path)
    before = {path: (tmp_path / path).stat().st_mtime_ns for path in files(tmp_path)}
    capsys.readouterr()
    assert install(tmp_path) == 0
    assert {path: (tmp_path / path).stat().st_mtime_ns for path in files(tmp_path)} == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("unchanged ") for line in lines)


def test_an_older_version_of_ours_is_replaced_and_an_edited_file_is_not(tmp_path, capsys):
    install(tmp_path)
    unit = tmp_path / "etc/systemd/system/pool@.service"
    current = unit.read_text()
    older = "[Service]\nExecStart=/old\n"
    head = current.partition("\n")[0][:-64]
    unit.write_text(f"{head}{hashlib.sha256(older.encode()).hexdigest()}\n{older}")
    assert install(tmp_path) == 0
    assert unit.read_text() == current

    edited = current.replace("WatchdogSec=30", "WatchdogSec=5")
    unit.write_text(edited)
    other = tmp_path / "etc/tmpfiles.d/pool.conf"
    other.unlink()
    capsys.readouterr()
    assert install(tmp_path) == 2
    assert str(unit) in capsys.readouterr().err
    assert unit.read_text() == edited
    assert not other.exists(), "all or nothing"
    assert install(tmp_path, "--force") == 0
    assert unit.read_text() == current


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_where_one_may_not_write_is_told(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert install(tmp_path) == 1
    assert "Permission denied" in capsys.readouterr().err


def test_a_folder_that_is_none_is_told(tmp_path, capsys):
    (tmp_path / "etc").write_text("a file")
    assert install(tmp_path) == 1
    assert str(tmp_path / "etc") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["/usr/bin/pool"], "/usr/bin/pool"),
        (["/opt/my pool/bin/pool"], '"/opt/my pool/bin/pool"'),
        (['/opt/50%/"py"', "-m", "pool"], '"/opt/50%%/\\"py\\"" -m pool'),
    ],
)
def test_commands_are_quoted_as_units_are(words, want):
    assert install_service.quote_command(words) == want


@pytest.mark.parametrize("word", ["pool", "bin/pool", "/opt/$HOME/pool", "/opt/a\nb"])
def test_commands_that_a_unit_cannot_hold(word):
    with pytest.raises(ConfigError, match="wanted"):
        install_service.quote_command([word])


# -- what the unit hides ------------------------------------------------------------------------------

INSTALLATION = "etc/systemd/system/pool@.service.d/40-installation.conf"
CONFIGURATION = "etc/systemd/system/pool@a.service.d/40-configuration.conf"


def installation(folder: Path, code: str) -> Path:
    """A `pool` command that is a program of its own."""
    script = folder / "bin/pool"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!/bin/sh\n{code}\n")
    script.chmod(0o755)
    return script


def test_an_installation_that_is_hidden_is_shown(tmp_path, capsys):
    """It is asked itself, as systemd would run it, and what it says is shown where it has to be."""
    folder = tmp_path / "venv"
    needed = f"/usr {folder} {folder}/lib /home/somebody/python"
    script = installation(
        folder, f'test "$1 $2" = "install-service --list-paths" && printf "%s\\n" {needed} "${{HOME-/none}}"'
    )
    folder.chmod(0o755)
    root = tmp_path / "root"
    assert main(["install-service", "--root", str(root), "--executable", str(script)]) == 0
    shown = [line for line in (root / INSTALLATION).read_text().splitlines() if not line.startswith("#")]
    paths = ["/home/somebody/python", str(folder)]
    assert shown == ["[Service]", "ProtectHome=tmpfs", *(f"BindReadOnlyPaths={path}" for path in paths)]
    out = capsys.readouterr().out
    assert f"    BindReadOnlyPaths={folder}\n" in out
    # Somewhere else the drop-in goes.
    assert install(root) == 0
    assert not (root / INSTALLATION).exists()
    assert f"removed {root / INSTALLATION}\n" in capsys.readouterr().out


def test_what_this_installation_takes():
    listed = visibility.installation_paths()
    assert listed == visibility.outermost(listed)
    for path in (sys.prefix, sys.base_prefix, os.path.realpath(sys.executable), install_service.__file__):
        assert any(path == shown or path.startswith(f"{shown}/") for shown in listed), path


def test_an_installation_that_does_not_run_is_refused(tmp_path, capsys):
    script = installation(tmp_path / "venv", 'echo "no module named pool" >&2; exit 1')
    assert main(["install-service", "--root", str(tmp_path), "--executable", str(script)]) == 2
    assert capsys.readouterr().err == f"{script}: the service cannot run it (no module named pool)\n"
    script.chmod(0o644)
    assert main(["install-service", "--root", str(tmp_path), "--executable", str(script)]) == 2
    assert "Permission denied" in capsys.readouterr().err
    assert files(tmp_path) == ["venv/bin/pool"]


def test_an_installation_closed_to_others_is_refused(tmp_path, capsys):
    folder = tmp_path / "venv"
    script = installation(folder, f'echo "{folder}"')
    folder.chmod(0o700)
    assert main(["install-service", "--root", str(tmp_path), "--executable", str(script)]) == 2
    assert f"{folder}: the user that servers run as may not read it" in capsys.readouterr().err


def test_an_installation_that_is_not_there_yet(tmp_path, capsys):
    """As when a package is made."""
    assert install(tmp_path) == 0
    assert main(["install-service", "--root", str(tmp_path), "--executable", "/home/somebody/no/pool"]) == 2
    assert "the service does not see it there" in capsys.readouterr().err


def test_what_configurations_name_is_shown_to_their_services(tmp_path, capsys):
    config = tmp_path / "etc/pool/a.toml"
    config.parent.mkdir(parents=True)
    config.write_text(
        '[server]\ncurve_secret_key = "/home/x/keys/server.key"\nauthorized_keys = "clients"\n'
        '[models.a]\npath = "/home/x/a b"\n[models.b]\npath = "/home/x/a b/1"\n[models.c]\npath = "/srv/c"\n'
    )
    (config.parent / "broken.toml").write_text("[server]\nnonsense = 1\n")
    assert install(tmp_path) == 0
    shown = [line for line in (tmp_path / CONFIGURATION).read_text().splitlines() if not line.startswith("#")]
    assert shown == [
        "[Service]",
        "ProtectHome=tmpfs",
        'BindReadOnlyPaths="-/home/x/a b"',
        "BindReadOnlyPaths=-/home/x/keys/server.key",
    ]
    out = capsys.readouterr().out
    assert f"passed over {config.parent / 'broken.toml'}: " in out
    assert install(tmp_path) == 0
    assert "wrote" not in capsys.readouterr().out
    # One that is half written: its service is shown what it was.
    before = (tmp_path / CONFIGURATION).read_text()
    config.write_text("[models.a]\n")
    assert install(tmp_path) == 0
    out = capsys.readouterr().out
    assert f"passed over {config}: " in out
    assert "removed" not in out
    assert (tmp_path / CONFIGURATION).read_text() == before
    config.write_text('[models.c]\npath = "/srv/c"\n')
    assert install(tmp_path) == 0
    assert not (tmp_path / CONFIGURATION).exists()


def test_a_configuration_elsewhere_is_shown_with_what_it_names(tmp_path):
    """A link in /etc/pool to a file whose paths are relative to its own folder."""
    folder = tmp_path / "mine"  # which is below /tmp, mostly
    folder.mkdir()
    (folder / "a.toml").write_text('[models.a]\npath = "model"\n')
    link = tmp_path / "a.toml"
    link.symlink_to(folder / "a.toml")
    paths = visibility.configuration_paths(read_config(link), str(link))
    assert paths == [str(folder / "a.toml"), str(folder / "model")]


def test_a_python_model_is_shown_with_what_lies_beside_it(tmp_path):
    """It imports from there. A home is not shown for that."""
    config = tmp_path / "a.toml"
    paths = ("/home/x/glue/faces.py", "/home/x/glue.py", "/root/glue.py", "/srv/glue/faces.py")
    config.write_text(
        "".join(f'[models.m{i}]\nbackend = "python"\npath = "{path}:f"\n' for i, path in enumerate(paths))
    )
    shown = visibility.configuration_paths(read_config(config), str(config))
    assert shown == ["/home/x/glue", "/home/x/glue.py", "/root/glue.py", "/srv/glue"]


def test_a_path_that_a_unit_cannot_hold_is_refused(tmp_path, capsys):
    config = tmp_path / "etc/pool/a.toml"
    config.parent.mkdir(parents=True)
    config.write_text('[models.a]\npath = "/home/x/a:b"\n')
    assert install(tmp_path) == 2
    assert "'/home/x/a:b': wanted a path without colons" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("paths", "want"),
    [
        (["/b", "/a/x", "/a", "/ab"], ["/a", "/ab", "/b"]),
        (["/a/b/c", "/a/b-c", "/a/b"], ["/a/b", "/a/b-c"]),
        ([], []),
    ],
)
def test_outermost(paths, want):
    assert visibility.outermost(paths) == want


@pytest.mark.parametrize("folder", ["/home", "/root", "/tmp", "/var/tmp", "/run/user"])
def test_hidden(folder):
    assert visibility.is_hidden(folder)
    assert visibility.is_hidden(f"{folder}/x/y")
    assert not visibility.is_hidden(f"/srv{folder}")
    assert not visibility.is_hidden(f"{folder}x/y")


def test_closed_folders(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (tmp_path / "a").chmod(0o750)
    found = visibility.closed_folder(str(folder))
    assert found is not None
    assert str(tmp_path / "a").startswith(found), "it, or one that pytest made"
    assert visibility.is_closed(tmp_path / "a")
    assert not visibility.is_closed(folder)
    assert not visibility.is_closed(folder / "absent")


@pytest.mark.parametrize(
    ("user", "mode", "is_closed"),
    [
        ((None, None), 0o770, True),
        ((None, None), 0o771, False),
        ((os.getuid(), None), 0o700, False),
        ((os.getuid(), os.getgid()), 0o670, True),  # to its owner, whatever others may
        ((None, os.getgid()), 0o750, False),
        ((None, os.getgid()), 0o701, True),
    ],
)
def test_whom_a_folder_is_closed_to(tmp_path, monkeypatch, user, mode, is_closed):
    """As the kernel decides: the owner's mode is for the owner, the group's for his group."""
    monkeypatch.setattr(visibility, "_user", lambda: user)
    tmp_path.chmod(mode)
    try:
        assert visibility.is_closed(tmp_path) is is_closed
    finally:
        tmp_path.chmod(0o700)


def test_make_passes_its_folder_on(tmp_path):
    """`make -n`: what would be run."""
    told = subprocess.run(
        ["make", "-n", "install-service", f"DESTDIR={tmp_path}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f'pool install-service --root "{tmp_path}"' in told.stdout
