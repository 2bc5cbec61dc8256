"""The builds of a repository, read together: one list, and single reads only for what it does not show.

Nothing here raises for what a platform or the network does: every fault becomes a fact about builds, or
the fault of the source that says how long to leave it alone.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from pollers import discovery
from pollers.client import Client, Make, OverBudget, Seen, Tag
from pollers.stale import Due, Place
from webhook_app import db, polling
from webhook_app.builds import Fact, PollFailed, Unchanged
from webhook_app.lifecycle import Conclusion, Observation, ObservedBy, State
from webhook_app.platforms import Listing, PollError, PollFault, PollTarget, Request, Source
from webhook_app.times import http_date

log = logging.getLogger(__name__)

FEW, MANY = 30, 100
"""Builds on a page of a list: a full page is more than a megabyte, another length is another ETag."""

TOO_NARROW, TOO_WIDE = 3, 20
"""So many due builds behind a short page make it long; all of them so near the top make a long one short."""

MOST_PAGES = 10
"""Together a thousand changes since the last list, and fewer requests than a round may make."""
WATCHED_LATELY = timedelta(minutes=2)
"""The jobs of a running build are read while somebody asks how far it is."""

SOURCE_FAULTS = (PollFault.RATE_LIMITED, PollFault.UNAUTHORIZED)
"""The source's trouble, not that of the builds that were asked for."""

Row = Mapping[Any, Any]


@dataclass(slots=True)
class Findings:
    """What the reads of a place brought.

    `listed`: repositories that were listed, with the platform's own time of it.  `refused`: why they could
    not be, while single reads are answered; `away`: why, while none is.  `aliases`: names of theirs that
    the platform writes otherwise.  `wide`: the next list should be a long one.  `hidden`: repositories that
    the platform does not have, or hides from us.
    """

    place: Place
    facts: list[Fact] = field(default_factory=list)
    tags: list[Tag] = field(default_factory=list)
    listed: dict[str, datetime | None] = field(default_factory=dict)
    refused: str | None = None
    away: PollError | None = None
    wide: bool = False
    aliases: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    fault: PollError | None = None

    @property
    def worked(self) -> bool:
        """Did the source answer?"""
        return self.fault is None and bool(
            self.listed or any(isinstance(fact, Observation | Unchanged) for fact in self.facts)
        )


@dataclass(frozen=True, slots=True)
class Terms:
    """When a push counts as recent (our clock), and how long a new build's may be under way (the platform's).

    `jobs`: is there budget to read the jobs of builds that somebody watches?
    """

    now: datetime
    platform_now: datetime
    freshness_seconds: float
    grace_seconds: float
    jobs: bool = False


def read(client: Client, place: Place, terms: Terms) -> Findings:
    """Read what is due at a place, as far as the allowance goes."""
    found = Findings(place, wide=place.wide)
    try:
        rest = _list(client, found, terms) if place.wants_list else place.due
        _read_singly(client, found, rest, terms.now)
        if terms.jobs:
            _add_jobs(client, found, terms.now)
    except OverBudget:
        log.debug("over budget: %s %s", place.source, place.repositories)
    except PollError as fault:
        found.fault = fault
    return found


# ---- lists ---------------------------------------------------------------------------------------


def _list(client: Client, found: Findings, terms: Terms) -> list[Due]:
    """List the place; the builds that have to be read one by one nevertheless."""
    place = found.place
    try:
        seen, listing = _pages(client, found.place)
    except PollError as fault:
        return _list_failed(found, fault)
    if listing is None:
        found.listed = {name: place.clocks.get(name) for name in place.repositories}
        return _answer_unchanged(found, seen)
    with db.reading(client.engine) as connection:
        rows = discovery.known(connection, listing.observations)
    told_at = http_date(seen.answer.headers.get("date", "")) or terms.now
    rest, settled = _sift(client, found, listing, rows, replace(terms, platform_now=told_at))
    found.listed = {
        name: _clock(place, name, listing.observations) if settled else place.clocks.get(name)
        for name in place.repositories
    }
    _note_names(found, listing.observations)
    found.wide = _should_be_wide(place, [seen.key for seen in listing.observations])
    if client.platform.MANNERS.free_unchanged and place.repositories:
        shown = tuple(one.key for one in listing.observations)
        etag = seen.answer.headers.get("etag") if settled else None
        found.tags.append(Tag(seen.url, seen.token, etag, shown))
    return rest


