"""How long a source is left alone when it asks for it, or when it does not know us any more."""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, insert, select

from webhook_app import models
from webhook_app.db import Write
from webhook_app.platforms import PollError, PollFault

RATE_LIMIT_SECONDS = 60.0
UNAUTHORIZED_SECONDS = 300.0
MOST_PAUSE_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Pause:
    """A source that is not to be polled until then; `reason` is a `PollFault` word."""

    source: str
    until: datetime
    reason: str
    message: str


def pause_for(source: str, fault: PollError, now: datetime) -> Pause | None:
    """The pause a fault calls for, by the platform's measure or our own; None if it calls for none."""
    own = {PollFault.RATE_LIMITED: RATE_LIMIT_SECONDS, PollFault.UNAUTHORIZED: UNAUTHORIZED_SECONDS}
    if fault.fault not in own:
        return None
    seconds = min(fault.retry_after_seconds or own[fault.fault], MOST_PAUSE_SECONDS)
    return Pause(source, now + timedelta(seconds=seconds), fault.fault.value, str(fault))


def pauses_for(faults: Iterable[tuple[str, PollError]], now: datetime) -> list[Pause]:
    """The pauses that the faults of several reads call for: the longest one for each source."""
    found: dict[str, Pause] = {}
    for source, fault in faults:
        pause = pause_for(source, fault, now)
        if pause and (source not in found or pause.until > found[source].until):
            found[source] = pause
    return list(found.values())


def paused(connection: Connection, now: datetime) -> set[str]:
    """Names of the sources that are to be left alone now."""
    columns = models.sources.c
    return set(connection.execute(select(columns.name).where(columns.paused_until > now)).scalars())


def apply(write: Write, pause: Pause, now: datetime) -> None:
    """Store the pause, never cutting a longer one short; tell admins once that a token is refused."""
    columns = models.sources.c
    before = write.connection.execute(
        select(columns.paused_until, columns.pause_reason).where(columns.name == pause.source)
    ).one_or_none()
    until = max(pause.until, before.paused_until or pause.until) if before else pause.until
    write.connection.execute(delete(models.sources).where(columns.name == pause.source))
    write.connection.execute(
        insert(models.sources),
        {"name": pause.source, "paused_until": until, "pause_reason": pause.reason},
    )
    told = before is not None and before.pause_reason == pause.reason
    if pause.reason == PollFault.UNAUTHORIZED.value and not told:
        write.connection.execute(
            insert(models.notices),
            {
                "kind": "source.unauthorized",
                "subject": pause.source,
                "text": f"{pause.source} refuses our token: {pause.message}",
                "created_at": now,
            },
        )


def clear(write: Write, source: str, now: datetime) -> None:
    """Forget a pause that is over after a read that worked; one that still holds was told to another read."""
    columns = models.sources.c
    write.connection.execute(
        delete(models.sources).where(columns.name == source, columns.paused_until <= now)
    )


def note(write: Write, worked: Set[str], faults: Sequence[tuple[str, PollError]], now: datetime) -> None:
    """Store what a batch of reads told of their sources: `worked`, or (source, fault)."""
    for source in worked - {source for source, _ in faults}:
        clear(write, source, now)
    for pause in pauses_for(faults, now):
        apply(write, pause, now)
