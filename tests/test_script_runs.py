"""Runs of build scripts, told through HTTP: what is answered, what is kept, and second runs of one id."""

import json
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update

from tests.facts import PACE
from tests.test_script_reports import ANY, ENDS, OPTIONAL
from webhook_app import builds, db, models
from webhook_app.lifecycle import Conclusion, Observation, ObservedBy, State
from webhook_app.platforms import script
from webhook_app.times import utc_now

URL = "/api/internal/build-events"
TOKEN = {"X-Build-Token": "script-token-of-the-tests"}
START, MIDDLE, END, FAILURE = "build_started", "stage_completed", "build_completed", "build_failed"


def report(api, event, run="r", status=202, **fields):
    body = json.dumps({"runId": run, "event": event, **fields})
    return api("POST", URL, status, data=body, headers=TOKEN | {"Content-Type": "application/json"})


def build(api, build_id="script:r"):
    return api("GET", f"/api/builds/{build_id}")


def attempts(api, build_id="script:r"):
    found = api("GET", f"/api/builds/{build_id}/attempts")["items"]
    return [(one["attempt"], one["state"]) for one in sorted(found, key=lambda one: one["attempt"])]


def types(api, build_id="script:r"):
    """The events of a build: their types, and their attempts."""
    events = models.events.c
    rows_of = (
        select(events.type, events.data)
        .join(models.builds, models.builds.c.id == events.build)
        .where(models.builds.c.build_id == build_id)
        .order_by(events.id)
    )
    with db.reading(api.engine) as connection:
        rows = connection.execute(rows_of).all()
    return [(row.type.removeprefix("build."), row.data["attempt"]) for row in rows]


def fall_silent(api, run="r"):
    """As the sweep does after `HEARTBEAT_TIMEOUT`."""
    lost = Observation(
        source="script", platform="script", observed_by=ObservedBy.POLL, key=f"script:{run}",
        build_id=f"script:{run}", state=State.FAILED, conclusion=Conclusion.FAILURE,
        error="no heartbeat for 90 s", ours=True,
    )  # fmt: skip
    db.as_writer(api.engine, lambda write: builds.record(write, [lost], utc_now(), PACE))


# ---- fields of the wrong type ----------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"durationMs": 1234.5}, {"pid": "12345"}, {"message": {"text": "done"}}, {"commit": 1234567},
        {"timestamp": "soon"}, {"progress": "50"}, {"data": ["x"]}, {"repo": {}}, {"durationMs": 10**400},
        {"stage": True}, {"url": "javascript:alert(1)"}, {"durationMs": float("nan")}, {"eventId": {"a": 1}},
    ],
)  # fmt: skip
def test_a_mistyped_detail_never_costs_a_build_its_end(local, wrong):
    report(local, START)
    answer = report(local, END, **wrong)
    (name,) = wrong
    assert answer == {
        "status": "accepted", "build_id": "script:r", "delivery_id": answer["delivery_id"], "dropped": [name],
    }  # fmt: skip
    assert (build(local)["state"], build(local)["conclusion"]) == ("completed", "success")
    assert "dropped" not in report(local, START, "other", durationMs=5)


SHARED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHARED
@given(
    end=st.sampled_from(ENDS), fields=st.dictionaries(st.sampled_from(OPTIONAL), ANY, max_size=8)
)  # fmt: skip
def test_whatever_the_optional_fields_hold_the_end_is_recorded(local, end, fields):
    fields.pop("eventId", None), fields.pop("deliveryId", None)  # those may make it a duplicate
    run = f"run-{db.as_writer(local.engine, lambda write: write.new_id('inbound'))}"
    assert report(local, START, run)["status"] == "accepted"
    answer = report(local, end, run, **fields)
    assert answer["status"] == "accepted"
    assert set(answer.get("dropped", [])) <= set(fields)
    state = "completed" if end.endswith("completed") else "failed"
    assert build(local, f"script:{run}")["state"] == state
    assert local("GET", f"/api/builds/script:{run}/status")["status"] == state
    local("GET", f"/api/builds/script:{run}/logs")
    local("GET", "/api/notifications")
    local("GET", "/api/admin/build-status")


