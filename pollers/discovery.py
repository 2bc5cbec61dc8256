"""Where builds are looked for that were never pushed, and which listed builds are news."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, update

from webhook_app import health, models
from webhook_app.db import Write
from webhook_app.lifecycle import WHOLE_SECONDS, Observation, Recorded, State, Use, compare_use
from webhook_app.settings import SourceSettings

LOOK_BACK = timedelta(hours=24)
"""Builds that began before are history, not news."""

REMEMBERED = timedelta(days=7)
"""A repository that nobody configured is listed for so long after its last new build."""

GRACE_SECONDS = 30.0
"""A push may be on its way for so long: until then a new build is no news to a source that is pushed well."""

_b = models.builds.c
_p = models.places.c


# ---- places --------------------------------------------------------------------------------------


def note_places(write: Write, sources: Mapping[str, SourceSettings], now: datetime) -> None:
    """Make a place of each repository that is configured or had a build lately, and list no others."""
    wanted = _configured(sources) | _lively(write.connection, sources, now)
    rows = write.connection.execute(select(_p.source, _p.repository, _p.same_as, _p.next_list_at)).all()
    known = {(row.source, row.repository): row.next_list_at for row in rows}
    wanted |= {
        (row.source, row.same_as) for row in rows if row.same_as and (row.source, row.repository) in wanted
    }
    fresh = sorted(wanted - set(known))
    if fresh:
        blank = {"next_list_at": now, "errors": 0}
        write.connection.execute(
            insert(models.places), [{"source": s, "repository": r} | blank for s, r in fresh]
        )
    _set_next(write, [place for place in wanted & set(known) if known[place] is None], now)
    _set_next(write, [place for place in set(known) - wanted if known[place] is not None], None)


def _configured(sources: Mapping[str, SourceSettings]) -> set[tuple[str, str]]:
    return {(name, repository) for name, of in sources.items() for repository in of.repositories}


def _lively(
    connection: Connection, sources: Mapping[str, SourceSettings], now: datetime
) -> set[tuple[str, str]]:
    found = connection.execute(
        select(_b.source, _b.repository)
        .where(_b.created_at > now - REMEMBERED, _b.repository.is_not(None), _b.source.in_(list(sources)))
        .distinct()
    )
    return {(row.source, row.repository) for row in found}


_SET_NEXT = (
    update(models.places)
    .where(_p.source == bindparam("of"), _p.repository == bindparam("name"))
    .values(next_list_at=bindparam("at"))
)


def _set_next(write: Write, places: Iterable[tuple[str, str]], at: datetime | None) -> None:
    rows = [{"of": source, "name": repository, "at": at} for source, repository in places]
    if rows:
        write.connection.execute(_SET_NEXT, rows)


_LISTED = (
    update(models.places)
    .where(_p.source == bindparam("of"), _p.repository == bindparam("name"))
    .values(
        listed_at=bindparam("at"),
        next_list_at=bindparam("next"),
        list_clock=bindparam("clock"),
        wide=bindparam("long"),
        errors=0,
        error=None,
    )
)
_FAILED = (
    update(models.places)
    .where(_p.source == bindparam("of"), _p.repository == bindparam("name"))
    .values(next_list_at=bindparam("next"), errors=_p.errors + 1, error=bindparam("why"))
)
_ALIAS = (
    update(models.places)
    .where(_p.source == bindparam("of"), _p.repository == bindparam("name"))
    .values(same_as=bindparam("same"))
)


def listed(
    write: Write,
    source: str,
    clocks: Mapping[str, datetime | None],
    wide: bool,
    now: datetime,
    next_at: datetime,
) -> None:
    """Note that these repositories were listed."""
    rows = [
        {"of": source, "name": name, "at": now, "next": next_at, "clock": clock, "long": wide}
        for name, clock in clocks.items()
    ]
    if rows:
        write.connection.execute(_LISTED, rows)


def postpone(write: Write, source: str, repositories: Iterable[str], at: datetime) -> None:
    """List these repositories later: their platform does not answer."""
    _set_next(write, [(source, repository) for repository in repositories], at)


def failed(write: Write, source: str, repositories: Collection[str], why: str, next_at: datetime) -> None:
    """Note that these repositories could not be listed."""
    for name in repositories:
        row = {"of": source, "name": name, "next": next_at, "why": why}
        if not write.connection.execute(_FAILED, row).rowcount:
            blank = {"source": source, "repository": name, "next_list_at": next_at, "errors": 1, "error": why}
            write.connection.execute(insert(models.places), blank)


def note_alias(write: Write, source: str, name: str, told: str, now: datetime) -> None:
    """`name` (an id, another case) is the repository that its platform calls `told`: only that is listed."""
    if not write.connection.execute(_ALIAS, {"of": source, "name": name, "same": told}).rowcount:
        return
    itself = {"of": source, "name": told, "same": None}  # it may have been renamed there and back
    if not write.connection.execute(_ALIAS, itself).rowcount:
        blank = {"source": source, "repository": told, "next_list_at": now, "errors": 0}
        write.connection.execute(insert(models.places), blank)


TOLD_AGAIN = timedelta(days=1)


def tell_hidden(write: Write, source: str, name: str, why: str, now: datetime) -> None:
    """Tell admins, once a day, of a repository whose builds we know and that its platform hides from us."""
    subject, n = f"{source}: {name}", models.notices.c
    told = select(n.id).where(
        n.kind == "source.not_found", n.subject == subject, n.created_at > now - TOLD_AGAIN
    )
    if write.connection.execute(told.limit(1)).one_or_none() is None:
        text = f"{source} does not show {name} to our token any more ({why}): its builds can't be polled"
        health.tell(write.connection, "source.not_found", subject, text, now)


# ---- what is news --------------------------------------------------------------------------------

_KNOWN = select(
    _b.key,
    _b.attempt,
    _b.attempt_base,
    _b.queue_id,
    _b.platform_created_at,
    _b.ended_at,
    _b.ended_synthetic,
    _b.state,
    _b.told_state,
    _b.platform_at,
    _b.conclusion,
    _b.next_poll_at,
    _b.last_push_at,
    _b.polling,
).where(_b.key.in_(bindparam("keys", expanding=True)))


def known(connection: Connection, found: Sequence[Observation]) -> dict[str, Mapping[Any, Any]]:
    """What is recorded of these builds, by key."""
    keys = list({seen.key for seen in found})
    rows = connection.execute(_KNOWN, {"keys": keys}).mappings() if keys else ()
    return {row["key"]: row for row in rows}


def is_new_use(row: Mapping[Any, Any], seen: Observation) -> bool:
    """Whether it is another build than the recorded one, which had the same identity before."""
    recorded = Recorded(
        attempt=row["attempt"],
        state=State(row["state"]),
        told_state=State(row["told_state"]),
        platform_at=row["platform_at"],
        attempt_base=row["attempt_base"],
        ended_at=None if row["ended_synthetic"] else row["ended_at"],
        queue_id=row["queue_id"],
        created_at=row["platform_created_at"],
    )
    return compare_use(recorded, seen) is Use.NEWER


def is_untold_rerun(seen: Observation, attempt: int, told: State) -> bool:
    """Whether this is a re-run of an ended build that nobody reported.  `attempt`: as the platform counts.

    Without numbers (GitLab) another state than the recorded end may be one; the verdict decides.
    """
    if not told.terminal or seen.platform_at is None:
        return False
    if seen.attempt is not None:
        return seen.attempt > attempt
    return seen.state is not None and not _is_same_end(seen.state, told)


def may_have_run_again(seen: Observation, told: State, ended_at: datetime | None) -> bool:
    """Did a build without attempt numbers change after its end, to show the same end again?

    `ended_at`: the platform's time of that end, as far as it is known.  The build itself tells when it ended.
    """
    if seen.attempt is not None or seen.platform_at is None or ended_at is None:
        return False
    return _is_same_end(seen.state, told) and seen.platform_at > ended_at + WHOLE_SECONDS


def _is_same_end(seen: State | None, told: State) -> bool:
    """A list does not tell time-outs: they are failures there."""
    return seen is told or (seen is State.FAILED and told is State.TIMEOUT)


def is_recent(seen: Observation, now: datetime) -> bool:
    """Did it change lately?  What is older is history."""
    at = seen.platform_at or seen.started_at
    return at is None or at > now - LOOK_BACK


def is_ripe(seen: Observation, now: datetime, grace_seconds: float) -> bool:
    """Has a push had its time to arrive?"""
    began = seen.started_at or seen.platform_at
    return began is None or (now - began).total_seconds() >= grace_seconds
