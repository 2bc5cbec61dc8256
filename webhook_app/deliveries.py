"""The outbox: `plan()` writes messages with the event, `claim()` takes them, `settle()` says how they went.

A message row is the truth; Redis only rings the bell.  A claim is a lease: it moves `due_at` past
the longest try, so a worker that dies gives its messages back by itself; `workers` frees them sooner.  A
message is marked only after it was sent.

Order: an ordered subscriber's messages of one build form a lane.  Only the first pending message of
a lane is sent; the others wait with it (`due_at` of the first) and are woken when it is settled.
No lane waits for another.

Fairness: each subscriber has a queue of its own (the index `ix_messages_due`).  A claim goes from
queue to queue, first to those with the least under way, and takes from each what `room.Room` allows.
"""

import secrets as random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    ColumnElement,
    Connection,
    any_,
    bindparam,
    func,
    insert,
    literal_column,
    select,
    text,
    update,
)

from webhook_app import (
    bulk,
    circuit,
    fan_out,
    formats,
    models,
    provider_shapes,
    signing,
    subscribers,
    workers,
)
from webhook_app.db import Write
from webhook_app.formats import Told
from webhook_app.retries import RetryPolicy, slow_down
from webhook_app.room import Room

Row = dict[str, Any]

LEASE_MARGIN_SECONDS = 15.0
RESPONSE_CAP_BYTES = 16 * 1024
REST_SECONDS = 2.0
"""How long the rest of an answer is read for the log: its status line has decided, others want the slot."""
NO_KEY = "no_key"
"""The reason of a try that was none: no key opens the subscriber's secrets."""
KEY_WAIT = timedelta(seconds=60)
"""How long such a subscriber is left alone before its secrets are tried again."""
MOST_SEEN = 500
"""Due messages that are looked at together once the first few all had to wait."""


def plan(write: Write, events: Sequence[Mapping[str, Any]], now: datetime) -> int:
    """Write one message per event and matching active subscriber, in the event's transaction; how many."""
    if not events:
        return 0
    count, messages, groups = 0, list[Row](), subscribers.groups(write)
    for event in events:
        ids = _wanting(groups, event)
        count += len(ids)
        if len(ids) < fan_out.LEAST:
            messages += [_message(write, event, id_, now) for id_ in ids]
        else:
            fan_out.insert(write, event, ids, now)
    bulk.insert(write.connection, models.messages, messages)
    return count


def _wanting(groups: subscribers.Groups, event: Mapping[str, Any]) -> list[str]:
    """The ids of the subscribers that want an event, in order."""
    found = [ids for wish, ids in groups.items() if wish.match(event["type"], event["data"], event["change"])]
    return sorted(id_ for ids in found for id_ in ids)


def plan_one(write: Write, event: Mapping[str, Any], subscriber_id: str, now: datetime) -> str:
    """Write a message of an event for one subscriber, whatever its filters; its message id.

    A person asks for it: it goes before what waits, and at once where the circuit is open.
    """
    due_at = _front(write.connection, subscriber_id, now)
    row = _message(write, event, subscriber_id, now) | {"due_at": due_at}
    write.connection.execute(insert(models.messages), row)
    let_probe(write.connection, subscriber_id, now)
    return str(row["message_id"])


def plan_for(write: Write, events: Sequence[Mapping[str, Any]], subscriber_id: str, now: datetime) -> None:
    """Write one message per event for one subscriber, whatever its filters."""
    rows = [_message(write, event, subscriber_id, now) for event in events]
    if rows:
        write.connection.execute(insert(models.messages), rows)