def test_what_a_running_script_tells_in_data_may_be_of_any_type(api):
    report(api, START, pid=7, stage="one")
    report(api, MIDDLE, data={"pid": "none", "stage": {"a": 1}, "message": [], "host": 5})
    shown = api("GET", "/api/admin/build-status")["activeRun"]
    assert (shown["pid"], shown["stage"], shown["message"], shown["host"]) == (7, "one", None, None)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"event": "heartbeat"}, "runId"), ({"runId": {"a": 1}, "event": "heartbeat"}, "runId"),
        ({"runId": "tab\t", "event": "heartbeat"}, "runId"), ({"runId": "r"}, "event"),
        ({"runId": "r", "event": "build_exploded"}, "event"), ({"runId": "r", "event": 5}, "event"),
        ([], "body"), ("text", "body"), (None, "body"),
    ],
)  # fmt: skip
def test_what_can_not_be_understood_is_422_and_kept(local, body, field):
    headers = TOKEN | {"Content-Type": "application/json"}
    answer = local("POST", URL, 422, data=json.dumps(body), headers=headers)
    assert list(answer["errors"]) == [field]
    assert answer["detail"] == answer["errors"][field][0]
    assert answer.get("allowed") == (list(script.EVENTS) if field == "event" else None)
    if field == "event":
        assert "build_completed" in answer["detail"]
    (kept,) = local("GET", "/api/inbound?status=unreadable")["items"]
    assert (str(kept["id"]), kept["reason"]) == (answer["delivery_id"], answer["detail"])
    assert local("POST", f"/api/inbound/{kept['id']}/reprocess")["status"] == "unreadable"


def test_what_is_no_json_or_has_no_token_is_not_kept(api):
    headers = {"Content-Type": "application/json"}
    api("POST", URL, 400, data=b"{", headers=TOKEN | headers)
    api("POST", URL, 401, data=b'{"runId": "r"}', headers=headers)
    assert api("GET", "/api/inbound")["items"] == []


@pytest.mark.parametrize(
    ("run", "build_id"),
    [
        (27, "script:27"), ("nightly 1", "script:nightly~201"), ("a/b:c", "script:a~2Fb~3Ac"),
        ("..", "script:~2E~2E"), ("größe", "script:gr~C3~B6~C3~9Fe"), ("100%", "script:100~25"),
        ("x" * 255, "script:" + "x" * 255),
    ],
)  # fmt: skip
def test_any_printable_run_id_has_a_build(api, run, build_id):
    assert report(api, START, run)["build_id"] == build_id
    assert build(api, build_id)["state"] == "in_progress"
    assert api("GET", "/api/admin/build-status")["activeRun"]["runId"] == str(run)
    report(api, END, run)
    assert (
        api("GET", f"/api/builds/{build_id.swapcase().replace('SCRIPT', 'script')}")["state"] == "completed"
    )
    assert api("GET", f"/api/builds/{build_id}/events")["lastEventId"] == 2


def test_the_longest_run_ids_are_stored_and_found(api):
    for run in ("\U0001f600" * 255, "語" * 255):
        build_id = report(api, START, run)["build_id"]
        assert report(api, END, run)["build_id"] == build_id
        assert build(api, build_id)["state"] == "completed"


def test_one_event_id_may_serve_two_runs(api):
    assert report(api, START, "a", eventId=1)["status"] == "accepted"
    assert report(api, START, "a", eventId="1")["status"] == "duplicate"
    assert report(api, START, "b", eventId=1)["status"] == "accepted"
    assert build(api, "script:b")["state"] == "in_progress"


def test_a_second_run_may_number_its_events_from_one_again(api):
    for attempt, minute in ((1, "10:00"), (2, "10:05")):
        for number, event in enumerate((START, END), 1):
            at = f"2026-11-01T{minute}:0{number}Z"
            assert report(api, event, "a", eventId=number, timestamp=at)["status"] == "accepted"
            assert report(api, event, "a", eventId=number, timestamp=at)["status"] == "duplicate"
        assert build(api, "script:a")["attempt"] == attempt


# ---- after an end ----------------------------------------------------------------------------