def _pages(client: Client, place: Place) -> tuple[Seen, Listing | None]:
    """The list of a place, further pages where each build that changed is shown; None: nothing changed."""
    seen, listing = _first_page(client, place)
    if listing is None or not (client.platform.MANNERS.lists_changes and _since(place)):
        return seen, listing
    if listing.more is not None and not place.wide:
        place.wide = True  # much has changed, as after an absence
        seen, listing = _first_page(client, place)
    pages = 1
    while listing is not None and listing.more is not None and pages < MOST_PAGES:
        following = client.ask(_next(client, place, listing.more))
        further = client.platform.parse_list(client.source, place.repositories, following.answer)
        listing = Listing(listing.observations + further.observations, further.more)
        pages += 1
    return seen, listing


def _first_page(client: Client, place: Place) -> tuple[Seen, Listing | None]:
    platform = client.platform
    seen = client.ask(
        lambda source: _list_request(client, place, source), conditional=platform.MANNERS.free_unchanged
    )
    if seen.unchanged:
        return seen, None
    return seen, platform.parse_list(client.source, place.repositories, seen.answer)


def _next(client: Client, place: Place, more: Request) -> Make:
    """The next page with the token of that moment: it may be another one by then."""

    def make(source: Source) -> Request | None:
        first = _list_request(client, place, source)
        return first and replace(first, url=more.url)

    return make


def _list_request(client: Client, place: Place, source: Source) -> Request | None:
    most = MANY if place.wide else FEW
    return client.platform.list_request(source, place.repositories, _since(place), most)


def _since(place: Place) -> datetime | None:
    """The oldest clock of its lists; None before each of them was listed once."""
    clocks = [place.clocks.get(name) for name in place.repositories]
    return None if None in clocks else min((clock for clock in clocks if clock is not None), default=None)


def _should_be_wide(place: Place, shown: Sequence[str]) -> bool:
    """How long the next list should be, by where this one shows the builds that were due."""
    wanted = {due.target.key for due in place.listable}
    if not place.wide:
        return len(wanted - set(shown)) >= TOO_NARROW
    return bool(wanted - set(shown[:TOO_WIDE]))


def _clock(place: Place, name: str, observations: Sequence[Observation]) -> datetime | None:
    told = [seen.platform_at for seen in observations if seen.platform_at is not None]
    return max([*told, *filter(None, [place.clocks.get(name)])], default=None)


def _list_failed(found: Findings, fault: PollError) -> list[Due]:
    """A list that failed: the source's trouble, everybody's trouble there, or only that of lists."""
    if fault.fault in SOURCE_FAULTS:
        raise fault
    if fault.fault is not PollFault.UNAVAILABLE:
        found.refused = _told(fault)
        return found.place.due
    found.away = fault
    if any(due.row["consecutive_errors"] for due in found.place.due):
        return found.place.due  # is it only lists that are not answered?
    found.facts += [_failed(due, fault) for due in found.place.due]
    return []


def _answer_unchanged(found: Findings, seen: Seen) -> list[Due]:
    """Nothing changed since a list that showed some of the builds: for those it is an answer."""
    shown = {due.target.key for due in found.place.listable} & set(seen.shown or ())
    found.facts += [Unchanged(key) for key in sorted(shown)]
    return [due for due in found.place.due if due.target.key not in shown]


def _sift(
    client: Client, found: Findings, listing: Listing, rows: Mapping[str, Row], terms: Terms
) -> tuple[list[Due], bool]:
    """Take what a list tells; the due builds it leaves open, and whether it holds nothing untold.

    While it shows something that is left to a push under way, or that could not be read to the end, neither
    its ETag nor its time must be kept: the next list would not show it again.
    """
    listable = {due.target.key for due in found.place.listable}
    settled = True
    answered = set()
    for key, seen in {seen.key: seen for seen in listing.observations}.items():
        kind = "due" if key in listable else _kind(rows.get(key), seen, terms)
        if kind in ("due", "news", "again"):
            found.facts.append(fact := _closer(client, seen, again=kind == "again"))
            answered.add(key)
            settled &= not isinstance(fact, PollFailed)
        settled &= kind != "early"
    rest = [due for due in found.place.due if due.target.key not in answered]
    if client.platform.MANNERS.lists_changes and _since(found.place) and listing.more is None:
        silent = [due for due in rest if due.read_before and due.target.key in listable]
        found.facts += [Unchanged(due.target.key) for due in silent]
        rest = [due for due in rest if due not in silent]
    return rest, settled


