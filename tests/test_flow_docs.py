"""The program of docs/flow.md, as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests import models

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "flow.md"


def test_the_first_program_runs(tmp_path):
    program = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1]
    (tmp_path / "pool.toml").write_text(f'[models.digits]\npath = "{models.path("cnn")}"\n')
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers, sizes = done.stdout.split(" ", 1)
    assert answers == "1000"
    assert "64" in sizes
