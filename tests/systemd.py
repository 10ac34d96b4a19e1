"""A systemd of one's own: PID 1 in new namespaces, with a private /run, /etc and cgroup tree. Needs root.

It boots in a fraction of a second: it knows no units but a few targets and what a test gives it. What it
starts is real: users, sandboxes, watchdogs, sockets. When its PID 1 is killed the kernel kills all the rest,
and every mount goes with the namespace.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE_S = 30.0
_LOOK_S = 0.02  # between two looks at what cannot be waited for

_INIT = next(
    (p for p in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if os.path.exists(p)),
    "/lib/systemd/systemd",
)
_NAMESPACES = ("--pid", "--mount", "--uts", "--ipc", "--cgroup")

# Sockets of the journal. Not /dev/log, which is this machine's.
_JOURNAL = ("systemd-journald.service", "systemd-journald.socket")

# What systemd itself needs to start and to stop. The first is what it starts.
_TARGETS = ("basic", "sysinit", "sockets", "timers", "paths", "slices", "shutdown", "umount", "final")

_BOOT = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/etc /run/nothing /run/log
cp -a /etc/. /run/etc
mount --bind /run/etc /etc
rm -rf /etc/systemd
cp -a "$1/etc/." /etc
umount -R -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=pool-test \\
    SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/systemd/system SYSTEMD_GENERATOR_PATH=/run/nothing \\
    "$2" --system --log-target=console --show-status=no --log-level=info
"""


def why_not() -> str:
    """Why systemd cannot be booted here; empty if it can."""
    if not os.path.exists(_INIT):
        return "systemd is not installed"
    absent = [name for name in ("unshare", "nsenter", "setpriv", "systemctl") if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)} here"
    if os.geteuid() != 0:
        return "booting systemd takes root"
    script = "mount --make-rprivate / && mount -t proc proc /proc && mount -t cgroup2 cgroup2 /sys/fs/cgroup"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    return f"no privilege for namespaces and mounts: {tried.stderr.strip()}" if tried.returncode else ""


