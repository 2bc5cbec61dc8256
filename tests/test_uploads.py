"""Bodies that come in pieces: how they are put together, what they may cost, and when their time is over."""

import socket
from http import HTTPStatus
from random import Random
from types import SimpleNamespace

import pytest
from gunicorn.http.unreader import SocketUnreader

from webhook_app.web import uploads
from webhook_app.web.uploads import BodyAwaited, BodyRefused, Budget, Chunks, Upload

MOST = 10_000_000


@pytest.fixture(autouse=True)
def budget(monkeypatch):
    """The budget of these tests, and proof that it is given back."""
    made = Budget(MOST)
    monkeypatch.setattr(uploads, "IN_FLIGHT", made)
    return made


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def upload(sock, length, expects=False, must_close=False):
    request = SimpleNamespace(must_close=must_close, _expected_100_continue=expects)
    return Upload(request, SocketUnreader(sock), length, since=100.0), request


def decode(raw, cuts):
    chunks, pieces, rest = Chunks(), [], b""
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        found, more = chunks.feed(raw[start:end])
        pieces += found
        rest += more
    return b"".join(pieces), rest, chunks.done


def test_a_chunked_body_is_the_same_however_it_is_cut():
    chance = Random(5)
    for _ in range(300):
        body = [chance.randbytes(chance.randint(1, 40)) for _ in range(chance.randint(0, 9))]
        extension = chance.choice([b"", b";a=b", b' ; q="x"'])
        raw = b"".join(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in body)
        raw += b"0\r\n" + chance.choice([b"", b"A: b\r\nC: d\r\n"]) + b"\r\n"
        behind = chance.choice([b"", b"POST / HTTP/1.1\r\n\r\n", b"\r\n"])
        whole = raw + behind
        cuts = sorted(chance.sample(range(1, len(whole)), min(len(whole) - 1, chance.randint(0, 12))))
        assert decode(whole, cuts) == (b"".join(body), behind, True)
        assert not decode(raw[:-1], [])[2]


@pytest.mark.parametrize(
    "raw",
    [
        b"zz\r\n", b"-1\r\n", b"0x1\r\na\r\n", b"+1\r\na\r\n", b" 1\r\na\r\n", b"1 \r\na\r\n", b"\r\n", b"1\na\n0\n\n",
        b"1\r\nab\r\n", b"1\r\na\n", b"100000000\r\n", b"1;a\rb\r\na\r\n", b"1;" + b"x" * 5000, b"5" * 5000,
        b"0\r\n" + b"A: b\r\n" * 5000, b"1\r\na\r\n" * 20_000,
    ],
)  # fmt: skip
def test_broken_chunks_are_refused(raw):
    with pytest.raises(BodyRefused) as refused:
        Chunks().feed(raw)
    assert refused.value.status == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_awaited_and_then_read_as_a_file(pair, budget, chunked):
    ours, theirs = pair
    body, behind = b"a line\nand another", b"GET / HTTP/1.1\r\n"
    raw = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    found, request = upload(ours, None if chunked else len(body))
    theirs.sendall(raw[:5])
    with pytest.raises(BodyAwaited):
        found.need(MOST)
    assert (found.is_over, found.failed, request.must_close) == (False, True, True)
    theirs.sendall(raw[5:] + behind)
    found.fill()
    found.need(MOST)
    assert (found.is_over, found.failed, request.must_close) == (True, False, False)
    assert (found.readline(), found.read(), found.getvalue()) == (b"a line\n", b"and another", body)
    rest = found._unreader.take_buffered()
    assert rest + (theirs.close() or ours.recv(100)) == behind
    found.release()
    assert budget.has_room(MOST)


def test_a_connection_that_was_to_be_closed_stays_so(pair):
    ours, theirs = pair
    found, request = upload(ours, 1, must_close=True)
    theirs.sendall(b"x")
    found.need(MOST)
    assert request.must_close


def test_what_is_too_large_is_refused_before_it_comes_or_when_it_does(pair, budget):
    ours, theirs = pair
    with pytest.raises(BodyRefused) as refused:
        upload(ours, 11)[0].need(10)
    assert refused.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    theirs.sendall(b"5\r\nabcde\r\n6\r\nabcdef\r\n")
    with pytest.raises(BodyRefused) as refused:
        upload(ours, None)[0].need(10)
    assert refused.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    assert budget.has_room(MOST)


def test_a_sender_that_hangs_up_is_not_waited_for(pair):
    ours, theirs = pair
    theirs.sendall(b"abc")
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(BodyRefused) as refused:
        upload(ours, 5)[0].need(MOST)
    assert refused.value.status == HTTPStatus.BAD_REQUEST


def test_over_the_budget_a_body_is_refused_and_its_bytes_are_free(pair, budget):
    ours, theirs = pair
    budget.most = 1000
    assert budget.take(990)
    theirs.sendall(b"1F4\r\n" + b"x" * 500 + b"\r\n")
    found, _ = upload(ours, None)
    with pytest.raises(BodyAwaited):
        found.need(MOST)
    found.fill()
    with pytest.raises(BodyRefused) as refused:
        found.need(MOST)
    assert refused.value.status == HTTPStatus.SERVICE_UNAVAILABLE
    assert int(refused.value.headers["Retry-After"]) > 0
    assert budget.take(10)


@pytest.mark.parametrize(
    ("size", "seconds", "late"),
    [
        (0, 9.9, False),
        (0, 10.1, True),
        (256 * 1024, 10 + 15.9, False),
        (256 * 1024, 10 + 16.1, True),
        (5_000_000, 59.9, False),
        (5_000_000, 60.1, True),
    ],
    ids=["the grace", "nothing came", "just fast enough", "too slow", "within the time for all", "after it"],
)
def test_a_body_has_a_least_rate_and_a_total_time(pair, size, seconds, late):
    ours, theirs = pair
    found, _ = upload(ours, MOST)
    left = size
    while left:
        left -= theirs.send(b"x" * min(left, 65536))
        found.fill()
    assert found.end_if_late(100.0 + seconds) == late
    if late:
        with pytest.raises(BodyRefused) as refused:
            found.need(MOST)
        assert refused.value.status == HTTPStatus.REQUEST_TIMEOUT


def test_the_slowest_gives_way_and_among_new_ones_the_newest(pair):
    ours, theirs = pair
    slow, fast, new, newer = (upload(ours, MOST)[0] for _ in range(4))
    for one, size in ((slow, 1000), (fast, 5000), (new, 10), (newer, 10)):
        theirs.sendall(b"x" * size)
        one.fill()
    new.since, newer.since = 109.5, 109.7
    assert sorted([new, fast, newer, slow], key=lambda one: one.rank(110.0)) == [slow, fast, newer, new]
