"""The log: events with fields, one line each, for people or for the journal. Runs in the front.

    log = Log("pool.engine")
    log.info("model ready", model="m", workers=2)

On a terminal, in a file or a pipe a line is text that `grep` finds:

    2026-11-22 10:00:00,123 INFO pool.engine model ready model=m workers=2

Where the standard error is the journal's (systemd sets `JOURNAL_STREAM`) it is JSON, after the priority that
the journal takes off: `<6>{"time": …, "level": "info", "logger": "pool.engine", "event": "model ready", …}`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

_ERRORS_KEPT = 20

# Of syslog(3), by the least severe level of logging that has it.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG_PRIORITY = 7

# Every answer to a prediction, one by one; off unless `access_log` is set.
ACCESS = "pool.requests"


class Log:
    """Where the events of one module go.

    Args:
        name: `pool.` and the module.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: Any) -> None:
        """Something for whoever looks closely."""
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Something happened as it should. Fields that are None are left out."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Something that may need looking at."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Something went wrong."""
        self._write(logging.ERROR, event, fields)

    def defect(self, event: str, **fields: Any) -> None:
        """An exception that nobody foresaw is being handled: its traceback is a field."""
        self._write(logging.ERROR, event, fields, has_traceback=True)

    @property
    def is_off(self) -> bool:
        """Whether it was switched off (`apply`)."""
        return self._logger.disabled

    def _write(self, level: int, event: str, fields: dict[str, Any], has_traceback: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            kept = {key: value for key, value in fields.items() if value is not None}
            self._logger.log(level, "%s", event, extra={"fields": kept}, exc_info=has_traceback)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of a record; a traceback is one."""
    fields: dict[str, Any] = dict(getattr(record, "fields", {}))
    if record.exc_info and record.exc_info[0] is not None:
        fields["traceback"] = logging.Formatter().formatException(record.exc_info)
    return fields


class TextFormatter(logging.Formatter):
    """`date level logger event key=value …`, whatever the values hold, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        words = [
            f"{when},{int(record.msecs):03d}",
            record.levelname,
            record.name,
            _one_line(record.getMessage()),
        ]
        words += [f"{key}={_shown(value)}" for key, value in _fields(record).items()]
        return " ".join(words)


class JournalFormatter(logging.Formatter):
    """`<priority>` and a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        document = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        document |= _fields(record)
        return f"<{_priority(record.levelno)}>{_json(document)}"


def _priority(level: int) -> int:
    for least, priority in _PRIORITIES:
        if level >= least:
            return priority
    return _DEBUG_PRIORITY


def _json(value: Any) -> str:
    """JSON on one line, with the letters of all languages unless there is something else besides."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isprintable() else json.dumps(value, default=str)


def _one_line(text: str) -> str:
    return text if text.isprintable() else _json(text)[1:-1]


def _shown(value: Any) -> str:
    """A value without blanks, or in quotes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    text = str(value)
    if text and text.isprintable() and not any(c in ' "=\\' for c in text):
        return text
    return _json(text)


class Recent(logging.Handler):
    """Keeps the last warnings and errors, for the status document."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[dict[str, Any]] = deque(maxlen=_ERRORS_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one, but not its traceback."""
        fields = {key: _shown(value) for key, value in getattr(record, "fields", {}).items()}
        self._kept.append(
            {
                "time_s": record.created,
                "level": record.levelname.lower(),
                "event": record.getMessage(),
                "fields": {key: text[:500] for key, text in fields.items()},
            }
        )

    def describe(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return list(self._kept)


def is_journal(environment: Mapping[str, str], stream: TextIO) -> bool:
    """Whether a stream is the one that systemd connected to the journal (systemd.exec(5))."""
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def start(environment: Mapping[str, str], front: int | None = None) -> Recent:
    """Have the process log to its standard error; once.

    Args:
        environment: Says whether that is the journal.
        front: The number of a front that follows another one, for each of its lines.

    Returns:
        What keeps the last warnings and errors.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JournalFormatter() if is_journal(environment, sys.stderr) else TextFormatter())
    recent = Recent()
    if front is not None:

        def mark(record: logging.LogRecord) -> bool:
            record.fields = {"front": front} | getattr(record, "fields", {})
            return True

        handler.addFilter(mark)
    logging.basicConfig(handlers=[handler, recent])
    return recent


def apply(level: str, has_access: bool) -> None:
    """Log from `level` on, and each answer or not; again after a reload."""
    logging.getLogger().setLevel(level.upper())
    access = logging.getLogger(ACCESS)
    access.setLevel(logging.INFO)  # asked for by itself, whatever the level of the others
    access.disabled = not has_access
