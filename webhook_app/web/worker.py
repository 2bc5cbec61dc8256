"""gunicorn's threaded worker, with deadlines for slow senders and readers, and its errors as problem+json."""

import functools
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import orjson
from gunicorn import util
from gunicorn.workers.gthread import ThreadWorker

from webhook_app.web.arrivals import ARRIVALS


class Worker(ThreadWorker):  # type: ignore[misc]
    """See the module."""

    def init_process(self) -> None:
        """In the new process, before the application is loaded."""
        util.write_error = _write_problem
        util.write = functools.partial(_write_in_time, util.write)
        threading.Thread(target=ARRIVALS.watch, name="arrivals", daemon=True).start()
        super().init_process()

    def handle(self, conn: Any) -> Any:
        """One request of a connection."""
        sock = conn.sock
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


def _write_problem(sock: Any, status: int, reason: str, detail: str) -> None:
    """What gunicorn says to a request that it refuses itself (RFC 9457)."""
    known = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else reason
    body = orjson.dumps({"type": "about:blank", "title": known, "status": status, "detail": detail[:500]})
    head = (
        f"HTTP/1.1 {status} {known}\r\nConnection: close\r\n"
        f"Content-Type: application/problem+json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    util.write_nonblock(sock, head.encode("latin-1") + body)
