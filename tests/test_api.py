"""The HTTP API over real databases and a real Redis, as a client sees it."""

import hashlib
import hmac
import json
import re
import time
from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import pytest
from cryptography.fernet import Fernet
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from sqlalchemy import event, insert, select, text, update

from tests.facts import NOON, PACE, at, github, gitlab, job
from webhook_app import (
    builds,
    db,
    deliveries,
    endpoints,
    health,
    models,
    queries,
    queues,
    settings,
    subscribers,
)
from webhook_app.app import create_app
from webhook_app.builds import PollFailed, Unchanged
from webhook_app.lifecycle import Detail, Observation, ObservedBy, State
from webhook_app.queries import BuildFilter
from webhook_app.room import Room
from webhook_app.times import utc_now
from webhook_app.web.api import masking

Q, P, C, F = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED

ADMIN = "bootstrap-token-of-the-tests"
SECRET = "github-webhook-secret"
KEY = Fernet.generate_key().decode()
BUILD_FIELDS = {
    "build_id", "source", "platform", "repository", "workflow", "branch", "commit", "number", "attempt",
    "state",
    "conclusion", "url", "started_at", "ended_at", "duration_seconds", "progress", "observed_by",
    "last_push_at",
    "last_poll_at", "error",
}  # fmt: skip


class Caller:
    """A client of one application that sends a token."""

    def __init__(self, app, token=ADMIN):
        self.app = app
        self.client = app.test_client()
        self.token = token
        self.engine = app.extensions["buildrelay"].engine

    def __call__(self, method, path, status=200, **more):
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        answer = self.client.open(path, method=method, headers=headers | more.pop("headers", {}), **more)
        assert answer.status_code == status, (method, path, answer.status_code, answer.text[:500])
        if status >= 400 and answer.mimetype != "application/json":
            assert answer.mimetype == "application/problem+json"
            assert answer.json["status"] == status
        return answer.json if answer.data else None

    def as_(self, token):
        return Caller(self.app, token)

    def record(self, *facts, now=NOON):
        return db.as_writer(self.engine, lambda write: builds.record(write, facts, now, PACE))

    def token_with(self, *scopes):
        return self("POST", "/api/tokens", 201, json={"name": "t", "scopes": list(scopes)})["token"]


def application(database_url, redis_url, **more):
    return create_app(
        settings.load(
            {
                "DATABASE_URL": database_url,
                "REDIS_URL": redis_url,
                "ADMIN_TOKEN": ADMIN,
                "ENCRYPTION_KEYS": KEY,
                "GITHUB_WEBHOOK_SECRET": SECRET,
                "GITLAB_WEBHOOK_SECRET": "gitlab-token",
                "JENKINS_WEBHOOK_SECRET": "jenkins-token",
                "JENKINS_URL": "https://jenkins.example.com",
                "BUILD_EVENT_TOKEN": "script-token",
            }
            | more
        )
    )


@pytest.fixture
def make_api(redis_client, redis_url):
    """`make_api(database_url, **environment)`: a caller of a new application."""
    made = []

    def make(database_url, **more):
        made.append(application(database_url, more.pop("REDIS_URL", redis_url), **more))
        return Caller(made[-1])

    yield make
    for app in made:
        app.extensions["buildrelay"].engine.dispose()
        app.extensions["buildrelay"].redis.close()


@pytest.fixture
def api(make_api, store_url):
    """A caller with every scope, once per kind of database."""
    return make_api(store_url)


@pytest.fixture
def local(make_api, migrated_sqlite, tmp_path):
    """A caller with every scope, on SQLite: for what no database decides."""
    path = tmp_path / "local.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    return make_api(f"sqlite:///{path}")


def script(event_, run="run-1", state=P, **fields):
    return Observation(
        source="script",
        platform="script",
        observed_by=ObservedBy.REPORT,
        key=f"script:{run}",
        build_id=f"script:{run}",
        state=state,
        workflow="server",
        detail=Detail(type=event_, data=fields) if event_ != "heartbeat" else None,
    )


def pages(api, path, **query):
    """All items of a list, page by page, and how many pages there were."""
    items, cursor, count = [], None, 0
    while True:
        page = api("GET", path, query_string=query | ({"cursor": cursor} if cursor else {}))
        assert set(page) == {"items", "next_cursor"}
        items += page["items"]
        count += 1
        cursor = page["next_cursor"]
        if cursor is None:
            return items, count


# ---- the document, tokens and errors ---------------------------------------------------------


def operations(api):
    document = api.client.get("/openapi.json").json
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method != "parameters":
                yield method.upper(), path, operation


def address(path):
    return (
        path.replace("{inbound_id}", "1").replace("{notification_id}", "1").replace("{", "").replace("}", "")
    )


def test_the_document_is_openapi_and_its_references_exist(local):
    document = local.client.get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    for reference in re.findall(r'"#/([^"]+)"', json.dumps(document)):
        found = document
        for part in reference.split("/"):
            found = found[part]
    names = [operation["operationId"] for _, _, operation in operations(local)]
    assert len(names) == len(set(names)) >= 30
    assert all(operation["summary"] for _, _, operation in operations(local))


def test_documented_errors_are_problems(local):
    document = local.client.get("/openapi.json").json
    for name, response in document["components"]["responses"].items():
        assert list(response["content"]) == ["application/problem+json"], name
    for _, path, operation in operations(local):
        expected = set() if operation["security"] == [] else {"401", "403", "503"}
        assert expected <= set(operation["responses"]), path


def test_every_operation_but_health_needs_a_token(local):
    stranger = local.as_(None)
    guarded = [(method, path) for method, path, operation in operations(local) if operation["security"]]
    assert len(guarded) >= 28
    for method, path in guarded:
        refused = stranger.client.open(address(path), method=method)
        assert refused.status_code == 401, path
        assert refused.headers["WWW-Authenticate"].startswith("Bearer")
        assert refused.mimetype == "application/problem+json"
        wrong = stranger.client.open(
            address(path), method=method, headers={"Authorization": "Bearer nonsense"}
        )
        assert wrong.status_code == 401, path
        assert 'error="invalid_token"' in wrong.headers["WWW-Authenticate"]


def test_a_smaller_scope_is_refused_everywhere_a_larger_one_is_needed(local):
    reader, writer = (local.as_(local.token_with(scope)) for scope in ("read", "write"))
    for method, path, operation in operations(local):
        if not operation["security"]:
            continue
        (scope,) = operation["security"][0]["bearer"]
        for caller, scopes in ((reader, {"read"}), (writer, {"read", "write"})):
            headers = {"Authorization": f"Bearer {caller.token}"}
            status = caller.client.open(address(path), method=method, headers=headers).status_code
            assert (status == 403) == (scope not in scopes), (method, path, status)
    refused = reader.client.get("/api/tokens", headers={"Authorization": f"Bearer {reader.token}"})
    assert 'scope="admin"' in refused.headers["WWW-Authenticate"]


def test_the_scheme_of_the_header_ignores_case_and_others_do_not_count(local):
    assert local.client.get("/api/builds", headers={"Authorization": f"bearer {ADMIN}"}).status_code == 200
    for header in (ADMIN, f"Basic {ADMIN}", "Bearer", "Bearer ", f"Token {ADMIN}"):
        assert local.client.get("/api/builds", headers={"Authorization": header}).status_code == 401


def test_tokens_are_made_shown_once_and_taken_back(api):
    made = api("POST", "/api/tokens", 201, json={"name": "dashboard", "scopes": ["read"]})
    assert set(made) == {"id", "name", "scopes", "created_at", "token"}
    reader = api.as_(made["token"])
    reader("GET", "/api/builds")
    listed = api("GET", "/api/tokens")
    assert listed["items"] == [{key: made[key] for key in ("id", "name", "scopes", "created_at")}]
    assert made["token"] not in json.dumps(listed)
    api("DELETE", f"/api/tokens/{made['id']}", 204)
    api("DELETE", f"/api/tokens/{made['id']}", 404)
    reader("GET", "/api/builds", 401)


@pytest.mark.parametrize(
    "body",
    [
        {}, {"name": "x"}, {"name": "x", "scopes": []}, {"name": "x", "scopes": ["root"]}, {"name": "",
        "scopes": ["read"]},
        {"name": "x", "scopes": ["read"], "more": 1}, {"name": 5, "scopes": ["read"]}, {"name": "x\0",
        "scopes": ["read"]},
        [], "text", {"name": "x", "scopes": "read"},
    ],
)  # fmt: skip
def test_a_token_needs_a_name_and_known_scopes(local, body):
    assert local("POST", "/api/tokens", 422, json=body)["errors"]["json"]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"name": "\\ud800", "scopes": ["read"]}', "application/json", 400),
        (b"\xff", "application/json", 400),
        (b'{"name": "x", "scopes": ["read"]}', "text/plain", 415),
        (b"", "application/json", 422),
    ],
)
def test_what_is_no_json_is_told(local, body, kind, status):
    local("POST", "/api/tokens", status, data=body, content_type=kind)


