"""The polling jobs: `poll` drains what is due, `discover` finds builds whose every push was lost.

A tick that comes twice, late, or beside another does no harm.
"""

import logging
import time
from collections.abc import Sequence

from jobs.resources import POLL_THREADS, Resources, resources
from pollers import budget, discovery, repository, stale
from pollers.repository import Reading
from webhook_app import builds, db, queues
from webhook_app.times import utc_now

log = logging.getLogger(__name__)

LONGEST_DRAIN_SECONDS = 60.0
AT_ONCE = 4 * POLL_THREADS


def poll() -> None:
    """Read every build that is due, a few at a time, and record what the platforms say."""
    held = resources()
    queues.answer(held.redis, queues.POLL)
    until = time.monotonic() + LONGEST_DRAIN_SECONDS
    while time.monotonic() < until:
        due = db.in_transaction(
            held.engine,
            lambda connection: stale.claim(connection, held.settings.sources, utc_now(), held.pace, AT_ONCE),
        )
        if not due:
            return
        readings = list(
            held.threads.map(lambda one: repository.read(held.settings.sources[one.source], one), due)
        )
        events = _record(held, readings)
        log.info("polled builds=%d events=%d", len(readings), events)
        if events:
            queues.Bell(held.redis).ring(queues.DELIVER)


def _record(held: Resources, readings: Sequence[Reading]) -> int:
    """Record a batch of readings in one transaction; how many events they made."""
    now = utc_now()
    facts = [fact for reading in readings for fact in reading.facts]
    pauses = {
        pause.source: pause
        for reading in readings
        if reading.fault and (pause := budget.pause_for(reading.due.source, reading.fault, now))
    }

    def unit(write: db.Write) -> int:
        outcomes = builds.record(write, facts, now, held.pace)
        for pause in pauses.values():
            budget.apply(write, pause, now)
        return sum(outcome.events for outcome in outcomes)

    return db.as_writer(held.engine, unit)


def discover() -> None:
    """List the newest builds of each configured repository and record those that nobody knows."""
    held = resources()
    queues.answer(held.redis, queues.DISCOVER)
    places = list(discovery.places(held.settings.sources))
    seen = held.threads.map(
        lambda place: discovery.look(held.settings.sources[place.source], place, utc_now()), places
    )
    found = [one for some in seen for one in some]
    added = db.as_writer(held.engine, lambda write: discovery.add_unknown(write, found, utc_now(), held.pace))
    if added:
        log.info("discovered builds=%d", added)
        queues.Bell(held.redis).ring(queues.DELIVER)
