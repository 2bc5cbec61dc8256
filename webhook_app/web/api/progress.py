"""The progress API: two reads of one build, in the camelCase of their original document."""

from datetime import datetime, timedelta
from typing import Any

from flask import Response, jsonify, request
from sqlalchemy import Connection

from webhook_app import db, history, polling, progress, queries
from webhook_app.db import StoreUnavailable
from webhook_app.lifecycle import State
from webhook_app.progress import Expectation
from webhook_app.queries import Row
from webhook_app.settings import Settings
from webhook_app.times import utc_now
from webhook_app.web import problems, schemas
from webhook_app.web.api.builds import github_sources, shown_error
from webhook_app.web.api.spec import Blueprint, operation
from webhook_app.web.state import state

blueprint = Blueprint("progress", __name__, description="Progress of one build, for clients that poll")

MOST_EVENTS = 500
LOOK_NOTED = timedelta(minutes=1)


def _is_public(settings: Settings) -> bool:
    return settings.public_progress


def _shown_id(build: Row | None, asked: str) -> str:
    """The build's id; where anybody may ask, as it was asked: a look-up would tell its true name."""
    public = _is_public(state().settings)
    return asked if public or build is None else str(build["build_id"])


def _find(connection: Connection, build_id: str) -> Row | None:
    return queries.find_build(connection, build_id, github_sources(state().settings))


@operation(
    blueprint, "GET", "/builds/<string:build_id>/events", schemas.ProgressEvents,
    query=schemas.BuildEventsQuery, shaped={503: schemas.ProgressEvents}, is_open=_is_public,
)  # fmt: skip
def list_build_events(asked: dict[str, Any], build_id: str) -> Any:
    """List events of a build after `lastEventId`, at most 500.

    Hand the answer's `lastEventId` in again to go on.  An unknown build has no events.  A 503 has
    the same shape, with an empty list.
    """
    after: int = asked["lastEventId"]
    with db.reading(state().engine) as connection:
        build = _find(connection, build_id)
        rows = queries.build_events(connection, build["id"], after, MOST_EVENTS) if build else []
    return {
        "buildId": _shown_id(build, build_id),
        "events": [_event(row) for row in rows],
        "lastEventId": rows[-1]["id"] if rows else after,
    }


@blueprint.errorhandler(StoreUnavailable)  # type: ignore[untyped-decorator]
def _unavailable(error: StoreUnavailable) -> Response:
    """The store is away: clients that poll events get their shape, empty."""
    path = request.view_args or {}
    answer = problems.store_unavailable(error)
    if request.endpoint != f"{blueprint.name}.{list_build_events.__name__}":
        return answer
    told = request.args.get("lastEventId", "0")
    after = int(told) if told.isascii() and told.isdigit() and len(told) < 20 else 0
    empty = jsonify({"buildId": path.get("build_id"), "events": [], "lastEventId": after})
    empty.status_code = answer.status_code
    empty.headers["Retry-After"] = answer.headers["Retry-After"]
    return empty


def _event(row: Row) -> dict[str, Any]:
    """An event; one that a script reported is shown in the script's own words."""
    detail = dict(row["data"].get("detail") or {})
    told = detail.pop("type", None)
    return {
        "id": row["id"],
        "sequence": row["sequence"],
        "type": told or row["type"],
        "data": detail if told else _data(row),
        "timestamp": row["timestamp"],
        "observedBy": row["observed_by"],
    }


def _data(row: Row) -> dict[str, Any]:
    data = row["data"]
    error = data["error"] or (data.get("detail") or {}).get("error")
    return {
        "state": data["state"],
        "previousState": data["previous_state"],
        "conclusion": data["conclusion"],
        "progress": data["progress"],
        "attempt": data["attempt"],
        "error": error,
        "message": error or f"{data['state'].replace('_', ' ')}, {data['progress']} %",
    }


@operation(
    blueprint, "GET", "/builds/<string:build_id>/status", schemas.ProgressStatus, is_open=_is_public
)  # fmt: skip
def get_build_status(build_id: str) -> Any:
    """Tell how far a build is.  An unknown build has status `unknown`."""
    build, now = _foreseen(build_id), utc_now()
    if build is None:
        nothing = dict.fromkeys(schemas.ProgressStatus().fields)
        return nothing | {
            "buildId": build_id, "status": "unknown", "progress": 0, "progressBasis": "none", "eventCount": 0,
        }  # fmt: skip
    shown = progress.shown(build, now)
    return {
        "buildId": _shown_id(build, build_id),
        "status": progress.status_word(State(build["state"]), build["report"]),
        "state": build["state"],
        "conclusion": build["conclusion"],
        "progress": shown.percent,
        "progressBasis": shown.basis,
        "etaSeconds": progress.eta_seconds(build, now),
        "previewUrl": build["preview_url"],
        "error": shown_error(build),
        "eventCount": build["sequence"],
        "lastUpdate": build["updated_at"],
    }


def _foreseen(build_id: str) -> Row | None:
    """The build; one that runs with what it is expected to take, which the first look at it fixes.

    That somebody looks is noted once a minute: its jobs are worth reading then.
    """
    now = utc_now()
    with db.reading(state().engine) as connection:
        build = _find(connection, build_id)
        if build is None or not progress.is_running(build):
            return build
        known = progress.expectation(build) is not None
        expected = None if known else history.expectations(connection, [build]).get(build["id"])
    if expected is None and polling.is_watched(build, now - LOOK_NOTED):
        return build
    try:
        return db.as_writer(state().engine, lambda write: _note_look(write, build, expected, now))
    except StoreUnavailable:
        return build  # it can be read, but not written: nothing is estimated that could be taken back


def _note_look(write: db.Write, build: Row, expected: Expectation | None, now: datetime) -> Row:
    queries.note_look(write.connection, build["id"], now)
    return history.keep(write, build, expected) if expected else build
