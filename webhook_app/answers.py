"""Answers to deliveries: the status line decides, and what follows it is only for the log.

A receiver that has said `200` has taken the message, however it goes on: a wrong length, a header that
can't be read, a body that drips, a reset.  Sending it again would repeat what was done.  So nothing
after the status line is an error here.  It is read as far as it can be, and what was odd is noted.

Strict reading (answers of CI platforms, which must be whole) is `http.client`'s, in `outbound`.
Nothing here opens or closes a connection; the bytes come from a function.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

from webhook_app.destinations import OutboundError
from webhook_app.redaction import redactor

HEAD_BYTES = 64 * 1024
"""Of a header, of a status line, and of the line before a chunk."""

TARGET_LENGTH = 200
"""Characters of a redirect's target that are shown."""

TELLING_LENGTH = 10
"""A part of a callback's path that is so long may be its secret, as in the URLs of Slack."""

_STATUS_LINE = re.compile(rb"HTTP/(1\.[0-9]+|0\.9)[ \t]+([1-9][0-9]{2})(?=[ \t\r\n]|\Z)")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
_LINE_ENDS = (b"\r\n", b"\n")


class NoStatusLine(Exception):
    """What came is no answer of HTTP/1."""


class _Odd(Exception):
    """Here the reading ends; the text is for the log."""


@dataclass(slots=True)
class Answer:
    """One answer.  `odd`: what was wrong with it; `keep`: the connection can be used again."""

    status: int
    keep: bool
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    truncated: bool = False
    odd: list[str] = field(default_factory=list)

    @property
    def note(self) -> str | None:
        """What was odd, in one line; None: nothing."""
        return "; ".join(dict.fromkeys(self.odd)) or None


class _Incoming:
    """What comes in: bytes until the connection ends, in whatever way.  A `TimeoutError` passes through."""

    def __init__(self, receive: Callable[[], bytes]) -> None:
        self._receive = receive
        self._begun = False
        self.held = bytearray()
        self.end = ""

    def _more(self) -> bool:
        """Wait for bytes; False at the end.  An error before the first byte is the caller's to see."""
        try:
            piece = b"" if self.end else self._receive()
        except TimeoutError:
            raise
        except OSError:
            if not self._begun:
                raise
            piece, self.end = b"", "broke"
        self.held += piece
        self._begun = self._begun or bool(piece)
        self.end = self.end or ("" if piece else "was closed")
        return bool(piece)

    def line(self, most: int) -> bytes:
        """The next line with its end, or what there is when the connection ended; `_Odd`: it is too long."""
        seen = 0
        while (end := self.held.find(b"\n", seen)) < 0 and (seen := len(self.held)) <= most:
            if not self._more():
                return self._take(len(self.held))
        if not 0 <= end <= most:
            raise _Odd(f"a line or header of more than {HEAD_BYTES} bytes")
        return self._take(end + 1)

    def some(self, most: int) -> bytes:
        """At least one byte and at most so many; none at the end."""
        if not self.held:
            self._more()
        return self._take(most)

    def _take(self, count: int) -> bytes:
        taken = bytes(self.held[:count])
        del self.held[:count]
        return taken


def read(receive: Callable[[], bytes], on_status: Callable[[], None], most_bytes: int) -> Answer:
    """Read one answer; of its body at most `most_bytes`.

    `receive` gives bytes, none at the end.  `on_status` is called when the status line is there, because
    for the rest there is less time.  Until then `NoStatusLine` and the errors of `receive` come out.
    """
    incoming = _Incoming(receive)
    answer = _status(incoming)
    on_status()
    part = "header"
    try:
        _read_header(answer, incoming)
        part = "body"
        _read_body(answer, incoming, most_bytes)
    except _Odd as odd:
        answer.odd.append(str(odd))
    except TimeoutError:
        answer.odd.append(f"its {part} was not whole in time")
    except OutboundError:
        answer.odd.append(f"its {part} is too large")
    answer.keep = answer.keep and not (answer.odd or answer.truncated or incoming.end)
    return answer


# The status line


def _status(incoming: _Incoming) -> Answer:
    """The first status that is final; 1xx only announce one (RFC 9110 section 15.2)."""
    while True:
        version, status, whole = _status_line(incoming)
        if status >= 200:
            odd = [] if whole else [f"the connection {incoming.end} within the status line"]
            return Answer(status, keep=not version.startswith("0") and version != "1.0", odd=odd)
        if status == 101:
            raise NoStatusLine("it switched to a protocol nobody asked for")
        _skip_header(incoming)


def _status_line(incoming: _Incoming) -> tuple[str, int, bool]:
    """Version, status, and whether the line came whole."""
    try:
        line = incoming.line(HEAD_BYTES)
    except _Odd:
        raise NoStatusLine("it sent no status line") from None
    if not line:
        raise ConnectionAbortedError("closed without an answer")
    found, whole = _STATUS_LINE.match(line), line.endswith(b"\n")
    if found is None and not whole:
        raise ConnectionAbortedError("closed within the status line")
    if found is None:
        raise NoStatusLine("it sent no status line")
    return found[1].decode(), int(found[2]), whole


def _skip_header(incoming: _Incoming) -> None:
    while (line := _line_before_the_answer(incoming)) not in _LINE_ENDS:
        if not line.endswith(b"\n"):
            raise ConnectionAbortedError("closed before the answer")


