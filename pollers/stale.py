"""What is due: builds that had no recent push, and repositories whose newest builds are to be listed.

A portion of work is a list of `Place`s, the stalest first.  Nothing is claimed row by row: whoever owns
the lane (`webhook_app.budget`) is the only one to read with it, and what it does not get to stays due.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, func, select, tuple_

from webhook_app import models, platforms, polling
from webhook_app.platforms import PollFault, PollTarget
from webhook_app.settings import SourceSettings

Row = Mapping[str, Any]

_b = models.builds.c
_p = models.places.c


@dataclass(frozen=True, slots=True)
class Due:
    """One build to poll.

    `named_only`: nobody but a request for polling has ever spoken of it.  (A job's push speaks of its
    build without a status of the build: that one was seen.)  `read_before`: an answer about it was
    recorded.  `missing`: the last read said that there is no such build.  `given_up`: we ended it
    ourselves, and the platform may still tell its end.
    """

    target: PollTarget
    named_only: bool
    doubtful: bool
    read_before: bool
    missing: bool
    given_up: bool
    row: Row

    @property
    def listable(self) -> bool:
        """May a list of its repository answer for it?"""
        asked_for_itself = self.doubtful or self.named_only or self.given_up or self.row["unlisted"]
        return bool(self.target.repository) and not asked_for_itself


@dataclass(slots=True)
class Place:
    """One repository of a source, or several that one request lists; what is due there.

    `since`: how long the stalest has waited.  `list_due`: their newest builds are to be listed anyway.
    `refused`: a list failed a while ago, it is not tried again yet.  `wide`: its lists have to be long.
    `singly`: its builds are to be read one by one, there are few.
    `clocks`: the platform's own time of the last list of each, where it is known.
    """

    source: str
    repositories: list[str]
    since: datetime
    list_due: bool = False
    refused: bool = False
    wide: bool = False
    singly: bool = False
    due: list[Due] = field(default_factory=list)
    clocks: dict[str, datetime | None] = field(default_factory=dict)

    @property
    def listable(self) -> list[Due]:
        """The builds that a list may answer for; not those of which we want to know for sure."""
        return [due for due in self.due if due.listable]

    @property
    def wants_list(self) -> bool:
        """Is there anything for a list to answer?"""
        return self.list_due or (bool(self.listable) and not (self.refused or self.singly))


_DUE = (
    select(_b.source, _b.repository, func.min(_b.next_poll_at).label("since"))
    .where(_b.next_poll_at <= bindparam("now"), _b.source.in_(bindparam("names", expanding=True)))
    .group_by(_b.source, _b.repository)
    .order_by(func.min(_b.next_poll_at))
    .limit(bindparam("most"))
)
_LISTS = (
    select(_p.source, _p.repository, _p.next_list_at.label("since"))
    .where(
        _p.next_list_at <= bindparam("now"),
        _p.source.in_(bindparam("names", expanding=True)),
        _p.same_as.is_(None),
    )
    .order_by(_p.next_list_at)
    .limit(bindparam("most"))
)  # fmt: skip
_PLACES = select(_p.source, _p.repository, _p.list_clock, _p.wide, _p.errors, _p.next_list_at).where(
    tuple_(_p.source, _p.repository).in_(bindparam("places", expanding=True))
)


def work(
    connection: Connection, sources: Mapping[str, SourceSettings], now: datetime, most: int
) -> list[Place]:
    """Up to `most` places of these sources where something is due, the stalest first."""
    asked = {"now": now, "names": list(sources), "most": most}
    places: dict[tuple[str, str], Place] = {}
    for statement, list_due in ((_DUE, False), (_LISTS, True)):
        for row in connection.execute(statement, asked):
            _add(places, sources[row.source], row.repository or "", row.since, list_due)
    chosen = sorted(places.values(), key=lambda place: place.since)[:most]
    _fill(connection, chosen, now)
    return chosen


def _add(
    places: dict[tuple[str, str], Place],
    settings: SourceSettings,
    repository: str,
    since: datetime,
    list_due: bool,
) -> None:
    source = settings.source
    key = platforms.polled()[source.platform].together(repository)
    place = places.setdefault((source.name, key), Place(source.name, [], since))
    if repository not in place.repositories:
        place.repositories.append(repository)
    place.since = min(place.since, since)
    place.list_due |= list_due


def _fill(connection: Connection, places: Sequence[Place], now: datetime) -> None:
    """The due builds of these places, and their clocks."""
    by_name = {(place.source, name): place for place in places for name in place.repositories}
    if not by_name:
        return
    for row in _due_rows(connection, by_name, now):
        by_name[row["source"], row["repository"] or ""].due.append(_due(row))
    for told in connection.execute(_PLACES, {"places": list(by_name)}):
        place = by_name[told.source, told.repository]
        place.clocks[told.repository] = told.list_clock
        place.wide |= told.wide
        place.refused |= bool(told.errors and told.next_list_at and told.next_list_at > now)


def _due_rows(connection: Connection, names: Collection[tuple[str, str]], now: datetime) -> Iterable[Row]:
    for source in {source for source, _ in names}:
        repositories = [name for of, name in names if of == source]
        statement = _DUE_BUILDS_NAMELESS if "" in repositories else _DUE_BUILDS
        asked = {"source": source, "names": [name for name in repositories if name], "now": now}
        yield from (dict(row) for row in connection.execute(statement, asked).mappings())


_DUE_BUILDS = (
    select(models.builds)
    .where(
        _b.source == bindparam("source"),
        _b.repository.in_(bindparam("names", expanding=True)),
        _b.next_poll_at <= bindparam("now"),
    )
    .order_by(_b.next_poll_at, _b.id)
)
_DUE_BUILDS_NAMELESS = (
    select(models.builds)
    .where(
        _b.source == bindparam("source"),
        _b.repository.is_(None) | _b.repository.in_(bindparam("names", expanding=True)),
        _b.next_poll_at <= bindparam("now"),
    )
    .order_by(_b.next_poll_at, _b.id)
)
"""`repository IS NULL` is a question of its own: an index finds it, `coalesce` would not."""


def _due(row: Row) -> Due:
    return Due(
        target=PollTarget(
            build_id=str(row["build_id"]),
            key=str(row["key"]),
            repository=row["repository"],
            number=row["number"],
            attempt=row["attempt"],
            url=row["url"],
            attempt_base=row["attempt_base"],
        ),
        named_only=polling.is_only_named(row),
        doubtful=bool(row["doubtful"]),
        read_before=row["last_poll_at"] is not None and row["poll_fault"] is None,
        missing=row["poll_fault"] == PollFault.NOT_FOUND,
        given_up=polling.was_given_up(row),
        row=row,
    )


_NEXT_BUILD = (
    select(func.min(_b.next_poll_at))
    .where(_b.next_poll_at.is_not(None), _b.source.in_(bindparam("names", expanding=True)))
)  # fmt: skip
_NEXT_LIST = select(func.min(_p.next_list_at)).where(
    _p.source.in_(bindparam("names", expanding=True)), _p.same_as.is_(None)
)


def next_due(connection: Connection, names: Collection[str]) -> datetime | None:
    """When the next build or list of these sources is due."""
    asked = {"names": list(names)}
    found = [connection.execute(statement, asked).scalar() for statement in (_NEXT_BUILD, _NEXT_LIST)]
    return min((moment for moment in found if moment is not None), default=None)
