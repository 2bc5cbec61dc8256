"""Unsigned senders that would hold threads, seats or memory of a web process; signed pushes go on beside them.

Each test holds all attackers at once, pushes, and then looks whether they still hold on: so no push was
answered only because an attacker's time was over.
"""

import json
import re
import resource
import selectors
import shutil
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import hub
from tests.test_hooks import ADMIN, GITHUB, Server, answer_in, is_silent, run, signed_push
from webhook_app import signing
from webhook_app.web.worker import COLLECTING_SECONDS

MIB = 1024 * 1024
PUSHES = 10
KEEP_ALIVE_SECONDS = 95
"""The default: so long nobody was accepted."""
FORGED = b"X-Hub-Signature-256: sha256=" + b"0" * 64 + b"\r\n"
HEAD = b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture
def server(redis_url, migrated_sqlite, tmp_path, wait_until):
    shutil.copy(migrated_sqlite, tmp_path / "store.db")
    made = Server(f"sqlite:///{tmp_path / 'store.db'}", redis_url, tmp_path, wait_until)
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def many_files():
    """Each attacker is a socket of this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def connections():
    """`connections(count)`: as many, all open until the test ends."""
    with ExitStack() as stack:
        yield lambda server, count: [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            for _ in range(count)
        ]


def peak_mib(server):
    """The most memory that the web process had so far."""
    (worker,) = hub.children(server.process.pid)
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{worker.pid}/status").read_text())[1]) / 1024


def push(server, run_id):
    """A signed push on a connection of its own; how many seconds its answer took."""
    began = time.monotonic()
    body = json.dumps(run(run_id=run_id)).encode()
    head = HEAD + b"X-GitHub-Event: workflow_run\r\nX-GitHub-Delivery: p-%d\r\n" % run_id
    head += b"X-Hub-Signature-256: %s\r\n" % signing.github_signature(GITHUB, body).encode()
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection,
        connection.makefile("rb") as answers,
    ):
        connection.sendall(head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        status, answer = answer_in(answers)
        assert (status, answer["status"]) == (b"202", "accepted")
    return time.monotonic() - began


def test_two_hundred_that_announce_a_body_and_send_none(server, connections):
    attackers = connections(server, 200)
    for attacker in attackers:
        attacker.sendall(HEAD + FORGED + b"Expect: 100-continue\r\nContent-Length: 200\r\n\r\n")
    for attacker in attackers:
        assert attacker.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    seconds = [push(server, n) for n in range(1, PUSHES + 1)]
    assert all(map(is_silent, attackers)), "nobody had to be cut for that"
    print("worst push", max(seconds))


@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "chunked"])
def test_a_hundred_that_drip_large_bodies(server, connections, chunked):
    attackers = connections(server, 100)
    framing = b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: %d\r\n\r\n" % (25 * MIB)
    piece = b"x" * 65536
    piece = b"10000\r\n%s\r\n" % piece if chunked else piece
    for attacker in attackers:
        attacker.sendall(HEAD + FORGED + framing + 5 * piece)
    seconds = []
    for n in range(1, PUSHES + 1):
        for attacker in attackers[n - 1 :: PUSHES]:
            attacker.sendall(piece)
        seconds.append(push(server, n))
    assert all(map(is_silent, attackers)), "nobody had to be cut for that"
    print("worst push", max(seconds))


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHo",
        HEAD + b"Content-Length: 9\r\n\r\n{",
        HEAD + FORGED + b"Content-Length: 9999999\r\n\r\n{",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["silent", "half a head", "half a body", "a large body", "idle between two requests"],
)
def test_three_thousand_connections_that_take_every_seat(server, connections, many_files, begun):
    began = time.monotonic()
    attackers = []
    for _ in range(min(3000, many_files - 1000)):
        attackers += connections(server, 1)
        attackers[-1].sendall(begun)
    connected = time.monotonic()
    seconds = [push(server, n) for n in range(1, PUSHES + 1)]
    assert max(seconds) < COLLECTING_SECONDS, "a push waited until the attackers' time was over"
    assert server.answers()
    print("connected in", connected - began, "worst push", max(seconds))


def flood(server, head, body, count):
    """`count` requests at once, each as fast as it is read; gives the first line and all of each answer."""
    selector = selectors.DefaultSelector()
    answers = {}
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE, [memoryview(head + body)])
    while selector.get_map():
        for key, events in selector.select(1):
            left = key.data
            try:
                if events & selectors.EVENT_READ:
                    answers[key.fileobj] = key.fileobj.recv(65536)
                elif left[0]:
                    left[0] = left[0][key.fileobj.send(left[0][:MIB]) :]
                if not left[0]:
                    selector.modify(key.fileobj, selectors.EVENT_READ, left)
            except ConnectionError:
                answers.setdefault(key.fileobj, b"")
            if key.fileobj in answers:
                selector.unregister(key.fileobj)
                key.fileobj.close()
    return list(answers.values())


def test_more_connections_than_seats_that_were_answered_once_make_room(server, connections, many_files):
    """All seats were with threads when the last one came: nothing could be dropped, and nobody was accepted."""
    count = min(1500, many_files - 1000)
    held = connections(server, count)
    for connection in held:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert push(server, 1) < KEEP_ALIVE_SECONDS / 2


@pytest.mark.parametrize(
    ("proof", "path"),
    [(b"", b"/webhooks/github"), (FORGED, b"/webhooks/github"), (b"", b"/api/builds")],
    ids=["unsigned", "forged", "the API"],
)
def test_sixty_four_bodies_of_25_mib(server, proof, path):
    push(server, 1)
    body = b"x" * 25 * MIB
    head = HEAD.replace(b"/webhooks/github", path) + proof + b"Content-Length: %d\r\n\r\n" % len(body)
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(flood(server, head, body, 64)))
    thread.start()
    seconds = [push(server, 2)]
    while thread.is_alive():
        seconds.append(push(server, len(seconds) + 2))
    thread.join()
    allowed = {b"401": 0, b"503": 0, b"413": 0}
    for answer in answers:
        assert not answer or answer[9:12] in allowed
        assert answer[9:12] != b"503" or b"\r\nRetry-After: " in answer
    peak = peak_mib(server)
    print(len(seconds), "pushes, worst", max(seconds), "peak MiB", peak, [a[9:12] for a in answers])
    assert peak < 250


def test_a_flood_after_large_signed_pushes_takes_no_more_memory(server):
    """Once a large buffer was freed, the C library would keep others of that size, and in each thread's arena."""
    body = json.dumps(run() | {"padding": "x" * (20 * MIB)}).encode()
    assert server.github(body, "large").json()["status"] == "accepted"
    flooding = HEAD + FORGED + b"Content-Length: %d\r\n\r\n" % (25 * MIB)
    for _ in range(2):
        flood(server, flooding, b"x" * 25 * MIB, 64)
    assert peak_mib(server) < 250


