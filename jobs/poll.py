"""The polling jobs: `poll` reads what is due, `discover` says where to look for builds nobody told of.

One round of a lane (a token, see `webhook_app.budget`): own it, take the stalest places the allowance covers,
read them, record what they told in one transaction and give the lane back.  Lanes go side by side; a tick
that comes twice, late, or beside another finds the lane owned, or nothing due.
"""

import logging
import random
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from jobs.resources import Resources, resources
from jobs.schedule import ring_at
from pollers import adaptive, client, discovery, repository, stale, troubles
from pollers.adaptive import Trust
from pollers.client import Client, Purse
from pollers.repository import Findings, Terms
from pollers.stale import Place
from webhook_app import api_health, budget, builds, clock, credentials, db, loglines, queues, workers
from webhook_app.budget import Ledger, Spent
from webhook_app.credentials import Keyring
from webhook_app.platforms import Manners, PollError, PollFault, Source
from webhook_app.settings import SourceSettings
from webhook_app.times import utc_now

log = logging.getLogger(__name__)

LONGEST_DRAIN_SECONDS = 10.0
"""Then the other jobs of this worker get their turn, and what is due brings us back."""

ROUND_SECONDS = 5.0
"""No read of a round begins later than this after its first."""

PLACES_AT_ONCE = 64
PUSHED_WELL = 0.5
LEASE_MARGIN_SECONDS = 10.0
REFUSED_LIST_WAIT = timedelta(minutes=5)
"""A list that is refused while its source works is not asked for before."""
TURN_SECONDS, LOOK_SECONDS = 3.0, 0.05
"""So long a round waits for a single request of somebody else to end, looking so often."""
SOON = timedelta(minutes=1)


def poll(held: Resources | None = None) -> None:
    """Read every build and list that is due, as the budgets allow, and ask to be woken for the next.

    `held`: what to work with; None (as a worker calls it) takes this process's own.
    """
    held = held or resources()
    queues.answer(held.redis, queues.POLL)
    clock.mind(held.engine, held.steps, utc_now(), held.pace.heartbeat_timeout_seconds)
    lanes = _lanes(held)
    failures = _drain(lanes)
    _come_back(held, lanes)
    if failures:
        raise ExceptionGroup("rounds that failed", failures)


def discover(held: Resources | None = None) -> None:
    """Note which repositories are to be listed, those with a build lately among them, and wake the polling.

    `held` as for `poll`.
    """
    held = held or resources()
    queues.answer(held.redis, queues.DISCOVER)
    sources = {name: source for name, source in held.settings.sources.items() if source.can_poll}
    db.as_writer(held.engine, lambda write: discovery.note_places(write, sources, utc_now()))
    queues.Bell(held.redis).ring(queues.POLL)


@dataclass(slots=True)
class _Lane:
    """One token, the sources that are read with it, and who we are to others who want it.

    `tokens`: what it is for now, where it is a lent one: never shown.
    """

    held: Resources
    name: str
    sources: dict[str, SourceSettings]
    owner: str = field(default_factory=workers.token)
    ready_at: datetime | None = None
    trust: dict[str, Trust] = field(default_factory=dict)
    has_plenty: bool = False
    tokens: set[str] = field(default_factory=set)

    @property
    def budget(self) -> budget.Lane:
        return budget.lane_of(next(iter(self.sources.values())), self.held.settings.api_budget_reserve)

    @property
    def manners(self) -> Manners:
        return self.budget.manners

    @property
    def lease(self) -> timedelta:
        """Longer than a round can take, its slowest read included."""
        slowest = max(source.timeout_seconds for source in self.sources.values())
        return timedelta(seconds=ROUND_SECONDS + slowest + LEASE_MARGIN_SECONDS)


def _lanes(held: Resources) -> list[_Lane]:
    found: dict[str, _Lane] = {}
    for name, source in held.settings.sources.items():
        if source.can_poll:
            lane = credentials.lane(source)
            found.setdefault(lane, _Lane(held, lane, {})).sources[name] = source
    return list(found.values())


def _come_back(held: Resources, lanes: Sequence[_Lane]) -> None:
    """Ticks alone would find a build that was just polled one tick late, each time."""
    now = utc_now()
    with db.reading(held.engine) as connection:
        paused = budget.paused(connection, now)
        due = [
            _next_turn(stale.next_due(connection, set(lane.sources) - set(paused)), lane) for lane in lanes
        ]
    first = min([moment for moment in [*due, *paused.values()] if moment is not None], default=None)
    if first is not None and first < now + SOON:
        ring_at(held.redis, queues.POLL, first)


def _next_turn(due: datetime | None, lane: _Lane) -> datetime | None:
    return max(due, lane.ready_at) if due and lane.ready_at else due