def test_a_second_run_of_one_id_is_the_next_attempt(api):
    report(api, START, commit="aaa", branch="main", repo="web", taskCount=2)
    report(api, MIDDLE)
    report(api, "deploy_completed", previewUrl="https://one.example.com")
    assert report(api, START, commit="bbb")["status"] == "accepted"
    now = build(api)
    assert (now["attempt"], now["state"], now["conclusion"], now["progress"]) == (2, "in_progress", None, 0)
    assert (now["commit"], now["branch"], now["repository"], now["ended_at"]) == ("bbb", "main", "web", None)
    assert api("GET", "/api/builds/script:r/status")["previewUrl"] is None
    assert attempts(api) == [(1, "completed"), (2, "in_progress")]
    report(api, FAILURE, message="no space")
    assert (build(api)["state"], build(api)["error"]) == ("failed", "no space")
    report(api, START)
    report(api, END)
    assert attempts(api) == [(1, "completed"), (2, "failed"), (3, "completed")]
    assert [each for each in types(api) if each[0] != "reported"] == [
        ("in_progress", 1), ("completed", 1), ("in_progress", 2), ("failed", 2), ("in_progress", 3),
        ("completed", 3),
    ]  # fmt: skip


def test_each_attempt_has_its_own_times_and_log(api):
    for hour, minutes in ((10, 5), (11, 7)):
        report(api, START, timestamp=f"2026-11-01T{hour}:00:00Z", message=f"run {hour}")
        report(api, END, timestamp=f"2026-11-01T{hour}:0{minutes}:00Z")
    assert build(api)["duration_seconds"] == 420
    found = api("GET", "/api/builds/script:r/attempts")["items"]
    assert sorted(one["duration_seconds"] for one in found) == [300, 420]
    for attempt, hour in ((1, 10), (2, 11)):
        lines = api("GET", f"/api/builds/script:r/logs?attempt={attempt}")["lines"]
        assert lines == [f"build_started: run {hour}", "build_completed"]
    report(api, START, pid=3)
    shown = api("GET", "/api/admin/build-status")["activeRun"]
    assert (shown["pid"], shown["message"]) == (3, None), "nothing of an earlier attempt"


@pytest.mark.parametrize("late", [event for event in script.EVENTS if event != START])
@pytest.mark.parametrize("end", [END, FAILURE])
def test_a_report_after_the_end_is_ignored_and_says_so(local, end, late):
    report(local, START)
    report(local, end, message="the first")
    before, made = build(local), types(local)
    answer = report(local, late, eventId="late")
    reason = "the run has ended already; build_started opens its next attempt"
    assert answer == {"status": "ignored", "build_id": "script:r", "reason": reason, "delivery_id": "late"}
    assert build(local) | {"last_push_at": None} == before | {"last_push_at": None}
    assert types(local) == made
    kept = local("GET", "/api/inbound")["items"][0]
    assert (kept["status"], kept["reason"], kept["build_id"]) == ("ignored", reason, "script:r")
    assert report(local, late, eventId="late")["status"] == "duplicate"


def test_an_end_that_is_told_twice_counts_for_what_is_new_in_it(api):
    report(api, START)
    report(api, END)
    assert report(api, END)["status"] == "ignored"
    address = {"previewUrl": "https://preview.example.com/"}
    assert report(api, "deploy_completed", **address)["status"] == "accepted"
    assert api("GET", "/api/builds/script:r/status")["previewUrl"] == address["previewUrl"]
    assert report(api, "deploy_completed", **address)["status"] == "ignored"
    assert types(api) == [("in_progress", 1), ("completed", 1), ("reported", 1)]


def test_a_start_that_is_repeated_while_the_run_goes_on_opens_nothing(api):
    for _ in range(3):
        assert report(api, START)["status"] == "accepted"
    report(api, MIDDLE)
    report(api, START)
    report(api, END)
    assert attempts(api) == [(1, "completed")]


def test_a_start_that_came_later_by_its_own_time_shows_that_an_end_was_lost(api):
    for minute in ("00", "00", "07"):
        assert report(api, START, timestamp=f"2026-11-01T10:{minute}:00Z")["status"] == "accepted"
    assert attempts(api) == [(1, "in_progress"), (2, "in_progress")]
    late = report(api, FAILURE, timestamp="2026-11-01T10:05:00Z")
    assert (late["status"], build(api)["state"]) == ("ignored", "in_progress")
    report(api, END, timestamp="2026-11-01T10:09:00Z")
    assert (build(api)["state"], build(api)["duration_seconds"]) == ("completed", 120)


