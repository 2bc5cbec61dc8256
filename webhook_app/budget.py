"""What a token may still ask, and how long a source is left alone.

A *lane* is one token with one platform: whatever reads with it, in whatever process, shares one row of
`budgets`.  Whoever owns the lane for the moment is the only one to read states with it, so no repository is
read twice at once.  What else is asked (`account`) is charged to it one by one.  The reckoning is pure:

* `credit`: requests that cost budget and may be made at once.  It grows so that what is left of the hour,
  less a reserve for releases and people, lasts until the reset; a burst is allowed.
* `turns`: requests of any kind, for limits that count an unchanged answer (304) as well.
* `price`: the share of requests that cost budget lately; so many more may be sent than there is credit.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, insert, select, update

from webhook_app import credentials, health, models, platforms, workers
from webhook_app.db import Write
from webhook_app.platforms import Limits, Manners, PollError, PollFault
from webhook_app.settings import SourceSettings

RATE_LIMIT_SECONDS = 60.0
UNAUTHORIZED_SECONDS = 300.0
MOST_PAUSE_SECONDS = 86_400.0

BURST_SHARE = 0.02
LEAST_BURST = 10.0
LEAST_PRICE = 0.02
PRICE_WEIGHT = 0.01
LATELY_SECONDS = 600.0
PLENTY = 1000
TURNS_BURST_SECONDS = 1.0
"""What is due together is spread by so little room for a burst, and then stays spread."""
LEAST_WAIT_SECONDS = 1.0


# ---- the reckoning (pure) ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a lane may ask, as reckoned at `reckoned_at`.

    `limit`, `remaining`, `reset_at`: as the platform told them last; None: it tells nothing.
    `per_hour`: requests that cost budget, at the pace of the last ten minutes.  `strikes`: limits hit in a
    row.  `requests`, `counted`: made ever, and those that cost budget.
    """

    reckoned_at: datetime
    limit: int | None = None
    remaining: int | None = None
    reset_at: datetime | None = None
    credit: float = LEAST_BURST
    turns: float = 10.0
    price: float = 1.0
    per_hour: float = 0.0
    strikes: int = 0
    requests: int = 0
    counted: int = 0


@dataclass(frozen=True, slots=True)
class Spent:
    """Requests made, those of them that cost budget, and what the last answer told of the limits."""

    requests: int = 0
    counted: int = 0
    limits: Limits | None = None


def reckoned(ledger: Ledger, now: datetime, manners: Manners, reserve: float) -> Ledger:
    """The ledger at `now`: a window that is over begins anew, credit and turns have grown meanwhile."""
    if ledger.reset_at is not None and ledger.reset_at <= now:
        ledger = replace(ledger, limit=None, remaining=None, reset_at=None)
    seconds = max((now - ledger.reckoned_at).total_seconds(), 0.0)
    turns = min(ledger.turns + seconds * manners.per_minute / 60, _most_turns(manners))
    credit = min(ledger.credit + seconds * _rate(ledger, now, reserve), _most_credit(ledger, reserve))
    per_hour = ledger.per_hour * math.exp(-seconds / LATELY_SECONDS)
    return replace(ledger, reckoned_at=now, turns=turns, credit=credit, per_hour=per_hour)


def _most_turns(manners: Manners) -> float:
    return manners.per_minute / 60 * TURNS_BURST_SECONDS


def _spare(ledger: Ledger, reserve: float) -> float:
    """What is left of the window for polling; `reserve` is a share of the limit (0 to 1)."""
    assert ledger.limit is not None
    assert ledger.remaining is not None
    return max(ledger.remaining - ledger.limit * reserve, 0.0)


def _rate(ledger: Ledger, now: datetime, reserve: float) -> float:
    """Requests a second that cost budget and can be kept up until the reset."""
    if ledger.reset_at is None or ledger.limit is None:
        return LEAST_BURST
    return _spare(ledger, reserve) / max((ledger.reset_at - now).total_seconds(), 1.0)


def _most_credit(ledger: Ledger, reserve: float) -> float:
    if ledger.limit is None:
        return LEAST_BURST
    return min(max(ledger.limit * BURST_SHARE, LEAST_BURST), _spare(ledger, reserve))


def allowance(ledger: Ledger) -> int:
    """How many requests may be made now."""
    if ledger.limit is None:
        return max(int(ledger.turns), 0)
    return max(int(min(ledger.turns, ledger.credit / max(ledger.price, LEAST_PRICE))), 0)


def wait_seconds(ledger: Ledger, now: datetime, manners: Manners, reserve: float) -> float:
    """Seconds until one request may be made."""
    waits = [LEAST_WAIT_SECONDS, (1 - ledger.turns) / (manners.per_minute / 60)]
    if ledger.limit is not None and ledger.reset_at is not None:
        until_reset = (ledger.reset_at - now).total_seconds()
        rate = _rate(ledger, now, reserve)
        lacking = max(ledger.price, LEAST_PRICE) - ledger.credit
        waits.append(min(lacking / rate, until_reset) if rate else until_reset)
    return max(waits)


