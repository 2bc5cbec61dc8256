"""What operators look at: events, inbound deliveries, notices, tokens, sources, and the running script."""

import zlib
from datetime import datetime, timedelta
from typing import Any

from flask import Response

from webhook_app import api_health, db, health, inbox, queries, queues, tokens
from webhook_app.inbox import Receipt
from webhook_app.platforms import script
from webhook_app.queries import Row
from webhook_app.settings import SourceSettings
from webhook_app.times import utc_now
from webhook_app.web import schemas
from webhook_app.web.api import masking
from webhook_app.web.api.builds import with_source
from webhook_app.web.api.spec import STORE_ID, Blueprint, abort, operation, page
from webhook_app.web.problems import problem
from webhook_app.web.state import state

blueprint = Blueprint("operations", __name__, description="Events, inbound deliveries, sources, tokens")


@operation(
    blueprint, "GET", "/events", schemas.EventPage, query=schemas.EventsQuery,
    errors=[410],
)  # fmt: skip
def list_events(asked: dict[str, Any]) -> Any:
    """List all events after an id, oldest first, without gaps.

    `next_cursor` is the id to go on from, as text, and is never null: whoever polls hands it in as
    `after` (or `cursor`) each time, and an empty page means that there is nothing new yet.  What is older
    than `RETENTION_DAYS` is gone: `oldest_id` is how far back the list goes.  With `strict=true` a page
    ends before a gap, and where the event after `after` is gone the answer is 410: its `next_cursor` skips
    the gap.
    """
    after = asked.get("cursor", asked["after"])
    with db.reading(state().engine) as connection:
        bounds = queries.event_bounds(connection)
        kept = connection.execute(queries.events(after, asked["limit"])).mappings().all()
    rows = queries.without_gaps(kept, after) if asked["strict"] else kept
    if asked["strict"] and not rows and (kept or bounds.newest > after):
        return _gone(after, bounds, kept[0]["id"] - 1 if kept else bounds.newest)
    items = [{**row, "build_id": row["data"].get("build_id")} for row in rows]
    last = rows[-1]["id"] if rows else after
    return {"items": items, "next_cursor": str(last), "oldest_id": bounds.oldest}


def _gone(after: int, bounds: queries.EventBounds, last_gone: int) -> Response:
    return problem(
        410,
        f"the events {after + 1} to {last_gone} were deleted by retention",
        oldest_id=bounds.oldest,
        next_cursor=str(last_gone),
    )


# ---- inbound ---------------------------------------------------------------------------------


@operation(
    blueprint, "GET", "/inbound", schemas.InboundPage, scope="admin", query=schemas.InboundQuery
)  # fmt: skip
def list_inbound(asked: dict[str, Any]) -> Any:
    """List the verified deliveries that are kept, newest first, without their content."""
    limit, before = asked["limit"], asked.get("cursor", queries.LARGEST_ID)
    source = with_source(asked).get("source")
    statement = queries.inbound(source, asked.get("status"), before, limit + 1)
    with db.reading(state().engine) as connection:
        rows = connection.execute(statement).mappings().all()
    return page([_shown(row) for row in rows], limit, lambda row: row["id"])


@operation(
    blueprint, "GET", f"/inbound/<{STORE_ID}:inbound_id>", schemas.InboundWithBody,
    scope="admin", errors=[404],
)  # fmt: skip
def get_inbound(inbound_id: int) -> Any:
    """Get one delivery with its content; what may be secret in it is masked."""
    with db.reading(state().engine) as connection:
        row = queries.one_inbound(connection, inbound_id)
    if row is None:
        abort(404, "there is no such delivery, or it is past its retention")
    redact = state().redact
    body, cut = masking.readable(zlib.decompress(row["body"]), row["headers"].get("content-type", ""), redact)
    headers = masking.masked(row["headers"], redact)
    return {**_shown(row), "headers": headers, "body": body, "truncated": cut}


