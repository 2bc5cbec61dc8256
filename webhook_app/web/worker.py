"""gunicorn's threaded worker, with no thread for slow senders and a deadline for slow readers.

gunicorn gives each new connection a thread, which waits for the first byte and then for all others.  Here
a request gets one when it is here: until then the kernel collects it (`SO_RCVLOWAT`: a socket is readable
when so many bytes have come), and the main loop looks at it without taking anything.

It also closes a connection in the main loop, and waits there up to 2 s for the other end to do so as well,
one after another.  Here it waits for all of them at once, beside its other work.

Its own errors are problem+json here.
"""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import orjson
from gunicorn import util
from gunicorn.workers.gthread import ThreadWorker

from webhook_app import deadline
from webhook_app.web.arrivals import ARRIVALS, COLLECTED_BYTES, wanted

COLLECTING_SECONDS = 10.0
"""From its first look at a connection on, for one request or what is collected of it."""

GLANCE_BYTES = 32 * 1024
"""Of a request whose length is not known yet; a buffer for more costs time of its own."""

LINGER_SECONDS = 2.0
"""How long a sender that was answered is read on: a connection closed before loses the answer."""

_close_graceful = util.close_graceful


class Worker(ThreadWorker):  # type: ignore[misc]
    """See the module."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.collecting: dict[Any, tuple[int, float]] = {}  # bytes asked for, until when (monotonic)
        self.lingering: dict[socket.socket, float] = {}  # until when

    def enqueue_req(self, conn: Any) -> None:
        """A connection is new or has something for us: give its request a thread, or wait for the rest."""
        self._look(conn, 0, time.monotonic() + COLLECTING_SECONDS)

    def _look(self, conn: Any, asked: int, until: float) -> None:
        """`asked`: for so many bytes the kernel was asked; if fewer woke us, no more come or have room."""
        most = min(max(2 * asked, GLANCE_BYTES), COLLECTED_BYTES)
        seen = None if _is_readable_only_by_gunicorn(conn) else _peek(conn.sock, most)
        if seen is None or len(seen) < asked or wanted(seen) <= len(seen):
            self._begin(conn, asked)
        else:
            self._collect(conn, wanted(seen), until)

    def _collect(self, conn: Any, count: int, until: float) -> None:
        try:
            conn.sock.setblocking(False)
            conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
        except OSError:
            self._begin(conn, count)
            return
        self.collecting[conn] = count, until
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._on_more, conn))

    def _on_more(self, conn: Any, _sock: Any) -> None:
        self._look(conn, *self._let_go(conn))

    def _let_go(self, conn: Any) -> tuple[int, float]:
        self.poller.unregister(conn.sock)
        return self.collecting.pop(conn)

    def _begin(self, conn: Any, asked: int) -> None:
        if asked > 1:
            with contextlib.suppress(OSError):  # a thread finds out what is wrong with it
                conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        conn.data_ready = True
        conn.waits_since = time.monotonic()
        super().enqueue_req(conn)

    def _linger(self, sock: socket.socket) -> None:
        """Say that nothing more comes from us, and hear the other end out."""
        if threading.current_thread() is not threading.main_thread():  # an answer that broke off
            _close_graceful(sock)
            return
        try:
            sock.shutdown(socket.SHUT_WR)
            sock.setblocking(False)
        except OSError:
            sock.close()
            return
        self.lingering[sock] = time.monotonic() + LINGER_SECONDS
        self.poller.register(sock, selectors.EVENT_READ, self._hear_out)

    def _hear_out(self, sock: Any) -> None:
        try:
            over = not sock.recv(COLLECTED_BYTES)
        except OSError as error:
            over = not isinstance(error, BlockingIOError)
        if over:
            self._hang_up(sock)

    def _hang_up(self, sock: socket.socket) -> None:
        del self.lingering[sock]
        self.poller.unregister(sock)
        sock.close()

    def murder_pending(self) -> None:
        """Once a second: what is late has come to its end, and gets the answer to that.

        So has, when we stop, a connection that said nothing yet.
        """
        super().murder_pending()
        now = time.monotonic()
        for sock in [sock for sock, until in self.lingering.items() if until < now]:
            self._hang_up(sock)
        for conn, (count, until) in list(self.collecting.items()):
            if until < now or (count == 1 and not self.alive):
                self._let_go(conn)
                ARRIVALS.came_late(conn.sock)
                with contextlib.suppress(OSError):  # it is closed already
                    conn.sock.shutdown(socket.SHUT_RD)
                self._begin(conn, count)

    def init_process(self) -> None:
        """In the new process, before the application is loaded."""
        util.write_error = _write_problem
        util.write = partial(_write_in_time, util.write)
        util.close_graceful = self._linger
        threading.Thread(target=ARRIVALS.watch, name="arrivals", daemon=True).start()
        super().init_process()

    def handle(self, conn: Any) -> Any:
        """One request of a connection."""
        sock = conn.sock
        deadline.note_wait(time.monotonic() - conn.waits_since)
        ARRIVALS.begin(sock)
        try:
            return super().handle(conn)
        finally:
            ARRIVALS.end(sock)


def _write_in_time(write: Callable[..., Any], sock: Any, data: bytes, chunked: bool = False) -> None:
    """Hand a part of an answer over, as gunicorn does, within the time for it."""
    before = ARRIVALS.leaves(sock, len(data))
    try:
        write(sock, data, chunked)
    finally:
        ARRIVALS.has_left(sock, before)


def _is_readable_only_by_gunicorn(conn: Any) -> bool:
    """Is what comes encrypted or framed, or was it read already?"""
    return bool(conn.cfg.is_ssl or conn.is_http2 or (conn.parser and conn.parser.unreader.buf.getvalue()))


def _peek(sock: socket.socket, most: int) -> bytes | None:
    """What has come, left where it is; None at the end of it."""
    try:
        return sock.recv(most, socket.MSG_PEEK | socket.MSG_DONTWAIT) or None
    except BlockingIOError:
        return b""
    except OSError:
        return None


def _write_problem(sock: Any, status: int, reason: str, detail: str) -> None:
    """What gunicorn says to a request that it refuses itself (RFC 9457)."""
    known = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else reason
    problem = {"type": "about:blank", "title": known, "status": status, "detail": detail[:500]}
    body = orjson.dumps(problem, option=orjson.OPT_APPEND_NEWLINE)
    head = (
        f"HTTP/1.1 {status} {known}\r\nConnection: close\r\n"
        f"Content-Type: application/problem+json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    util.write_nonblock(sock, head.encode("latin-1") + body)
