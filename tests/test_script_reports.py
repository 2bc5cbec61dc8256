"""What is read of the reports of build scripts: words, ids of runs, and fields of the wrong type."""

import json
import re
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import assert_sound, assert_storable, parse
from webhook_app import platforms
from webhook_app.lifecycle import Conclusion, State
from webhook_app.platforms import Invalid, NotJson, script


@pytest.mark.parametrize(
    ("event", "state"),
    [
        *(
            (word, State.IN_PROGRESS)
            for word in ("build_started", "stage_started", "stage_completed", "heartbeat")
        ),
        *(
            (word, State.IN_PROGRESS)
            for word in ("plan_started", "plan_generated", "task_started", "task_failed")
        ),
        *((word, State.IN_PROGRESS) for word in ("task_completed", "deploy_started", "deploy_progress")),
        *((word, State.COMPLETED) for word in ("build_completed", "deploy_completed")),
        *((word, State.FAILED) for word in ("build_failed", "deploy_failed")),
    ],
)
def test_script_words(event, state):
    body = json.dumps({"runId": "r-1", "event": event, "progress": 40}).encode()
    (seen,) = parse("script", {}, body).observations
    assert seen.state is state
    assert (seen.detail is None) is (event == "heartbeat")
    assert seen.progress == (None if event == "deploy_progress" else 40)
    assert (seen.error is not None) is (state is State.FAILED)
    assert seen.conclusion in (None, Conclusion.SUCCESS, Conclusion.FAILURE)


END = {"runId": "r", "event": "build_completed"}


@pytest.mark.parametrize(
    ("field", "value", "taken"),
    [
        ("durationMs", 1234.5, 1234), ("durationMs", "90000", 90000), ("durationMs", " 12.7 ", 13),
        ("durationMs", -1, None), ("durationMs", "1 min", None), ("durationMs", 10**400, None),
        ("durationMs", 2**63, None), ("durationMs", 1e300, None), ("durationMs", float("nan"), None),
        ("durationMs", float("inf"), None), ("durationMs", False, None), ("durationMs", [1], None),
        ("pid", "12345", 12345), ("pid", 1.0, 1), ("pid", "0x1F", None), ("pid", True, None), ("pid", {}, None),
        ("commit", 1234567, "1234567"), ("commit", 0, "0"), ("commit", ["abc"], None), ("branch", 2026, "2026"),
        ("message", {"a": 1}, None), ("message", 3.25, "3.25"), ("stage", ["a"], None), ("stage", True, None),
        ("repo", {"name": "x"}, None), ("env", False, None), ("command", ["make"], None), ("error", 2, "2"),
        ("progress", "50", 50), ("progress", "50 %", 50), ("progress", 101, None), ("progress", "half", None),
        ("progress", True, None), ("timestamp", "yesterday", None), ("timestamp", "2026-11-01T10:00:00", None),
        ("timestamp", "1793527200000", 1793527200000), ("timestamp", {}, None), ("timestamp", True, None),
        ("data", [1], None), ("data", "x", None), ("url", "build/7", None), ("url", 7, None),
        ("previewUrl", "javascript:alert(1)", None), ("eventId", {}, None),
    ],
)  # fmt: skip
def test_a_script_field_of_another_type_is_coerced_or_left_out_and_named(field, value, taken):
    said = parse("script", {}, json.dumps(END | {field: value}).encode())
    (seen,) = said.observations
    assert (seen.state, seen.conclusion) == (State.COMPLETED, Conclusion.SUCCESS)
    assert seen.detail.data.get(field) == taken
    assert said.dropped == (field,)
    assert_sound(seen)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("durationMs", 0), ("pid", 2**40), ("message", ""), ("progress", 49.5), ("timestamp", 1793527200000),
        ("timestamp", 1793527200), ("timestamp", 1793527200.25), ("timestamp", "2026-11-01T10:00:00+01:00"),
        ("data", {"message": {"a": 1}}), ("message", "\ud800"), ("whatever", [True]), ("stage", None),
        ("message", "x" * 9000),
    ],
)  # fmt: skip
def test_what_a_script_gives_rightly_is_not_named(field, value):
    assert parse("script", {}, json.dumps(END | {field: value}).encode()).dropped == ()


