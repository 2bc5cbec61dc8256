"""Logs and artifacts as a client gets them, from platforms that play along or not."""

import base64
import hashlib
import io
import socket
import threading
import time
import zipfile
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import pytest
from sqlalchemy import insert, select, update

from tests.caller import ADMIN, Caller, application
from tests.stand import ON_SQLITE, stands
from tests.test_collect import answering, collect, end, ended, left
from tests.test_sweep import Script
from webhook_app import artifacts, budget, collection, db, logs, models, queues
from webhook_app.lifecycle import Detail, Observation, ObservedBy, State
from webhook_app.simulated.github import rate_limited
from webhook_app.simulated.httpd import Response, Server

TOKEN = "ghp_0123456789abcdef0123456789abcdef0123"


@pytest.fixture
def make_stand(engine, redis_client, monkeypatch):
    """`make_stand(platforms, builds, …)`: see `tests.stand.stands`."""
    with stands(engine, redis_client, monkeypatch) as make:
        yield make


@pytest.fixture
def serve(store_url, redis_url):
    """`serve(stand)`: a caller of an application over the stand's database and platforms."""
    with ExitStack() as stack:

        def start(stand, **more):
            names = {"github": "GITHUB_API_URL", "gitlab": "GITLAB_URL", "jenkins": "JENKINS_URL"}
            env = {names[name]: server.url for name, server in stand.servers.items()}
            for name, one in stand.held.settings.sources.items():
                if name in stand.servers:
                    key = {"github": "GITHUB_TOKEN", "gitlab": "GITLAB_TOKEN", "jenkins": "JENKINS_API_TOKEN"}
                    env[key[name]] = one.source.token
                    env |= {"JENKINS_USERNAME": one.source.username} if name == "jenkins" else {}
            app = application(store_url, redis_url, **(env | more))
            stack.callback(app.extensions["buildrelay"].engine.dispose)
            stack.callback(app.extensions["buildrelay"].redis.close)
            return Caller(app)

        yield start


def get(api, path, **headers):
    return api.client.get(path, headers={"Authorization": f"Bearer {ADMIN}"} | headers, buffered=True)


def log_of(api, build, status=200, **query):
    return api("GET", f"/api/builds/{build.build_id}/logs", status, query_string=query)


def list_of(api, build):
    return api("GET", f"/api/builds/{build.build_id}/artifacts")


# ---- logs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_the_log_of_a_failed_build(make_stand, serve, platform):
    stand, build = ended(make_stand, platform)
    api = serve(stand)
    answer = log_of(api, build, 202)
    assert (answer["state"], answer["reason"], answer["lines"]) == ("pending", "queued", [])
    collect(stand)
    answer = log_of(api, build)
    assert set(answer) == {"build_id", "attempt", "state", "reason", "truncated", "lines"}
    assert (answer["build_id"], answer["attempt"]) == (build.build_id, 1)
    assert (answer["state"], answer["reason"], answer["truncated"]) == ("stored", None, False)
    assert "FAIL tests/test_cart.py::test_tax_is_rounded" in answer["lines"]
    assert log_of(api, build, tail=2)["lines"] == answer["lines"][-2:]
    assert log_of(api, build, tail=10_000)["lines"] == answer["lines"]
    assert log_of(api, build, attempt=1)["lines"] == answer["lines"]
    assert log_of(api, build, attempt=2)["reason"] == "not_kept"
    text = get(api, f"/api/builds/{build.build_id}/logs?tail=3", Accept="text/plain")
    assert (text.status_code, text.mimetype) == (200, "text/plain")
    assert text.text == "".join(f"{line}\n" for line in answer["lines"][-3:])
    assert api("GET", f"/api/builds/{build.build_id}")["error"]
    assert api("GET", f"/api/builds/{build.build_id}/status")["error"]


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_the_log_of_a_good_build_is_read_when_somebody_asks(make_stand, serve, platform):
    stand, build = ended(make_stand, platform, "success")
    api = serve(stand)
    collect(stand, after=collection.LIST_DELAY_SECONDS)
    stand.redis.flushall()
    assert left(stand, build)["due_at"] is None
    answer = get(api, f"/api/builds/{build.build_id}/logs")
    assert (answer.status_code, answer.json["state"], answer.json["reason"]) == (202, "pending", "queued")
    assert answer.headers["Retry-After"]
    assert stand.redis.exists(queues.bell_key(queues.COLLECT))
    log_of(api, build, 202)
    collect(stand, after=time.time() - stand.clock())
    assert "148 tests passed in 11.4 s" in log_of(api, build)["lines"]


