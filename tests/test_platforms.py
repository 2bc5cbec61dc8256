"""One contract for every platform that `find()` finds, fed by `tests/samples/<platform>/<case>/`.

A case is a webhook (`headers.json`, `body.json` or `body.txt`, `expected.json`) or the answer to a
poll (`target.json`, `answer.json`, the body, `expected.json`) or to a question for the jobs of what was
`seen` (`asked.json`, and the same).  In `expected.json` an observation lists all fields that differ from their
defaults, `added` those that differ from what was seen.  A new platform needs samples, and nothing here.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cases import SAMPLES, assert_sound, assert_storable, body_of, parse, read, source_of, told
from webhook_app import platforms
from webhook_app.lifecycle import Observation, State
from webhook_app.platforms import (
    Answer,
    BadSignature,
    NotJson,
    PollError,
    PollTarget,
    Source,
    Unreadable,
    _read,
)

WEBHOOKS = sorted(path.parent for path in SAMPLES.glob("*/*/headers.json"))
POLLS = sorted(path.parent for path in SAMPLES.glob("*/*/target.json"))
JOBS = sorted(path.parent for path in SAMPLES.glob("*/*/asked.json"))

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def name_of(case: Path) -> str:
    return f"{case.parent.name}-{case.name}"


# ---- the contract --------------------------------------------------------------------------------


def test_every_platform_has_samples():
    assert set(platforms.find()) == {"github", "gitlab", "jenkins", "script"}
    for name, platform in platforms.find().items():
        assert name == platform.NAME
        assert any(case.parent.name == name for case in WEBHOOKS)
        assert platform.CONTENT_TYPES


@pytest.mark.parametrize("case", WEBHOOKS, ids=name_of)
def test_webhook_says_what_is_expected(case):
    expected, headers, body = read(case, "expected"), read(case, "headers"), body_of(case)
    platform = platforms.find()[case.parent.name]
    assert headers["content-type"].partition(";")[0] in platform.CONTENT_TYPES
    platform.verify(headers, body, tuple(expected["secrets"]), expected.get("now", 0.0))
    assert dataclasses.asdict(platform.envelope(headers, body)) == expected["envelope"]
    if "unreadable" in expected:
        with pytest.raises(Unreadable) as refusal:
            parse(platform.NAME, headers, body)
        assert str(refusal.value) == expected["unreadable"]
        return
    said = parse(platform.NAME, headers, body)
    assert [told(seen) for seen in said.observations] == expected.get("observations", [])
    assert (said.ignored, said.pong) == (expected.get("ignored"), expected.get("pong", False))
    assert list(said.dropped) == expected.get("dropped", [])


@pytest.mark.parametrize("case", WEBHOOKS, ids=name_of)
def test_webhook_without_its_proof_is_refused(case):
    expected, headers, body = read(case, "expected"), read(case, "headers"), body_of(case)
    platform, now = platforms.find()[case.parent.name], expected.get("now", 0.0)
    secrets = tuple(expected["secrets"])

    def refused(headers: dict[str, str], body: bytes, secrets: tuple[str, ...], now: float) -> bool:
        try:
            platform.verify(headers, body, secrets, now)
        except BadSignature:
            return True
        return False

    assert not refused(headers, body, secrets, now)
    assert refused(headers, body, (), now)
    assert refused(headers, body, ("",), now)
    assert refused(headers, body, tuple(f"{secret}x" for secret in secrets), now)
    for name in expected["proof"]:
        without = {key: value for key, value in headers.items() if key != name}
        assert refused(without, body, secrets, now), name
        for changed in ("", "é\udc80", headers[name] + "x", *one_changed(headers[name])):
            assert refused(headers | {name: changed}, body, secrets, now), changed
    if expected["proof_covers_body"]:
        for at in range(0, len(body), max(len(body) // 200, 1)):
            changed = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
            assert refused(headers, changed, secrets, now), at
        assert refused(headers, body + b"\n", secrets, now)
        assert refused(headers, b"", secrets, now)


def one_changed(text: str) -> list[str]:
    """`text` with each of its characters changed in turn; spaces separate, so none is made or taken."""
    swapped = [chr(ord(char) ^ 1) for char in text]
    return [
        text[:at] + char + text[at + 1 :]
        for at, char in enumerate(swapped)
        if not char.isspace() and not text[at].isspace()
    ]


@pytest.mark.parametrize("case", POLLS, ids=name_of)
def test_poll_asks_and_reads(case):
    expected, sent, answer = read(case, "expected"), read(case, "target"), read(case, "answer")
    platform = platforms.find()[case.parent.name]
    source, target = Source(**sent["source"]), PollTarget(**sent["target"])
    request = platform.poll_request(source, target)
    assert request is not None
    assert {"url": request.url, "headers": request.headers} == expected["request"]
    assert platform.poll_request(dataclasses.replace(source, api_url=""), target) is None
    received = Answer(answer["status"], answer["headers"], body_of(case))
    if "observation" in expected:
        assert told(platform.parse_poll(source, target, received)) == expected["observation"]
        return
    with pytest.raises(PollError) as refusal:
        platform.parse_poll(source, target, received)
    assert (refusal.value.fault.value, refusal.value.retry_after_seconds) == (
        expected["fault"],
        expected["retry_after_seconds"],
    )


def seen_before(asked: dict[str, Any]) -> Observation:
    """The poll that a question for jobs follows."""
    source, fields = Source(**asked["source"]), asked["seen"]
    seen = platforms.find()[source.platform].named(source, asked["target"]["build_id"])
    times = {"platform_at": _read.moment(fields["platform_at"])} if "platform_at" in fields else {}
    return dataclasses.replace(seen, **fields | times | {"state": State(fields["state"])})


@pytest.mark.parametrize("case", JOBS, ids=name_of)
def test_jobs_are_asked_for_and_added_to_what_was_seen(case):
    asked, answer, expected = read(case, "asked"), read(case, "answer"), read(case, "expected")
    platform = platforms.find()[case.parent.name]
    source, target, seen = Source(**asked["source"]), PollTarget(**asked["target"]), seen_before(asked)
    request = platform.jobs_request(source, target)
    assert {"url": request.url, "headers": request.headers} == expected["request"]
    assert platform.jobs_request(dataclasses.replace(source, api_url=""), target) is None
    received = Answer(answer["status"], answer["headers"], body_of(case))
    if "added" in expected:
        assert told(platform.parse_jobs(source, seen, received)) == told(seen) | expected["added"]
        return
    with pytest.raises(PollError) as refusal:
        platform.parse_jobs(source, seen, received)
    assert refusal.value.fault.value == expected["fault"]


def test_more_gitlab_jobs_than_a_page_are_none():
    case = SAMPLES / "gitlab" / "jobs_of_a_running_pipeline"
    asked, (first, *_) = read(case, "asked"), json.loads(body_of(case))
    source, seen, gitlab = Source(**asked["source"]), seen_before(asked), platforms.find()["gitlab"]
    for count in (99, 100):
        body = json.dumps([first | {"id": 1000 + number} for number in range(count)]).encode()
        assert len(gitlab.parse_jobs(source, seen, Answer(200, {}, body)).jobs) == (99 if count == 99 else 0)


def test_a_jenkins_build_says_all_itself():
    jenkins, source = platforms.polled()["jenkins"], source_of("jenkins")
    target = PollTarget("jenkins:team:web:12", "jenkins:team:web:12", "team/web", 12, 1, None)
    assert jenkins.jobs_request(source, target) is None
    seen = jenkins.named(source, target.build_id)
    assert jenkins.parse_jobs(source, seen, Answer(200, {}, b"{}")) is seen


@pytest.mark.parametrize("platform", platforms.find().values(), ids=lambda platform: platform.NAME)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"NaN",
        b'{"n": NaN}',
        b'{"n": -Infinity}',
        b'{"n": 1e999}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b'{"text": "\xff"}',
    ],
    ids=lambda body: repr(body[:12]) + str(len(body)),
)
def test_what_is_no_json_is_refused_as_such(platform, body):
    headers = {"x-github-event": "workflow_run", "content-type": "application/json"}
    platform.envelope(headers, body)
    with pytest.raises(NotJson):
        parse(platform.NAME, headers, body)


@pytest.mark.parametrize("platform", platforms.find().values(), ids=lambda platform: platform.NAME)
@pytest.mark.parametrize(
    "body",
    [b"[]", b'"text"', b"null", b"[" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000],
    ids=lambda body: repr(body[:12]) + str(len(body)),
)
def test_json_that_is_no_object_or_too_deep_is_kept_as_unreadable(platform, body):
    headers = {"x-github-event": "workflow_run", "content-type": "application/json"}
    platform.envelope(headers, body)
    with pytest.raises(Unreadable):
        parse(platform.NAME, headers, body)


# ---- bodies nobody expects -----------------------------------------------------------------------

strange = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 1.5, 1e308, -0.0]),
    st.sampled_from(
        ["", "\0", "a\0b", "\ud800", "x\udfffy", "é" * 3000, "javascript:alert(1)", "https://[", "../.."]
    ),
    st.sampled_from(
        ["completed", "action_required", "failed", "running", "manual", "2016-08-12 15:23:28 UTC"]
    ),
    st.sampled_from(
        ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "2026-11-01T10:00:00", "2026-11-01"]
    ),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, item in inner for place in places(item, (*here, key)))]


@st.composite
def mutated(draw: st.DrawFn, original: Any) -> Any:
    """A JSON value with a few of its parts dropped, or swapped for something strange."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 4))):
        *way, last = draw(st.sampled_from([place for place in places(value) if place] or [("empty",)]))
        holder = value
        for key in way:
            holder = holder[key]
        if draw(st.booleans()):
            holder[last] = draw(strange)
        elif last != "empty":
            del holder[last]
    return value