def _line_before_the_answer(incoming: _Incoming) -> bytes:
    try:
        return incoming.line(HEAD_BYTES)
    except _Odd:
        raise NoStatusLine("it sent no status line") from None


# The header


def _read_header(answer: Answer, incoming: _Incoming) -> None:
    left = HEAD_BYTES
    while (line := incoming.line(left)) not in _LINE_ENDS:
        left -= len(line)
        if not line.endswith(b"\n"):
            raise _Odd(f"the connection {incoming.end} within the header")
        _add_header(answer, line)


def _add_header(answer: Answer, line: bytes) -> None:
    written, colon, rest = line.partition(b":")
    if not colon:
        answer.odd.append("a header line without a colon")
    elif not _NAME.fullmatch(written):
        answer.odd.append("a header with an impossible name")
    else:
        name, value = written.decode("ascii").lower(), rest.decode("latin-1").strip()
        answer.headers[name] = f"{answer.headers[name]}, {value}" if name in answer.headers else value


# The body


def _read_body(answer: Answer, incoming: _Incoming, most: int) -> None:
    connection = answer.headers.get("connection", "").lower()
    answer.keep = "close" not in connection and (answer.keep or "keep-alive" in connection)
    coding, length = answer.headers.get("transfer-encoding"), _length(answer)
    if answer.status in (204, 304):
        _expect_none(answer, coding, length)
    elif coding is not None:
        _read_coded(answer, incoming, coding, most)
    elif length is None:
        _read_to_the_end(answer, incoming, most)
    else:
        _read_so_many(answer, incoming, length, most)
    if incoming.held and not answer.truncated:
        answer.odd.append("bytes after its end")


def _length(answer: Answer) -> int | None:
    """The Content-Length; one that is given twice must be the same (RFC 9110 section 8.6)."""
    given = answer.headers.get("content-length")
    if given is None:
        return None
    values = {each.strip() for each in given.split(",")}
    if len(values) == 1 and _LENGTH.fullmatch(value := values.pop()):
        return int(value)
    answer.odd.append("a Content-Length that can't be read")
    return None


def _expect_none(answer: Answer, coding: str | None, length: int | None) -> None:
    if answer.status == 204 and (coding is not None or length):
        answer.odd.append("a 204 with a body")


def _read_coded(answer: Answer, incoming: _Incoming, coding: str, most: int) -> None:
    if "content-length" in answer.headers:
        answer.odd.append("both Transfer-Encoding and Content-Length")
    if coding.lower() == "chunked":
        _read_chunks(answer, incoming, most)
    else:
        answer.odd.append("a Transfer-Encoding that is not chunked")
        _read_to_the_end(answer, incoming, most)


def _read_so_many(answer: Answer, incoming: _Incoming, length: int, most: int) -> None:
    missing = _fill(answer, incoming, length, most)
    if missing:
        raise _Odd(f"the connection {incoming.end} {missing} bytes before the end of the body")


def _fill(answer: Answer, incoming: _Incoming, count: int, most: int) -> int:
    """Add so many bytes to the body, up to the most it may have; how many did not come."""
    until = min(len(answer.body) + count, most)
    answer.truncated = len(answer.body) + count > most
    while len(answer.body) < until and (piece := incoming.some(until - len(answer.body))):
        answer.body += piece
    return until - len(answer.body)


def _read_to_the_end(answer: Answer, incoming: _Incoming, most: int) -> None:
    answer.keep = False
    try:
        while not answer.truncated and (piece := incoming.some(most + 1 - len(answer.body))):
            answer.body += piece
            answer.truncated = len(answer.body) > most
    except TimeoutError:
        raise _Odd("no length, and the connection stayed open") from None
    finally:
        del answer.body[most:]
    if incoming.end == "broke":
        raise _Odd("the connection broke within the body")


def _read_chunks(answer: Answer, incoming: _Incoming, most: int) -> None:
    while size := _chunk_size(incoming):
        if _fill(answer, incoming, size, most):
            raise _Odd(f"the connection {incoming.end} within a chunk")
        if answer.truncated:
            return
        if _framing_line(incoming) not in _LINE_ENDS:
            raise _Odd("a chunk that is longer than its size")
    while _framing_line(incoming) not in _LINE_ENDS:
        pass  # trailers say nothing that matters here


def _chunk_size(incoming: _Incoming) -> int:
    found = _CHUNK.fullmatch(_framing_line(incoming))
    if found is None:
        raise _Odd("a chunk whose size can't be read")
    return int(found[1], 16)


def _framing_line(incoming: _Incoming) -> bytes:
    line = incoming.line(HEAD_BYTES)
    if not line.endswith(b"\n"):
        raise _Odd(f"the connection {incoming.end} before the last chunk")
    return line


# Redirects


def redirect_target(url: str, location: str, secrets: Iterable[str]) -> str:
    """Where a redirect leads, to be shown: without query and control characters, secrets masked, cut.

    `url` is what redirected; its long path segments and its query may be secrets, as `secrets` are.
    """
    shown = "".join(each for each in location if each.isprintable())
    try:
        parts, own = urlsplit(urljoin(url, shown)), urlsplit(url)
    except ValueError:
        return "an address that can't be read"
    telling = [each for each in own.path.split("/") if len(each) >= TELLING_LENGTH]
    target = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" + ("?…" if parts.query else "")
    return redactor([*telling, *secrets])(target)[:TARGET_LENGTH]
