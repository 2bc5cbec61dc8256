"""Receivers that answer oddly: a 2xx status line is one sending, whatever follows it.

Each kind goes the whole way: the message is claimed, sent to a socket whose every byte is decided here, settled.
"""

import re
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from cryptography.fernet import Fernet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from jobs import deliver as job
from jobs.resources import Desk, Resources
from tests.facts import PACE, github
from tests.wire import CHUNKED, OK, Connection, answering, failing, once, post, resolving
from webhook_app import answers, builds, db, deliveries, models, outbound, subscribers
from webhook_app import settings as settings_
from webhook_app.lifecycle import State
from webhook_app.room import Room
from webhook_app.times import utc_now

pytestmark = pytest.mark.usefixtures("plain_environment")

KEY = Fernet.generate_key().decode()
LINE = b"HTTP/1.1 200 OK\r\n"
SHORT_SECONDS = 0.3


# How a connection goes on after the bytes of a kind


def close(_connection: Connection) -> None:
    """It ends in order."""


def stay(connection: Connection) -> None:
    connection.gone(60)


def reset(connection: Connection) -> None:
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def drip(drop: bytes):
    def go_on(connection: Connection) -> None:
        while not connection.gone(0.02):
            connection.say(drop)

    return go_on


def flood(drop: bytes):
    def go_on(connection: Connection) -> None:
        while True:
            connection.say(drop)

    return go_on


MANY = b"".join(b"X-Header-%d: %s\r\n" % (number, b"y" * 90) for number in range(700))
FINE, LATE, NOT_WHOLE = "", "SHORT", "was not whole in time"

