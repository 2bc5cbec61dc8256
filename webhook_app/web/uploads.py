"""Request bodies that are not here together with their head: collected without a thread, within limits.

Reception calls `arrived()` before it reads a body.  If the body is not here, `BodyAwaited` ends the call: the
worker's main loop collects the body into one buffer, and only then calls the application again.  So a slow
sender holds memory, which has a budget, and a seat, but never a thread.
"""

import io
import math
import re
import socket
import struct
import threading
from collections.abc import Iterable, Mapping
from fcntl import ioctl
from http import HTTPStatus
from termios import FIONREAD
from typing import Any

from gunicorn.http.body import LengthReader

from webhook_app.web.arrivals import COLLECTED_BYTES

BODY_SECONDS = 60.0
"""For a whole body, however large.  The platforms themselves give up after 10 s (Jenkins: 30 s)."""

GRACE_SECONDS = 10.0
LEAST_BYTES_PER_SECOND = 16 * 1024
"""A body is late if less than this has come on average since its head, after the grace."""

READ_BYTES = 256 * 1024
CHUNKED_READ_BYTES = 16 * 1024
"""Of a chunked body at a time: it may hold thousands of chunks, and the main loop has other work."""

MOST_LINE_BYTES = 4096
MOST_TRAILER_BYTES = 16 * 1024
FREE_CHUNKS = 10_000
LEAST_CHUNK_BYTES = 64
"""On average, of the chunks after the first `FREE_CHUNKS`: smaller ones cost more time than they carry."""

RETRY_AFTER_SECONDS = 5

_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}")


class BodyAwaited(Exception):
    """The body is not here yet; the worker collects it and then calls the application again."""


