"""How endpoints fare: failures counted, admins warned in stages, a last probe, disabled, enabled.

An endpoint is disabled when it failed for 120 h and at least 20 times without a success in between.
Before that is final it is left alone for a while and gets one more message; a success there heals it.
410 Gone disables at once.  An endpoint that fails several times in a row gets one message at a time
(`circuit`).
"""

import logging
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, case, func, insert, or_, select, update

from webhook_app import circuit, deliveries, loglines, models, retries, subscribers
from webhook_app.circuit import Circuit
from webhook_app.db import Write, after_commit, reading
from webhook_app.deliveries import Tried
from webhook_app.health import tell
from webhook_app.times import iso

log = logging.getLogger(__name__)

_s, _m = models.subscribers.c, models.messages.c

_WHY_DEAD = case((_m.reason == "http_410", _m.reason), else_="subscriber_disabled")

GONE = "the endpoint answered 410 Gone"
TOO_LONG = "the endpoint failed for too long"
PORTION = 100
"""Messages that are given up in one transaction, at most."""
ANSWER_SECONDS = 10.0
"""How long whoever sends a test waits for its answer."""
LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Sentence:
    """What is to be done about a subscriber: `warn` at a percent, `probe`, or `disable` for a reason."""

    subscriber: str
    act: str
    percent: int = 0
    reason: str = ""


def note(
    connection: Connection,
    tries: Sequence[Tried],
    now: datetime,
    jitter: Callable[[], float] = random.random,
) -> list[Sentence]:
    """Count what tries say about their subscribers, in the transaction that settles them; what follows.

    `jitter()` gives 0..1, for the wait until the next probe of an open circuit.
    """
    well = {tried.message.subscriber for tried in tries if tried.reason is None}
    failed = [tried for tried in tries if tried.reason is not None and not _is_our_fault(tried)]
    gone = {tried.message.subscriber for tried in failed if tried.status_code == 410}
    last: dict[str, datetime] = {}
    for tried in failed:
        last[tried.message.subscriber] = max(
            tried.started_at, last.get(tried.message.subscriber, tried.started_at)
        )
    slowed = [tried for tried in tries if tried.reason == deliveries.NO_KEY] + failed
    locked = _locked(connection, well, {tried.message.subscriber for tried in slowed})
    _heal(connection, locked.keys() & well)
    for subscriber, before in locked.items():
        own = [tried for tried in tries if tried.message.subscriber == subscriber]
        _note_circuit(connection, subscriber, before, own, now, jitter)
    ill = last.keys() - well
    for subscriber in ill:
        count = sum(tried.message.subscriber == subscriber for tried in failed)
        _count_failures(connection, subscriber, count, now)
    sentences = _sentences(connection, {id_: last[id_] for id_ in ill | gone}, gone, now)
    for tried in slowed:
        until = deliveries.slow_down_of(tried, now)
        if until is not None:
            _slow_down(connection, tried.message.subscriber, until)
    return sentences


def _locked(connection: Connection, well: Collection[str], failed: Collection[str]) -> dict[str, Circuit]:
    """Those that failed now or failed lately, and their circuits, locked in the order of their ids.

    Two workers that took them one by one would wait for each other.  A new message may refer to them.
    """
    if not well and not failed:
        return {}
    is_noted = or_(*(column.is_not(None) for column in (_s.failing_since, _s.probe_at, _s.concurrency_limit)))
    recovered = _s.id.in_(well) & is_noted
    columns = (models.subscribers.c[name] for name in circuit.COLUMNS)
    statement = select(_s.id, *columns).where(_s.id.in_(failed) | recovered).order_by(_s.id)
    rows = connection.execute(statement.with_for_update(key_share=True)).mappings()
    return {row["id"]: circuit.of(dict(row)) for row in rows}


def _is_our_fault(tried: Tried) -> bool:
    """Nothing was sent: a missing key or a fault of ours says nothing about the endpoint."""
    return tried.reason == deliveries.NO_KEY or (tried.reason or "").startswith("internal_")


def _note_circuit(
    connection: Connection,
    subscriber: str,
    before: Circuit,
    tries: Sequence[Tried],
    now: datetime,
    jitter: Callable[[], float],
) -> None:
    """Store what these tries, in the order they came back, make of a subscriber's circuit."""
    here = before
    for tried in tries:
        if not _is_our_fault(tried):
            here = here.after(tried.reason is None, tried.message.circuit, now, jitter)
    if here == before:
        return
    values = {name: getattr(here, name) for name in circuit.COLUMNS}
    connection.execute(update(models.subscribers).where(_s.id == subscriber).values(values))
    if here.state != before.state:
        after_commit(connection, partial(_log_circuit, subscriber, here))


