"""Build scripts that report for themselves: `POST /api/internal/build-events`.

One body per event: `runId`, `event` and free fields (`stage`, `message`, `durationMs`, `repo`,
`branch`, `commit`, …); the fields of a task or a deployment may stand in `data` as well.

* Two words end a build well: `build_completed`, and `deploy_completed`, the last word of scripts
  that plan, execute and deploy (their `build_started` lies inside the deployment, and no
  `build_completed` follows).  `build_failed` and `deploy_failed` end it badly.
* `task_failed` and a failed stage do not end it: a script may try again, or go on.  One that does
  not will report the failure of the whole, or fall silent and fail for want of a heartbeat.
* There is no delivery id unless the sender makes one: two heartbeats are equal to the byte, and
  both must count.  There is nothing to poll.
"""

import re
from dataclasses import replace
from typing import Any

from webhook_app import signing
from webhook_app.lifecycle import Conclusion, Detail, Observation, ObservedBy, State
from webhook_app.platforms import (
    BadSignature,
    Envelope,
    Headers,
    NotJson,
    Source,
    Unreadable,
    Webhook,
    _read,
)

NAME = "script"
CONTENT_TYPES = ("application/json",)

HEARTBEAT = "heartbeat"
_GOOD_ENDS = {"build_completed", "deploy_completed"}
_BAD_ENDS = {"build_failed", "deploy_failed"}
EVENTS = (
    {"build_started", "stage_started", "stage_completed", "stage_failed", HEARTBEAT}
    | {"plan_started", "plan_generated", "task_started", "task_completed", "task_failed"}
    | {"deploy_started", "deploy_progress"}
    | _GOOD_ENDS
    | _BAD_ENDS
)

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

_TEXTS = ("env", "origin", "name", "command", "host", "stage", "message", "repo", "branch", "commit", "error")
_WHOLES = ("pid", "durationMs")
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
    """The sender's own id of the event if there is one; an empty delivery id is never a duplicate."""
    try:
        report = _read.loads(body)
    except (NotJson, Unreadable):
        report = {}
    given = _read.text(report.get("eventId")) or _read.text(report.get("deliveryId"))
    return Envelope(
        event=_read.text(report.get("event")) or "",
        hook_id="",
        delivery_id=given or headers.get("x-delivery-id", ""),
    )


def parse_webhook(source: Source, headers: Headers, body: bytes) -> Webhook:
    """What a script reports; raises `NotJson` or `Unreadable`."""
    report = _read.loads(body)
    _check_types(report)
    event = _read.need_text(report, "event")
    if event not in EVENTS:
        raise Unreadable(f"event: {_read.clean(event, 100)!r} is unknown")
    state, conclusion = _state(event)
    at = _read.moment(report.get("timestamp"))
    fields = _fields(report, depth=6 if len(body) <= _LARGE_BYTES else 1)
    seen = replace(
        _about(source, report),
        state=state,
        conclusion=conclusion,
        raw_status=event,
        started_at=at if event == "build_started" else None,
        ended_at=at if state.terminal else None,
        progress=_read.percent(report.get("progress")) if event != "deploy_progress" else None,
        error=_error(event, fields) if state is State.FAILED else None,
        detail=None if event == HEARTBEAT else Detail(type=event, data=fields),
        preview_url=_read.web_url(fields.get("previewUrl")),
    )
    return Webhook((seen,))


def _about(source: Source, report: dict[str, Any]) -> Observation:
    """An observation that only names its run; the key is folded as look-ups are."""
    run_id = _read.need_text(report, "runId")
    if not _RUN_ID.fullmatch(run_id):
        raise Unreadable("runId: 1 to 64 letters, digits, - or _ are needed")
    build_id = f"{source.name}:{run_id}"
    return Observation(
        source=source.name,
        platform=NAME,
        observed_by=ObservedBy.REPORT,
        key=build_id.casefold(),
        build_id=build_id,
        repository=_read.text(report.get("repo")),
        workflow=_read.text(report.get("origin")) or _read.text(report.get("name")),
        branch=_read.text(report.get("branch")),
        commit=_read.text(report.get("commit")),
        url=_read.web_url(report.get("url")),
    )


def _check_types(report: dict[str, Any]) -> None:
    """The known fields, where present, must have their type: a script's author wants to hear of a slip."""
    for name in _TEXTS:
        if not isinstance(report.get(name), str | None):
            raise Unreadable(f"{name}: a text is needed")
    for name in _WHOLES:
        value = report.get(name)
        if value is not None and (_read.whole(value) is None or value < 0):
            raise Unreadable(f"{name}: a whole number from 0 is needed")
    if not isinstance(report.get("data"), dict | None):
        raise Unreadable("data: an object is needed")


def _state(event: str) -> tuple[State, Conclusion | None]:
    if event in _GOOD_ENDS:
        return State.COMPLETED, Conclusion.SUCCESS
    if event in _BAD_ENDS:
        return State.FAILED, Conclusion.FAILURE
    return State.IN_PROGRESS, None


def _fields(report: dict[str, Any], depth: int) -> dict[str, object]:
    """What the event tells beside its name, made storable; `data` first, then the fields around it."""
    told = {**_read.mapping(report.get("data")), **report}
    names = [name for name, value in told.items() if name not in _NOT_DETAIL and value is not None]
    fields: dict[str, object] = _read.plain({name: told[name] for name in names[:_MOST_FIELDS]}, depth)
    return fields


def _error(event: str, fields: dict[str, object]) -> str:
    """Why it failed, in the script's words, with the stage before it."""
    message = _read.text(fields.get("message"), _read.TEXT_CHARS) or _read.text(fields.get("error"))
    stage = _read.text(fields.get("stage"))
    reason = message or event.replace("_", " ")
    return f"{stage}: {reason}" if stage else reason