def test_a_signed_body_of_25_mib_is_taken_beside_a_flood_that_is_not(server):
    body = json.dumps(run() | {"padding": "x" * (25 * MIB - 2000)}).encode()
    assert server.github(body, "large").json()["status"] == "accepted"
    print("peak MiB", peak_mib(server))


def test_a_request_behind_another_holds_no_thread_either(server, connections):
    """What gunicorn has read beyond the end of a request is the beginning of the next one."""
    attackers = connections(server, 100)
    for attacker in attackers:
        attacker.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + HEAD + b"Content-Length: 99\r\n\r\n{")
        with attacker.makefile("rb") as answers:
            assert answer_in(answers)[0] == b"200"
    for n in range(1, PUSHES + 1):
        push(server, n)
    assert all(map(is_silent, attackers)), "nobody had to be cut for that"


def test_what_looks_like_the_end_of_a_chunked_body_holds_no_thread(server, connections):
    attackers = connections(server, 100)
    for attacker in attackers:
        attacker.sendall(HEAD + FORGED + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{}\r\n\r\n")
    for n in range(1, PUSHES + 1):
        push(server, n)
    assert all(map(is_silent, attackers)), "nobody had to be cut for that"


def test_a_large_body_without_a_signature_is_refused_before_it_is_read(server):
    head, _ = signed_push()
    unsigned = re.sub(rb"X-Hub-[^\r]*\r\n", b"", head)
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection,
        connection.makefile("rb") as answers,
    ):
        connection.sendall(unsigned + b"Content-Length: %d\r\n\r\n" % MIB)
        status, answer = answer_in(answers)
        small = server.post("/webhooks/github", b"{}", {"Content-Type": "application/json"})
        assert (status, answer) == (b"401", small.json())
        assert answers.read() == b"", "it is closed: what follows is no request"