def plan_by_branch(write: Write, build: int, last: int, ref: Mapping[str, Any], now: datetime) -> None:
    """Write messages of a build's events up to sequence `last` for those who want its branch.

    `ref`: the branch of the build and whose it is, which were not known when the events were recorded.
    """
    wanting = [subscriber for subscriber in subscribers.active(write) if subscriber.branches]
    if not wanting:
        return
    recorded = select(models.events).where(_e.build == build, _e.sequence <= last).order_by(_e.sequence)
    events = write.connection.execute(recorded).mappings().all()
    sent = select(_m.subscriber, _m.event).where(_m.event.in_([event["id"] for event in events]))
    known = {(row.subscriber, row.event) for row in write.connection.execute(sent)}
    messages = [
        _message(write, event, subscriber.id, now)
        for event in events
        for subscriber in wanting
        if (subscriber.id, event["id"]) not in known
        and subscriber.match(event["type"], {**event["data"], **ref}, event["change"])
    ]
    bulk.insert(write.connection, models.messages, messages)


def _message(write: Write, event: Mapping[Any, Any], subscriber_id: str, now: datetime) -> Row:
    return {
        "id": write.new_id("messages"),
        "message_id": _message_id(now),
        "subscriber": subscriber_id,
        "event": event["id"],
        "build": event.get("build"),
        "sequence": event.get("sequence"),
        "state": "pending",
        "attempts": 0,
        "due_at": now,
        "created_at": now,
    }


def _message_id(now: datetime) -> str:
    """Random, but rising with time: new ids then lie together in the index, not one on each of its pages."""
    return f"msg_{int(now.timestamp() * 1000):012x}{random.token_hex(8)}"


@dataclass(frozen=True, slots=True)
class Claimed:
    """A message taken for sending, with all that its request needs.

    `number` is this try's, from 1; `lane` is subscriber and build of an ordered message; `circuit`: the
    state of the subscriber's circuit when it was taken.
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
    change: str | None = None
    circuit: str = circuit.CLOSED


@dataclass(frozen=True, slots=True)
class Tried:
    """How one try went.  `reason` None: a 2xx.  Times aware UTC; `response` is the capped body as text.

    `note`: what was odd about the answer, or where a redirect leads.
    """

    message: Claimed
    started_at: datetime
    duration_seconds: float
    status_code: int | None = None
    reason: str | None = None
    response: str | None = None
    retry_after: str | None = None
    note: str | None = None


def body(message: Claimed, format_: str = "standard") -> tuple[str, bytes]:
    """Content type and body, the same bytes on every try: they are made from the stored event alone."""
    told = Told(message.message_id, message.type, message.timestamp, message.data, message.change)
    return formats.render(format_, told)


def headers(
    message: Claimed,
    content_type: str,
    content: bytes,
    secrets: Sequence[str],
    timestamp: int,
    user_agent: str,
) -> dict[str, str]:
    """Standard Webhooks headers for one try, one signature per live secret."""
    sign = signing.sign_v1a if secrets and secrets[0].startswith("whsk_") else signing.sign_v1
    return {
        "content-type": content_type,
        "user-agent": user_agent,
        "webhook-id": message.message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(
            sign(secret, message.message_id, timestamp, content) for secret in secrets
        ),
        "webhook-attempt": str(message.number),
    }


def target(url: str, message: Claimed, format_: str) -> str:
    """Where a message goes: in the format `provider` a URL without a path gets that of the platform."""
    parts = urlsplit(url)
    if format_ != formats.PROVIDER or parts.path not in ("", "/"):
        return url
    return parts._replace(path=provider_shapes.shape(message.type, message.data).path).geturl()


def provider_headers(
    message: Claimed, format_: str, content: bytes, secrets: Sequence[str]
) -> dict[str, str]:
    """What receivers of a platform's webhooks look at, beside the Standard Webhooks headers."""
    if format_ != formats.PROVIDER:
        return {}
    extra = {**provider_shapes.shape(message.type, message.data).headers}
    if "x-github-event" in extra:
        extra["x-github-delivery"] = message.message_id
    if "x-gitlab-event" not in extra and secrets and secrets[0].startswith(signing.HMAC_PREFIX):
        extra["x-hub-signature-256"] = signing.github_signature(secrets[0], content)
    return extra


# ---- claiming --------------------------------------------------------------------------------

Among = Callable[[ColumnElement[Any], str], ColumnElement[bool]]


