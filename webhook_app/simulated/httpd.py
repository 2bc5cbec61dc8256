"""A small HTTP/1.1 server on a free port of 127.0.0.1: one thread per connection, keep-alive, no log.

The standard library's handler spends most of its time on parsing headers into mail messages; a
demo that shares two cores with the program it shows cannot afford that.  It also must be able to
misbehave: to hang, and to drop a connection without a word.
"""

import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from io import BufferedIOBase
from typing import Any, Self
from urllib.parse import parse_qs

import orjson

HANG_SECONDS = 3600.0
"""Longer than any client waits; closing the server ends it at once."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: `path` and `query` as sent (still percent-encoded), header names in lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes

    def parameter(self, name: str, default: str = "") -> str:
        """The first value of a query parameter."""
        return parse_qs(self.query).get(name, [default])[0]


@dataclass(frozen=True, slots=True)
class Response:
    """An answer, or a refusal to answer.

    `delay_seconds` is waited first.  `drop`: close the connection without sending a byte.  `cut_after`: close
    it after so many bytes of the body, of which the headers promised more.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    drop: bool = False
    cut_after: int | None = None


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer, compact as the platforms send it."""
    return Response(
        status, orjson.dumps(content), {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
    )


def page(title: str, text: str) -> Response:
    """A web page for a person who follows a link of the dashboard."""
    body = f"<!DOCTYPE html><title>Simulated build</title><h1>{title}</h1><p>{text}"
    return Response(200, body.encode(), {"Content-Type": "text/html; charset=utf-8"})


def hang() -> Response:
    """Say nothing until the client gives up."""
    return Response(delay_seconds=HANG_SECONDS, drop=True)


def dropped() -> Response:
    """Close the connection without an answer."""
    return Response(drop=True)


class Server:
    """Serves `handle(request) -> Response` at `url` until it is closed; a context manager."""

    def __init__(self, handle: Callable[[Request], Response], port: int = 0) -> None:
        self._server = _Listener(handle, port)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.05},
            name="simulated-http",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening and cut every connection, also those that hang."""
        self._server.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_connections()
        self._thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, handle: Callable[[Request], Response], port: int) -> None:
        self.handle = handle
        self.closing = threading.Event()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Connection)

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)

    def cut_connections(self) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the client was faster

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news; a fault of the simulation itself is."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    server: _Listener

    def handle(self) -> None:
        self.server.opened(self.connection)
        try:
            while not self.server.closing.is_set() and self._exchange():
                pass
        finally:
            self.server.closed(self.connection)

    def _exchange(self) -> bool:
        """One request and its answer; False when the connection is to be closed."""
        request = _read_request(self.rfile, self.wfile)
        if request is None:
            return False
        response = self.server.handle(request)
        if response.delay_seconds and self.server.closing.wait(response.delay_seconds):
            return False
        if response.drop:
            return False
        encoded = _encode(response, request.method)
        if response.cut_after is not None:
            self.wfile.write(encoded[: len(encoded) - len(response.body) + response.cut_after])
            return False
        self.wfile.write(encoded)
        return request.headers.get("connection", "").lower() != "close"


def _read_request(stream: BufferedIOBase, answer: BufferedIOBase) -> Request | None:
    """The next request, or None at the end of the stream or where it isn't HTTP."""
    line = stream.readline(65536).decode("latin-1").split()
    if len(line) != 3:
        return None
    headers: dict[str, str] = {}
    while (header := stream.readline(65536)) not in (b"\r\n", b"\n", b""):
        name, _, value = header.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        answer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    length = headers.get("content-length", "0")
    if not length.isdigit():
        return None
    body = stream.read(int(length))
    path, _, query = line[1].partition("?")
    return Request(line[0], path, query, headers, body) if len(body) == int(length) else None


def _encode(response: Response, method: str) -> bytes:
    status = response.status
    reason = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Unknown"
    headers = {"Date": formatdate(usegmt=True), **response.headers}
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items())]
    if status not in (204, 304):
        lines.append(f"Content-Length: {len(response.body)}")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    return head if method == "HEAD" or status in (204, 304) else head + response.body
