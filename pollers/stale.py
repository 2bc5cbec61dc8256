"""Who is due for a poll.  A claim moves `next_poll_at` on at once, so a tick that comes twice polls once."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, bindparam, or_, select, update

from webhook_app import models, polling
from webhook_app.platforms import PollTarget
from webhook_app.polling import Pace
from webhook_app.settings import SourceSettings

_b = models.builds.c
_s = models.sources.c


@dataclass(frozen=True, slots=True)
class Due:
    """One build to poll.  `named_only`: nobody but a request for polling has ever spoken of it.

    (A job's push speaks of its build without a status of the build: that one was seen.)
    """

    target: PollTarget
    source: str
    named_only: bool


_DUE = (
    select(models.builds)
    .outerjoin(models.sources, _b.source == _s.name)
    .where(
        _b.next_poll_at <= bindparam("now"),
        _b.source.in_(bindparam("names", expanding=True)),
        or_(_s.paused_until.is_(None), _s.paused_until <= bindparam("now")),
    )
    .order_by(_b.next_poll_at, _b.id)
    .limit(bindparam("most"))
    .with_for_update(of=models.builds, skip_locked=True)
)
_NEXT_DUE = (
    select(_b.next_poll_at)
    .outerjoin(models.sources, _b.source == _s.name)
    .where(
        _b.next_poll_at.is_not(None),
        _b.source.in_(bindparam("names", expanding=True)),
        or_(_s.paused_until.is_(None), _s.paused_until <= bindparam("now")),
    )
    .order_by(_b.next_poll_at)
    .limit(1)
)
_CLAIM = update(models.builds).where(_b.id == bindparam("the_id")).values(next_poll_at=bindparam("until"))


def claim(
    connection: Connection, sources: Mapping[str, SourceSettings], now: datetime, pace: Pace, most: int = 200
) -> list[Due]:
    """Take up to `most` due builds of sources that can be polled and are not paused, stalest first.

    Run in a write transaction.  If the reader dies, the build is due again after its interval.
    """
    names = [name for name, source in sources.items() if source.can_poll]
    found = connection.execute(_DUE, {"now": now, "names": names, "most": most}).mappings()
    rows = [dict(row) for row in found]
    if rows:
        connection.execute(
            _CLAIM,
            [
                {
                    "the_id": row["id"],
                    "until": now + timedelta(seconds=_lease(row["source"], sources, row, pace)),
                }
                for row in rows
            ],
        )
    return [_due(row) for row in rows]


def next_due(connection: Connection, sources: Mapping[str, SourceSettings], now: datetime) -> datetime | None:
    """When the next build of a source that can be polled and is not paused is due."""
    names = [name for name, source in sources.items() if source.can_poll]
    return connection.execute(_NEXT_DUE, {"now": now, "names": names}).scalar()


def _lease(source: str, sources: Mapping[str, SourceSettings], row: Mapping[str, Any], pace: Pace) -> float:
    """Seconds until anybody else may poll it: its interval, or longer if our two reads may take longer."""
    return max(polling.interval(row, pace), 2 * sources[source].timeout_seconds + 5)


def _due(row: Mapping[str, Any]) -> Due:
    return Due(
        target=PollTarget(
            build_id=str(row["build_id"]),
            key=str(row["key"]),
            repository=row["repository"],
            number=row["number"],
            attempt=row["attempt"],
            url=row["url"],
        ),
        source=str(row["source"]),
        named_only=bool(row["requested"]) and row["raw_status"] is None and row["last_push_at"] is None,
    )