def _among(column: ColumnElement[Any], name: str) -> ColumnElement[bool]:
    """Is the column one of the values given by that name, as JSON?"""
    return column.in_(select(func.json_each(bindparam(name, type_=JSON)).table_valued("value").c.value))


def _among_array(column: ColumnElement[Any], name: str) -> ColumnElement[bool]:
    """The same with one array: PostgreSQL takes and plans a hundred parameters slowly, each time anew."""
    return column == any_(bindparam(name, type_=ARRAY(BigInteger)))


def _per_store(make: Callable[[Among], Any]) -> dict[str, Any]:
    """A statement for each kind of database, by the name of its dialect."""
    return {"sqlite": make(_among), "postgresql": make(_among_array)}


_m, _s, _e = models.messages.c, models.subscribers.c, models.events.c

_WAITING = text(
    """
    WITH RECURSIVE waiting(subscriber) AS (
        SELECT (SELECT m.subscriber FROM messages m
                WHERE m.state = 'pending' ORDER BY m.subscriber, m.due_at LIMIT 1)
        UNION ALL
        SELECT (SELECT m.subscriber FROM messages m
                WHERE m.state = 'pending' AND m.subscriber > waiting.subscriber
                ORDER BY m.subscriber, m.due_at LIMIT 1)
        FROM waiting WHERE waiting.subscriber IS NOT NULL
    )
    SELECT waiting.subscriber AS subscriber,
           (SELECT m.due_at FROM messages m WHERE m.state = 'pending' AND m.subscriber = waiting.subscriber
            ORDER BY m.due_at LIMIT 1) AS due_at
    FROM waiting WHERE waiting.subscriber IS NOT NULL
    """
).columns(subscriber=_m.subscriber.type, due_at=_m.due_at.type)
"""The subscribers that have pending messages, and when their first is due: one index step each."""

