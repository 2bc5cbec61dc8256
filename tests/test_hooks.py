"""Reception by a real web server: every row of the table of answers, and input nobody should send."""

import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from random import Random

import pytest
import requests
from sqlalchemy import delete, func, select

from tests import postgres
from webhook_app import db, models, signing
from webhook_app.supervisor import tied_to_parent
from webhook_app.web.arrivals import COLLECTED_BYTES, wanted

ADMIN = b"bootstrap-token-of-these-tests"
GITHUB, GITLAB, JENKINS, SCRIPT = (
    "github secret of these tests",
    "whsec_" + "c2VjcmV0IG9mIHRoZSBnaXRsYWIgaG9vaw==",
    "jenkins secret of these tests",
    "script token of these tests",
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A gunicorn process on a store of its own."""

    def __init__(self, url, redis_url, directory, wait_until):
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.engine = db.connect(url)
        env = os.environ | {
            "DATABASE_URL": url,
            "REDIS_URL": redis_url,
            "BUILDRELAY_DATA_DIR": str(directory),
            "BUILDRELAY_BIND": f"127.0.0.1:{self.port}",
            "WEB_CONCURRENCY": "1",
            "GITHUB_WEBHOOK_SECRET": f"an older secret of it,{GITHUB}",
            "GITLAB_WEBHOOK_SECRET": GITLAB,
            "JENKINS_WEBHOOK_SECRET": JENKINS,
            "BUILD_EVENT_TOKEN": SCRIPT,
            "ADMIN_TOKEN": ADMIN.decode(),
        }
        argv = [sys.executable, "-m", "gunicorn", "--config", "python:webhook_app.gunicorn_conf", "wsgi:app"]
        self.process = subprocess.Popen(argv, env=env, preexec_fn=tied_to_parent())
        self.http = requests.Session()
        wait_until(self.answers)

    def answers(self):
        assert self.process.poll() is None
        try:
            return self.http.get(f"{self.base}/healthz", timeout=60).status_code == 200
        except requests.ConnectionError:
            return False

    def stop(self):
        self.http.close()
        self.process.terminate()
        self.process.wait(60)
        self.engine.dispose()

    def post(self, path, body, headers):
        return self.http.post(self.base + path, data=body, headers=headers, timeout=60)

    def github(self, content, delivery="d-1", event="workflow_run", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        sent = {
            "Content-Type": "application/json",
            "X-GitHub-Event": event,
            "X-GitHub-Delivery": delivery,
            "X-Hub-Signature-256": signing.github_signature(GITHUB, body),
        } | {name.replace("_", "-"): value for name, value in headers.items()}
        return self.post("/webhooks/github", body, sent)

    def count(self, table):
        with db.reading(self.engine) as connection:
            return connection.execute(select(func.count()).select_from(table)).scalar()

    def inbound(self):
        with db.reading(self.engine) as connection:
            return connection.execute(select(models.inbound).order_by(models.inbound.c.id)).mappings().all()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def one_server(request, redis_url, tmp_path_factory, wait_until):
    directory = tmp_path_factory.mktemp("server")
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_sqlite"), directory / "store.db")
        made = Server(f"sqlite:///{directory / 'store.db'}", redis_url, directory, wait_until)
        yield made
        made.stop()
        return
    server, template = (request.getfixturevalue(name) for name in ("postgres_url", "migrated_postgres"))
    with postgres.fresh_database(server, template) as url:
        made = Server(url, redis_url, directory, wait_until)
        yield made
        made.stop()


@pytest.fixture
def server(one_server):
    """The module's server, with an empty store."""

    def empty(connection):
        for table in reversed(models.metadata.sorted_tables):
            if table is not models.counters:
                connection.execute(delete(table))

    db.in_transaction(one_server.engine, empty)
    return one_server


def run(state="in_progress", conclusion=None, run_id=7, **more):
    return {
        "action": "whatever",
        "workflow_run": {
            "id": run_id,
            "name": "CI",
            "run_number": 1,
            "run_attempt": 1,
            "status": state,
            "conclusion": conclusion,
            "created_at": "2026-11-01T10:00:00Z",
            "updated_at": "2026-11-01T10:00:01Z",
            "run_started_at": "2026-11-01T10:00:00Z",
            "check_suite_id": 70,
            "head_branch": "main",
            "head_sha": "c0ffee",
        }
        | more,
        "repository": {"full_name": "Octo/Repo"},
    }


def test_the_table_of_answers(server):
    accepted = server.github(run())
    assert (accepted.status_code, accepted.json()) == (
        202,
        {"status": "accepted", "build_id": "github:Octo:Repo:7", "delivery_id": "d-1"},
    )
    again = server.github(run())
    assert (again.status_code, again.json()["status"]) == (202, "duplicate")
    assert again.json()["build_id"] == "github:Octo:Repo:7"
    ignored = server.github({"zen": "x"}, "d-2", "star")
    assert (ignored.status_code, ignored.json()["status"]) == (202, "ignored")
    assert "star" in ignored.json()["reason"]
    pong = server.github({"zen": "x", "hook_id": 1}, "d-3", "ping")
    assert (pong.status_code, pong.json()) == (200, {"status": "pong"})
    unreadable = server.github({"workflow_run": {"id": "x"}}, "d-4")
    assert (unreadable.status_code, unreadable.json()["status"]) == (202, "unreadable")
    assert server.github(b"{not json", "d-5").status_code == 400
    assert server.github(run(), "d-6", Content_Type="text/plain").status_code == 415
    assert server.post("/webhooks/nobody", b"{}", {"Content-Type": "application/json"}).status_code == 404
    kept = [(row["delivery_id"], row["status"]) for row in server.inbound()]
    assert kept == [("d-1", "applied"), ("d-2", "ignored"), ("d-4", "unreadable")]
    assert zlib.decompress(server.inbound()[0]["body"]) == json.dumps(run()).encode()


def test_every_wrong_signature_gets_the_same_answer(server):
    good = signing.github_signature(GITHUB, json.dumps(run()).encode())
    wrong = ["", "sha256=", "sha256=" + "0" * 64, good.upper(), good[:-1], "sha1=" + "0" * 40, "ü" * 71]
    replies = [
        server.github(run(), X_Hub_Signature_256=value.encode("latin-1").decode("latin-1")) for value in wrong
    ]
    assert {reply.status_code for reply in replies} == {401}
    assert len({reply.content for reply in replies}) == 1
    assert replies[0].headers["Content-Type"] == "application/problem+json"
    assert server.count(models.inbound) == 0


def test_an_unreadable_delivery_has_a_second_chance(server):
    assert server.github({"workflow_run": {"id": "x"}}, "d-1").json()["status"] == "unreadable"
    assert server.github(run(), "d-1").json()["status"] == "accepted"
    assert [row["status"] for row in server.inbound()] == ["applied"]


def test_one_guid_serves_several_hooks(server):
    assert server.github(run("in_progress"), "g", X_GitHub_Hook_ID="1").json()["status"] == "accepted"
    assert server.github(run("in_progress"), "g", X_GitHub_Hook_ID="2").json()["status"] == "accepted"
    assert server.github(run("in_progress"), "g", X_GitHub_Hook_ID="2").json()["status"] == "duplicate"
    assert server.count(models.events) == 1


def test_an_endless_delivery_id_is_as_good_as_any(server):
    endless = os.urandom(3500).hex()
    for delivery, status in ((endless, "accepted"), (endless, "duplicate"), (endless[:-1], "accepted")):
        reply = server.github(run(), delivery)
        assert (reply.status_code, reply.json()["status"]) == (202, status)


def test_the_longest_names_of_the_widest_characters_are_stored(server):
    chance = Random(1)
    repo, branch, origin = ("".join(chr(chance.randint(0x1F300, 0x1FAFF)) for _ in range(300)) for _ in "rbo")
    report = {"runId": "wide", "event": "build_started", "repo": repo, "branch": branch, "origin": origin}
    headers = {"Content-Type": "application/json", "X-Build-Token": SCRIPT}
    reply = server.post("/api/internal/build-events", json.dumps(report).encode(), headers)
    assert (reply.status_code, reply.json()) == (202, reply.json() | {"status": "accepted"})
    with db.reading(server.engine) as connection:
        columns = models.builds.c
        row = connection.execute(select(columns.repository, columns.branch, columns.workflow)).one()
    for stored, told in zip(row, (repo, branch, origin), strict=True):
        assert told.startswith(stored)
        assert len(stored) > 150


def test_the_older_names_and_the_other_platforms(server):
    body = json.dumps(run()).encode()
    headers = {
        "Content-Type": "application/json; charset=utf-8",
        "X-GitHub-Event": "workflow_run",
        "X-Hub-Signature-256": signing.github_signature(GITHUB, body),
    }
    assert server.post("/api/webhook/github-actions", body, headers).json()["status"] == "accepted"
    pipeline = json.dumps(
        {
            "object_kind": "pipeline",
            "object_attributes": {"id": 31, "status": "success", "created_at": "2026-11-01 10:00:00 UTC"},
            "project": {"id": 1, "path_with_namespace": "g/p"},
            "builds": [],
        }
    ).encode()
    now = int(time.time())
    signed = {
        "Content-Type": "application/json",
        "X-Gitlab-Event": "Pipeline Hook",
        "webhook-id": "m1",
        "webhook-timestamp": str(now),
        "webhook-signature": signing.sign_v1(GITLAB, "m1", now, pipeline),
    }
    assert server.post("/webhooks/gitlab", pipeline, signed).json()["build_id"] == "gitlab:1:31"
    unsigned = {name: value for name, value in signed.items() if name != "webhook-signature"}
    assert server.post("/webhooks/gitlab", pipeline, unsigned | {"X-Gitlab-Token": GITLAB}).status_code == 401
    old = signed | {
        "webhook-timestamp": str(now - 301),
        "webhook-signature": signing.sign_v1(GITLAB, "m1", now - 301, pipeline),
    }
    assert server.post("/webhooks/gitlab", pipeline, old).status_code == 401
    jenkins = json.dumps(
        {"name": "web", "build": {"number": 3, "phase": "STARTED", "url": "job/team/job/web/3/"}}
    ).encode()
    told = {"Content-Type": "application/json;charset=UTF-8", "X-Build-Token": JENKINS}
    for path in ("/webhooks/jenkins", "/api/webhook/jenkins"):
        assert server.post(path, jenkins, told).json()["build_id"] == "jenkins:team:web:3"
    report = json.dumps({"runId": "u-1", "event": "build_started"}).encode()
    for name in ("X-Build-Token", "X-OM-BUILD-TOKEN"):
        reply = server.post(
            "/api/internal/build-events", report, {"Content-Type": "application/json", name: SCRIPT}
        )
        assert (reply.status_code, reply.json()["build_id"]) == (202, "script:u-1")


@pytest.mark.parametrize(
    ("case", "status"),
    [
        (b'{"a":1,"a":2}', 202),  # duplicate keys: readable, but no run in it
        (
            b"[" * 100_000 + b"]" * 100_000,
            202,
        ),  # JSON, but none we can read: a 4xx makes GitLab mute the hook
        (b'{"workflow_run":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 202),
        (b"", 400),
        (b"null", 202),
        (b"[]", 202),
        (b'"text"', 202),
        (b"\xff\xfe{}", 400),
        (b'{"a": NaN}', 400),
        (b'{"workflow_run": 5}', 202),
    ],
)
def test_odd_bodies(server, case, status):
    reply = server.github(case)
    assert reply.status_code == status
    if status == 202:
        assert reply.json()["status"] == "unreadable"


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": 2**63},
        {"run_id": 10**400},
        {"run_id": -1},
        {"run_id": 7.5},
        {"run_id": True},
        {"state": "x" * 100_000},
        {"state": None},
        {"head_branch": "nul \0 and \ud800 surrogate"},
        {"head_branch": "x" * 1_000_000},
        {"run_attempt": 2**80},
        {"run_number": 2**80},
        {"updated_at": "9999-99-99T99:99:99Z"},
        {"updated_at": "0001-01-01T00:00:00+23:59"},
        {"updated_at": "9999-12-31T23:59:59-23:59"},
        {"html_url": "javascript:alert(1)"},
        {"name": {"not": "text"}},
        {"check_suite_id": "not a number"},
    ],
)
def test_odd_values_lose_nothing_and_break_nothing(server, change):
    reply = server.github(run(**change))
    assert reply.status_code == 202
    assert reply.json()["status"] in ("accepted", "unreadable")
    assert server.count(models.inbound) == 1
    assert server.github(run("completed", "success", run_id=99), "after").json()["status"] == "accepted"


