"""The log's lines: one an event, for people and for the journal, and what the status document keeps."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool import Client, ModelNotFound
from pool.front import logs
from pool.front.logs import JournalFormatter, Log, Recent, TextFormatter, is_journal


@pytest.fixture
def lines():
    """Write to a logger of the test's own; gives a function from a formatter to what it wrote."""
    logger = logging.getLogger("pool.of-a-test")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    handlers = []

    def record(formatter):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        logger.addHandler(handler)
        handlers.append(handler)
        return stream

    yield record
    for handler in handlers:
        logger.removeHandler(handler)


LOG = Log("pool.of-a-test")


def test_a_line_for_people(lines):
    out = lines(TextFormatter())
    LOG.info("model ready", model="m", workers=2, took_s=0.123456789, shared=True, why=None, of=("a", "b"))
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO pool.of-a-test model ready "
        r"model=m workers=2 took_s=0.123457 shared=true of=a,b\n",
        out.getvalue(),
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("", '""'),
        ("a b", '"a b"'),
        ("a=b", '"a=b"'),
        ('say "x"', r'"say \"x\""'),
        ("two\nlines", r'"two\nlines"'),
        ("ümlaut…", "ümlaut…"),
        ("\x1b[31m", r'"\u001b[31m"'),
        ("back\\slash", r'"back\\slash"'),
    ],
)
def test_values_that_need_quotes(lines, value, shown):
    out = lines(TextFormatter())
    LOG.error("event", value=value)
    assert out.getvalue().endswith(f" ERROR pool.of-a-test event value={shown}\n")


@given(st.text(), st.text())
def test_whatever_it_holds_an_event_is_one_line(event, value):
    record = logging.LogRecord("pool.x", logging.INFO, "", 0, "%s", (event,), None)
    record.fields = {"value": value}
    for formatter in (TextFormatter(), JournalFormatter()):
        assert len(formatter.format(record).splitlines()) == 1
    document = json.loads(JournalFormatter().format(record)[3:])
    assert (document["event"], document["value"]) == (event, value)


@pytest.mark.parametrize(
    ("write", "priority"), [(LOG.debug, 7), (LOG.info, 6), (LOG.warning, 4), (LOG.error, 3)]
)
def test_a_line_for_the_journal(lines, write, priority):
    out = lines(JournalFormatter())
    write("worker lost", model="m", pid=7, none=None)
    line = out.getvalue()
    assert line.startswith(f"<{priority}>{{")
    document = json.loads(line[3:])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", document.pop("time"))
    level = write.__name__
    assert document == {
        "level": level, "logger": "pool.of-a-test", "event": "worker lost", "model": "m", "pid": 7,
    }  # fmt: skip


def test_a_traceback_is_a_field(lines):
    text, journal = lines(TextFormatter()), lines(JournalFormatter())
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        LOG.defect("cannot", what=1)
    assert len(text.getvalue().splitlines()) == 1
    assert "RuntimeError: boom" in text.getvalue()
    assert json.loads(journal.getvalue()[3:])["traceback"].startswith("Traceback (most recent call last):\n")


def test_lines_of_others_are_events_too(lines):
    out = lines(JournalFormatter())
    logging.getLogger("pool.of-a-test").warning("%d of %s", 3, "them")
    assert json.loads(out.getvalue()[3:])["event"] == "3 of them"


def test_the_last_warnings_and_errors_are_kept():
    recent = Recent()
    logger = logging.getLogger("pool.of-a-test")
    logger.addHandler(recent)
    try:
        for i in range(30):
            LOG.error("worker lost", worker=i, last_words="x" * 9999)
            LOG.info("worker ready", worker=i)
    finally:
        logger.removeHandler(recent)
    kept = recent.describe()
    assert [one["fields"]["worker"] for one in kept] == [str(i) for i in range(10, 30)]
    assert {(one["level"], one["event"]) for one in kept} == {("error", "worker lost")}
    assert all(len(one["fields"]["last_words"]) == 500 for one in kept)


