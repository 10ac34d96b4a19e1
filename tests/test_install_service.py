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
from pool.cli import install_service
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


def test_an_installation_that_the_service_does_not_see_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/home/somebody/venv/bin/python")
    with pytest.raises(ConfigError, match="does not see /home"):
        install_service.installed_command()
    visible = Path("/usr/bin/env")  # what it is does not matter
    monkeypatch.setattr(sys, "executable", str(visible))
    assert install_service.installed_command() == "/usr/bin/env -m pool"


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