@pytest.mark.parametrize(
    "value", [1793527200, 1793527200.0, 1793527200000, "1793527200", "2026-11-01T10:00:00Z"]
)
def test_the_time_of_a_script_is_read_as_a_shell_or_javascript_writes_it(value):
    (seen,) = parse("script", {}, json.dumps(END | {"timestamp": value}).encode()).observations
    assert seen.ended_at == seen.reported_at == datetime(2026, 11, 1, 10, tzinfo=UTC)


@pytest.mark.parametrize("digits", ["12e45", "123e4567", "1.50", "9" * 40, "20261128101500123456"])
def test_a_number_where_a_text_is_wanted_keeps_each_of_its_digits(digits):
    body = f'{{"runId": {digits}, "event": "build_completed", "commit": {digits}}}'.encode()
    said = parse("script", {}, body)
    assert said.observations[0].commit == digits
    assert script.run_id_of(said.observations[0].build_id) == digits
    assert said.dropped == ("commit",)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 5000])
def test_a_number_that_json_does_not_have_costs_no_build_its_end(number):
    body = f'{{"runId": "r", "event": "build_failed", "durationMs": {number}, "x": {number}}}'.encode()
    said = parse("script", {}, body)
    assert said.observations[0].state is State.FAILED
    assert said.dropped == ("durationMs",)
    assert_sound(said.observations[0])
    with pytest.raises(NotJson):
        parse("script", {}, body.replace(b"build_failed", b"build_exploded"))


@pytest.mark.parametrize(
    ("report", "field"),
    [
        ({"event": "heartbeat"}, "runId"), ({"runId": None, "event": "heartbeat"}, "runId"),
        ({"runId": "", "event": "heartbeat"}, "runId"), ({"runId": "r" * 256, "event": "heartbeat"}, "runId"),
        ({"runId": "a\nb", "event": "heartbeat"}, "runId"), ({"runId": "\0", "event": "heartbeat"}, "runId"),
        ({"runId": "\ud800", "event": "heartbeat"}, "runId"), ({"runId": ["r"], "event": "heartbeat"}, "runId"),
        ({"runId": True, "event": "heartbeat"}, "runId"), ({"runId": 10**300, "event": "heartbeat"}, "runId"),
        ({"runId": "r"}, "event"), ({"runId": "r", "event": 1}, "event"), ({"runId": "r", "event": "x"}, "event"),
        ({"runId": "r", "event": ["heartbeat"]}, "event"), ({"runId": "r", "event": ""}, "event"),
        ({"events": []}, "event"), ([], "body"), ("text", "body"), (None, "body"),
    ],
)  # fmt: skip
def test_a_script_hears_which_field_is_wrong(report, field):
    with pytest.raises(Invalid) as refusal:
        parse("script", {}, json.dumps(report).encode())
    assert refusal.value.field == field
    assert str(refusal.value).startswith(f"{field}: ")
    assert refusal.value.allowed == (script.EVENTS if field == "event" else ())
    assert_storable(str(refusal.value))


@pytest.mark.parametrize(
    ("run_id", "part"),
    [
        ("6F1B2C3D-0000-4a4a", "6F1B2C3D-0000-4a4a"), ("nightly_1", "nightly_1"), (27, "27"), (-1.5, "-1.5"),
        ("v1.2", "v1.2"), (".", "~2E"), ("..", "~2E~2E"), ("a b", "a~20b"), ("refs/heads/x:7", "refs~2Fheads~2Fx~3A7"),
        ("~41", "~7E41"), ("ü", "~C3~BC"), ("%2F", "~252F"), ("?#&", "~3F~23~26"), (" ", "~20"), ("r" * 255, "r" * 255),
    ],
)  # fmt: skip
def test_a_run_id_becomes_a_part_of_the_build_id_and_back(run_id, part):
    (seen,) = parse("script", {}, json.dumps(END | {"runId": run_id}).encode()).observations
    assert seen.build_id == f"script:{part}"
    assert seen.key == seen.build_id.casefold()
    assert script.run_id_of(seen.build_id) == str(run_id)


PRINTABLE = st.characters(codec="utf-8").filter(str.isprintable)
RUN_IDS = st.text(PRINTABLE, min_size=1, max_size=255)


