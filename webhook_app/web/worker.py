"""gunicorn's threaded worker, with no thread for slow senders and a deadline for slow readers.

gunicorn gives each new connection a thread, which waits for the first byte and then for all others.  Here
a request gets one when it is here: until then the kernel collects it (`SO_RCVLOWAT`: a socket is readable
when so many bytes have come), and the main loop looks at it without taking anything.  Of a request whose
body is large, chunked or announced by `Expect: 100-continue` a thread reads the head; if the application
wants the body, the main loop collects it (`uploads`), and then a thread goes on.  What a thread reads has
always come before: `_PromptUnreader` never waits.

An answer that its reader takes slowly holds no thread either: what the kernel has no room for is sent by the
main loop, and the next request of that connection waits for it.

When seats run out (`worker_connections`), the connection that has waited longest is dropped for a new one.

It also closes a connection in the main loop, and waits there up to 2 s for the other end to do so as well,
one after another.  Here it waits for all of them at once, beside its other work.

Its own errors are problem+json here.
"""

import ctypes
import errno
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import orjson
from gunicorn import http, util
from gunicorn.http.errors import NoMoreData
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers.gthread import ThreadWorker

from webhook_app import deadline
from webhook_app.web.arrivals import ARRIVALS, COLLECTED_BYTES, PIECE_BYTES, PIECE_SECONDS, wanted
from webhook_app.web.uploads import IN_FLIGHT, READ_BYTES, BodyAwaited, Budget, Upload, no_room, upload_of

COLLECTING_SECONDS = 10.0
"""From its first look at a connection on, for a head, or for what the kernel collects of a body."""

GLANCE_BYTES = 32 * 1024
"""Of a request whose length is not known yet; a buffer for more costs time of its own."""

LINGER_SECONDS = 2.0
"""How long a sender that was answered is read on: a connection closed before loses the answer."""

SWEEP_SECONDS = 0.25
"""Between two looks for what is late."""

MOST_LEAVING_BYTES = 1024 * 1024
"""Of one answer; a longer one (a download) is written by its thread, as fast as it is read."""

SPARE_FILES = 128
MOST_FILES = 65_536
"""File descriptors: so many are kept for other things than connections; no more are asked for."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_close_graceful = util.close_graceful
ANSWERS = Budget(16 * 1024 * 1024)
"""What answers that are not read may hold: bytes of their own, so they take none from pushes."""
_scratch = bytearray(READ_BYTES)


class _PromptUnreader(SocketUnreader):  # type: ignore[misc]
    """What gunicorn's parser reads from: what has come, without waiting for more."""

    def chunk(self, size_hint: int | None = None) -> bytes:
        """The next piece; `NoMoreData` if none is here."""
        size = max(self.mxchunk, min(size_hint or 0, self.max_body_chunk))
        try:
            return bytes(self.sock.recv(size, socket.MSG_DONTWAIT))
        except BlockingIOError:
            raise NoMoreData from None


