"""Recovery: send again what a subscriber missed, or all of a range; redrive what is dead.

A replay walks the events of a range in portions, each its own transaction.  An event that has a
message already keeps it, and so its `webhook-id`; for the others messages are made.  Lanes keep
each build's order.  Killed half way, a replay has done a part; running it again does the rest.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, func, literal_column, select, update

from webhook_app import deliveries, models, subscribers
from webhook_app.db import Write, as_writer, reading
from webhook_app.subscribers import Filters

PORTION = 500
_e, _m = models.events.c, models.messages.c
_DEAD: ColumnElement[str] = literal_column("'dead'")
"""Written into the statement: only so can every planner see that the partial index fits."""


@dataclass(frozen=True, slots=True)
class Range:
    """Events recorded from `since` up to, but not including, `until`.

    `only_missing`: not those that were delivered.
    """

    since: datetime
    until: datetime
    only_missing: bool


def count(engine: Engine, subscriber: Mapping[str, Any], wanted: Range) -> int:
    """How many messages `replay` would send now."""
    wants = subscribers.filters(subscriber)
    total = 0
    with reading(engine) as connection:
        for portion in _portions(connection, wants, wanted):
            total += len(portion)
    return total


def replay(engine: Engine, subscriber: Mapping[str, Any], wanted: Range, now: datetime) -> int:
    """Make due what the subscriber's filters match in the range; how many messages."""
    wants = subscribers.filters(subscriber)
    total = 0
    after: int | None = 0
    while after is not None:
        picked, after = as_writer(engine, partial(_replay_portion, wants, wanted, after, now))
        total += picked
    return total


def _replay_portion(
    wants: Filters, wanted: Range, after: int, now: datetime, write: Write
) -> tuple[int, int | None]:
    """One portion after that event id: how many messages, and where to go on (None: that was all)."""
    rows = _rows(write.connection, wants, wanted, after)
    picked = [row for row in rows if _is_wanted(row, wants, wanted)]
    again = [row["message"] for row in picked if row["message"] is not None]
    if again:
        _make_due(write.connection, _m.id.in_(again), now)
    new = [row for row in picked if row["message"] is None]
    deliveries.plan_for(write, new, wants.id, now)
    return len(picked), rows[-1]["id"] if len(rows) == PORTION else None


def _portions(connection: Connection, wants: Filters, wanted: Range) -> Iterator[list[Mapping[str, Any]]]:
    after = 0
    while True:
        rows = _rows(connection, wants, wanted, after)
        yield [row for row in rows if _is_wanted(row, wants, wanted)]
        if len(rows) < PORTION:
            return
        after = rows[-1]["id"]


def _rows(connection: Connection, wants: Filters, wanted: Range, after: int) -> list[Mapping[str, Any]]:
    """The next events of the range, each with the subscriber's message if there is one."""
    message = models.messages.alias()
    rows = connection.execute(
        select(
            _e.id, _e.build, _e.sequence, _e.type, _e.data, _e.change,
            message.c.id.label("message"), message.c.state.label("message_state"),
        )
        .outerjoin(message, (message.c.event == _e.id) & (message.c.subscriber == wants.id))
        .where(_e.id > after, _e.timestamp >= wanted.since, _e.timestamp < wanted.until)
        .order_by(_e.id)
        .limit(PORTION)
    )  # fmt: skip
    return [dict(row) for row in rows.mappings()]


def _is_wanted(row: Mapping[str, Any], wants: Filters, wanted: Range) -> bool:
    if row["message_state"] == "pending":
        return False  # it is on its way
    if wanted.only_missing and row["message_state"] == "delivered":
        return False
    addressed = row["type"] == "subscriber.test"
    return not addressed and wants.match(row["type"], row["data"], row["change"])


def redrive(engine: Engine, subscriber_id: str | None, reason: str | None, now: datetime) -> int:
    """Make dead messages of active subscribers due again, oldest first; how many.

    `subscriber_id` and `reason` None: of all.  In portions, like a replay, and as safely repeated.
    """
    total = 0
    after: int | None = 0
    while after is not None:
        count, after = as_writer(engine, partial(_redrive_portion, subscriber_id, reason, after, now))
        total += count
    return total


def _redrive_portion(
    subscriber_id: str | None, reason: str | None, after: int, now: datetime, write: Write
) -> tuple[int, int | None]:
    """One portion; as the writer, so that no subscriber is disabled meanwhile."""
    active = select(models.subscribers.c.id).where(models.subscribers.c.state == "active")
    conditions: list[ColumnElement[bool]] = [_m.id > after, _m.state == _DEAD, _m.subscriber.in_(active)]
    if subscriber_id is not None:
        conditions.append(_m.subscriber == subscriber_id)
    if reason is not None:
        conditions.append(_m.reason == reason)
    chosen = select(_m.id).where(*conditions).order_by(_m.id).limit(PORTION)
    ids = write.connection.execute(chosen).scalars().all()
    count = _make_due(write.connection, _m.id.in_(ids), now)
    return count, ids[-1] if len(ids) == PORTION else None


def _make_due(connection: Connection, which: ColumnElement[bool], now: datetime) -> int:
    """Pending again, under the same id, with the whole schedule before it."""
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
