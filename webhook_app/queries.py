"""What the API reads: one statement or two for each question, none per row, each along an index.

Lists take where to go on (`before` or `after`, a key of their last row) and `most`, how many rows;
callers ask for one more than they show, to know whether there is a next page.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Connection,
    Select,
    bindparam,
    func,
    literal,
    or_,
    select,
    tuple_,
    union_all,
    update,
)

from webhook_app import models
from webhook_app.lifecycle import State

Row = Mapping[Any, Any]
"""A row by column name."""

LARGEST_ID = 2**63 - 1
"""A cursor before the newest row: with it the first page is the same statement as all others."""

REPORT_EVENTS = 50

_b, _a, _e = models.builds.c, models.attempts.c, models.events.c
_i, _m, _s = models.inbound.c, models.messages.c, models.subscribers.c

_BUILD = tuple(column for column in _b if column.name not in ("jobs", "lookup", "group_key"))
_OPEN = tuple(state.value for state in State if not state.terminal)


# ---- builds ----------------------------------------------------------------------------------


def find_build(connection: Connection, build_id: str, github_sources: Collection[str] = ()) -> Row | None:
    """The build with this id, whatever its case; None if there is none.

    For sources of GitHub the run id is enough, so that the new name of a renamed repository
    finds builds that were recorded under the old one.
    """
    if "\0" in build_id:
        return None  # nothing stored holds one, and PostgreSQL would refuse the question
    wanted = _b.lookup == build_id.casefold()
    key = _github_key(build_id, github_sources)
    if key is not None:
        wanted = or_(wanted, _b.key == key)
    return connection.execute(select(*_BUILD).where(wanted).limit(1)).mappings().one_or_none()


def _github_key(build_id: str, sources: Collection[str]) -> str | None:
    """`SOURCE:OWNER:REPO:RUN_ID` → `SOURCE:RUN_ID`."""
    source, _, rest = build_id.partition(":")
    parts = rest.split(":")
    if len(parts) != 3 or not (parts[2].isascii() and parts[2].isdigit()):
        return None
    named = next((name for name in sources if name.casefold() == source.casefold()), None)
    return f"{named}:{parts[2]}" if named else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFilter:
    """Which builds: None means all.  `since` (included) and `until` (not) bound when we first heard of it."""

    source: str | None = None
    repository: str | None = None
    workflow: str | None = None
    branch: str | None = None
    forks: bool = False
    state: str | None = None
    conclusion: str | None = None
    since: datetime | None = None
    until: datetime | None = None


Spelling = tuple[str, str]
"""A source, and the name of one of its repositories as builds have it."""


def spellings(connection: Connection, repository: str, sources: Collection[str]) -> list[Spelling]:
    """Where builds of a repository are, whatever the case of its name; one may have several spellings.

    No index ignores case, so the distinct names are read from one, and no build.
    """
    rows = connection.execute(distinct_repositories(sorted(sources))) if sources else ()
    wanted = repository.casefold()
    return [(row.source, row.name) for row in rows if row.name.casefold() == wanted]


def distinct_repositories(sources: Sequence[str]) -> CompoundSelect[Any]:
    """The statement for the names of all repositories with builds: one step of an index for each name."""
    parts = []
    for number, source in enumerate(sources):
        names = select(literal("").label("name")).cte(f"names_{number}", recursive=True)
        following = select(func.min(_b.repository)).where(_b.source == source, _b.repository > names.c.name)
        step = select(following.scalar_subquery()).where(names.c.name.is_not(None))
        names = names.union_all(step)
        parts.append(select(literal(source).label("source"), names.c.name).where(names.c.name != ""))
    return union_all(*parts)


def builds(
    wanted: BuildFilter,
    repositories: Collection[Spelling] = (),
    before: int = LARGEST_ID,
    most: int = 50,
) -> Select[Any]:
    """The statement for builds, newest first.  `repositories`: the `spellings` of the wanted repository.

    With a repository it follows the index over source, repository and id, else the ids downwards.
    """
    conditions: list[ColumnElement[bool]] = [_b.id < before]
    if wanted.repository is not None:
        return _of_repository(wanted, sorted(repositories), before, most)
    if wanted.source is not None:
        # "+ ''" keeps SQLite from reading and sorting all builds of the source: no index ends in their order.
        conditions.append(_b.source + "" == wanted.source)
    statement = select(*_BUILD).where(*conditions, *_further(wanted))
    return statement.order_by(_b.id.desc()).limit(most)


def _of_repository(
    wanted: BuildFilter, repositories: Sequence[Spelling], before: int, most: int
) -> Select[Any]:
    """The newest of each spelling, merged: each part is one walk along the index."""
    parts = [
        select(
            select(_b.id)
            .where(_b.source == source, _b.repository == name, _b.id < before, *_further(wanted))
            .order_by(_b.id.desc())
            .limit(most)
            .subquery()
            .c.id
        )
        for source, name in repositories or [("", "")]
    ]
    ids = union_all(*parts) if len(parts) > 1 else parts[0]
    return select(*_BUILD).where(_b.id.in_(ids)).order_by(_b.id.desc()).limit(most)


def _further(wanted: BuildFilter) -> list[ColumnElement[bool]]:
    """The conditions that no index serves."""
    conditions: list[ColumnElement[bool]] = [
        models.builds.c[name] == getattr(wanted, name)
        for name in ("workflow", "state", "conclusion")
        if getattr(wanted, name) is not None
    ]
    if wanted.branch is not None:
        conditions.append(_is_branch(wanted.branch, wanted.forks))
    if wanted.since is not None:
        conditions.append(_b.created_at >= wanted.since)
    if wanted.until is not None:
        conditions.append(_b.created_at < wanted.until)
    return conditions


def _is_branch(name: str, forks: bool) -> ColumnElement[bool]:
    """Whether it is a build of this branch, or (`forks`) of a fork's branch of that name."""
    own: ColumnElement[bool] = _b.branch == name
    of_fork = _b.is_fork & _b.branch.endswith(f":{name}", autoescape=True)
    return or_(own, of_fork) if forks else own