class Worker(ThreadWorker):  # type: ignore[misc]
    """See the module.  A dictionary by connection is in the order in which they began to wait."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.is_plain = not self.cfg.is_ssl and self.cfg.http2_cleartext == "off"
        self.collecting: dict[Any, int] = {}  # bytes that the kernel was asked for
        self.awaited: dict[Any, Upload] = {}  # left by a thread that wants the body
        self.uploads: dict[Any, Upload] = {}
        self.unsent: dict[socket.socket, bytes] = {}  # the rest of an answer
        self.leaving: dict[Any, tuple[Any, float]] = {}  # what its thread gave, until when
        self.lingering: dict[socket.socket, float] = {}  # until when
        self.most_lingering = 500
        self.next_sweep = 0.0

    def accept(self, listener: Any) -> None:
        """Take a new connection, at the cost of the one that has waited longest if there are too many."""
        try:
            super().accept(listener)
        except OSError as error:
            if error.errno not in _NO_FILES:
                raise
            if not self._drop_oldest():
                time.sleep(0.01)  # all of them are being answered
        while self.nr_conns >= self.worker_connections and self._drop_oldest():
            pass

    def enqueue_req(self, conn: Any) -> None:
        """A connection is new or has something for us: give its request a thread, or wait for the rest."""
        conn.since, conn.waited = time.monotonic(), 0.0
        self._look(conn, 0)

    def _look(self, conn: Any, asked: int) -> None:
        """`asked`: for so many bytes the kernel was asked; if fewer woke us, no more come or have room."""
        most = min(max(2 * asked, GLANCE_BYTES), 2 * COLLECTED_BYTES)
        seen = _peek(conn.sock, most) if self.is_plain else None
        if seen is None or len(seen) < asked:
            self._begin(conn)
            return
        ahead = conn.parser.unreader.buf.getvalue() if conn.parser else b""
        count = wanted(ahead + seen) - len(ahead)
        if count <= len(seen):
            self._begin(conn)
        else:
            self._collect(conn, count)

    def _collect(self, conn: Any, count: int) -> None:
        """Wait until so many bytes of a request have come, if they do within the time for it."""
        if not _wake_at(conn.sock, count):
            self._begin(conn)
            return
        if conn not in self.collecting:
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._on_more, conn))
        self.collecting[conn] = count

    def _on_more(self, conn: Any, _sock: Any) -> None:
        if conn in self.collecting:  # it may have been dropped since
            self._look(conn, self.collecting[conn])

    def on_client_socket_readable(self, conn: Any, client: Any) -> None:
        """A kept connection has another request, unless it was dropped since."""
        if client.fileno() >= 0:
            super().on_client_socket_readable(conn, client)

    def _begin(self, conn: Any) -> None:
        if self.collecting.pop(conn, None) is not None:
            self.poller.unregister(conn.sock)
            _wake_at(conn.sock, 1)
        conn.data_ready = True
        self._start(self.handle, conn)

    def _start(self, work: Callable[[Any], Any], conn: Any) -> None:
        done = self.tpool.submit(self._in_time, work, conn, time.monotonic())
        done.add_done_callback(lambda it: self.method_queue.defer(self.finish_request, conn, it))

    @staticmethod
    def _in_time(work: Callable[[Any], Any], conn: Any, since: float) -> Any:
        """In a thread: what it has waited for one counts against the time for its answer."""
        conn.waited += time.monotonic() - since
        deadline.note_wait(conn.waited)
        return work(conn)

    def handle(self, conn: Any) -> Any:
        """One request of a connection, in a thread."""
        if self.is_plain and conn.parser is None:
            conn.parser = http.get_parser(self.cfg, conn.sock, conn.client)
            conn.parser.unreader = _PromptUnreader(conn.sock)
        return super().handle(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer it; if its body has to be awaited first, leave that to the main loop."""
        upload = upload_of(req, conn.parser.unreader, conn.since) if self.is_plain else None
        if upload is None:
            return super().handle_request(req, conn)
        req.body = upload
        try:
            return super().handle_request(req, conn)
        except BodyAwaited:
            self.awaited[conn] = upload
            return False
        finally:
            if conn not in self.awaited:
                upload.release()

    def finish_request(self, conn: Any, fs: Any) -> None:
        """A thread is done with a connection."""
        upload = self.awaited.pop(conn, None)
        if upload is not None:
            self._collect_body(conn, upload)
        elif conn.sock in self.unsent:
            self._send_later(conn, fs)
        elif conn.sock.fileno() < 0:  # closed after a fault: gunicorn would count it as gone twice
            self.nr_conns -= 1
        else:
            super().finish_request(conn, fs)

    def _send(self, write: Callable[..., Any], sock: Any, data: bytes, chunked: bool = False) -> None:
        """Hand a part of an answer over, without waiting if its rest can be sent later."""
        if not self.is_plain or threading.current_thread() is threading.main_thread():
            write(sock, data, chunked)
            return
        rest = b"%X\r\n%s\r\n" % (len(data), data) if chunked else data
        if sock in self.unsent:
            rest = self._take_unsent(sock) + rest
        rest = rest[_send_now(sock, rest) :]
        if not rest:
            return
        if len(rest) <= MOST_LEAVING_BYTES and ANSWERS.take(len(rest)):
            self.unsent[sock] = rest
        elif len(rest) <= MOST_LEAVING_BYTES:
            raise BrokenPipeError(errno.EPIPE, "too many answers are not read")
        else:
            _write_in_time(write, sock, rest)

    def _take_unsent(self, sock: Any) -> bytes:
        rest = self.unsent.pop(sock, b"")
        ANSWERS.give_back(len(rest))
        return rest

    def _send_later(self, conn: Any, fs: Any) -> None:
        pieces = 1 + len(self.unsent[conn.sock]) // PIECE_BYTES
        try:
            conn.sock.setblocking(False)
        except OSError:  # the answer broke off
            self._take_unsent(conn.sock)
            self._give_up(conn)
            return
        self.leaving[conn] = fs, time.monotonic() + PIECE_SECONDS * pieces
        self.poller.register(conn.sock, selectors.EVENT_WRITE, partial(self._on_room, conn))

    def _on_room(self, conn: Any, _sock: Any) -> None:
        """There is room for more of an answer."""
        if conn not in self.leaving:  # dropped since
            return
        try:
            sent = _send_now(conn.sock, self.unsent[conn.sock])
        except OSError:
            self._leave_answer(conn)
            self._give_up(conn)
            return
        ANSWERS.give_back(sent)
        self.unsent[conn.sock] = self.unsent[conn.sock][sent:]
        if not self.unsent[conn.sock]:
            super().finish_request(conn, self._leave_answer(conn))

    def _leave_answer(self, conn: Any) -> Any:
        self.poller.unregister(conn.sock)
        self._take_unsent(conn.sock)
        return self.leaving.pop(conn)[0]

    def _collect_body(self, conn: Any, upload: Upload) -> None:
        try:
            conn.sock.setblocking(False)
            if upload.must_continue and conn.sock.send(_CONTINUE) < len(_CONTINUE):
                raise BlockingIOError  # it reads nothing of what we say
        except OSError:
            upload.release()
            self._give_up(conn)
            return
        upload.must_continue = False
        self.uploads[conn] = upload
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._on_body, conn))
        _wake_at(conn.sock, upload.wake_bytes)

    def _on_body(self, conn: Any, _sock: Any = None) -> None:
        """More of a body has come, or its time is over."""
        upload = self.uploads.get(conn)
        if upload is None:  # it had to make room since
            return
        now = time.monotonic()
        self._make_room(upload, now)
        upload.fill()
        if upload.is_over or upload.end_if_late(now):
            self._end_body(conn)
        else:
            _wake_at(conn.sock, upload.wake_bytes)

    def _make_room(self, upload: Upload, now: float) -> None:
        """If memory runs out, refuse what gives way first (see `Upload.rank`), `upload` itself included."""
        while not IN_FLIGHT.has_room(upload.next_bytes):
            conn, first = min(self.uploads.items(), key=lambda item: item[1].rank(now))
            first.refuse(no_room())
            if first is upload:
                return
            self._end_body(conn)

    def _end_body(self, conn: Any) -> None:
        """Nothing more is to come: a thread answers."""
        self._leave_body(conn)
        self._start(self._answer_body, conn)

    def _leave_body(self, conn: Any) -> Upload:
        self.poller.unregister(conn.sock)
        _wake_at(conn.sock, 1)
        return self.uploads.pop(conn)

    def _answer_body(self, conn: Any) -> Any:
        """Answer a request whose body was awaited, in a thread; what `handle` gives."""
        req = conn.parser.mesg
        try:
            conn.sock.setblocking(True)
            return self._keepalive_after(conn, self.handle_request(req, conn))
        except (OSError, StopIteration) as error:  # it hung up
            self.log.debug("Closing connection. %s", error)
        except Exception as error:  # noqa: BLE001  as gunicorn does
            self.handle_error(req, conn.sock, conn.client, error)
        return False

    def _give_up(self, conn: Any) -> None:
        """Close a connection that has waited, without a word."""
        self.nr_conns -= 1
        conn.close()

    def _drop_oldest(self) -> bool:
        """Drop what has waited longest: for a request, a body, its reader or the next request."""
        waiting: list[tuple[float, Any]] = [
            (c.since, c) for c in self._first(self.collecting, self.uploads, self.leaving)
        ]
        if self.keepalived_conns:
            kept = self.keepalived_conns[0]
            waiting.append((kept.timeout - self.cfg.keepalive, kept))
        if not waiting:
            return False
        _, conn = min(waiting, key=lambda pair: pair[0])
        if conn in self.uploads:
            self._leave_body(conn).release()
        elif conn in self.leaving:
            self._leave_answer(conn)
        else:
            self.poller.unregister(conn.sock)
            if self.collecting.pop(conn, None) is None:
                self.keepalived_conns.popleft()
        self._give_up(conn)
        return True

    @staticmethod
    def _first(*waiting: dict[Any, Any]) -> list[Any]:
        return [next(iter(conns)) for conns in waiting if conns]

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
        while len(self.lingering) >= self.most_lingering:
            self._hang_up(next(iter(self.lingering)))
        self.lingering[sock] = time.monotonic() + LINGER_SECONDS
        self.poller.register(sock, selectors.EVENT_READ, self._hear_out)

    def _hear_out(self, sock: Any) -> None:
        try:
            over = not sock.recv_into(_scratch, 0, socket.MSG_TRUNC)  # drops them unread
        except OSError as error:
            over = not isinstance(error, BlockingIOError)
        if over:
            self._hang_up(sock)

    def _hang_up(self, sock: socket.socket) -> None:
        if self.lingering.pop(sock, None) is not None:
            self.poller.unregister(sock)
            sock.close()

    def murder_pending(self) -> None:
        """Now and then: what is late has come to its end, and gets the answer to that.

        So has, when we stop, a connection that said nothing yet.
        """
        now = time.monotonic()
        if now < self.next_sweep:
            return
        self.next_sweep = now + SWEEP_SECONDS
        super().murder_pending()
        # All seats may have been in threads when we stopped accepting, and be idle by now.
        while self.nr_conns >= self.worker_connections and self._drop_oldest():
            pass
        for sock in [sock for sock, until in self.lingering.items() if until < now]:
            self._hang_up(sock)
        for conn, count in list(self.collecting.items()):
            if conn.since + COLLECTING_SECONDS < now or (count == 1 and not self.alive):
                self._begin(conn)
        for conn in list(self.uploads):
            self._on_body(conn)
        for conn in [conn for conn, (_, until) in self.leaving.items() if until < now]:
            self._leave_answer(conn)
            self._give_up(conn)

    def init_process(self) -> None:
        """In the new process, before the application is loaded."""
        util.write_error = _write_problem
        util.write = partial(self._send, util.write)
        util.close_graceful = self._linger
        threading.Thread(target=ARRIVALS.watch, name="arrivals", daemon=True).start()
        _give_memory_back()
        room = _files() - SPARE_FILES
        self.worker_connections = min(self.cfg.worker_connections, max(room * 3 // 4, self.cfg.threads + 1))
        self.max_keepalived = self.worker_connections - self.cfg.threads
        self.most_lingering = min(self.most_lingering, max(room // 4, 1))
        super().init_process()


def _give_memory_back() -> None:
    """Have glibc return large buffers to the system when they are freed.

    Once a larger one was freed it would keep those of up to that size, and in each thread's arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 256 * 1024)


_MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of malloc.h."""


def _send_now(sock: Any, data: bytes) -> int:
    """How many bytes the kernel took."""
    try:
        return int(sock.send(data, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return 0


def _write_in_time(write: Callable[..., Any], sock: Any, data: bytes) -> None:
    """Hand a part of an answer over, as gunicorn does, within the time for it."""
    ARRIVALS.leaves(sock, len(data))
    try:
        write(sock, data)
    finally:
        ARRIVALS.has_left(sock)


def _wake_at(sock: socket.socket, count: int) -> bool:
    """Call it readable when so many bytes have come; False if it is no longer there."""
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
    except OSError:
        return False
    return True


def _files() -> int:
    """How many file descriptors we may have, after asking for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


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