# name: (bytes, how it goes on, what the note says; FINE: nothing).  With LATE the time for the rest is short.
KINDS = {
    "the length is too large": (LINE + b"Content-Length: 10\r\n\r\nfour", close, "6 bytes before the end of the body"),
    "the length is too large, open": (LINE + b"Content-Length: 10\r\n\r\nfour", stay, LATE + NOT_WHOLE),
    "the length is too small": (LINE + b"Content-Length: 2\r\n\r\nfour", close, "bytes after its end"),
    "the length is negative": (LINE + b"Content-Length: -1\r\n\r\nfour", close, "Content-Length that can't be read"),
    "the length is a word": (LINE + b"Content-Length: many\r\n\r\nfour", close, "Content-Length that can't be read"),
    "the length has 5000 digits": (LINE + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", close, "can't be read"),
    "two lengths": (LINE + b"Content-Length: 4\r\nContent-Length: 7\r\n\r\nfour", close, "can't be read"),
    "one length twice": (LINE + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nfour", stay, FINE),
    "length and chunks": (
        LINE + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n4\r\nfour\r\n0\r\n\r\n", stay, "both"
    ),
    "no length, closed": (LINE + b"\r\nfour", close, FINE),
    "no length, open": (LINE + b"\r\nfour", stay, LATE + "no length, and the connection stayed open"),
    "no length, reset": (LINE + b"\r\nfour", reset, "broke within the body"),
    "no length, endless": (LINE + b"\r\n", flood(b"z" * 4096), FINE),
    "chunks that end early": (CHUNKED + b"A\r\nfour", close, "was closed within a chunk"),
    "chunks without the last": (CHUNKED + b"4\r\nfour\r\n", close, "was closed before the last chunk"),
    "chunks without the last, open": (CHUNKED + b"4\r\nfour\r\n", stay, LATE + NOT_WHOLE),
    "chunks without the last line": (CHUNKED + b"4\r\nfour\r\n0\r\n", close, "before the last chunk"),
    "a chunk size that is a word": (CHUNKED + b"four\r\nfour\r\n0\r\n\r\n", close, "whose size can't be read"),
    "a chunk size below 0": (CHUNKED + b"-4\r\nfour\r\n0\r\n\r\n", close, "whose size can't be read"),
    "a chunk size too large": (CHUNKED + b"F" * 40 + b"\r\nfour\r\n", close, "whose size can't be read"),
    "a chunk longer than its size": (CHUNKED + b"2\r\nfour\r\n0\r\n\r\n", close, "longer than its size"),
    "a chunk line without end": (CHUNKED + b"4;" + b"x" * 70_000, close, "of more than 65536 bytes"),
    "chunked, and is not": (CHUNKED + b"all of it\r\n", close, "size can't be read"),
    "another coding": (LINE + b"Transfer-Encoding: gzip\r\n\r\n\x1f\x8b", close, "that is not chunked"),
    "trailers without end": (CHUNKED + b"0\r\n", flood(b"X: y\r\n"), "its body is too large"),
    "a body that drips": (LINE + b"Content-Length: 1000\r\n\r\n", drip(b"z"), LATE + NOT_WHOLE),
    "chunks that drip": (CHUNKED, drip(b"1\r\nz\r\n"), LATE + NOT_WHOLE),
    "a header that drips": (LINE, drip(b"X: y\r\n"), LATE + "its header was not whole in time"),
    "a header line that drips": (LINE + b"X: ", drip(b"y"), LATE + "its header was not whole in time"),
    "70 KB of headers": (LINE + MANY + b"Content-Length: 2\r\n\r\nok", stay, "of more than 65536 bytes"),
    "70 KB in one header": (LINE + b"X: " + b"y" * 70_000 + b"\r\n\r\n", stay, "of more than 65536 bytes"),
    "150 headers": (LINE + b"A: b\r\n" * 150 + b"Content-Length: 2\r\n\r\nok", stay, FINE),
    "a header without a colon": (LINE + b"no colon\r\nContent-Length: 2\r\n\r\nok", stay, "without a colon"),
    "a header without a name": (LINE + b": value\r\nContent-Length: 2\r\n\r\nok", stay, "impossible name"),
    "a header with a blank in its name": (LINE + b"X Y: z\r\nContent-Length: 2\r\n\r\nok", stay, "impossible name"),
    "a folded header": (LINE + b"X: y\r\n z\r\nContent-Length: 2\r\n\r\nok", stay, "without a colon"),
    "NULs in a header": (LINE + b"X: \0\0\r\nContent-Length: 2\r\n\r\nok", stay, FINE),
    "the header ends early": (LINE + b"X: y\r\n", close, "was closed within the header"),
    "the header ends within a line": (LINE + b"Content-Le", close, "was closed within the header"),
    "closed after the status line": (LINE, close, "was closed within the header"),
    "reset after the status line": (LINE, reset, "broke within the header"),
    "open after the status line": (LINE, stay, LATE + "its header was not whole in time"),
    "closed within the status line": (b"HTTP/1.1 200 OK", close, "was closed within the status line"),
    "garbage after the status line": (LINE + b"\xff\xfe\0garbage\0", close, "was closed within the header"),
    "a second answer": (OK + OK, stay, "bytes after its end"),
    "no reason phrase": (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", stay, FINE),
    "a reason phrase in Latin-1": (b"HTTP/1.1 200 Erledigt \xfc\xff\r\nContent-Length: 0\r\n\r\n", stay, FINE),
    "line feeds alone": (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", stay, FINE),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n\r\nok", close, FINE),
    "HTTP/1.0, kept open": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", stay, FINE),
    "HTTP/1.7": (b"HTTP/1.7 200 OK\r\nContent-Length: 2\r\n\r\nok", stay, FINE),
    "another 2xx": (b"HTTP/1.1 299 Fine\r\nContent-Length: 2\r\n\r\nok", stay, FINE),
    "a 204 with a body": (b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok", stay, "a 204 with a body"),
    "a 204 with bytes after it": (b"HTTP/1.1 204 No Content\r\n\r\nunasked", stay, "bytes after its end"),
    "1xx before it": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nno colon\r\n\r\n" + OK, stay, FINE),
    "a body in gzip that is none": (
        LINE + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nfour", stay, FINE
    ),
    "a body that is no text": (LINE + b"Content-Length: 4\r\n\r\n\0\xff\xfe\0", stay, FINE),
}  # fmt: skip


@pytest.fixture
def held(local, redis_client):
    values = settings_.load({
        "ENCRYPTION_KEYS": KEY, "ALLOW_PRIVATE_CALLBACKS": "true", "DELIVERY_TIMEOUT": "60",
        "DELIVERY_RETRY_SCHEDULE": "3600",
    })  # fmt: skip
    with ThreadPoolExecutor(8) as threads:
        yield Resources(values, local.engine, redis_client, threads, desk=Desk(Room()))


@pytest.fixture
def deliver_to(held, serve):
    """`deliver_to(handler)`: a message of a build goes to it; the server, the message's row, its tries."""

    def deliver(handler, path="/hook", host="127.0.0.1", **more):
        server = serve(handler)
        url = f"http://{host}:{server.port}{path}"
        wanted = {"url": url, "signing": "hmac", **more}
        db.as_writer(held.engine, lambda write: subscribers.create(write, wanted, (KEY,), utc_now()))
        db.as_writer(held.engine, lambda write: builds.record(write, [github(State.QUEUED)], utc_now(), PACE))
        for _ in range(2):  # the second finds nothing to do, unless the first failed
            job.deliver(held)
        with db.reading(held.engine) as connection:
            (message,) = connection.execute(select(models.messages)).mappings()
            tries = connection.execute(select(models.delivery_attempts)).mappings().all()
            return server, message, tries

    return deliver


def going_on(answer, how):
    def handle(connection: Connection) -> None:
        if connection.read_request() is not None:
            connection.say(answer)
            how(connection)

    return handle


@pytest.mark.parametrize("kind", KINDS)
def test_a_2xx_status_line_is_one_sending_whatever_follows_it(deliver_to, monkeypatch, kind):
    answer, how, note = KINDS[kind]
    monkeypatch.setattr(deliveries, "REST_SECONDS", SHORT_SECONDS if note.startswith(LATE) else 60)
    server, message, tries = deliver_to(going_on(answer, how))
    assert len(server.asked) == 1
    assert (message["state"], message["attempts"]) == ("delivered", 1)
    (tried,) = tries
    assert (tried["status_code"] // 100, tried["reason"]) == (2, None)
    assert re.search(re.escape(note.removeprefix(LATE)), tried["note"]) if note else tried["note"] is None


def test_there_are_enough_kinds_of_them():
    assert len(KINDS) >= 27


@pytest.mark.parametrize(
    ("answer", "how", "status", "reason"),
    [
        (b"", close, None, "disconnected"),
        (b"", reset, None, "disconnected"),
        (b"HTTP/1.1 20", close, None, "disconnected"),
        (b"HTTP/1.1 103 Hints\r\n\r\n", close, None, "disconnected"),
        (b"HTTP/1.1 103 Hints\r\nLink: x", close, None, "disconnected"),
        (b"all of it\r\n", close, None, "protocol"),  # HTTP/0.9 had no status line
        (b"SSH-2.0-OpenSSH_9.2\r\n", stay, None, "protocol"),
        (b"http/1.1 200 OK\r\n\r\n", close, None, "protocol"),
        (b"HTTP/2 200\r\n\r\n", close, None, "protocol"),
        (b"HTTP/1.1 200OK\r\n\r\n", close, None, "protocol"),
        (b"HTTP/1.1 0200 OK\r\n\r\n", close, None, "protocol"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", close, None, "protocol"),
        (b"HTTP/1.1 banana\r\n\r\n", close, None, "protocol"),
        (b"\r\n" + OK, close, None, "protocol"),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", stay, None, "protocol"),
        (b"HTTP/1.1 ", flood(b"2" * 1000), None, "protocol"),
        (b"", flood(b"HTTP/1.1 103 Hints\r\nX: y\r\n\r\n"), None, "too_large"),
        (b"HTTP/1.1 300 Choose\r\nContent-Length: 0\r\n\r\n", stay, 300, "http_300"),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n", stay, 304, "http_304"),
        (b"HTTP/1.1 410 Gone\r\n", reset, 410, "http_410"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n\r\nfour", close, 500, "http_500"),
        (b"HTTP/1.1 999 No\r\nno colon\r\nContent-Length: 0\r\n\r\n", stay, 999, "http_999"),
    ],
)  # fmt: skip
def test_what_is_no_2xx_status_line_fails(deliver_to, answer, how, status, reason):
    _, message, tries = deliver_to(going_on(answer, how))
    assert message["state"] != "delivered"
    assert [(tried["status_code"], tried["reason"]) for tried in tries] == [(status, reason)]


@pytest.mark.parametrize("prefix", [b"", b"HTTP/1.1 200 O", b"HTTP/1.1 100 Continue\r\nX: "])
def test_without_a_status_line_in_time_it_is_a_time_out(serve, prefix):
    server = serve(going_on(prefix, drip(b"x")))
    error = failing(lambda: post(server.url, timeout_seconds=SHORT_SECONDS, rest_seconds=60))
    assert error.reason == "timeout"


def test_the_rest_never_takes_longer_than_the_deadline(serve):
    server = serve(going_on(LINE, drip(b"X: y\r\n")))
    reply = post(server.url, timeout_seconds=SHORT_SECONDS, rest_seconds=600)
    assert (reply.status, reply.note) == (200, "its header was not whole in time")


def test_a_429_slows_down_though_its_answer_breaks_off(deliver_to, held):
    answer = b"HTTP/1.1 429 Slow\r\nno colon\r\nRetry-After: 4000\r\nContent-Length: 10\r\n\r\nfour"
    _, _, (tried,) = deliver_to(once(answer))
    assert (tried["status_code"], tried["response"]) == (429, "four")
    assert "a header line without a colon; " in tried["note"]
    with db.reading(held.engine) as connection:
        slow = connection.execute(select(models.subscribers.c.slow_until)).scalar_one()
    assert (slow - tried["started_at"]).total_seconds() > 3900


def test_what_came_of_an_odd_answer_is_kept(deliver_to):
    _, _, (tried,) = deliver_to(once(CHUNKED + b"4\r\nfour\r\n4\r\nmo"))
    assert (tried["response"], tried["note"]) == ("fourmo", "the connection was closed within a chunk")


@pytest.mark.parametrize(
    "answer",
    [OK, CHUNKED + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: t\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"],
)
def test_the_connection_of_a_whole_answer_is_used_again(serve, answer):
    server = serve(answering(answer))
    for _ in range(3):
        assert post(server.url, rest_seconds=60).note is None
    assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nno colon\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n" + b"x" * 20000,
        OK + OK,
    ],
)
def test_the_connection_of_an_odd_answer_is_not_used_again(serve, answer):
    server = serve(answering(answer))
    for _ in range(2):
        assert post(server.url, rest_seconds=60).status == 200
    assert server.connections == 2


def test_a_ci_platform_must_still_answer_whole(serve):
    server = serve(once(LINE + b"Content-Length: 10\r\n\r\nfour"))
    assert failing(lambda: post(server.url)).reason == "disconnected"


def test_a_kept_connection_that_was_closed_is_replaced_and_the_message_sent_once(serve):
    closed = threading.Event()

    def handle(connection: Connection) -> None:
        connection.read_request()
        connection.say(OK)
        if connection.index == 0:
            connection.gone(60)  # the second request has come, and gets no answer
            closed.set()
        else:
            connection.gone(60)

    server = serve(handle)
    post(server.url, rest_seconds=60)
    assert post(server.url, rest_seconds=60).status == 200
    assert closed.is_set()
    assert (len(server.asked), server.connections) == (2, 2)


@given(
    st.sampled_from([b"", b"HTTP/1.1 ", LINE, CHUNKED, LINE + b"Content-Length: 5\r\n\r\n"]),
    st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(
        [b"\r\n", b"\n", b":", b"200", b"HTTP/1.1", b" ", b"5", b"-", b";", b"Content-Length", b"chunked", b"\0"]
    )).map(b"".join)),
    st.integers(1, 50),
)  # fmt: skip
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_break_the_reading(prefix, data, piece):
    whole = prefix + data
    pieces = iter([whole[at : at + piece] for at in range(0, len(whole), piece)])
    try:
        answer = answers.read(lambda: next(pieces, b""), lambda: None, 1000)
    except (answers.NoStatusLine, ConnectionAbortedError):
        assert not prefix.startswith(LINE)
    else:
        assert 200 <= answer.status <= 999
        assert len(answer.body) <= 1000
        assert not (answer.keep and answer.odd)


# Redirects


def redirecting(location, status=302):
    head = f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
    return answering(head.encode())


@pytest.mark.parametrize(
    ("location", "note"),
    [
        ("https://example.com/new", "redirects to https://example.com/new"),
        ("/login?back=%2Fhook%2Fs3cr3t", "redirects to http://127.0.0.1:PORT/login?…"),
        ("//user:pw@example.com/#x", "redirects to http://example.com/"),
        ("https://example.com/hook/T-secret-of-the-url/", "redirects to https://example.com/hook/***/"),
        ("https://example.com/of-the-header", "redirects to https://example.com/***"),
        ("https://example.com/ghp_abcdefghijklmnopqrstuvwxyz0123", "redirects to https://example.com/***"),
        ("https://example.com/a\x1b[31m\tb\x7f", "redirects to https://example.com/a[31mb"),
        ("https://[::1/x", "redirects to an address that can't be read"),
        ("https://example.com/" + "a/" * 900, "redirects to https://example.com/" + "a/" * 90),
    ],
)
def test_an_attempt_shows_where_a_redirect_leads(deliver_to, location, note):
    path = "/hook/T-secret-of-the-url?key=own"
    headers = {"Authorization": "Bearer of-the-header"}
    server, message, (tried,) = deliver_to(redirecting(location), path, headers=headers)
    assert (message["state"], tried["reason"]) == ("pending", "http_302")
    assert tried["note"] == note.replace("PORT", str(server.port))


def test_an_answer_that_echoes_the_url_shows_no_secret_of_it(deliver_to):
    path = "/services/T0123/B-of-the-workspace/hush-hush-the-url?key=0123456789abcdefXY&v=2"
    echo = f"no_team at {path}: hush-hush-the-url, 0123456789abcdefXY, services".encode()
    head = f"HTTP/1.1 404 Not Found\r\nContent-Length: {len(echo)}\r\n\r\n".encode()
    _, _, (tried,) = deliver_to(answering(head + echo), path)
    assert tried["response"] == "no_team at ***: ***, ***, services"


def test_a_redirect_is_shown_for_3xx_alone(deliver_to):
    _, _, (tried,) = deliver_to(redirecting("https://example.com/made", 201))
    assert (tried["status_code"], tried["note"]) == (201, None)


# What is sent


@pytest.mark.parametrize(
    ("written", "host"),
    [
        ("hook.test.", "hook.test"),
        ("b\xfccher.test", "xn--bcher-kva.test"),
        ("i\u2764.test", "xn--i-7iq.test"),
    ],
)
def test_a_name_is_kept_as_it_was_given_and_delivered_to(deliver_to, held, monkeypatch, written, host):
    resolver = resolving(**{host.replace(".", "_"): "127.0.0.1"})
    monkeypatch.setattr(outbound, "send", partial(outbound.send, resolver=resolver))
    server, message, _ = deliver_to(answering(OK), host=written)
    assert message["state"] == "delivered"
    assert [asked.headers["host"] for asked in server.asked] == [f"{host}:{server.port}"]
    with db.reading(held.engine) as connection:
        row = connection.execute(select(models.subscribers)).mappings().one()
    assert subscribers.callback_url(row, (KEY,)) == f"http://{written}:{server.port}/hook"


@pytest.mark.parametrize(("own", "sent"), [({}, "*/*"), ({"Accept": "application/json"}, "application/json")])
def test_any_kind_of_answer_is_accepted_unless_the_subscriber_says_otherwise(deliver_to, own, sent):
    server, _, _ = deliver_to(answering(OK), headers=own)
    (asked,) = server.asked
    assert asked.headers["accept"] == sent
    assert asked.raw_head.lower().count(b"\r\naccept:") == 1
