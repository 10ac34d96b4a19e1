"""The demo as a user runs it: trained, served, asked, checked, stopped; then once more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pool.cli import demo, digits, picture
from tests.models import REPOSITORY

KEYS = {
    "accuracy",
    "requests",
    "mismatches",
    "requests_per_s",
    "p50_ms",
    "p99_ms",
    "batch_sizes",
    "processes",
}


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the demo in a folder, its temporary files below it."""
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "pool", "demo", *args],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(folder / "tmp")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(600)  # imports TensorFlow five times and trains, however busy the machine is
def test_demo() -> None:
    # Not pytest's own folder: a Unix socket's path is short.
    with tempfile.TemporaryDirectory(prefix="pool-") as name:
        folder = Path(name)
        first = run(folder, "--json")
        assert first.returncode == 0, first.stderr
        report = json.loads(first.stdout)
        assert report.keys() == KEYS
        assert report["accuracy"] >= 0.98
        assert report["requests"] == 1797
        assert report["mismatches"] == 0
        assert report["requests_per_s"] > 0
        assert 0 < report["p50_ms"] <= report["p99_ms"]
        assert sum(int(rows) * count for rows, count in report["batch_sizes"].items()) == 1797
        assert max(map(int, report["batch_sizes"])) > 1
        roles = [process["role"] for process in report["processes"]]
        assert roles == ["front", "zygote", "worker", "worker"]
        for process in report["processes"]:
            assert 0 < process["uss_bytes"] <= process["pss_bytes"]
            assert not Path(f"/proc/{process['pid']}").exists()
        with Image.open(folder / "demo.png") as image:
            assert image.size[0] > 1000

        model = folder / "demo" / "models" / "digits" / "1" / "saved_model.pb"
        trained = model.stat().st_mtime_ns
        second = run(folder)
        assert second.returncode == 0, second.stderr
        assert model.stat().st_mtime_ns == trained
        assert "trained before, used again" in second.stdout
        assert "1797 of 1797 within 1e-05 of the in-process model" in second.stdout
        assert list((folder / "tmp").iterdir()) == []


def test_training_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "demo" / "models").mkdir(parents=True)
    (tmp_path / "demo" / "models" / "digits").write_text("in the way")
    done = run(tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("pool: ")


def test_a_server_that_cannot_start_is_told(tmp_path: Path) -> None:
    model = tmp_path / "demo" / "models" / "digits" / "1"
    model.mkdir(parents=True)
    (model / "saved_model.pb").write_text("not a model")
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("pool: MODEL_LOAD: the demo's model: answer ended with 1\n")


def test_the_split_is_fixed() -> None:
    data = digits.load()
    assert data.images.shape == (1797, 8, 8, 1)
    assert (data.images.min(), data.images.max()) == (0.0, 1.0)
    assert data.held_out.sum() == digits.HELD_OUT
    assert np.array_equal(data.held_out, digits.load().held_out)
    assert set(data.digits[data.held_out].tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ({}, []),
        ({1: 5}, [(1, 1, 5)]),
        ({1: 5, 2: 1, 3: 2, 64: 9}, [(1, 1, 5), (2, 3, 3), (64, 64, 9)]),
        ({4: 1, 5: 1, 9: 1}, [(4, 7, 2), (8, 9, 1)]),
        ({0: 2, 1: 1}, [(0, 0, 2), (1, 1, 1)]),
    ],
)
def test_histogram(sizes: dict[int, int], want: list[tuple[int, int, int]]) -> None:
    assert demo.histogram(sizes) == want


def test_every_mistake_is_in_the_picture_however_many(tmp_path: Path) -> None:
    data = digits.load()
    nothing_right = np.roll(np.eye(10, dtype=np.float32)[data.digits], 1, axis=1)
    picture.draw(tmp_path / "p.png", data, nothing_right, {}, "")
    all_right = np.eye(10, dtype=np.float32)[data.digits]
    picture.draw(tmp_path / "q.png", data, all_right, {1: 3, 64: 1}, "")
    with Image.open(tmp_path / "p.png") as wrong, Image.open(tmp_path / "q.png") as right:
        assert wrong.size == right.size
        assert red(wrong) > 1000
        assert red(right) == 0


def red(image: Image.Image) -> int:
    """Pixels of the frames round mistakes."""
    wanted = [int(picture.WRONG[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.asarray(image.convert("RGB")) == wanted).all(axis=2).sum())
