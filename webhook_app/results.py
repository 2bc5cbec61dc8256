"""What an end changed for its workflow and branch: it broke, is fixed, or still fails.

It is noted with the event while some subscriber asks for it, by filter or by a format for people.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, or_, select

from webhook_app import models

BROKE, FIXED, STILL_FAILING = "broke", "fixed", "still_failing"
CHANGES = (BROKE, FIXED, STILL_FAILING)

_BAD = ("failed", "timeout")
_ENDS = ("build.completed", "build.failed", "build.timeout")
_b, _e = models.builds.c, models.events.c
_OWN = (
    select(_e.data)
    .where(_e.build == bindparam("the_build"), _e.sequence < bindparam("before"), _e.type.in_(_ENDS))
    .order_by(_e.sequence.desc())
)
_LINE = (
    select(_b.state, _b.conclusion)
    .where(
        _b.source == bindparam("the_source"),
        _b.repository.is_not_distinct_from(bindparam("the_repository")),
        _b.workflow.is_not_distinct_from(bindparam("the_workflow")),
        _b.branch.is_not_distinct_from(bindparam("the_branch")),
        _b.id < bindparam("before"),
        or_(_b.state.in_(_BAD), _b.conclusion == "success"),
    )
    .order_by(_b.id.desc())
    .limit(1)
)


def note_changes(connection: Connection, events: Sequence[dict[str, Any]]) -> None:
    """Set `change` of the events that are ends, by the result before them.

    `events` are in their order and not stored yet.  Cancelled, skipped and neutral builds are no result:
    they neither break nor fix anything.
    """
    told: dict[int, bool] = {}
    for event in events:
        now = _result(event["data"]) if event["type"] in _ENDS else None
        if now is None:
            continue
        before = told.get(event["build"])
        event["change"] = change(_result_before(connection, event) if before is None else before, now)
        told[event["build"]] = now


def change(before: bool | None, now: bool) -> str | None:
    """The word for two results (True: success); None for a success after a success, or the first one."""
    if now:
        return FIXED if before is False else None
    return STILL_FAILING if before is False else BROKE


def _result(data: Mapping[str, Any]) -> bool | None:
    if data.get("state") in _BAD:
        return False
    return True if data.get("conclusion") == "success" else None


def _result_before(connection: Connection, event: Mapping[str, Any]) -> bool | None:
    """The last result this build had, or else that of the newest earlier build of its workflow and branch.

    The build's own comes first: an earlier attempt, or an end of ours that the platform has corrected.
    """
    own = connection.execute(_OWN, {"the_build": event["build"], "before": event["sequence"]}).scalars()
    known = next((result for result in map(_result, own) if result is not None), None)
    return _result_of_line(connection, event) if known is None else known


def _result_of_line(connection: Connection, event: Mapping[str, Any]) -> bool | None:
    data = event["data"]
    line = {f"the_{name}": data[name] for name in ("source", "repository", "workflow", "branch")}
    earlier = connection.execute(_LINE, {**line, "before": event["build"]}).one_or_none()
    return None if earlier is None else _result(dict(earlier._mapping))
