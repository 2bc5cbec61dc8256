"""Builds whose every push was lost: the newest builds of each configured repository, listed now and then."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import bindparam, select

from pollers.repository import fetch
from webhook_app import builds, models, platforms
from webhook_app.db import Write
from webhook_app.lifecycle import Observation
from webhook_app.platforms import PollError
from webhook_app.polling import Pace
from webhook_app.settings import SourceSettings

log = logging.getLogger(__name__)

LOOK_BACK = timedelta(hours=24)
"""Builds that began before are history, not news."""


@dataclass(frozen=True, slots=True)
class Place:
    """One repository of one source."""

    source: str
    repository: str


def places(sources: Mapping[str, SourceSettings]) -> Iterator[Place]:
    """Where to look: the configured repositories of sources that can be polled."""
    for name, settings in sources.items():
        if settings.can_poll:
            for repository in settings.repositories:
                yield Place(name, repository)


def look(settings: SourceSettings, place: Place, now: datetime) -> tuple[Observation, ...]:
    """The recent builds of one repository.  Never raises for what the platform or the network does."""
    platform = platforms.find()[settings.source.platform]
    request = platform.list_request(settings.source, place.repository)
    if request is None:
        return ()
    try:
        found = platform.parse_list(settings.source, place.repository, fetch(settings, request))
    except PollError as error:
        log.warning("discovery failed: %s %s: %s", place.source, place.repository, error)
        return ()
    return tuple(seen for seen in found if _is_recent(seen, now))


def _is_recent(seen: Observation, now: datetime) -> bool:
    at = seen.platform_at or seen.started_at
    return at is None or at > now - LOOK_BACK


_KNOWN = select(models.builds.c.key).where(models.builds.c.key.in_(bindparam("keys", expanding=True)))


def add_unknown(write: Write, found: list[Observation], now: datetime, pace: Pace) -> int:
    """Record the builds that nobody has spoken of yet; how many.  Known ones have their own polls."""
    keys = [seen.key for seen in found]
    known = set(write.connection.execute(_KNOWN, {"keys": keys}).scalars()) if keys else set()
    builds.record(write, [seen for seen in found if seen.key not in known], now, pace)
    return len(set(keys) - known)