def _drain(lanes: Sequence[_Lane]) -> list[Exception]:
    """Round after round in each lane, until none has anything it may read or the time is up.

    A lane that fails for a reason of ours holds up no other; what failed is returned.
    """
    until, failures = time.monotonic() + LONGEST_DRAIN_SECONDS, []
    with ThreadPoolExecutor(max(len(lanes), 1), thread_name_prefix="lane") as threads:
        running: dict[Future[bool], _Lane] = {threads.submit(_round, lane): lane for lane in lanes}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                lane = running.pop(future)
                failure = future.exception()
                if isinstance(failure, Exception):
                    failures.append(failure)
                elif future.result() and time.monotonic() < until and not lane.held.desk.closing:
                    running[threads.submit(_round, lane)] = lane
    return failures


# ---- one round -----------------------------------------------------------------------------------


def _round(lane: _Lane) -> bool:
    """One round; was anything read, so that another may find more?"""
    begun = _begin(lane)
    if begun is None:
        return False
    ledger, places = begun
    over_at = time.monotonic() + ROUND_SECONDS
    purse = Purse(budget.allowance(ledger), lambda: time.monotonic() < over_at and not lane.held.desk.closing)
    findings = _read(lane, places, purse) if places else []
    findings = _masked(lane, findings)
    _count_unreadable(purse, findings)
    events = _finish(lane, ledger, findings, purse)
    _log_round(lane, findings, purse.spent, events)
    if events:
        queues.Bell(lane.held.redis).ring(queues.DELIVER)
    return bool(purse.spent.requests)


def _begin(lane: _Lane) -> tuple[Ledger, list[Place]] | None:
    """Own the lane and take what may be read now; None while somebody else owns it.

    A single request beside the polling is waited for, if it does not take long.
    """
    until = time.monotonic() + TURN_SECONDS
    while True:
        begun = db.as_writer(lane.held.engine, lambda write: _take(write, lane))
        if begun is not None or not _is_brief(lane) or time.monotonic() > until:
            return begun
        time.sleep(LOOK_SECONDS)


def _is_brief(lane: _Lane) -> bool:
    with db.reading(lane.held.engine) as connection:
        return budget.is_brief(connection, lane.budget, utc_now())


def _take(write: db.Write, lane: _Lane) -> tuple[Ledger, list[Place]] | None:
    now = utc_now()
    ledger = budget.take(write, lane.budget, list(lane.sources), lane.owner, now + lane.lease, now)
    if ledger is None:
        return None
    lane.has_plenty = budget.has_plenty(ledger, lane.budget.reserve)
    paused = budget.paused(write.connection, now)
    awake = {name: source for name, source in lane.sources.items() if name not in paused}
    most = min(budget.allowance(ledger), PLACES_AT_ONCE)
    places = stale.work(write.connection, awake, now, most) if awake and most else []
    lane.trust = adaptive.trust(write.connection, awake, now) if places else {}
    if lane.held.settings.adaptive_pace:
        interval = lane.held.pace.interval_seconds
        places = adaptive.ease(write, places, lane.trust, interval, now)
    return ledger, places


def _read(lane: _Lane, places: Sequence[Place], purse: Purse) -> list[Findings]:
    """Read the places, as many at once as the platform likes; nothing more of a source that is in trouble."""
    keyring = Keyring(lane.held.engine, lane.held.settings.encryption_keys)
    clients: dict[str, Client | PollError] = {}
    for name in {place.source for place in places}:
        try:
            clients[name] = _client(lane, lane.sources[name], keyring, purse)
        except PollError as fault:
            clients[name] = fault
            purse.measured.errors[name, fault.fault] += 1
    troubled: set[str] = set()

    def one(place: Place) -> Findings:
        at = clients[place.source]
        if isinstance(at, PollError):
            return Findings(place, fault=at)
        if place.source in troubled:
            return Findings(place)
        found = repository.read(at, place, _terms(lane, place.source))
        if found.fault is not None:
            troubled.add(place.source)
        return found

    if lane.manners.at_once == 1:
        return [one(place) for place in places]
    with ThreadPoolExecutor(lane.manners.at_once, thread_name_prefix="read") as threads:
        return list(threads.map(one, places))


def _client(lane: _Lane, of: SourceSettings, keyring: Keyring, purse: Purse) -> Client:
    source = keyring.source(of, utc_now())
    lane.tokens.add(source.token)

    def renew(refused: Source) -> Source | None:
        renewed = keyring.refreshed(of, refused, utc_now())
        lane.tokens |= {renewed.token} if renewed else set()
        return renewed

    return Client(lane.held.engine, lane.name, of, source, purse, renew)


def _terms(lane: _Lane, source: str) -> Terms:
    """A new build is left to its push for a moment, where most are pushed."""
    freshness = lane.held.settings.push_freshness_seconds
    is_pushed = (lane.trust.get(source, Trust()).share or 0.0) >= PUSHED_WELL
    grace = min(freshness, discovery.GRACE_SECONDS) if is_pushed else 0.0
    now = utc_now()
    return Terms(now, now, freshness, grace, jobs=lane.has_plenty)


