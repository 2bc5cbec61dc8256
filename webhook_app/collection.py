"""What an ended attempt leaves, log and list of artifacts: when it is to be read, and what came of it.

`plan` is called where an end is recorded, in the same transaction; `claim` and `settle` are the
collecting job's, as for messages: `due_at` is the only clock, a claim moves it past the longest
possible read, so a killed worker needs no clean-up; the claim's token keeps a late one from settling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, tuple_, update

from webhook_app import logs, models, workers
from webhook_app.db import Write
from webhook_app.lifecycle import State
from webhook_app.logs import Log
from webhook_app.platforms import Artifact, PollTarget

STORED, UNAVAILABLE = "stored", "unavailable"
RETRY_SECONDS = (15, 60, 300, 900, 3600)
"""What is not there yet is asked for again after so long, and given up after the last one."""
MOST_TRIES = len(RETRY_SECONDS) + 1
LIST_DELAY_SECONDS = 60.0
"""Nothing failed: the list of artifacts is in no hurry, and the last of them is there by then."""
LEASE_SECONDS = 300.0
"""Longer than the longest read."""

_BAD = (State.FAILED.value, State.TIMEOUT.value)
_c, _b, _a = models.collections.c, models.builds.c, models.artifacts.c

Row = Mapping[Any, Any]


def new(build: Row, now: datetime, due_at: datetime, *, wants_log: bool) -> dict[str, Any]:
    """The row of a build's present attempt."""
    return {
        "build": build["id"],
        "attempt": build["attempt"],
        "source": build["source"],
        "wants_log": wants_log,
        "due_at": due_at,
        "tries": 0,
        "claim": None,
        "log_state": None,
        "log_reason": None,
        "log": None,
        "log_truncated": False,
        "artifacts_state": None,
        "artifacts_reason": None,
        "noted_at": now,
        "asked": False,
    }


def ended(build: Row, now: datetime) -> dict[str, Any]:
    """What is wanted of an attempt that its platform has ended; of one that failed the log too, at once."""
    failed = build["state"] in _BAD
    wait = timedelta(seconds=0 if failed else LIST_DELAY_SECONDS)
    return new(build, now, now + wait, wants_log=failed)


_FORGET = delete(models.collections).where(
    _c.build == bindparam("the_build"), _c.attempt == bindparam("the_attempt")
)


def plan(write: Write, rows: Sequence[Mapping[str, Any]]) -> None:
    """Note attempts that have ended; what was collected before the platform's word counts no more."""
    if rows:
        keys = [{"the_build": row["build"], "the_attempt": row["attempt"]} for row in rows]
        write.connection.execute(_FORGET, keys)
        write.connection.execute(insert(models.collections), list(rows))


# ---- the job's side --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claimed:
    """An attempt to look at: what is still wanted of it, and whose claim it is.

    `is_current`: no re-run has begun since; a list of artifacts is that of the newest attempt.
    `is_replaced`: another build has its identity now, so what the platform would give is that one's.
    """

    build: int
    source: str
    target: PollTarget
    token: str
    tries: int
    wants_log: bool
    wants_artifacts: bool
    wants_error: bool
    failed: bool
    is_current: bool
    is_replaced: bool = False

    @property
    def last_try(self) -> bool:
        """Is what can't be had now given up?"""
        return self.tries >= MOST_TRIES


@dataclass(frozen=True, slots=True)
class Found:
    """What a look brought of one thing: it (`value`), or why it will never be there, or neither (yet)."""

    value: Any = None
    never: str | None = None
    not_yet: str | None = None


@dataclass(frozen=True, slots=True)
class Brought:
    """What a look brought; None: it was not wanted.

    `log.value` is a `Log`, `artifacts.value` a tuple of `Artifact`.  `postponed_seconds`: the source was
    in trouble and not this build: try again so much later, without counting it.
    """

    log: Found | None = None
    artifacts: Found | None = None
    error: str | None = None
    postponed_seconds: float | None = None