def test_too_large_and_compressed_bodies(server):
    large = b'{"a":"' + b"x" * (25 * 1024 * 1024) + b'"}'
    assert server.github(large).status_code == 413
    body = json.dumps(run()).encode()
    zipped = gzip.compress(body)
    reply = server.github(zipped, Content_Encoding="gzip")
    assert reply.status_code == 415
    assert server.count(models.inbound) == 0


def test_a_form_of_megabytes_is_read(server):
    from urllib.parse import urlencode

    content = run() | {"padding": "x" * 2_000_000}
    body = urlencode({"payload": json.dumps(content)}).encode()
    reply = server.github(body, Content_Type="application/x-www-form-urlencoded")
    assert reply.json()["status"] == "accepted"


def test_a_chunked_body_without_length(server):
    body = json.dumps(run()).encode()
    headers = {
        "Content-Type": "application/json",
        "X-GitHub-Event": "workflow_run",
        "X-GitHub-Delivery": "chunked",
        "X-Hub-Signature-256": signing.github_signature(GITHUB, body),
    }
    pieces = (body[i : i + 100] for i in range(0, len(body), 100))
    reply = server.http.post(f"{server.base}/webhooks/github", data=pieces, headers=headers, timeout=60)
    assert reply.json()["status"] == "accepted"