def key_of(run_id):
    (seen,) = parse("script", {}, json.dumps(END | {"runId": run_id}).encode()).observations
    assert_sound(seen)
    assert len(seen.build_id) <= 1007
    return seen.key


def without_case(text):
    return re.sub("[A-Z]+", lambda found: found[0].lower(), text)


@settings(deadline=None)
@given(RUN_IDS, RUN_IDS)
def test_two_runs_share_a_build_only_if_their_ids_differ_in_the_case_of_ascii_alone(one, other):
    assert (key_of(one) == key_of(other)) is (without_case(one) == without_case(other))


def test_the_longest_run_ids_are_kept_apart():
    assert len({key_of("\U0001f600" * 254 + last) for last in "\U0001f600\U0001f601ab"}) == 4
    assert key_of("ü" * 254 + "A") == key_of("ü" * 254 + "a")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20)
    | st.sampled_from([10**400, "50", "12345", "2026-11-01T10:00:00Z", "https://x.example/y", "\ud800", "x" * 3000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
ENDS = ("build_completed", "build_failed", "deploy_completed", "deploy_failed")
OPTIONAL = (*script._TEXTS, *script._IDS, *script._KINDS, "tasks", "taskCount", "type", "anything")


@settings(deadline=None)
@given(st.sampled_from(script.EVENTS), st.dictionaries(st.sampled_from(OPTIONAL), ANY, max_size=8))
def test_whatever_is_in_the_optional_fields_the_event_is_taken(event, fields):
    body = json.dumps({"runId": "r", "event": event, **fields}).encode()
    said = parse("script", {}, body)
    (seen,) = said.observations
    assert_sound(seen)
    assert (seen.key, seen.raw_status, seen.state.terminal) == ("script:r", event, event in ENDS)
    assert set(said.dropped) <= set(fields)
    for name in set(fields) - set(said.dropped) - {"type", "eventId", "deliveryId", "data"}:
        if seen.detail is not None and fields[name] is not None:
            assert name in seen.detail.data
    assert_storable(list(said.dropped))
    script.envelope({}, body)


def test_script_heartbeats_are_never_duplicates():
    envelope = platforms.find()["script"].envelope
    body = b'{"runId":"r","event":"heartbeat"}'
    assert envelope({}, body).delivery_id == ""
    assert envelope({"x-delivery-id": "d-1"}, body).delivery_id == "d-1"
    assert envelope({"x-delivery-id": "d-1"}, b'{"deliveryId":"d-2"}').delivery_id == "d-2"


def test_the_event_ids_of_a_script_are_counted_by_run():
    def key(run, id_, at=None):
        body = json.dumps({"runId": run, "event": "heartbeat", "eventId": id_, "timestamp": at}).encode()
        told = script.envelope({}, body)
        return told.hook_id, told.delivery_id

    assert key("a", 1) == key("A", "1") == ("a", "1")
    assert key("a", 1) != key("b", 1)
    assert key("a", 1, "2026-11-01T10:00:00Z") == key("a", 1, "2026-11-01T11:00:00+01:00")
    assert len({key("a", 1, at) for at in (None, "2026-11-01T10:00:00Z", "2026-11-01T10:00:01Z")}) == 3
    assert len({key("a", "e" * 255 + last) for last in ("", "x", "y", "\0", "\ud800")}) == 5


def test_script_report_that_is_huge_keeps_only_plain_fields():
    report = {"runId": "r", "event": "plan_generated", "note": "n", "tasks": ["x" * 100] * 1000}
    body = json.dumps(report).encode()
    detail = parse("script", {}, body).observations[0].detail
    assert detail is not None
    assert detail.data == {"note": "n"}
    assert parse("script", {}, body).dropped == ("tasks",)


def test_of_too_many_fields_those_of_the_build_itself_are_kept():
    data = {f"field_{number}": number for number in range(100)}
    report = {"runId": "r", "event": "build_failed", "data": data, "message": "no space", "stage": "link"}
    said = parse("script", {}, json.dumps(report).encode())
    assert said.observations[0].error == "link: no space"
    assert len(said.observations[0].detail.data) == 64
    assert said.dropped == tuple(f"field_{number}" for number in range(62, 100))