def test_what_is_not_there_says_why(make_stand, serve):
    stand, build = ended(make_stand, "github")
    api = serve(stand)
    with answering(stand.servers["github"], {"/logs$": Response(404)}):
        collect(stand)
    assert log_of(api, build, 202)["reason"] == "not_found"
    assert left(stand, build)["due_at"] > stand.now(), "who asks does not hurry it"
    with answering(stand.servers["github"], {"/logs$": Response(410)}):
        collect(stand, after=15)
    answer = log_of(api, build)
    assert (answer["state"], answer["reason"], answer["lines"]) == ("unavailable", "gone", [])
    text = get(api, f"/api/builds/{build.build_id}/logs", Accept="text/plain")
    assert (text.status_code, text.json["detail"]) == (404, "there is no log: gone")
    assert left(stand, build)["due_at"] is None


@ON_SQLITE
def test_the_log_of_a_build_that_runs_is_to_come(make_stand, serve):
    stand = make_stand(("github",), 1)
    (build,) = stand.world.builds
    stand.push(build)
    api = serve(stand)
    assert log_of(api, build, 202)["reason"] == "not_ended"
    assert left(stand, build) is None
    text = get(api, f"/api/builds/{build.build_id}/logs", Accept="text/plain")
    assert (text.status_code, text.text) == (202, "")
    assert log_of(api, Script("github:o:r:1"), 404)
    assert log_of(api, build, 422, tail=0)
    assert log_of(api, build, 422, tail="x")
    assert log_of(api, build, 422, attempt=0)


def test_a_build_from_before_is_read_when_somebody_asks_and_one_past_retention_is_not(make_stand, serve):
    stand, build = ended(make_stand, "github")
    api = serve(stand, RETENTION_DAYS="3650")
    db.as_writer(stand.engine, lambda write: write.connection.execute(models.collections.delete()))
    assert log_of(api, build, 202)["reason"] == "queued"
    collect(stand, after=10**6)
    assert log_of(api, build)["state"] == "stored"
    db.as_writer(stand.engine, lambda write: write.connection.execute(models.collections.delete()))
    old = stand.now() - timedelta(days=3651 + 30)
    db.as_writer(
        stand.engine, lambda write: write.connection.execute(update(models.builds).values(ended_at=old))
    )
    assert log_of(api, build)["reason"] == "past_retention"
    assert list_of(api, build)["reason"] == "past_retention"
    assert left(stand, build) is None


@ON_SQLITE
def test_a_source_that_is_off_says_so(make_stand, serve):
    stand, build = ended(make_stand, "github")
    api = serve(stand, ENABLE_GH="false")
    assert log_of(api, build)["reason"] == "source_off"
    assert list_of(api, build)["reason"] == "source_off"


