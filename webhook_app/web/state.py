"""What a web process holds, and how a request gets at it."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from threading import BoundedSemaphore, Lock
from typing import Any

from flask import current_app
from redis import Redis
from sqlalchemy import Engine

from webhook_app.db import GroupCommit
from webhook_app.health import Refusals
from webhook_app.inbox import Arrival, Receipt
from webhook_app.platforms import Source
from webhook_app.polling import Pace
from webhook_app.queues import Bell
from webhook_app.redaction import Redactor
from webhook_app.settings import Settings
from webhook_app.web.guesses import Guesses

RECENT_SECONDS = 1.0
STALE_SECONDS = 10.0
WAIT_SECONDS = 2.0
"""Of a health check: how long what it found counts, how long while the next one is under way, and how long
who asks waits for that one."""

MOST_WAITING = 4
"""Requests that may wait for a subscriber's answer at a time: the other threads are for webhooks."""


Checks = dict[str, dict[str, Any]]
"""By name: `ok`, and `detail` in words."""


class Recent:
    """What health checks found lately: strangers may ask as often as they like, and one at a time looks."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, Checks]] = {}
        self._looking: dict[str, Lock] = defaultdict(Lock)

    def __call__(self, name: str, look: Callable[[], Checks]) -> Checks | None:
        """What `look` finds, or found less than `RECENT_SECONDS` ago.

        While another thread looks: what was found before, up to `STALE_SECONDS` ago; None: it hangs.
        """
        looking = self._looking[name]
        if (checks := self._younger(name, RECENT_SECONDS)) is not None:
            return checks
        if looking.acquire(timeout=0 if self._younger(name, STALE_SECONDS) else WAIT_SECONDS):
            try:
                if (checks := self._younger(name, RECENT_SECONDS)) is None:
                    checks = look()
                    self._found[name] = time.monotonic(), checks
                return checks
            finally:
                looking.release()
        return self._younger(name, STALE_SECONDS)

    def _younger(self, name: str, seconds: float) -> Checks | None:
        at, checks = self._found.get(name, (-inf, {}))
        return checks if time.monotonic() - at < seconds else None


@dataclass(frozen=True, slots=True)
class State:
    """Handles of one application."""

    settings: Settings
    engine: Engine
    redis: Redis
    bell: Bell
    pace: Pace
    take: GroupCommit[Arrival, Receipt]
    refusals: Refusals
    guesses: Guesses
    redact: Redactor
    recent: Recent = field(default_factory=Recent)
    waiting: BoundedSemaphore = field(default_factory=lambda: BoundedSemaphore(MOST_WAITING))

    @property
    def sources(self) -> Mapping[str, Source]:
        """The configured sources, as platform modules want them."""
        return {name: settings.source for name, settings in self.settings.sources.items()}


def state() -> State:
    """The handles of the application that serves this request."""
    held: State = current_app.extensions["buildrelay"]
    return held
