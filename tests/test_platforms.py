"""One contract for every platform that `find()` finds, fed by `tests/samples/<platform>/<case>/`.

A case is a webhook (`headers.json`, `body.json` or `body.txt`, `expected.json`) or the answer to a
poll (`target.json`, `answer.json`, the body, `expected.json`) or to a question for the jobs of what was
`seen` (`asked.json`, and the same).  In `expected.json` an observation lists all fields that differ from their
defaults, `added` those that differ from what was seen.  A new platform needs samples, and nothing here.
"""

import copy
import dataclasses
import json
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from webhook_app import platforms, signing
from webhook_app.lifecycle import Act, Conclusion, JobStatus, Observation, Recorded, State, verdict
from webhook_app.platforms import (
    Answer,
    BadSignature,
    NotJson,
    PollError,
    PollFault,
    PollTarget,
    Source,
    Unreadable,
    Webhook,
    _read,
)

SAMPLES = Path(__file__).parent / "samples"
REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "payloads"
WEBHOOKS = sorted(path.parent for path in SAMPLES.glob("*/*/headers.json"))
POLLS = sorted(path.parent for path in SAMPLES.glob("*/*/target.json"))
JOBS = sorted(path.parent for path in SAMPLES.glob("*/*/asked.json"))

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def name_of(case: Path) -> str:
    return f"{case.parent.name}-{case.name}"


def read(case: Path, name: str) -> Any:
    return json.loads((case / f"{name}.json").read_text(encoding="utf-8"))


def body_of(case: Path) -> bytes:
    return next(case.glob("body.*")).read_bytes()


def source_of(platform: str) -> Source:
    return Source(platform, platform, "https://ci.example.com", "a token", "relay")