def _log_circuit(subscriber: str, here: Circuit) -> None:
    """One line for each change of a circuit's state; that it opened is a warning."""
    tell_ = loglines.warning if here.state == circuit.OPEN else loglines.event
    probe_at = here.probe_at and iso(here.probe_at)
    in_row = here.failures_in_row or None
    tell_(
        log, "circuit", subscriber_id=subscriber, state=here.state, failures_in_row=in_row, probe_at=probe_at
    )


def _heal(connection: Connection, ids: Collection[str]) -> None:
    if ids:
        connection.execute(
            update(models.subscribers)
            .where(_s.id.in_(ids))
            .values(failing_since=None, failures=0, on_probation=False, warned_percent=0)
        )


def _slow_down(connection: Connection, subscriber: str, until: datetime) -> None:
    connection.execute(
        update(models.subscribers)
        .where(_s.id == subscriber, func.coalesce(_s.slow_until, until) <= until)
        .values(slow_until=until)
    )


def _count_failures(connection: Connection, subscriber: str, count: int, now: datetime) -> None:
    connection.execute(
        update(models.subscribers)
        .where(_s.id == subscriber)
        .values(failures=_s.failures + count, failing_since=func.coalesce(_s.failing_since, now))
    )


def _sentences(
    connection: Connection, failed_at: Mapping[str, datetime], gone: set[str], now: datetime
) -> list[Sentence]:
    """`failed_at`: when the last failed try of each subscriber had begun."""
    if not failed_at:
        return []
    rows = connection.execute(
        select(_s.id, _s.failing_since, _s.failures, _s.on_probation, _s.warned_percent, _s.slow_until).where(
            _s.id.in_(failed_at), _s.state == "active"
        )
    )
    found = [_sentence(dict(row), failed_at[row["id"]], row["id"] in gone, now) for row in rows.mappings()]
    return [sentence for sentence in found if sentence is not None]


def _sentence(row: Mapping[str, Any], failed_at: datetime, gone: bool, now: datetime) -> Sentence | None:
    if gone:
        return Sentence(row["id"], "disable", reason=GONE)
    percent = retries.percent_to_disable(row["failing_since"], row["failures"], now)
    if row["on_probation"] and row["slow_until"] is not None and failed_at < row["slow_until"]:
        return None  # it was on its way before the pause: not the probe
    if percent >= 100:
        act = "disable" if row["on_probation"] else "probe"
        return Sentence(row["id"], act, reason=TOO_LONG)
    stage = retries.warning_due(percent, row["warned_percent"])
    return Sentence(row["id"], "warn", percent=stage) if stage else None


def carry_out(write: Write, sentence: Sentence, now: datetime) -> None:
    """Do what a sentence says, unless it has become void."""
    row = subscribers.get(write.connection, sentence.subscriber)
    if row is None or row["state"] != "active" or _is_void(sentence, row):
        return
    if sentence.act == "disable":
        disable(write, row["id"], sentence.reason, now)
    elif sentence.act == "probe":
        until = now + timedelta(seconds=retries.PROBE_SECONDS)
        subscribers.change(write, row["id"], {"on_probation": True, "slow_until": until}, (), now)
        _tell(write, row["id"], "subscriber.warning", "has one more try before it is disabled", now)
    elif row["warned_percent"] < sentence.percent:
        subscribers.change(write, row["id"], {"warned_percent": sentence.percent}, (), now)
        _tell(write, row["id"], "subscriber.warning", f"is at {sentence.percent} % of being disabled", now)


def _is_void(sentence: Sentence, row: Mapping[str, Any]) -> bool:
    """Has another worker carried it out, or seen a success since?"""
    if sentence.reason == GONE:
        return False
    if row["failing_since"] is None:
        return True
    return (sentence.act == "probe" and row["on_probation"]) or (
        sentence.act == "disable" and not row["on_probation"]
    )