@pytest.mark.parametrize("case", WEBHOOKS, ids=name_of)
@quick
@given(data=st.data())
def test_a_mutated_webhook_is_read_or_refused(case, data):
    headers, body = read(case, "headers"), body_of(case)
    if "form" in headers["content-type"]:
        headers, body = headers | {"content-type": "application/json"}, _read.form_payload(body)
    text = json.dumps(data.draw(mutated(json.loads(body)), label="body"))
    try:
        said = parse(case.parent.name, headers, text.encode())
    except (NotJson, Unreadable):
        return
    finally:
        platforms.find()[case.parent.name].envelope(headers, text.encode())
    assert said.ignored or said.pong or said.observations
    for seen in said.observations:
        assert_sound(seen)


@pytest.mark.parametrize("case", POLLS, ids=name_of)
@quick
@given(data=st.data())
def test_a_mutated_answer_is_read_or_refused(case, data):
    sent, answer, body = read(case, "target"), read(case, "answer"), body_of(case)
    if body.startswith(b"{"):
        body = json.dumps(data.draw(mutated(json.loads(body)), label="body")).encode()
    names = ("date", "retry-after", "x-ratelimit-reset", "x-ratelimit-remaining", "ratelimit-reset")
    values = st.sampled_from(["", "0", "-5", "9" * 30, "Sun, 01 Nov 2026 10:00:00 GMT", "Sun, 99 Nov", "é"])
    headers = answer["headers"] | data.draw(st.dictionaries(st.sampled_from(names), values))
    received = Answer(data.draw(st.sampled_from([200, 403, 429, 503, answer["status"]])), headers, body)
    platform = platforms.find()[case.parent.name]
    try:
        seen = platform.parse_poll(Source(**sent["source"]), PollTarget(**sent["target"]), received)
    except PollError as refusal:
        wait = refusal.retry_after_seconds
        assert wait is None or 1 <= wait <= 86_400
        assert_storable(str(refusal))
        return
    assert_sound(seen)