def _masked(lane: _Lane, findings: list[Findings]) -> list[Findings]:
    """The findings without secrets: what a platform or the network says is stored and shown."""
    mask = lane.held.redact.also(lane.tokens)
    return [troubles.masked(found, mask) for found in findings]


def _count_unreadable(purse: Purse, findings: Sequence[Findings]) -> None:
    """Count answers that could not be read where they were read; all other errors show in the answer."""
    counted = purse.measured.errors
    for source, kind in list(counted):
        if kind is PollFault.UNREADABLE:
            del counted[source, kind]
    for found in findings:
        unreadable = sum(error.fault is PollFault.UNREADABLE for error in troubles.errors(found))
        if unreadable:
            counted[found.place.source, PollFault.UNREADABLE] += unreadable


def _log_round(lane: _Lane, findings: Sequence[Findings], spent: Spent, events: int) -> None:
    """One line for a round that asked anything: a warning with the gravest error, if there was one."""
    errors = [(found, error) for found in findings for error in troubles.errors(found)]
    if not spent.requests and not errors:
        return
    fields = {
        "lane": lane.name, "places": len(findings), "requests": spent.requests, "counted": spent.counted,
        "facts": sum(len(one.facts) for one in findings), "events": events,
    }  # fmt: skip
    worst = troubles.gravest(error for _, error in errors)
    if worst is None or worst.fault is PollFault.NOT_FOUND:
        loglines.event(log, "polled", **fields)
        return
    place = next(found.place for found, error in errors if error is worst)
    loglines.warning(
        log, "polled", **fields, errors=len(errors), source=place.source,
        repository=place.repositories[0] or None, kind=worst.fault.value, error=str(worst),
    )  # fmt: skip


def _finish(lane: _Lane, ledger: Ledger, findings: Sequence[Findings], purse: Purse) -> int:
    """Record a round in one transaction and give the lane back; how many events it made."""
    facts = [fact for found in findings for fact in found.facts]
    faults = [(found.place.source, found.fault) for found in findings if found.fault]
    worked = {found.place.source for found in findings if found.worked}
    brought = troubles.rounds(findings)

    def unit(write: db.Write) -> int:
        now = utc_now()
        outcomes = builds.record(write, facts, now, lane.held.pace)
        client.keep(write, lane.name, [tag for found in findings for tag in found.tags], now)
        for found in findings:
            _note_place(write, lane, found, now)
            troubles.note_list(write, found, now, source_works=found.place.source in worked)
        purse.measured.store(write.connection)
        for source, one in brought.items():
            api_health.note_round(write.connection, source, one, now)
        budget.note(write, worked, faults, now, ledger.strikes)
        settled = budget.settle(
            write, lane.budget, lane.owner, purse.spent, now, [fault for _, fault in faults],
            worked=bool(worked),
        )  # fmt: skip
        wait_seconds = budget.wait_seconds(settled, now, lane.manners, lane.budget.reserve)
        lane.ready_at = now + timedelta(seconds=wait_seconds)
        return sum(outcome.events for outcome in outcomes)

    return db.as_writer(lane.held.engine, unit)


def _note_place(write: db.Write, lane: _Lane, found: Findings, now: datetime) -> None:
    """What the read of a place says about the place itself: when it is listed next, its other names."""
    source = found.place.source
    if found.listed:
        next_at = _next_list(lane, now, _stretch(write, lane, found.place, now))
        discovery.listed(write, source, found.listed, found.wide, now, next_at)
    if found.away:
        discovery.postpone(write, source, found.place.repositories, _next_list(lane, now))
    if found.refused is not None:
        soon = _next_list(lane, now)
        failing = api_health.had_failed_round(write.connection, source)  # a list may show that it is back
        again = soon if failing else max(soon, now + REFUSED_LIST_WAIT)
        discovery.failed(write, source, found.place.repositories, found.refused, again)
    for name, told in found.aliases.items():
        discovery.note_alias(write, source, name, told, now)
    for name, why in found.hidden.items():
        discovery.tell_hidden(write, source, name, why, now)


def _stretch(write: db.Write, lane: _Lane, place: Place, now: datetime) -> int:
    """How many times more slowly than usual a place is listed."""
    if not lane.held.settings.adaptive_pace:
        return 1
    known = adaptive.trust(write.connection, [place.source], now).get(place.source, Trust())
    return 1 if known.missed & set(place.repositories) else known.list_stretch


def _next_list(lane: _Lane, now: datetime, stretch: int = 1) -> datetime:
    settings = lane.held.settings
    jitter = random.uniform(0, settings.discovery_jitter_seconds)  # noqa: S311  spreads load, guards nothing
    return now + timedelta(seconds=settings.discovery_interval_seconds + jitter) * stretch