def shown(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: shown(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [shown(item) for item in value] if isinstance(value, tuple) else value


def told(seen: Observation) -> dict[str, Any]:
    """The fields of an observation that differ from their defaults."""
    values = {field.name: getattr(seen, field.name) for field in dataclasses.fields(seen)}
    defaults = {field.name: field.default for field in dataclasses.fields(seen)}
    return {name: shown(value) for name, value in values.items() if value != defaults[name]}


def parse(platform: str, headers: dict[str, str], body: bytes) -> Webhook:
    return platforms.find()[platform].parse_webhook(source_of(platform), headers, body)


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


def assert_storable(value: Any) -> None:
    """No database and no JSON encoder may stumble over it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            assert_storable(key)
            assert_storable(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            assert_storable(inner)
    elif isinstance(value, str):
        value.encode()
        assert "\0" not in value
        assert len(value) <= _read.URL_CHARS + 100
    elif isinstance(value, float):
        assert abs(value) != float("inf")
    elif isinstance(value, int):
        assert -(2**63) <= value < 2**63


def assert_sound(seen: Observation) -> None:
    for field in dataclasses.fields(seen):
        value = getattr(seen, field.name)
        assert_storable(dataclasses.asdict(value) if field.name == "detail" and value else shown(value))
        assert not isinstance(value, datetime) or value.utcoffset() == timedelta(0)
    assert seen.build_id == "" or quote(seen.build_id, safe=":") == seen.build_id
    assert seen.build_id == unquote(seen.build_id)
    assert seen.attempt is None or 0 < seen.attempt < 2**31
    assert seen.progress is None or 0 <= seen.progress <= 100
    for url in (seen.url, seen.preview_url):
        assert url is None or url.startswith(("https://", "http://"))


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


# ---- words ---------------------------------------------------------------------------------------


def changed(case: str, *, headers: dict[str, str] | None = None, **fields: dict[str, Any]) -> Observation:
    """The one observation of a sample in which objects of the body are updated by `fields`."""
    platform, name = case.split("/")
    payload = json.loads(body_of(SAMPLES / case))
    for key, values in fields.items():
        payload[key].update(values)
    sent = read(SAMPLES / platform / name, "headers") | (headers or {})
    (seen,) = parse(platform, sent, json.dumps(payload).encode()).observations
    return seen


@pytest.mark.parametrize(
    ("status", "conclusion", "state", "ended_as", "waiting"),
    [
        ("requested", None, "queued", None, False),
        ("queued", None, "queued", None, False),
        ("pending", None, "queued", None, False),
        ("waiting", None, "queued", None, True),
        ("in_progress", None, "in_progress", None, False),
        ("in_progress", "success", "in_progress", None, False),
        ("levitating", None, None, None, False),
        ("completed", None, "in_progress", None, False),
        ("completed", "success", "completed", "success", False),
        ("completed", "neutral", "completed", "neutral", False),
        ("completed", "skipped", "completed", "skipped", False),
        ("completed", "failure", "failed", "failure", False),
        ("completed", "startup_failure", "failed", "failure", False),
        ("completed", "mostly_harmless", "failed", "failure", False),
        ("completed", "timed_out", "timeout", "timed_out", False),
        ("completed", "stale", "timeout", "stale", False),
        ("completed", "cancelled", "cancelled", "cancelled", False),
        ("completed", "action_required", "queued", "action_required", True),
    ],
)
def test_github_words(status, conclusion, state, ended_as, waiting):
    seen = changed("github/run_requested", workflow_run={"status": status, "conclusion": conclusion})
    assert (seen.state, seen.conclusion, seen.waiting) == (state, ended_as, waiting)
    assert seen.doubtful is (status == "completed" and conclusion is None)
    assert (seen.ended_at is not None) is (seen.state is not None and seen.state.terminal)


@pytest.mark.parametrize(
    ("job", "state"),
    [
        ({"status": "waiting"}, None),
        ({"status": "completed", "conclusion": "cancelled"}, None),
        ({"status": "completed", "conclusion": "success", "steps": [{"status": "completed"}]}, None),
        ({"status": "completed", "conclusion": ["odd"]}, None),
        ({"status": "in_progress"}, State.IN_PROGRESS),
        ({"status": "in_progress", "run_attempt": None}, None),
    ],
)
def test_github_job_never_ends_its_run(job, state):
    seen = changed("github/job_queued", workflow_job=job)
    assert seen.state is state
    assert len(seen.jobs) == (seen.attempt is not None)
    assert seen.platform_at is None


@pytest.mark.parametrize(
    "name", ["Acme", "Acme/..", "Acme/a b", "Acme/a:b", "Acme/web/x", "../web", "Acme/web\n", ""]
)
def test_github_repository_must_be_safe_in_a_path(name):
    with pytest.raises(Unreadable):
        changed("github/run_requested", repository={"full_name": name})


def test_github_form_is_told_by_its_media_type_whatever_its_parameters():
    case = SAMPLES / "github" / "run_completed_failure_form"
    media_type = "Application/X-WWW-Form-Urlencoded; charset=utf-8"
    headers = {"x-github-event": "workflow_run", "content-type": media_type}
    assert parse("github", headers, body_of(case)).observations[0].state is State.FAILED
    for broken in (
        b"",
        b"payload=",
        b"other=%7B%7D",
        b"payload=%7B%7D&payload=%7B%7D",
        b"payload=%FF",
        b"\xff",
    ):
        with pytest.raises(NotJson):
            parse("github", headers, broken)


@pytest.mark.parametrize(
    ("status", "begun", "state", "conclusion", "waiting"),
    [
        *((word, False, "queued", None, False) for word in ("created", "waiting_for_resource", "preparing")),
        *((word, False, "queued", None, False) for word in ("waiting_for_callback", "pending")),
        *((word, True, "in_progress", None, False) for word in ("created", "pending")),
        *((word, False, "queued", None, True) for word in ("manual", "scheduled")),
        *((word, True, "in_progress", None, True) for word in ("manual", "scheduled")),
        *((word, False, "in_progress", None, False) for word in ("running", "canceling")),
        ("success", True, "completed", "success", False),
        ("skipped", False, "completed", "skipped", False),
        ("canceled", True, "cancelled", "cancelled", False),
        ("failed", True, "failed", "failure", False),
        ("levitating", True, None, None, False),
    ],
)
def test_gitlab_words(status, begun, state, conclusion, waiting):
    case = "gitlab/pipeline_running" if begun else "gitlab/pipeline_pending"
    seen = changed(case, object_attributes={"status": status, "finished_at": "2026-11-01 10:09:00 UTC"})
    assert (seen.state, seen.conclusion, seen.waiting) == (state, conclusion, waiting)
    assert (seen.ended_at is not None) is (seen.state is not None and seen.state.terminal)


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"failure_reason": "stuck_or_timeout_failure"}, State.TIMEOUT),
        ({"failure_reason": "script_failure"}, State.FAILED),
        ({"failure_reason": None}, State.FAILED),
        ({"failure_reason": "job_execution_timeout", "allow_failure": True}, State.FAILED),
    ],
)
def test_gitlab_failure_is_a_time_out_only_if_every_blocking_job_ran_out_of_time(job, expected):
    payload = json.loads(body_of(SAMPLES / "gitlab" / "pipeline_failed_by_time_out"))
    payload["builds"][1].update(job)
    (seen,) = parse("gitlab", {}, json.dumps(payload).encode()).observations
    assert seen.state is expected


def test_gitlab_takes_the_signature_or_the_token_as_configured():
    signed, plain = SAMPLES / "gitlab" / "pipeline_success_signed", SAMPLES / "gitlab" / "pipeline_running"
    verify = platforms.find()["gitlab"].verify
    signing_token, now = read(signed, "expected")["secrets"][0], read(signed, "expected")["now"]
    token = read(plain, "headers")["x-gitlab-token"]
    headers, body = read(signed, "headers"), body_of(signed)
    verify(headers, body, ("another token", signing_token), now)
    verify(headers | {"x-gitlab-token": "wrong"}, body, (token, signing_token), now)
    with pytest.raises(BadSignature):  # only a signing token is set, and nothing is signed
        verify(read(plain, "headers"), body_of(plain), (signing_token,), now)
    with pytest.raises(BadSignature):  # the signing token itself, sent as a token
        verify({"x-gitlab-token": signing_token}, body, (signing_token,), now)
    with pytest.raises(BadSignature):  # a bad signature never falls back to a good token
        verify(headers | {"x-gitlab-token": token}, body + b" ", (token, signing_token), now)
    sent_at = int(headers["webhook-timestamp"])
    for drift in (-300, 300):
        verify(headers, body, (signing_token,), sent_at + drift)
    for drift in (-301, 301):
        with pytest.raises(BadSignature):
            verify(headers, body, (signing_token,), sent_at + drift)


def test_a_token_may_hold_any_character():
    """WSGI hands header bytes over as Latin-1."""
    verify = platforms.find()["gitlab"].verify
    verify({"x-gitlab-token": "schlüssel".encode().decode("latin-1")}, b"", ("schlüssel",), 0.0)
    with pytest.raises(BadSignature):
        verify({"x-gitlab-token": "schlussel"}, b"", ("schlüssel",), 0.0)


def recorded(seen: Observation) -> Recorded:
    """What `seen` leaves behind when it is the first word about its build."""
    jobs = {job.id: job.status for job in seen.jobs}
    assert seen.state is not None
    return Recorded(
        attempt=1,
        state=seen.state,
        told_state=seen.state,
        platform_at=seen.platform_at,
        jobs=jobs,
        jobs_complete=seen.jobs_complete,
    )


GITLAB_END = {"object_attributes": {"status": "success", "finished_at": "2026-11-01 10:02:01 UTC"}}


@pytest.mark.parametrize(
    ("job", "act"),
    [
        ({"build_status": "created"}, Act.ENRICH),
        ({"build_status": "pending"}, Act.ENRICH),
        ({"build_status": "running", "build_started_at": "2026-11-01T10:01:02Z"}, Act.DROP),
        ({"build_status": "success", "build_finished_at": "2026-11-01T10:02:00Z"}, Act.ENRICH),
        (
            {"build_status": "running", "build_started_at": "2026-11-01T12:00:00Z", "build_id": 9009},
            Act.REOPEN,
        ),
        (
            {"build_status": "running", "build_started_at": "2026-11-01T12:00:00Z", "build_id": 9003},
            Act.REOPEN,
        ),
    ],
    ids=["created", "pending", "late", "ended", "retried", "played"],
)
def test_gitlab_job_after_the_end_of_its_pipeline_asks_for_no_poll(job, act):
    payload = json.loads(body_of(SAMPLES / "gitlab" / "job_created")) | job
    (late,) = parse("gitlab", {}, json.dumps(payload).encode()).observations
    decided = verdict(recorded(changed("gitlab/pipeline_running", **GITLAB_END)), late)
    assert (decided.act, decided.ask) == (act, False)


def test_gitlab_retry_begins_with_its_own_jobs():
    payload = json.loads(body_of(SAMPLES / "gitlab" / "pipeline_running"))
    new = {"id": 9100, "name": "test", "status": "running", "created_at": "2026-11-03 08:00:00 UTC"}
    payload["builds"][0] = new | {"started_at": "2026-11-03 08:00:09 UTC"}
    (seen,) = parse("gitlab", {}, json.dumps(payload).encode()).observations
    assert seen.started_at == datetime(2026, 11, 3, 8, 0, 9, tzinfo=UTC)
    assert seen.platform_at == seen.started_at


def test_gitlab_manual_job_that_is_still_created_was_not_played():
    """Else a pipeline event from before the end would look like a new attempt."""
    seen = changed("gitlab/pipeline_running", **GITLAB_END)
    assert seen.jobs[-1].status is JobStatus.MANUAL


@pytest.mark.parametrize(
    ("phase", "status", "state", "conclusion"),
    [
        ("QUEUED", None, "queued", None),
        ("STARTED", None, "in_progress", None),
        ("STARTED", "FAILURE", "in_progress", None),
        ("COMPLETED", "SUCCESS", "completed", "success"),
        ("FINALIZED", "UNSTABLE", "failed", "failure"),
        ("completed", "failure", "failed", "failure"),
        ("COMPLETED", "NOT_BUILT", "completed", "skipped"),
        ("COMPLETED", "ABORTED", "cancelled", "cancelled"),
        ("COMPLETED", "EXPLODED", "failed", "failure"),
        ("NONE", "SUCCESS", None, None),
    ],
)
def test_jenkins_words(phase, status, state, conclusion):
    seen = changed("jenkins/queued", build={"phase": phase, "status": status})
    assert (seen.state, seen.conclusion, seen.raw_conclusion) == (state, conclusion, status)


@pytest.mark.parametrize(
    ("url", "build_id"),
    [
        ("job/web/7/", "jenkins:web:7"),
        ("job/web/7", "jenkins:web:7"),
        ("https://ci.example.com/job/job/job/web/7/", "jenkins:job:web:7"),
        ("view/all/job/a/job/b/job/c/7/", "jenkins:a:b:c:7"),
        ("job/web/", None),
        ("job/../7/", None),
        ("job/a%2Fb/7/", None),
        ("web/7/", None),
        ("job/web/label=linux/7/", None),
        (7, None),
    ],
)
def test_jenkins_build_is_known_by_its_path(url, build_id):
    change = {"url": url, "full_url": None}
    if build_id is None:
        with pytest.raises(Unreadable):
            changed("jenkins/queued", build=change)
    else:
        assert changed("jenkins/queued", build=change).build_id == build_id


def test_jenkins_signature_is_never_replaced_by_the_token():
    case = SAMPLES / "jenkins" / "started_signed"
    secrets = tuple(read(case, "expected")["secrets"])
    with pytest.raises(BadSignature):
        platforms.find()["jenkins"].verify(
            {"x-hub-signature-256": "sha256=" + "0" * 64, "x-build-token": secrets[1]},
            body_of(case),
            secrets,
            0.0,
        )


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


@pytest.mark.parametrize(
    "report",
    [
        {"runId": 27, "event": "heartbeat"},
        {"runId": "r" * 65, "event": "heartbeat"},
        {"event": "heartbeat"},
        {"runId": "r", "event": 1},
        {"runId": "r"},
        {"runId": "r", "event": "heartbeat", "pid": "12"},
        {"runId": "r", "event": "heartbeat", "durationMs": -1},
        {"runId": "r", "event": "heartbeat", "pid": True},
        {"runId": "r", "event": "heartbeat", "message": {"a": 1}},
        {"runId": "r", "event": "heartbeat", "data": []},
    ],
)
def test_script_hears_of_its_slips(report):
    with pytest.raises(Unreadable):
        parse("script", {}, json.dumps(report).encode())


def test_script_heartbeats_are_never_duplicates():
    envelope = platforms.find()["script"].envelope
    body = b'{"runId":"r","event":"heartbeat"}'
    assert envelope({}, body).delivery_id == ""
    assert envelope({"x-delivery-id": "d-1"}, body).delivery_id == "d-1"
    assert envelope({"x-delivery-id": "d-1"}, b'{"deliveryId":"d-2"}').delivery_id == "d-2"


def test_script_report_that_is_huge_keeps_only_plain_fields():
    report = {"runId": "r", "event": "plan_generated", "note": "n", "tasks": ["x" * 100] * 1000}
    body = json.dumps(report).encode()
    detail = parse("script", {}, body).observations[0].detail
    assert detail is not None
    assert detail.data == {"note": "n", "tasks": None}


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2026-11-01T10:00:00Z", datetime(2026, 11, 1, 10, tzinfo=UTC)),
        ("2020-01-20T09:42:40.000-08:00", datetime(2020, 1, 20, 17, 42, 40, tzinfo=UTC)),
        ("2021-02-23T02:41:37.886Z", datetime(2021, 2, 23, 2, 41, 37, 886000, tzinfo=UTC)),
        ("2016-08-12 15:23:28 UTC", datetime(2016, 8, 12, 15, 23, 28, tzinfo=UTC)),
        ("2026-01-12T09:30:00.123+0800", datetime(2026, 1, 12, 1, 30, 0, 123000, tzinfo=UTC)),
        (1793577604000, datetime(2026, 11, 2, 0, 0, 4, tzinfo=UTC)),
        ("2026-11-01T10:00:00", None),
        ("2026-11-01", None),
        ("0001-01-01T00:00:00Z", None),
        ("0001-01-01T00:00:00+14:00", None),
        ("soon", None),
        ("", None),
        (0, None),
        (10**30, None),
        (True, None),
        (1.5, None),
        ([], None),
        (None, None),
    ],
)
def test_moment(value, expected):
    assert _read.moment(value) == expected


def test_text_is_storable():
    assert _read.loads(b'{"a": "x\\ud800y\\u0000z"}') == {"a": "x\ud800y\0z"}
    assert _read.text("x\ud800y\0z") == "x?yz"
    assert _read.text("\0") is None
    assert _read.text("abc", 2) == "ab"
    assert [_read.text(value) for value in (None, 1, True, ["a"], {})] == [None] * 5


def test_whole():
    assert [_read.whole(value) for value in (0, -(2**63), 2**63 - 1)] == [0, -(2**63), 2**63 - 1]
    assert [_read.whole(value) for value in (2**63, True, 1.0, "1", None)] == [None] * 5
    assert _read.whole(_read.loads(b'{"n": 99999999999999999999}')["n"]) is None


DATE = "Sun, 01 Nov 2026 10:00:00 GMT"


@given(st.binary(max_size=50) | st.text(max_size=50).map(str.encode))
def test_loads_gives_an_object_or_says_why_not(body):
    try:
        value = _read.loads(body)
    except (NotJson, Unreadable):
        return
    assert isinstance(value, dict)


@pytest.mark.parametrize(
    ("status", "headers", "body", "fault", "wait"),
    [
        (304, {}, b"", PollFault.UNREADABLE, None),
        (301, {"location": "https://ci.example.com/repositories/1"}, b"", PollFault.UNREADABLE, None),
        (401, {}, b"{}", PollFault.UNAUTHORIZED, None),
        (403, {}, b'{"message":"Resource not accessible"}', PollFault.FORBIDDEN, None),
        (403, {"retry-after": "30"}, b"", PollFault.RATE_LIMITED, 30),
        (403, {"x-ratelimit-remaining": "0"}, b"", PollFault.RATE_LIMITED, None),
        (404, {}, b"", PollFault.NOT_FOUND, None),
        (410, {}, b"", PollFault.NOT_FOUND, None),
        (422, {}, b"", PollFault.UNREADABLE, None),
        (429, {}, b"", PollFault.RATE_LIMITED, None),
        (429, {"retry-after": "0"}, b"", PollFault.RATE_LIMITED, 1),
        (429, {"retry-after": "Sun, 01 Nov 2026 10:02:00 GMT"}, b"", PollFault.RATE_LIMITED, None),
        (
            429,
            {"retry-after": "Sun, 01 Nov 2026 10:02:00 GMT", "date": DATE},
            b"",
            PollFault.RATE_LIMITED,
            120,
        ),
        (
            429,
            {"ratelimit-remaining": "0", "ratelimit-reset": "1793527215", "date": DATE},
            b"",
            PollFault.RATE_LIMITED,
            15,
        ),
        (502, {}, b"<html>", PollFault.UNAVAILABLE, None),
        (503, {"retry-after": "7"}, b"", PollFault.UNAVAILABLE, 7),
        (408, {}, b"", PollFault.UNAVAILABLE, None),
        (200, {}, b"<html>", PollFault.UNREADABLE, None),
        (200, {}, b"[]", PollFault.UNREADABLE, None),
    ],
)
def test_faults_of_an_answer(status, headers, body, fault, wait):
    with pytest.raises(PollError) as refusal:
        _read.fetched(Answer(status, headers, body))
    assert (refusal.value.fault, refusal.value.retry_after_seconds) == (fault, wait)


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "https://",
        "http://[",
        "https://a b",
        "//x",
        "https://x/\n",
        "x" * 9000,
        5,
        None,
    ],
)
def test_links_are_web_addresses(url):
    assert _read.web_url(url) is None


# ---- the reference payloads, where they are present ----------------------------------------------

_RUN = "github:octo-org:octo-repo:289782451"
_REFERENCES: dict[str, tuple[str, str | None] | str] = {
    "github/workflow_run.requested": (_RUN, "queued"),
    "github/workflow_run.completed.success": (_RUN, "completed"),
    "github/workflow_run.completed-action-but-status-queued": (
        "github:Codertocat:Hello-World:1589141559",
        "queued",
    ),
    "github/derived.workflow_run.in_progress": (_RUN, "in_progress"),
    "github/derived.workflow_run.requested.attempt2": (_RUN, "queued"),
    "github/derived.workflow_run.completed.failure": (_RUN, "failed"),
    "github/derived.workflow_run.completed.cancelled": (_RUN, "cancelled"),
    "github/workflow_job.queued": ("github:Codertocat:Hello-World:2202229078", None),
    "github/workflow_job.waiting": ("github:lineville:elastic-machines-testing:4747967848", None),
    "github/workflow_job.in_progress": ("github:Codertocat:Hello-World:2202229078", "in_progress"),
    "github/workflow_job.in_progress.no-workflow-name": ("github:octo-org:example-workflow:940463255", None),
    "github/workflow_job.completed.failure": ("github:Codertocat:Hello-World:2202229078", None),
    "github/check_run.completed.failure": ("", None),
    "github/check_run.completed.success": ("", None),
    "github/check_run.created.queued": ("", None),
    "github/check_run.completed.form-encoded": ("", None),
    "github/ping.repository": "pong",
    "github/ping.no-repository": "pong",
    "github/check_suite.completed.success": "ignored",
    "github/deployment_status.created.with-workflow_run": "ignored",
    "github/repository_dispatch.on-demand-test": "ignored",
    "github/workflow_dispatch.sample": "ignored",
    "gitlab/pipeline_hook.success": ("gitlab:1:31", "completed"),
    "gitlab/derived.pipeline_hook.running": ("gitlab:1:31", "in_progress"),
    "gitlab/derived.pipeline_hook.manual": ("gitlab:1:31", "in_progress"),
    "gitlab/derived.pipeline_hook.canceled": ("gitlab:1:31", "cancelled"),
    "gitlab/derived.pipeline_hook.retried-running-again": ("gitlab:1:31", "in_progress"),
    "gitlab/job_hook.created": ("gitlab:380:2366", None),
    "gitlab/job_hook.created.older": ("gitlab:380:2366", None),
    "gitlab/job_hook.success.retried": ("gitlab:31537070:743121198", None),
    "jenkins/derived.notification.queued": ("jenkins:platform:web:42", "queued"),
    "jenkins/derived.notification.started": ("jenkins:platform:web:42", "in_progress"),
    "jenkins/derived.notification.completed.failure": ("jenkins:platform:web:42", "failed"),
    "jenkins/derived.notification.finalized.failure": ("jenkins:platform:web:42", "failed"),
    "jenkins/notification.finalized.success": ("jenkins:Synapse:8", "completed"),
    "jenkins/generic_event.run_started": "unreadable",
}
_REFERENCE_POLLS = {
    "github/rest.run": ("github:octocat:Hello-World:30433642", "github:30433642", "queued"),
    "gitlab/rest.pipeline": ("gitlab:21:287", "gitlab:21:287", "completed"),
    "gitlab/rest.pipeline_retry": ("gitlab:1:46", "gitlab:1:46", "queued"),
    "jenkins/derived.build_api.finished": ("jenkins:platform:web:42", "jenkins:platform:web:42", "failed"),
    "jenkins/derived.build_api.running": (
        "jenkins:platform:web:42",
        "jenkins:platform:web:42",
        "in_progress",
    ),
    "jenkins/derived.build_api.unstable-but-still-building": (
        "jenkins:platform:web:43",
        "jenkins:platform:web:43",
        "in_progress",
    ),
}


def _present(name: str) -> Path | None:
    candidates = (REFERENCE / f"{name}.{ending}" for ending in ("json", "txt"))
    return next((path for path in candidates if path.exists()), None)


def test_reference_webhooks():
    """Where the reference payloads are present, each is read as the table says."""
    for name, expected in _REFERENCES.items():
        if path := _present(name):
            assert _said_of(name, path) == expected, name


def _said_of(name, path):
    platform, file = name.split("/")
    media_type = "x-www-form-urlencoded" if path.suffix == ".txt" else "json"
    event = file.removeprefix("derived.").split(".")[0]
    headers = {"x-github-event": event, "content-type": f"application/{media_type}"}
    try:
        said = parse(platform, headers, path.read_bytes())
    except Unreadable:
        return "unreadable"
    if not said.observations:
        return "pong" if said.pong else "ignored" if said.ignored else ""
    (seen,) = said.observations
    assert_sound(seen)
    return seen.build_id, seen.state


def test_reference_polls():
    for name, (build_id, key, state) in _REFERENCE_POLLS.items():
        if path := _present(name):
            platform = platforms.find()[name.partition("/")[0]]
            target = PollTarget(build_id, key, "acme/web", 42, 1, None)
            seen = platform.parse_poll(source_of(platform.NAME), target, Answer(200, {}, path.read_bytes()))
            assert (seen.build_id, seen.key, seen.state) == (build_id, key, state), name
            assert_sound(seen)


def test_reference_form_has_the_published_signature():
    path = _present("github/check_run.completed.form-encoded")
    if path is not None:
        published = "sha256=6774da62ab1cb4280aaf1ae9efd451c0881ecb3fd16b20919f2e7e0bcb305dc2"
        assert signing.github_signature("It's a Secret to Everybody", path.read_bytes()) == published


# ---- lists, follow-ups and names


def _listed(platform, repository, content):
    module = platforms.find()[platform]
    answer = Answer(200, {}, json.dumps(content).encode())
    return module.parse_list(source_of(platform), [repository], answer).observations


_GITHUB_RUN = {
    "id": 9,
    "status": "in_progress",
    "conclusion": None,
    "run_attempt": 1,
    "updated_at": "2026-11-01T10:00:00Z",
}


def test_a_github_list_gives_the_runs_that_can_be_read():
    runs = [
        _GITHUB_RUN,
        {"id": "odd"},
        _GITHUB_RUN | {"id": 10, "status": "completed", "conclusion": "success"},
        5,
    ]
    seen = _listed("github", "Acme/Web", {"total_count": 4, "workflow_runs": runs})
    assert [(one.build_id, one.state) for one in seen] == [
        ("github:Acme:Web:9", "in_progress"),
        ("github:Acme:Web:10", "completed"),
    ]


def test_a_gitlab_list_takes_the_repository_from_the_setting_or_from_the_page():
    pipeline = {
        "id": 5,
        "project_id": 7,
        "status": "manual",
        "web_url": "https://gitlab.example.com/g/p/-/pipelines/5",
    }
    for place in ("g/p", "7"):
        (seen,) = _listed("gitlab", place, [pipeline, {"id": 6}, "odd"])
        assert (seen.build_id, seen.repository, seen.waiting) == ("gitlab:7:5", "g/p", True)


def test_a_jenkins_list_names_the_builds_of_the_job():
    builds = [
        {"number": 4, "building": True, "result": None},
        {"number": 3, "building": False, "result": "SUCCESS"},
        {},
    ]
    seen = _listed("jenkins", "team/web", {"builds": builds})
    assert [(one.build_id, one.state) for one in seen] == [
        ("jenkins:team:web:4", "in_progress"),
        ("jenkins:team:web:3", "completed"),
    ]


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
@pytest.mark.parametrize("answer", [Answer(200, {}, b"<html>"), Answer(500, {}, b""), Answer(404, {}, b"{}")])
def test_a_list_that_is_none_is_a_poll_error(platform, answer):
    with pytest.raises(PollError):
        platforms.polled()[platform].parse_list(source_of(platform), ["a/b"], answer)


@pytest.mark.parametrize(
    ("platform", "repository", "path"),
    [
        ("github", "Acme/Web", "/repos/Acme/Web/actions/runs?per_page=100"),
        (
            "gitlab",
            "group/web",
            "/api/v4/projects/group%2Fweb/pipelines?order_by=updated_at&sort=desc&per_page=100",
        ),
        ("jenkins", "team/web", "/job/team/job/web/api/json?tree=builds%5B"),
    ],
)
def test_a_list_is_asked_for_where_it_is(platform, repository, path):
    request = platforms.polled()[platform].list_request(source_of(platform), [repository], None, 100)
    assert request.url.startswith(source_of(platform).api_url + path)
    assert any(value for name, value in request.headers.items() if name in ("Authorization", "PRIVATE-TOKEN"))


@pytest.mark.parametrize(
    ("platform", "repository"), [("github", "../x"), ("github", "x"), ("jenkins", "a/../b"), ("gitlab", "")]
)
def test_no_list_is_asked_for_at_a_place_that_is_none(platform, repository):
    assert platforms.polled()[platform].list_request(source_of(platform), [repository], None, 100) is None


def test_jobs_of_a_folder_are_listed_by_one_request():
    jenkins, source = platforms.polled()["jenkins"], source_of("jenkins")
    assert jenkins.together("team/web") == jenkins.together("team/api") == "team"
    assert jenkins.together("web") == "" != jenkins.together("team/web")
    request = jenkins.list_request(source, ["team/web", "team/api"], None, 30)
    assert request.url == (
        f"{source.api_url}/job/team/api/json?tree={quote('jobs[name,', safe=',')}"
        + request.url.partition("name,")[2]
    )
    assert unquote(request.url).endswith("]{0,30}]")
    content = {
        "jobs": [
            {"name": "api", "builds": [{"number": 4, "building": True, "result": None}]},
            {"name": "web", "builds": [{"number": 3, "building": False, "result": "SUCCESS"}]},
            {"name": "other", "builds": [{"number": 9, "building": True, "result": None}]},
            {"builds": 5},
        ]
    }
    answer = Answer(200, {}, json.dumps(content).encode())
    seen = jenkins.parse_list(source, ["team/web", "team/api"], answer).observations
    assert [(one.build_id, one.state) for one in seen] == [
        ("jenkins:team:api:4", "in_progress"),
        ("jenkins:team:web:3", "completed"),
    ]
    outside = jenkins.list_request(source, ["web", "api"], None, 30)
    assert outside.url.startswith(f"{source.api_url}/api/json?tree=jobs")


def test_a_gitlab_list_of_changes_looks_back_a_minute_by_gitlabs_own_clock():
    since = datetime(2026, 11, 1, 10, 0, 30, 500_000, UTC)
    request = platforms.polled()["gitlab"].list_request(source_of("gitlab"), ["7"], since, 30)
    assert request.url.endswith("&per_page=30&updated_after=2026-11-01T09:59:30Z")


@pytest.mark.parametrize("platform", ["github", "gitlab"])
def test_the_next_page_is_followed_on_the_same_api_only(platform):
    source = source_of(platform)
    body = b'{"workflow_runs": []}' if platform == "github" else b"[]"

    def more(link):
        answer = Answer(200, {"link": link}, body)
        return platforms.polled()[platform].parse_list(source, ["a/b"], answer).more

    good = f"{source.api_url}/repositories/5/runs?page=2"
    found = more(f'<{source.api_url}/x?page=1>; rel="prev", <{good}>; rel="next"')
    assert found.url == good
    assert any(value for name, value in found.headers.items() if name in ("Authorization", "PRIVATE-TOKEN"))
    for link in ("", "nonsense", '<https://evil.example/x>; rel="next"', f'<{good}>; rel="last"'):
        assert more(link) is None


@pytest.mark.parametrize(
    ("platform", "headers", "expected"),
    [
        ("github", {"x-ratelimit-limit": "5000", "x-ratelimit-remaining": "4990"}, (5000, 4990, 90)),
        (
            "github",
            {"x-ratelimit-limit": "30", "x-ratelimit-remaining": "3", "x-ratelimit-resource": "search"},
            None,
        ),
        ("github", {"x-ratelimit-limit": "many", "x-ratelimit-remaining": "3"}, None),
        ("gitlab", {"ratelimit-limit": "2000", "ratelimit-remaining": "0"}, (2000, 0, 90)),
        ("gitlab", {}, None),
        ("jenkins", {"x-ratelimit-limit": "5000", "x-ratelimit-remaining": "4990"}, None),
    ],
)
def test_limits_are_read_by_the_platforms_own_clock(platform, headers, expected):
    """Our clock may be wrong: the time to the reset is what lies between the answer's Date and it."""
    reset = {"x-ratelimit-reset": "1795500090", "ratelimit-reset": "1795500090"}
    date = {"date": formatdate(1_795_500_000, usegmt=True)}
    found = platforms.polled()[platform].limits(Answer(200, headers | reset | date, b""))
    assert (found and (found.limit, found.remaining, found.reset_seconds)) == expected
    assert platforms.polled()[platform].limits(Answer(200, headers, b"")) is None


@pytest.mark.parametrize(
    ("jobs", "state"),
    [
        (
            [{"status": "failed", "failure_reason": "job_execution_timeout", "allow_failure": False}],
            "timeout",
        ),
        ([{"status": "failed", "failure_reason": "script_failure", "allow_failure": False}], "failed"),
        ([], "failed"),
    ],
)
def test_a_failed_pipeline_is_asked_for_its_failed_jobs(jobs, state):
    gitlab = platforms.find()["gitlab"]
    content = {"id": 5, "project_id": 7, "status": "failed"}
    target = PollTarget("gitlab:7:5", "gitlab:7:5", "g/p", 5, 1, None)
    seen = gitlab.parse_poll(source_of("gitlab"), target, Answer(200, {}, json.dumps(content).encode()))
    request = gitlab.follow_up(source_of("gitlab"), seen)
    assert request.url.endswith("/api/v4/projects/7/pipelines/5/jobs?scope[]=failed&per_page=100")
    assert gitlab.parse_follow_up(seen, Answer(200, {}, json.dumps(jobs).encode())).state == state


@pytest.mark.parametrize(
    ("status", "started_at", "state"),
    [
        ("manual", "2026-11-01T10:00:00Z", "in_progress"),
        ("manual", None, "queued"),
        ("running", "2026-11-01T10:00:00Z", "queued"),
    ],
)
def test_a_listed_pipeline_that_waits_is_asked_whether_it_has_begun(status, started_at, state):
    gitlab = platforms.polled()["gitlab"]
    listed = {
        "id": 5,
        "project_id": 7,
        "status": "manual",
        "web_url": "https://gitlab.example.com/g/p/-/pipelines/5",
    }
    answer = Answer(200, {}, json.dumps([listed]).encode())
    (seen,) = gitlab.parse_list(source_of("gitlab"), ["7"], answer).observations
    request = gitlab.follow_up(source_of("gitlab"), seen)
    assert request.url.endswith("/api/v4/projects/7/pipelines/5")
    told = Answer(200, {}, json.dumps(listed | {"status": status, "started_at": started_at}).encode())
    assert gitlab.parse_follow_up(seen, told).state == state


@pytest.mark.parametrize(
    ("build_id", "key", "repository", "number"),
    [
        ("github:Acme:Web:12", "github:12", "Acme/Web", None),
        ("gitlab:7:5", "gitlab:7:5", None, None),
        ("jenkins:Team:Web:12", "jenkins:team:web:12", "Team/Web", 12),
    ],
)
def test_an_id_names_its_build(build_id, key, repository, number):
    platform = build_id.partition(":")[0]
    seen = platforms.find()[platform].named(source_of(platform), build_id)
    assert (seen.key, seen.build_id, seen.repository, seen.number) == (key, build_id, repository, number)
    assert seen.state is None


@pytest.mark.parametrize(
    "build_id",
    [
        "github:1",
        "github:a:b:0",
        "github:a:..:1",
        "gitlab:x:1",
        "gitlab:1",
        "jenkins:1",
        "jenkins:..:1",
    ],
)
def test_an_id_of_another_form_names_none(build_id):
    platform = build_id.partition(":")[0]
    assert platforms.find()[platform].named(source_of(platform), build_id) is None
