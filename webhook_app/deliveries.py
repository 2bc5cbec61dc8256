"""The outbox: `plan()` writes messages with the event, `claim()` takes them, `settle()` says how they went.

A message row is the truth; Redis only rings the bell.  A claim is a lease: it moves `due_at` past
the longest try, so a worker that dies gives its messages back by itself.  A message is marked only
after it was sent.

Order: an ordered subscriber's messages of one build form a lane.  Only the first pending message of
a lane is sent; the others wait with it (`due_at` of the first) and are woken when it is settled.
No lane waits for another.
"""

import secrets as random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import orjson
from sqlalchemy import Connection, and_, bindparam, func, insert, or_, select, tuple_, update

from webhook_app import models, signing, subscribers
from webhook_app.db import Write
from webhook_app.times import iso

Row = dict[str, Any]

LEASE_MARGIN_SECONDS = 15.0
JITTER = 0.2
RESPONSE_CAP_BYTES = 16 * 1024
SLOW_DOWN = {429, 502, 504}
SLOW_DOWN_SECONDS = 60.0
MOST_RETRY_AFTER_SECONDS = 86_400.0
DISABLE_AFTER = timedelta(hours=120)
DISABLE_AFTER_FAILURES = 20


def plan(write: Write, events: Sequence[Mapping[str, Any]], now: datetime) -> int:
    """Write one message per event and matching active subscriber, in the event's transaction; how many."""
    if not events:
        return 0
    wanting = subscribers.active(write)
    rows = [
        {
            "id": write.new_id("messages"),
            "message_id": f"msg_{random.token_hex(12)}",
            "subscriber": subscriber.id,
            "event": event["id"],
            "build": event["build"],
            "sequence": event["sequence"],
            "state": "pending",
            "attempts": 0,
            "due_at": now,
            "created_at": now,
        }
        for event in events
        for subscriber in wanting
        if subscriber.match(event["type"], event["data"])
    ]
    if rows:
        write.connection.execute(insert(models.messages), rows)
    return len(rows)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A message taken for sending, with all that its request needs.

    `number` is this try's, from 1; `lane` is subscriber and build of an ordered message.
    """

    id: int
    message_id: str
    subscriber: str
    lane: tuple[str, int] | None
    number: int
    claim: str
    type: str
    timestamp: datetime
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tried:
    """How one try went.  `reason` None: a 2xx.  Times aware UTC; `response` is the capped body as text."""

    message: Claimed
    started_at: datetime
    duration_seconds: float
    status_code: int | None = None
    reason: str | None = None
    response: str | None = None
    retry_after: str | None = None


def body(message: Claimed) -> bytes:
    """The request body, the same bytes on every try: it is made from the stored event alone."""
    return orjson.dumps({"type": message.type, "timestamp": iso(message.timestamp), "data": message.data})


def headers(
    message: Claimed, content: bytes, secrets: Sequence[str], timestamp: int, user_agent: str
) -> dict[str, str]:
    """Standard Webhooks headers for one try, one signature per live secret."""
    sign = signing.sign_v1a if secrets and secrets[0].startswith("whsk_") else signing.sign_v1
    return {
        "content-type": "application/json",
        "user-agent": user_agent,
        "webhook-id": message.message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(
            sign(secret, message.message_id, timestamp, content) for secret in secrets
        ),
        "webhook-attempt": str(message.number),
    }


# ---- claiming --------------------------------------------------------------------------------

_m, _s, _e = models.messages.c, models.subscribers.c, models.events.c
_DUE = (
    select(_m.id, _m.subscriber, _m.build, _m.sequence, _m.due_at, _s.ordered)
    .join(models.subscribers, _m.subscriber == _s.id)
    .where(_m.state == "pending", _m.due_at <= bindparam("now"), _s.state == "active")
    .order_by(_m.due_at, _m.id)
    .limit(bindparam("most"))
    .with_for_update(of=models.messages, skip_locked=True)
)
_CONTENT = (
    select(
        _m.id, _m.message_id, _m.subscriber, _m.build, _m.attempts, _s.ordered,
        _e.type, _e.timestamp, _e.data,
    )
    .join(models.events, _m.event == _e.id)
    .join(models.subscribers, _m.subscriber == _s.id)
    .where(_m.id.in_(bindparam("ids", expanding=True)))
    .order_by(_m.id)
)  # fmt: skip


def claim(connection: Connection, now: datetime, most: int, timeout_seconds: float) -> list[Claimed]:
    """Take up to `most` due messages for `timeout_seconds` plus a margin; at most one per lane.

    Run in a write transaction; the caller sends after the commit.
    """
    due = connection.execute(_DUE, {"now": now, "most": most}).all()
    if not due:
        return []
    lanes = {(row.subscriber, row.build) for row in due if row.ordered and row.build is not None}
    heads = _heads(connection, lanes)
    behind = [
        row for row in due
        if row.ordered and row.build is not None and heads.get((row.subscriber, row.build)) != row.sequence
    ]  # fmt: skip
    late = {row.id for row in behind}
    free = [row.id for row in due if row.id not in late]
    _wait_with_head(connection, behind, heads, now)
    return _lease(connection, free, now, timeout_seconds)


def _heads(connection: Connection, lanes: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """The sequence of the first pending message of each lane."""
    wanted = list(lanes)
    if not wanted:
        return {}
    rows = connection.execute(
        select(_m.subscriber, _m.build, func.min(_m.sequence).label("first"))
        .where(_m.state == "pending", tuple_(_m.subscriber, _m.build).in_(wanted))
        .group_by(_m.subscriber, _m.build)
    )
    return {(row.subscriber, row.build): row.first for row in rows}


def _wait_with_head(
    connection: Connection, behind: Sequence[Any], heads: Mapping[tuple[str, int], int], now: datetime
) -> None:
    """Let messages behind a head that is not due wait as long as it does, out of sight of the next claims.

    The heads are locked, so a settlement that would wake the lane comes wholly before or after.
    """
    if not behind:
        return
    wanted = {(row.subscriber, row.build, heads[row.subscriber, row.build]) for row in behind}
    rows = connection.execute(
        select(_m.subscriber, _m.build, _m.due_at)
        .where(
            _m.state == "pending",
            tuple_(_m.subscriber, _m.build, _m.sequence).in_(list(wanted)),
            _m.due_at > now,
        )
        .with_for_update(skip_locked=True)
    )
    until = {(row.subscriber, row.build): row.due_at for row in rows}
    waits = [
        {"the_id": row.id, "until": until[row.subscriber, row.build]}
        for row in behind
        if (row.subscriber, row.build) in until
    ]
    if waits:
        connection.execute(
            update(models.messages).where(_m.id == bindparam("the_id")).values(due_at=bindparam("until")),
            waits,
        )


def _lease(
    connection: Connection, ids: Sequence[int], now: datetime, timeout_seconds: float
) -> list[Claimed]:
    if not ids:
        return []
    token = random.token_hex(8)
    until = now + timedelta(seconds=timeout_seconds + LEASE_MARGIN_SECONDS)
    connection.execute(
        update(models.messages)
        .where(_m.id.in_(ids))
        .values(due_at=until, claim=token, attempts=_m.attempts + 1)
    )
    return [
        Claimed(
            row.id, row.message_id, row.subscriber,
            (row.subscriber, row.build) if row.ordered and row.build is not None else None,
            row.attempts, token, row.type, row.timestamp, row.data,
        )
        for row in connection.execute(_CONTENT, {"ids": list(ids)})
    ]  # fmt: skip


# ---- settling --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a failed message is tried again: waits in seconds before try 2, 3, …; `jitter()` gives 0..1."""

    schedule: Sequence[float]
    jitter: Callable[[], float]

    def wait(self, tried: Tried, now: datetime) -> float | None:
        """Seconds until the next try, ±20 %, at least what the endpoint asked; None: give up."""
        number = tried.message.number
        if number > len(self.schedule):
            return None
        base = self.schedule[number - 1] * (1 - JITTER + 2 * JITTER * self.jitter())
        asked = retry_after_seconds(tried.retry_after, now)
        if tried.status_code in SLOW_DOWN and asked is None:
            asked = SLOW_DOWN_SECONDS
        return max(base, min(asked or 0.0, MOST_RETRY_AFTER_SECONDS))


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """Read a Retry-After header, seconds or an HTTP date; None if it is missing or nonsense."""
    if not value:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return None
    if then.tzinfo is None:
        return None
    return max((then - now).total_seconds(), 0.0)


