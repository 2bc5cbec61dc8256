"""The HTTP API as a client sees it: its document, tokens, errors and health; over real databases and a real Redis."""

import json
import re
import time

import pytest

from tests.caller import ADMIN, address, operations
from tests.facts import at, github
from webhook_app import db, health, models, queues
from webhook_app.lifecycle import State
from webhook_app.web import state

Q, P, C, F = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED


def _register_worker(redis, names):
    from rq import SimpleWorker

    worker = SimpleWorker(names, connection=redis)
    worker.register_birth()


# ---- the document, tokens and errors ---------------------------------------------------------


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
        expected = set() if operation["security"] == [] else {"401", "403", "429", "503"}
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
        "/api/subscribers?cursor=", "/api/deliveries?cursor=", "/api/events?after=%20",
        "/api/builds/x/events?lastEventId=x", "/api/builds/x/events?lastEventId=-1", "/api/events?after=-1",
        f"/api/events?after={2**63}", "/api/inbound?status=lost", "/api/tokens?cursor=AA",
        "/api/admin/build-status?heartbeatTimeout=0", "/api/subscribers?cursor=*",
        "/api/deliveries?state=pending", "/api/deliveries?cursor=c3ViXzE", "/api/deliveries?cursor=OQ",
    ],
)  # fmt: skip
def test_a_question_that_makes_no_sense_is_422(local, path):
    assert local("GET", path, 422)["errors"]["query"]


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/api/builds", ("limit",)),
        ("/api/builds/github:Octo:Repo:1/events", ("lastEventId",)),
        ("/api/builds/github:Octo:Repo:1/logs", ("tail", "attempt")),
        ("/api/events", ("after", "cursor", "limit")),
        ("/api/subscribers", ("limit",)),
        ("/api/deliveries", ("limit",)),
        ("/api/admin/build-status", ("heartbeatTimeout",)),
    ],
)
def test_an_empty_number_is_as_one_that_is_left_out(local, path, parameters):
    local.record(github(State.IN_PROGRESS))
    status = 202 if path.endswith("/logs") else 200  # its build has not ended
    usual = local("GET", path, status)
    for parameter in parameters:
        empty = local("GET", f"{path}?{parameter}=", status)
        assert {**empty, "updatedAt": 0} == {**usual, "updatedAt": 0}, parameter


def test_ids_that_no_database_can_hold_are_not_found(api):
    for path in ("builds/a%00b", "subscribers/a%00b", "deliveries/a%00b", f"inbound/{2**63}", "inbound/0"):
        api("GET", f"/api/{path}", 404)
    api("DELETE", "/api/tokens/a%00b", 404)
    api("GET", "/api/builds/%ff%fe", 404)
    api("GET", f"/api/builds/github:o:r:{'9' * 40}", 404)
    api("GET", "/api/nowhere", 404)
    api("PUT", "/api/builds", 405)


# ---- health, documents -----------------------------------------------------------------------


def test_ready_only_when_everything_is_there(api, monkeypatch):
    monkeypatch.setattr(state, "RECENT_SECONDS", 0.0)
    stranger = api.as_(None)
    assert stranger("GET", "/healthz") == {"status": "ok"}
    unready = stranger("GET", "/readyz", 503)
    assert unready["status"] == "unready"
    assert set(unready["checks"]) == {
        "database", "migrations", "redis", "scheduler", "workers", "sources",
    }  # fmt: skip
    assert {name for name, check in unready["checks"].items() if check["ok"]} == {
        "database",
        "migrations",
        "redis",
        "sources",
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
    failing = {
        "name": "github",
        "api_failing_since": at(5),
        "api_failures": 3,
        "api_error_kind": "unavailable",
        "api_error": "x",
    }
    db.in_transaction(api.engine, lambda connection: health.upsert(connection, models.sources, [failing]))
    ready = stranger("GET", "/readyz")
    assert ready["status"] == "ready", "a platform that is away is not our fault"
    assert ready["checks"]["sources"] == {
        "ok": False, "detail": "github can't be read since 2026-11-01T12:00:05Z (unavailable)",
    }  # fmt: skip


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
