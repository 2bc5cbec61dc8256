"""The outgoing door, held against real sockets: slow, dripping, endless, lying and vanishing servers.

Nothing here leaves the loopback interface.  Names are resolved by a function of the test.
"""

import base64
import datetime
import errno
import io
import ipaddress
import os
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from webhook_app import outbound
from webhook_app.destinations import OutboundError, check_callback_url, check_headers, parse
from webhook_app.outbound import Reply, send

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
WEBHOOK = {"webhook-id": "msg_1"}
REASONS = {
    "address_refused", "bad_header", "bad_url", "connect", "disconnected", "dns", "protocol", "timeout",
    "tls", "too_large",
}  # fmt: skip

# A server whose every byte the test decides


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
            with suppress(OSError), ExitStack() as stack:
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


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    listeners: list[Listener] = []

    def start(handler: Handler, context: ssl.SSLContext | None = None) -> Server:
        listeners.append(Listener(handler, context))
        return listeners[-1].server

    yield start
    outbound.close_idle()
    for listener in listeners:
        listener.stop()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in (
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
            "SSL_CERT_FILE",
        ):
            monkeypatch.delenv(name)
    outbound.close_idle()
    yield
    outbound.close_idle()


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
        return [_row(each, port) for each in found]

    resolve.asked = []
    return resolve


def _row(address: str, port: int) -> tuple:
    if ":" in address:
        return (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))


def failing(caller: Callable[[], object]) -> OutboundError:
    with pytest.raises(OutboundError) as caught:
        caller()
    assert caught.value.reason in REASONS
    return caught.value


# One request and its answer


def test_a_post_arrives_whole_and_its_answer_comes_back(serve):
    server = serve(
        answering(b"HTTP/1.1 201 Created\r\nX-One: a\r\nx-one: b\r\nContent-Length: 5\r\n\r\nhello")
    )
    reply = post(server.url + "?a=b%20c", b'{"n":1}', headers={**WEBHOOK, "X-Mine": "caf\xe9"})
    assert (reply.status, reply.body, reply.truncated) == (201, b"hello", False)
    assert reply.headers["x-one"] == "a, b"
    assert 0 < reply.duration_seconds < 5
    (asked,) = server.asked
    assert asked.line == "POST /hook?a=b%20c HTTP/1.1"
    assert asked.body == b'{"n":1}'
    assert asked.headers["host"] == f"127.0.0.1:{server.port}"
    assert asked.headers["content-length"] == "7"
    assert asked.headers["accept-encoding"] == "identity"
    assert asked.headers["x-mine"] == "caf\xe9"


def test_a_get_sends_no_body_and_an_empty_post_says_so(serve):
    server = serve(answering(OK))
    get(server.url)
    post(server.url, b"")
    assert "content-length" not in server.asked[0].headers
    assert server.asked[1].headers["content-length"] == "0"


def test_unwise_characters_of_a_url_are_escaped(serve):
    server = serve(answering(OK))
    get(f'http://127.0.0.1:{server.port}/caf\xe9/<a>%41?q=\u20ac"')
    assert server.asked[0].line == "GET /caf%C3%A9/%3Ca%3E%41?q=%E2%82%AC%22 HTTP/1.1"


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (CHUNKED + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: t\r\n\r\n", 200, b"abcde"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n", 304, b""),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", 500, b""),
        (b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n", 302, b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK, 200, b"ok"),
        (b"HTTP/1.1 429 Too Many\r\nRetry-After: 7\r\nContent-Length: 1\r\n\r\nx", 429, b"x"),
    ],
)  # fmt: skip
def test_answers_are_read_to_their_end_and_the_connection_is_used_again(serve, answer, status, body):
    server = serve(answering(answer))
    for _ in range(3):
        reply = post(server.url)
        assert (reply.status, reply.body, reply.truncated) == (status, body, False)
    assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        OK + b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nunasked!" * 2000,
    ],
)
def test_a_connection_whose_next_answer_would_be_doubtful_is_not_used_again(serve, answer):
    server = serve(answering(answer))
    for _ in range(2):
        assert post(server.url).body == b"ok"
    assert server.connections == 2


def test_a_body_without_a_length_ends_with_the_connection(serve):
    server = serve(once(b"HTTP/1.1 200 OK\r\n\r\nall of it"))
    assert post(server.url).body == b"all of it"


