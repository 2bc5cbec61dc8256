"""Builds whose every push was lost: the newest builds of each configured repository, listed now and then."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import Connection, bindparam, select

from pollers.repository import complete, fetch
from webhook_app import builds, models, platforms
from webhook_app.db import Write
from webhook_app.lifecycle import Observation, State
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


@dataclass(frozen=True, slots=True)
class Sight:
    """What a look at one source brought: builds, or the fault that says how long to leave it alone."""

    source: str
    builds: tuple[Observation, ...] = ()
    fault: PollError | None = None


def places(sources: Mapping[str, SourceSettings], paused: Collection[str] = ()) -> Iterator[Place]:
    """Where to look: the configured repositories of sources that can be polled and are not paused."""
    for name, settings in sources.items():
        if settings.can_poll and name not in paused:
            for repository in settings.repositories:
                yield Place(name, repository)


def look(settings: SourceSettings, place: Place, now: datetime) -> Sight:
    """The recent builds of one repository.  Never raises for what the platform or the network does."""
    platform = platforms.find()[settings.source.platform]
    request = platform.list_request(settings.source, place.repository)
    if request is None:
        return Sight(place.source)
    try:
        found = platform.parse_list(settings.source, place.repository, fetch(settings, request))
    except PollError as error:
        log.warning("discovery failed: %s %s: %s", place.source, place.repository, error)
        return Sight(place.source, fault=error)
    return Sight(place.source, tuple(seen for seen in found if _is_recent(seen, now)))


def _is_recent(seen: Observation, now: datetime) -> bool:
    at = seen.platform_at or seen.started_at
    return at is None or at > now - LOOK_BACK


def look_closer(settings: SourceSettings, seen: Observation) -> Sight:
    """One listed build with what a list leaves open: an end is final, so it has to be right at once.

    Where the list does not tell when a build ended, its last change was its end.
    """
    if seen.state is not None and seen.state.terminal:
        seen = replace(seen, ended_at=seen.ended_at or seen.platform_at)
    try:
        return Sight(seen.source, (complete(settings, seen),))
    except PollError as error:
        return Sight(seen.source, fault=error)


_b = models.builds.c
_KNOWN = select(_b.key, _b.attempt, _b.told_state).where(_b.key.in_(bindparam("keys", expanding=True)))


def unknown(connection: Connection, found: Sequence[Observation]) -> list[Observation]:
    """The builds that nobody has spoken of yet, each once, and re-runs of ended ones that nobody told.

    Known builds that are open have their own polls; an ended one has none.
    """
    by_key = {seen.key: seen for seen in found}
    known = connection.execute(_KNOWN, {"keys": list(by_key)}) if by_key else ()
    for row in known:
        if not _is_untold_rerun(by_key[row.key], row.attempt, State(row.told_state)):
            del by_key[row.key]
    return list(by_key.values())


def _is_untold_rerun(seen: Observation, attempt: int, told: State) -> bool:
    """Without numbers (GitLab) another state than the recorded end may be a re-run; the verdict decides."""
    if not told.terminal or seen.platform_at is None:
        return False
    if seen.attempt is not None:
        return seen.attempt > attempt
    blurred = (told, seen.state) == (State.TIMEOUT, State.FAILED)  # a list does not tell time-outs
    return seen.state is not None and seen.state is not told and not blurred


def add_unknown(write: Write, found: Sequence[Observation], now: datetime, pace: Pace) -> int:
    """Record the builds that nobody has spoken of yet; how many."""
    new = unknown(write.connection, found)
    builds.record(write, new, now, pace)
    return len(new)
