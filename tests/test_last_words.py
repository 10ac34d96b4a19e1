"""What a process writes to its standard error is passed on, and its last lines kept."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

from pool.front.last_words import _LINES_KEPT, LastWords


def run(script):
    """The lines kept of a process that runs a script; `capfd` has what was passed on."""

    async def watch():
        words = LastWords(asyncio.get_running_loop())
        process = subprocess.Popen([sys.executable, "-c", script], stderr=words.write_fd)
        words.handed_over()
        while process.poll() is None:  # the loop reads meanwhile: a full pipe would stop the process
            await asyncio.sleep(0.01)
        return words.close()

    return asyncio.run(watch())


def test_the_last_lines_are_kept_and_all_are_passed_on(capfd):
    assert run("import sys; print(*range(100), sep='\\n', file=sys.stderr)") == [
        str(n) for n in range(100 - _LINES_KEPT, 100)
    ]
    assert capfd.readouterr().err.split() == [str(n) for n in range(100)]


def test_a_line_without_an_end_counts_and_a_line_without_anything_does_not():
    assert run("import os; os.write(2, b'one\\n\\n\\ntwo\\xff')") == ["one", "two\ufffd"]


def test_megabytes_without_a_line_end_do_not_stay(capfd):
    (line,) = run("import os; [os.write(2, b'x' * 60_000) for _ in range(50)]")
    assert len(line) <= 1 << 16
    assert len(capfd.readouterr().err) == 3_000_000


def test_nothing_is_left_open():
    before = len(os.listdir("/proc/self/fd"))
    assert run("pass") == []
    assert len(os.listdir("/proc/self/fd")) == before