def test_what_a_script_reports_is_its_log(make_stand, serve):
    stand = make_stand(("jenkins",), 0)
    api = serve(stand)

    def report(type_, state=State.IN_PROGRESS, **data):
        stand.record(
            Observation(
                source="script", platform="script", observed_by=ObservedBy.REPORT, key="script:run-1",
                build_id="script:run-1", state=state, detail=Detail(type=type_, data=data),
            )
        )  # fmt: skip

    report("build_started", command="make")
    report("stage_started", stage="compile", message=f"with {TOKEN}\nand script-token-of-the-tests")
    report("build_failed", State.FAILED, error="exit code 2")
    answer = log_of(api, Script())
    assert (answer["state"], answer["attempt"]) == ("stored", 1)
    assert answer["lines"] == [
        "build_started", "stage_started compile: with ***", "and ***", "build_failed: exit code 2",
    ]  # fmt: skip
    assert log_of(api, Script(), tail=1)["lines"] == ["build_failed: exit code 2"]
    assert list_of(api, Script()) == {
        "items": [], "next_cursor": None, "state": "unavailable", "reason": "not_offered",
    }  # fmt: skip


# ---- artifacts -------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_artifacts_are_listed_and_downloaded(make_stand, serve, platform):
    stand, build = ended(make_stand, platform, "success")
    api = serve(stand)
    assert list_of(api, build) == {"items": [], "next_cursor": None, "state": "pending", "reason": "queued"}
    collect(stand, after=collection.LIST_DELAY_SECONDS)
    listed = list_of(api, build)
    assert (listed["state"], listed["reason"], listed["next_cursor"]) == ("stored", None, None)
    for item in listed["items"]:
        assert set(item) == {
            "name",
            "size_bytes",
            "digest",
            "digest_by",
            "created_at",
            "expires_at",
            "expired",
        }
        answer = get(api, f"/api/builds/{build.build_id}/artifacts/{quote(item['name'])}")
        assert answer.status_code == 200
        digest = hashlib.sha256(answer.data).digest()
        assert answer.headers["Repr-Digest"] == f"sha-256=:{base64.b64encode(digest).decode()}:"
        assert int(answer.headers["Content-Length"]) == len(answer.data) > 0
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Disposition"].startswith("attachment;")
        (after,) = [one for one in list_of(api, build)["items"] if one["name"] == item["name"]]
        assert after["digest"] == f"sha256:{digest.hex()}"
        assert after["digest_by"] == ("relay" if item["digest"] is None else "platform")
        if platform != "jenkins":
            assert zipfile.ZipFile(io.BytesIO(answer.data)).testzip() is None
    assert listed["items"]