def charged(ledger: Ledger, spent: Spent, now: datetime) -> Ledger:
    """The ledger after these requests."""
    if not spent.requests:
        return ledger
    fade = (1 - PRICE_WEIGHT) ** spent.requests
    told = spent.limits
    credit = ledger.credit
    if (
        told and ledger.limit is None
    ):  # a window we know nothing of yet: as much as is left of it, in proportion
        credit = max(credit, told.remaining * BURST_SHARE)
    return replace(
        ledger,
        credit=credit - spent.counted,
        turns=ledger.turns - spent.requests,
        price=ledger.price * fade + spent.counted / spent.requests * (1 - fade),
        per_hour=ledger.per_hour + spent.counted * 3600 / LATELY_SECONDS,
        requests=ledger.requests + spent.requests,
        counted=ledger.counted + spent.counted,
        limit=told.limit if told else ledger.limit,
        remaining=told.remaining if told else ledger.remaining,
        reset_at=now + timedelta(seconds=told.reset_seconds) if told else ledger.reset_at,
    )


def struck(ledger: Ledger, faults: Iterable[PollError], *, worked: bool) -> Ledger:
    """Count limits that were hit in a row; a read that worked begins anew."""
    if any(fault.fault is PollFault.RATE_LIMITED for fault in faults):
        return replace(ledger, strikes=ledger.strikes + 1)
    return replace(ledger, strikes=0) if worked else ledger


def is_rich(ledger: Ledger, reserve: float) -> bool:
    """Is so much left that what is merely nice to know may be asked as well?"""
    return ledger.limit is None or ledger.credit >= _most_credit(ledger, reserve) / 2 > 1


def has_plenty(ledger: Ledger, reserve: float) -> bool:
    """Is it rich by far, so that the same may be asked again and again?"""
    return is_rich(ledger, reserve) and (ledger.limit is None or ledger.limit >= PLENTY)


# ---- the lane, stored ----------------------------------------------------------------------------

_l = models.budgets.c
_LEDGER = [entry.name for entry in fields(Ledger)]

_TURN = "turn:"
"""How the owners of single turns are named; all others own whole rounds."""
WANTED = timedelta(seconds=1)
"""Whoever waits for a lane says so again within this time, or is forgotten."""

Row = Mapping[Any, Any]


@dataclass(frozen=True, slots=True)
class Lane:
    """A token (`credentials.lane`), what its platform asks of readers, the share (0 to 1) kept for people."""

    name: str
    manners: Manners
    reserve: float


def lane_of(settings: SourceSettings, reserve: float) -> Lane:
    """The lane that a source is read in."""
    manners = platforms.polled()[settings.source.platform].MANNERS
    return Lane(credentials.lane(settings), manners, reserve)


def _row(connection: Connection, lane: Lane) -> Row | None:
    found = select(models.budgets).where(_l.lane == lane.name)
    return connection.execute(found).mappings().one_or_none()


def _ledger(row: Row) -> Ledger:
    return Ledger(**{name: row[name] for name in _LEDGER})


def _reckoned(row: Row, lane: Lane, now: datetime) -> Ledger:
    return reckoned(_ledger(row), now, lane.manners, lane.reserve)


def take(
    write: Write, lane: Lane, sources: Sequence[str], owner: str, until: datetime, now: datetime
) -> Ledger | None:
    """Own the lane until then, dead or alive; None while somebody else owns it, or waits for it.

    Who is refused by the owner of a single turn, or by one who waits, is the next to get it.
    """
    row = open_lane(write, lane, sources, now)
    if _is_owned(row, owner, now) or _is_wanted(row, owner, now):
        if not _is_wanted(row, owner, now) and (_is_turn(row["owner"]) or _is_turn(owner)):
            _store(write, lane, wanted_by=owner, wanted_until=now + WANTED)
        return None
    taken = _reckoned(row, lane, now)
    own = {"owner": owner, "owned_until": until, "wanted_by": None, "wanted_until": None}
    own |= {} if _is_turn(owner) else {"sources": sorted(sources)}
    _store(write, lane, **asdict(taken), **own)
    return taken


def open_lane(write: Write, lane: Lane, sources: Sequence[str], now: datetime) -> Row:
    """The row of the lane; a new one if nobody has asked in it yet."""
    row = _row(write.connection, lane)
    if row is not None:
        return row
    blank = {"lane": lane.name, "sources": sorted(sources)} | asdict(Ledger(now))
    write.connection.execute(insert(models.budgets), blank)
    return blank | dict.fromkeys(("owner", "owned_until", "wanted_by", "wanted_until"))


def _store(write: Write, lane: Lane, **values: object) -> None:
    write.connection.execute(update(models.budgets).where(_l.lane == lane.name).values(values))


def _is_owned(row: Row, owner: str, now: datetime) -> bool:
    return row["owner"] not in (None, owner) and bool(row["owned_until"] > now)


def _is_wanted(row: Row, owner: str, now: datetime) -> bool:
    return row["wanted_by"] not in (None, owner) and bool(row["wanted_until"] > now)


def turn_owner() -> str:
    """A name for who makes one request."""
    return _TURN + workers.token()