_WANTED = (
    _c.build, _c.attempt, _c.source, _c.tries, _c.wants_log, _c.log_state, _c.artifacts_state,
    _b.build_id, _b.key, _b.repository, _b.number, _b.url, _b.state, _b.error, _b.attempt_base,
    (_b.attempt == _c.attempt).label("is_current"),
)  # fmt: skip
_DUE = (
    select(*_WANTED)
    .join(models.builds, _b.id == _c.build)
    .where(_c.source == bindparam("the_source"), _c.due_at <= bindparam("now"))
    .order_by(_c.due_at)
    .limit(1)
    .with_for_update(of=models.collections, skip_locked=True)
)
_ASKED, _FAILED, _OTHERS = _DUE.where(_c.asked), _DUE.where(_c.wants_log), _DUE.where(~_c.wants_log)


def claim(connection: Connection, source: str, now: datetime, *, asked_only: bool = False) -> Claimed | None:
    """Take the attempt of this source that is due for the longest: what a person asked for, then failed ones.

    Run in a write transaction.  If the reader dies, it is due again after `LEASE_SECONDS`.
    """
    for statement in (_ASKED,) if asked_only else (_ASKED, _FAILED, _OTHERS):
        row = connection.execute(statement, {"the_source": source, "now": now}).mappings().one_or_none()
        if row is not None:
            return _take(connection, row, now)
    return None


def _take(connection: Connection, row: Row, now: datetime) -> Claimed:
    token = workers.token()
    connection.execute(
        update(models.collections)
        .where(_c.build == row["build"], _c.attempt == row["attempt"])
        .values(claim=token, due_at=now + timedelta(seconds=LEASE_SECONDS), tries=row["tries"] + 1)
    )
    failed = row["state"] in _BAD
    return Claimed(
        build=row["build"],
        source=row["source"],
        target=PollTarget(
            row["build_id"],
            row["key"],
            row["repository"],
            row["number"],
            row["attempt"],
            row["url"],
            row["attempt_base"],
        ),
        token=token,
        tries=row["tries"] + 1,
        wants_log=row["wants_log"] and row["log_state"] is None,
        wants_artifacts=row["artifacts_state"] is None,
        wants_error=failed and row["is_current"] and row["error"] is None,
        failed=failed and row["is_current"],
        is_current=bool(row["is_current"]),
        is_replaced=row["attempt"] <= row["attempt_base"],
    )


def next_due(connection: Connection, sources: Sequence[str], *, asked: bool = False) -> datetime | None:
    """When the next attempt of these sources is due; `asked`: the next that a person asked for."""
    statement = (
        select(_c.due_at).where(_c.due_at.is_not(None), _c.source.in_(sources)).order_by(_c.due_at).limit(1)
    )
    if asked:
        statement = statement.where(_c.asked)
    due: datetime | None = connection.execute(statement).scalar()
    return due


def settle(write: Write, claimed: Claimed, brought: Brought, now: datetime) -> bool:
    """Store what a look brought, and when to look again; False if the claim is no longer ours.

    Needs the writer's lock.
    """
    mine = (_c.build == claimed.build, _c.attempt == claimed.target.attempt, _c.claim == claimed.token)
    row = write.connection.execute(select(models.collections).where(*mine)).mappings().one_or_none()
    if row is None:
        return False
    values = _log_values(brought.log, claimed) | _artifact_values(brought.artifacts, claimed)
    after = {**row, **values}
    no_log = after["wants_log"] and after["log_state"] is None
    values |= {"claim": None, "due_at": None}
    if no_log and not claimed.wants_log:  # asked for while we were reading
        values |= {"due_at": now, "tries": 0}
    elif no_log or after["artifacts_state"] is None:
        values |= _again(claimed, brought, now)
    write.connection.execute(update(models.collections).where(*mine).values(values))
    if brought.artifacts is not None and brought.artifacts.value is not None:
        _list(write.connection, claimed.build, brought.artifacts.value, now)
    return True


