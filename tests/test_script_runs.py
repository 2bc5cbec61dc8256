"""Runs of build scripts, told through HTTP: what is answered, and what is kept."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_script_reports import ANY, OPTIONAL
from webhook_app import db
from webhook_app.platforms import script

URL = "/api/internal/build-events"
TOKEN = {"X-Build-Token": "script-token"}
START, MIDDLE, END, FAILURE = "build_started", "stage_completed", "build_completed", "build_failed"


def report(api, event, run="r", status=202, **fields):
    body = json.dumps({"runId": run, "event": event, **fields})
    return api("POST", URL, status, data=body, headers=TOKEN | {"Content-Type": "application/json"})


def build(api, build_id="script:r"):
    return api("GET", f"/api/builds/{build_id}")


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
    end=st.sampled_from(script.ENDS), fields=st.dictionaries(st.sampled_from(OPTIONAL), ANY, max_size=8)
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