def test_head_has_no_body(serve):
    server = serve(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"))
    for _ in range(2):
        assert send("HEAD", server.url, {}, timeout_seconds=5, byte_cap=10, guard=False).body == b""
    assert server.connections == 1


def test_compressed_bodies_stay_as_they_are(serve):
    bomb = b"\x1f\x8b" + b"\0" * 98
    server = serve(
        answering(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 100\r\n\r\n" + bomb)
    )
    assert post(server.url).body == bomb


# Deadline and size


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


@pytest.mark.parametrize(
    ("prefix", "drop"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"y"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"z"),
        (CHUNKED, b"1\r\nz\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"z"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["status", "headers", "one header", "body", "chunks", "until close", "continue"],
)
def test_a_dripping_server_is_cut_at_the_deadline(serve, prefix, drop):
    server = serve(dripping(prefix, drop))
    timed_out(lambda: post(server.url, timeout_seconds=0.25))


def test_a_silent_server_is_cut_at_the_deadline(serve):
    server = serve(
        lambda connection: connection.gone(60) and connection.read_request() and connection.gone(60)
    )
    timed_out(lambda: post(server.url, timeout_seconds=0.3))
    assert server.connections == 1, "a time-out is not sent again"


def test_a_server_that_does_not_read_is_cut_at_the_deadline(serve):
    released = threading.Event()
    server = serve(lambda connection: released.wait(60))
    timed_out(lambda: post(server.url, b"x" * 32_000_000, timeout_seconds=0.3))
    released.set()


def test_a_kept_connection_obeys_the_deadline_of_the_present_request(serve):
    released = threading.Event()

    def handle(connection: Connection) -> None:
        connection.read_request()
        connection.say(OK)
        released.wait(60)

    server = serve(handle)
    post(server.url, timeout_seconds=60)
    timed_out(lambda: post(server.url, b"x" * 32_000_000, timeout_seconds=0.25))
    released.set()
    assert server.connections == 1


def test_a_request_that_timed_out_on_a_kept_connection_is_not_sent_again(serve):
    def handle(connection: Connection) -> None:
        connection.read_request()
        connection.say(OK)
        connection.read_request()
        connection.gone(60)

    server = serve(handle)
    post(server.url)
    timed_out(lambda: post(server.url, timeout_seconds=0.25))
    assert (len(server.asked), server.connections) == (2, 1)


def test_each_address_of_a_name_gets_its_share_of_the_time(monkeypatch):
    shares: list[float] = []

    class Swallowing(outbound._TimedSocket):
        def connect(self, _address):
            shares.append(self.gettimeout())
            raise TimeoutError

    monkeypatch.setattr(outbound, "_TimedSocket", Swallowing)
    many = resolving(hook_test=[f"8.8.8.{last}" for last in range(1, 9)])
    assert failing(lambda: post("https://hook.test/", timeout_seconds=8, resolver=many)).reason == "timeout"
    assert [round(8 / share) for share in shares] == [4, 3, 2, 1]


def test_a_name_that_is_never_resolved_is_cut_at_the_deadline():
    released = threading.Event()

    def stuck(*_args):
        released.wait(60)
        return []

    timed_out(lambda: post("http://slow.test/", timeout_seconds=0.2, resolver=stuck), "dns")
    released.set()


def test_a_deadline_in_the_past_opens_nothing(serve):
    server = serve(answering(OK))
    timed_out(lambda: post(server.url, timeout_seconds=0))
    assert server.asked == []


def test_a_body_is_cut_at_the_cap(serve):
    server = serve(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"a" * 100000))
    reply = post(server.url, byte_cap=1000)
    assert (reply.body, reply.truncated) == (b"a" * 1000, True)


@pytest.mark.parametrize(
    "framing", [b"", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 999999999999\r\n"]
)
def test_an_endless_body_is_cut_at_the_cap(serve, framing):
    def handle(connection: Connection) -> None:
        connection.read_request()
        connection.say(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n")
        while True:
            connection.say(b"400\r\n" + b"a" * 1024 + b"\r\n")

    server = serve(handle)
    reply = post(server.url, byte_cap=16384)
    assert reply.truncated
    assert len(reply.body) == 16384


@pytest.mark.parametrize("cap", [0, 1, 2, 3])
@pytest.mark.parametrize("answer", [OK, CHUNKED + b"2\r\nok\r\n0\r\n\r\n"])
def test_the_cap_is_exact(serve, cap, answer):
    server = serve(answering(answer))
    reply = post(server.url, byte_cap=cap)
    assert (reply.body, reply.truncated) == (b"ok"[:cap], cap < 2)


@pytest.mark.parametrize(
    ("prefix", "flood"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"X-Flood: " + b"y" * 1000 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"y" * 1000),
        (b"HTTP/1.1 ", b"2" * 1000),
        (b"", b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n"),
        (b"", b"HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n"),
        (CHUNKED + b"1;", b"y" * 1000),
        (CHUNKED + b"0\r\n", b"X: y\r\n"),
    ],
)
def test_a_flood_beside_the_body_is_refused(serve, prefix, flood):
    def handle(connection: Connection) -> None:
        connection.read_request()
        connection.say(prefix)
        while True:
            connection.say(flood)

    server = serve(handle)
    assert failing(lambda: post(server.url)).reason in ("too_large", "protocol")


def test_a_body_can_go_into_a_file(serve):
    server = serve(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"z" * 300000))
    sink = io.BytesIO()
    reply = get(server.url, into=sink, byte_cap=1_000_000)
    assert (reply.body, reply.truncated, sink.getvalue()) == (b"", False, b"z" * 300000)
    sink = io.BytesIO()
    assert get(server.url, into=sink, byte_cap=100).truncated
    assert sink.getvalue() == b"z" * 100


def test_an_error_body_does_not_go_into_the_file(serve):
    server = serve(answering(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone"))
    sink = io.BytesIO()
    assert get(server.url, into=sink).body == b"gone"
    assert sink.getvalue() == b""


def test_a_full_disk_is_not_taken_for_a_network_error(serve):
    class Full(io.BytesIO):
        def write(self, _data):
            raise OSError(errno.ENOSPC, "no space left")

    server = serve(answering(OK))
    with pytest.raises(OSError, match="no space left"):
        get(server.url, into=Full())


# What goes wrong on the wire


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "disconnected"),
        (b"HTTP/1.1 200 OK", "disconnected"),
        (b"HTTP/1.1 200 OK\r\n", "disconnected"),
        (b"HTTP/1.1 200 OK\r\nX: y\r\n", "disconnected"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1", "disconnected"),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n", "disconnected"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfour", "disconnected"),
        (CHUNKED + b"A\r\nfour", "disconnected"),
        (CHUNKED + b"-1\r\nfour", "disconnected"),
        (CHUNKED + b"-5\r\nfour", "protocol"),
        (CHUNKED + b"-" + b"9" * 40 + b"\r\nfour", "protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "protocol"),
        (b"HTTP/2 200\r\n\r\n", "protocol"),
        (b"HTTP/1.1 banana\r\n\r\n", "protocol"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 101 + b"\r\n", "protocol"),
    ],
)
def test_a_broken_answer_has_its_reason(serve, answer, reason):
    server = serve(once(answer))
    error = failing(lambda: post(server.url))
    assert (error.reason, error.permanent) == (reason, False)
    assert server.connections == 1


def test_a_closed_port_is_a_connect_error():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    error = failing(lambda: post(f"http://127.0.0.1:{port}/secret-path"))
    assert (error.reason, error.permanent) == ("connect", False)
    assert "secret-path" not in str(error)


def test_an_unknown_name_is_a_dns_error():
    error = failing(lambda: post("http://nowhere.test/", resolver=resolving()))
    assert (error.reason, error.permanent) == ("dns", False)


def test_an_early_refusal_is_read_although_the_body_was_not_taken(serve):
    def handle(connection: Connection) -> None:
        connection.sock.recv(1000)
        connection.say(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        connection.sock.shutdown(socket.SHUT_WR)
        while connection.sock.recv(65536):
            pass

    server = serve(handle)
    assert post(server.url, b"x" * 5_000_000).status == 413


@given(data=st.binary(max_size=300))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("prefix", [b"", b"HTTP/1.1 200 OK\r\n", CHUNKED])
def test_no_answer_causes_anything_but_a_reply_or_an_outbound_error(prefix, data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(prefix + data)
        theirs.shutdown(socket.SHUT_WR)
        link = _link_over(ours)
        call = outbound._Call(
            "POST", "http://x.test/", {}, b"", 0.0, time.monotonic() + 5, 100, False, None, resolving()
        )
        with suppress(OutboundError):
            assert len(outbound._exchange(link, call, b"", reused=False).body) <= 100
        outbound.close_idle()


def _link_over(sock: socket.socket) -> outbound._Link:
    timed = outbound._TimedSocket(sock.family, sock.type, sock.proto, fileno=sock.detach())
    route = outbound._Route("http", "x.test", 80, "", False)
    return outbound._Link(route, timed, time.monotonic(), time.monotonic())


# Connections that are kept


def test_threads_share_connections_and_answers_are_not_mixed_up(serve):
    def handle(connection: Connection) -> None:
        while (asked := connection.read_request()) is not None:
            connection.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(asked.body), asked.body))

    server = serve(handle)
    bodies = [b"message %d" % number for number in range(400)]
    with ThreadPoolExecutor(8) as pool:
        assert [reply.body for reply in pool.map(lambda body: post(server.url, body), bodies)] == bodies
    assert server.connections <= 8


def test_a_request_meets_a_connection_that_closes_and_is_sent_once_more(serve):
    def handle(connection: Connection) -> None:
        connection.read_request()
        if connection.index > 0:
            connection.say(OK)
            return
        connection.say(OK)
        connection.read_request()  # and closes without a word

    server = serve(handle)
    assert post(server.url, b"first").status == 200
    assert post(server.url, b"second").status == 200
    assert [(asked.body, asked.connection) for asked in server.asked] == [
        (b"first", 0),
        (b"second", 0),
        (b"second", 1),
    ]


def test_the_second_try_is_the_last(serve):
    def handle(connection: Connection) -> None:
        connection.read_request()
        if connection.index == 0:
            connection.say(OK)
            connection.read_request()

    server = serve(handle)
    post(server.url)
    assert failing(lambda: post(server.url)).reason == "disconnected"
    assert len(server.asked) == 3


def test_nothing_is_sent_again_once_an_answer_began(serve):
    server = serve(lambda connection: answering(OK)(connection) if connection.index else _half(connection))
    post(server.url)
    assert failing(lambda: post(server.url)).reason == "disconnected"
    assert len(server.asked) == 2


def _half(connection: Connection) -> None:
    connection.read_request()
    connection.say(OK)
    connection.read_request()
    connection.say(b"HTTP/1.1 200 OK\r\nContent-Le")


def test_a_post_that_may_not_be_doubled_gets_a_connection_of_its_own(serve):
    server = serve(answering(OK))
    for _ in range(3):
        post(server.url, headers={})
    assert server.connections == 3
    for _ in range(3):
        post(server.url)
    assert server.connections == 3, "the last one was kept for those that may"


def test_a_connection_closed_while_idle_is_noticed_before_use(serve):
    closed = threading.Event()

    def handle(connection: Connection) -> None:
        connection.read_request()
        connection.say(OK)
        connection.sock.shutdown(socket.SHUT_RDWR)
        closed.set()

    server = serve(handle)
    post(server.url)
    assert closed.wait(60)
    post(server.url)
    assert len(server.asked) == 2


@pytest.mark.parametrize("limit", ["IDLE_SECONDS", "LIFETIME_SECONDS"])
def test_old_connections_are_given_up_and_the_name_is_resolved_again(serve, monkeypatch, limit):
    server = serve(answering(OK))
    resolver = resolving(hook_test="127.0.0.1")
    url = f"http://hook.test:{server.port}/"
    for _ in range(2):
        post(url, resolver=resolver)
    assert (server.connections, len(resolver.asked)) == (1, 1)
    monkeypatch.setattr(outbound, limit, 0.0)
    post(url, resolver=resolver)
    assert (server.connections, len(resolver.asked)) == (2, 2)


def test_idle_connections_to_other_hosts_are_swept(serve, monkeypatch):
    server, other = serve(answering(OK)), serve(answering(OK))
    for _ in range(2):
        post(server.url)
    monkeypatch.setattr(outbound, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(outbound, "SWEEP_SECONDS", 0.0)
    post(other.url)
    pool = outbound._pool()
    assert [route.port for route in pool._idle] == [other.port]
    assert pool._count == 1


def test_no_more_connections_are_kept_than_allowed(serve, monkeypatch):
    monkeypatch.setattr(outbound, "IDLE_IN_ALL", 1)
    one, two = serve(answering(OK)), serve(answering(OK))
    for _ in range(2):
        post(one.url)
        post(two.url)
    assert (one.connections, two.connections) == (1, 2)


def test_a_connection_opened_without_the_guard_is_not_used_with_it(serve):
    server = serve(answering(OK))
    resolver = resolving(hook_test="127.0.0.1")
    url = f"http://hook.test:{server.port}/"
    assert post(url, resolver=resolver).status == 200
    assert failing(lambda: post(url, resolver=resolver, guard=True)).reason == "address_refused"


FORKING = """
import os, sys
from webhook_app.outbound import send
def body():
    return send("PUT", sys.argv[1], {}, b"", timeout_seconds=60, byte_cap=99, guard=False).body
first = body()
child = os.fork()
if child == 0:
    os._exit(0 if body() == b"connection 1" and body() == b"connection 1" else 1)
assert os.waitpid(child, 0)[1] == 0
assert first == body() == b"connection 0"
"""


def test_a_fork_opens_its_own_connections(serve):
    def handle(connection: Connection) -> None:
        while connection.read_request() is not None:
            connection.say(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nconnection %d" % connection.index)

    server = serve(handle)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKING, server.url],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (run.returncode, run.stderr) == (0, "")


# The address guard

REFUSED = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "100.64.0.1", "169.254.169.254", "169.254.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1", "198.18.0.1",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "168.63.129.16", "100.100.100.200",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::8.8.8.8",
    "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::a83f:8110", "64:ff9b:1::1",
    "2002:7f00:1::", "2002:808:808::1", "2001::1", "2001:0:53aa:64c:0:7877:80ff:fffe", "2001:db8::1",
    "100::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "3fff::1", "5f00::1", "4000::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e", "64:ff9b::808:808"]
INTERNAL = [
    "127.0.0.1",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "198.18.0.1",
    "::1",
    "fc00::1",
]
NEVER = sorted(set(REFUSED) - set(INTERNAL) - {"127.8.8.8", "172.31.255.255", "64:ff9b::7f00:1"})


@pytest.fixture
def dialled(monkeypatch) -> list[str]:
    """What would have been connected to; nothing is."""
    attempts: list[str] = []

    def dial(addresses, _budget):
        attempts.extend(each.sockaddr[0] for each in addresses)
        raise ConnectionRefusedError("not in a test")

    monkeypatch.setattr(outbound, "_dial", dial)
    return attempts


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


@pytest.mark.parametrize("address", REFUSED)
def test_an_internal_address_is_refused_behind_a_name(dialled, address):
    error = failing(lambda: post("https://hook.test/", guard=True, resolver=resolving(hook_test=address)))
    assert (error.reason, error.permanent, dialled) == ("address_refused", False, [])
    assert "hook.test" in str(error)


@pytest.mark.parametrize("address", REFUSED)
def test_an_internal_address_is_refused_when_written(dialled, address):
    url = f"https://{bracketed(address)}/"
    error = failing(lambda: post(url, guard=True))
    assert (error.reason, error.permanent, dialled) == ("address_refused", True, [])
    error = failing(lambda: check_callback_url(url, allow_private=False))
    assert (error.reason, error.permanent) == ("address_refused", True)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_allowed(dialled, address):
    check_callback_url(f"https://{bracketed(address)}/", allow_private=False)
    error = failing(lambda: post("https://hook.test/", guard=True, resolver=resolving(hook_test=address)))
    assert (error.reason, dialled) == ("connect", [address])


@pytest.mark.parametrize("address", INTERNAL)
def test_without_the_guard_internal_addresses_are_allowed(dialled, address):
    check_callback_url(f"http://{bracketed(address)}:8080/", allow_private=True)
    error = failing(lambda: post("http://hook.test/", resolver=resolving(hook_test=address)))
    assert (error.reason, dialled) == ("connect", [address])


@pytest.mark.parametrize("address", NEVER)
def test_some_addresses_are_refused_without_the_guard_too(dialled, address):
    error = failing(lambda: post("http://hook.test/", resolver=resolving(hook_test=address)))
    assert (error.reason, dialled) == ("address_refused", [])
    assert (
        failing(lambda: check_callback_url(f"http://{bracketed(address)}/", True)).reason == "address_refused"
    )


@pytest.mark.parametrize("answers", [["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["8.8.8.8", "::1"]])
def test_a_name_with_one_internal_address_is_refused_whole(dialled, answers):
    error = failing(lambda: post("https://hook.test/", guard=True, resolver=resolving(hook_test=answers)))
    assert (error.reason, dialled) == ("address_refused", [])


def test_a_rebinding_name_is_connected_to_the_judged_address_only(dialled):
    answers = iter(["8.8.8.8", "127.0.0.1"])

    def rebinding(_host, port, *_rest):
        return [_row(next(answers), port)]

    assert failing(lambda: post("https://hook.test/", guard=True, resolver=rebinding)).reason == "connect"
    assert dialled == ["8.8.8.8"]
    assert (
        failing(lambda: post("https://hook.test/", guard=True, resolver=rebinding)).reason
        == "address_refused"
    )
    assert dialled == ["8.8.8.8"]


def test_the_next_address_is_tried_when_one_does_not_answer(serve):
    server = serve(answering(OK))
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed_port = unused.getsockname()[1]

    def two(_host, port, *_rest):
        return [_row("127.0.0.1", closed_port), _row("127.0.0.1", port)]

    assert post(f"http://hook.test:{server.port}/", resolver=two).status == 200


# URLs of subscribers


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://example.com/",
        "https://hooks.example.com:8443/a/b?c=d&e=%20",
        "https://b\xfccher.example/\xfc",
        "https://xn--bcher-kva.example/",
        "https://EXAMPLE.com./x",
        "https://my_service.example.com/x",
        "https://1.example.com/",
        "https://example.com/@user/it's[1]",
    ],
)
def test_good_callback_urls(url):
    check_callback_url(url, allow_private=False)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "bad_url"),
        ("example.com/x", "bad_url"),
        ("//example.com/x", "bad_url"),
        ("http://example.com/", "bad_url"),
        ("ftp://example.com/", "bad_url"),
        ("file:///etc/passwd", "bad_url"),
        ("https://", "bad_url"),
        ("https:///path", "bad_url"),
        ("https://user:pw@example.com/", "bad_url"),
        ("https://user@example.com/", "bad_url"),
        ("https://@example.com/", "bad_url"),
        ("https://example.com@127.0.0.1/", "bad_url"),
        ("https://127.0.0.1\\@example.com/", "bad_url"),
        ("https://example.com/#part", "bad_url"),
        ("https://example.com#@127.0.0.1/", "bad_url"),
        ("https://example.com/a b", "bad_url"),
        ("https://example.com/\r\nX: y", "bad_url"),
        ("https://exam\tple.com/", "bad_url"),
        ("https://example.com/\0", "bad_url"),
        ("https://example.com/\x7f", "bad_url"),
        ("https://example.com/\ud800", "bad_url"),
        (" https://example.com/", "bad_url"),
        ("https://example.com/" + "a" * 2030, "bad_url"),
        ("https://" + "a." * 130 + "com/", "bad_url"),
        ("https://" + "a" * 64 + ".com/", "bad_url"),
        ("https://exa..mple.com/", "bad_url"),
        ("https://-example.com/", "bad_url"),
        ("https://ex%61mple.com/", "bad_url"),
        ("https://example.com:0/", "bad_url"),
        ("https://example.com:65536/", "bad_url"),
        ("https://example.com:abc/", "bad_url"),
        ("https://example.com:-1/", "bad_url"),
        ("https://[::1/", "bad_url"),
        ("https://[fe80::1%25eth0]/", "bad_url"),
        ("https://[1:2]/", "bad_url"),
        ("https://localhost/", "address_refused"),
        ("https://LOCALHOST./", "address_refused"),
        ("https://db.localhost:5432/", "address_refused"),
        ("https://2130706433/", "address_refused"),
        ("https://0x7f000001/", "address_refused"),
        ("https://0x7f.1/", "address_refused"),
        ("https://0177.0.0.1/", "address_refused"),
        ("https://127.1/", "address_refused"),
        ("https://127.0.0.1./", "address_refused"),
        ("https://127.0.0.0x1/", "address_refused"),
        ("https://0/", "address_refused"),
        ("https://\u2460\u2461\u2466.0.0.1/", "address_refused"),
        ("https://\uff11\uff12\uff17\u30020\u30020\u30021/", "address_refused"),
        ("https://\u24c1ocalhost/", "address_refused"),
        ("https://[0:0:0:0:0:ffff:7f00:1]/", "address_refused"),
    ],
)
def test_bad_callback_urls(url, reason):
    error = failing(lambda: check_callback_url(url, allow_private=False))
    assert (error.reason, error.permanent) == (reason, True)
    assert "pw" not in str(error)
    # Refused at the registration, refused at the sending: but for the rules of registrations alone.
    if not url.startswith("http://") and "#" not in url and len(url) <= 2048:
        assert failing(lambda: post(url, guard=True, resolver=resolving())).reason == reason


def test_where_private_callbacks_are_allowed():
    for url in (
        "http://localhost:9000/x",
        "http://127.0.0.1/",
        "http://builder/",
        "https://192.168.0.7/",
        "http://[::1]:1/",
    ):
        check_callback_url(url, allow_private=True)
    for url in ("http://169.254.169.254/", "http://2130706433/", "http://0.0.0.0:80/"):
        assert (
            failing(lambda url=url: check_callback_url(url, allow_private=True)).reason == "address_refused"
        )


URL_PIECES = st.sampled_from(
    ["https://", "http://", "example.com", "127.0.0.1", "[", "]", "::1", "@", ":", "/", "#", "?", "%", "\\",
     ".", "..", "0x7f", "xn--", "443", "99999", "\u3002", "\u0130", "\xad", "\u200d", "\ud800", "\0", "\r\n",
     "[v1.a]"]
)  # fmt: skip


@given(
    st.one_of(st.text(), st.lists(st.one_of(URL_PIECES, st.text(max_size=3)), max_size=9).map("".join)),
    st.booleans(),
)
@settings(max_examples=500)
def test_a_callback_url_is_accepted_or_refused_but_never_breaks(url, allow_private):
    with suppress(OutboundError):
        check_callback_url(url, allow_private)


SPELLINGS: list[Callable[[int], str]] = [
    lambda number: str(ipaddress.IPv4Address(number)),
    str,
    hex,
    lambda number: f"0{number:o}",
    lambda number: ".".join(f"0{byte:o}" for byte in number.to_bytes(4)),
    lambda number: ".".join(hex(byte) for byte in number.to_bytes(4)),
    lambda number: f"{number >> 24}.{number & 0xFFFFFF}",
    lambda number: f"{number >> 24}.{number >> 16 & 0xFF}.{number & 0xFFFF}",
    lambda number: f"[::ffff:{ipaddress.IPv4Address(number)}]",
    lambda number: f"[::{ipaddress.IPv4Address(number)}]",
    lambda number: f"[64:ff9b::{ipaddress.IPv4Address(number)}]",
    lambda number: f"[2002:{number >> 16:x}:{number & 0xFFFF:x}::1]",
]
PRIVATE_NETWORKS = [
    ipaddress.IPv4Network(each)
    for each in (
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "100.64.0.0/10",
    )
]


@given(
    st.sampled_from(PRIVATE_NETWORKS).flatmap(lambda network: st.ip_addresses(network=network)),
    st.sampled_from(SPELLINGS),
)
@settings(max_examples=300)
def test_no_spelling_of_an_internal_address_is_accepted(address, spelling):
    error = failing(lambda: check_callback_url(f"https://{spelling(int(address))}/", allow_private=False))
    assert error.reason == "address_refused"


# Headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer x"},
        {"X-Key": ""},
        {"x-name": "caf\xe9\tz"},
        {f"x-{n}": "v" for n in range(20)},
    ],
)
def test_good_custom_headers(headers):
    check_headers(headers)


SMUGGLED = [
    {"X": "a\r\nY: b"}, {"X": "a\nY: b"}, {"X": "a\rb"}, {"X": "a\0b"}, {"X": "a\x1fb"}, {"X": "\x7f"},
    {"X": "\u20ac"}, {"X": "\u010d\u010a"}, {"X": "\ud800"}, {"": "a"}, {"X Y": "a"}, {"X:": "a"},
    {"X\r\nY": "a"}, {" X": "a"}, {"X\0": "a"}, {"X\xe9": "a"}, {"(X)": "a"}, {"X": 1}, {"X": None}, {1: "a"},
    {"X" * 257: "a"},
]  # fmt: skip


@pytest.mark.parametrize("headers", SMUGGLED)
def test_headers_that_would_break_the_line_are_refused_everywhere(serve, headers):
    error = failing(lambda: check_headers(headers))
    assert (error.reason, error.permanent) == ("bad_header", True)
    server = serve(answering(OK))
    assert failing(lambda: post(server.url, headers=headers)).reason == "bad_header"
    assert server.connections == 0


@pytest.mark.parametrize(
    "name",
    ["Host", "Content-Length", "Transfer-Encoding", "Connection", "Keep-Alive", "TE", "Trailer", "Upgrade",
     "Expect", "Proxy-Authorization", "Proxy-Connection", "Webhook-Id", "webhook-anything", "Content-Type",
     "Content-Encoding", "Accept-Encoding", "User-Agent"],
)  # fmt: skip
def test_headers_that_are_ours_or_of_the_connection_are_refused(name):
    assert failing(lambda: check_headers({name: "x"})).reason == "bad_header"


def test_too_many_too_large_or_doubled_headers_are_refused():
    for headers in ({f"x-{n}": "v" for n in range(21)}, {"x": "v" * 9000}, {"X-A": "1", "x-a": "2"}):
        assert failing(lambda headers=headers: check_headers(headers)).reason == "bad_header"


@pytest.mark.parametrize(
    "name", ["host", "Content-Length", "Transfer-Encoding", "Connection", "Accept-Encoding"]
)
def test_no_caller_sets_what_frames_a_request(name):
    assert failing(lambda: post("http://127.0.0.1:1/", headers={name: "1"})).reason == "bad_header"


def test_a_refused_header_does_not_show_its_value():
    assert "swordfish" not in str(failing(lambda: check_headers({"X": "swordfish\r\n"})))


@given(st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=4))
def test_whatever_passes_the_check_makes_exactly_its_lines(headers):
    try:
        check_headers(headers)
    except OutboundError:
        return
    call = outbound._Call("POST", "http://x.test/", headers, b"", 0.0, 0.0, 0, True, None, resolving())
    head = outbound._head(call, parse(call.url), "")
    assert head.count(b"\r\n") == head.count(b"\n") == head.count(b"\r") == 1 + 2 + len(headers) + 2