@pytest.fixture
def slow_readers(server):
    """`slow_readers(count, request)`: connections with little room for answers, that read nothing."""
    with ExitStack() as stack:

        def connect(count, request):
            found = []
            for _ in range(count):
                connection = stack.enter_context(socket.socket())
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
                connection.settimeout(60)
                connection.connect(("127.0.0.1", server.port))
                connection.sendall(request)
                found.append(connection)
            return found

        yield connect


def read_to_its_end(connection):
    """All that comes until the other end closes."""
    pieces = []
    while piece := connection.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def peers(server):
    """The ports of those that the server is connected with, in both directions."""
    rows = (row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:])
    ours = f":{server.port:04X}"
    return {
        int(theirs[-4:], 16) for _, here, theirs, state, *_ in rows if here.endswith(ours) and state == "01"
    }


def unread_bytes(server):
    """What the kernel holds for those that do not read, all together."""
    rows = (row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(int(row[4][:8], 16) for row in rows if row[1].endswith(f":{server.port:04X}"))


def test_forty_that_read_no_answer_hold_no_thread(server, slow_readers, wait_until):
    """Each asks for more than the buffers on the way hold; nothing of it is lost if they read it after all."""
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    whole = server.http.get(f"{server.base}/openapi.json", timeout=60).content
    attackers = slow_readers(40, ask * 60 + last)
    seen = [0]

    def is_full():
        time.sleep(0.2)
        seen.append(unread_bytes(server))
        return seen[-1] > 0 and len(set(seen[-5:])) == 1

    wait_until(is_full, 60)
    push(server, 1)
    held = {attacker.getsockname()[1] for attacker in attackers}
    # A thread for each would have been free only when 24 of them had been cut; a slow machine cuts some by then.
    assert len(held & peers(server)) > len(attackers) - 24
    for n in range(2, PUSHES + 1):
        push(server, n)
    (reader,) = slow_readers(1, ask * 60 + last)
    assert read_to_its_end(reader).count(whole) == 60
    assert peak_mib(server) < 250


def test_an_answer_that_nobody_reads_is_cut(server, slow_readers, wait_until):
    (connection,) = slow_readers(1, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 60)
    port = connection.getsockname()[1]
    assert port in peers(server)
    wait_until(lambda: port not in peers(server), 60)


@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "chunked"])
def test_bodies_of_api_requests_are_read_up_to_a_mebibyte(server, chunked):
    """None of them is valid, so that the answer shows whether the body was read."""

    def post(size):
        body = b'{"name": "' + b"x" * size + b'"}'
        headers = {"Authorization": f"Bearer {ADMIN.decode()}", "Content-Type": "application/json"}
        pieces = [body[at : at + 50_000] for at in range(0, len(body), 50_000)]
        return server.post("/api/tokens", iter(pieces) if chunked else body, headers)

    assert [post(size).status_code for size in (100, 300_000, 1_000_000)] == [422] * 3
    assert post(2 * MIB).status_code == 413


@pytest.mark.parametrize("size", [10, 100_000, 3 * MIB])
@pytest.mark.parametrize("framing", ["Content-Length", "Transfer-Encoding"])
def test_curl_announces_its_body_and_is_answered(server, tmp_path, size, framing):
    body = json.dumps(run() | {"padding": "x" * size}).encode()
    (tmp_path / "body").write_bytes(body)
    fields = {
        "Content-Type": "application/json",
        "X-GitHub-Event": "workflow_run",
        "X-Hub-Signature-256": signing.github_signature(GITHUB, body),
        "Expect": "100-continue",
    } | ({"Transfer-Encoding": "chunked"} if framing == "Transfer-Encoding" else {})
    argv = [
        "curl",
        "-sS",
        "-m",
        "60",
        "--data-binary",
        f"@{tmp_path / 'body'}",
        f"{server.base}/webhooks/github",
    ]
    for name, value in fields.items():
        argv += ["-H", f"{name}: {value}"]
    done = subprocess.run(argv, capture_output=True, check=True)
    assert json.loads(done.stdout)["status"] == "accepted"
