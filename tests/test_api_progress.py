"""The progress API: events and status of a build, in the words of its document."""

from dataclasses import replace
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from sqlalchemy import event

from tests.caller import ADMIN, address, operations, script
from tests.facts import at, github, job
from webhook_app.builds import PollFailed, Unchanged
from webhook_app.lifecycle import Detail, State

Q, P, C, F = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED


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


@settings_of_hypothesis(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_to_strangers_a_build_has_the_name_they_asked_for(make_api, migrated_sqlite, tmp_path):
    path = tmp_path / "public.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    stranger = make_api(f"sqlite:///{path}", PUBLIC_PROGRESS="true").as_(None)
    member = make_api(f"sqlite:///{path}")
    member.record(github(State.QUEUED))
    for asked in ("github:octo:repo:1", "github:guessed:name:1"):
        for what in ("status", "events"):
            told = stranger.client.get(f"/api/builds/{asked}/{what}")
            assert told.json["buildId"] == asked
            assert told.json.get("eventCount", 1) == 1
            assert "Octo" not in told.text
    assert member("GET", "/api/builds/github:octo:repo:1/status")["buildId"] == "github:Octo:Repo:1"


def test_without_a_store_events_keep_their_shape_and_the_rest_are_problems(make_api, tmp_path):
    away = make_api(f"sqlite:///{tmp_path}/missing/store.db")
    for caller in (away, away.as_("any-other-token")):  # the second one can't even be looked up
        answer = caller("GET", "/api/builds/github:octo:repo:1/events?lastEventId=5", 503)
        assert answer == {"buildId": "github:octo:repo:1", "events": [], "lastEventId": 5}
        assert caller("GET", "/api/builds/x/events?lastEventId=", 503)["lastEventId"] == 0
        assert caller(
            "GET", "/api/builds/github:octo:repo:1/events?lastEventId=x", (503 if caller is not away else 422)
        )
        assert caller("GET", "/api/builds", 503)["title"] == "Service Unavailable"
    answer = away.client.get("/api/builds/x/status", headers={"Authorization": f"Bearer {ADMIN}"})
    assert (answer.status_code, answer.mimetype) == (503, "application/problem+json")
    assert answer.headers["Retry-After"]