def disable(write: Write, subscriber_id: str, reason: str, now: datetime) -> None:
    """Disable a subscriber; what it did not get is dead, until enable and replay.

    The reason is `subscriber_disabled`, but for the message whose 410 disabled it.  A backlog is left to
    `replays.advance`, portion by portion: in one go it would hold up every push.
    """
    subscribers.change(write, subscriber_id, {"state": "disabled", "disabled_reason": reason}, (), now)
    if bury(write.connection, subscriber_id, now):
        rest = {"kind": "burial", "subscriber": subscriber_id, "only_missing": False, "after": 0, "last": 0}
        write.connection.execute(insert(models.recoveries), rest | {"created_at": now})
    _tell(write, subscriber_id, "subscriber.disabled", f"was disabled: {reason}", now)


def bury(connection: Connection, subscriber_id: str, now: datetime) -> bool:
    """Give up a portion of what a disabled subscriber did not get; is some left?"""
    return deliveries.bury(connection, subscriber_id, _WHY_DEAD, PORTION, now)


def enable(write: Write, subscriber_id: str, now: datetime) -> bool:
    """Let a subscriber get messages again, with a clean record; False if there is none."""
    return subscribers.change(write, subscriber_id, subscribers.CLEAN_RECORD, (), now)


def _tell(write: Write, subscriber_id: str, type_: str, what: str, now: datetime) -> None:
    """A notice for admins, and an event for whoever subscribed to `subscriber.*`."""
    text = f"Subscriber {subscriber_id} {what}."
    tell(write.connection, type_, subscriber_id, text, now)
    deliveries.plan(write, [_add_event(write, subscriber_id, type_, text, now)], now)


def _add_event(write: Write, subscriber_id: str, type_: str, text: str, now: datetime) -> dict[str, Any]:
    event: dict[str, Any] = {
        "id": write.new_id("events"),
        "build": None,
        "sequence": None,
        "type": type_,
        "change": None,
        "observed_by": "report",
        "timestamp": now,
        "data": {"subscriber_id": subscriber_id, "message": text},
    }
    write.connection.execute(insert(models.events), event)
    return event


def plan_test(write: Write, subscriber_id: str, now: datetime) -> str:
    """Write a `subscriber.test` event and its message for this subscriber, whatever its filters; its id."""
    event = _add_event(write, subscriber_id, "subscriber.test", "This is a test, sent on request.", now)
    return deliveries.plan_one(write, event, subscriber_id, now)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back to the first try of a message; all None while nothing did."""

    state: str
    status_code: int | None = None
    reason: str | None = None
    response: str | None = None


def await_answer(engine: Engine, message_id: str, seconds: float) -> Answer:
    """Wait for the first try of a message, up to so many seconds."""
    until = time.monotonic() + seconds
    while True:
        answer = _answer(engine, message_id)
        if answer is not None or time.monotonic() >= until:
            return answer or Answer("pending")
        time.sleep(LOOK_SECONDS)


def _answer(engine: Engine, message_id: str) -> Answer | None:
    columns = models.delivery_attempts.c
    with reading(engine) as connection:
        row = connection.execute(
            select(
                _m.state, columns.status_code, func.coalesce(columns.reason, _m.reason), columns.response,
                columns.id,
            )
            .outerjoin(models.delivery_attempts, columns.message == _m.id)
            .where(_m.message_id == message_id)
            .order_by(columns.number, columns.id)
            .limit(1)
        ).one_or_none()  # fmt: skip
    if row is None or (row.id is None and row.state == "pending" and row[2] is None):
        return None
    return Answer(*row[:4])  # without a try: its subscriber was disabled meanwhile, or its key is missing


@dataclass(frozen=True, slots=True)
class Health:
    """The last tries of a subscriber: how many, the share that succeeded, latencies in ms, the last error."""

    tries: int
    success_rate: float | None
    p50_ms: int | None
    p95_ms: int | None
    last_error: str | None


LAST_TRIES = 500


def health(connection: Connection, subscriber_id: str) -> Health:
    """How a subscriber's endpoint did in its last 500 tries."""
    columns = models.delivery_attempts.c
    rows = connection.execute(
        select(columns.reason, columns.duration_ms)
        .where(columns.subscriber == subscriber_id)
        .order_by(columns.id.desc())
        .limit(LAST_TRIES)
    ).all()
    if not rows:
        return Health(0, None, None, None, None)
    times = sorted(row.duration_ms for row in rows)
    good = sum(row.reason is None for row in rows)
    last_error = next((row.reason for row in rows if row.reason is not None), None)
    return Health(
        len(rows), good / len(rows), times[len(times) // 2], times[int(len(times) * 0.95)], last_error
    )