def _log_values(found: Found | None, claimed: Claimed) -> dict[str, Any]:
    if found is None:
        return {}
    if isinstance(found.value, Log):
        packed = logs.pack(found.value)
        return {
            "log_state": STORED,
            "log_reason": None,
            "log": packed,
            "log_truncated": found.value.truncated,
        }
    return _absent("log", found, claimed)


def _artifact_values(found: Found | None, claimed: Claimed) -> dict[str, Any]:
    if found is None:
        return {}
    if found.value is not None:
        return {"artifacts_state": STORED, "artifacts_reason": None}
    return _absent("artifacts", found, claimed)


def _absent(what: str, found: Found, claimed: Claimed) -> dict[str, Any]:
    """It will never be there, or it was asked for often enough, or the reason why it is not there yet."""
    given_up = found.never is not None or claimed.last_try
    state = {f"{what}_state": UNAVAILABLE} if given_up else {}
    return state | {f"{what}_reason": found.never or found.not_yet}


def _again(claimed: Claimed, brought: Brought, now: datetime) -> dict[str, Any]:
    if brought.postponed_seconds is not None:  # does not count
        return {"due_at": now + timedelta(seconds=brought.postponed_seconds), "tries": claimed.tries - 1}
    return {"due_at": now + timedelta(seconds=RETRY_SECONDS[min(claimed.tries, len(RETRY_SECONDS)) - 1])}


def _list(connection: Connection, build: int, found: Sequence[Artifact], now: datetime) -> None:
    """The list as it is now; what we computed of a file that is still there stays."""
    ours = select(_a.ref, _a.digest).where(_a.build == build, _a.digest_by == "relay")
    known = {row.ref: row.digest for row in connection.execute(ours)}
    connection.execute(delete(models.artifacts).where(_a.build == build))
    rows = [
        {
            "build": build,
            "name": one.name,
            "ref": one.ref,
            "size_bytes": one.size_bytes,
            "digest": one.digest or known.get(one.ref),
            "digest_by": "platform" if one.digest else "relay" if one.ref in known else None,
            "created_at": one.created_at,
            "expires_at": one.expires_at,
            "expired": one.expired,
            "listed_at": now,
        }
        for one in found
    ]
    if rows:
        connection.execute(insert(models.artifacts), rows)


# ---- the API's side --------------------------------------------------------------------------


def of_attempt(connection: Connection, build: int, attempt: int) -> Row | None:
    """What is known of an attempt's log and artifacts; None: it has not ended, or long ago."""
    statement = select(models.collections).where(_c.build == build, _c.attempt == attempt)
    return connection.execute(statement).mappings().one_or_none()


def want(write: Write, build: Row, now: datetime, *, log: bool) -> None:
    """Somebody asks for what a build's present attempt left: it is due now, unless it is being read.

    Needs the writer's lock.
    """
    if of_attempt(write.connection, build["id"], build["attempt"]) is None:
        asked = new(build, now, now, wants_log=log) | {"asked": True}
        write.connection.execute(insert(models.collections), asked)
        return
    note_asked(write, build)
    wanted = update(models.collections).where(_c.build == build["id"], _c.attempt == build["attempt"])
    if log:
        write.connection.execute(wanted.values(wants_log=True))
    write.connection.execute(wanted.where(_c.claim.is_(None)).values(due_at=now, tries=0))


def note_asked(write: Write, build: Row) -> None:
    """A person waits for it: when it is due it is read first, and from the reserve."""
    here = (_c.build == build["id"], _c.attempt == build["attempt"])
    write.connection.execute(update(models.collections).where(*here).values(asked=True))


def forget(write: Write, before: datetime, most: int) -> int:
    """Delete up to `most` logs, and what else is known of them, of attempts that ended before that time.

    How many were deleted.
    """
    old = select(_c.build, _c.attempt).where(_c.noted_at < before).order_by(_c.noted_at).limit(most)
    old_ones = delete(models.collections).where(tuple_(_c.build, _c.attempt).in_(old))
    return write.connection.execute(old_ones).rowcount