_WAITING_TABLE = _WAITING.subquery("queues")
_QUEUES = (
    select(models.subscribers, _WAITING_TABLE.c.due_at.label("first_due_at"))
    .join(_WAITING_TABLE, _WAITING_TABLE.c.subscriber == _s.id)
    .where(_s.state == "active")
    .order_by(_WAITING_TABLE.c.due_at)
)
_PENDING: ColumnElement[bool] = _m.state == literal_column("'pending'")
"""Written into the statements: only so can every planner see that the partial indexes fit."""
_ahead = models.messages.alias("ahead")
_FIRST = (
    select(func.min(_ahead.c.sequence))
    .where(
        _ahead.c.state == literal_column("'pending'"),
        _ahead.c.subscriber == _m.subscriber,
        _ahead.c.build == _m.build,
    )
    .scalar_subquery()
)
_DUE = (
    select(_m.id, _m.build, _m.sequence, _FIRST.label("first"))
    .where(_PENDING, _m.subscriber == bindparam("subscriber"), _m.due_at <= bindparam("now"))
    .order_by(_m.due_at, _m.id)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True, of=models.messages)
)
_TAKE = _per_store(
    lambda among: (
        update(models.messages)
        .where(among(_m.id, "ids"))
        .values(due_at=bindparam("until"), claim=bindparam("token"), attempts=_m.attempts + 1)
        .returning(_m.id, _m.message_id, _m.subscriber, _m.build, _m.attempts, _m.event)
    )
)
_CONTENT = _per_store(
    lambda among: select(_e.id, _e.type, _e.timestamp, _e.data, _e.change).where(among(_e.id, "ids"))
)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a claim took, and the rows of the subscribers it is for."""

    messages: Sequence[Claimed] = ()
    subscribers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def claim(
    connection: Connection, now: datetime, room: Room, timeout_seconds: float, worker: str = ""
) -> Claim:
    """Take due messages for `timeout_seconds` plus a margin: as many as `room` allows, at most one per lane.

    Run in a write transaction; the caller sends after the commit, and keeps the books of `room` itself.
    `worker`: the id that their claim begins with; default that of this process.
    """
    taken: list[int] = []
    rows: dict[str, Mapping[str, Any]] = {}
    room = room.copy()
    queues = [dict(row) for row in connection.execute(_QUEUES).mappings().all()]
    for row in sorted(queues, key=lambda row: room.subscribers[row["id"]]):
        due = _take_due(connection, row, now, _permitted(connection, row, now, room.allowed(row, now)))
        if due:
            _lease_probe(connection, row, now + timedelta(seconds=timeout_seconds + LEASE_MARGIN_SECONDS))
            taken += due
            rows[row["id"]] = row
            room.began(row, len(due))
        if room.free <= 0:
            break
    return Claim(_lease(connection, taken, rows, now, timeout_seconds, workers.token(worker)), rows)


_LOCKED_CIRCUIT = (
    select(*(models.subscribers.c[name] for name in circuit.COLUMNS))
    .where(_s.id == bindparam("subscriber"))
    .with_for_update(key_share=True, skip_locked=True)
)


def _permitted(connection: Connection, row: Row, now: datetime, most: int) -> int:
    """How many of `most` messages the circuit lets go.  Unless it is closed, its row is locked from now on.

    `row` then has the circuit as it stands now.  0: also when another worker holds the row.
    """
    if most <= 0 or circuit.state_of(row) == circuit.CLOSED:
        return most
    found = connection.execute(_LOCKED_CIRCUIT, {"subscriber": row["id"]}).mappings().one_or_none()
    if found is None:
        return 0
    row.update(found)
    here = circuit.of(row)
    if here.state == circuit.OPEN:
        return min(most, int(here.is_probe_due(now)))
    limit = here.concurrency_limit
    return (
        most if limit is None else min(most, limit - under_way(connection, [row["id"]], now, limit).total())
    )


def under_way(
    connection: Connection, subscriber_ids: Collection[str], now: datetime, most: int
) -> Counter[str]:
    """How many messages of these subscribers workers have in hand; counted up to `most` in all."""
    leases_end = now + timedelta(seconds=circuit.LONGEST_LEASE_SECONDS)
    in_hand = (
        select(_m.subscriber)
        .where(_PENDING, _m.subscriber.in_(subscriber_ids), _m.claim.is_not(None))
        .where(_m.due_at > now, _m.due_at <= leases_end)
        .order_by(_m.subscriber, _m.due_at, _m.id)
    )
    return Counter(connection.execute(in_hand.limit(most)).scalars())


def _lease_probe(connection: Connection, row: Row, until: datetime) -> None:
    """If the circuit is open: no other probe begins before this one came back, or its worker must be dead."""
    if row["probe_at"] is not None:
        connection.execute(update(models.subscribers).where(_s.id == row["id"]).values(probe_at=until))


def let_probe(connection: Connection, subscriber_id: str | None, now: datetime) -> None:
    """Let an open circuit (None: each one) send a message now, since a person asks, whatever it waits for."""
    waits: list[ColumnElement[bool]] = [_s.probe_at > now]
    if subscriber_id is not None:
        waits.append(_s.id == subscriber_id)
    connection.execute(update(models.subscribers).where(*waits).values(probe_at=now))


def _front(connection: Connection, subscriber_id: str, now: datetime) -> datetime:
    """A time that makes a message due, and the first of all that the subscriber waits for."""
    pending = select(_m.due_at).where(_PENDING, _m.subscriber == subscriber_id).order_by(_m.due_at, _m.id)
    first = connection.execute(pending.limit(1)).scalar()
    return now if first is None else min(now, first - timedelta(milliseconds=1))


def _take_due(connection: Connection, row: Mapping[str, Any], now: datetime, most: int) -> list[int]:
    """Ids of due messages that are the first of their lanes, as many as the pace allows."""
    if most <= 0:
        return []
    if not row["rate_limit_per_second"]:
        return _due_heads(connection, row, now, most)
    pace = _locked_pace(connection, row, now)
    most = min(most, pace.allowed) if pace else 0
    taken = _due_heads(connection, row, now, most) if most > 0 else []
    if pace and taken:
        pace.spend(connection, row["id"], len(taken))
    return taken


def _due_heads(connection: Connection, row: Mapping[str, Any], now: datetime, most: int) -> list[int]:
    """Look until something may be sent or nothing is due; what must wait is put out of sight on the way."""
    seen = most
    while True:
        due = connection.execute(_DUE, {"subscriber": row["id"], "now": now, "most": seen}).all()
        if not due or not row["ordered"]:
            return [one.id for one in due]
        heads = {one.build: one.first for one in due}
        behind = [one for one in due if one.sequence != one.first]
        late = {one.id for one in behind}
        free = [one.id for one in due if one.id not in late]
        ready, waiting = _settle_lanes(connection, row["id"], behind, heads, now)
        taken = list(dict.fromkeys(free + ready))[:most]
        if taken or not waiting:
            return taken
        seen = MOST_SEEN  # all of these wait; there may be thousands


@dataclass(frozen=True, slots=True)
class _Pace:
    """A rate limit as a bucket of one second: `until` is the time up to which messages are paid for."""

    per_second: int
    until: datetime | None
    now: datetime

    @property
    def allowed(self) -> int:
        ahead = (self._start() - self.now).total_seconds()
        return max(0, int(self.per_second * (1.0 - ahead)))

    def _start(self) -> datetime:
        return max(self.until or self.now, self.now)

    def spend(self, connection: Connection, subscriber_id: str, count: int) -> None:
        paid = self._start() + timedelta(seconds=count / self.per_second)
        connection.execute(update(models.subscribers).where(_s.id == subscriber_id).values(paced_until=paid))


def rate_allows(row: Mapping[str, Any], now: datetime) -> int | None:
    """How many messages the rate of this subscriber's row lets go now; None: it has no limit."""
    per_second = row["rate_limit_per_second"]
    return _Pace(per_second, row["paced_until"], now).allowed if per_second else None


