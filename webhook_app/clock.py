"""What becomes of stored times when the clock is set: by NTP, by hand, or because a machine slept.

Times are stored as the wall clock told them.  Set back by two hours, it would postpone by two hours what
is due in seconds: retries, polls, heartbeats, pauses, leases.  `relay.alive_at` was written a few seconds
ago, so it tells how far the stored times lie ahead of the clock; they are then moved back by that, once.
Set forward, or after a time in which nobody was there to hear, it would end what only waited to be heard:
scripts get their whole heartbeat timeout again, and polling as much time as was skipped.

Clocks of several machines differ.  So nothing less than `STEP` counts, and a process acts only if its own
wall clock has moved against its monotonic one since its last look, or at its first look.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Interval,
    Table,
    case,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    update,
)

from webhook_app import db, health, models
from webhook_app.models import Moment
from webhook_app.times import iso

STEP = timedelta(seconds=60)

_b, _m, _relay = models.builds.c, models.messages.c, models.relay.c
_PENDING: ColumnElement[bool] = _m.state == literal_column("'pending'")

DECIDING: Mapping[Table, tuple[str, ...]] = {
    models.messages: ("due_at",),
    models.subscribers: ("failing_since", "paced_until", "slow_until", "probe_at"),
    models.builds: (
        "next_poll_at", "poll_deadline_at", "last_push_at", "last_poll_at", "watched_at", "missing_since",
    ),
    models.places: ("next_list_at", "listed_at", "failing_since", "notified_at"),
    models.sources: (
        "paused_until", "since", "last_push_at", "last_poll_at", "last_missed_at", "deaf_since",
        "push_notice_at", "api_failing_since", "api_error_at", "api_worked_at", "api_notified_at",
        "resume_from", "resume_before",
    ),
    models.budgets: ("reset_at", "reckoned_at", "owned_until", "wanted_until"),
    models.hooks: ("looked_at", "next_look_at"),
    models.collections: ("due_at",),
    models.credentials: ("refreshed_at", "refused_at", "retry_at", "leased_until"),
    models.repositories: ("missed_at", "seen_at"),
    models.missed_changes: ("missed_at",),
    models.relay: ("alive_at", "down_from", "down_until"),
}  # fmt: skip
"""The times that decide what happens next.  All others tell what has happened, or are the platform's."""

_ONLY: Mapping[Table, ColumnElement[bool]] = {
    models.builds: _b.next_poll_at.is_not(None),
    models.collections: models.collections.c.due_at.is_not(None),
}
"""Rows for which anything is still to happen: an index finds them."""

MOVE = "move"
"""The kind of `recoveries` that moves messages back, from the time `since` to `until`."""
MESSAGES_AT_ONCE = 500


@dataclass(slots=True)
class Steps:
    """How far the wall clock of this process has moved against its monotonic one; both tell seconds."""

    wall: Callable[[], float] = time.time
    ticks: Callable[[], float] = time.monotonic
    is_first: bool = True
    _noted: float = 0.0

    def __post_init__(self) -> None:
        self._noted = self.wall() - self.ticks()

    def step(self) -> timedelta:
        """By how much the clock was set forward since `note`, or since the start; less than 0: back."""
        return timedelta(seconds=self.wall() - self.ticks() - self._noted)

    def note(self) -> None:
        """What was seen up to now is dealt with."""
        self._noted, self.is_first = self.wall() - self.ticks(), False


def mind(engine: Engine, steps: Steps, now: datetime, heartbeat_timeout_seconds: float) -> None:
    """`correct`, where this process has seen its clock set; for jobs that may come before the next sweep."""
    if steps.is_first or abs(steps.step()) < STEP:
        return
    db.as_writer(engine, lambda write: correct(write.connection, steps, now, heartbeat_timeout_seconds))
    steps.note()


def correct(
    connection: Connection, steps: Steps, now: datetime, heartbeat_timeout_seconds: float
) -> timedelta | None:
    """Move stored times if the clock was set; by how much, None if not.

    Needs the writer's lock.  Does it once, whoever comes first and however many come, since it leaves
    `relay.alive_at` at `now` (after an absence `health.alive` does that).  The caller then calls `note`.
    """
    alive_at: datetime | None = connection.execute(select(_relay.alive_at)).scalar()
    if alive_at is None:
        return None
    skipped, step = now - alive_at, steps.step()
    if skipped <= -STEP and (step <= -STEP or steps.is_first):
        _bring_back(connection, alive_at, now)
    elif skipped >= STEP and (step >= STEP or steps.is_first):
        _give_time(connection, skipped, now, heartbeat_timeout_seconds)
        if not steps.is_first:
            _note_skipped(connection, skipped, now)
    else:
        return None
    return skipped