class Systemd:
    """A running systemd.

    Attributes:
        pid: Its PID 1, as seen from outside.
        root: Its file system, as seen from outside: sockets below it can be connected to.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.root = Path(f"/proc/{pid}/root")

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        enter = ["nsenter", f"--target={self.pid}", *_NAMESPACES, "--"]
        done = subprocess.run(
            [*enter, *command], capture_output=True, text=True, check=False, timeout=2 * PATIENCE_S
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def systemctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`systemctl ...`."""
        return self.run("systemctl", "--no-pager", "--no-ask-password", *arguments, check=check)

    def show(self, unit: str) -> dict[str, str]:
        """All properties of a unit; those that are not set are empty."""
        lines = self.systemctl("show", "--all", unit).stdout.splitlines()
        return {key: value for key, _, value in (line.partition("=") for line in lines)}

    def until(self, unit: str, condition: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """Wait until a unit's properties fulfil a condition, and give them."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition(found := self.show(unit)):
            assert time.monotonic() < deadline, found
            time.sleep(_LOOK_S)
        return found

    def write(self, path: str, text: str) -> None:
        """Write a file inside."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o644)

    def journal(self, unit: str, *arguments: str) -> list[str]:
        """Messages of a unit in the journal, which what wrote to a file is not in."""
        self.run("journalctl", "--sync")
        told = self.run("journalctl", "--no-pager", "--quiet", "--output=cat", f"--unit={unit}", *arguments)
        return told.stdout.splitlines()

    def read(self, path: str) -> str:
        """Read a file inside; empty if it is not there."""
        file = self.root / path.lstrip("/")
        return file.read_text() if file.exists() else ""


@contextlib.contextmanager
def booted(etc: Path, log: Path) -> Iterator[Systemd]:
    """Boot systemd; on leaving nothing of it is left.

    Args:
        etc: A root folder whose `etc` is laid over this machine's, which it does not change.
        log: Where systemd says what it does.
    """
    units = etc / "etc/systemd/system"
    units.mkdir(parents=True, exist_ok=True)
    for target in _TARGETS:
        shutil.copy(Path(_INIT).parent / "system" / f"{target}.target", units)
    for unit in _JOURNAL:
        shutil.copy(Path(_INIT).parent / "system" / unit, units)
    (units / "sockets.target.wants").mkdir()
    (units / f"sockets.target.wants/{_JOURNAL[1]}").symlink_to(f"../{_JOURNAL[1]}")
    (etc / "etc/systemd/journald.conf").write_text("[Journal]\nStorage=volatile\nReadKMsg=no\n")
    (units / "default.target").symlink_to(f"{_TARGETS[0]}.target")
    group = _new_cgroup("")
    mounts = Path("/proc/self/mounts").read_text()
    if group is not None:
        group.mkdir()
    process = None
    try:
        with log.open("wb") as file:
            # The cgroup namespace begins where the process is that makes it.
            join = f"echo 0 > {group}/cgroup.procs && " if group is not None else ""
            # Killed itself, this process has no say any more: the kernel then ends what it started.
            leash = ["setpriv", "--pdeathsig=KILL", "--"]
            boot = [*leash, "unshare", *_NAMESPACES, "--fork", "--kill-child", "sh", "-c", _BOOT, "boot"]
            process = subprocess.Popen(
                ["sh", "-c", f'{join}exec "$@"', "sh", *boot, str(etc), _INIT],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        systemd = Systemd(_child(process, log))
        _await_start(systemd, process, log)
        yield systemd
    finally:
        if process is not None:
            process.kill()  # and with it, by --kill-child, PID 1 and the whole namespace
            process.wait()
        if group is not None:
            _remove(group)
    assert Path("/proc/self/mounts").read_text() == mounts, "mounts left behind"


def _child(process: subprocess.Popen[bytes], log: Path) -> int:
    """The one child of `unshare`, once it is there."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children and Path(f"/proc/{process.pid}/comm").read_text().strip() == "unshare":
            return int(children[0])
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(_LOOK_S)


def _await_start(systemd: Systemd, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while systemd.systemctl("is-system-running", check=False).stdout.strip() not in ("running", "degraded"):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(_LOOK_S)


def _new_cgroup(controller: str) -> Path | None:
    """A name for a new control group below this process's own; None where that hierarchy is not mounted.

    Args:
        controller: One of version 1, or "" for version 2.
    """
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        is_it = kind == "cgroup" and controller in options.split(",") if controller else kind == "cgroup2"
        if is_it and controller in own:
            return Path(place + own[controller]) / f"pool-test-{os.getpid()}"
    return None


def _remove(group: Path) -> None:
    """Remove a control group and those below it, whose processes are dead or about to be."""
    deadline = time.monotonic() + PATIENCE_S
    while group.exists():
        with contextlib.suppress(OSError):
            for folder in [*sorted((p for p in group.rglob("*") if p.is_dir()), reverse=True), group]:
                folder.rmdir()
        if group.exists():
            assert time.monotonic() < deadline, f"{group} holds processes still"
            time.sleep(_LOOK_S)


@contextlib.contextmanager
def memory_limit(systemd: Systemd, unit: str, spare_bytes: int) -> Iterator[bool]:
    """Leave the processes of a unit so much memory beyond what they use now.

    Through whichever version of control groups has the memory controller here. Gives whether there is one.
    """
    if "memory" in systemd.read("/sys/fs/cgroup/cgroup.controllers").split():
        used = int(systemd.show(unit)["MemoryCurrent"])
        systemd.systemctl("set-property", "--runtime", unit, f"MemoryMax={used + spare_bytes}")
        yield True
        systemd.systemctl("set-property", "--runtime", unit, "MemoryMax=infinity")
        return
    group = _new_cgroup("memory")
    if group is None:
        yield False
        return
    parent = group.parent
    group.mkdir()
    try:
        members = systemd.read(f"/sys/fs/cgroup{systemd.show(unit)['ControlGroup']}/cgroup.procs").split()
        for member in members:  # as this process calls them, since it is the one that reads
            (group / "cgroup.procs").write_text(member)
        # What they had is charged where they were; from now on, to this group.
        used = int((group / "memory.usage_in_bytes").read_text())
        (group / "memory.limit_in_bytes").write_text(str(used + spare_bytes))
        yield True
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (parent / "cgroup.procs").write_text(pid)
        _remove(group)
