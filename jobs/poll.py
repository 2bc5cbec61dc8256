"""The polling jobs: `poll` drains what is due, `discover` finds builds whose every push was lost.

A tick that comes twice, late, or beside another does no harm.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from jobs.resources import POLL_THREADS, Resources, resources
from jobs.schedule import ring_at
from pollers import budget, discovery, repository, stale
from pollers.discovery import Sight
from pollers.repository import Reading
from pollers.stale import Due
from webhook_app import builds, db, queues
from webhook_app.lifecycle import Observation
from webhook_app.times import utc_now

log = logging.getLogger(__name__)

LONGEST_DRAIN_SECONDS = 60.0
AT_ONCE = 4 * POLL_THREADS
SOON = timedelta(minutes=1)


def poll(held: Resources | None = None) -> None:
    """Read every build that is due, a few at a time, and ask to be woken when the next one is due.

    `held`: what to work with; None (as a worker calls it) takes this process's own.
    """
    held = held or resources()
    queues.answer(held.redis, queues.POLL)
    _drain(held)
    _come_back(held)


def _come_back(held: Resources) -> None:
    """Ticks alone would find a build that was just polled one tick late, each time."""
    with db.reading(held.engine) as connection:
        due = stale.next_due(connection, held.settings.sources, utc_now())
    if due is not None and due < utc_now() + SOON:
        ring_at(held.redis, queues.POLL, due)


def _drain(held: Resources) -> None:
    """Read and record, until nothing is due or the time is up."""
    sources = held.settings.sources
    until = time.monotonic() + LONGEST_DRAIN_SECONDS
    while time.monotonic() < until:
        due = _claim(held)
        if not due:
            return
        readings = list(held.threads.map(lambda one: repository.read(sources[one.source], one), due))
        events = _record(held, readings)
        log.info("polled builds=%d events=%d", len(readings), events)
        if events:
            queues.Bell(held.redis).ring(queues.DELIVER)


def _claim(held: Resources) -> list[Due]:
    return db.in_transaction(
        held.engine,
        lambda connection: stale.claim(connection, held.settings.sources, utc_now(), held.pace, AT_ONCE),
    )


def _record(held: Resources, readings: Sequence[Reading]) -> int:
    """Record a batch of readings in one transaction; how many events they made."""
    now = utc_now()
    facts = [fact for reading in readings for fact in reading.facts]
    worked = {fact.source for fact in facts if isinstance(fact, Observation) and not fact.ours}
    faults = [(reading.due.source, reading.fault) for reading in readings if reading.fault]

    def unit(write: db.Write) -> int:
        outcomes = builds.record(write, facts, now, held.pace)
        budget.note(write, worked, faults, now)
        return sum(outcome.events for outcome in outcomes)

    return db.as_writer(held.engine, unit)


def discover(held: Resources | None = None) -> None:
    """List the newest builds of each configured repository and record those that nobody knows.

    `held` as for `poll`.
    """
    held = held or resources()
    queues.answer(held.redis, queues.DISCOVER)
    sights = _look_around(held)
    found = [seen for sight in sights for seen in sight.builds]
    worked = {sight.source for sight in sights if not sight.fault}
    faults = [(sight.source, sight.fault) for sight in sights if sight.fault]
    now, pace = utc_now(), held.pace

    def unit(write: db.Write) -> int:
        budget.note(write, worked, faults, now)
        return discovery.add_unknown(write, found, now, pace)

    added = db.as_writer(held.engine, unit)
    if added:
        log.info("discovered builds=%d", added)
        queues.Bell(held.redis).ring(queues.DELIVER)


def _look_around(held: Resources) -> list[Sight]:
    """All places, without the builds that are known, and the others one by one and complete."""
    sources = held.settings.sources
    with db.reading(held.engine) as connection:
        paused = budget.paused(connection, utc_now())
    places = list(discovery.places(sources, paused))
    sights = list(
        held.threads.map(lambda place: discovery.look(sources[place.source], place, utc_now()), places)
    )
    with db.reading(held.engine) as connection:
        new = discovery.unknown(connection, [seen for sight in sights for seen in sight.builds])
    closer = list(held.threads.map(lambda seen: discovery.look_closer(sources[seen.source], seen), new))
    return closer + [replace(sight, builds=()) for sight in sights]
