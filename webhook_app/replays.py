"""Recovery: send again what a subscriber missed, or all of a range; redrive what is dead; bury a backlog.

All walk in portions, each its own transaction.  The first is done at once; what is left is written
down as a row of `recoveries`, with how far it has come, and `jobs/replay.py` goes on from there, so a
large one holds up neither a request nor the other writers, and a kill at any moment loses nothing.

An event that has a message already keeps it, and so its `webhook-id`; for the others messages are
made.  Lanes keep each build's order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, delete, func, insert, literal_column, select, update

from webhook_app import clock, deliveries, endpoints, formats, models, subscribers
from webhook_app.db import Write, as_writer, reading
from webhook_app.subscribers import Filters

PORTION = 100
"""Messages of one transaction: pushes wait for its end."""
COUNTING_SECONDS = 30.0
"""For counting what a replay is about: it reads all that retention holds, and locks nothing."""

_e, _m, _r = models.events.c, models.messages.c, models.recoveries.c
_DEAD: ColumnElement[str] = literal_column("'dead'")
"""Written into the statement: only so can every planner see that the partial index fits."""
_LOOKED_AT = {
    "sources": "source", "repositories": "repository", "branches": "branch", "states": "state",
    "conclusions": "conclusion",
}  # fmt: skip
"""What each filter looks at inside an event."""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Range:
    """Events recorded from `since` up to, but not including, `until`.

    `only_missing`: not those that were delivered.
    """

    since: datetime
    until: datetime
    only_missing: bool


@dataclass(frozen=True, slots=True)
class Started:
    """How many messages it is about, and whether some are left for the job."""

    count: int
    left: bool


@dataclass(frozen=True, slots=True)
class _Step:
    """One portion: how many messages, and the id after which to go on; None: that was all."""

    picked: int
    after: int | None


def count(engine: Engine, subscriber: Row, wanted: Range) -> int:
    """How many messages `replay` would send now."""
    with reading(engine, COUNTING_SECONDS) as connection:
        return _count(connection, subscribers.filters(subscriber), wanted, *_bounds(connection, wanted))


def replay(engine: Engine, subscriber: Row, wanted: Range, now: datetime) -> Started:
    """Make due what the subscriber's filters match in the range: a portion at once, the rest by the job."""
    with reading(engine, COUNTING_SECONDS) as connection:
        after, last = _bounds(connection, wanted)
    task = {
        "kind": "replay", "subscriber": subscriber["id"], "reason": None, "since": wanted.since,
        "until": wanted.until, "only_missing": wanted.only_missing, "after": after, "last": last,
        "created_at": now,
    }  # fmt: skip
    step = as_writer(engine, partial(_begin, task, now))
    if step.after is None:
        return Started(step.picked, left=False)
    with reading(engine, COUNTING_SECONDS) as connection:
        rest = _count(connection, subscribers.filters(subscriber), wanted, step.after, last)
    return Started(step.picked + rest, left=True)


def redrive(engine: Engine, subscriber_id: str | None, reason: str | None, now: datetime) -> Started:
    """Make dead messages of active subscribers due again, oldest first, in the same way.

    `subscriber_id` and `reason` None: of all.
    """
    with reading(engine, COUNTING_SECONDS) as connection:
        last = connection.execute(select(func.max(_m.id))).scalar() or 0
    task = {
        "kind": "redrive", "subscriber": subscriber_id, "reason": reason, "since": None, "until": None,
        "only_missing": False, "after": 0, "last": last, "created_at": now,
    }  # fmt: skip
    step = as_writer(engine, partial(_begin, task, now))
    if step.after is None:
        return Started(step.picked, left=False)
    with reading(engine, COUNTING_SECONDS) as connection:
        chosen = _dead(task | {"after": step.after})
        rest = connection.execute(select(func.count()).select_from(chosen.subquery())).scalar_one()
    return Started(step.picked + rest, left=True)


def _begin(task: Row, now: datetime, write: Write) -> _Step:
    step = _step(write, task, now)
    if step.picked:
        deliveries.let_probe(write.connection, task["subscriber"], now)
    if step.after is not None:
        write.connection.execute(insert(models.recoveries), {**task, "after": step.after})
    return step


def advance(engine: Engine, now: datetime) -> int | None:
    """The next portion of the oldest replay or redrive that has something left; None: none has.

    Any number may run at once: each portion is taken, and noted as done, in one transaction.
    """

    def unit(write: Write) -> int | None:
        oldest = select(models.recoveries).order_by(_r.kind != clock.MOVE, _r.id).limit(1)
        task = write.connection.execute(oldest).mappings().first()
        if task is None:
            return None
        step = _step(write, dict(task), now)
        this = _r.id == task["id"]
        if step.after is None:
            write.connection.execute(delete(models.recoveries).where(this))
        else:
            write.connection.execute(update(models.recoveries).where(this).values(after=step.after))
        return step.picked

    return as_writer(engine, unit)


def _step(write: Write, task: Row, now: datetime) -> _Step:
    """One portion after `task["after"]`, by the writer, so that no subscriber is disabled meanwhile."""
    if task["kind"] == "burial":
        return _Step(0, task["after"] if _bury(write, task["subscriber"], now) else None)
    if task["kind"] == clock.MOVE:
        return _Step(*clock.move_messages(write.connection, task))
    if task["kind"] == "redrive":
        ids = write.connection.execute(_dead(task).order_by(_m.id).limit(PORTION)).scalars().all()
        picked = _make_due(write.connection, ids, now)
        return _Step(picked, ids[-1] if len(ids) == PORTION else None)
    subscriber = subscribers.get(write.connection, task["subscriber"])
    if subscriber is None or subscriber["state"] != "active":
        return _Step(0, None)  # disabled meanwhile: what it misses is for the next replay
    return _replay_portion(write, subscribers.filters(subscriber), task, now)