@pytest.mark.parametrize("case", JOBS, ids=name_of)
@quick
@given(data=st.data())
def test_mutated_jobs_are_read_or_refused(case, data):
    asked = read(case, "asked")
    body = json.loads(body_of(case))
    content = data.draw(mutated(body) if body else st.sampled_from([{}, "text", None]), label="body")
    platform, seen = platforms.find()[case.parent.name], seen_before(asked)
    received = Answer(200, {}, json.dumps(content).encode())
    try:
        said = platform.parse_jobs(Source(**asked["source"]), seen, received)
    except PollError as refusal:
        assert_storable(str(refusal))
        return
    assert_sound(said)
    assert dataclasses.replace(said, jobs=(), jobs_complete=False) == seen
    assert said.jobs_complete is bool(said.jobs)


@pytest.mark.parametrize("platform", platforms.find().values(), ids=lambda platform: platform.NAME)
@quick
@given(
    body=st.binary(max_size=200),
    header=st.text(st.characters(codec=None), max_size=80),
    secrets=st.lists(st.text(st.characters(codec=None), max_size=20), max_size=3),
)
def test_a_guess_is_refused_whatever_it_is(platform, body, header, secrets):
    names = ("x-hub-signature-256", "x-gitlab-token", "webhook-signature", "webhook-id", "webhook-timestamp")
    for guess in [dict.fromkeys(names, header), {"x-gitlab-token": header}, {"x-build-token": header}]:
        given_away = header.encode("utf-8", "surrogatepass") in [
            secret.encode("utf-8", "surrogatepass") for secret in secrets if secret
        ]
        if not given_away:
            with pytest.raises(BadSignature):
                platform.verify(guess, body, tuple(secrets), 0.0)
        platform.envelope(guess, body)


@pytest.mark.parametrize("platform", platforms.polled().values(), ids=lambda platform: platform.NAME)
@quick
@given(key=st.text(max_size=30), repository=st.none() | st.text(max_size=30))
def test_a_poll_is_asked_of_the_api_only(platform, key, repository):
    target = PollTarget(f"x:{key}", f"x:{key}", repository, None, 1, None)
    request = platform.poll_request(Source("x", platform.NAME, "https://ci.example.com"), target)
    if request is not None:
        assert request.url.startswith("https://ci.example.com/")
        assert request.url.isascii()
        assert not {"..", "."} & set(unquote(request.url.partition("?")[0]).split("/")[3:])
        assert "Authorization" not in request.headers
