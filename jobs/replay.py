"""The replay job: goes on with large replays, redrives and burials, portion by portion."""

import logging
import time

from jobs.resources import Resources, resources
from webhook_app import queues, replays
from webhook_app.times import utc_now

log = logging.getLogger(__name__)

BUSY_SECONDS = 2.0
"""Then other jobs of this worker get their turn, and the bell brings us back."""


def replay(held: Resources | None = None) -> None:
    """Do what replays, redrives and burials have left, for a while; any number may run at once.

    Others write between the portions: on both databases whoever waits comes before who wrote last.
    `held`: what to work with; None (as a worker calls it) takes this process's own.
    """
    held = held or resources()
    queues.answer(held.redis, queues.REPLAY)
    bell = queues.Bell(held.redis)
    until = time.monotonic() + BUSY_SECONDS
    while time.monotonic() < until:
        count = replays.advance(held.engine, utc_now())
        if count is None:
            return
        log.info("replayed messages=%d", count)
        if count:
            bell.ring(queues.DELIVER)
    bell.ring(queues.REPLAY)
