"""Logs of CI jobs as we keep them: head and tail, clean text, no secrets; and the lines that tell an error.

`Keeper` takes a log of any size as it comes and holds only its two ends.  `text_of` makes lines of
them: the ends are cut at line ends first, cleaned of terminal codes next, and redacted last, each end
in one piece; so no secret shows because it was split between pieces, or by a colour.  Pure.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from webhook_app.redaction import Redactor

KEPT_BYTES = 1024 * 1024
"""What is kept of all logs of one attempt."""
HEAD_BYTES = 64 * 1024
LEAST_BYTES = 16 * 1024
MARGIN_BYTES = 8 * 1024
"""What is left out beside a cut that falls into an endless line: half a secret must not stay."""
LONGEST_LINE = 4000
LONGEST_ERROR = 500
MOST_ERROR_LINES = 3

_MARKS = re.compile(
    r"\x1b\[8mha:[^\x1b]*\x1b\[0m"  # hidden notes of Jenkins
    r"|section_(?:start|end):\d{1,12}:[^\r\n]{0,300}\r(?:\x1b\[0K)?"  # https://docs.gitlab.com/ci/jobs/job_logs/
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles and links of a terminal
    r"|\x1b[PX^_][^\x1b]*(?:\x1b\\)?"
    r"|[\x1b]\[[0-?]*[ -/]*[@-~]?|\x9b[0-?]*[ -/]*[@-~]?"  # colours, cursor
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_STAMP = re.compile(
    r"^[ \t]*(?:\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?Z(?: \d\d[OE][ +]?)?|"  # GitHub; GitLab since 17
    r"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?Z\]) ?"  # Jenkins' Timestamper
)


class Keeper:
    """Takes a log piece by piece (`write`) and keeps `head_bytes` and, of its end, `tail_bytes`."""

    def __init__(self, head_bytes: int, tail_bytes: int) -> None:
        self._head_bytes = head_bytes
        self._tail_bytes = tail_bytes
        self.head = bytearray()
        self._tail = bytearray()
        self.total = 0

    def write(self, piece: bytes) -> int:
        """Take a piece."""
        self.total += len(piece)
        room = self._head_bytes - len(self.head)
        self.head += piece[:room]
        self._tail += piece[max(room, 0) :][-self._tail_bytes :]
        if len(self._tail) > 2 * self._tail_bytes:
            del self._tail[: -self._tail_bytes]
        return len(piece)

    def skip(self, count: int) -> None:
        """Count bytes between what came and what comes, which were never read."""
        self.total += max(count, 0)

    @property
    def tail(self) -> bytes:
        """What is kept behind the head."""
        return bytes(self._tail[-self._tail_bytes :])

    @property
    def omitted(self) -> int:
        """Bytes between head and tail that were let go."""
        return self.total - len(self.head) - len(self.tail)


@dataclass(frozen=True, slots=True)
class Log:
    """The log of one attempt as it is kept: clean lines, and whether something was left out."""

    lines: tuple[str, ...] = ()
    truncated: bool = False


def shares(count: int) -> tuple[int, int]:
    """Bytes of head and tail that each of `count` logs may keep."""
    each = max(KEPT_BYTES // max(count, 1), LEAST_BYTES)
    head = min(HEAD_BYTES, each // 4)
    return head, each - head


def text_of(kept: Keeper, redact: Redactor) -> Log:
    """Head and tail as clean, redacted lines, with a line between them that says how much is not there."""
    if not kept.omitted:
        return Log(tuple(_lines(bytes(kept.head) + kept.tail, redact)))
    head, tail = _end_cut(bytes(kept.head)), _begin_cut(kept.tail)
    between = f"[… {kept.total - len(head) - len(tail)} bytes left out …]"
    return Log((*_lines(head, redact), between, *_lines(tail, redact)), truncated=True)


def joined(logs: Sequence[tuple[str, Log]]) -> Log:
    """Several logs as one; each under a line with its title, if there is more than one."""
    if len(logs) == 1:
        return logs[0][1]
    lines: list[str] = []
    for title, log in logs:
        lines += [f"=== {title} ===", *log.lines]
    return Log(tuple(lines), any(log.truncated for _, log in logs))


def pack(log: Log) -> bytes:
    """For the database; `unpack` takes it back."""
    return zlib.compress("\n".join(log.lines).encode(), 6)


def unpack(content: bytes) -> list[str]:
    """The lines of a packed log."""
    text = zlib.decompress(content).decode()
    return text.split("\n") if text else []


def _end_cut(head: bytes) -> bytes:
    """Without the line that was cut, or, if it is a very long one, without its last part."""
    at = head.rfind(b"\n", max(len(head) - 8 * MARGIN_BYTES, 0))
    return head[: at + 1] if at >= 0 else head[:-MARGIN_BYTES].rpartition(b" ")[0]


def _begin_cut(tail: bytes) -> bytes:
    at = tail.find(b"\n", 0, 8 * MARGIN_BYTES)
    return tail[at + 1 :] if at >= 0 else tail[MARGIN_BYTES:].partition(b" ")[2]


def _lines(raw: bytes, redact: Redactor) -> list[str]:
    """UTF-8 with what is none replaced, no terminal codes, no time stamps, no secrets."""
    text = _MARKS.sub("", raw.decode("utf-8", "replace")).replace("\r\n", "\n")
    shown = (_STAMP.sub("", _CONTROLS.sub("", _overwritten(line))) for line in text.split("\n"))
    lines = redact("\n".join(shown)).split("\n")
    while lines and not lines[-1]:
        lines.pop()
    return [line[:LONGEST_LINE] for line in lines]


def _overwritten(line: str) -> str:
    """What a terminal shows in the end of a line that was written several times, as progress bars do."""
    return next((part for part in reversed(line.split("\r")) if part), "")


# ---- errors --------------------------------------------------------------------------------------

_MARKED = re.compile(r"##\[error\](.+)|::error(?: [^:]*)?::(.+)")
_PLAIN = re.compile(
    r"(?:E {3,}\S|FAIL(?:ED|URE)?\b|ERROR\b|\[ERROR\]|(?:fatal|panic|Error|error)(?:\[\w{1,20}\])?:"
    r"|--- FAIL:|npm (?:ERR!|error) |make(?:\[\d+\])?: \*\*\*|Caused by:"
    r"|[A-Za-z_][\w.]{0,100}(?:Error|Exception|Failure)\b(?::|$)"
    r"|\S{1,200}:\d+(?::\d+)?: (?:fatal )?error\b)"
)
_SAYS_NOTHING = re.compile(
    r"process completed with exit code|script returned exit code|job failed: exit (?:code|status)"
    r"|^finished: |^(?:error|failure|fail|failed|errors?):?$|cleaning up|exited with code \d+\.?$",
    re.IGNORECASE,
)


def error_of(lines: Iterable[str]) -> str | None:
    """The last lines of a log that tell an error, in one short text; None if none does.

    A line that only says that a command failed counts if there is no better one.
    """
    found: list[str] = []
    weak: str | None = None
    for line in lines:
        told = _told(line)
        if told is None:
            continue
        if _SAYS_NOTHING.search(told):
            weak = told
        elif told not in found:
            found.append(told)
    return short("; ".join(found[-MOST_ERROR_LINES:])) if found else weak and short(weak)


def _told(line: str) -> str | None:
    marked = _MARKED.search(line)
    if marked:
        return (marked[1] or marked[2]).strip() or None
    text = line.strip()
    return text[:300] if _PLAIN.match(text) else None


def says_nothing(error: str) -> bool:
    """Is this only the news that a command failed?"""
    return bool(_SAYS_NOTHING.search(error))


def short(text: str) -> str:
    """At most `LONGEST_ERROR` characters of it."""
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 1] + "…"