def test_an_end_whose_clock_is_wrong_ends_the_run_all_the_same(api):
    report(api, START, timestamp="2026-11-01T12:00:00Z")
    assert report(api, END, timestamp="2026-11-01T10:00:00Z")["status"] == "accepted"
    assert (build(api)["state"], build(api)["duration_seconds"]) == ("completed", 0)


def test_a_deployment_that_builds_twice_is_one_attempt(api):
    for minute, event in enumerate(("deploy_started", START, START, "deploy_progress", "deploy_completed")):
        assert report(api, event, timestamp=f"2026-11-01T10:0{minute}:00Z")["status"] == "accepted"
    assert attempts(api) == [(1, "completed")]
    assert build(api)["duration_seconds"] == 240


def test_a_deployment_is_one_attempt(api):
    for event in (
        "plan_started",
        "plan_generated",
        "task_completed",
        "deploy_started",
        START,
        "deploy_progress",
    ):
        assert report(api, event)["status"] == "accepted"
    report(api, "deploy_completed")
    assert attempts(api) == [(1, "completed")]


def test_a_deployment_that_was_silent_before_its_build_is_still_one_attempt(api):
    report(api, "plan_started")
    report(api, "deploy_started")
    fall_silent(api)
    assert build(api)["state"] == "failed"
    assert report(api, START)["status"] == "accepted"
    report(api, "deploy_completed")
    assert attempts(api) == [(1, "completed")]


def test_after_a_lost_heartbeat_a_new_start_is_a_new_attempt_and_any_other_word_is_life(api):
    report(api, START)
    fall_silent(api)
    assert report(api, "heartbeat")["status"] == "accepted"
    assert attempts(api) == [(1, "in_progress")]
    fall_silent(api)
    assert report(api, START)["status"] == "accepted"
    assert attempts(api) == [(1, "failed"), (2, "in_progress")]
    report(api, END)
    assert build(api)["error"] is None


@pytest.mark.parametrize(
    ("start", "end", "late", "reason"),
    [
        ("10:00", "10:05", "10:00", "this start of the run was reported before"),
        ("10:00", "10:05", "09:00", "this start of the run was reported before"),
        ("10:00", "10:05", "10:04", "its timestamp is before the end of the run: a late report"),
        (None, "10:05", "10:00", "its timestamp is before the end of the run: a late report"),
        (None, None, "10:00", "its timestamp is before the end of the run: a late report"),
        ("10:00", None, "10:00", "this start of the run was reported before"),
        ("10:00", "10:05", "10:05", None), ("10:00", "10:05", "10:06", None), ("10:00", "10:05", None, None),
        ("10:00", None, "10:01", None), (None, None, None, None),
    ],
)  # fmt: skip
def test_a_start_is_late_by_its_own_time(local, start, end, late, reason):
    def dated(time):
        return {"timestamp": f"2026-11-01T{time}:00Z"} if time else {}

    report(local, START, **dated(start))
    report(local, END, **dated(end))
    answer = report(local, START, **dated(late))
    assert (answer["status"], answer.get("reason")) == ("ignored" if reason else "accepted", reason)
    assert build(local)["attempt"] == (1 if reason else 2)


@pytest.mark.parametrize("late", ["heartbeat", MIDDLE, END, FAILURE, START])
def test_a_late_report_of_the_attempt_before_is_ignored_by_its_time(local, late):
    for hour in (10, 11):
        report(local, START, timestamp=f"2026-11-01T{hour}:00:00Z")
        if hour == 10:
            report(local, END, timestamp="2026-11-01T10:05:00Z")
    answer = report(local, late, timestamp="2026-11-01T10:04:00Z")
    assert answer["reason"] == "its timestamp is before the start of the present attempt"
    assert (answer["status"], build(local)["state"], build(local)["attempt"]) == ("ignored", "in_progress", 2)
    assert report(local, END, timestamp="2026-11-01T11:05:00Z")["status"] == "accepted"