def raw(server, request, pieces=()):
    """Send bytes as they are; the status line of the answer (empty if the server just hangs up)."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(request)
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        try:
            return connection.recv(65536).partition(b"\r\n")[0]
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize(
    "head",
    [
        b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nX-Hub-Signature-256: sha256=\xfc\xfc\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nX-GitHub-Delivery: " + b"x" * 20_000 + b"\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(2000)) + b"\r\n",
        b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\nContent-Type: application/json\r\n\r\n",
        b"POST /webhooks/git%00hub HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"POST /webhooks/%ff%fe HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\nzz\r\n",
        b"POST /api/tokens HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + ADMIN + b"\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\nzz\r\n",
        b"POST /api/tokens HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + ADMIN + b"\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n2\r\n{",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)  # fmt: skip
def test_odd_requests_get_no_500(server, head):
    status = raw(server, head)
    assert not status.startswith((b"HTTP/1.1 5", b"HTTP/1.1 2"))
    assert server.answers()


def test_senders_that_stop_half_way_are_cut_even_if_they_hold_every_thread(server):
    """With as many connections as there are threads nobody else would be served until they end."""
    head = b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body = head + b"Content-Length: 100000\r\n\r\n{"
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(40)]
    try:
        for connection, half in zip(slow, [head, body] * 20, strict=True):
            connection.sendall(half)
        assert server.github(run()).json()["status"] == "accepted"
        for connection in slow:
            answer = connection.recv(65536).partition(b"\r\n")[0]
            assert not answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 5")), (
                "the others still hold on: none is forgotten"
            )
    finally:
        for connection in slow:
            connection.close()


@pytest.mark.parametrize("one_server", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("fields", "length"), [(["Expect: 100-continue"], 1000), ([], 1_000_000)], ids=["told to go on", "large"]
)
def test_a_sender_that_stops_in_its_body_is_answered_408(server, fields, length):
    head, _ = signed_push(*fields)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n{" % length)
        said = b""
        while piece := connection.recv(65536):
            said += piece
    assert said.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").startswith(b"HTTP/1.1 408 ")


def test_without_a_signature_nobody_is_told_to_go_on(server):
    head = b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = raw(server, head + b"Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 401 ")


FORGED = (
    b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"X-Hub-Signature-256: sha256=" + b"0" * 64 + b"\r\n"
)
"""The head of a push whose signature is found to be wrong only when its body is here."""


@pytest.mark.parametrize(
    ("begun", "missing"),
    [
        (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
        (b"GET /healthz HTTP/1.1\r\nHo", b"st: x\r\n\r\n"),
        (b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", b"12345678"),
        (FORGED + b"Content-Length: 200000\r\n\r\n", b"x" * 200_000),
        (FORGED + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", b"cde\r\n0\r\n\r\n"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X-A: " + b"x" * 9_000 + b"\r\n", (b"X-A: " + b"x" * 9_000 + b"\r\n") * 5 + b"\r\n"),
    ],
    ids=["nothing", "half a head", "half a body", "a large body", "half a chunk", "a large head"],
)  # fmt: skip
def test_many_senders_that_take_their_time_hold_no_thread(server, begun, missing):
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
            for _ in range(200)
        ]
        for connection in slow:
            connection.sendall(begun)
        assert server.github(run()).json()["status"] == "accepted"
        assert all(map(is_silent, slow)), "nobody had to be cut for that"
        for connection in slow:
            connection.sendall(missing)
        answers = {connection.recv(12) for connection in slow}
    status = b"200" if b"GET" in begun + missing else b"401" if begun.startswith(FORGED) else b"415"
    assert answers == {b"HTTP/1.1 " + status}


@pytest.mark.parametrize("one_server", ["sqlite"], indirect=True)
def test_a_body_that_comes_too_slowly_is_told_so_and_not_that_its_signature_is_wrong(server):
    hook = FORGED
    api = b"POST /api/subscribers HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    token = b"Authorization: Bearer " + ADMIN + b"\r\n"
    begun = {
        "small": hook + b"Content-Length: 9\r\n\r\n{",
        "large": hook + b"Content-Length: 9000000\r\n\r\n" + b"x" * 300_000,
        "chunked": hook + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
        "told to go on": hook + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n{",
        "of the API": api + token + b"Content-Length: 900\r\n\r\n{",
    }
    with ExitStack() as stack:
        slow = {
            name: stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            for name in begun
        }
        for name, connection in slow.items():
            connection.sendall(begun[name])
        said = {name: b"".join(iter(partial(one.recv, 65536), b"")) for name, one in slow.items()}
    for name, answer in said.items():
        head, _, body = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 "), (name, answer)
        assert json.loads(body)["detail"].startswith("the body c")


@pytest.mark.parametrize("one_server", ["sqlite"], indirect=True)
def test_a_sender_that_hangs_up_was_not_too_slow(server):
    head = b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head + b"Content-Length: 9\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(12) == b"HTTP/1.1 401"


@pytest.mark.parametrize("one_server", ["sqlite"], indirect=True)
def test_each_answer_ends_with_a_newline(server):
    typed = {"Content-Type": "application/json"}
    replies = [
        server.github(run()),
        server.post("/webhooks/github", b"{}", typed),
        server.post("/webhooks/nobody", b"{}", typed),
        *(
            server.http.get(server.base + path, timeout=60)
            for path in ("/healthz", "/api/builds", "/nowhere")
        ),
    ]
    assert [reply.status_code for reply in replies] == [202, 401, 404, 200, 401, 404]
    assert all(reply.content.endswith(b"}\n") for reply in replies)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert b"".join(iter(partial(connection.recv, 65536), b"")).endswith(b"}\n")


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("seen", "more"),
    [
        (b"", 1), (HEAD, 1), (HEAD + b"\r", 1), (HEAD + b"\r\n", 0), (HEAD + b"Content-Length: 5\r\n\r\nab", 3),
        (HEAD + b"content-length:5\r\nA: b\r\n\r\nabcde", 0), (HEAD + b"Content-Length: 5\r\n\r\nabcdeGET /", 0),
        (HEAD + b"Content-Length: -5\r\n\r\n", 0), (HEAD + b"X-Content-Length: 5\r\n\r\n", 0),
        (HEAD + b"Content-Length: %d\r\n\r\na" % COLLECTED_BYTES, COLLECTED_BYTES - 1),
    ],
)  # fmt: skip
def test_how_much_of_a_request_is_waited_for(seen, more):
    assert wanted(seen) == len(seen) + more


@pytest.mark.parametrize(
    "seen",
    [
        HEAD + b"Content-Length: %d\r\n\r\n" % (COLLECTED_BYTES + 1),
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
        HEAD + b"EXPECT: 100-continue\r\nContent-Length: 5\r\n\r\n",
        b"x" * COLLECTED_BYTES,
    ],
    ids=["large", "chunked", "a word of ours", "an endless head"],
)
def test_of_other_requests_a_thread_reads_the_head_first(seen):
    assert wanted(seen) == len(seen)


def is_silent(connection):
    """Has nothing come, not even the end?"""
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    finally:
        connection.settimeout(30)
    return False


def signed_push(*fields):
    """A push as bytes: its head up to what tells the length, and its body."""
    body = json.dumps(run()).encode()
    lines = [
        "POST /webhooks/github HTTP/1.1", "Host: x", "Content-Type: application/json", "X-GitHub-Event: workflow_run",
        "X-GitHub-Delivery: d-1", f"X-Hub-Signature-256: {signing.github_signature(GITHUB, body)}", *fields,
    ]  # fmt: skip
    return "".join(f"{line}\r\n" for line in lines).encode(), body


def answer_in(file):
    """The body of the next answer on a connection that is kept."""
    status = file.readline()
    headers = dict(line.strip().lower().split(b": ", 1) for line in iter(file.readline, b"\r\n"))
    return status[9:12], json.loads(file.read(int(headers[b"content-length"])))


def test_a_request_is_heard_however_it_is_cut(server):
    """In many small pieces, one after another on one connection, and the next already behind the one before."""
    head, body = signed_push()
    whole = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection,
        connection.makefile("rb") as answers,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for sent, size in ((whole, 3), (chunked, 3), (whole + chunked + whole, 1_000_000)):
            for start in range(0, len(sent), size):
                connection.sendall(sent[start : start + size])
            for _ in range(sent.count(b"POST ")):
                status, answer = answer_in(answers)
                assert (status, answer["build_id"]) == (b"202", "github:Octo:Repo:7")
    assert server.count(models.inbound) == 1


def test_a_sender_that_waits_to_be_told_to_go_on_is_told(server):
    head, body = signed_push("Expect: 100-continue")
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection,
        connection.makefile("rb") as answers,
    ):
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
        assert (answers.readline(), answers.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")
        connection.sendall(body)
        assert answer_in(answers)[1]["status"] == "accepted"


def test_what_gunicorn_refuses_itself_is_problem_json_too(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(
            b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nX-A: " + b"x" * 20_000 + b"\r\n\r\n"
        )
        head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
    assert b"Content-Type: application/problem+json" in head
    assert head.startswith(b"HTTP/1.1 431 ")
    problem = json.loads(body)
    assert (problem["status"], problem["title"]) == (431, "Request Header Fields Too Large")


def test_slow_senders_do_not_keep_others_waiting(server):
    body = json.dumps(run()).encode()
    head = (
        b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(12)]
    for connection in slow:
        connection.sendall(head + body[:10])
    try:
        with ThreadPoolExecutor(4) as pool:
            replies = list(
                pool.map(lambda n: server.github(run(run_id=n), f"d-{n}").status_code, range(1, 9))
            )
        assert replies == [202] * 8
    finally:
        for connection in slow:
            connection.close()
    assert server.count(models.inbound) == 8


def test_many_at_once_are_each_applied_once(server):
    jobs = [
        (run_id, state) for run_id in range(1, 31) for state in ("queued", "in_progress", "completed")
    ] * 2

    def push(job):
        run_id, state = job
        conclusion = "success" if state == "completed" else None
        return server.github(run(state, conclusion, run_id=run_id), f"{run_id}-{state}").json()["status"]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(push, jobs))
    assert sorted(set(answers)) == ["accepted", "duplicate"]
    assert answers.count("accepted") == 90
    with db.reading(server.engine) as connection:
        states = connection.execute(select(models.builds.c.state)).scalars().all()
    assert states == ["completed"] * 30


def test_a_store_that_refuses_is_503_and_the_push_is_not_swallowed(server):
    with db.reading(server.engine) as connection:
        connection.exec_driver_sql("ALTER TABLE counters RENAME TO counters_away")
        connection.commit()
    reply = server.github(run())
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "5")
    with db.reading(server.engine) as connection:
        connection.exec_driver_sql("ALTER TABLE counters_away RENAME TO counters")
        connection.commit()
    assert server.github(run()).json()["status"] == "accepted"


def test_admins_are_told_before_gitlab_mutes_a_hook_that_we_refuse(server, wait_until):
    stale = {"Content-Type": "application/json", "X-Gitlab-Event": "Pipeline Hook", "X-Gitlab-Token": "stale"}

    def told():
        assert server.post("/webhooks/gitlab", b"{}", stale).status_code == 401
        with db.reading(server.engine) as connection:
            kinds = connection.execute(select(models.notices.c.kind)).scalars().all()
        return "source.hook_at_risk" in kinds

    assert server.post("/webhooks/github", b"{}", {"Content-Type": "application/json"}).status_code == 401
    assert not told(), "one refusal is none"
    wait_until(told)


def test_admins_are_told_of_a_right_signature_whose_clock_is_off(server, wait_until):
    """The sender is not: the answer is that to a wrong signature."""
    body, sent_at = b"{}", int(time.time()) - 1000

    def push(secret):
        signed = {
            "Content-Type": "application/json", "X-Gitlab-Event": "Pipeline Hook", "webhook-id": "m1",
            "webhook-timestamp": str(sent_at), "webhook-signature": signing.sign_v1(secret, "m1", sent_at, body),
        }  # fmt: skip
        return server.post("/webhooks/gitlab", body, signed)

    def told():
        with db.reading(server.engine) as connection:
            rows = connection.execute(select(models.notices)).mappings().all()
        return [row["text"] for row in rows if row["kind"] == "source.clock_off"]

    wrong = "whsec_" + "b3RoZXIgc2VjcmV0IG9mIHRoZSBob29r"
    pushes_refused = server.count(models.sources)
    wait_until(lambda: push(wrong).status_code == 401 and server.count(models.sources) > pushes_refused)
    assert told() == []
    wait_until(lambda: push(GITLAB).status_code == 401 and told())
    assert push(GITLAB).content == push(wrong).content
    (text,) = told()
    seconds = int(re.search(r"its time is (\d+) s behind our clock", text)[1])
    assert 1000 <= seconds <= 1000 + time.time() - sent_at
