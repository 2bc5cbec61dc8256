"""What a pending message waits for, in one word, told from the store alone when it is read.

How many requests a worker allows a subscriber or a host is known to that worker only.  The store knows
what all workers have in hand (claims whose lease runs), and that is held against what any one worker
allows: with several workers `concurrency` and `host` may be said a little early.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, literal_column, select

from webhook_app import circuit, deliveries, models, subscribers
from webhook_app.room import Room, host_of
from webhook_app.sealing import SealError

Row = Mapping[Any, Any]

WORDS: Mapping[str, str] = {
    "retry": "until its own schedule has its next try",
    "order": "for an earlier message of its build",
    "rate_limit": "for its turn within `rate_limit_per_second`",
    "slow_down": "until the pause (`slow_until`) of its subscriber is over",
    "probe": "for the circuit to close: one message at a time is tried",
    "concurrency": "for requests to its subscriber that are under way",
    "host": "for requests to the subscriber's host that are under way",
    "key": "for a key that opens its subscriber's secrets",
    "worker": "for a worker: it is free to go, or being sent",
}
"""The words, and what a message waits for."""

MOST_COUNTED = 10_000
"""Requests under way that are counted, at most; a worker has 256."""

_m = models.messages.c
_PENDING = _m.state == literal_column("'pending'")
"""Written into the statements: only so can every planner see that the partial indexes fit."""


@dataclass(frozen=True, slots=True)
class Look:
    """What to look with.  `per_host`: requests that one worker has under way at a host, at most."""

    connection: Connection
    now: datetime
    per_host: int
    keys: Sequence[str]


def words(look: Look, rows: Sequence[Row]) -> dict[int, str]:
    """One of `WORDS` for each pending one of these rows of `queries.deliveries`, by its `message`."""
    pending = [row for row in rows if row["state"] == "pending"]
    queues = {row["id"]: row for row in deliveries.queued(look.connection)} if pending else {}
    found: dict[int, str] = {}
    for subscriber_id in {row["subscriber_id"] for row in pending}:
        own = [row for row in pending if row["subscriber_id"] == subscriber_id]
        if subscriber_id in queues:
            found |= _of_subscriber(look, queues[subscriber_id], own, queues.values())
        else:  # it is disabled, and a worker gives them up
            found |= dict.fromkeys((row["message"] for row in own), "worker")
    return found


def _of_subscriber(
    look: Look, subscriber: Row, rows: Sequence[Row], queues: Collection[Row]
) -> dict[int, str]:
    first = _first_of_builds(look, subscriber, rows)
    own = {row["message"]: _own_word(look, row, first) for row in rows}
    free = [row for row in rows if own[row["message"]] is None]
    found = {message: word for message, word in own.items() if word is not None}
    if not free:
        return found
    shared = _paused_word(look, subscriber) or _busy_word(look, subscriber, queues)
    beyond = None if shared else _first_beyond_rate(look, subscriber)
    return found | {row["message"]: shared or _by_rate(row, beyond) for row in free}


def _first_of_builds(look: Look, subscriber: Row, rows: Sequence[Row]) -> dict[int, int]:
    """The first pending sequence of each build that these messages are about; none if order is not kept."""
    asked = {row["build"] for row in rows if row["build"] is not None} if subscriber["ordered"] else set()
    if not asked:
        return {}
    found = look.connection.execute(
        select(_m.build, func.min(_m.sequence))
        .where(_PENDING, _m.subscriber == subscriber["id"], _m.build.in_(asked))
        .group_by(_m.build)
    )
    return {row[0]: row[1] for row in found}


def _own_word(look: Look, row: Row, first: Mapping[int, int]) -> str | None:
    """What has to do with this message alone; None: nothing, it is due and the first of its build."""
    later = row["due_at"] > look.now
    if later and row["claim"] is not None:
        return "worker"
    if row["build"] in first and row["sequence"] > first[row["build"]]:
        return "order"
    if later:
        return "key" if row["reason"] == deliveries.NO_KEY else "retry"
    return None


def _paused_word(look: Look, subscriber: Row) -> str | None:
    """Why no due message of a subscriber may begin, whatever is under way."""
    slow_until, here = subscriber["slow_until"], circuit.of(subscriber)
    is_slowed = slow_until is not None and slow_until > look.now
    if is_slowed and (here.probe_at is None or here.probe_at <= slow_until):
        return "key" if _lacks_key(look, subscriber) else "slow_down"
    return "probe" if here.state == circuit.OPEN else None


def _lacks_key(look: Look, subscriber: Row) -> bool:
    try:
        subscribers.custom_headers(subscriber, look.keys)
        subscribers.live_secrets(subscriber, look.keys, look.now)
    except SealError:
        return True
    return False


def _busy_word(look: Look, subscriber: Row, queues: Collection[Row]) -> str | None:
    """Whether workers have as much in hand, of a subscriber or at its host, as any one of them allows."""
    host = host_of(subscriber["url"])
    at_host = [row["id"] for row in queues if host_of(row["url"]) == host]
    under_way = deliveries.under_way(look.connection, at_host, look.now, MOST_COUNTED)
    if under_way[subscriber["id"]] >= Room().window(subscriber):
        return "probe" if subscriber["on_probation"] else "concurrency"
    return "host" if under_way.total() >= look.per_host else None


def _first_beyond_rate(look: Look, subscriber: Row) -> tuple[datetime, int] | None:
    """Due time and id of the first due message that the rate does not let go now."""
    allowed = deliveries.rate_allows(subscriber, look.now)
    if allowed is None:
        return None
    due = (
        select(_m.due_at, _m.id)
        .where(_PENDING, _m.subscriber == subscriber["id"], _m.due_at <= look.now)
        .order_by(_m.due_at, _m.id)
    )
    found = look.connection.execute(due.offset(allowed).limit(1)).one_or_none()
    return None if found is None else (found.due_at, found.id)


def _by_rate(row: Row, beyond: tuple[datetime, int] | None) -> str:
    return "worker" if beyond is None or (row["due_at"], row["message"]) < beyond else "rate_limit"