@pytest.mark.parametrize(
    "path",
    [
        "/api/builds?limit=0", "/api/builds?limit=201", "/api/builds?limit=x", "/api/builds?cursor=%00",
        "/api/builds?cursor=bm90aGluZw", "/api/builds?cursor=***", "/api/builds?unknown=1",
        "/api/builds?state=done",
        "/api/builds?since=2026-11-01", "/api/builds?since=2026-11-01T10:00:00", "/api/builds?source=%00",
        "/api/builds?since=0001-01-01T00:00:00%2B14:00", "/api/builds?until=yesterday", "/api/builds?cursor=",
        "/api/builds/x/events?lastEventId=x", "/api/builds/x/events?lastEventId=-1", "/api/events?after=-1",
        f"/api/events?after={2**63}", "/api/inbound?status=lost", "/api/tokens?cursor=AA",
        "/api/admin/build-status?heartbeatTimeout=0", "/api/subscribers?cursor=*",
        "/api/deliveries?state=pending", "/api/deliveries?cursor=c3ViXzE", "/api/deliveries?cursor=OQ",
    ],
)  # fmt: skip
def test_a_question_that_makes_no_sense_is_422(local, path):
    assert local("GET", path, 422)["errors"]["query"]


def test_ids_that_no_database_can_hold_are_not_found(api):
    for path in ("builds/a%00b", "subscribers/a%00b", "deliveries/a%00b", f"inbound/{2**63}", "inbound/0"):
        api("GET", f"/api/{path}", 404)
    api("DELETE", "/api/tokens/a%00b", 404)
    api("GET", "/api/builds/%ff%fe", 404)
    api("GET", f"/api/builds/github:o:r:{'9' * 40}", 404)
    api("GET", "/api/nowhere", 404)
    api("PUT", "/api/builds", 405)


# ---- builds ----------------------------------------------------------------------------------


def test_a_build_that_a_signed_webhook_told_of(api):
    run = {
        "id": 77, "status": "completed", "conclusion": "success", "run_attempt": 1, "name": "CI",
        "head_branch": "main",
        "head_sha": "c0ffee", "run_number": 5, "html_url": "https://github.com/octo/hello/actions/runs/77",
        "run_started_at": "2026-11-01T10:00:00Z", "updated_at": "2026-11-01T10:01:30Z",
    }  # fmt: skip
    body = json.dumps({"workflow_run": run, "repository": {"full_name": "octo/hello"}}).encode()
    signature = "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    headers = {
        "X-GitHub-Event": "workflow_run", "X-GitHub-Delivery": "d-1", "X-Hub-Signature-256": signature,
        "Content-Type": "application/json",
    }  # fmt: skip
    api("POST", "/webhooks/github", 202, data=body, headers=headers)
    build = api("GET", "/api/builds/github:octo:hello:77")
    assert set(build) == BUILD_FIELDS
    last_push_at = build.pop("last_push_at")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", last_push_at)
    assert build == {
        "build_id": "github:octo:hello:77", "source": "github", "platform": "github",
        "repository": "octo/hello",
        "workflow": "CI", "branch": "main", "commit": "c0ffee", "number": 5, "attempt": 1,
        "state": "completed",
        "conclusion": "success", "url": "https://github.com/octo/hello/actions/runs/77",
        "started_at": "2026-11-01T10:00:00Z", "ended_at": "2026-11-01T10:01:30Z", "duration_seconds": 90.0,
        "progress": 100, "observed_by": "push", "last_poll_at": None, "error": None,
    }  # fmt: skip
    assert api("GET", "/api/builds")["items"] == [build | {"last_push_at": last_push_at}]


def test_look_ups_ignore_case_and_follow_a_renamed_repository(api):
    api.record(github(P), gitlab(P, 0, None))
    for build_id in (
        "github:Octo:Repo:1",
        "GITHUB:OCTO:REPO:1",
        "github:renamed:to:1",
        "github%3AOcto%3ARepo%3A1",
    ):
        assert api("GET", f"/api/builds/{build_id}")["build_id"] == "github:Octo:Repo:1"
    api("GET", "/api/builds/github:Octo:Repo:2", 404)
    api("GET", "/api/builds/github:1", 404)
    api("GET", "/api/builds/elsewhere:Octo:Repo:1", 404)
    api("GET", "/api/builds/gitlab:2:1", 404)


def test_builds_are_listed_newest_first_and_page_by_page(api):
    api.record(*(github(Q, run=run) for run in range(1, 8)))
    items, count = pages(api, "/api/builds", limit=3)
    assert [item["number"] for item in items] == [7, 6, 5, 4, 3, 2, 1]
    assert count == 3
    assert pages(api, "/api/builds", limit=7)[1] == 1
    assert set(items[0]) == BUILD_FIELDS


def test_new_builds_do_not_disturb_a_list_that_is_being_read(api):
    api.record(*(github(Q, run=run) for run in range(1, 5)))
    first = api("GET", "/api/builds", query_string={"limit": 2})
    api.record(github(Q, run=9))
    rest = api("GET", "/api/builds", query_string={"limit": 2, "cursor": first["next_cursor"]})
    assert [item["number"] for item in first["items"] + rest["items"]] == [4, 3, 2, 1]


def test_filters(api):
    api.record(github(P, run=1), github(C, run=2, branch="dev"), now=at(0))
    api.record(github(F, run=3, repository="octo/other", workflow="Deploy"), now=at(60))
    api.record(gitlab(P, 0, None), now=at(120))

    def found(**query):
        items = api("GET", "/api/builds", query_string=query)["items"]
        return [item["number"] or item["source"] for item in items]

    assert found(source="github") == [3, 2, 1]
    assert found(source="nobody") == []
    assert found(repository="Octo/Repo") == [2, 1]
    assert found(repository="Octo/Repo", source="github", limit=1) == [2]
    assert found(repository="Octo/Repo", source="gitlab") == []
    assert found(repository="group/project") == ["gitlab"]
    assert found(branch="dev") == [2]
    assert found(state="in_progress") == ["gitlab", 1]
    assert found(conclusion="failure") == [3]
    assert found(workflow="Deploy", state="failed") == [3]
    assert found(workflow="Deploy", state="completed") == []
    assert found(since="2026-11-01T12:01:00Z") == ["gitlab", 3]
    assert found(since="2026-11-01T13:01:00+01:00", until="2026-11-01T12:02:00Z") == [3]
    assert found(until="2026-11-01T12:01:00Z", repository="Octo/Repo", branch="main") == [1]


