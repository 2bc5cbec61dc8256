"""Build scripts that report for themselves: `POST /api/internal/build-events`.

One body per event: `runId`, `event` and free fields (`stage`, `message`, `durationMs`, `repo`,
`branch`, `commit`, …); the fields of a task or a deployment may stand in `data` as well.

* Two words end a build well: `build_completed`, and `deploy_completed`, the last word of scripts
  that plan, execute and deploy (their `build_started` lies inside the deployment, and no
  `build_completed` follows).  `build_failed` and `deploy_failed` end it badly.
* `task_failed` and a failed stage do not end it: a script may try again, or go on.  One that does
  not will report the failure of the whole, or fall silent and fail for want of a heartbeat.
* Only `event` and `runId` must be right.  Any other field of a wrong type is coerced where its meaning
  is plain, else left out, and named in the answer: a detail never costs a build its end.
* `runId` is any printable text, so in `build_id` a character that is not plainly safe is `~HH` per byte,
  as in the ids of Jenkins builds.  Look-ups ignore case, so run ids that differ in case alone are one run.
* There is no delivery id unless the sender makes one (`eventId`, counted by run): two heartbeats are
  equal to the byte, and both must count.  There is nothing to poll.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from hashlib import sha256
from typing import Any

from webhook_app import signing
from webhook_app.lifecycle import Conclusion, Detail, Observation, ObservedBy, State
from webhook_app.platforms import (
    BadSignature,
    Envelope,
    Headers,
    Invalid,
    NotJson,
    Source,
    Unreadable,
    Webhook,
    _read,
)
from webhook_app.redaction import SHAPES

NAME = "script"
CONTENT_TYPES = ("application/json",)
SIGNATURE_HEADERS = ("x-build-token", "x-om-build-token")

HEARTBEAT = "heartbeat"
BEGIN = "build_started"
_GOOD_ENDS = ("build_completed", "deploy_completed")
_BAD_ENDS = ("build_failed", "deploy_failed")
_OPENINGS = (BEGIN, "plan_started", "deploy_started")
"""Their time is the start of the build, whichever comes first."""
EVENTS = (
    BEGIN, "stage_started", "stage_completed", "stage_failed", "build_completed", "build_failed", HEARTBEAT,
    "plan_started", "plan_generated", "task_started", "task_completed", "task_failed",
    "deploy_started", "deploy_progress", "deploy_completed", "deploy_failed",
)  # fmt: skip

LONGEST_RUN_ID = 255
_LONGEST_PART = 1000
"""Characters of a run id in a build id, once escaped; a longer one ends in its digest."""

_NOT_DETAIL = {"runId", "event", "type", "eventId", "deliveryId", "data"}
_MOST_FIELDS = 64
_LARGE_BYTES = 64 * 1024
"""Every subscriber gets the fields: lists and objects of a report larger than this are left out."""


def verify(headers: Headers, body: bytes, secrets: tuple[str, ...], now: float) -> None:
    """Check `X-Build-Token` (or its older name `X-OM-BUILD-TOKEN`), or raise `BadSignature`."""
    token = headers.get("x-build-token", headers.get("x-om-build-token"))
    if not signing.verify_token(token, secrets):
        raise BadSignature


def envelope(headers: Headers, body: bytes) -> Envelope:
    """The sender's own id of the event, its run and its time; without such an id nothing is a duplicate.

    A second run may number its events from 1 again: the same id at another time is another event.
    """
    report: Mapping[str, Any] = {}
    written: Mapping[str, Any] = {}
    run = ""
    with suppress(NotJson, Unreadable):
        report = _report(body)
        written = _written(report, body)
        run = _part(_run_id(report, written)).casefold()
    given = [_text(report.get(name), written.get(name)) for name in _IDS]
    at = _read.moment(report.get("timestamp"))
    delivery_id = next((_short(text) for text in given if text), headers.get("x-delivery-id", ""))
    return Envelope(
        event=_read.text(report.get("event")) or "",
        hook_id=f"{run}@{at.isoformat()}" if delivery_id and at is not None else run,
        delivery_id=delivery_id,
    )


def _short(identity: str) -> str:
    """An id of an event as it is, or its digest where that could not be stored."""
    if _read.text(identity) == identity:
        return identity
    return sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()


def parse_webhook(source: Source, headers: Headers, body: bytes) -> Webhook:
    """What a script reports; raises `NotJson` or `Invalid`."""
    report = _report(body)
    event = _event(report)
    written = _written(report, body)
    build_id = f"{source.name}:{_part(_run_id(report, written))}"
    taken, dropped = _taken(report, written)
    fields, left_out = _fields(taken, large=len(body) > _LARGE_BYTES)
    return Webhook(
        (_observation(source, build_id, event, taken, fields),),
        dropped=tuple(_read.clean(name, _read.NAME_CHARS) for name in (*dropped, *left_out)[:_MOST_FIELDS]),
    )


def _observation(
    source: Source, build_id: str, event: str, taken: Mapping[str, Any], fields: dict[str, object]
) -> Observation:
    state, conclusion = _state(event)
    at = _moment(taken.get("timestamp"))
    return Observation(
        source=source.name,
        platform=NAME,
        observed_by=ObservedBy.REPORT,
        key=build_id.casefold(),
        build_id=build_id,
        repository=_read.text(taken.get("repo")),
        workflow=_read.text(taken.get("origin")) or _read.text(taken.get("name")),
        branch=_read.text(taken.get("branch")),
        commit=_read.text(taken.get("commit")),
        url=_read.web_url(taken.get("url")),
        state=state,
        conclusion=conclusion,
        raw_status=event,
        started_at=at if event in _OPENINGS else None,
        ended_at=at if state.terminal else None,
        reported_at=at,
        begins=event == BEGIN,
        progress=_read.percent(taken.get("progress")) if event != "deploy_progress" else None,
        error=_error(event, fields) if state is State.FAILED else None,
        detail=None if event == HEARTBEAT else Detail(type=event, data=fields),
        preview_url=_read.web_url(fields.get("previewUrl")),
    )


# ---- what must be right ----------------------------------------------------------------------


def _report(body: bytes) -> dict[str, Any]:
    """The report in a body; numbers that JSON lacks (Python writes `NaN`) do no harm if the rest is right."""
    try:
        return _read.loads(body)
    except Unreadable as error:
        raise Invalid("body", str(error)) from error
    except NotJson:
        report = _read.loads_leniently(body)
        if report.get("event") in EVENTS and "runId" in report:
            return report
        raise


def _event(report: Mapping[str, Any]) -> str:
    event = report.get("event")
    if isinstance(event, str) and event in EVENTS:
        return event
    what = f"{_read.clean(event, 100)!r} is unknown" if isinstance(event, str) else "a text is needed"
    raise Invalid("event", f"{what}; allowed are {', '.join(EVENTS)}", EVENTS)


def _run_id(report: Mapping[str, Any], written: Mapping[str, Any]) -> str:
    run_id = _text(report.get("runId"), written.get("runId"))
    if run_id is None or not 1 <= len(run_id) <= LONGEST_RUN_ID or not run_id.isprintable():
        raise Invalid("runId", f"a text or number of 1 to {LONGEST_RUN_ID} printable characters is needed")
    return run_id


def _part(run_id: str) -> str:
    """A run id as part of a build id.

    One that is too long when escaped is cut and ends in `~~` and a digest, which no other run id has; so does
    one that holds a secret, which is masked.
    """
    if not run_id.strip("."):  # a path must not climb
        return "~2E" * len(run_id)
    part, shown = _read.name_part(run_id), _read.name_part(SHAPES.name(run_id))
    digest = sha256(part.casefold().encode()).hexdigest()
    if shown != part:
        return f"{re.sub('~.?$', '', shown[:300])}~~{digest[:16]}"
    return part if len(part) <= _LONGEST_PART else f"{re.sub('~.?$', '', part[:300])}~~{digest}"


def run_id_of(build_id: str) -> str:
    """The run id as the script gave it; of one that was cut, what is left."""
    return _read.name_of_part(build_id.partition(":")[2].partition("~~")[0])


# ---- what may be wrong -----------------------------------------------------------------------

_NUMBER = re.compile(r"-?[0-9][0-9.eE+-]*")


def _written(report: Mapping[str, Any], body: bytes) -> dict[str, Any]:
    """Fields that should be texts and are fractions (a commit `12e45`, a long run id), as they stand."""
    names = [name for name in ("runId", *_IDS, *_TEXTS) if isinstance(report.get(name), float)]
    if not names:
        return {}
    texts = _read.numbers_as_written(body)
    return {name: texts.get(name) for name in names}


def _text(value: object, written: object = None) -> str | None:
    """A text, or a number in its own digits; None for anything else."""
    if isinstance(value, float):
        return written if isinstance(written, str) and _NUMBER.fullmatch(written) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _natural(value: object) -> int | None:
    number = _read.rounded(value)
    return number if number is not None and number >= 0 else None


def _percent(value: object) -> object:
    """A number from 0 to 100, also as `"50"` or `"50 %"`."""
    if isinstance(value, str):
        value = _read.rounded(value.strip().removesuffix("%"))
    return value if _read.percent(value) is not None else None


_SECONDS_BELOW = 10**11
"""Smaller numbers are Unix seconds (until the year 5138), larger ones milliseconds (from 1973 on)."""


def _moment(value: object) -> datetime | None:
    """A time in ISO 8601 with a zone, in Unix milliseconds, or in the seconds that a shell has at hand."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _SECONDS_BELOW:
        value = value * 1000
    return _read.moment(_read.rounded(value) if isinstance(value, float) else value)


