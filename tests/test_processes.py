"""What processes and GPUs are measured to cost."""

from __future__ import annotations

import os
import subprocess
import sys

from pool.front.processes import GpuMemory, measure_gpus, measure_processes, read_gpus


def test_processes_are_measured():
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        pass
    usage = measure_processes([os.getpid(), gone.pid])
    assert usage[os.getpid()]["pss_bytes"] >= usage[os.getpid()]["uss_bytes"] > 1 << 20
    assert usage[os.getpid()]["cpu_s"] > 0
    assert usage[gone.pid] == {"pid": gone.pid, "cpu_s": 0.0, "uss_bytes": 0, "pss_bytes": 0}


def test_lines_of_nvidia_smi_are_read():
    text = "0, 1024, 143771\n1, [N/A], [N/A]\n\n2, 0, 143771\n"
    assert read_gpus(text) == [GpuMemory("0", 1 << 30, 143771 << 20), GpuMemory("2", 0, 143771 << 20)]
    assert read_gpus("No devices were found\n") == []


def test_a_machine_without_the_program_has_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure_gpus() == []


def test_a_program_that_fails_is_no_gpu(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for script, wanted in (("exit 9", []), ("echo 0, 5, 6", [GpuMemory("0", 5 << 20, 6 << 20)])):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert measure_gpus() == wanted