def _bring_back(connection: Connection, alive_at: datetime, now: datetime) -> None:
    """Times after `alive_at` lie as far after `now`; what was past then is past now."""
    for table, names in DECIDING.items():
        if table is models.messages:
            continue  # there may be very many: `move_messages`
        columns = [table.c[name] for name in names]
        rows = or_(*(column > now for column in columns))
        if table in _ONLY:
            rows = _ONLY[table] & rows
        values = {column.name: _brought_back(connection, column, alive_at, now) for column in columns}
        connection.execute(update(table).where(rows).values(values))
    connection.execute(update(models.relay).values(alive_at=now))
    _plan_moves(connection, alive_at, now)
    message = (
        f"The clock was set back by about {(alive_at - now).total_seconds():.0f} s, from {iso(alive_at)} to "
        f"{iso(now)}. Retries, polls, pauses and leases were moved back with it."
    )
    health.tell(connection, "relay.clock_set", "relay", message, now)


def _plan_moves(connection: Connection, alive_at: datetime, now: datetime) -> None:
    """Have the messages moved by `replays.advance`, a portion in each transaction."""
    bounds = select(func.min(_m.id), func.max(_m.id)).where(_PENDING)
    first, last = connection.execute(bounds).one()
    if first is not None:
        moves = {"kind": MOVE, "since": alive_at, "until": now, "after": first - 1, "last": last}
        connection.execute(insert(models.recoveries), moves | {"only_missing": False, "created_at": now})


def move_messages(connection: Connection, moves: Mapping[str, Any]) -> tuple[int, int | None]:
    """Move the next messages of a row of `recoveries`: how many, and the id to go on after (None: done).

    What was put back since the clock was set may be moved as well, and then comes early.
    """
    upto = moves["after"] + MESSAGES_AT_ONCE
    rows = (_PENDING, _m.id > moves["after"], _m.id <= min(upto, moves["last"]), _m.due_at > moves["until"])
    due_at = _brought_back(connection, _m.due_at, moves["since"], moves["until"])
    moved = connection.execute(update(models.messages).where(*rows).values(due_at=due_at)).rowcount
    return moved, upto if upto < moves["last"] else None


def _brought_back(connection: Connection, column: Any, alive_at: datetime, now: datetime) -> Any:
    moved = _plus(connection, column, now - alive_at)
    return case((column > alive_at, moved), (column > now, literal(now, Moment())), else_=column)


def _plus(connection: Connection, column: Any, shift: timedelta) -> Any:
    if connection.dialect.name == "postgresql":
        return column + literal(shift, Interval())
    seconds = f"{shift.total_seconds():+f} seconds"
    return func.strftime("%Y-%m-%d %H:%M:%f000", column, seconds, type_=Moment())


def _give_time(
    connection: Connection, skipped: timedelta, now: datetime, heartbeat_timeout_seconds: float
) -> None:
    """Nobody could be heard meanwhile: silence and polling of that time do not count."""
    due = now + timedelta(seconds=heartbeat_timeout_seconds)
    silent = (_b.platform == "script", _b.next_poll_at <= now)
    connection.execute(update(models.builds).where(*silent).values(next_poll_at=due))
    polled = (_b.next_poll_at.is_not(None), _b.poll_deadline_at.is_not(None))
    later = _plus(connection, _b.poll_deadline_at, skipped)
    connection.execute(update(models.builds).where(*polled).values(poll_deadline_at=later))


def _note_skipped(connection: Connection, skipped: timedelta, now: datetime) -> None:
    connection.execute(update(models.relay).values(alive_at=now))
    message = (
        f"The clock was set forward by about {skipped.total_seconds():.0f} s, or this machine slept for so "
        "long. Heartbeats of scripts and the time of polling count from now on."
    )
    health.tell(connection, "relay.clock_set", "relay", message, now)