def _shown(row: Row) -> dict[Any, Any]:
    """A delivery as it may be seen, also if it was kept before its texts were masked at the entry."""
    redact = state().redact.name
    texts = ("event", "hook_id", "delivery_id", "delivery_key", "reason")
    return {**row, **{name: redact(row[name]) for name in texts if row.get(name)}}


@operation(
    blueprint, "POST", f"/inbound/<{STORE_ID}:inbound_id>/reprocess", schemas.Reprocessed,
    scope="admin", errors=[404],
)  # fmt: skip
def reprocess_inbound(inbound_id: int) -> Any:
    """Take a kept delivery once more, as if it had just come.  Harmless for one that was applied."""
    held = state()
    receipt = inbox.reprocess(held.engine, held.sources, inbound_id, utc_now(), held.pace, held.redact)
    if receipt is None:
        abort(404, "there is no such delivery, or it is past its retention")
    _ring_for(receipt)
    return receipt


def _ring_for(receipt: Receipt) -> None:
    if receipt.events:
        state().bell.ring(queues.DELIVER)
    if receipt.ask:
        state().bell.ring(queues.POLL)


# ---- notices ---------------------------------------------------------------------------------


@operation(
    blueprint, "GET", "/notifications", schemas.NoticePage, scope="admin", query=schemas.PageQuery
)  # fmt: skip
def list_notifications(asked: dict[str, Any]) -> Any:
    """List what admins are told, newest first."""
    limit = asked["limit"]
    statement = queries.notices(asked.get("cursor", queries.LARGEST_ID), limit + 1)
    with db.reading(state().engine) as connection:
        rows = connection.execute(statement).mappings().all()
    return page(rows, limit, lambda row: row["id"])


@operation(
    blueprint, "POST", f"/notifications/<{STORE_ID}:notification_id>/read", schemas.Notice,
    scope="admin", errors=[404],
)  # fmt: skip
def read_notification(notification_id: int) -> Any:
    """Note that a notification was read."""
    row = db.in_transaction(
        state().engine, lambda connection: queries.read_notice(connection, notification_id, utc_now())
    )
    if row is None:
        abort(404, "there is no such notification")
    return row


# ---- tokens ----------------------------------------------------------------------------------


@operation(
    blueprint, "GET", "/tokens", schemas.TokenPage, scope="admin", query=schemas.NamedPageQuery
)  # fmt: skip
def list_tokens(asked: dict[str, Any]) -> Any:
    """List API tokens, by id; never the tokens themselves."""
    limit = asked["limit"]
    with db.reading(state().engine) as connection:
        rows = tokens.page(connection, asked["cursor"], limit + 1)
    return page(rows, limit, lambda row: row["id"])


@operation(
    blueprint, "POST", "/tokens", schemas.CreatedToken, scope="admin", status=201, body=schemas.NewToken
)
def create_token(wanted: dict[str, Any]) -> Any:
    """Make an API token, shown this once.  `write` includes `read`, `admin` both."""
    row, token = db.in_transaction(
        state().engine,
        lambda connection: tokens.create(connection, wanted["name"], wanted["scopes"], utc_now()),
    )
    return {**row, "token": token}


@operation(
    blueprint, "DELETE", "/tokens/<string:token_id>", None, scope="admin", status=204, errors=[404]
)  # fmt: skip
def delete_token(token_id: str) -> Any:
    """Take an API token back; from then on it is unknown."""
    if not db.in_transaction(state().engine, lambda connection: tokens.remove(connection, token_id)):
        abort(404, "there is no such token")


# ---- sources, the running script -------------------------------------------------------------