def attempts(connection: Connection, build: Row, after: int, most: int) -> list[Row]:
    """Attempts of a build above number `after`, in order; the current one, the build itself, is last."""
    superseded = connection.execute(
        select(models.attempts)
        .where(_a.build == build["id"], _a.attempt > after)
        .order_by(_a.attempt)
        .limit(most)
    )
    rows: list[Row] = list(superseded.mappings())
    if len(rows) < most and build["attempt"] > after:
        rows.append(build)
    return rows


def build_events(connection: Connection, build: int, after: int, most: int) -> Sequence[Row]:
    """Events of one build with a global id above `after`, in order."""
    statement = events_of_build(after, most).where(_e.build == build)
    return connection.execute(statement).mappings().all()


def events_of_build(after: int, most: int) -> Select[Any]:
    """The statement behind `build_events`, less the build."""
    return select(models.events).where(_e.id + 0 > after).order_by(_e.sequence).limit(most)


def polled(before: int = LARGEST_ID, most: int = 50) -> Select[Any]:
    """The statement for builds that are being polled, newest first.

    Only open builds have a next poll, and few builds are open: their index, then a sort ("+ 0" keeps
    the planner from walking down all ids instead).
    """
    return (
        select(*_BUILD)
        .where(_b.next_poll_at.is_not(None), _b.polling.in_(("requested", "active")), _b.id + 0 < before)
        .order_by((_b.id + 0).desc())
        .limit(most)
    )


def running_script(connection: Connection, heard_since: datetime) -> Row | None:
    """The newest open build of a build script that was heard of since then."""
    statement = (
        select(*_BUILD)
        .where(
            _b.next_poll_at.is_not(None),
            _b.platform == "script",
            _b.state.in_(_OPEN),
            _b.last_push_at >= heard_since,
        )
        .order_by((_b.id + 0).desc())
        .limit(1)
    )
    return connection.execute(statement).mappings().one_or_none()


def reports(connection: Connection, build: int, attempt: int) -> list[Mapping[str, Any]]:
    """What a script told in the first and the newest events of an attempt: `detail` objects, oldest first."""
    of_attempt = select(_e.id).where(_e.build == build, _e.data["attempt"].as_integer() == attempt)
    ends = [
        select(of_attempt.order_by(order).limit(REPORT_EVENTS).subquery().c.id)
        for order in (_e.sequence, _e.sequence.desc())
    ]
    rows = connection.execute(select(_e.data).where(_e.id.in_(union_all(*ends))).order_by(_e.id))
    return [row.data["detail"] for row in rows if "type" in row.data.get("detail", {})]