def test_pages_of_artifacts(make_stand, serve):
    stand, build = ended(make_stand, "github", "success")
    api = serve(stand)
    stand.clock.advance(collection.LIST_DELAY_SECONDS)
    claimed = db.in_transaction(
        stand.engine, lambda connection: collection.claim(connection, "github", stand.now())
    )
    found = tuple(artifacts.platforms.Artifact(f"a{n}", str(n)) for n in range(5))
    brought = collection.Brought(artifacts=collection.Found(value=found))
    db.as_writer(stand.engine, lambda write: collection.settle(write, claimed, brought, stand.now()))
    path, names, cursor = f"/api/builds/{build.build_id}/artifacts", [], None
    while True:
        page = api("GET", path, query_string={"limit": 2} | ({"cursor": cursor} if cursor else {}))
        names += [item["name"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert names == ["a0", "a1", "a2", "a3", "a4"]


NAMES = [
    ("dist", "dist.zip"),
    ("a/b c", "a_b c.zip"),
    ("výsledky-测试", "výsledky-测试.zip"),
    ("..", "artifact.zip"),
    ("../../etc/passwd", "_.._etc_passwd.zip"),
    ('quote" and\\back', 'quote" and_back.zip'),
    ("already.ZIP", "already.ZIP"),
    ("%2e%2e", "%2e%2e.zip"),
]


def stored_artifact(stand, build, name="dist", ref="1", **more):
    row = {
        "build": stand.row(build)["id"],
        "name": name,
        "ref": ref,
        "expired": False,
        "listed_at": stand.now(),
    }
    db.as_writer(stand.engine, lambda write: write.connection.execute(insert(models.artifacts), row | more))


@pytest.mark.parametrize(("name", "file_name"), NAMES)
def test_odd_names_lead_to_their_file_and_to_nothing_else(make_stand, serve, name, file_name):
    stand, build = ended(make_stand, "github", "success")
    api = serve(stand)
    stored_artifact(stand, build, name)
    with answering(stand.servers["github"], {"/artifacts/1/zip": Response(200, b"content")}) as asked:
        answer = get(api, f"/api/builds/{build.build_id}/artifacts/{quote(name, safe='')}")
    assert (answer.status_code, answer.data) == (200, b"content")
    disposition = answer.headers["Content-Disposition"]
    assert disposition.endswith(f"filename*=UTF-8''{quote(file_name, safe='')}")
    assert disposition.isascii()
    assert len([path for path in asked if "/artifacts/1/zip" in path]) == 1


DIGEST = "sha256:" + hashlib.sha256(b"content").hexdigest()


@ON_SQLITE
@pytest.mark.parametrize(
    ("answer", "digest", "status"),
    [
        (Response(200, b"content"), DIGEST, 200),
        (Response(200, b"c0ntent"), DIGEST, 502),
        (Response(200, b""), DIGEST, 502),
        (Response(404), None, 404),
        (Response(410), None, 410),
        (Response(401), None, 502),
        (Response(403, b'{"message":"no"}'), None, 502),
        (Response(500), None, 502),
        (Response(drop=True), None, 502),
        (rate_limited(2_000_000_000), None, 503),
        (Response(302, headers={"Location": "http://169.254.169.254/latest"}), None, 502),
    ],
)
def test_a_download_is_whole_or_an_error(make_stand, serve, answer, digest, status):
    stand, build = ended(make_stand, "github", "success")
    api = serve(stand)
    stored_artifact(stand, build, digest=digest, digest_by="platform" if digest else None)
    path = f"/api/builds/{build.build_id}/artifacts/dist"
    with answering(stand.servers["github"], {"/artifacts/1/zip": answer}):
        told = get(api, path)
    assert told.status_code == status
    if status == 200:
        assert told.data == b"content"
        return
    assert told.mimetype == "application/problem+json"
    assert (status == 503) == ("Retry-After" in told.headers)
    with answering(stand.servers["github"], {"/artifacts/1/zip": Response(200, b"content")}):
        left_behind = 503 if status == 503 else 200
        assert get(api, path).status_code == left_behind, "a failure leaves nothing behind but a limit"


@ON_SQLITE
def test_a_platform_that_hangs_is_504(make_stand, serve, monkeypatch):
    monkeypatch.setattr(artifacts, "DOWNLOAD_SECONDS", 0.3)
    stand, build = ended(make_stand, "github", "success")
    api = serve(stand)
    stored_artifact(stand, build)
    with answering(stand.servers["github"], {"/artifacts/1/zip": Response(delay_seconds=30, drop=True)}):
        assert get(api, f"/api/builds/{build.build_id}/artifacts/dist").status_code == 504


@ON_SQLITE
def test_what_was_downloaded_first_is_what_comes_later(make_stand, serve):
    """Without a digest of the platform's, another content under the same name is noticed."""
    stand, build = ended(make_stand, "jenkins", "success")
    api = serve(stand)
    collect(stand, after=collection.LIST_DELAY_SECONDS)
    path = f"/api/builds/{build.build_id}/artifacts/dist/app.txt"
    assert get(api, path).status_code == 200
    with answering(stand.servers["jenkins"], {"/artifact/": Response(200, b"another")}):
        assert get(api, path).status_code == 502
    assert get(api, path).status_code == 200


@ON_SQLITE
def test_expired_and_unknown(make_stand, serve):
    stand, build = ended(make_stand, "github", "success")
    api = serve(stand)
    stored_artifact(stand, build, "old", "1", expired=True)
    stored_artifact(stand, build, "older", "2", expires_at=stand.now() - timedelta(days=300))
    before = stand.requests()
    for name in ("old", "older"):
        answer = get(api, f"/api/builds/{build.build_id}/artifacts/{name}")
        assert (answer.status_code, answer.mimetype) == (410, "application/problem+json")
    assert get(api, f"/api/builds/{build.build_id}/artifacts/none").status_code == 404
    assert get(api, f"/api/builds/{build.build_id}/artifacts/%00").status_code == 404
    assert get(api, "/api/builds/github:o:r:1/artifacts/old").status_code == 404
    assert stand.requests() == before
    assert {item["name"]: item["expired"] for item in list_of(api, build)["items"]} == {
        "old": True,
        "older": True,
    }


class Cutting:
    """A platform that sends what it wants, byte by byte: here a part of what it announced."""

    def __init__(self, raw):
        self.raw = raw
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(self.raw)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


@ON_SQLITE
@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nwho knows whether this is all",
    ],
)
def test_half_a_file_is_no_file(make_stand, serve, raw):
    stand, build = ended(make_stand, "github", "success")
    with Cutting(raw) as platform:
        api = serve(stand, GITHUB_API_URL=platform.url)
        stored_artifact(stand, build)
        assert get(api, f"/api/builds/{build.build_id}/artifacts/dist").status_code == 502