def settle(connection: Connection, tries: Sequence[Tried], now: datetime, policy: RetryPolicy) -> list[str]:
    """Record tries and move their messages on: delivered, later, or dead; the ids of subscribers to disable.

    A try whose claim was lost to another worker still counts when it succeeded.
    """
    if not tries:
        return []
    connection.execute(insert(models.delivery_attempts), [_attempt_row(tried) for tried in tries])
    delivered = [tried for tried in tries if tried.reason is None]
    failed = [tried for tried in tries if tried.reason is not None]
    if delivered:
        connection.execute(
            update(models.messages)
            .where(_m.id.in_([tried.message.id for tried in delivered]))
            .values(state="delivered", due_at=None, claim=None, reason=None, settled_at=now)
        )
    dead = _put_back(connection, failed, now, policy)
    _wake_lanes(connection, [tried.message for tried in (*delivered, *dead)], now)
    return _judge_subscribers(connection, delivered, failed, now)


def _attempt_row(tried: Tried) -> Row:
    return {
        "message": tried.message.id,
        "number": tried.message.number,
        "started_at": tried.started_at,
        "duration_ms": round(tried.duration_seconds * 1000),
        "status_code": tried.status_code,
        "reason": tried.reason,
        "response": tried.response,
    }


_FAILED = (
    update(models.messages)
    .where(_m.id == bindparam("the_id"), _m.claim == bindparam("the_claim"), _m.state == "pending")
    .values(
        state=bindparam("new_state"),
        due_at=bindparam("new_due_at"),
        settled_at=bindparam("new_settled_at"),
        reason=bindparam("new_reason"),
        claim=None,
    )
)


