"""A server whose every byte the test decides, names that the test resolves, and requests to them."""

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import pytest

from webhook_app.destinations import OutboundError
from webhook_app.outbound import Reply, send

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
WEBHOOK = {"webhook-id": "msg_1"}
REASONS = {
    "address_refused", "bad_header", "bad_url", "connect", "disconnected", "dns", "protocol", "timeout",
    "tls", "too_large",
}  # fmt: skip


@dataclass
class Asked:
    """One request as it came over the wire."""

    line: str
    headers: dict[str, str]
    body: bytes
    raw_head: bytes
    connection: int


@dataclass
class Server:
    port: int
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"


class Connection:
    """The server's side of one connection."""

    def __init__(self, sock: socket.socket, server: Server, index: int) -> None:
        self.sock, self.server, self.index = sock, server, index
        self._buffer = b""

    def read_request(self) -> Asked | None:
        """The next request, or None when the client is gone."""
        while b"\r\n\r\n" not in self._buffer:
            if not self._more():
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
        length = int(headers.get("content-length", "0"))
        while len(self._buffer) < length:
            if not self._more():
                return None
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        asked = Asked(line, headers, body, head, self.index)
        self.server.asked.append(asked)
        return asked

    def _more(self) -> bool:
        piece = self.sock.recv(65536)
        self._buffer += piece
        return bool(piece)

    def say(self, data: bytes) -> None:
        self.sock.sendall(data)

    def gone(self, seconds: float) -> bool:
        """Wait until the client has closed its side."""
        readable, _, _ = select.select([self.sock], [], [], seconds)
        return bool(readable)


Handler = Callable[[Connection], None]


class Listener:
    """Accepts on a loopback port and gives each connection to the handler in a thread of its own."""

    def __init__(self, handler: Handler, context: ssl.SSLContext | None) -> None:
        self._handler, self._context = handler, context
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.server = Server(self._listening.getsockname()[1])
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            self._open.append(sock)
            self.server.connections += 1
            self._start(self._serve, sock, self.server.connections - 1)

    def _serve(self, sock: socket.socket, index: int) -> None:
        try:
            # A ValueError is a socket that `stop` has closed meanwhile.
            with suppress(OSError, ValueError), ExitStack() as stack:
                sock.settimeout(60)
                if self._context is not None:
                    sock = stack.enter_context(self._context.wrap_socket(sock, server_side=True))
                self._handler(Connection(sock, self.server, index))
        finally:
            sock.close()

    def stop(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for sock in list(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in list(self._threads):
            thread.join(60)
            assert not thread.is_alive()


def answering(*answers: bytes) -> Handler:
    """A handler that gives these answers in turn on a connection, the last one for ever."""

    def handle(connection: Connection) -> None:
        count = 0
        while connection.read_request() is not None:
            connection.say(answers[min(count, len(answers) - 1)])
            count += 1

    return handle


def once(answer: bytes) -> Handler:
    """A handler that answers one request and closes."""

    def handle(connection: Connection) -> None:
        connection.read_request()
        connection.say(answer)

    return handle


def post(url: str, body: bytes = b"{}", **options) -> Reply:
    settings = {"timeout_seconds": 60.0, "byte_cap": 16384, "guard": False, **options}
    return send("POST", url, settings.pop("headers", WEBHOOK), body, **settings)


def get(url: str, **options) -> Reply:
    settings = {"timeout_seconds": 60.0, "byte_cap": 16384, "guard": False, **options}
    return send("GET", url, settings.pop("headers", {}), **settings)


def resolving(**addresses: str | list[str]) -> Callable[..., list]:
    """A resolver that knows `name_test=...` as `name.test`, and what it was asked (`resolver.asked`)."""
    table = {name.replace("_", "."): value for name, value in addresses.items()}

    def resolve(host, port, family=0, kind=0):
        resolve.asked.append(host)
        if host not in table:
            raise socket.gaierror(socket.EAI_NONAME, "unknown name")
        found = [table[host]] if isinstance(table[host], str) else table[host]
        return [row(each, port) for each in found]

    resolve.asked = []
    return resolve


def row(address: str, port: int) -> tuple:
    if ":" in address:
        return (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))


def failing(caller: Callable[[], object]) -> OutboundError:
    with pytest.raises(OutboundError) as caught:
        caller()
    assert caught.value.reason in REASONS
    return caught.value


def timed_out(caller: Callable[[], object], reason: str = "timeout") -> None:
    """At its own deadline, of a fraction of a second, and not when the server gives up after a minute."""
    started = time.monotonic()
    error = failing(caller)
    assert (error.reason, error.permanent) == (reason, False)
    assert time.monotonic() - started < 30


def dripping(prefix: bytes, drop: bytes) -> Handler:
    """Sends a drop every 50 ms until the client has had enough: no single wait is ever long."""

    def handle(connection: Connection) -> None:
        connection.read_request()
        connection.say(prefix)
        while not connection.gone(0.05):
            connection.say(drop)

    return handle


def redirecting(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 5\r\n\r\nmoved".encode(
        "latin-1"
    )