@ON_SQLITE
def test_a_file_that_is_too_large_is_refused(make_stand, serve, monkeypatch):
    monkeypatch.setattr(artifacts, "CAP_BYTES", 1000)
    stand, build = ended(make_stand, "github", "success")
    api = serve(stand)
    stored_artifact(stand, build, "told", "1", size_bytes=1001)
    stored_artifact(stand, build, "lied", "2", size_bytes=10)
    with answering(stand.servers["github"], {"/zip": Response(200, b"x" * 1001)}) as asked:
        assert get(api, f"/api/builds/{build.build_id}/artifacts/told").status_code == 502
        assert asked == []
        assert get(api, f"/api/builds/{build.build_id}/artifacts/lied").status_code == 502


@ON_SQLITE
def test_too_many_downloads_at_once_are_told_to_wait(make_stand, serve, wait_until):
    stand, build = ended(make_stand, "github", "success")
    api = serve(stand)
    stored_artifact(stand, build)
    gate, arrived = threading.Event(), []

    def wait(request):
        arrived.append(request)
        gate.wait(60)
        return Response(200, b"content")

    path = f"/api/builds/{build.build_id}/artifacts/dist"
    statuses = []
    with answering(stand.servers["github"], {"/zip": wait}):
        threads = [
            threading.Thread(target=lambda: statuses.append(get(api, path).status_code))
            for _ in range(artifacts.MOST_AT_ONCE)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(arrived) == artifacts.MOST_AT_ONCE)
        busy = get(api, path)
        gate.set()
        for thread in threads:
            thread.join()
    assert (busy.status_code, busy.headers["Retry-After"]) == (503, "5")
    assert statuses == [200] * artifacts.MOST_AT_ONCE


@ON_SQLITE
def test_our_token_stays_with_the_platform(make_stand, serve):
    """The store that a redirect leads to gets no Authorization."""
    stand, build = ended(make_stand, "github", "success")
    api = serve(stand)
    stored_artifact(stand, build)
    seen = []

    def store(request):
        seen.append(request.headers)
        return Response(200, b"content")

    with Server(store) as blobs:
        link = Response(302, headers={"Location": f"{blobs.url}/blob?sig=1"})
        with answering(stand.servers["github"], {"/artifacts/1/zip": link}):
            assert get(api, f"/api/builds/{build.build_id}/artifacts/dist").data == b"content"
    assert [("authorization" in headers) for headers in seen] == [False]