class BodyRefused(Exception):
    """A body that is not read to its end.  `status`, `detail` and `headers` of the answer."""

    def __init__(self, status: HTTPStatus, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


class Budget:
    """Bytes that a process may hold for requests that are not answered yet."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._taken = 0
        self._mutex = threading.Lock()

    def has_room(self, count: int) -> bool:
        """Is there room for so many bytes?"""
        return self._taken + count <= self.most

    def take(self, count: int) -> bool:
        """Take so many bytes; False: there is no room for them."""
        with self._mutex:
            taken = self.has_room(count)
            self._taken += count if taken else 0
        return taken

    def give_back(self, count: int) -> None:
        """Those bytes are free again."""
        with self._mutex:
            self._taken -= count


IN_FLIGHT = Budget(64 * 1024 * 1024)
"""That of this process; `most` is set from MAX_BYTES_IN_FLIGHT at the start."""


class Chunks:
    """A decoder of the chunked transfer coding (RFC 9112, section 7.1) that is fed as bytes come."""

    def __init__(self) -> None:
        self.done = False
        self._line = bytearray()
        self._on_line = self._on_size
        self._data_left = 0
        self._data_bytes = 0
        self._chunks = 0
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> tuple[list[bytes], bytes]:
        """The pieces of the body in `data`, and what follows after the body.  Raises `BodyRefused`."""
        pieces, at = [], 0
        while at < len(data) and not self.done:
            if self._data_left:
                piece = data[at : at + self._data_left]
                self._data_left -= len(piece)
                pieces.append(piece)
                at += len(piece)
            else:
                at = self._read_line(data, at)
        return pieces, data[at:]

    def _read_line(self, data: bytes, at: int) -> int:
        """Take a line, or the part of it that is here; gives the position behind it."""
        end = data.find(b"\n", at) + 1
        self._line += data[at : end or len(data)]
        if len(self._line) > MOST_LINE_BYTES:
            raise _broken("a line of its framing is too long")
        if end:
            line = bytes(self._line)
            self._line.clear()
            if not line.endswith(b"\r\n"):
                raise _broken("a line of its framing ends without CR")
            self._on_line(line[:-2])
        return end or len(data)

    def _on_size(self, line: bytes) -> None:
        size, extension, more = line.partition(b";")
        size = size.rstrip(b" \t") if extension else size
        if not _SIZE.fullmatch(size) or b"\r" in more:
            raise _broken("the size of a chunk is no number")
        self._data_left = int(size, 16)
        self._data_bytes += self._data_left
        self._chunks += 1
        if (self._chunks - FREE_CHUNKS) * LEAST_CHUNK_BYTES > self._data_bytes:
            raise _broken("its chunks are too small")
        self._on_line = self._on_end_of_data if self._data_left else self._on_trailer

    def _on_end_of_data(self, line: bytes) -> None:
        if line:
            raise _broken("a chunk is longer than its size")
        self._on_line = self._on_size

    def _on_trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line)
        if self._trailer_bytes > MOST_TRAILER_BYTES:
            raise _broken("its trailer is too long")
        self.done = not line


class Upload(io.BytesIO):
    """The body of one request: filled as it comes, then read as a file.

    `length` None: chunked.  `since`: when its request began, in monotonic seconds.  `must_continue`: its
    sender waits for `100 Continue`.
    """

    def __init__(self, request: Any, unreader: Any, length: int | None, since: float) -> None:
        super().__init__()
        self.length = length
        self.since = since
        self.must_continue: bool = request._expected_100_continue
        self.refusal: BodyRefused | None = None
        self.complete = False
        self._most: int | None = None
        self._size = 0
        self._chunks = Chunks() if length is None else None
        self._unreader = unreader
        self._request = request
        self._must_close = request.must_close
        request.must_close = True  # until it is complete nobody knows where the next request begins
        request._expected_100_continue = False  # gunicorn would answer it at once

    @property
    def failed(self) -> bool:
        """Asked by gunicorn before it takes another request from the connection."""
        return not self.complete

    @property
    def is_over(self) -> bool:
        """Is there nothing left to wait for?"""
        return self.complete or self.refusal is not None

    @property
    def next_bytes(self) -> int:
        """At most so many bytes are taken at a time."""
        left = READ_BYTES if self.length is None else self.length - self._size
        return min(left, READ_BYTES)

    @property
    def wake_bytes(self) -> int:
        """How many bytes should have come before somebody looks."""
        return 1 if self.length is None else max(1, self.next_bytes // 4)

    def need(self, most: int) -> None:
        """Return if the body is here and has at most `most` bytes; else `BodyRefused` or `BodyAwaited`."""
        self._most = most
        if self.length is not None and self.length > most:
            raise too_large(most)
        if IN_FLIGHT.has_room(self.next_bytes):  # else the worker makes some
            self.fill()
        if self.refusal is not None:
            raise self.refusal
        if not self.complete:
            raise BodyAwaited
        self.seek(0)

    def fill(self) -> None:
        """Take what has come, `READ_BYTES` at most (of a chunked body fewer); never waits."""
        if self.is_over:
            return
        try:
            self._feed(self._unreader.take_buffered())
            left = READ_BYTES if self.length is not None else 4 * CHUNKED_READ_BYTES
            while left > 0 and not self.is_over and (data := self._receive()) is not None:
                left -= len(data)
                self._feed(data)
                if not data and not self.is_over:
                    raise BodyRefused(HTTPStatus.BAD_REQUEST, "the body ends before its length")
        except BodyRefused as error:
            self.refuse(error)

    def refuse(self, error: BodyRefused) -> None:
        """Take no more of it, and forget what has come."""
        self.refusal = error
        self.release()

    def end_if_late(self, now: float) -> bool:
        """Refuse it with 408 if it comes too slowly."""
        if not self.is_over and now > self.since + BODY_SECONDS:
            self.refuse(_late(f"the body did not come within {BODY_SECONDS:.0f} s"))
        elif not self.is_over and now > self.since + GRACE_SECONDS + self._size / LEAST_BYTES_PER_SECOND:
            self.refuse(_late(f"the body comes with less than {LEAST_BYTES_PER_SECOND} bytes a second"))
        return self.refusal is not None

    def rank(self, now: float) -> tuple[float, float]:
        """The lowest of all gives way if there is no room: the slowest, or the newest in its first second."""
        seconds = now - self.since
        return self._size / seconds if seconds > 1 else math.inf, -self.since

    def release(self) -> None:
        """Its bytes are free for others."""
        IN_FLIGHT.give_back(self._size)
        self._size = 0
        self.seek(0)
        self.truncate()

    def _receive(self) -> bytes | None:
        """The next bytes; None if none have come."""
        most = CHUNKED_READ_BYTES if self.length is None else self.next_bytes
        try:
            return bytes(self._unreader.sock.recv(most, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return None
        except OSError as error:
            raise BodyRefused(HTTPStatus.BAD_REQUEST, f"the body can't be read: {error}") from None

    def _feed(self, data: bytes) -> None:
        if self._chunks is not None:
            pieces, rest = self._chunks.feed(data)
            complete = self._chunks.done
        else:
            assert self.length is not None
            missing = self.length - self._size
            pieces, rest, complete = [data[:missing]], data[missing:], len(data) >= missing
        self._keep(pieces)
        if complete:
            self._unreader.unread(rest)
            self._request.must_close = self._must_close
            self.complete = True

    def _keep(self, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            if self._most is not None and self._size + len(piece) > self._most:
                raise too_large(self._most)
            if not IN_FLIGHT.take(len(piece)):
                raise no_room()
            self._size += len(piece)
            self.write(piece)


def too_large(most: int) -> BodyRefused:
    """413, with what is allowed."""
    return BodyRefused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {most} bytes here")


def no_room() -> BodyRefused:
    """503: come again."""
    return BodyRefused(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "too many bytes are in flight, nothing was accepted",
        {"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def _broken(what: str) -> BodyRefused:
    return BodyRefused(HTTPStatus.BAD_REQUEST, f"the body can't be read: {what}")


def _late(what: str) -> BodyRefused:
    return BodyRefused(HTTPStatus.REQUEST_TIMEOUT, what)


def upload_of(request: Any, unreader: Any, since: float) -> Upload | None:
    """What collects the body of a request; None if it has none, or a small one that is here already."""
    if isinstance(request.body, Upload):
        return request.body
    reader = request.body.reader
    if not isinstance(reader, LengthReader):
        return Upload(request, unreader, None, since)
    length = reader.length
    if length == 0 or (length <= COLLECTED_BYTES and _is_here(unreader, length)):
        request._expected_100_continue = False
        return None
    return Upload(request, unreader, length, since)


def _is_here(unreader: Any, length: int) -> bool:
    """Have so many bytes come?"""
    held = len(unreader.buf.getvalue())
    if held < length:
        (waiting,) = struct.unpack("i", ioctl(unreader.sock, FIONREAD, b"\0" * 4))
        held += waiting
    return held >= length


def arrived(environ: Mapping[str, Any], most: int) -> None:
    """Return if the body of a request is here.  Raises `BodyRefused`, or `BodyAwaited` for the worker."""
    body = environ["wsgi.input"]
    if isinstance(body, Upload):
        body.need(most)


def is_awaited(environ: Mapping[str, Any]) -> bool:
    """Is the body of this request still under way, so that reading it costs memory and time?"""
    return isinstance(environ["wsgi.input"], Upload)
