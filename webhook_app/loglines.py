"""The lines of our log: `logfmt` or JSON, one line per record, each with `time` and `level`.

`event()` writes one unit of work (a push, a delivery attempt, a round of polling, a notice) with the ids
that join it to others.  Every value is escaped, so that nothing from outside can begin a line of its own.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, TextIO

from webhook_app.redaction import SHAPES, Redactor

FORMATS = ("logfmt", "json")
LONGEST_VALUE = 4_000
"""Characters of one value; tracebacks of a deep recursion are longer than any collector takes."""

_PLAIN = re.compile(r'[^\s"=\\\x00-\x1f\x7f-\xa0\u2028\u2029\ud800-\udfff]+')
_UNPRINTABLE = re.compile(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def event(log: logging.Logger, name: str, **fields: object) -> None:
    """One line `event=NAME` with these fields; those that are None are left out."""
    if log.isEnabledFor(logging.INFO):
        log.info(name, extra={"fields": fields})


def warning(log: logging.Logger, name: str, **fields: object) -> None:
    """The same for a unit of work that went wrong."""
    log.warning(name, extra={"fields": fields})


def setup(format_: str, level: str, redact: Redactor = SHAPES) -> None:
    """Write all records of this process to its standard error in this format, faults that end it included.

    `redact`: what masks secrets in messages and traces; fields of events are masked where they enter.
    """
    handler = _StandardError()
    handler.setFormatter(Formatter(format_, redact))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # No line shows them, and each push would pay for them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.getLogger("rq").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    sys.excepthook = _log_fault


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what is standard error at the moment, not to what it was."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _log_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger(__name__).critical("a fault ends this process", exc_info=(kind, error, trace))


class Formatter(logging.Formatter):
    """Records as lines of `logfmt` or `json`."""

    def __init__(self, format_: str, redact: Redactor = SHAPES) -> None:
        super().__init__()
        self._redact = redact.name
        self._write: Callable[[Iterable[tuple[str, object]]], str] = _WRITERS[format_]

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return self._write(self._pairs(record))

    def _pairs(self, record: logging.LogRecord) -> Iterable[tuple[str, object]]:
        yield "time", _time(record.created)
        yield "level", record.levelname.lower()
        fields: Mapping[str, object] | None = getattr(record, "fields", None)
        if fields is None:
            yield "logger", record.name
            yield "msg", self._redact(record.getMessage())
        else:
            yield "event", record.msg
            yield from fields.items()
        if record.exc_info:
            yield "trace", self._redact(self.formatException(record.exc_info))


def line(format_: str, text: str, level: str = "warning") -> str:
    """A line about a process that writes none itself."""
    return _WRITERS[format_]([("time", _time(time.time())), ("level", level), ("msg", text)])


def _time(at: float) -> str:
    """`2026-11-01T10:00:00.123Z`"""
    milliseconds = int(at * 1000)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{whole}.{milliseconds % 1000:03d}Z"


def _logfmt(pairs: Iterable[tuple[str, object]]) -> str:
    return " ".join([f"{name}={_logfmt_value(value)}" for name, value in pairs if value is not None])


def _logfmt_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    if len(text) <= LONGEST_VALUE and _PLAIN.fullmatch(text):
        return text
    return _escaped(json.dumps(_cut(text), ensure_ascii=False))


def _json(pairs: Iterable[tuple[str, object]]) -> str:
    content = {name: _json_value(value) for name, value in pairs if value is not None}
    return _escaped(json.dumps(content, ensure_ascii=False))


def _json_value(value: object) -> Any:
    return value if isinstance(value, bool | int | float) else _cut(str(value))


def _cut(text: str) -> str:
    """The end of a long text: that of a traceback says what went wrong."""
    return text if len(text) <= LONGEST_VALUE else "…" + text[-LONGEST_VALUE:]


def _escaped(quoted: str) -> str:
    r"""What JSON lets stand in a string and a terminal or a collector does not, as `\uXXXX`."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)


_WRITERS: dict[str, Callable[[Iterable[tuple[str, object]]], str]] = {"logfmt": _logfmt, "json": _json}