@ON_SQLITE
def test_a_download_on_disk_is_gone_when_it_was_sent(make_stand, serve, monkeypatch):
    stand, build = ended(make_stand, "github", "success")
    api = serve(stand)
    stored_artifact(stand, build)
    opened = []
    spool = artifacts.tempfile.TemporaryFile

    def note():
        opened.append(spool())
        return opened[-1]

    monkeypatch.setattr(artifacts.tempfile, "TemporaryFile", note)
    path = f"/api/builds/{build.build_id}/artifacts/dist"
    for answer in (Response(200, b"content"), Response(500)):
        with answering(stand.servers["github"], {"/artifacts/1/zip": answer}):
            get(api, path).close()
    assert [file.closed for file in opened] == [True, True]


def test_who_asks_for_the_list_has_it_read_at_once_and_once(make_stand, serve):
    stand, build = ended(make_stand, "github", "success")
    stand.clock.advance(time.time() - stand.clock())
    stand.push(build, State.IN_PROGRESS, attempt=2)
    end(stand, build, attempt=2)
    api = serve(stand)
    stand.redis.flushall()
    assert left(stand, build, 2)["due_at"] > stand.now()
    assert list_of(api, build)["state"] == "pending"
    assert stand.redis.exists(queues.bell_key(queues.COLLECT))
    with answering(stand.servers["github"], {"/artifacts$": Response(503)}) as asked:
        collect(stand, after=5)
        list_of(api, build)
        collect(stand, after=5)
    assert len([path for path in asked if "/artifacts" in path]) == 1
    assert list_of(api, build)["reason"] == "unavailable"


@ON_SQLITE
def test_a_rerun_lists_what_is_there_then(make_stand, serve):
    stand, build = ended(make_stand, "github", "success")
    api = serve(stand)
    collect(stand, after=collection.LIST_DELAY_SECONDS)
    first = list_of(api, build)["items"]
    stand.push(build, State.IN_PROGRESS, attempt=2)
    assert list_of(api, build)["items"] == first, "while it runs, those of before"
    assert list_of(api, build)["state"] == "pending"
    end(stand, build, attempt=2)
    collect(stand, after=collection.LIST_DELAY_SECONDS)
    assert list_of(api, build)["state"] == "stored"
    with db.reading(stand.engine) as connection:
        assert len(connection.execute(select(models.artifacts.c.name)).all()) == len(first)


# ---- the token's budget ----------------------------------------------------------------------


def lane_of(stand):
    return budget.lane_of(stand.held.settings.sources["github"], 0.1)


def shorten(stand, **values):
    """From now on the token of GitHub is as good as used up, for polling."""

    def unit(write):
        budget.open_lane(write, lane_of(stand), ["github"], stand.now())
        short = {"limit": 5000, "remaining": 500, "credit": 0.0, "reckoned_at": stand.now()}
        until = {"reset_at": stand.now() + timedelta(seconds=3000)}
        write.connection.execute(update(models.budgets).values(short | until | values))

    db.as_writer(stand.engine, unit)


def spent(stand):
    with db.reading(stand.engine) as connection:
        return connection.execute(select(models.budgets)).mappings().one()


def test_the_log_that_a_person_asks_for_comes_out_of_the_reserve(make_stand, serve):
    stand, build = ended(make_stand, "github")
    api = serve(stand)
    shorten(stand)
    collect(stand)
    assert left(stand, build)["log_state"] is None, "logs yield to the reading of states"
    log_of(api, build, 202)
    collect(stand)
    assert "FAIL tests/test_cart.py::test_tax_is_rounded" in log_of(api, build)["lines"]
    assert spent(stand)["requests"] == 3


def own(stand, owner):
    """Somebody else reads with the token of GitHub for the next minutes."""
    until = stand.now() + timedelta(minutes=5)
    taken = db.as_writer(
        stand.engine, lambda write: budget.take(write, lane_of(stand), ["github"], owner, until, stand.now())
    )
    assert taken is not None