def _put_back(
    connection: Connection, failed: Sequence[Tried], now: datetime, policy: RetryPolicy
) -> list[Tried]:
    """Put messages back for a later try, or bury them; those that are dead now."""
    waits = [policy.wait(tried, now) for tried in failed]
    rows = [
        {
            "the_id": tried.message.id,
            "the_claim": tried.message.claim,
            "new_state": "dead" if wait is None else "pending",
            "new_due_at": None if wait is None else now + timedelta(seconds=wait),
            "new_settled_at": now if wait is None else None,
            "new_reason": tried.reason,
        }
        for tried, wait in zip(failed, waits, strict=True)
    ]
    if rows:
        connection.execute(_FAILED, rows)
    return [tried for tried, wait in zip(failed, waits, strict=True) if wait is None]


def _wake_lanes(connection: Connection, settled: Sequence[Claimed], now: datetime) -> None:
    """Make due at once what waited behind these messages."""
    lanes = list({message.lane for message in settled if message.lane is not None})
    if lanes:
        connection.execute(
            update(models.messages)
            .where(
                _m.state == "pending",
                _m.due_at > now,
                _m.claim.is_(None),
                tuple_(_m.subscriber, _m.build).in_(lanes),
            )
            .values(due_at=now)
        )


def _judge_subscribers(
    connection: Connection, delivered: Sequence[Tried], failed: Sequence[Tried], now: datetime
) -> list[str]:
    """Count failures per subscriber; who answered 410, or failed for too long, is to be disabled."""
    well = {tried.message.subscriber for tried in delivered}
    if well:
        connection.execute(
            update(models.subscribers)
            .where(_s.id.in_(well), _s.failing_since.is_not(None))
            .values(failing_since=None, failures=0)
        )
    ill = {tried.message.subscriber for tried in failed} - well
    for subscriber in ill:
        count = sum(tried.message.subscriber == subscriber for tried in failed)
        connection.execute(
            update(models.subscribers)
            .where(_s.id == subscriber)
            .values(failures=_s.failures + count, failing_since=func.coalesce(_s.failing_since, now))
        )
    gone = {tried.message.subscriber for tried in failed if tried.status_code == 410}
    if not ill and not gone:
        return []
    lost = connection.execute(
        select(_s.id).where(
            _s.state == "active",
            or_(
                _s.id.in_(gone),
                and_(
                    _s.id.in_(ill),
                    _s.failing_since <= now - DISABLE_AFTER,
                    _s.failures >= DISABLE_AFTER_FAILURES,
                ),
            ),
        )
    )
    return [row.id for row in lost]


def disable(write: Write, subscriber_id: str, reason: str, keys: Sequence[str], now: datetime) -> None:
    """Disable a subscriber; what it did not get is dead with that reason, until enable and replay."""
    subscribers.change(write, subscriber_id, {"state": "disabled", "disabled_reason": reason}, keys, now)
    write.connection.execute(
        update(models.messages)
        .where(_m.subscriber == subscriber_id, _m.state == "pending")
        .values(state="dead", due_at=None, claim=None, reason="subscriber_disabled", settled_at=now)
    )
    write.connection.execute(
        insert(models.notices),
        {
            "kind": "subscriber.disabled",
            "subject": subscriber_id,
            "text": f"Subscriber {subscriber_id} was disabled: {reason}.",
            "created_at": now,
        },
    )


def next_due(connection: Connection) -> datetime | None:
    """When the next pending message of an active subscriber is due."""
    return connection.execute(
        select(_m.due_at)
        .join(models.subscribers, _m.subscriber == _s.id)
        .where(_m.state == "pending", _s.state == "active")
        .order_by(_m.due_at)
        .limit(1)
    ).scalar()


def retry(connection: Connection, message: int, now: datetime) -> None:
    """Make a message due at once, dead and delivered ones too; its id stays the same."""
    connection.execute(
        update(models.messages)
        .where(_m.id == message)
        .values(state="pending", due_at=now, claim=None, reason=None, settled_at=None)
    )


def plan_one(write: Write, event: Mapping[str, Any], subscriber_id: str, now: datetime) -> str:
    """Write one message of a stored event for one subscriber, whatever its filters; the message's id."""
    row = {
        "id": write.new_id("messages"),
        "message_id": f"msg_{random.token_hex(12)}",
        "subscriber": subscriber_id,
        "event": event["id"],
        "build": event["build"],
        "sequence": event["sequence"],
        "state": "pending",
        "attempts": 0,
        "due_at": now,
        "created_at": now,
    }
    write.connection.execute(insert(models.messages), row)
    return str(row["message_id"])