def note_look(connection: Connection, build: int, now: datetime) -> None:
    """Note that somebody asked how far a build is.  Run by the one writer."""
    connection.execute(update(models.builds).where(_b.id == build).values(watched_at=now))


# ---- events, inbound -------------------------------------------------------------------------


def events(after: int = 0, most: int = 50) -> Select[Any]:
    """The statement for all events after an id, oldest first.

    Nothing is missed between two pages: ids become visible in their order (`db.Write.new_id`).
    """
    return select(models.events).where(_e.id > after).order_by(_e.id).limit(most)


@dataclass(frozen=True, slots=True)
class EventBounds:
    """`oldest`: the id of the oldest event that is kept, if any is; `newest`: the last id given out."""

    oldest: int | None
    newest: int


def event_bounds(connection: Connection) -> EventBounds:
    """What retention still holds; read it before a page of events, so that `newest` is in the page."""
    oldest = select(func.min(_e.id)).scalar_subquery()
    row = connection.execute(select(oldest.label("oldest"), models.counters.c.events)).one()
    return EventBounds(row.oldest, row.events)


def without_gaps(rows: Sequence[Row], after: int) -> Sequence[Row]:
    """The events that follow `after` one by one.

    Ids are given out without holes, so a missing one was deleted by retention.  What a subscriber is still
    to get is kept longer, hence there may be several gaps.
    """
    return [row for place, row in enumerate(rows, 1) if row["id"] == after + place]


_INBOUND = tuple(column for column in _i if column.name not in ("body", "headers", "build", "delivery_key"))


def inbound(
    source: str | None = None, status: str | None = None, before: int = LARGEST_ID, most: int = 50
) -> Select[Any]:
    """The statement for kept deliveries, newest first, without headers and body."""
    conditions: list[ColumnElement[bool]] = [_i.id < before]
    if source is not None:
        conditions.append(_i.source == source)
    if status is not None:
        # Written into the statement: only so can the planner see that the partial index fits.
        conditions.append(_i.status == bindparam("status", status, literal_execute=True))
    return (
        select(*_INBOUND, _b.build_id)
        .outerjoin(models.builds, _i.build == _b.id)
        .where(*conditions)
        .order_by(_i.id.desc())
        .limit(most)
    )


def one_inbound(connection: Connection, inbound_id: int) -> Row | None:
    """One kept delivery with its headers, and its body as stored (zlib)."""
    statement = (
        select(*_INBOUND, _i.headers, _i.body, _b.build_id)
        .outerjoin(models.builds, _i.build == _b.id)
        .where(_i.id == inbound_id)
    )
    return connection.execute(statement).mappings().one_or_none()


# ---- subscribers, deliveries -----------------------------------------------------------------


def subscribers(after: str = "", most: int = 50) -> Select[Any]:
    """The statement for subscribers, by id."""
    return select(models.subscribers).where(_s.id > after).order_by(_s.id).limit(most)


_DELIVERIES = (
    select(
        _m.id.label("message"),
        _m.message_id.label("id"),
        _m.subscriber.label("subscriber_id"),
        _m.event.label("event_id"),
        _m.sequence,
        _m.state,
        _m.attempts.label("attempt_count"),
        _m.due_at,
        _m.claim,
        _m.build,
        _m.reason,
        _m.created_at,
        _m.settled_at,
        _e.type,
        _b.build_id,
        _s.state.label("subscriber_state"),
    )
    .join(models.events, _m.event == _e.id)
    .join(models.subscribers, _m.subscriber == _s.id)
    .outerjoin(models.builds, _m.build == _b.id)
)


def deliveries(
    subscriber: str, state: str | None = None, before: int = LARGEST_ID, most: int = 50
) -> Select[Any]:
    """The statement for a subscriber's messages, newest event first: the unique index has that order."""
    conditions = [_m.subscriber == subscriber, _m.event < before]
    if state is not None:
        conditions.append(_m.state + "" == state)  # never along the index of what is pending: it would sort
    return _DELIVERIES.where(*conditions).order_by(_m.event.desc()).limit(most)