def _bury(write: Write, subscriber_id: str, now: datetime) -> bool:
    """A portion of what a disabled subscriber left; is there more?  Enabled again, it gets the rest."""
    subscriber = subscribers.get(write.connection, subscriber_id)
    if subscriber is None or subscriber["state"] == "active":
        return False
    return endpoints.bury(write.connection, subscriber_id, now)


def _replay_portion(write: Write, wants: Filters, task: Row, now: datetime) -> _Step:
    wanted = Range(task["since"], task["until"], task["only_missing"])
    rows = _rows(write.connection, wants.id, task["after"], task["last"])
    picked = [
        row for row in rows
        if wanted.since <= row["timestamp"] < wanted.until and _is_wanted(row, row["data"], wants, wanted)
    ]  # fmt: skip
    again = [row["message"] for row in picked if row["message"] is not None]
    if again:
        _make_due(write.connection, again, now)
    deliveries.plan_for(write, [row for row in picked if row["message"] is None], wants.id, now)
    return _Step(len(picked), rows[-1]["id"] if len(rows) == PORTION else None)


def _bounds(connection: Connection, wanted: Range) -> tuple[int, int]:
    """The events of a range lie after the first of these ids, and not after the second."""
    in_range = (_e.timestamp >= wanted.since, _e.timestamp < wanted.until)
    row = connection.execute(select(func.min(_e.id), func.max(_e.id)).where(*in_range)).one()
    return (row[0] - 1, row[1]) if row[0] is not None else (0, 0)


def _rows(connection: Connection, subscriber_id: str, after: int, last: int) -> list[Row]:
    """The next events, each with the subscriber's message if there is one.

    Two walks along an index, which no planner can take for something else: by id alone, since with the
    time in the statement SQLite would sort the whole range each time; and without a join, for which
    PostgreSQL may read all messages.
    """
    columns = (_e.id, _e.build, _e.sequence, _e.type, _e.data, _e.change, _e.timestamp)
    portion = select(*columns).where(_e.id > after, _e.id <= last).order_by(_e.id).limit(PORTION)
    found = connection.execute(portion).mappings().all()
    if not found:
        return []
    made = connection.execute(
        select(_m.event, _m.id, _m.state).where(
            _m.subscriber == subscriber_id, _m.event > after, _m.event <= found[-1]["id"]
        )
    )
    own = {row.event: (row.id, row.state) for row in made}
    nothing = (None, None)
    return [
        dict(row) | dict(zip(("message", "message_state"), own.get(row["id"], nothing), strict=True))
        for row in found
    ]


_own = models.messages.alias()


def _count(connection: Connection, wants: Filters, wanted: Range, after: int, last: int) -> int:
    """How many events between these ids are wanted: the store groups them by what the filters look at."""
    looked_at = [field for filter_, field in _LOOKED_AT.items() if getattr(wants, filter_)]
    looked_at += ["platform"] if wants.format == formats.PROVIDER else []
    facts = (
        select(
            _e.type, _e.change, _own.c.state.label("message_state"),
            *(_e.data[field].as_string().label(f"in_{field}") for field in looked_at),
            _e.data["is_fork"].as_boolean().label("is_fork"),
        )
        .outerjoin(_own, (_own.c.event == _e.id) & (_own.c.subscriber == wants.id))
        .where(_e.id > after, _e.id <= last, _e.timestamp >= wanted.since, _e.timestamp < wanted.until)
        .subquery()
    )  # fmt: skip
    groups = connection.execute(select(facts, func.count().label("number")).group_by(*facts.c)).mappings()
    return sum(
        group["number"]
        for group in map(dict, groups)
        if _is_wanted(group, _facts(group, looked_at), wants, wanted)
    )


def _facts(group: Row, looked_at: Sequence[str]) -> Row:
    return {"is_fork": group["is_fork"]} | {field: group[f"in_{field}"] for field in looked_at}


def _is_wanted(row: Row, data: Row, wants: Filters, wanted: Range) -> bool:
    if row["message_state"] == "pending":
        return False  # it is on its way
    if wanted.only_missing and row["message_state"] == "delivered":
        return False
    addressed = row["type"] == "subscriber.test"
    return not addressed and wants.match(row["type"], data, row["change"])


def _dead(task: Row) -> Any:
    """The ids of the dead messages that a redrive still has before it."""
    active = select(models.subscribers.c.id).where(models.subscribers.c.state == "active")
    conditions: list[ColumnElement[bool]] = [
        _m.id > task["after"], _m.id <= task["last"], _m.state == _DEAD, _m.subscriber.in_(active),
    ]  # fmt: skip
    if task["subscriber"] is not None:
        conditions.append(_m.subscriber == task["subscriber"])
    if task["reason"] is not None:
        conditions.append(_m.reason == task["reason"])
    return select(_m.id).where(*conditions)


def _make_due(connection: Connection, ids: Sequence[int], now: datetime) -> int:
    """Pending again, under the same id, with the whole schedule before it.

    Locked first, in the order in which `deliveries.settle` locks them: a late try may be on its way.
    """
    which = _m.id.in_(ids)
    connection.execute(select(_m.id).where(which).order_by(_m.id).with_for_update())
    result = connection.execute(
        update(models.messages)
        .where(which, _m.state != "pending")
        .values(state="pending", due_at=now, claim=None, reason=None, settled_at=None, attempts=0)
    )
    return result.rowcount


def dead_letters(connection: Connection) -> Mapping[str, int]:
    """How many messages are dead, by reason."""
    rows = connection.execute(select(_m.reason, func.count()).where(_m.state == _DEAD).group_by(_m.reason))
    return {str(row[0]): int(row[1]) for row in rows}
