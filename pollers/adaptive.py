"""The adaptive pace: where pushes prove complete, builds still far from their end wait.

A build is watched from the time by which a share of the earlier ones of its workflow and branch were over;
until then nothing but its push is expected.  It is then read by itself: its ETag changes with it alone.
New builds are looked for less often.  A missed push ends all that for its repository for a while, and a
source that misses more than now and then is polled at the full pace.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import Connection, bindparam, select, update

from pollers.stale import Due, Place
from webhook_app import history, models
from webhook_app.db import Write
from webhook_app.lifecycle import State

COMPLETE, GOOD = 0.9995, 0.95
"""Shares of changes that pushes told first: none missed of the last four hundred or so, and one in twenty."""

PROOF = 100
"""Changes that a source must have had before its share says anything."""

SNAP_BACK = timedelta(minutes=3)
LONGEST_WAIT = timedelta(minutes=30)
ENOUGH = 8
"""Fewer earlier builds say little about when the next may end at the earliest."""

UNTOLD_INTERVALS, UNTOLD_OF_COMPLETE = 4, 40
"""Without history, or before it has begun, a build is read so many times more slowly."""


@dataclass(frozen=True, slots=True)
class Trust:
    """How much a source's pushes may be relied upon.

    `share`: of the latest changes, those a push told first (0 to 1; None: not known).  `missed`: repositories
    where one was missed a moment ago.  `proven`: there were changes enough to tell.
    """

    share: float | None = None
    missed: frozenset[str] = frozenset()
    proven: bool = True

    @property
    def watch_from(self) -> float | None:
        """The share of earlier builds that must be over before one is watched; None: all the time."""
        if not self._is_good:
            return None
        return 0.9 if self._is_complete else 0.45

    @property
    def list_stretch(self) -> int:
        """How many times more slowly new builds are looked for."""
        if not self._is_good:
            return 1
        return 30 if self._is_complete else 20

    @property
    def untold_intervals(self) -> int:
        """How many intervals a build without history waits."""
        return UNTOLD_OF_COMPLETE if self._is_complete else UNTOLD_INTERVALS

    @property
    def _is_good(self) -> bool:
        return self.proven and self.share is not None and self.share >= GOOD

    @property
    def _is_complete(self) -> bool:
        return self._is_good and self.share is not None and self.share >= COMPLETE


def trust(connection: Connection, names: Collection[str], now: datetime) -> dict[str, Trust]:
    """What is known of the pushes of these sources."""
    s, r = models.sources.c, models.repositories.c
    seen = s.changes_pushed + s.changes_polled
    shares = connection.execute(select(s.name, s.push_share, seen).where(s.name.in_(list(names))))
    found = {name: Trust(share, proven=changes >= PROOF) for name, share, changes in shares}
    recent = select(r.source, r.repository).where(r.missed_at > now - SNAP_BACK, r.source.in_(list(names)))
    for row in connection.execute(recent):
        known = found.get(row.source, Trust())
        found[row.source] = replace(known, missed=known.missed | {row.repository})
    return found


def ease(
    write: Write,
    places: Sequence[Place],
    trusted: Mapping[str, Trust],
    interval_seconds: float,
    now: datetime,
) -> list[Place]:
    """The places, less the builds that can wait: those are due later."""
    later: dict[int, datetime] = {}
    rows = [due.row for place in places for due in place.due]
    expected = history.expectations(write.connection, rows, least=ENOUGH)
    for place in places:
        known = trusted.get(place.source, Trust())
        watch_from = known.watch_from
        if watch_from is None or known.missed & set(place.repositories):
            continue
        place.singly = True
        for due in place.listable:
            if due.row["polling"] == "requested":
                continue  # somebody asked for it now
            begun = due.row["started_at"]
            of_its_kind = expected.get(due.row["id"])
            known_well = of_its_kind is not None and of_its_kind.count >= ENOUGH
            if of_its_kind and known_well and begun and due.row["state"] == State.IN_PROGRESS:
                until = begun + timedelta(seconds=of_its_kind.quantile(watch_from))
            else:
                until = _since(due, now) + timedelta(seconds=known.untold_intervals * interval_seconds)
            if until > now:
                later[due.row["id"]] = min(until, now + LONGEST_WAIT)
        place.due = [due for due in place.due if due.row["id"] not in later]
    _postpone(write, later)
    return [place for place in places if place.due or place.list_due]


def _since(due: Due, now: datetime) -> datetime:
    """When anything was last heard of it."""
    heard = [due.row["last_push_at"], due.row["last_poll_at"]]
    return max((moment for moment in heard if moment is not None), default=now - LONGEST_WAIT)


_POSTPONE = (
    update(models.builds)
    .where(models.builds.c.id == bindparam("the_id"))
    .values(next_poll_at=bindparam("until"))
)


def _postpone(write: Write, later: Mapping[int, datetime]) -> None:
    if later:
        rows = [{"the_id": id_, "until": until} for id_, until in later.items()]
        write.connection.execute(_POSTPONE, rows)
