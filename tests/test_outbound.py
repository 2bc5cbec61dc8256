"""The outgoing door, held against real sockets: slow, dripping, endless, lying and vanishing servers.

Nothing here leaves the loopback interface.  Names are resolved by a function of the test.
"""

import errno
import io
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.wire import (
    CHUNKED,
    OK,
    WEBHOOK,
    Connection,
    answering,
    dripping,
    failing,
    get,
    once,
    post,
    resolving,
    timed_out,
)
from webhook_app import outbound
from webhook_app.destinations import OutboundError
from webhook_app.outbound import send

pytestmark = pytest.mark.usefixtures("plain_environment")


# One request and its answer


def test_a_post_arrives_whole_and_its_answer_comes_back(serve):
    server = serve(
        answering(b"HTTP/1.1 201 Created\r\nX-One: a\r\nx-one: b\r\nContent-Length: 5\r\n\r\nhello")
    )
    reply = post(server.url + "?a=b%20c", b'{"n":1}', headers={**WEBHOOK, "X-Mine": "caf\xe9"})
    assert (reply.status, reply.body, reply.truncated) == (201, b"hello", False)
    assert reply.headers["x-one"] == "a, b"
    assert 0 < reply.duration_seconds < 60
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
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