def _kind(row: Row | None, seen: Observation, terms: Terms) -> str:
    """What a listed build that is not due is to us: `news`, `early` (its push may be on the way) or `old`.

    `again`: it may have been run once more, which only the build itself tells.
    """
    if row is None:
        if not discovery.is_recent(seen, terms.platform_now):
            return "old"
        return "news" if discovery.is_ripe(seen, terms.platform_now, terms.grace_seconds) else "early"
    told = State(row["told_state"])
    if discovery.is_new_use(row, seen):
        return "news"
    if polling.was_given_up(row):
        return "old" if row["polling"] == "stopped" or seen.state is None else "news"
    if told.terminal and discovery.is_untold_rerun(seen, _platform_attempt(row), told):
        return "news"
    if told.terminal:
        return "again" if discovery.may_have_run_again(seen, told, row["platform_at"]) else "old"
    if row["polling"] == "stopped" or not _differs(row, seen):
        return "old"
    if row["next_poll_at"] is None:  # given up: an end that is shown nevertheless is believed
        return "news" if seen.state is not None and seen.state.terminal else "old"
    fresh = row["last_push_at"] and row["last_push_at"] > terms.now - timedelta(
        seconds=terms.freshness_seconds
    )
    return "early" if fresh else "news"


def _platform_attempt(row: Row) -> int:
    return int(row["attempt"] - row["attempt_base"])


def _differs(row: Row, seen: Observation) -> bool:
    """Does it say more than is recorded?  An earlier state of the same attempt says nothing."""
    attempt = _platform_attempt(row)
    if seen.attempt in (None, attempt) and (seen.state or State.QUEUED).rank < State(row["state"]).rank:
        return False
    told = (seen.attempt or attempt, seen.state or row["state"])
    return bool(told != (attempt, row["state"]) or (seen.conclusion or None) != row["conclusion"])


def _closer(client: Client, seen: Observation, *, again: bool = False) -> Fact:
    """A listed build with what a list leaves open; `again`: read by itself."""
    try:
        return complete(client, _by_itself(client, seen) if again else seen)
    except PollError as fault:
        if fault.fault in SOURCE_FAULTS:
            raise
        return PollFailed(seen.key, _told(fault), fault.fault.value)


def _by_itself(client: Client, seen: Observation) -> Observation:
    platform = client.platform
    target = PollTarget(seen.build_id, seen.key, seen.repository, seen.number, seen.attempt or 1, seen.url)
    told = client.ask(lambda source: platform.poll_request(source, target))
    return platform.parse_poll(client.source, target, told.answer)


def _note_names(found: Findings, observations: Iterable[Observation]) -> None:
    """Which of the names we list under does the platform write otherwise?"""
    names = {seen.repository for seen in observations if seen.repository}
    if len(found.place.repositories) == 1 and len(names) == 1:
        (name,), (told,) = found.place.repositories, names
        if name != told:
            found.aliases[name] = told


# ---- single reads --------------------------------------------------------------------------------


def _read_singly(client: Client, found: Findings, rest: Sequence[Due], now: datetime) -> None:
    """Read these builds; after a list without an answer the first one tells whether anything is answered."""
    for place, due in enumerate(rest):
        away = found.away
        try:
            fact = _single(client, found, due, now)
        except OverBudget:
            if away is None:
                raise
            fact = _failed(due, away)
        if away is not None and isinstance(fact, PollFailed) and fact.fault == PollFault.UNAVAILABLE:
            found.facts += [_failed(one, away) for one in rest[place:]]
            return
        if away is not None:
            found.refused, found.away = _told(away), None
        found.facts.append(fact)


def _single(client: Client, found: Findings, due: Due, now: datetime) -> Fact:
    """Read one build; raises only what is the source's trouble, and `OverBudget`."""
    try:
        return _ask(client, found, due)
    except PollError as fault:
        if fault.fault in SOURCE_FAULTS:
            raise
        if fault.fault is PollFault.NOT_FOUND:
            return _not_found(client, found, due, fault, now)
        return _failed(due, fault)


def _ask(client: Client, found: Findings, due: Due) -> Fact:
    platform = client.platform
    free = platform.MANNERS.free_unchanged
    seen = client.ask(
        lambda source: platform.poll_request(source, due.target),
        conditional=free and not (due.doubtful or due.given_up),
    )
    if seen.unchanged:
        return Unchanged(due.target.key)
    told = complete(client, platform.parse_poll(client.source, due.target, seen.answer))
    if free and not told.doubtful:
        found.tags.append(Tag(seen.url, seen.token, _tag_of(seen, told), (due.target.key,)))
    return told


def _tag_of(seen: Seen, told: Observation) -> str | None:
    """The ETag to keep: none of a build that is over, nobody will ask for it again."""
    over = told.state is not None and told.state.terminal
    return None if over else seen.answer.headers.get("etag")