def test_a_method_is_a_method():
    with pytest.raises(ValueError, match="HTTP method"):
        send("GET / HTTP/1.1\r\nX:", "http://127.0.0.1:1/", {}, timeout_seconds=1, byte_cap=1, guard=False)


# Redirects

SECRETS = {
    "Authorization": "Bearer s",
    "PRIVATE-TOKEN": "s",
    "Cookie": "s",
    "X-Unknown": "s",
    "Accept": "application/json",
}


def redirecting(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 5\r\n\r\nmoved".encode(
        "latin-1"
    )


def test_a_redirect_is_an_answer_unless_it_is_to_be_followed(serve):
    target = serve(answering(OK))
    server = serve(answering(redirecting(target.url)))
    assert get(server.url).status == 302
    assert target.asked == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_within_the_origin_keeps_the_credentials(serve, status):
    server = serve(answering(redirecting("/other?x=1", status), OK))
    sink = io.BytesIO()
    reply = get(server.url, headers=SECRETS, follow_redirects=True, into=sink)
    assert (reply.status, sink.getvalue()) == (200, b"ok")
    assert server.asked[1].line == "GET /other?x=1 HTTP/1.1"
    assert server.asked[1].headers["authorization"] == "Bearer s"


def test_another_origin_gets_no_credentials(serve):
    target = serve(answering(OK))
    server = serve(answering(redirecting(f"{target.url}?sig=1#fragment")))
    assert get(server.url, headers=SECRETS, follow_redirects=True).status == 200
    assert server.asked[0].headers["private-token"] == "s"
    assert target.asked[0].line == "GET /hook?sig=1 HTTP/1.1"
    assert set(target.asked[0].headers) == {"host", "accept-encoding", "accept"}