def _is_turn(owner: str | None) -> bool:
    return (owner or "").startswith(_TURN)


def is_brief(connection: Connection, lane: Lane, now: datetime) -> bool:
    """Is the lane owned, or waited for, to make a single request?"""
    row = _row(connection, lane)
    return row is not None and (_is_turn(row["owner"]) or _is_wanted(row, "", now))


def settle(
    write: Write, lane: Lane, owner: str, spent: Spent, now: datetime, faults: Sequence[PollError] = (),
    *, worked: bool,
) -> Ledger:  # fmt: skip
    """Charge what was spent, beside what others spent meanwhile; give the lane back if it is still ours."""
    row = _row(write.connection, lane)
    assert row is not None, "a lane that was taken has a row"
    before = _ledger(row) if row["owner"] else _reckoned(row, lane, now)
    after = struck(charged(before, spent, now), faults, worked=worked)
    _store(write, lane, **asdict(after))
    give_back(write, lane, owner)
    return after


def give_back(write: Write, lane: Lane, owner: str) -> None:
    """Let others have the lane, if it is still ours."""
    mine = (_l.lane == lane.name, _l.owner == owner)
    write.connection.execute(update(models.budgets).where(*mine).values(owner=None, owned_until=None))


def has_room(connection: Connection, settings: SourceSettings, reserve: float, now: datetime) -> bool:
    """Is there budget that reading states does not need?"""
    lane = lane_of(settings, reserve)
    row = _row(connection, lane)
    return row is None or is_rich(_reckoned(row, lane, now), reserve)


# ---- pauses of a source --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pause:
    """A source that is not to be polled until then; `reason` is a `PollFault` word."""

    source: str
    until: datetime
    reason: str
    message: str


def pause_for(source: str, fault: PollError, now: datetime, strikes: int = 0) -> Pause | None:
    """The pause a fault calls for, by the platform's measure or our own; None if it calls for none.

    Where the platform does not say how long, each limit hit in a row doubles our own measure.
    """
    own = {
        PollFault.RATE_LIMITED: RATE_LIMIT_SECONDS * 2 ** min(strikes, 10),
        PollFault.UNAUTHORIZED: UNAUTHORIZED_SECONDS,
    }
    if fault.fault not in own:
        return None
    seconds = min(fault.retry_after_seconds or own[fault.fault], MOST_PAUSE_SECONDS)
    return Pause(source, now + timedelta(seconds=seconds), fault.fault.value, str(fault))


def pauses_for(faults: Iterable[tuple[str, PollError]], now: datetime, strikes: int = 0) -> list[Pause]:
    """The pauses that the faults of several reads call for: the longest one for each source."""
    found: dict[str, Pause] = {}
    for source, fault in faults:
        pause = pause_for(source, fault, now, strikes)
        if pause and (source not in found or pause.until > found[source].until):
            found[source] = pause
    return list(found.values())


def paused(connection: Connection, now: datetime) -> dict[str, datetime]:
    """The sources that are to be left alone now, and until when."""
    columns = models.sources.c
    found = connection.execute(select(columns.name, columns.paused_until).where(columns.paused_until > now))
    return {row.name: row.paused_until for row in found}


def limited_until(connection: Connection, source: str, now: datetime) -> datetime | None:
    """Until when a limit of the source has to be waited for; None: there is none."""
    columns = models.sources.c
    found = select(columns.paused_until).where(
        columns.name == source,
        columns.paused_until > now,
        columns.pause_reason == PollFault.RATE_LIMITED.value,
    )
    until: datetime | None = connection.execute(found).scalar()
    return until


def apply(write: Write, pause: Pause, now: datetime) -> None:
    """Store the pause, never cutting a longer one short; tell admins once that a token is refused."""
    columns = models.sources.c
    before = write.connection.execute(
        select(columns.paused_until, columns.pause_reason).where(columns.name == pause.source)
    ).one_or_none()
    until = max(pause.until, before.paused_until or pause.until) if before else pause.until
    paused = {"name": pause.source, "paused_until": until, "pause_reason": pause.reason}
    health.upsert(write.connection, models.sources, [paused])
    told = before is not None and before.pause_reason == pause.reason
    if pause.reason == PollFault.UNAUTHORIZED.value and not told:
        text = f"{pause.source} refuses our token: {pause.message}"
        health.tell(write.connection, "source.unauthorized", pause.source, text, now)


def clear(write: Write, source: str, now: datetime) -> None:
    """Forget a pause that is over after a read that worked; one that still holds was told to another read."""
    columns = models.sources.c
    write.connection.execute(
        update(models.sources)
        .where(columns.name == source, columns.paused_until <= now)
        .values(paused_until=None, pause_reason=None)
    )


def note(
    write: Write, worked: Set[str], faults: Sequence[tuple[str, PollError]], now: datetime, strikes: int = 0
) -> None:
    """Store what a batch of reads told of their sources: `worked`, or (source, fault)."""
    for source in worked - {source for source, _ in faults}:
        clear(write, source, now)
    for pause in pauses_for(faults, now, strikes):
        apply(write, pause, now)