def complete(client: Client, seen: Observation) -> Observation:
    """Ask for what a read left open; raises `PollError`.

    Where our token may not know it, the read counts as it is: otherwise such a build would never end.
    """
    platform = client.platform
    if platform.follow_up(client.source, seen) is None:
        return seen
    try:
        more = client.ask(lambda source: platform.follow_up(source, seen))
        return platform.parse_follow_up(seen, more.answer)
    except PollError as error:
        if error.fault in (PollFault.FORBIDDEN, PollFault.NOT_FOUND):
            return seen
        raise


# ---- jobs of builds that somebody watches --------------------------------------------------------


def _add_jobs(client: Client, found: Findings, now: datetime) -> None:
    """Add the jobs of running builds that somebody watches to what was told of them."""
    watched = {
        due.target.key: due for due in found.place.due if polling.is_watched(due.row, now - WATCHED_LATELY)
    }
    for place, fact in enumerate(found.facts):
        due = watched.get(fact.key)
        seen = _as_recorded(client, due) if due and isinstance(fact, Unchanged) else fact
        if due and isinstance(seen, Observation) and seen.state is State.IN_PROGRESS:
            found.facts[place] = _with_jobs(client, found, due, seen) or fact


def _with_jobs(client: Client, found: Findings, due: Due, seen: Observation) -> Observation | None:
    """The observation with its jobs; None if they can't be had, or did not change."""
    platform = client.platform
    if platform.jobs_request(client.source, due.target) is None:
        return None
    free = platform.MANNERS.free_unchanged
    try:
        told = client.ask(lambda source: platform.jobs_request(source, due.target), conditional=free)
        if told.unchanged:
            return None
        with_jobs = platform.parse_jobs(client.source, seen, told.answer)
        if free:
            found.tags.append(Tag(told.url, told.token, told.answer.headers.get("etag"), ()))
        return with_jobs
    except PollError as fault:
        if fault.fault in SOURCE_FAULTS:
            raise
        return None


def _as_recorded(client: Client, due: Due) -> Observation | None:
    """What is recorded of a build, as the poll that found it unchanged would have told it."""
    named = client.platform.named(client.source, due.target.build_id)
    told = ("raw_status", "waiting", "platform_at", "repository")
    return named and replace(
        named,
        key=due.target.key,
        state=State(due.row["state"]),
        attempt=due.target.platform_attempt,
        **{name: due.row[name] for name in told},
    )


def _told(fault: PollError) -> str:
    return f"{fault.fault.value}: {fault}"


def _failed(due: Due, fault: PollError) -> PollFailed:
    return PollFailed(due.target.key, _told(fault), fault.fault.value)


def _not_found(client: Client, found: Findings, due: Due, fault: PollError, now: datetime) -> Fact:
    """A build the platform does not know.

    One that only a request for polling named fails at once.  One that was seen may just be hidden from
    our token, or the platform has an incident: it fails when this has been so for a while, its repository
    can be read, and its repository's list is without it.
    """
    if due.named_only:
        return _gone(client, due, f"not found on {client.source.name}: {fault}")
    if due.given_up or not due.missing:
        return _failed(due, fault)
    why_not = _unreadable(client, due)
    if why_not is not None:
        found.hidden[due.target.repository or due.target.build_id] = why_not
    if why_not is not None or not polling.is_gone(due.row, now):
        return _failed(due, fault)
    return _listed(client, due) or _gone(client, due, f"deleted on {client.source.name}: {fault}")


def _listed(client: Client, due: Due) -> Fact | None:
    """What the newest list of its repository shows of a build; None: nothing, or no list shows its kind.

    A list that can't be read proves nothing: then the read has failed.
    """
    repository = due.target.repository
    if not repository or due.row["unlisted"]:
        return None
    platform = client.platform
    try:
        seen = client.ask(lambda source: platform.list_request(source, [repository], None, MANY))
        shown = platform.parse_list(client.source, [repository], seen.answer).observations
    except PollError as fault:
        if fault.fault in SOURCE_FAULTS:
            raise
        return _failed(due, fault)
    return next((one for one in shown if one.key == due.target.key), None)


def _unreadable(client: Client, due: Due) -> str | None:
    """Why its repository can't be read; None if it can."""
    platform = client.platform
    try:
        seen = client.ask(lambda source: platform.repository_request(source, due.target))
        platform.parse_repository(seen.answer)
    except PollError as fault:
        if fault.fault in SOURCE_FAULTS:
            raise
        return str(fault)
    return None


def _gone(client: Client, due: Due, why: str) -> Observation:
    return Observation(
        source=client.source.name,
        platform=client.source.platform,
        observed_by=ObservedBy.POLL,
        key=due.target.key,
        build_id=due.target.build_id,
        state=State.FAILED,
        conclusion=Conclusion.FAILURE,
        error=why,
        ours=True,
    )
