"""What the measurements of bench/ make of what they saw."""

import io

import numpy as np
import pytest

from bench import readme
from bench.checked import is_close
from bench.figures import at_least, at_most, fact
from bench.overload import judge
from bench.processes import Log


def test_a_goal_is_reached_by_the_figure_itself():
    assert at_most("lost", 0, "", 0).row["reached"]
    assert not at_most("lost", 1, "", 0).row["reached"]
    assert at_least("right", 63, "", 63).row["reached"]
    assert not at_least("right", 62, "", 63).row["reached"]


def test_the_table_tells_what_was_missed_and_of_which_commit():
    text = readme.render(
        {
            "machine": "M",
            "system": "S",
            "libraries": "L",
            "date": "D",
            "rounds": 5,
            "commits": {"faults": "abc"},
            "figures": {"faults": [at_most("lost", 1, "", 0).row, fact("  answered", 12345, "requests").row]},
        }
    )
    assert "commits abc (faults)" in text
    assert "| lost | 1  | at most 0 (missed) |" in text
    assert "| &nbsp;&nbsp;answered | 12,345 requests |  |" in text


def test_an_overload_is_judged_by_what_came_in_time():
    report = {
        "requests_per_s": 1000.0,
        "goodput_per_s": 950.0,
        "p99_ms": 180.0,
        "errors": {"OVERLOADED": 8_500, "DEADLINE_EXCEEDED": 500},
        "server_cpu_us_per_request": {"front": 200.0},
    }
    assert judge(report, peak=1000.0, p99_ms=100.0, requests=10_000) == {
        "offered": 10_000.0,
        "goodput": 950.0,
        "share": 0.95,
        "p99 overload": 180.0,
        "p99 ratio": 1.8,
        "late": pytest.approx(100 * 500 / 1500),
        "front": 20.0,
    }


def test_rounding_is_no_mistake_and_another_row_is():
    want = np.array([[1.0, -200.0]], np.float32)
    assert is_close(want * np.float32(1 + 1e-6), want)
    assert not is_close(want[:, ::-1], want)
    assert not is_close(want[:, :1], want)


def test_a_log_gives_lines_since_an_instant():
    log = Log(io.StringIO("worker ready role=quarantine\nworker ready role=serving pid=7\n"))
    at = log.wait_for("worker ready .*role=serving", 0.0, 10.0)
    with pytest.raises(RuntimeError, match="role=serving pid=7"):
        log.wait_for("worker ready", at + 1000.0, 0.01)