def test_another_name_for_the_same_server_gets_no_credentials(serve):
    server = serve(answering(OK))
    here = serve(answering(redirecting(f"http://other.test:{server.port}/")))
    get(here.url, headers=SECRETS, follow_redirects=True, resolver=resolving(other_test="127.0.0.1"))
    assert "authorization" not in server.asked[0].headers


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("https://a.test/x", "https://a.test:443/y", True),
        ("http://a.test/x", "https://a.test/y", True),
        ("http://a.test:8080/x", "https://a.test/y", False),
        ("http://a.test/x", "https://b.test/y", False),
        ("https://a.test/x", "https://a.test:8443/y", False),
        ("https://a.test/x", "https://A.test./y", True),
    ],
)
def test_who_may_see_the_credentials(before, after, same):
    assert outbound._is_same_owner(parse(before), parse(after)) is same


def test_redirects_come_to_an_end(serve):
    server = serve(answering(redirecting("/again")))
    assert failing(lambda: get(server.url, follow_redirects=True)).reason == "protocol"
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data", "address_refused"),
        ("http://meta.test/", "address_refused"),
        ("file:///etc/passwd", "bad_url"),
        ("http://[", "bad_url"),
        ("http://u:p@hook.test/", "bad_url"),
    ],
)
def test_each_step_of_a_redirect_is_judged(serve, location, reason):
    server = serve(answering(redirecting(location)))
    resolver = resolving(meta_test="169.254.169.254")
    assert failing(lambda: get(server.url, follow_redirects=True, resolver=resolver)).reason == reason