_LOCKED_PACE = (
    select(_s.paced_until)
    .where(_s.id == bindparam("subscriber"))
    .with_for_update(key_share=True, skip_locked=True)
)
"""Waits for nobody, or two workers would wait for each other; and new messages may refer to the row."""


def _locked_pace(connection: Connection, row: Mapping[str, Any], now: datetime) -> _Pace | None:
    """The pace as it stands now: locked, since every worker spends from the same bucket.

    None: another worker is about to spend from it.
    """
    found = connection.execute(_LOCKED_PACE, {"subscriber": row["id"]}).one_or_none()
    return None if found is None else _Pace(row["rate_limit_per_second"], found.paced_until, now)


_OF_LANES = _per_store(
    lambda among: (
        select(_m.id, _m.build, _m.sequence, _m.due_at)
        .where(
            _PENDING,
            _m.subscriber == bindparam("subscriber"),
            among(_m.build, "builds"),
            among(_m.sequence, "sequences"),
        )
        .with_for_update(skip_locked=True)
    )
)
_WAIT = update(models.messages).where(_m.id == bindparam("the_id")).values(due_at=bindparam("until"))


def _settle_lanes(
    connection: Connection, subscriber: str, behind: Sequence[Any], heads: Mapping[int, int], now: datetime
) -> tuple[list[int], int]:
    """What becomes of messages that are due but not the first of their lanes.

    A head that is due itself is to be sent (its lease ran out, or a retry fell due, unseen).  Behind one
    that is not due they wait as long as it does, out of sight of the next claims.  Returns the ids of
    the due heads, and how many messages now wait.  The heads are locked, so a settlement that would
    wake a lane comes wholly before or after; those that another worker holds are its business.
    """
    lanes = list({one.build for one in behind} & heads.keys())
    if not lanes:
        return [], 0
    sequences = list({heads[build] for build in lanes})
    found = connection.execute(
        _OF_LANES[connection.dialect.name],
        {"subscriber": subscriber, "builds": lanes, "sequences": sequences},
    ).all()
    firsts = [one for one in found if heads[one.build] == one.sequence]
    until = {one.build: one.due_at for one in firsts if one.due_at > now}
    waits = [{"the_id": one.id, "until": until[one.build]} for one in behind if one.build in until]
    if waits:
        connection.execute(_WAIT, waits)
    return [one.id for one in firsts if one.due_at <= now], len(waits)