def test_the_journal_is_known_by_its_number(tmp_path):
    with (tmp_path / "file").open("w") as file:
        status = os.fstat(file.fileno())
        right = f"{status.st_dev}:{status.st_ino}"
        assert is_journal({"JOURNAL_STREAM": right}, file)
        assert not is_journal({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"}, file)
        assert not is_journal({"JOURNAL_STREAM": "x"}, file)
        assert not is_journal({}, file)
        assert not is_journal({"JOURNAL_STREAM": right}, io.StringIO())


# -- a real server -----------------------------------------------------------------------------------


@pytest.fixture
def inputs():
    return {
        "x": np.zeros((1, 4), np.float32),
        "fault": np.zeros(1, np.int32),
        "argument": np.zeros(1, np.float32),
    }


@pytest.fixture
def models(tmp_path):
    (tmp_path / "drill.toml").write_text("")
    return f'[models.m]\nbackend = "drill"\npath = "{tmp_path}"\nmax_batch_size = 4\n'


def requests_of(log):
    return [line for line in log.read_text().splitlines() if " pool.requests request " in line]


def test_requests_are_not_logged(start_server, tmp_path, models, inputs):
    with start_server(tmp_path, models) as server:
        with Client(server.endpoint) as client:
            client.predict("m", inputs)
        assert not requests_of(server.log)


def test_requests_are_logged_if_asked_for(start_server, tmp_path, models, inputs):
    with start_server(tmp_path, models, server='access_log = true\nlog_level = "error"') as server:
        with Client(server.endpoint) as client:
            client.predict("m", inputs)
            client.predict("m", {name: np.repeat(array, 6, axis=0) for name, array in inputs.items()})
            with pytest.raises(ModelNotFound):
                client.predict("n", inputs, version=1)
        first, second = requests_of(server.log)
        assert re.search(
            r" INFO pool.requests request model=m code=OK client=00[0-9a-f]{8} id=\d+ rows=1 "
            r"total_ms=[0-9.e-]+ waited_ms=[0-9.e-]+ batch_rows=1$",
            first,
        )
        assert re.search(r"model=m code=OK .* rows=6 total_ms=[0-9.e-]+$", second)


def test_a_server_of_systemd_writes_json(tmp_path, models):
    config, log = tmp_path / "pool.toml", tmp_path / "log"
    config.write_text(f'[server]\nendpoints = ["ipc://{tmp_path}/missing/\0"]\n{models}'.replace("\0", "s"))
    (tmp_path / "missing").write_text("a file where the directory should be")
    with log.open("wb") as file:
        status = os.fstat(file.fileno())
        environment = os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        code = subprocess.run(
            [sys.executable, "-m", "pool", "serve", str(config)], env=environment, stderr=file, check=False
        ).returncode
    assert code == 2
    written = [json.loads(line[3:]) for line in log.read_text().splitlines()]
    assert [(one["level"], one["event"]) for one in written] == [
        ("error", "cannot serve"),
        ("info", "stopped"),
    ]
    assert written[0]["code"] == "CONFIG"
    assert log.read_text().startswith("<3>{")


def test_every_event_is_documented():
    """But for those of `debug`."""
    repository = Path(logs.__file__).parents[2]
    table = (repository / "docs" / "operations.md").read_text().split("\n## 21 Log\n")[1].split("\n## ")[0]
    written = re.compile(r"\blog\.(?:info|warning|error|defect)\(\s*\"([^\"]+)\"")
    events = {
        event
        for file in (repository / "pool" / "front").rglob("*.py")
        for event in written.findall(file.read_text())
    }
    assert len(events) > 30
    assert [event for event in sorted(events) if f"`{event}`" not in table] == []


def test_the_switch_for_requests_is_apart_from_the_level():
    access, root = Log(logs.ACCESS), logging.getLogger()
    before = root.level
    try:
        logs.apply("error", True)
        assert not access.is_off
        assert logging.getLogger(logs.ACCESS).isEnabledFor(logging.INFO)
        assert root.level == logging.ERROR
        logs.apply("info", False)
        assert access.is_off
    finally:
        root.setLevel(before)
        logging.getLogger(logs.ACCESS).disabled = False