def test_attempts_of_a_build(api):
    api.record(github(P, started_at=at(0)), now=at(0))
    api.record(github(F, ended_at=at(30)), now=at(30))
    api.record(github(P, attempt=2, started_at=at(60)), now=at(60))
    api.record(github(C, attempt=3, started_at=at(90), ended_at=at(95)), now=at(95))
    items, _ = pages(api, "/api/builds/github:octo:repo:1/attempts")
    assert [(item["attempt"], item["state"], item["duration_seconds"]) for item in items] == [
        (1, "failed", 30.0), (2, "in_progress", None), (3, "completed", 5.0),
    ]  # fmt: skip
    assert set(items[0]) == {
        "attempt", "state", "conclusion", "started_at", "ended_at", "duration_seconds", "progress",
        "observed_by", "error",
    }  # fmt: skip
    for limit in (1, 2, 3):
        assert pages(api, "/api/builds/github:octo:repo:1/attempts", limit=limit) == (items, -(-3 // limit))
    api("GET", "/api/builds/github:octo:repo:2/attempts", 404)


# ---- the progress API ------------------------------------------------------------------------


def test_events_of_a_build_and_going_on_from_the_last(api):
    api.record(github(Q), github(Q, run=2), now=at(0))
    api.record(github(P), now=at(1))
    api.record(github(F, error="it broke"), now=at(2))
    answer = api("GET", "/api/builds/github:octo:repo:1/events")
    assert set(answer) == {"buildId", "events", "lastEventId"}
    assert answer["buildId"] == "github:Octo:Repo:1"
    first, second, third = answer["events"]
    assert set(first) == {"id", "sequence", "type", "data", "timestamp", "observedBy"}
    assert [made["type"] for made in answer["events"]] == [
        "build.queued",
        "build.in_progress",
        "build.failed",
    ]
    assert [made["sequence"] for made in answer["events"]] == [1, 2, 3]
    assert first["id"] < second["id"] < third["id"] == answer["lastEventId"]
    assert (third["timestamp"], third["observedBy"]) == ("2026-11-01T12:00:02Z", "push")
    assert third["data"] == {
        "state": "failed", "previousState": "in_progress", "conclusion": "failure", "progress": 0,
        "attempt": 1,
        "error": "it broke", "message": "it broke",
    }  # fmt: skip
    rest = api("GET", f"/api/builds/github:octo:repo:1/events?lastEventId={first['id']}")
    assert rest["events"] == [second, third]
    none = api("GET", f"/api/builds/github:octo:repo:1/events?lastEventId={third['id']}")
    assert (none["events"], none["lastEventId"]) == ([], third["id"])


def test_a_reported_event_is_shown_in_the_scripts_own_words(api):
    api.record(script("build_started", env="prod", command="make", pid=42))
    api.record(script("task_completed", taskName="Create page", filesCreated=1))
    shown = api("GET", "/api/builds/script:run-1/events")["events"]
    assert [(made["type"], made["observedBy"]) for made in shown] == [
        ("build_started", "report"), ("task_completed", "report"),
    ]  # fmt: skip
    assert shown[0]["data"] == {"env": "prod", "command": "make", "pid": 42}
    assert shown[1]["data"] == {"taskName": "Create page", "filesCreated": 1}


def test_events_of_polling_are_shown_with_their_error(api):
    api.record(github(P), now=at(0))
    for second in (61, 120, 240):
        api.record(PollFailed("github:1", "unavailable: HTTP 502", "unavailable"), now=at(second))
    shown = api("GET", "/api/builds/github:octo:repo:1/events")["events"]
    assert [made["type"] for made in shown][1:] == ["build.polling_started", "build.polling_error"]
    assert shown[-1]["data"]["error"] == "unavailable: HTTP 502"


def test_many_events_come_in_portions_and_none_is_lost(local, monkeypatch):
    monkeypatch.setattr("webhook_app.web.api.progress.MOST_EVENTS", 4)
    local.record(script("build_started"), *(script("task_completed", number=n) for n in range(9)))
    seen, last = [], 0
    while True:
        answer = local("GET", f"/api/builds/script:run-1/events?lastEventId={last}")
        if not answer["events"]:
            break
        assert len(answer["events"]) <= 4
        seen += [made["sequence"] for made in answer["events"]]
        last = answer["lastEventId"]
    assert seen == list(range(1, 11))


def test_an_unknown_build_has_no_events_and_status_unknown(api):
    answer = api("GET", "/api/builds/github:octo:repo:404/events?lastEventId=7")
    assert answer == {"buildId": "github:octo:repo:404", "events": [], "lastEventId": 7}
    assert api("GET", "/api/builds/27/status") == {
        "buildId": "27", "status": "unknown", "state": None, "conclusion": None, "progress": 0,
        "progressBasis": "none",
        "etaSeconds": None, "previewUrl": None, "error": None, "eventCount": 0, "lastUpdate": None,
    }  # fmt: skip


def test_status_of_a_build(api):
    api.record(script("plan_started"), script("plan_generated", taskCount=2), script("task_completed"))
    answer = api("GET", "/api/builds/script:run-1/status")
    assert answer == {
        "buildId": "script:run-1", "status": "executing", "state": "in_progress", "conclusion": None,
        "progress": 40,
        "progressBasis": "report", "etaSeconds": None, "previewUrl": None, "error": None, "eventCount": 3,
        "lastUpdate": "2026-11-01T12:00:00Z",
    }  # fmt: skip
    api.record(github(C), github(F, run=2, error="boom"))
    assert api("GET", "/api/builds/github:octo:repo:1/status")["status"] == "completed"
    failed = api("GET", "/api/builds/github:octo:repo:2/status")
    assert (failed["status"], failed["error"]) == ("failed", "boom")


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)`: the status is asked for so many seconds after noon."""

    def turn(seconds):
        monkeypatch.setattr("webhook_app.web.api.progress.utc_now", lambda: at(seconds))

    return turn


def how_far(api, run):
    """Percent, basis, and seconds that are left."""
    told = api("GET", f"/api/builds/github:octo:repo:{run}/status")
    return told["progress"], told["progressBasis"], told["etaSeconds"]


def took(seconds, run, state=C, **more):
    return github(state, run=run, started_at=at(-5000), ended_at=at(seconds - 5000), **more)


def test_status_tells_what_is_left_by_earlier_runs_of_workflow_and_branch(api, clock):
    api.record(took(90, 1), took(110, 2, F), took(100, 3), took(9, 4, branch="topic"))
    api.record(github(P, run=5, started_at=at(0)), github(Q, run=6), github(P, run=7, workflow="Other"))
    clock(40)
    assert how_far(api, 5) == (35, "history", 60)
    assert how_far(api, 6) == (0, "none", None)
    assert how_far(api, 7) == (0, "none", None)
    clock(105)
    assert how_far(api, 5) == (95, "history", 5)
    clock(111)
    assert how_far(api, 5) == (95, "history", None)
    api.record(github(C, run=5), now=at(112))
    assert how_far(api, 5) == (100, "none", None)
    assert how_far(api, 1) == (100, "none", None)


def test_what_is_told_counts_where_it_is_more_than_the_estimate(api, clock):
    api.record(took(100, 1), github(P, run=2, started_at=at(0), jobs=(job(1, "in_progress", 3, 10),)))
    clock(10)
    assert how_far(api, 2) == (15, "steps", 90)
    clock(45)
    assert how_far(api, 2) == (40, "history", 55)


def test_an_estimate_is_not_taken_back(api, clock):
    """By a bad end, by runs that end meanwhile, by a wait; only the next attempt begins anew."""
    api.record(took(100, 1), github(P, run=2, started_at=at(0)))
    clock(50)
    assert how_far(api, 2) == (45, "history", 50)
    api.record(*(took(5000, run) for run in range(3, 9)))
    assert how_far(api, 2) == (45, "history", 50)
    api.record(github(P, run=2, waiting=True), now=at(60))
    clock(300)
    assert how_far(api, 2) == (60, "history", None)
    api.record(github(P, run=2), now=at(70))
    api.record(github(F, run=2, ended_at=at(20)), now=at(80))
    assert how_far(api, 2) == (80, "history", None)
    told = [event["data"]["progress"] for event in api("GET", "/api/events")["items"]]
    assert not {45, 50, 60, 80} & set(told)  # events tell what was told
    api.record(github(P, run=2, attempt=2, started_at=at(290)), now=at(290))
    assert how_far(api, 2) == (0, "none", 4990)


def test_an_end_recorded_by_a_clock_that_is_seconds_behind_takes_nothing_back(api, clock):
    api.record(took(100, 1), github(P, run=2, started_at=at(0)))
    clock(50)
    assert how_far(api, 2)[0] == 45
    api.record(github(F, run=2), now=at(45))
    assert how_far(api, 2)[0] == 45


def test_how_long_jenkins_expects_a_build_to_take_stands_in_for_history(api, clock):
    build = {"source": "jenkins", "platform": "jenkins", "attempt": None, "started_at": at(0)}
    told = github(P, by="poll", progress=30, expected_seconds=100.0, **build)
    api.record(told, now=at(30))
    clock(65)
    assert how_far(api, 1) == (60, "history", 35)
    api.record(replace(told, progress=66, expected_seconds=50.0), now=at(66))
    assert how_far(api, 1) == (66, "report", 35)


SOME_JOBS = st.lists(
    st.builds(
        job, st.integers(1, 6), st.sampled_from(["queued", "in_progress", "completed"]), st.integers(0, 5),
        st.sampled_from([0, 5]),
    ),
    max_size=6,
    unique_by=lambda one: one.id,
).map(tuple)  # fmt: skip
OUR_END = {"state": F, "by": "poll", "ours": True, "attempt": None}
TOLD_OF_A_BUILD = st.fixed_dictionaries(
    {
        "state": st.sampled_from([None, Q, P, P, P, F, State.TIMEOUT, State.CANCELLED, C]),
        "attempt": st.sampled_from([1, 1, 1, 2]),
        "by": st.sampled_from(["push", "poll", "report"]),
        "waiting": st.sampled_from([False, False, True]),
        "jobs": SOME_JOBS,
        "jobs_complete": st.booleans(),
        "progress": st.none() | st.integers(0, 100),
        "expected_seconds": st.none() | st.integers(1, 300).map(float),
        "detail": st.none()
        | st.sampled_from(["task_completed", "deploy_started"]).map(lambda word: Detail(type=word)),
        "started_at": st.none() | st.integers(-100, 100).map(at),
    }
)
HAPPENS = st.one_of(
    TOLD_OF_A_BUILD,
    st.sampled_from(["poll failed", "unchanged", "our end"]),
    st.integers(1, 500),  # another build of the workflow, that took so long
)


@settings_of_hypothesis(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_progress_never_falls_within_an_attempt(local, clock, data):
    """Whatever is told, in whatever order, whichever builds end meanwhile, and with clocks seconds apart."""
    name = uuid4().hex
    build = {"key": name, "build_id": f"x:{name}", "workflow": name, "group": None}

    def fact(told):
        if isinstance(told, int):
            other = f"{name}:{uuid4().hex}"
            return took(told, 1, **build | {"key": other, "build_id": other})
        if told == "poll failed":
            return PollFailed(name, "boom", "unavailable")
        if told == "unchanged":
            return Unchanged(name)
        return github(**build, **(OUR_END if told == "our end" else told))

    local.record(
        *map(fact, data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))), github(P, **build)
    )
    time, seen = 0, {}
    for told in data.draw(st.lists(HAPPENS, max_size=12)):
        clock(time)
        status, shown = (local("GET", f"/api/builds/x:{name}{path}") for path in ("/status", ""))
        before = seen.get(shown["attempt"], (0, 0))
        assert status["progress"] >= before[0]
        assert shown["progress"] >= before[1]
        assert status["progress"] >= shown["progress"]
        assert status["etaSeconds"] is None or status["etaSeconds"] >= 0
        seen[shown["attempt"]] = (status["progress"], shown["progress"])
        time += data.draw(st.integers(0, 60))
        local.record(fact(told), now=at(time - data.draw(st.integers(0, 5))))


def test_a_store_that_can_only_be_read_still_tells_how_far_a_build_is(local, clock):
    local.record(took(100, 1), github(P, run=2, started_at=at(0)))
    clock(50)
    event.listen(local.engine, "connect", lambda opened, _: opened.execute("PRAGMA query_only=ON"))
    local.engine.dispose()
    assert how_far(local, 2) == (0, "none", None)


def test_public_progress_opens_these_two_and_nothing_else(make_api, migrated_sqlite, tmp_path):
    path = tmp_path / "public.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    stranger = make_api(f"sqlite:///{path}", PUBLIC_PROGRESS="true").as_(None)
    opened = [
        (method, path)
        for method, path, operation in operations(stranger)
        if stranger.client.open(address(path), method=method).status_code != 401
    ]
    assert sorted(opened) == [
        ("GET", "/api/builds/{build_id}/events"), ("GET", "/api/builds/{build_id}/status"),
        ("GET", "/healthz"), ("GET", "/metrics"), ("GET", "/readyz"),
    ]  # fmt: skip


def test_without_a_store_events_keep_their_shape_and_the_rest_are_problems(make_api, tmp_path):
    away = make_api(f"sqlite:///{tmp_path}/missing/store.db")
    for caller in (away, away.as_("any-other-token")):  # the second one can't even be looked up
        answer = caller("GET", "/api/builds/github:octo:repo:1/events?lastEventId=5", 503)
        assert answer == {"buildId": "github:octo:repo:1", "events": [], "lastEventId": 5}
        assert caller(
            "GET", "/api/builds/github:octo:repo:1/events?lastEventId=x", (503 if caller is not away else 422)
        )
        assert caller("GET", "/api/builds", 503)["title"] == "Service Unavailable"
    answer = away.client.get("/api/builds/x/status", headers={"Authorization": f"Bearer {ADMIN}"})
    assert (answer.status_code, answer.mimetype) == (503, "application/problem+json")
    assert answer.headers["Retry-After"]


# ---- polling ---------------------------------------------------------------------------------

POLLING_FIELDS = {
    "buildId", "isPolling", "reason", "pollCount", "lastPollTime", "nextPollTime", "consecutiveErrors",
    "error",
}  # fmt: skip


def bells(api):
    redis = api.app.extensions["buildrelay"].redis
    return {bell for bell in queues.JOBS if redis.exists(queues.bell_key(bell))}


def test_polling_is_asked_for_once_and_stopped(api):
    api.record(github(P), now=utc_now())
    path = "/api/builds/GITHUB:octo:repo:1/polling"
    before = api("GET", path)
    assert set(before) == POLLING_FIELDS
    assert (before["isPolling"], before["reason"], before["buildId"]) == (
        False,
        "recent_push",
        "github:Octo:Repo:1",
    )
    assert api("GET", "/api/polling")["items"] == []
    started = api("POST", path, 202)
    assert (started["isPolling"], started["reason"], started["pollCount"]) == (True, "requested", 0)
    assert started["nextPollTime"] is not None
    assert bells(api) == {queues.POLL}
    assert "already" in api("POST", path, 409)["detail"]
    assert [item["buildId"] for item in api("GET", "/api/polling")["items"]] == ["github:Octo:Repo:1"]
    for _ in range(2):
        stopped = api("DELETE", path)
        assert (stopped["isPolling"], stopped["reason"], stopped["nextPollTime"]) == (
            False,
            "stopped_by_hand",
            None,
        )
    assert api("GET", "/api/polling")["items"] == []
    assert api("POST", path, 202)["isPolling"]


def test_polling_of_a_build_that_is_over_or_reports_itself(api):
    api.record(github(C), script("build_started"))
    assert "ended" in api("POST", "/api/builds/github:octo:repo:1/polling", 409)["detail"]
    assert api("DELETE", "/api/builds/github:octo:repo:1/polling")["reason"] == "build_ended"
    api("POST", "/api/builds/script:run-1/polling", 422)
    api("POST", "/api/builds/script:unknown/polling", 422)
    shown = api("DELETE", "/api/builds/script:run-1/polling")
    assert (shown["isPolling"], shown["reason"], shown["nextPollTime"]) == (False, "not_pollable", None)
    with db.reading(api.engine) as connection:  # its heartbeat is still watched
        row = connection.execute(select(models.builds).where(models.builds.c.platform == "script")).one()
    assert row.next_poll_at is not None
    assert row.polling == "idle"


def test_polled_builds_are_listed_in_pages(api):
    api.record(*(github(P, run=run, by="poll") for run in range(1, 6)))
    api.record(*(github(P, run=run, by="poll") for run in range(1, 6)), now=at(15))
    items, count = pages(api, "/api/polling", limit=2)
    assert [item["buildId"][-1] for item in items] == ["5", "4", "3", "2", "1"]
    assert count == 3
    assert all(item["isPolling"] and item["reason"] == "no_recent_push" for item in items)


@pytest.mark.parametrize(
    ("asked", "build_id", "key", "repository", "number"),
    [
        ("GitHub:octo:hello:5", "github:octo:hello:5", "github:5", "octo/hello", None),
        ("gitlab:12:345", "gitlab:12:345", "gitlab:12:345", None, None),
        (
            "jenkins:Team:web~20app:7",
            "jenkins:Team:web~20app:7",
            "jenkins:team:web~20app:7",
            "Team/web app",
            7,
        ),
    ],
)
def test_a_build_that_only_a_request_names(api, asked, build_id, key, repository, number):
    answer = api("POST", f"/api/builds/{asked}/polling", 202)
    assert (answer["buildId"], answer["isPolling"], answer["reason"]) == (build_id, True, "requested")
    build = api("GET", f"/api/builds/{asked}")
    assert (build["state"], build["repository"], build["number"]) == ("queued", repository, number)
    with db.reading(api.engine) as connection:
        row = connection.execute(select(models.builds)).one()
    assert (row.key, row.requested, row.raw_status, row.sequence) == (key, True, None, 0)
    assert row.next_poll_at <= utc_now()
    api("POST", f"/api/builds/{asked}/polling", 409)
    api.record(
        Observation(
            source=row.source,
            platform=row.platform,
            observed_by=ObservedBy.POLL,
            key=key,
            build_id=build_id,
            state=P,
        ),
        now=utc_now(),
    )
    assert api("GET", f"/api/builds/{build_id}")["state"] == "in_progress"


@pytest.mark.parametrize(
    ("build_id", "status"),
    [
        ("nowhere:o:r:5", 404), ("27", 404), ("github:5", 422), ("github:o:r:x", 422), ("github:o:r:0", 422),
        ("github:o:..:5", 422), ("github:o r:r:5", 422), ("gitlab:group:5", 422), ("gitlab:1:2:3", 422),
        ("jenkins:5", 422), ("jenkins:a:b", 422), ("jenkins:..:5", 422), ("jenkins:a~2Fb:5", 422),
        ("jenkins:a~00:5", 422),
        ("github:o:r:" + "9" * 30, 422), ("jenkins:" + "a" * 2000 + ":5", 422), ("github:%C3%A9:r:5", 422),
    ],
)  # fmt: skip
def test_an_id_that_can_be_no_build_is_refused(local, build_id, status):
    local("POST", f"/api/builds/{build_id}/polling", status)
    assert local("GET", "/api/builds")["items"] == []


def test_a_source_that_is_switched_off_is_not_polled(make_api, migrated_sqlite, tmp_path):
    path = tmp_path / "off.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    api = make_api(f"sqlite:///{path}", ENABLE_GH="false")
    api.record(github(P))
    api("POST", "/api/builds/github:octo:repo:1/polling", 422)
    api("POST", "/api/builds/github:octo:repo:2/polling", 422)
    assert api("GET", "/api/builds/github:octo:repo:1/polling")["reason"] == "not_pollable"


# ---- subscribers -----------------------------------------------------------------------------

SUBSCRIBER_FIELDS = {
    "id", "url", "events", "sources", "repositories", "branches", "description", "rate_limit_per_second",
    "ordered",
    "headers", "format", "states", "conclusions", "changes", "signing", "public_key", "origin", "state",
    "disabled_reason", "failing_since", "failures", "warned_percent", "on_probation", "slow_until",
    "created_at", "updated_at",
}  # fmt: skip


def subscribe(api, **more):
    return api("POST", "/api/subscribers", 201, json={"url": "https://hooks.example.com/ci"} | more)


def test_a_subscriber_is_registered_and_its_secrets_are_shown_once(api):
    wanted = {
        "events": ["build.*"], "sources": ["github"], "repositories": ["octo/*"], "branches": ["main"],
        "description": "our dashboard", "rate_limit_per_second": 5, "ordered": False,
        "headers": {"X-Api-Key": "very-secret-value"}, "signing": "hmac",
    }  # fmt: skip
    made = subscribe(api, **wanted)
    assert set(made) == SUBSCRIBER_FIELDS | {"secret"}
    assert made["secret"].startswith("whsec_")
    assert made["headers"] == {"X-Api-Key": "***"}
    assert (made["state"], made["disabled_reason"], made["failures"]) == ("active", None, 0)
    for name in wanted.keys() - {"headers"}:
        assert made[name] == wanted[name]
    shown = api("GET", f"/api/subscribers/{made['id']}")
    health = {"tries": 0, "success_rate": None, "p50_ms": None, "p95_ms": None, "last_error": None}
    assert shown == {name: made[name] for name in SUBSCRIBER_FIELDS} | {"health": health}
    listed = json.dumps(api("GET", "/api/subscribers"))
    assert made["id"] in listed
    assert made["secret"] not in listed
    assert "very-secret-value" not in listed


def test_a_subscriber_with_nothing_but_a_url_gets_everything(api):
    made = subscribe(api)
    assert [made[name] for name in ("events", "sources", "repositories", "branches")] == [[], [], [], []]
    assert (made["ordered"], made["signing"], made["headers"]) == (True, "hmac", {})
    api.record(github(C))
    (item,) = api("GET", f"/api/subscribers/{made['id']}/deliveries")["items"]
    assert item["type"] == "build.completed"
    assert subscribe(api, signing="ed25519")["secret"].startswith("whpk_")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "url"), ({"url": "http://hooks.example.com/"}, "url"), ({"url": "https://127.0.0.1/"}, "url"),
        ({"url": "https://user:pw@example.com/"}, "url"), ({"url": "no url"}, "url"),
        ({"url": "https://x\x00y.com"}, "url"),
        ({"url": None}, "url"), ({"events": "build.*"}, "events"), ({"events": [1]}, "events"),
        ({"events": [""]}, "events"),
        ({"headers": {"Host": "x"}}, "headers"), ({"headers": {"X-A": "a\r\nX-B: b"}}, "headers"),
        ({"headers": {"webhook-id": "1"}}, "headers"), ({"headers": []}, "headers"), ({"ordered": "yes"},
        "ordered"),
        ({"rate_limit_per_second": 0}, "rate_limit_per_second"), ({"rate_limit_per_second": "5"},
        "rate_limit_per_second"),
        ({"signing": "rsa"}, "signing"), ({"secret": "mine"}, "secret"), ({"state": "disabled"}, "state"),
        ({"branches": ["x"] * 101}, "branches"), ({"format": "html"}, "format"), ({"states": ["done"]}, "states"),
        ({"conclusions": "success"}, "conclusions"), ({"changes": ["worse"]}, "changes"),
        ({"origin": "settings"}, "origin"), ({"id": "sub_dashboard"}, "id"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_subscriber_is_named(local, body, field):
    answer = local(
        "POST", "/api/subscribers", 422, json={"url": "https://example.com/"} | body if body else body
    )
    assert field in answer["errors"]["json"], answer
    assert local("GET", "/api/subscribers")["items"] == []


def test_private_addresses_where_they_are_allowed(make_api, migrated_sqlite, tmp_path):
    path = tmp_path / "private.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    api = make_api(f"sqlite:///{path}", ALLOW_PRIVATE_CALLBACKS="true")
    assert subscribe(api, url="http://127.0.0.1:9/hook")["url"] == "http://127.0.0.1:9/hook"


def test_a_change_takes_what_is_named_and_leaves_the_rest(api):
    made = subscribe(api, branches=["main"], description="old", headers={"X-A": "1"})
    path = f"/api/subscribers/{made['id']}"
    changed = api(
        "PATCH", path, json={"description": None, "events": ["build.failed"], "headers": {"X-B": "2"}}
    )
    assert (changed["description"], changed["events"], changed["headers"]) == (
        None,
        ["build.failed"],
        {"X-B": "***"},
    )
    assert (changed["branches"], changed["url"]) == (["main"], made["url"])
    assert {name: api("GET", path)[name] for name in SUBSCRIBER_FIELDS} == changed
    assert api("PATCH", path, json={})["events"] == ["build.failed"]
    api("PATCH", path, 422, json={"url": "https://10.0.0.1/"})
    api("PATCH", path, 422, json={"signing": "ed25519"})
    api("PATCH", path, 422)
    assert api("PATCH", path, json={"rate_limit_per_second": 5.0})["rate_limit_per_second"] == 5
    api("PATCH", path, json={"rate_limit_per_second": None})
    api("PATCH", path, 415, data=b'{"ordered": false}', content_type="text/plain")
    api("PATCH", "/api/subscribers/sub_none", 404, json={"events": []})
    api.record(github(C))
    assert api("GET", f"{path}/deliveries")["items"] == []
    api.record(github(F, run=2))
    assert [item["type"] for item in api("GET", f"{path}/deliveries")["items"]] == ["build.failed"]


def test_a_deleted_subscriber_is_gone_with_its_deliveries(api):
    made = subscribe(api)
    api.record(github(C))
    (item,) = api("GET", f"/api/subscribers/{made['id']}/deliveries")["items"]
    api("DELETE", f"/api/subscribers/{made['id']}", 204)
    for method, path in (
        ("DELETE", ""), ("GET", ""), ("GET", "/deliveries"), ("POST", "/test"), ("POST", "/enable"), ("POST",
        "/rotate-secret"),
    ):  # fmt: skip
        api(method, f"/api/subscribers/{made['id']}{path}", 404)
    api("GET", f"/api/deliveries/{item['id']}", 404)
    api("POST", f"/api/deliveries/{item['id']}/retry", 404)
    api.record(github(C, run=2))


def test_a_rotated_secret_leaves_the_old_one_valid_for_the_grace(api):
    made = subscribe(api)
    path = f"/api/subscribers/{made['id']}/rotate-secret"
    rotated = api("POST", path, json={"grace_seconds": 60})
    assert set(rotated) == {"secret", "previous_expires_at"}
    assert rotated["secret"] not in (made["secret"], None)
    with db.reading(api.engine) as connection:
        row = subscribers.get(connection, made["id"])
    assert subscribers.live_secrets(row, (KEY,), utc_now()) == (rotated["secret"], made["secret"])
    assert subscribers.live_secrets(row, (KEY,), utc_now() + timedelta(seconds=61)) == (rotated["secret"],)
    assert api("POST", path)["previous_expires_at"] is not None
    assert api("POST", path, json={"grace_seconds": 0})["previous_expires_at"] is None
    api("POST", path, 422, json={"grace_seconds": -1})
    api("POST", path, 422, json={"grace_seconds": 8 * 86_400})


def test_subscribers_are_listed_in_pages(api):
    ids = sorted(subscribe(api)["id"] for _ in range(5))
    items, count = pages(api, "/api/subscribers", limit=2)
    assert ([item["id"] for item in items], count) == (ids, 3)


def test_without_an_encryption_key_nothing_is_stored_in_clear(make_api, migrated_sqlite, tmp_path):
    path = tmp_path / "keys.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    made = subscribe(make_api(f"sqlite:///{path}"), headers={"X-A": "1"})
    other = make_api(f"sqlite:///{path}", ENCRYPTION_KEYS=Fernet.generate_key().decode())
    assert other("GET", f"/api/subscribers/{made['id']}")["headers"] is None
    assert "ENCRYPTION_KEYS" in other("POST", f"/api/subscribers/{made['id']}/rotate-secret", 503)["detail"]
    without = make_api(f"sqlite:///{path}", ENCRYPTION_KEYS="")
    assert (
        "ENCRYPTION_KEYS"
        in without("POST", "/api/subscribers", 503, json={"url": "https://example.com"})["detail"]
    )


# ---- deliveries ------------------------------------------------------------------------------

DELIVERY_FIELDS = {
    "id", "subscriber_id", "event_id", "build_id", "sequence", "type", "state", "attempt_count",
    "next_attempt_at",
    "reason", "created_at", "settled_at",
}  # fmt: skip


def attempt(api, status, reason=None, now=None):
    """Claim what is due and settle it as if an endpoint had answered so."""
    now = now or utc_now()
    policy = deliveries.RetryPolicy((60.0,), lambda: 0.5)

    def unit(connection):
        claimed = deliveries.claim(connection, now, Room(30), 15).messages
        tried = [deliveries.Tried(message, now, 0.25, status, reason, "the answer") for message in claimed]
        deliveries.settle(connection, tried, now, policy)
        endpoints.note(connection, tried, now)
        return len(claimed)

    return db.in_transaction(api.engine, unit)


def test_a_delivery_with_its_attempts_and_its_retry(api):
    subscriber = subscribe(api)
    api.record(github(C), now=utc_now())
    assert attempt(api, 500, "http_500") == 1
    (item,) = api("GET", f"/api/subscribers/{subscriber['id']}/deliveries")["items"]
    assert set(item) == DELIVERY_FIELDS
    assert item["build_id"] == "github:Octo:Repo:1"
    assert (item["state"], item["reason"], item["attempt_count"], item["sequence"]) == (
        "pending",
        "http_500",
        1,
        1,
    )
    shown = api("GET", f"/api/deliveries/{item['id']}")
    assert set(shown) == DELIVERY_FIELDS | {"attempts"}
    (tried,) = shown["attempts"]
    assert set(tried) == {"number", "started_at", "duration_seconds", "status_code", "reason", "response"}
    assert (tried["number"], tried["status_code"], tried["duration_seconds"]) == (1, 500, 0.25)
    assert tried["response"] == "the answer"
    assert attempt(api, 500, "http_500", utc_now() + timedelta(seconds=120)) == 1
    assert api("GET", f"/api/deliveries/{item['id']}")["state"] == "dead"
    again = api("POST", f"/api/deliveries/{item['id']}/retry", 202)
    assert (again["state"], again["id"], again["reason"]) == ("pending", item["id"], None)
    assert queues.DELIVER in bells(api)
    assert attempt(api, 204) == 1
    final = api("GET", f"/api/deliveries/{item['id']}")
    assert (final["state"], final["next_attempt_at"], len(final["attempts"])) == ("delivered", None, 3)
    assert final["settled_at"] is not None


def test_deliveries_are_filtered_by_state_and_paged(api):
    subscriber = subscribe(api, ordered=False)
    api.record(*(github(C, run=run) for run in range(1, 4)), now=utc_now())
    assert attempt(api, 200) == 3
    api.record(github(C, run=4), github(C, run=5), now=utc_now())
    path = f"/api/subscribers/{subscriber['id']}/deliveries"
    items, count = pages(api, path, limit=2)
    assert [item["build_id"][-1] for item in items] == ["5", "4", "3", "2", "1"]
    assert count == 3
    assert [item["build_id"][-1] for item in pages(api, path, state="pending")[0]] == ["5", "4"]
    assert len(pages(api, path, state="delivered", limit=2)[0]) == 3


def test_a_test_event_goes_to_this_subscriber_only(api):
    subscriber, other = subscribe(api, events=["build.failed"]), subscribe(api)
    answer = api("POST", f"/api/subscribers/{subscriber['id']}/test", 202)
    assert list(answer) == ["delivery_id", "state", "status_code", "reason", "response"]
    assert bells(api) == {queues.DELIVER}
    shown = api("GET", f"/api/deliveries/{answer['delivery_id']}")
    assert (shown["type"], shown["build_id"], shown["state"]) == ("subscriber.test", None, "pending")
    assert api("GET", f"/api/subscribers/{other['id']}/deliveries")["items"] == []
    (made,) = api("GET", "/api/events")["items"]
    assert (made["type"], made["build_id"], made["data"]["subscriber_id"]) == (
        "subscriber.test",
        None,
        subscriber["id"],
    )
    assert set(made["data"]) == {"subscriber_id", "message"}
    assert attempt(api, 200) == 1


def test_a_disabled_subscriber_is_enabled_again(api):
    subscriber = subscribe(api)
    path = f"/api/subscribers/{subscriber['id']}"
    api.record(github(C), now=utc_now())
    (item,) = api("GET", f"{path}/deliveries")["items"]
    attempt(api, 500, "http_500")
    db.as_writer(api.engine, lambda write: endpoints.disable(write, subscriber["id"], "410 Gone", utc_now()))
    disabled = api("GET", path)
    assert (disabled["state"], disabled["disabled_reason"], disabled["failures"]) == (
        "disabled",
        "410 Gone",
        1,
    )
    assert api("GET", f"/api/deliveries/{item['id']}")["reason"] == "subscriber_disabled"
    api("POST", f"{path}/test", 409)
    api("POST", f"/api/deliveries/{item['id']}/retry", 409)
    enabled = api("POST", f"{path}/enable")
    assert set(enabled) == SUBSCRIBER_FIELDS
    assert (enabled["state"], enabled["disabled_reason"], enabled["failures"], enabled["failing_since"]) == (
        "active", None, 0, None,
    )  # fmt: skip
    api.record(github(C, run=2), now=utc_now())
    assert len(api("GET", f"{path}/deliveries?state=pending")["items"]) == 1
    api("POST", f"/api/deliveries/{item['id']}/retry", 202)


# ---- events, inbound, notices, sources, the running script -----------------------------------


def test_all_events_by_a_cursor_without_gaps(api):
    api.record(*(github(P, run=run) for run in range(1, 6)))
    api.record(*(github(C, run=run) for run in range(1, 6)))
    ids, cursor = [], "0"
    while True:
        page = api("GET", f"/api/events?after={cursor}&limit=3")
        ids += [item["id"] for item in page["items"]]
        if not page["items"]:
            break
        cursor = page["next_cursor"]
    assert ids == list(range(1, 11))
    assert page["next_cursor"] == cursor == "10"
    first = api("GET", "/api/events?limit=1")["items"][0]
    assert set(first) == {"id", "build_id", "sequence", "type", "timestamp", "data"}
    assert (first["type"], first["build_id"]) == ("build.in_progress", "github:Octo:Repo:1")
    assert first["data"]["event_id"] == first["id"]
    assert first["data"]["previous_state"] is None
    assert api("GET", "/api/events?cursor=9")["items"][0]["id"] == 10


def jenkins(api, build, status=202):
    body = {"name": "web", "url": "job/web/", "build": {"url": "job/web/5/", "phase": "STARTED"} | build}
    headers = {"X-Build-Token": "jenkins-token"}
    return api("POST", "/webhooks/jenkins", status, json=body, headers=headers)


def test_inbound_deliveries_are_listed_without_and_shown_with_masked_content(api):
    jenkins(
        api,
        {"parameters": {"DEPLOY_KEY": "hunter2"}, "log": "secret line", "scm": {"url": "https://u:pw@git/x"}},
    )
    jenkins(api, {"url": None, "number": 6})
    listed = api("GET", "/api/inbound")["items"]
    assert [item["status"] for item in listed] == ["unreadable", "applied"]
    assert set(listed[0]) == {
        "id", "source", "event", "hook_id", "delivery_id", "status", "reason", "build_id", "received_at",
    }  # fmt: skip
    assert (listed[0]["build_id"], listed[1]["build_id"]) == (None, "jenkins:web:5")
    assert listed[0]["reason"]
    assert [item["id"] for item in api("GET", "/api/inbound?status=unreadable")["items"]] == [listed[0]["id"]]
    assert api("GET", "/api/inbound?source=github")["items"] == []
    assert len(pages(api, "/api/inbound", source="jenkins", limit=1)[0]) == 2
    shown = api("GET", f"/api/inbound/{listed[1]['id']}")
    build = json.loads(shown["body"])["build"]
    assert build["parameters"] == {"DEPLOY_KEY": "***"}
    assert (build["log"], build["scm"]["url"], build["phase"]) == ("***", "https://***@git/x", "STARTED")
    assert shown["headers"] == {
        "content-type": "application/json",
        "user-agent": shown["headers"]["user-agent"],
    }
    assert shown["truncated"] is False
    for hidden in ("hunter2", "secret line", "u:pw", "jenkins-token"):
        assert hidden not in json.dumps(shown)
    api("GET", "/api/inbound/99", 404)


def test_a_kept_delivery_is_taken_once_more(api):
    jenkins(api, {"url": None})
    (kept,) = api("GET", "/api/inbound")["items"]
    again = api("POST", f"/api/inbound/{kept['id']}/reprocess")
    assert set(again) == {"status", "build_id", "reason", "events"}
    assert (again["status"], again["events"]) == ("unreadable", 0)
    assert bells(api) == set()
    with db.reading(api.engine) as connection:
        body = connection.execute(select(models.inbound.c.body)).scalar_one()
    jenkins(api, {})
    (applied, _) = api("GET", "/api/inbound")["items"]
    assert api("POST", f"/api/inbound/{applied['id']}/reprocess")["events"] == 0

    def restore(connection):  # as if the program of that day had not understood the second one
        connection.execute(
            update(models.inbound).where(models.inbound.c.id == applied["id"]).values(status="unreadable")
        )
        connection.execute(models.events.delete())
        connection.execute(update(models.inbound).values(build=None))
        connection.execute(models.builds.delete())

    assert body
    db.in_transaction(api.engine, restore)
    api.app.extensions["buildrelay"].redis.flushall()
    taken = api("POST", f"/api/inbound/{applied['id']}/reprocess")
    assert (taken["status"], taken["build_id"], taken["events"]) == ("accepted", "jenkins:web:5", 1)
    assert bells(api) == {queues.DELIVER}
    assert api("GET", f"/api/inbound/{applied['id']}")["status"] == "applied"
    api("POST", "/api/inbound/99/reprocess", 404)


def test_notifications_are_read_once(api):
    notice = {"kind": "source.unauthorized", "subject": "github", "text": "refused", "created_at": NOON}
    db.in_transaction(api.engine, lambda connection: connection.execute(insert(models.notices), [notice] * 3))
    items, count = pages(api, "/api/notifications", limit=2)
    assert (len(items), count) == (3, 2)
    assert set(items[0]) == {"id", "kind", "subject", "text", "created_at", "read_at"}
    first = api("POST", f"/api/notifications/{items[0]['id']}/read")
    assert first["read_at"] is not None
    assert api("POST", f"/api/notifications/{items[0]['id']}/read")["read_at"] == first["read_at"]
    assert [item["read_at"] for item in api("GET", "/api/notifications")["items"]][1:] == [None, None]
    api("POST", "/api/notifications/99/read", 404)


def test_sources_tell_their_push_health(api):
    api.record(github(Q, run=1), github(Q, run=2), now=at(50))
    late = {"by": "poll", "platform_at": at(200)}
    api.record(github(P, run=1, **late), github(Q, run=2, **late), now=at(200))
    api.record(gitlab(P, 0, None), now=at(10))
    until = utc_now() + timedelta(hours=1)
    over = NOON - timedelta(days=900)
    pauses = {"gitlab": (until, "rate_limited"), "github": (over, "unauthorized")}
    rows = [{"name": name, "paused_until": at_, "pause_reason": why} for name, (at_, why) in pauses.items()]
    db.in_transaction(api.engine, lambda connection: health.upsert(connection, models.sources, rows))
    listed = api("GET", "/api/sources")
    assert listed["next_cursor"] is None
    found = {item["name"]: item for item in listed["items"]}
    assert set(found) == {"github", "gitlab", "jenkins", "script"}
    behind = found["github"].pop("behind_seconds")
    assert (utc_now() - at(215)).total_seconds() - behind < 60, "it was polled at 200"
    age = found["github"].pop("newest_fact_age_seconds")
    assert (utc_now() - at(200)).total_seconds() - age < 60
    assert found["github"] == {
        "name": "github", "platform": "github", "can_poll": True, "paused_until": None, "pause_reason": None,
        "last_push_at": "2026-11-01T12:00:50Z", "last_poll_at": "2026-11-01T12:03:20Z", "pushes": 2,
        "polls": 2, "missed_pushes": 1, "push_share": pytest.approx(2 / 3), "deaf_since": None, "budget": None,
    }  # fmt: skip
    assert found["gitlab"]["pause_reason"] == "rate_limited"
    assert found["gitlab"]["paused_until"] is not None
    silent = found["jenkins"]
    assert (found["script"]["can_poll"], silent["last_push_at"], silent["pushes"]) == (False, None, 0)
    assert (silent["push_share"], silent["newest_fact_age_seconds"]) == (None, None)


def test_sources_tell_what_is_left_of_their_budget_and_what_will_be(api):
    now = utc_now()
    row = {
        "lane": "github:api:1", "sources": ["github", "ghe"], "limit": 5000, "remaining": 4000,
        "reset_at": now + timedelta(seconds=1800), "credit": 1.0, "turns": 1.0, "reckoned_at": now, "price": 0.4,
        "per_hour": 1000.0, "strikes": 0, "requests": 900, "counted": 360,
    }  # fmt: skip
    with api.engine.connect().execution_options(writing=True) as connection, connection.begin():
        connection.execute(insert(models.budgets), row)
    found = {item["name"]: item for item in api("GET", "/api/sources")["items"]}
    assert found["gitlab"]["budget"] is None
    budget = found["github"]["budget"]
    assert budget.pop("reset_at") is not None
    assert abs(budget.pop("forecast_remaining") - 3500) < 5
    assert budget == {
        "limit": 5000, "remaining": 4000, "per_hour": 1000, "requests": 900, "counted": 360,
    }  # fmt: skip


def test_the_running_script(api):
    nothing = api("GET", "/api/admin/build-status")
    assert (nothing["success"], nothing["running"], nothing["activeRun"]) == (True, False, None)
    assert nothing["updatedAt"].endswith("Z")
    now = utc_now()
    started = {"env": "prod", "origin": "server", "command": "npm run build", "host": "ci-1", "pid": 42}
    api.record(script("build_started", **started), script("stage_started", stage="Backend Clean"), now=now)
    api.record(script("heartbeat"), now=now + timedelta(seconds=1))
    running = api("GET", "/api/admin/build-status?heartbeatTimeout=90")
    assert running["running"]
    run = running["activeRun"]
    assert run | started == run
    assert (run["runId"], run["buildId"], run["stage"]) == ("run-1", "script:run-1", "Backend Clean")
    assert run["lastHeartbeatAt"] > run["startedAt"]
    api.record(script("build_completed", state=C), now=now + timedelta(seconds=2))
    assert api("GET", "/api/admin/build-status")["running"] is False


def test_a_silent_script_does_not_count_as_running(api):
    api.record(script("build_started"), now=utc_now() - timedelta(seconds=30))
    assert api("GET", "/api/admin/build-status")["running"] is True
    assert api("GET", "/api/admin/build-status?heartbeatTimeout=20")["running"] is False


# ---- health, documents -----------------------------------------------------------------------


def test_ready_only_when_everything_is_there(api):
    stranger = api.as_(None)
    assert stranger("GET", "/healthz") == {"status": "ok"}
    unready = stranger("GET", "/readyz", 503)
    assert unready["status"] == "unready"
    assert set(unready["checks"]) == {"database", "migrations", "redis", "scheduler", "workers"}
    assert {name for name, check in unready["checks"].items() if check["ok"]} == {
        "database",
        "migrations",
        "redis",
    }
    assert all(set(check) == {"ok", "detail"} for check in unready["checks"].values())
    redis = api.app.extensions["buildrelay"].redis
    redis.set(queues.BEAT_KEY, str(int(time.time())), ex=30)
    _register_worker(redis, [name for name in queues.JOBS if name != queues.SWEEP])
    half = stranger("GET", "/readyz", 503)["checks"]
    assert half["scheduler"]["ok"]
    assert half["workers"] == {"ok": False, "detail": "no worker serves sweep"}
    _register_worker(redis, [queues.SWEEP])
    ready = stranger("GET", "/readyz")
    assert ready["status"] == "ready"
    assert all(check["ok"] for check in ready["checks"].values())


def _register_worker(redis, names):
    from rq import SimpleWorker

    worker = SimpleWorker(names, connection=redis)
    worker.register_birth()


def test_not_ready_on_an_old_schema_or_without_redis(make_api, tmp_path):
    api = make_api(f"sqlite:///{tmp_path / 'empty.db'}", REDIS_URL=f"unix://{tmp_path / 'no.sock'}").as_(None)
    checks = api("GET", "/readyz", 503)["checks"]
    assert checks["database"]["ok"]
    assert "buildrelay migrate" in checks["migrations"]["detail"]
    assert not checks["redis"]["ok"]
    assert str(tmp_path) not in json.dumps(checks)
    away = make_api(f"sqlite:///{tmp_path}/missing/store.db").as_(None)
    assert not away("GET", "/readyz", 503)["checks"]["database"]["ok"]
    assert away("GET", "/healthz") == {"status": "ok"}


def test_a_page_for_people_lists_every_operation(local):
    page = local.client.get("/docs")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    for method, path, _ in operations(local):
        assert f"<code>{method} {path}</code>" in page.text
    assert "<script" not in page.text
    assert not re.search(r"(?:src|href)=.?https?:", page.text)


def test_without_redis_writes_are_kept_and_answered(make_api, migrated_sqlite, tmp_path):
    path = tmp_path / "noredis.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    api = make_api(f"sqlite:///{path}", REDIS_URL=f"unix://{tmp_path / 'no.sock'}")
    api("POST", "/api/builds/gitlab:1:2/polling", 202)
    assert api("GET", "/api/polling")["items"][0]["buildId"] == "gitlab:1:2"


# ---- what questions cost ---------------------------------------------------------------------


def count_statements(api, path):
    statements = []

    def note(_connection, _cursor, statement, *_):
        statements.append(statement)

    event.listen(api.engine, "before_cursor_execute", note)
    try:
        items = api("GET", path)["items"]
    finally:
        event.remove(api.engine, "before_cursor_execute", note)
    return len(statements), len(items)


def test_no_list_asks_the_database_once_per_row(local):
    subscriber = subscribe(local)
    lists = [
        "/api/builds", "/api/builds?repository=Octo/Repo", "/api/polling", "/api/subscribers", "/api/events",
        f"/api/subscribers/{subscriber['id']}/deliveries", "/api/builds/github:octo:repo:1/attempts",
        "/api/sources",
    ]  # fmt: skip

    def more(first):
        for run in range(first, first + 10):
            local.record(github(P, run=run), now=at(0))
            local.record(github(P, run=run, by="poll"), now=at(70))
            local.record(github(P, run=1, attempt=run + 1), now=at(80))
            subscribe(local)

    more(1)
    before = {path: count_statements(local, path) for path in lists}
    more(11)
    for path in lists:
        statements, items = count_statements(local, path)
        assert statements == before[path][0] <= 4, path
        assert items > before[path][1] or path == "/api/sources", path


def plan_of(engine, statement):
    compiled = statement.compile(engine, compile_kwargs={"literal_binds": True})
    with engine.connect() as connection:
        return " | ".join(
            row[3]
            for row in connection.execute(text("EXPLAIN QUERY PLAN " + str(compiled).replace(":", r"\:")))
        )


SOURCES = ["github", "gitlab"]


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (queries.builds(BuildFilter(), SOURCES), "SEARCH builds USING INTEGER PRIMARY KEY (rowid<?)"),
        (queries.builds(BuildFilter(source="github"), SOURCES),
        "SEARCH builds USING INTEGER PRIMARY KEY (rowid<?)"),
        (queries.builds(BuildFilter(state="failed"), SOURCES),
        "SEARCH builds USING INTEGER PRIMARY KEY (rowid<?)"),
        (queries.events_of_build(0, 9).where(models.events.c.build == 1),
        "USING INDEX sqlite_autoindex_events_1 (build=?)"),
        (queries.events(5), "SEARCH events USING INTEGER PRIMARY KEY (rowid>?)"),
        (queries.inbound(), "SEARCH inbound USING INTEGER PRIMARY KEY (rowid<?)"),
        (queries.inbound(status="unreadable"), "USING INDEX ix_inbound_unreadable (id<?)"),
        (queries.deliveries("s"), "(subscriber=? AND event<?)"),
        (queries.deliveries("s", "pending"),
        "(subscriber=? AND event<?)"),
        (queries.dead_letters(reason="http_500", before=("s", 9)), "USING INDEX ix_messages_dead"),
        (queries.dead_letters("s", before=("s", 9)), "USING INDEX ix_messages_dead (subscriber=? AND id<?)"),
        (queries.subscribers("s"), "(id>?)"),
        (queries.notices(), "SEARCH notices USING INTEGER PRIMARY KEY (rowid<?)"),
    ],
)  # fmt: skip
def test_lists_follow_an_index_and_sort_nothing(local, statement, index):
    plan = plan_of(local.engine, statement)
    assert index in plan
    assert "TEMP B-TREE" not in plan
    assert not re.search(r"SCAN (?!\()", plan), plan


def test_the_first_page_of_dead_letters_walks_their_own_small_index(local):
    plan = plan_of(local.engine, queries.dead_letters())
    assert "SCAN messages USING INDEX ix_messages_dead" in plan
    assert "TEMP B-TREE" not in plan


def test_builds_of_a_repository_follow_its_index(local):
    for wanted in (
        BuildFilter(repository="a/b"),
        BuildFilter(repository="a/b", source="github", state="failed"),
    ):
        plan = plan_of(local.engine, queries.builds(wanted, SOURCES))
        assert "ix_builds_repository (source=? AND repository=? AND id<?)" in plan
        assert not re.search(r"SCAN builds", plan), plan


def test_polled_builds_are_found_among_the_open_ones(local):
    plan = plan_of(local.engine, queries.polled())
    assert "ix_builds_due" in plan
    assert "PRIMARY KEY" not in plan


def test_a_build_is_found_by_its_unique_indexes(local):
    columns = models.builds.c
    both = select(columns.id).where((columns.lookup == "x") | (columns.key == "y"))
    assert "SCAN" not in plan_of(local.engine, both)


# ---- masking ---------------------------------------------------------------------------------


def test_masking_hides_values_and_keeps_names():
    body = {
        "object_attributes": {"variables": [{"key": "TOKEN", "value": "v1"}], "status": "success"},
        "variables": ["v2"],
        "build": {"parameters": {"A": "v3"}, "log": "v4\n", "parameters_count": 1},
        "access_token": "v5", "nested": [{"clientSecret": {"deep": "v6"}}], "PASSWORD": 7, "password": None,
        "hook": "https://x.example.com/?private_token=v8&page=2", "clone": "https://bot:v9@example.com/r.git",
    }  # fmt: skip
    text_, cut = masking.readable(json.dumps(body).encode(), "application/json")
    shown = json.loads(text_)
    assert not cut
    assert not re.search(r"v\d", text_)
    assert shown["object_attributes"] == {
        "variables": [{"key": "TOKEN", "value": "***"}],
        "status": "success",
    }
    assert shown["build"] == {"parameters": {"A": "***"}, "log": "***", "parameters_count": 1}
    assert shown["hook"] == "https://x.example.com/?private_token=***&page=2"
    assert shown["clone"] == "https://***@example.com/r.git"
    assert (shown["PASSWORD"], shown["password"]) == ("***", None)


def test_masking_reads_forms_and_shows_nothing_that_is_no_json():
    form = b"payload=%7B%22token%22%3A%22v1%22%2C%22a%22%3A1%7D"
    shown, _ = masking.readable(form, "application/x-www-form-urlencoded; charset=utf-8")
    assert json.loads(shown) == {"token": "***", "a": 1}
    for body, kind in (
        (b"token=v1", "text/plain"),
        (b"a=1", "application/x-www-form-urlencoded"),
        (b"\xff", ""),
    ):
        assert masking.readable(body, kind) == ("(not shown: it is not JSON)", False)


def test_masking_cuts_what_is_long_and_survives_what_is_deep():
    shown, cut = masking.readable(json.dumps({"a": "x" * 400_000}).encode(), "application/json")
    assert cut
    assert len(shown) == masking.MOST_CHARACTERS
    deep = ("[" * 200 + '"v1"' + "]" * 200).encode()
    assert "v1" not in masking.readable(deep, "application/json")[0]
    started = time.process_time()
    masking.masked("?" * 300_000 + "&token" * 50_000)
    assert time.process_time() - started < 5