def _lease(
    connection: Connection,
    ids: list[int],
    rows: Mapping[str, Mapping[str, Any]],
    now: datetime,
    timeout_seconds: float,
    token: str,
) -> list[Claimed]:
    if not ids:
        return []
    until = now + timedelta(seconds=timeout_seconds + LEASE_MARGIN_SECONDS)
    store = connection.dialect.name
    taken = bulk.run(connection, _TAKE[store], {"ids": ids, "until": until, "token": token})
    events = {
        row[0]: row[1:]
        for row in bulk.run(connection, _CONTENT[store], {"ids": [*{row[-1] for row in taken}]})
    }
    states = {id_: circuit.state_of(row) for id_, row in rows.items()}
    return [
        Claimed(
            *[id_, message_id, subscriber, _lane(rows[subscriber], build), attempts, token],
            *[*events[event], states[subscriber]],
        )
        for id_, message_id, subscriber, build, attempts, event in sorted(taken)
    ]


def _lane(row: Mapping[str, Any], build: int | None) -> tuple[str, int] | None:
    return (row["id"], build) if build is not None and row["ordered"] else None


def queued(connection: Connection) -> Sequence[Mapping[str, Any]]:
    """The rows of active subscribers with pending messages, with their `first_due_at`, the oldest first."""
    return [dict(row) for row in connection.execute(_QUEUES).mappings()]


def next_due(connection: Connection) -> datetime | None:
    """When there is something to do next for an active subscriber; None: nothing is pending."""
    moments = [
        max(
            moment
            for moment in (row["first_due_at"], row["slow_until"], row["paced_until"], row["probe_at"])
            if moment
        )
        for row in connection.execute(_QUEUES).mappings()
    ]
    return min(moments, default=None)


# ---- settling --------------------------------------------------------------------------------


def settle(connection: Connection, tries: Sequence[Tried], now: datetime, policy: RetryPolicy) -> None:
    """Record tries and move their messages on: delivered, later, or dead with the reason.

    A try whose claim was lost to another worker still counts when it succeeded; one whose message was
    deleted meanwhile leaves nothing, and one that lacked its key was none: its message waits for the key.
    What the tries say about their subscribers is `endpoints.note`.
    """
    tries = _of_kept_messages(connection, tries)
    _await_key(connection, [tried for tried in tries if tried.reason == NO_KEY], now)
    tries = [tried for tried in tries if tried.reason != NO_KEY]
    if not tries:
        return
    connection.execute(insert(models.delivery_attempts), [_attempt_row(tried) for tried in tries])
    delivered = [tried for tried in tries if tried.reason is None]
    if delivered:
        ids = [tried.message.id for tried in delivered]
        connection.execute(_DELIVERED[connection.dialect.name], {"ids": ids, "now": now})
    dead = _put_back(connection, [tried for tried in tries if tried.reason is not None], now, policy)
    _wake_lanes(connection, [tried.message for tried in (*delivered, *dead)], now)


def unnoted(connection: Connection, tries: Sequence[Tried]) -> list[Tried]:
    """Those that no transaction has recorded: one whose commit was not confirmed may have been stored."""
    columns = models.delivery_attempts.c
    ids = {tried.message.id for tried in tries}
    known = select(columns.message, columns.number, columns.started_at).where(columns.message.in_(ids))
    noted = {tuple(row) for row in connection.execute(known)}
    return [one for one in tries if (one.message.id, one.message.number, one.started_at) not in noted]


def _of_kept_messages(connection: Connection, tries: Sequence[Tried]) -> Sequence[Tried]:
    """Those whose message is still there, now locked: removing a subscriber deletes what is under way too."""
    if not tries:
        return ()
    ids = {tried.message.id for tried in tries}
    kept = set(connection.execute(_KEPT[connection.dialect.name], {"ids": list(ids)}).scalars())
    return tries if kept == ids else [tried for tried in tries if tried.message.id in kept]


