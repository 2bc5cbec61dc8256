"""What operators ask the API: events, inbound deliveries, notices, sources, the running script."""

import json
import re
import time
import zlib
from datetime import timedelta

import pytest
from sqlalchemy import insert, select, update

from tests.caller import bells, jenkins, pages, script
from tests.facts import NOON, PACE, at, github, gitlab
from webhook_app import (
    builds,
    db,
    health,
    models,
    queues,
)
from webhook_app.lifecycle import State
from webhook_app.times import utc_now
from webhook_app.web.api import masking

Q, P, C, F = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED


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


def test_the_list_of_events_tells_how_far_back_it_goes(api):
    assert api("GET", "/api/events") == {"items": [], "next_cursor": "0", "oldest_id": None}
    api.record(*(github(P, run=run) for run in range(1, 4)))
    assert api("GET", "/api/events?after=2")["oldest_id"] == 1
    forget(api, 1)
    page = api("GET", "/api/events")
    assert (page["oldest_id"], [item["id"] for item in page["items"]]) == (2, [2, 3])
    forget(api, 2, 3)
    assert api("GET", "/api/events") == {"items": [], "next_cursor": "0", "oldest_id": None}


def test_a_strict_cursor_is_refused_where_the_next_event_is_gone(api):
    """Retention leaves several gaps: what a subscriber is still to get is kept longer."""

    def strict(after, status=200, **more):
        return api(
            "GET", "/api/events", status, query_string={"after": after, "strict": "true", "limit": 3} | more
        )

    assert strict(0)["items"] == []
    api.record(*(github(P, run=run) for run in range(1, 9)))
    assert [item["id"] for item in strict(0)["items"]] == [1, 2, 3]
    forget(api, 1, 2, 4, 5, 6)
    refused = strict(0, 410)
    assert refused["detail"] == "the events 1 to 2 were deleted by retention"
    assert (refused["oldest_id"], refused["next_cursor"]) == (3, "2")
    assert strict(1, 410)["next_cursor"] == "2"
    page = strict(refused["next_cursor"])  # which is as far as nothing is missing
    assert ([item["id"] for item in page["items"]], page["next_cursor"]) == ([3], "3")
    assert strict(3, 410)["next_cursor"] == strict(5, 410, limit=1)["next_cursor"] == "6"
    assert [item["id"] for item in strict(6)["items"]] == [7, 8]
    assert strict(8)["items"] == []
    assert [item["id"] for item in api("GET", "/api/events?after=1")["items"]] == [3, 7, 8]
    assert [item["id"] for item in strict(1, strict="false")["items"]] == [3, 7, 8]
    forget(api, 3, 7, 8)
    gone = strict(6, 410)
    assert (gone["oldest_id"], gone["next_cursor"]) == (None, "8")
    assert strict(8)["items"] == []
    assert strict(9)["items"] == []  # not ours yet, and not gone


def test_ids_of_events_have_no_holes_when_a_transaction_fails(api):
    api.record(github(P, run=1))

    def unit(write):
        builds.record(write, [github(P, run=2)], NOON, PACE)
        raise RuntimeError("in this test")

    with pytest.raises(RuntimeError):
        db.as_writer(api.engine, unit)
    api.record(github(P, run=3))
    assert [item["id"] for item in api("GET", "/api/events?strict=true")["items"]] == [1, 2]


def forget(api, *ids):
    """Delete events, as retention does."""
    db.in_transaction(
        api.engine, lambda held: held.execute(models.events.delete().where(models.events.c.id.in_(ids)))
    )


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
    for source in ("jenkins", "Jenkins"):
        assert len(pages(api, "/api/inbound", source=source, limit=1)[0]) == 2
    shown = api("GET", f"/api/inbound/{listed[1]['id']}")
    build = json.loads(shown["body"])["build"]
    assert build["parameters"] == {"DEPLOY_KEY": "***"}
    assert (build["log"], build["scm"]["url"], build["phase"]) == ("***", "https://***@git/x", "STARTED")
    assert shown["headers"] == {
        "content-type": "application/json",
        "user-agent": shown["headers"]["user-agent"],
    }
    assert shown["truncated"] is False
    for hidden in ("hunter2", "secret line", "u:pw", "jenkins-token-of-the-tests"):
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


def test_a_delivery_that_was_applied_stays_so_when_it_can_not_be_read_any_more(api):
    jenkins(api, {})
    (kept,) = api("GET", "/api/inbound")["items"]

    def forget(connection):  # as if a header or a word that mattered were lost
        connection.execute(update(models.inbound).values(body=zlib.compress(b"{}")))

    db.in_transaction(api.engine, forget)
    assert api("POST", f"/api/inbound/{kept['id']}/reprocess")["status"] == "unreadable"
    shown = api("GET", f"/api/inbound/{kept['id']}")
    assert (shown["status"], shown["build_id"], shown["reason"]) == ("applied", "jenkins:web:5", None)


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
        "polls": 2, "missed_pushes": 1, "late_pushes": 0, "push_share": pytest.approx(2 / 3), "deaf_since": None, "budget": None,
        "last_error": None, "last_error_kind": None, "last_error_at": None, "failing_since": None,
        "errors_in_row": 0, "failing_repositories": [],
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