def test_only_a_get_follows():
    with pytest.raises(ValueError, match="GET"):
        post("http://127.0.0.1:1/", follow_redirects=True)


def test_the_deadline_is_one_for_all_steps(serve):
    def slow(connection: Connection) -> None:
        while connection.read_request() is not None:
            connection.gone(0.15)
            connection.say(redirecting("/again"))

    server = serve(slow)
    timed_out(lambda: get(server.url, follow_redirects=True, timeout_seconds=0.25))


# TLS


@dataclass
class Authority:
    """A certificate authority for one test run."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    folder: Path

    @property
    def path(self) -> str:
        return str(self.folder / "authority.pem")

    def context(self, name: str, days: int = 30) -> ssl.SSLContext:
        """A server that shows a certificate for `name`."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternative = x509.SubjectAlternativeName([x509.DNSName(name)])
        certificate = _certificate(name, key, self.certificate.subject, self.key, [alternative], days)
        path = self.folder / f"{name}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


def _certificate(name, key, issuer, issuer_key, extensions, days=30) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    is_authority = not extensions
    builder = builder.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    builder = builder.add_extension(
        x509.KeyUsage(digital_signature=True, key_cert_sign=is_authority, crl_sign=is_authority, **usage),
        critical=True,
    )
    if not is_authority:
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    certificate = _certificate("test authority", key, name, key, [])
    made = Authority(key, certificate, tmp_path_factory.mktemp("tls"))
    Path(made.path).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return made