_KEPT = _per_store(lambda among: select(_m.id).where(among(_m.id, "ids")).order_by(_m.id).with_for_update())
_DELIVERED = _per_store(
    lambda among: (
        update(models.messages)
        .where(among(_m.id, "ids"))
        .values(state="delivered", due_at=None, claim=None, reason=None, settled_at=bindparam("now"))
    )
)


def _attempt_row(tried: Tried) -> Row:
    return {
        "message": tried.message.id,
        "subscriber": tried.message.subscriber,
        "number": tried.message.number,
        "started_at": tried.started_at,
        "duration_ms": round(tried.duration_seconds * 1000),
        "status_code": tried.status_code,
        "reason": tried.reason,
        "response": tried.response,
        "note": tried.note,
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
    waits = [policy.wait(tried.message.number, tried.status_code, tried.retry_after, now) for tried in failed]
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


_UNTRIED = (
    update(models.messages)
    .where(_m.id == bindparam("the_id"), _m.claim == bindparam("the_claim"), _m.state == "pending")
    .values(due_at=bindparam("new_due_at"), attempts=_m.attempts - 1, reason=NO_KEY, claim=None)
)


def _await_key(connection: Connection, untried: Sequence[Tried], now: datetime) -> None:
    """Put messages back as they were: however long the key is missing, none of them is given up."""
    rows = [
        {"the_id": tried.message.id, "the_claim": tried.message.claim, "new_due_at": now + KEY_WAIT}
        for tried in untried
    ]
    if rows:
        connection.execute(_UNTRIED, rows)


_WAKE = (
    update(models.messages)
    .where(
        _PENDING, _m.due_at > bindparam("now"), _m.claim.is_(None),
        _m.subscriber == bindparam("the_subscriber"), _m.build == bindparam("the_build"),
    )
    .values(due_at=bindparam("now"))
)  # fmt: skip


def _wake_lanes(connection: Connection, settled: Sequence[Claimed], now: datetime) -> None:
    """Make due at once what waited behind these messages."""
    lanes = sorted({message.lane for message in settled if message.lane is not None})
    if lanes:
        connection.execute(
            _WAKE, [{"the_subscriber": lane[0], "the_build": lane[1], "now": now} for lane in lanes]
        )


def bury(connection: Connection, subscriber_id: str, reason: Any, most: int, now: datetime) -> bool:
    """Give up so many pending messages of a subscriber, for a reason or a column of one; are some left?

    Those that are being settled are left, without waiting: who settles them may wait for the subscriber.
    """
    pending = select(_m.id).where(_PENDING, _m.subscriber == subscriber_id).order_by(_m.due_at, _m.id)
    ids = connection.execute(pending.limit(most).with_for_update(skip_locked=True)).scalars().all()
    connection.execute(
        update(models.messages)
        .where(_m.id.in_(ids))
        .values(state="dead", due_at=None, claim=None, reason=reason, settled_at=now)
    )
    return connection.execute(pending.limit(1)).first() is not None


def slow_down_of(tried: Tried, now: datetime) -> datetime | None:
    """Until when the endpoint of this try is left alone: as it asked, or since its key is missing."""
    if tried.reason == NO_KEY:
        return now + KEY_WAIT
    seconds = slow_down(tried.status_code, tried.retry_after, now) if tried.reason is not None else None
    return None if seconds is None else now + timedelta(seconds=seconds)


def retry(connection: Connection, message: int, now: datetime) -> None:
    """Make a message due at once, dead and delivered ones too; its id stays the same.

    A person asks for it: it goes before what waits, and at once where the circuit is open.
    """
    subscriber = connection.execute(select(_m.subscriber).where(_m.id == message)).scalar_one()
    due_at = _front(connection, subscriber, now)
    connection.execute(
        update(models.messages)
        .where(_m.id == message)
        .values(state="pending", due_at=due_at, claim=None, reason=None, settled_at=None)
    )
    let_probe(connection, subscriber, now)
