"""Builds, their attempts, and their polling."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, update

from webhook_app import builds, db, models, polling, queries, queues
from webhook_app.lifecycle import State
from webhook_app.queries import BuildFilter, Row
from webhook_app.settings import Settings
from webhook_app.times import utc_now
from webhook_app.web import schemas
from webhook_app.web.api.spec import Blueprint, abort, operation, page
from webhook_app.web.state import state

blueprint = Blueprint("builds", __name__, description="Builds, their attempts and their polling")


def github_sources(settings: Settings) -> list[str]:
    """Names of the sources whose run ids are unique by themselves."""
    return [name for name, source in settings.sources.items() if source.source.platform == "github"]


def need_build(connection: Connection, build_id: str) -> Row:
    """The build, or 404."""
    row = queries.find_build(connection, build_id, github_sources(state().settings))
    if row is None:
        abort(404, "there is no such build")
    return row


def _shown(row: Row) -> dict[str, Any]:
    """A build, or an attempt, with its duration."""
    return {
        **row,
        "duration_seconds": builds.duration_seconds(row["started_at"], row["ended_at"]),
        "error": shown_error(row),
    }


def shown_error(row: Row) -> str | None:
    """The error of a build or an attempt; while polling has given up on one that goes on, that it has."""
    error: str | None = row["error"]
    if error is not None or "polling" not in row or State(row["state"]).terminal:
        return error
    return polling.stopped_because(row)


def with_source(asked: dict[str, Any]) -> dict[str, Any]:
    """A question with its `source` as the settings spell it; one that is no longer set stays as it is."""
    given = asked.get("source")
    if given is None:
        return asked
    same = (name for name in state().settings.sources if name.casefold() == given.casefold())
    return asked | {"source": next(same, given)}


def _spellings(connection: Connection, wanted: BuildFilter) -> list[queries.Spelling]:
    if wanted.repository is None:
        return []
    within = [wanted.source] if wanted.source is not None else list(state().settings.sources)
    return queries.spellings(connection, wanted.repository, within)


@operation(blueprint, "GET", "/builds", schemas.BuildPage, query=schemas.BuildsQuery)
def list_builds(asked: dict[str, Any]) -> Any:
    """List builds, newest first.  The case of a source and a repository does not matter."""
    limit, before = asked.pop("limit"), asked.pop("cursor", queries.LARGEST_ID)
    wanted = BuildFilter(**with_source(asked))
    with db.reading(state().engine) as connection:
        statement = queries.builds(wanted, _spellings(connection, wanted), before, limit + 1)
        rows = connection.execute(statement).mappings().all()
    return page([_shown(row) for row in rows], limit, lambda row: row["id"])


@operation(blueprint, "GET", "/builds/<string:build_id>", schemas.Build, errors=[404])
def get_build(build_id: str) -> Any:
    """Get one build.

    The case of the id does not matter, and a run of GitHub is found under the new name of its
    repository as well.
    """
    with db.reading(state().engine) as connection:
        return _shown(need_build(connection, build_id))


@operation(
    blueprint, "GET", "/builds/<string:build_id>/attempts", schemas.AttemptPage,
    query=schemas.PageQuery, errors=[404],
)  # fmt: skip
def list_attempts(asked: dict[str, Any], build_id: str) -> Any:
    """List the attempts of a build, the first one first, the current one last."""
    limit = asked["limit"]
    with db.reading(state().engine) as connection:
        build = need_build(connection, build_id)
        rows = queries.attempts(connection, build, asked.get("cursor", 0), limit + 1)
    return page([_shown(row) for row in rows], limit, lambda row: row["attempt"])


# ---- polling ---------------------------------------------------------------------------------


def _can_be_polled(row: Mapping[Any, Any]) -> bool:
    source = state().settings.sources.get(row["source"])
    return row["platform"] != "script" and source is not None and source.can_poll


def _polling(row: Mapping[Any, Any]) -> dict[str, Any]:
    """The polling of a build in the words of its original document."""
    pollable = _can_be_polled(row)
    return {
        "buildId": row["build_id"],
        "isPolling": pollable and polling.is_polling(row),
        "reason": polling.reason(row, utc_now(), state().pace) if pollable else "not_pollable",
        "pollCount": row["poll_count"],
        "lastPollTime": row["last_poll_at"],
        "nextPollTime": row["next_poll_at"] if pollable else None,
        "consecutiveErrors": row["consecutive_errors"],
        "error": row["poll_error"],
    }


@operation(blueprint, "GET", "/polling", schemas.PollingPage, query=schemas.PageQuery)
def list_polling(asked: dict[str, Any]) -> Any:
    """List the builds that are being polled, newest first."""
    limit = asked["limit"]
    statement = queries.polled(asked.get("cursor", queries.LARGEST_ID), limit + 1)
    with db.reading(state().engine) as connection:
        rows = connection.execute(statement).mappings().all()
    listed = page(rows, limit, lambda row: row["id"])
    return listed | {"items": [_polling(row) for row in listed["items"]]}


@operation(blueprint, "GET", "/builds/<string:build_id>/polling", schemas.Polling, errors=[404])
def get_polling(build_id: str) -> Any:
    """Tell whether a build is being polled, and why."""
    with db.reading(state().engine) as connection:
        return _polling(need_build(connection, build_id))


@operation(
    blueprint, "POST", "/builds/<string:build_id>/polling", schemas.Polling,
    scope="write", status=202, errors=[404, 409, 422],
)  # fmt: skip
def start_polling(build_id: str) -> Any:
    """Poll a build now and until it ends.

    A build that BuildRelay itself has ended (given up, not found) is read once more, and polled again if
    its platform shows it alive.  An id that is not known yet makes a build that waits for its first poll;
    if its platform does not know it either, it fails at once.
    """
    row = db.as_writer(state().engine, lambda write: _start(write, build_id))
    state().bell.ring(queues.POLL)
    return _polling(row)


def _start(write: db.Write, build_id: str) -> Mapping[Any, Any]:
    row = queries.find_build(write.connection, build_id, github_sources(state().settings))
    if row is None:
        return _start_unknown(write, build_id)
    if not _can_be_polled(row):
        abort(422, f"builds of {row['source']} can't be polled")
    if State(row["state"]).terminal and not polling.was_given_up(row):
        abort(409, f"the build has ended ({row['state']}), there is nothing to poll for")
    if polling.is_polling(row):
        abort(409, "the build is being polled already")
    return _change(write, row, polling.request(utc_now()))


def _start_unknown(write: db.Write, build_id: str) -> Mapping[Any, Any]:
    prefix = build_id.partition(":")[0].casefold()
    sources = state().settings.sources.values()
    found = next((entry for entry in sources if entry.source.name.casefold() == prefix), None)
    if found is None:
        abort(404, "there is no such build, and no source of this name")
    if not found.can_poll or found.source.platform == "script":
        abort(422, f"builds of {found.source.name} can't be polled")
    try:
        return builds.named(write, build_id, found.source, utc_now())
    except ValueError as error:
        abort(422, str(error))


def _change(write: db.Write, row: Mapping[Any, Any], values: dict[str, Any]) -> Mapping[Any, Any]:
    write.connection.execute(update(models.builds).where(models.builds.c.id == row["id"]).values(values))
    return {**row, **values}


@operation(
    blueprint, "DELETE", "/builds/<string:build_id>/polling", schemas.Polling,
    scope="write", errors=[404],
)  # fmt: skip
def stop_polling(build_id: str) -> Any:
    """Stop polling a build until its next attempt.

    Pushes go on counting.  A build that has ended, or that can't be polled, stays as it is.
    """
    return _polling(db.as_writer(state().engine, lambda write: _stop(write, build_id)))


def _stop(write: db.Write, build_id: str) -> Mapping[Any, Any]:
    row = need_build(write.connection, build_id)
    if State(row["state"]).terminal or row["platform"] == "script":
        return row
    return _change(write, row, polling.stop())