def _timestamp(value: object) -> object:
    if isinstance(value, str) and (digits := _read.rounded(value)) is not None:
        value = digits
    return value if _moment(value) is not None else None


def _object(value: object) -> object:
    return value if isinstance(value, dict) else None


_TEXTS = ("env", "origin", "name", "command", "host", "stage", "message", "repo", "branch", "commit", "error")
_IDS = ("eventId", "deliveryId")
_KINDS: Mapping[str, Callable[[object], object]] = {
    "pid": _natural,
    "durationMs": _natural,
    "progress": _percent,
    "timestamp": _timestamp,
    "data": _object,
    "url": _read.web_url,
    "previewUrl": _read.web_url,
}
"""What the known fields may be, beside those that are texts."""


def _taken(report: Mapping[str, Any], written: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The report with its known fields as they should be, and the names of those that were not so."""
    taken: dict[str, Any] = {}
    dropped = []
    for name, value in report.items():
        fit = value
        if value is not None and (name in _TEXTS or name in _IDS):
            fit = _text(value, written.get(name))
        elif value is not None and name in _KINDS:
            fit = _KINDS[name](value)
        if fit is not None:
            taken[name] = fit
        if type(fit) is not type(value):
            dropped.append(name)
    return taken, dropped


def _state(event: str) -> tuple[State, Conclusion | None]:
    if event in _GOOD_ENDS:
        return State.COMPLETED, Conclusion.SUCCESS
    if event in _BAD_ENDS:
        return State.FAILED, Conclusion.FAILURE
    return State.IN_PROGRESS, None


def _fields(taken: Mapping[str, Any], *, large: bool) -> tuple[dict[str, object], Iterable[str]]:
    """What the event tells beside its name, made storable, and the names of what would be too much.

    The fields around `data` come first: what tells of the build itself is never too much.
    """
    inner = {name: value for name, value in _read.mapping(taken.get("data")).items() if name not in taken}
    told = {
        name: value
        for name, value in ({**taken, **inner}).items()
        if name not in _NOT_DETAIL and value is not None
    }
    names = [name for name, value in told.items() if not (large and isinstance(value, dict | list))]
    kept = dict.fromkeys(names[:_MOST_FIELDS])
    fields: dict[str, object] = _read.plain({name: told[name] for name in kept})
    return fields, [name for name in told if name not in kept]


def _error(event: str, fields: dict[str, object]) -> str:
    """Why it failed, in the script's words, with the stage before it."""
    message = _read.text(fields.get("message"), _read.TEXT_CHARS) or _read.text(fields.get("error"))
    stage = _read.text(fields.get("stage"))
    reason = message or event.replace("_", " ")
    return f"{stage}: {reason}" if stage else reason