def test_a_clock_that_is_a_little_behind_ours_costs_the_second_run_nothing(api):
    for _ in range(2):
        report(api, START)
        behind = (utc_now() - timedelta(seconds=100)).isoformat()
        assert report(api, END, timestamp=behind)["status"] == "accepted"
    assert attempts(api) == [(1, "completed"), (2, "completed")]


# ---- taken once more -------------------------------------------------------------------------


def reprocess_all(api):
    with db.reading(api.engine) as connection:
        ids = connection.execute(select(models.inbound.c.id).order_by(models.inbound.c.id)).scalars().all()
    return [api("POST", f"/api/inbound/{id_}/reprocess")["status"] for id_ in ids]


def kept(api):
    with db.reading(api.engine) as connection:
        return connection.execute(
            select(models.inbound.c.status, models.inbound.c.reason).order_by(models.inbound.c.id)
        ).all()


def test_reports_that_were_read_are_not_taken_again(api):
    for event in (START, MIDDLE, END, MIDDLE, START, MIDDLE):
        report(api, event)
    before = (kept(api), types(api), build(api))
    assert reprocess_all(api) == ["accepted"] * 3 + ["ignored"] + ["accepted"] * 2
    assert (kept(api), types(api), build(api)) == before


@pytest.mark.parametrize(
    ("days", "status", "state"), [(0, "accepted", "completed"), (2, "ignored", "in_progress")]
)
def test_a_report_that_was_once_unreadable_is_as_old_as_its_arrival(api, days, status, state):
    report(api, END)
    report(api, START)

    def restore(connection):  # as if the program of that day had not understood the first one
        connection.execute(
            update(models.inbound)
            .where(models.inbound.c.event == END)
            .values(status="unreadable", received_at=utc_now() - timedelta(days=days))
        )

    db.in_transaction(api.engine, restore)
    assert reprocess_all(api)[0] == status
    assert (build(api)["state"], build(api)["attempt"]) == (state, 2)


# ---- any order -------------------------------------------------------------------------------

RUN, DETAILS = 10, (MIDDLE, "heartbeat", "task_completed")


@st.composite
def histories(draw):
    """How often one id runs, how it ends the last time, and what arrives, each with a time of its own.

    Ends come at any later place, also behind the next runs; starts behind the end of their run; details
    anywhere or not at all; any of these once more.  But starts keep their order, and the last run's end comes
    behind its start: nothing shows of an end alone that it is not that of the run before.
    """
    runs, arrives, end = draw(st.integers(1, 4)), [], ""

    def after(place):
        return draw(st.integers(place + 1, place + 30))

    for run in range(runs):
        begin, hour, end = run * RUN, f"2026-11-01T{10 + run}", draw(st.sampled_from(ENDS))
        start, over = (START, f"{hour}:00:00Z"), (end, f"{hour}:50:00Z")
        started = begin + draw(st.sampled_from([0, RUN - 1]))
        told = [(started, start), (after(started if run == runs - 1 else begin), over)]
        for minute, event in enumerate(draw(st.lists(st.sampled_from(DETAILS), max_size=3))):
            told.append((after(begin), (event, f"{hour}:1{minute}:00Z")))
        told += [(after(place), report_) for place, report_ in told if draw(st.booleans())]
        arrives += told
    return runs, end, [report_ for _, report_ in sorted(arrives, key=lambda one: one[0])]


@SHARED
@given(history=histories())
def test_whatever_comes_late_or_twice_a_run_is_in_its_last_state(local, history):
    runs, end, arrives = history
    run = f"run-{db.as_writer(local.engine, lambda write: write.new_id('inbound'))}"
    build_id = f"script:{run}"
    for event, time in arrives:
        before = len(types(local, build_id))
        answer = report(local, event, run, timestamp=time)
        made = len(types(local, build_id)) - before
        assert made == 0 if answer["status"] == "ignored" else made == 1 or event == "heartbeat"
    shown = build(local, build_id)
    assert shown["state"] == ("completed" if end.endswith("completed") else "failed")
    assert shown["attempt"] <= runs
    numbers = [attempt for _, attempt in types(local, build_id)]
    assert numbers == sorted(numbers)
