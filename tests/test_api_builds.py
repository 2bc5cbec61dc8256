"""Builds over the API: lists, one, its attempts, and how it is polled."""

import hashlib
import hmac
import json
import re

import pytest
from sqlalchemy import select

from tests.caller import SECRET, bells, pages, script
from tests.facts import at, github, gitlab
from webhook_app import (
    builds,
    db,
    models,
    queues,
)
from webhook_app.lifecycle import Observation, ObservedBy, State
from webhook_app.times import utc_now

Q, P, C, F = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED
BUILD_FIELDS = {
    "build_id", "source", "platform", "repository", "workflow", "branch", "commit", "number", "attempt",
    "state",
    "conclusion", "url", "started_at", "ended_at", "duration_seconds", "progress", "observed_by",
    "last_push_at",
    "last_poll_at", "error", "trigger", "head_repository", "is_fork",
}  # fmt: skip


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
        "trigger": None, "head_repository": None, "is_fork": False,
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


def test_a_repository_is_found_under_each_spelling_of_its_name(api):
    names = ["Octo/Repo", "octo/repo", "octo/Repo", "octo/other", "Ünit/Ä", "ünit/ä"]
    api.record(*(github(Q, run=run, repository=name) for run, name in enumerate(names, 1)))
    api.record(script("heartbeat"))  # of no repository

    def found(name):
        items, _ = pages(api, "/api/builds", limit=2, repository=name)
        return [item["number"] for item in items]

    assert found("OCTO/repo") == found("Octo/Repo") == [3, 2, 1]
    assert found("ÜNIT/ä") == [6, 5]
    assert found("octo/rep") == found("octo") == found("") == []


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
    assert found(repository="octo/repo") == found(repository="OCTO/REPO", source="GitHub") == [2, 1]
    assert found(repository="Octo/Repo", source="gitlab") == []
    assert found(source="GITHUB") == [3, 2, 1]
    assert found(repository="group/project") == ["gitlab"]
    assert found(branch="dev") == [2]
    assert found(state="in_progress") == ["gitlab", 1]
    assert found(conclusion="failure") == [3]
    assert found(workflow="Deploy", state="failed") == [3]
    assert found(workflow="Deploy", state="completed") == []
    assert found(since="2026-11-01T12:01:00Z") == ["gitlab", 3]
    assert found(since="2026-11-01T13:01:00+01:00", until="2026-11-01T12:02:00Z") == [3]
    assert found(until="2026-11-01T12:01:00Z", repository="Octo/Repo", branch="main") == [1]
    api.record(github(F, run=4, branch="stranger:main", is_fork=True), now=at(180))
    api.record(github(F, run=5, branch="stranger:xmain", is_fork=True), now=at(180))
    assert found(branch="main", source="github") == [3, 1]
    assert found(branch="main", source="github", forks="true") == [4, 3, 1]
    assert found(branch="stranger:main") == [4]


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


# ---- polling ---------------------------------------------------------------------------------

POLLING_FIELDS = {
    "buildId", "isPolling", "reason", "pollCount", "lastPollTime", "nextPollTime", "consecutiveErrors",
    "error",
}  # fmt: skip


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


def test_a_build_that_polling_gave_up_on_says_that_nobody_watches_it(api):
    api.record(github(P), github(P, run=2), now=at(0))
    fails = [builds.PollFailed("github:1", "unavailable: connect: refused", "unavailable")]
    for _ in range(3):
        api.record(*fails, now=at(100))
    why = "polling stopped after 3 errors: unavailable: connect: refused"
    assert api("GET", "/api/builds/github:octo:repo:1")["error"] == why
    assert api("GET", "/api/builds/github:octo:repo:1/status")["error"] == why
    assert api("GET", "/api/builds/github:octo:repo:1/attempts")["items"][0]["error"] == why
    assert [build["error"] for build in api("GET", "/api/builds")["items"]] == [None, why]
    shown = api("GET", "/api/builds/github:octo:repo:1/polling")
    assert (shown["isPolling"], shown["reason"], shown["consecutiveErrors"]) == (False, "too_many_errors", 3)
    assert shown["error"] == "unavailable: connect: refused"
    assert shown["nextPollTime"] == "2026-11-01T13:01:40Z", "an hour later, in case it works then"
    api.record(github(C), now=at(200))
    assert api("GET", "/api/builds/github:octo:repo:1")["error"] is None


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


@pytest.mark.parametrize("ended", ["timeout", "failed"])
def test_a_build_that_we_ended_can_be_polled_by_hand(api, ended):
    path = "/api/builds/github:octo:repo:1/polling"
    api.record(github(P))
    api.record(github(State(ended), by="poll", ours=True, error="given up"))
    shown = api("GET", path)
    assert (shown["isPolling"], shown["nextPollTime"]) == (False, "2026-11-01T12:01:00Z")
    asked = api("POST", path, 202)
    assert (asked["isPolling"], asked["reason"]) == (True, "requested")
    api("POST", path, 409)
    api.record(github(P, by="poll"))
    assert api("GET", "/api/builds/github:octo:repo:1")["state"] == "in_progress"
    api.record(github(C))
    assert "ended" in api("POST", path, 409)["detail"]


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