@operation(blueprint, "GET", "/sources", schemas.SourcePage)
def list_sources() -> Any:
    """List the configured sources with the health of their pushes and of their API, and what is left to ask.

    `missed_pushes` counts changes that a poll was first to tell though a push should have; one whose push
    comes within a minute is taken out again, and counted in `late_pushes`; `push_share`
    (0 to 1) weighs the last 200 changes; `deaf_since`: since when pushes are believed not to come at all;
    `behind_seconds`: how long the stalest build has been due for its poll; `failing_since`: since when no
    round of polling has read anything, after `errors_in_row` of them.
    """
    sources, now = state().settings.sources, utc_now()
    with db.reading(state().engine) as connection:
        told = health.snapshot(connection)
        budgets = queries.budgets(connection)
        behind = queries.behind(connection, [name for name in sources if sources[name].can_poll])
        failing = queries.failing_repositories(connection)
    items = [
        _source(name, one, told.get(name, {}), now)
        | {"budget": _budget(budgets.get(name), now)}
        | {"failing_repositories": failing.get(name, [])}
        | {"behind_seconds": max((now - behind.get(name, now)).total_seconds(), 0.0)}
        for name, one in sources.items()
    ]
    return {"items": items, "next_cursor": None}


def _budget(row: Row | None, now: datetime) -> dict[str, Any] | None:
    """What is left, and what will be at the reset at the present pace; None before the first read."""
    if row is None:
        return None
    return {**row, "per_hour": int(row["per_hour"]), "forecast_remaining": queries.forecast(row, now)}


_UNTOLD = dict.fromkeys(("pushes", "polls", "missed_pushes", "late_pushes"), 0) | dict.fromkeys(
    ("push_share", "last_push_at", "last_poll_at", "deaf_since")
)


def _source(name: str, settings: SourceSettings, told: Row, now: datetime) -> dict[str, Any]:
    newest, until = told.get("newest_fact_at"), told.get("paused_until")
    paused = until is not None and until > now
    return {
        "name": name,
        "platform": settings.source.platform,
        "can_poll": settings.can_poll and settings.source.platform != "script",
        "paused_until": until if paused else None,
        "pause_reason": told["pause_reason"] if paused else None,
        **{field: told.get(field, untold) for field, untold in _UNTOLD.items()},
        "last_error": told.get("api_error"),
        "last_error_kind": told.get("api_error_kind"),
        "last_error_at": told.get("api_error_at"),
        "failing_since": api_health.failing_since(told),
        "errors_in_row": told.get("api_failures", 0),
        "newest_fact_age_seconds": (now - newest).total_seconds() if newest else None,
    }


_TEXTS = ("env", "origin", "command", "host", "stage", "message", "repo", "branch", "commit")
_TOLD: dict[str, type] = dict.fromkeys(_TEXTS, str) | {"pid": int}
"""What is shown of a run, and the type that it must have: in `data` a script may put anything."""


@operation(
    blueprint, "GET", "/admin/build-status", schemas.BuildStatus,
    scope="admin", query=schemas.BuildStatusQuery,
)  # fmt: skip
def get_admin_build_status(asked: dict[str, Any]) -> Any:
    """Tell whether a build script runs now: one that was heard of within `heartbeatTimeout` seconds."""
    now = utc_now()
    with db.reading(state().engine) as connection:
        run = queries.running_script(connection, now - timedelta(seconds=asked["heartbeatTimeout"]))
        told = queries.reports(connection, run["id"], run["attempt"]) if run else []
    active = _active_run(run, told) if run else None
    return {"success": True, "running": run is not None, "activeRun": active, "updatedAt": now}


def _active_run(run: Row, told: list[Any]) -> dict[str, Any]:
    """The run, with the newest word on each field."""
    known = dict.fromkeys(_TOLD)
    for detail in told:
        known |= {name: detail[name] for name, type_ in _TOLD.items() if type(detail.get(name)) is type_}
    return known | {
        "runId": script.run_id_of(run["build_id"]),
        "buildId": run["build_id"],
        "status": "running",
        "progress": run["progress"],
        "startedAt": run["started_at"],
        "lastHeartbeatAt": run["last_push_at"],
    }
