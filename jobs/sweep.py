"""The sweeping job: we live, pushes come or not; silent script builds; rows past their retention."""

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial

from sqlalchemy import Column, Engine, Table, delete, exists, select

from jobs.resources import Resources, resources
from pollers import client
from webhook_app import api_health, builds, clock, collection, db, health, models, queues
from webhook_app.lifecycle import Conclusion, Observation, ObservedBy, State
from webhook_app.polling import Pace
from webhook_app.times import utc_now

log = logging.getLogger(__name__)

MOST_AT_ONCE = 100
"""Rows of one transaction: pushes wait for its end."""
BUSY_SECONDS = 0.5
"""How long it deletes; then other jobs of this worker get their turn, and the bell brings us back."""

Portion = Callable[[db.Write], int]
"""Does a part of some work in one transaction; how many rows, at most `MOST_AT_ONCE`."""


def sweep(held: Resources | None = None) -> None:
    """Fail script builds that are silent for `HEARTBEAT_TIMEOUT`; delete what is too old.

    `held`: what to work with; None (as a worker calls it) takes this process's own.
    """
    held = held or resources()
    pace = held.pace
    queues.answer(held.redis, queues.SWEEP)
    now = utc_now()
    _wake_up(held, now)
    bell = queues.Bell(held.redis)
    until = time.monotonic() + BUSY_SECONDS
    lost, left = in_portions(held.engine, [lambda write: fail_silent(write, now, pace)], until)
    if lost:
        log.info("heartbeat lost builds=%d", lost)
        bell.ring(queues.DELIVER)
    before = now - timedelta(days=held.settings.retention_days)
    _, old = in_portions(held.engine, retention(before, now - timedelta(days=1)), until)
    if left or old:
        bell.ring(queues.SWEEP)


def in_portions(engine: Engine, work: list[Portion], until: float) -> tuple[int, bool]:
    """Do these by turns, each at least once, until nothing is left or it is `until` (`time.monotonic`).

    How many rows that were, and whether more are left.
    """
    count = 0
    while work:
        done = [(portion, db.as_writer(engine, portion)) for portion in work]
        count += sum(number for _, number in done)
        work = [portion for portion, number in done if number >= MOST_AT_ONCE]
        if time.monotonic() >= until:
            break
    return count, bool(work)


def _wake_up(held: Resources, now: datetime) -> None:
    """Note that we live, and whether the clock was set; after an absence look at once for what was missed."""
    pushing = [name for name, source in held.settings.sources.items() if source.webhook_secrets]

    def unit(write: db.Write) -> tuple[timedelta | None, health.Absence | None]:
        moved = clock.correct(write.connection, held.steps, now, held.pace.heartbeat_timeout_seconds)
        health.listen(write.connection, pushing, now)
        health.review(write.connection, now)
        api_health.review(write.connection, now)
        return moved, health.alive(write.connection, min(held.started_at, now), now)

    moved, absence = db.as_writer(held.engine, unit)
    held.steps.note()
    if moved:
        queues.Bell(held.redis).ring(queues.REPLAY)
    if absence:
        queues.Bell(held.redis).ring(queues.DISCOVER, queues.REDELIVER)


def fail_silent(write: db.Write, now: datetime, pace: Pace) -> int:
    """Fail the script builds that are due and still silent; how many.  A later report undoes it."""
    columns = models.builds.c
    rows = write.connection.execute(
        select(columns.key, columns.build_id, columns.source)
        .where(columns.next_poll_at <= now, columns.platform == "script")
        .limit(MOST_AT_ONCE)
    )
    facts = [
        Observation(
            source=row.source,
            platform="script",
            observed_by=ObservedBy.POLL,
            key=row.key,
            build_id=row.build_id,
            state=State.FAILED,
            conclusion=Conclusion.FAILURE,
            error=f"no heartbeat for {pace.heartbeat_timeout_seconds:g} s",
            ours=True,
        )
        for row in rows
    ]
    builds.record(write, facts, now, pace)
    return len(facts)


_AWAITED = exists().where(models.messages.c.event == models.events.c.id, models.messages.c.state == "pending")


def retention(before: datetime, tags_before: datetime) -> list[Portion]:
    """What deletes bodies, events, delivery attempts, logs and notices from before that time, and old ETags.

    An event that some subscriber is still to get is kept until its message is delivered or dead.
    """
    inbound, artifacts = models.inbound, models.artifacts
    return [
        partial(_forget, inbound, inbound.c.received_at, before),
        lambda write: _forget_events(write, before),
        partial(_forget, artifacts, artifacts.c.listed_at, before),
        lambda write: collection.forget(write, before, MOST_AT_ONCE),
        lambda write: _forget_notices(write, before),
        lambda write: client.forget(write, tags_before, MOST_AT_ONCE),
    ]


def _forget_events(write: db.Write, before: datetime) -> int:
    """Their messages first: one event may have a thousand, and they go in portions as well."""
    events, messages = models.events.c, models.messages.c
    old = select(events.id).where(events.timestamp < before, ~_AWAITED).order_by(events.timestamp)
    ids = write.connection.execute(old.limit(MOST_AT_ONCE)).scalars().all()
    sent = select(messages.id).where(messages.event.in_(ids)).limit(MOST_AT_ONCE + 1)
    found = write.connection.execute(sent).scalars().all()
    write.connection.execute(delete(models.messages).where(messages.id.in_(found[:MOST_AT_ONCE])))
    if len(found) > MOST_AT_ONCE:
        return MOST_AT_ONCE
    write.connection.execute(delete(models.events).where(events.id.in_(ids)))
    return len(ids)


def _forget(table: Table, moment: Column[datetime], before: datetime, write: db.Write) -> int:
    old = select(table.c.id).where(moment < before).order_by(moment).limit(MOST_AT_ONCE)
    return write.connection.execute(delete(table).where(table.c.id.in_(old.scalar_subquery()))).rowcount


def _forget_notices(write: db.Write, before: datetime) -> int:
    """Their ids are in the order of their times, which no index has: only the oldest are looked at."""
    columns = models.notices.c
    oldest = select(columns.id, columns.created_at).order_by(columns.id).limit(MOST_AT_ONCE).subquery()
    old = select(oldest.c.id).where(oldest.c.created_at < before)
    return write.connection.execute(delete(models.notices).where(columns.id.in_(old))).rowcount
