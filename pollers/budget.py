"""How long a source is left alone when it asks for it, or when it does not know us any more."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, insert, select

from webhook_app import models
from webhook_app.db import Write
from webhook_app.platforms import PollError, PollFault

RATE_LIMIT_SECONDS = 60.0
UNAUTHORIZED_SECONDS = 300.0
MOST_PAUSE_SECONDS = 3600.0


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


def apply(write: Write, pause: Pause, now: datetime) -> None:
    """Store the pause; tell admins once, when a source stops knowing our token."""
    columns = models.sources.c
    before = write.connection.execute(
        select(columns.pause_reason).where(columns.name == pause.source)
    ).scalar()
    write.connection.execute(delete(models.sources).where(columns.name == pause.source))
    write.connection.execute(
        insert(models.sources),
        {"name": pause.source, "paused_until": pause.until, "pause_reason": pause.reason},
    )
    if pause.reason == PollFault.UNAUTHORIZED.value and before != pause.reason:
        write.connection.execute(
            insert(models.notices),
            {
                "kind": "source.unauthorized",
                "subject": pause.source,
                "text": f"{pause.source} refuses our token: {pause.message}",
                "created_at": now,
            },
        )


def clear(write: Write, source: str) -> None:
    """Forget a pause after a read that worked."""
    write.connection.execute(delete(models.sources).where(models.sources.c.name == source))