@pytest.fixture
def trusted(authority, monkeypatch) -> Authority:
    monkeypatch.setenv("SSL_CERT_FILE", authority.path)
    return authority


HOOK = resolving(hook_test="127.0.0.1", other_test="127.0.0.1")


def test_tls_proves_the_name_although_the_connection_goes_to_an_address(serve, trusted):
    context = trusted.context("hook.test")
    named: list[str | None] = []
    context.sni_callback = lambda _sock, name, _context: named.append(name)
    server = serve(answering(OK), context)
    for _ in range(3):
        assert post(f"https://hook.test:{server.port}/x", resolver=HOOK).body == b"ok"
    assert named == ["hook.test"]
    assert server.connections == 1
    assert server.asked[0].headers["host"] == f"hook.test:{server.port}"


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_each_variable_names_the_trusted_certificates(serve, authority, monkeypatch, variable):
    monkeypatch.setenv(variable, authority.path)
    server = serve(answering(OK), authority.context("hook.test"))
    assert get(f"https://hook.test:{server.port}/", resolver=HOOK).status == 200


def test_a_certificate_for_another_name_is_refused(serve, trusted):
    server = serve(answering(OK), trusted.context("hook.test"))
    error = failing(lambda: post(f"https://other.test:{server.port}/", resolver=HOOK))
    assert (error.reason, error.permanent) == ("tls", False)
    assert "other.test" in str(error)
    assert server.asked == []


