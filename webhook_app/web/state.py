"""What a web process holds, and how a request gets at it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import BoundedSemaphore

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

MOST_WAITING = 4
"""Requests that may wait for a subscriber's answer at a time: the other threads are for webhooks."""


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
    waiting: BoundedSemaphore = field(default_factory=lambda: BoundedSemaphore(MOST_WAITING))

    @property
    def sources(self) -> Mapping[str, Source]:
        """The configured sources, as platform modules want them."""
        return {name: settings.source for name, settings in self.settings.sources.items()}


def state() -> State:
    """The handles of the application that serves this request."""
    held: State = current_app.extensions["buildrelay"]
    return held
