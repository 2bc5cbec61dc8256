"""What an end changed for its workflow and branch: it broke, is fixed, or still fails.

It is noted with the event, of every end: admins get a notice of it, subscribers may filter by it.  A batch
of ends costs two reads, whatever their number.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import orjson
from sqlalchemy import Connection

from webhook_app import bulk

BROKE, FIXED, STILL_FAILING = "broke", "fixed", "still_failing"
CHANGES = (BROKE, FIXED, STILL_FAILING)
REQUEST = "pull_request"

_BAD = ("failed", "timeout")
_ENDS = ("build.completed", "build.failed", "build.timeout")

Event = Mapping[str, Any]


def note_changes(connection: Connection, events: Sequence[dict[str, Any]]) -> None:
    """Set `change` of the events that are ends, by the result before them.

    `events` are in their order and not stored yet, their builds are.  Cancelled, skipped and neutral builds
    are no result: they neither break nor fix anything.  A fork's branch is a line of its own; merge requests
    whose branch nobody tells are in none.  Builds without repository and workflow follow only themselves.
    """
    ends = [event for event in events if event["type"] in _ENDS and _counts(event["data"])]
    if not ends:
        return
    known = _own_results(connection, _known_before(events, {event["build"] for event in ends}))
    first = {event["build"]: event for event in reversed(ends) if event["build"] not in known}
    known |= _results_of_lines(connection, list(first.values()))
    for event in ends:
        now = _result(event["data"])
        event["change"] = change(known.get(event["build"]), bool(now))
        known[event["build"]] = now


def change(before: bool | None, now: bool) -> str | None:
    """The word for two results (True: success); None for a success after a success, or the first one."""
    if now:
        return FIXED if before is False else None
    return STILL_FAILING if before is False else BROKE


def _counts(data: Mapping[str, Any]) -> bool:
    of_request = data.get("branch") is None and data.get("trigger") == REQUEST
    return _result(data) is not None and not of_request


def _result(data: Mapping[str, Any]) -> bool | None:
    if data.get("state") in _BAD:
        return False
    return True if data.get("conclusion") == "success" else None


def _known_before(events: Iterable[Event], builds: Collection[int]) -> list[int]:
    """Those of these builds that have stored events."""
    new = {event["build"] for event in events if event["sequence"] == 1}
    return [build for build in builds if build not in new]


# ---- the result before -----------------------------------------------------------------------

_OWN = {
    "sqlite": """
        SELECT e.build, e.data FROM json_each(?) AS given JOIN events AS e ON e.build = given.value
        WHERE e.type IN ('build.completed', 'build.failed', 'build.timeout') ORDER BY e.build, e.sequence
    """,
    "postgresql": """
        SELECT found.build, found.data FROM unnest(%s::bigint[]) AS given(build), LATERAL (
            SELECT e.build, e.sequence, e.data FROM events AS e
            WHERE e.build = given.build AND e.type IN ('build.completed', 'build.failed', 'build.timeout')
            OFFSET 0
        ) AS found ORDER BY found.build, found.sequence
    """,
}


def _own_results(connection: Connection, builds: Sequence[int]) -> dict[int, bool | None]:
    """The last stored result of each of these builds that has one.

    It comes before those of other builds: an earlier attempt, or an end of ours that the platform corrects.
    """
    if not builds:
        return {}
    sqlite = connection.dialect.name == "sqlite"
    given: Any = orjson.dumps(builds).decode() if sqlite else builds
    rows = bulk.fetch(connection, _OWN[connection.dialect.name], (given,))
    told = ((build, orjson.loads(data) if sqlite else data) for build, data in rows)
    return {build: _result(data) for build, data in told if _counts(data)}


_LINE = ("repository", "workflow", "branch")
_NEWEST = {
    "sqlite": """
        SELECT given.build, found.state, found.conclusion FROM (
            SELECT json_extract(value, '$.build') AS build, json_extract(value, '$.source') AS source,
                json_extract(value, '$.repository') AS repository,
                json_extract(value, '$.workflow') AS workflow, json_extract(value, '$.branch') AS branch
            FROM json_each(?)
        ) AS given JOIN builds AS found ON found.id = (
            SELECT b.id FROM builds AS b
            WHERE b.source = given.source AND b.repository = given.repository
                AND b.workflow = given.workflow AND b.branch = given.branch AND b.id < given.build
                AND (b.state IN ('failed', 'timeout') OR b.conclusion = 'success')
            ORDER BY b.id DESC LIMIT 1
        )
    """,
    "postgresql": """
        SELECT given.build, found.state, found.conclusion FROM json_to_recordset(%s::json)
            AS given(build bigint, source text, repository text, workflow text, branch text), LATERAL (
            SELECT b.state, b.conclusion FROM builds AS b
            WHERE b.source = given.source AND b.repository = given.repository
                AND b.workflow = given.workflow AND b.branch = given.branch AND b.id < given.build
                AND (b.state IN ('failed', 'timeout') OR b.conclusion = 'success')
            ORDER BY b.id DESC LIMIT 1
        ) AS found
    """,
}


_OF_NO_REQUEST = f" AND coalesce(b.trigger, '') <> '{REQUEST}'"


@lru_cache
def _newest_of_lines(dialect: str, missing: frozenset[str]) -> str:
    """The query for the newest earlier result of lines; `missing`: what their builds do not have.

    That is written out, since no index of PostgreSQL finds a value that may be null.
    """
    query = _NEWEST[dialect]
    for name in missing:
        query = query.replace(f"= given.{name}", "IS NULL" + _OF_NO_REQUEST * (name == "branch"))
    return query


def _results_of_lines(connection: Connection, ends: Sequence[Event]) -> dict[int, bool | None]:
    """By build, the result of the newest earlier build of its workflow and branch, where there is one."""
    by_query: dict[str, list[dict[str, Any]]] = {}
    for event in ends:
        data = event["data"]
        if data["repository"] is None and data["workflow"] is None:
            continue
        line = {name: data[name] for name in ("source", *_LINE)} | {"build": event["build"]}
        missing = frozenset(name for name in _LINE if data[name] is None)
        by_query.setdefault(_newest_of_lines(connection.dialect.name, missing), []).append(line)
    return {
        build: _result({"state": state, "conclusion": conclusion})
        for query, lines in by_query.items()
        for build, state, conclusion in bulk.fetch(connection, query, (orjson.dumps(lines).decode(),))
    }