def let_go(stand, owner):
    db.as_writer(stand.engine, lambda write: budget.give_back(write, lane_of(stand), owner))


def test_a_download_waits_for_no_poll_and_is_charged(make_stand, serve):
    stand, build = ended(make_stand, "github", "success")
    api = serve(stand)
    collect(stand, after=collection.LIST_DELAY_SECONDS)
    (one, *_) = list_of(api, build)["items"]
    own(stand, "a round")
    before = spent(stand)["requests"]
    answer = get(api, f"/api/builds/{build.build_id}/artifacts/{quote(one['name'])}")
    assert answer.status_code == 200
    row = spent(stand)
    assert (row["requests"], row["owner"]) == (before + 1, "a round")


@ON_SQLITE
def test_nobody_downloads_while_a_limit_is_waited_for(make_stand, serve):
    stand, build = ended(make_stand, "github", "success")
    stand.clock.advance(time.time() - stand.clock())
    api = serve(stand)
    collect(stand, after=collection.LIST_DELAY_SECONDS)
    (one, *_) = list_of(api, build)["items"]
    path = f"/api/builds/{build.build_id}/artifacts/{quote(one['name'])}"
    server = stand.servers["github"]
    with answering(server, {"/zip$": Response(429, headers={"Retry-After": "600"})}):
        assert get(api, path).status_code == 503
    before = server.count()
    answer = get(api, path)
    assert (answer.status_code, server.count()) == (503, before)
    assert 500 < int(answer.headers["Retry-After"]) <= 600
    assert "is left alone until" in answer.json["detail"]


@ON_SQLITE
def test_a_log_waits_for_the_round_before_it(make_stand, serve, wait_until):
    stand, build = ended(make_stand, "github")
    own(stand, "a round")
    before = stand.requests()
    reader = threading.Thread(target=collect, args=(stand,))
    reader.start()
    wait_until(lambda: spent(stand)["wanted_by"] is not None)
    assert stand.requests() == before
    let_go(stand, "a round")
    reader.join(30)
    assert left(stand, build)["log_state"] == "stored"


@ON_SQLITE
def test_a_poll_goes_between_the_requests_for_a_log(make_stand, serve, wait_until):
    """The log itself comes from a store: while it comes, states may be read."""
    stand, build = ended(make_stand, "github")
    going, owners = threading.Event(), []

    def text():
        yield b"a line\n" * 20_000
        wait_until(lambda: spent(stand)["owner"] is None)
        owners.append(spent(stand)["owner"])
        going.set()
        yield b"the last line\n"

    with (
        slow_store(text()) as url,
        answering(stand.servers["github"], {r"/jobs/\d+/logs": Response(302, headers={"Location": url})}),
    ):
        collect(stand)
    assert going.is_set()
    assert "the last line" in logs.unpack(left(stand, build)["log"])
    assert spent(stand)["owner"] is None


@contextmanager
def slow_store(pieces):
    """A server that sends what `pieces` gives, when it gives it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            for piece in pieces:
                self.wfile.write(piece)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/log"
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()


@ON_SQLITE
@pytest.mark.parametrize(("name", "status"), [("dist/web.zip", 502), ("report.html", 200)])
def test_a_log_in_page_is_no_artifact(make_stand, serve, name, status):
    stand, build = ended(make_stand, "jenkins", "success")
    api = serve(stand)
    collect(stand, after=collection.LIST_DELAY_SECONDS)
    row = stand.row(build)["id"]
    db.as_writer(
        stand.engine,
        lambda write: write.connection.execute(
            insert(models.artifacts),
            {"build": row, "name": name, "ref": name, "expired": False, "listed_at": stand.now()},
        ),
    )
    page = Response(200, b"<html>", {"Content-Type": "text/html"})
    with answering(stand.servers["jenkins"], {"/artifact/": page}):
        answer = get(api, f"/api/builds/{build.build_id}/artifacts/{quote(name)}")
    assert answer.status_code == status