def test_an_expired_certificate_is_refused(serve, trusted):
    server = serve(answering(OK), trusted.context("hook.test", days=-1))
    error = failing(lambda: post(f"https://hook.test:{server.port}/", resolver=HOOK))
    assert error.reason == "tls"
    assert "expired" in str(error)


def test_an_unknown_authority_is_refused(serve, authority):
    server = serve(answering(OK), authority.context("hook.test"))
    assert failing(lambda: post(f"https://hook.test:{server.port}/", resolver=HOOK)).reason == "tls"
    assert server.asked == []


def test_a_server_without_tls_is_a_tls_error(serve, trusted):
    server = serve(lambda connection: connection.say(b"220 mail.test ESMTP\r\n") or connection.gone(60))
    assert failing(lambda: post(f"https://hook.test:{server.port}/", resolver=HOOK)).reason == "tls"


def test_a_missing_bundle_is_told(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/bundle.pem")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"https://hook.test:{listening.getsockname()[1]}/"
        error = failing(lambda: post(url, resolver=HOOK))
    assert error.reason == "tls"
    assert "/nowhere/bundle.pem" in str(error)


def test_a_handshake_that_never_comes_is_cut_at_the_deadline(serve, trusted):
    server = serve(lambda connection: connection.gone(60) and connection.read_request())
    timed_out(lambda: post(f"https://hook.test:{server.port}/", timeout_seconds=0.3, resolver=HOOK))


@pytest.mark.parametrize(
    "prefix", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"]
)
def test_a_drip_through_tls_is_cut_at_the_deadline(serve, trusted, prefix):
    server = serve(dripping(prefix, b"z"), trusted.context("hook.test"))
    timed_out(lambda: post(f"https://hook.test:{server.port}/", timeout_seconds=0.25, resolver=HOOK))


def test_a_large_body_goes_through_tls_whole(serve, trusted):
    server = serve(answering(OK), trusted.context("hook.test"))
    body = os.urandom(3_000_000)
    assert post(f"https://hook.test:{server.port}/", body, resolver=HOOK).status == 200
    assert server.asked[0].body == body


def test_a_kept_tls_connection_that_closes_is_replaced(serve, trusted):
    def handle(connection: Connection) -> None:
        connection.read_request()
        connection.say(OK)
        if connection.index == 0:
            connection.read_request()

    server = serve(handle, trusted.context("hook.test"))
    for _ in range(2):
        assert post(f"https://hook.test:{server.port}/", resolver=HOOK).status == 200
    assert server.connections == 2


def test_a_redirect_never_leaves_tls(serve, trusted):
    target = serve(answering(OK))
    server = serve(answering(redirecting(target.url)), trusted.context("hook.test"))
    url = f"https://hook.test:{server.port}/"
    assert failing(lambda: get(url, follow_redirects=True, resolver=HOOK)).reason == "protocol"
    assert target.connections == 0


# Proxies


def proxying(connection: Connection) -> None:
    """A proxy that connects to the port asked for, on this machine."""
    asked = connection.read_request()
    if asked is None:
        return
    if not asked.line.startswith("CONNECT"):
        connection.say(OK)
        return
    port = int(asked.line.split()[1].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as target:
        connection.say(b"HTTP/1.1 200 Connection established\r\n\r\n")
        _relay(connection.sock, target)


def _relay(one: socket.socket, two: socket.socket) -> None:
    other = {one: two, two: one}
    while True:
        readable, _, _ = select.select([one, two], [], [], 5)
        for sock in readable:
            data = sock.recv(65536)
            if not data:
                return
            other[sock].sendall(data)


def nobody(*_args) -> list:
    raise AssertionError("behind a proxy no name is resolved here")


def test_https_goes_through_the_proxy_and_tls_still_proves_the_name(serve, trusted, monkeypatch):
    proxy = serve(proxying)
    server = serve(answering(OK), trusted.context("hook.test"))
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:p%40ss@127.0.0.1:{proxy.port}")
    for _ in range(2):
        assert post(f"https://hook.test:{server.port}/x", guard=True, resolver=nobody).status == 200
    (connect,) = proxy.asked
    assert connect.line == f"CONNECT hook.test:{server.port} HTTP/1.1"
    assert connect.headers["proxy-authorization"] == "Basic " + base64.b64encode(b"user:p@ss").decode()
    assert "proxy-authorization" not in server.asked[0].headers


def test_http_through_a_proxy_names_the_whole_url(serve, monkeypatch):
    proxy = serve(proxying)
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{proxy.port}")
    assert get("http://hook.test:81/x?y=z", resolver=nobody).status == 200
    assert proxy.asked[0].line == "GET http://hook.test:81/x?y=z HTTP/1.1"
    assert proxy.asked[0].headers["host"] == "hook.test:81"


def test_no_proxy_is_honoured(serve, monkeypatch):
    server = serve(answering(OK))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", ".test")
    assert get(f"http://hook.test:{server.port}/", resolver=HOOK).status == 200


def test_loopback_never_goes_through_a_proxy(serve, monkeypatch):
    server = serve(answering(OK))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert get(server.url).status == 200


def test_an_internal_address_is_refused_behind_a_proxy_too(monkeypatch, dialled):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert failing(lambda: post("https://169.254.169.254/", guard=True)).reason == "address_refused"
    assert failing(lambda: post("https://0x7f.1/", guard=True)).reason == "address_refused"
    assert dialled == []


def test_a_proxy_that_refuses_is_a_connect_error(serve, monkeypatch):
    proxy = serve(once(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"))
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
    error = failing(lambda: post("https://hook.test/", guard=True))
    assert error.reason == "connect"
    assert "407" in str(error)


@pytest.mark.parametrize(
    "proxy",
    ["https://user:swordfish@127.0.0.1:1", "socks5://user:swordfish@127.0.0.1:1", "http://user:swordfish@[::1",
     "http://user:swordfish@127.0.0.1:99999", "http://"],
)  # fmt: skip
def test_proxies_that_cannot_be_used_are_named(monkeypatch, proxy):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    error = failing(lambda: post("https://hook.test/", guard=True))
    assert error.reason == "connect"
    assert "swordfish" not in str(error)


def test_a_dripping_proxy_is_cut_at_the_deadline(serve, monkeypatch):
    proxy = serve(dripping(b"HTTP/1.1 200 OK\r\nX: ", b"y"))
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
    timed_out(lambda: post("https://hook.test/", timeout_seconds=0.25))