def dead_letters(
    subscriber: str | None = None,
    reason: str | None = None,
    before: tuple[str, int] | None = None,
    most: int = 50,
) -> Select[Any]:
    """The statement for dead messages, by subscriber downwards, the newest first: the index has that order.

    `before`: subscriber and row id (`message`) of the last one shown.
    """
    # Written into the statement: only so can the planner see that the partial index fits.
    dead = _m.state == bindparam("dead", "dead", literal_execute=True)
    conditions: list[ColumnElement[bool]] = [dead]
    if subscriber is not None:
        conditions += [_m.subscriber == subscriber, _m.id < (before[1] if before else LARGEST_ID)]
    elif before is not None:
        conditions.append(tuple_(_m.subscriber, _m.id) < before)
    if reason is not None:
        conditions.append(_m.reason == reason)
    return _DELIVERIES.where(*conditions).order_by(_m.subscriber.desc(), _m.id.desc()).limit(most)


def delivery(connection: Connection, message_id: str) -> Row | None:
    """One message; `message` is its row id."""
    if "\0" in message_id:
        return None
    return connection.execute(_DELIVERIES.where(_m.message_id == message_id)).mappings().one_or_none()


def delivery_attempts(connection: Connection, message: int, most: int) -> Sequence[Row]:
    """The tries of a message as they began; a redrive numbers anew."""
    columns = models.delivery_attempts.c
    statement = (
        select(models.delivery_attempts)
        .where(columns.message == message)
        .order_by(columns.started_at, columns.id)
        .limit(most)
    )
    return connection.execute(statement).mappings().all()


# ---- notices ---------------------------------------------------------------------------------


def notices(before: int = LARGEST_ID, most: int = 50) -> Select[Any]:
    """The statement for what admins are told, newest first."""
    columns = models.notices.c
    return select(models.notices).where(columns.id < before).order_by(columns.id.desc()).limit(most)


def read_notice(connection: Connection, notice_id: int, now: datetime) -> Row | None:
    """Note that a notice was read, unless it was before; the notice.  Run in a write transaction."""
    columns = models.notices.c
    connection.execute(
        update(models.notices).where(columns.id == notice_id, columns.read_at.is_(None)).values(read_at=now)
    )
    return connection.execute(select(models.notices).where(columns.id == notice_id)).mappings().one_or_none()


# ---- budgets ---------------------------------------------------------------------------------


def budgets(connection: Connection) -> dict[str, Row]:
    """What is left to ask of each source that is polled, by its name."""
    rows = connection.execute(select(models.budgets)).mappings()
    return {name: row for row in rows for name in row["sources"]}


def forecast(budget: Row, now: datetime) -> int | None:
    """What will be left at the reset at the present pace; None: no reset is known to come."""
    reset_at, remaining = budget["reset_at"], budget["remaining"]
    if reset_at is None or reset_at <= now or remaining is None:
        return None
    return max(int(remaining - budget["per_hour"] * (reset_at - now).total_seconds() / 3600), 0)


MOST_FAILING = 50


def failing_repositories(connection: Connection) -> Mapping[str, Sequence[Row]]:
    """By source the repositories whose lists fail, those that do so for the longest first."""
    p = models.places.c
    statement = (
        select(p.source, p.repository, p.error, p.failing_since, p.failures.label("errors_in_row"))
        .where(p.failing_since.is_not(None))
        .order_by(p.failing_since, p.repository)
    )
    found: dict[str, list[Row]] = {}
    for row in connection.execute(statement).mappings():
        found.setdefault(row["source"], []).append(row)
    return {source: rows[:MOST_FAILING] for source, rows in found.items()}


def behind(connection: Connection, names: Collection[str]) -> dict[str, datetime]:
    """Since when the stalest build of each of these sources is due; a time to come: none is."""
    rows = connection.execute(
        select(_b.source, func.min(_b.next_poll_at).label("since"))
        .where(_b.next_poll_at.is_not(None), _b.source.in_(list(names)))
        .group_by(_b.source)
    )
    return {row.source: row.since for row in rows}
