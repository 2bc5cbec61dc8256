"""Push health: what pushes told first, what only polls found, and when we could hear nothing at all.

A change of a build that a poll is the first to tell is a missed push of its source, provided that pushes
are expected: the source has a webhook secret, the change is younger than our listening, and the build is
not one that only a request named.  A push that comes for it soon after was late, not missed: it may have
waited anywhere on its way, with us as well.  Everything here is kept in the transaction that records the
facts, most of it in one row per source.
"""

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, bindparam, delete, func, insert, select, text, update
from sqlalchemy.dialects import postgresql, sqlite

from webhook_app import bulk, db, histograms, loglines, models
from webhook_app.lifecycle import Observation, ObservedBy, State
from webhook_app.models import Moment
from webhook_app.times import iso, utc_now

log = logging.getLogger(__name__)

WINDOW = 200
"""`push_share` is the plain share of the first so many changes, then weighs each new one by 1/200."""

DEAF_AFTER = 5
"""Changes in a row that polls were first to tell, without any push between, before pushes count as gone."""

SILENCE = timedelta(seconds=60)
"""Minimum time without any push before pushes count as gone, and minimum time that this state lasts."""

RECOVERED_AFTER = 3
"""Changes that pushes told, with no `DEAF_AFTER` misses in a row between, before pushes count as back."""

NOTICE_PAUSE = timedelta(minutes=5)
"""Minimum time from the notice that pushes are back to the next one that they are gone."""

LATE_WITHIN = timedelta(seconds=60)
"""A push that comes so soon after the poll that told its change was late, not missed."""

MISSES_KEPT = timedelta(hours=1)
"""How long missed changes are kept: what is younger may still be decided by one that was only late."""

RISKY_REFUSALS = 3
"""GitLab mutes a hook after 4 failures in a row.
https://docs.gitlab.com/user/project/integrations/webhooks/#auto-disabled-webhooks"""

ABSENCE = timedelta(seconds=60)
"""Silence of the sweep before a start that counts as an absence: four of its ticks."""


class Told(Protocol):
    """What became of a fact, as `builds.Outcome` has it and tells it."""

    @property
    def build_id(self) -> str | None: ...

    @property
    def unchanged(self) -> bool: ...

    @property
    def moved(self) -> bool: ...

    @property
    def missed(self) -> bool: ...


@dataclass(slots=True)
class _Tally:
    """What a batch of facts says of one source.

    `pushed`, `polled`: changes of state, by who told them.  `missed`: those of polls that a push should have
    told.  `known`: pushes of a state that was known already.
    """

    pushes: int = 0
    polls: int = 0
    pushed: list[Observation] = field(default_factory=list)
    known: list[Observation] = field(default_factory=list)
    polled: list[Observation] = field(default_factory=list)
    missed: list[Observation] = field(default_factory=list)


# ---- counting --------------------------------------------------------------------------------


def note(connection: Connection, facts: Iterable[object], outcomes: Iterable[Told], now: datetime) -> None:
    """Count facts that were just recorded, in the same transaction: one statement per source and kind.

    `outcomes`: one per fact; `moved` is a change of state, `missed` one that a push should have told.
    """
    tallies: dict[str, _Tally] = {}
    for fact, outcome in zip(facts, outcomes, strict=True):
        if isinstance(fact, Observation) and not fact.ours:
            _count(tallies.setdefault(fact.source, _Tally()), fact, outcome)
        elif outcome.unchanged and outcome.build_id:
            tallies.setdefault(outcome.build_id.partition(":")[0], _Tally()).polls += 1
    for source, tally in tallies.items():
        if tally.pushes:
            _note_pushes(connection, source, tally, now)
        if tally.polls:
            _note_polls(connection, source, tally, now)


def _count(tally: _Tally, fact: Observation, outcome: Told) -> None:
    if fact.observed_by is not ObservedBy.POLL:
        tally.pushes += 1
        (tally.pushed if outcome.moved else tally.known).append(fact)
        return
    tally.polls += 1
    if outcome.moved:
        tally.polled.append(fact)
    if outcome.missed:
        tally.missed.append(fact)


_PUSHED = (
    text("""
INSERT INTO sources (name, since, pushes, changes_pushed, push_share, last_push_at)
VALUES (:name, :now, :pushes, :changes, :share, :now)
ON CONFLICT (name) DO UPDATE SET
  since = coalesce(sources.since, excluded.since),
  pushes = sources.pushes + excluded.pushes,
  changes_pushed = sources.changes_pushed + excluded.changes_pushed,
  push_share = CASE WHEN excluded.changes_pushed = 0 THEN sources.push_share
    ELSE 1 - (1 - coalesce(sources.push_share, 0)) *
      CASE WHEN sources.changes_pushed + sources.changes_polled + excluded.changes_pushed <= :window
      THEN (sources.changes_pushed + sources.changes_polled) * 1.0
        / (sources.changes_pushed + sources.changes_polled + excluded.changes_pushed)
      ELSE :kept END END,
  missed_in_row = 0,
  pushed_in_row = sources.pushed_in_row + excluded.changes_pushed,
  refused_in_row = 0,
  last_push_at = excluded.last_push_at
RETURNING deaf_since, last_missed_at, pushed_in_row
""")
    .bindparams(bindparam("now", type_=Moment))
    .columns(deaf_since=Moment, last_missed_at=Moment)
)


def _note_pushes(connection: Connection, source: str, tally: _Tally, now: datetime) -> None:
    changes = len(tally.pushed)
    values = {
        "name": source,
        "now": now,
        "pushes": tally.pushes,
        "changes": changes,
        "share": 1.0 if changes else None,
        "window": WINDOW,
        "kept": (1 - 1 / WINDOW) ** changes,
    }
    deaf_since, last_missed_at, in_row = bulk.run(connection, _PUSHED, values)[0]
    _note_delays(connection, source, ObservedBy.PUSH, tally.pushed, now)
    may_be_late = bool(tally.known) and last_missed_at is not None and last_missed_at > now - LATE_WITHIN
    were_late = may_be_late and _count_late(connection, source, tally.known, now)
    if deaf_since is not None and (were_late or in_row >= RECOVERED_AFTER):
        _review(connection, source, now)


def _note_delays(
    connection: Connection, source: str, origin: ObservedBy, changes: Sequence[Observation], now: datetime
) -> None:
    """Count how long ago these changes happened, by the platform's own time where it is told."""
    times = (seen.platform_at or seen.ended_at or seen.started_at for seen in changes)
    delays = [(now - at).total_seconds() for at in times if at is not None]
    if delays:
        measured = histograms.of(histograms.DETECTION, delays)
        histograms.add(connection, source, origin.value, measured)


_POLLED = (
    text("""
INSERT INTO sources (name, polls, last_poll_at) VALUES (:name, :polls, :now)
ON CONFLICT (name) DO UPDATE SET polls = sources.polls + excluded.polls, last_poll_at = excluded.last_poll_at
RETURNING since, changes_pushed, changes_polled, push_share, missed_in_row, pushed_in_row
""")
    .bindparams(bindparam("now", type_=Moment))
    .columns(since=Moment)
)


def _note_polls(connection: Connection, source: str, tally: _Tally, now: datetime) -> None:
    row = connection.execute(
        _POLLED, {"name": source, "polls": tally.polls, "now": now}
    ).mappings().one()  # fmt: skip
    news = [seen for seen in tally.polled if row["since"] is None or _is_after(seen, row["since"])]
    _note_delays(connection, source, ObservedBy.POLL, news, now)
    missed = [seen for seen in tally.missed if _is_after(seen, row["since"])]
    if not missed:
        return
    absence = connection.execute(select(models.relay.c.down_until)).scalar()
    in_row = row["missed_in_row"] + sum(absence is None or _is_after(seen, absence) for seen in missed)
    connection.execute(
        update(models.sources)
        .where(models.sources.c.name == source)
        .values(
            changes_polled=row["changes_polled"] + len(missed),
            push_share=_less_share(row, len(missed)),
            missed_in_row=in_row,
            pushed_in_row=0 if in_row >= DEAF_AFTER else row["pushed_in_row"],
            last_missed_at=now,
        )
    )
    _remember(connection, source, missed, now)
    _review(connection, source, now)


def _is_after(seen: Observation, since: datetime | None) -> bool:
    """Did it happen while pushes were expected?  What was over before we listened is history."""
    at = seen.platform_at or seen.started_at
    return since is not None and (at is None or at >= since)


def _less_share(row: Any, missed: int) -> float:
    """The share after so many more changes that no push told."""
    before = row["changes_pushed"] + row["changes_polled"]
    young = before + missed <= WINDOW
    return (row["push_share"] or 0.0) * (before / (before + missed) if young else (1 - 1 / WINDOW) ** missed)


def _remember(connection: Connection, source: str, missed: Sequence[Observation], now: datetime) -> None:
    """Note the repositories: their deliveries are looked at, and their pace is the full one again."""
    names = {seen.repository for seen in missed if seen.repository}
    rows = [{"source": source, "repository": name, "missed_at": now, "seen_at": now} for name in names]
    upsert(connection, models.repositories, rows)
    upsert(connection, models.missed_changes, [_missed_change(source, seen, now) for seen in missed])


def _missed_change(source: str, seen: Observation, now: datetime) -> dict[str, Any]:
    return {
        "key": seen.key,
        "attempt": seen.attempt or 0,
        "state": seen.state.value if seen.state else State.QUEUED.value,
        "source": source,
        "repository": seen.repository,
        "missed_at": now,
        "pushed_late": False,
    }


def upsert(connection: Connection, table: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows, or update those whose primary key is there; all rows have the same columns."""
    if not rows:
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table)
    keys = [column.name for column in table.primary_key]
    values = {name: statement.excluded[name] for name in rows[0] if name not in keys}
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=values), list(rows))


# ---- pushes that were only late --------------------------------------------------------------

_m, _h, _s = models.missed_changes.c, models.hooks.c, models.sources.c


def _count_late(connection: Connection, source: str, pushes: Sequence[Observation], now: datetime) -> bool:
    """Count misses whose push has come after all as late pushes, and undo what they changed; were there any?

    A poll may tell a change first while its push waits for its turn, here or on its way.
    """
    late = _were_late(connection, source, pushes, now)
    if not late:
        return False
    connection.execute(
        _PUSHED_LATE,
        [{"the_key": row.key, "the_attempt": row.attempt, "the_state": row.state} for row in late],
    )
    connection.execute(_LATE, {"source": source, "late": len(late), "window": WINDOW})
    repositories = {row.repository for row in late if row.repository}
    connection.execute(_FORGET_MISSES, {"the_source": source, "names": sorted(repositories)})
    return True


_PUSHED_LATE = (
    update(models.missed_changes)
    .where(
        _m.key == bindparam("the_key"),
        _m.attempt == bindparam("the_attempt"),
        _m.state == bindparam("the_state"),
    )
    .values(pushed_late=True)
)
_LATE = text("""
UPDATE sources SET
  late_pushes = late_pushes + :late,
  pushed_in_row = pushed_in_row + :late,
  push_share = CASE WHEN changes_pushed + changes_polled < :window
    THEN (push_share * (changes_pushed + changes_polled) + :late) / (changes_pushed + changes_polled)
    WHEN push_share + :late * 1.0 / :window > 1 THEN 1.0 ELSE push_share + :late * 1.0 / :window END
WHERE name = :source
""")
_r = models.repositories.c
_FORGET_MISSES = (
    update(models.repositories)
    .where(_r.source == bindparam("the_source"), _r.repository.in_(bindparam("names", expanding=True)))
    .values(
        missed_at=select(func.max(_m.missed_at))
        .where(_m.source == _r.source, _m.repository == _r.repository, _m.pushed_late.is_(False))
        .scalar_subquery()
    )
)
"""The last miss of a repository is the newest one that still counts as such."""


_MISSED = select(models.missed_changes).where(
    _m.key.in_(bindparam("keys", expanding=True)),
    _m.missed_at > bindparam("since"),
    _m.pushed_late.is_(False),
)


def _were_late(
    connection: Connection, source: str, pushes: Sequence[Observation], now: datetime
) -> list[Any]:
    """The missed changes that these pushes tell, less those whose push was asked for again."""
    told = {(seen.key, seen.state.value): seen.attempt for seen in pushes if seen.state is not None}
    asked = {"keys": list({key for key, _ in told}), "since": now - LATE_WITHIN}
    found = connection.execute(_MISSED, asked).all() if told else []
    mine = [row for row in found if told.get((row.key, row.state), -1) in (None, row.attempt)]
    if not mine:
        return []
    asked_at, looked_at = _asked_for(connection, source, now)
    return [
        row
        for row in mine
        if row.repository not in looked_at and (asked_at is None or row.missed_at > asked_at)
    ]


_ASKED = select(func.max(models.redeliveries.c.asked_at)).where(
    models.redeliveries.c.source == bindparam("of")
)
_LOOKED_AT = select(_h.repository).where(
    _h.source == bindparam("of"), _h.next_look_at > bindparam("now"), _h.refused.is_(False)
)


def _asked_for(connection: Connection, source: str, now: datetime) -> tuple[datetime | None, set[str]]:
    """When a redelivery was asked for last, and the repositories whose deliveries are being looked at.

    A push that came after that may be one we had to ask for, and that was missed.
    """
    asked_at = connection.execute(_ASKED, {"of": source}).scalar()
    return asked_at, set(connection.execute(_LOOKED_AT, {"of": source, "now": now}).scalars())


# ---- are pushes gone, or back? ---------------------------------------------------------------


def review(connection: Connection, now: datetime) -> None:
    """Look again at the sources whose state depends on time, and forget old misses.  Run by the writer."""
    connection.execute(delete(models.missed_changes).where(_m.missed_at < now - MISSES_KEPT))
    waiting = (_s.missed_in_row >= DEAF_AFTER) | _s.deaf_since.is_not(None)
    for source in connection.execute(select(_s.name).where(waiting)).scalars().all():
        _review(connection, source, now)


def _review(connection: Connection, source: str, now: datetime) -> None:
    """Tell admins that pushes of a source do not arrive, or arrive again, if that has changed."""
    row = connection.execute(select(models.sources).where(_s.name == source)).mappings().one()
    if _is_gone(row, now):
        _goes_deaf(connection, row, now)
    elif _is_back(row, now):
        _hears_again(connection, row, now)


def _is_gone(row: Any, now: datetime) -> bool:
    """Whether so much was missed, for so long, that no push is believed to arrive."""
    heard_at, notified_at = row["last_push_at"] or row["since"], row["push_notice_at"]
    return (
        row["deaf_since"] is None
        and row["missed_in_row"] >= DEAF_AFTER
        and heard_at is not None
        and now - heard_at >= SILENCE
        and (notified_at is None or now - notified_at >= NOTICE_PAUSE)
    )


def _is_back(row: Any, now: datetime) -> bool:
    """Whether pushes reported enough changes, for long enough after the notice that they are gone."""
    since = row["deaf_since"]
    return since is not None and row["pushed_in_row"] >= RECOVERED_AFTER and now - since >= SILENCE


def _note_state(connection: Connection, source: str, deaf_since: datetime | None, now: datetime) -> None:
    values = {"deaf_since": deaf_since, "push_notice_at": now, "pushed_in_row": 0}
    connection.execute(update(models.sources).where(_s.name == source).values(values))


# ---- what admins are told --------------------------------------------------------------------


def tell(connection: Connection, kind: str, subject: str, message: str, now: datetime) -> None:
    """Add a notice for admins (`GET /api/notifications`), and log it once it is stored."""
    notice = {"kind": kind, "subject": subject, "text": message, "created_at": now}
    connection.execute(insert(models.notices), notice)
    db.after_commit(
        connection, lambda: loglines.event(log, "notice", kind=kind, subject=subject, text=message)
    )


def _goes_deaf(connection: Connection, row: Any, now: datetime) -> None:
    source, missed, last = row["name"], row["missed_in_row"], row["last_push_at"]
    heard = f"the last push came at {iso(last)}" if last else "no push ever came"
    message = (
        f"No pushes from {source}: polls were first to tell the last {missed} changes, and {heard}. "
        "Builds are still polled, but later than a push would tell. See `buildrelay doctor`."
    )
    _note_state(connection, source, now, now)
    tell(connection, "source.deaf", source, message, now)


def _hears_again(connection: Connection, row: Any, now: datetime) -> None:
    source = row["name"]
    message = f"Pushes from {source} come again; most were missed since {iso(row['deaf_since'])}."
    _note_state(connection, source, None, now)
    tell(connection, "source.hears", source, message, now)


def refused(connection: Connection, source: str, status: int, now: datetime) -> None:
    """Count an error answer to a delivery of GitLab; tell admins when one more would mute the hook.

    Any push that is taken ends the row.  `source` is configured; run in a write transaction.
    """
    count = connection.execute(_REFUSED, {"name": source, "now": now}).scalar_one()
    if count == RISKY_REFUSALS:
        message = (
            f"The last {count} deliveries of {source} were answered with an error (HTTP {status}): "
            "GitLab mutes a webhook after 4 in a row. If it is 401, the secret of the webhook is not ours: "
            "see `buildrelay sources connect`."
        )
        tell(connection, "source.hook_at_risk", source, message, now)


_REFUSED = text("""
INSERT INTO sources (name, since, refused_in_row) VALUES (:name, :now, 1)
ON CONFLICT (name) DO UPDATE SET refused_in_row = sources.refused_in_row + 1
RETURNING refused_in_row
""").bindparams(bindparam("now", type_=Moment))


CLOCK_OFF, CLOCK_OFF_INTERVAL = "source.clock_off", timedelta(hours=1)


def note_clock_off(connection: Connection, source: str, age_seconds: float, now: datetime) -> None:
    """Add a notice, once an hour, about a webhook that was refused for its time alone.

    Its signature is right, so two clocks differ; or somebody sends an old webhook again, and gets no further
    than this notice.
    """
    before = clock_off_at(connection, source)
    if before is not None and before > now - CLOCK_OFF_INTERVAL:
        return
    order = "behind" if age_seconds > 0 else "ahead of"
    message = (
        f"A webhook of {source} was refused (401): its signature is right, but its time is "
        f"{abs(age_seconds):.0f} s {order} our clock, and 300 s are allowed. Set both clocks by NTP; if they "
        "are right, an old webhook was sent again."
    )
    tell(connection, CLOCK_OFF, source, message, now)


def clock_off_at(connection: Connection, source: str) -> datetime | None:
    """When the last notice about the clock of a source was written."""
    columns = models.notices.c
    of_source = select(func.max(columns.created_at)).where(
        columns.kind == CLOCK_OFF, columns.subject == source
    )
    at: datetime | None = connection.execute(of_source).scalar()
    return at


class Refusals:
    """Error answers to deliveries of GitLab, counted at most once a second: who guesses makes no work."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._noted: dict[str, float] = {}
        self._clock_off: dict[str, float] = {}

    def note(self, source: str, status: int) -> None:
        """Count one.  While the store is away nothing is counted: the hook itself is looked at each hour."""
        clock = time.monotonic()
        if clock - self._noted.get(source, -1.0) < 1.0:
            return
        self._noted[source] = clock
        age_seconds = self._clock_off.pop(source, None)

        def unit(connection: Connection) -> None:
            refused(connection, source, status, utc_now())
            if age_seconds is not None:
                note_clock_off(connection, source, age_seconds, utc_now())

        with suppress(db.StoreUnavailable):
            db.in_transaction(self._engine, unit)

    def clock_is_off(self, source: str, age_seconds: float) -> None:
        """Remember it for the next count: writing it now would make its answer later than others."""
        self._clock_off[source] = age_seconds


# ---- listening, and being away ---------------------------------------------------------------


def listen(connection: Connection, names: Collection[str], now: datetime) -> None:
    """From now on pushes are expected of the sources `names`, and of no others."""
    rows = connection.execute(select(models.sources.c.name, models.sources.c.since)).all()
    since = {row.name: row.since for row in rows}
    new = [{"name": name, "since": now} for name in sorted(names) if since.get(name) is None]
    gone = [{"name": name, "since": None} for name, at in since.items() if at and name not in names]
    upsert(connection, models.sources, new)
    upsert(connection, models.sources, gone)


@dataclass(frozen=True, slots=True)
class Absence:
    """We could have lost pushes from then until then."""

    began: datetime
    ended: datetime


def alive(connection: Connection, started_at: datetime, now: datetime) -> Absence | None:
    """Note that we live; if for over a minute before `started_at` nobody did, tell admins, and return that.

    `started_at`: when this process began.  A sweep that only comes late is no absence.
    """
    table = models.relay
    before = connection.execute(select(table.c.alive_at)).scalar()
    if before is None:
        connection.execute(insert(table), {"id": 1, "alive_at": now})
        return None
    absence = Absence(before, started_at) if started_at - before > ABSENCE else None
    values: dict[str, datetime] = {"alive_at": max(now, before)}
    if absence:
        values |= {"down_from": absence.began, "down_until": absence.ended}
    connection.execute(update(table).values(values))
    if absence:
        _was_down(connection, absence)
    return absence


def _was_down(connection: Connection, absence: Absence) -> None:
    seconds = (absence.ended - absence.began).total_seconds()
    message = (
        f"BuildRelay did not run from {iso(absence.began)} to {iso(absence.ended)} ({seconds:.0f} s): pushes "
        "of that time may be lost. Recent builds are looked for at once, and GitHub and GitLab are asked for "
        "failed deliveries."
    )
    tell(connection, "relay.was_down", "relay", message, absence.ended)


def last_absence(connection: Connection) -> Absence | None:
    """Our last absence; None if there was none."""
    row = connection.execute(select(models.relay)).one_or_none()
    return None if row is None or row.down_from is None else Absence(row.down_from, row.down_until)


# ---- reading ---------------------------------------------------------------------------------


def snapshot(connection: Connection) -> dict[str, dict[str, Any]]:
    """Per source, for pages and metrics: the row of `sources`, and `missed_pushes`, `newest_fact_at`.

    `missed_pushes` leaves out the late ones, so it may fall; `changes_polled` counts both and never does.
    Counts are totals; `push_share` is 0 to 1, None while nothing changed; times are aware UTC or None.
    """
    rows = connection.execute(select(models.sources)).mappings()
    return {row["name"]: {**row, **_derived(row)} for row in rows}


def _derived(row: Any) -> dict[str, Any]:
    heard = [at for at in (row["last_push_at"], row["last_poll_at"]) if at is not None]
    return {
        "missed_pushes": row["changes_polled"] - row["late_pushes"],
        "newest_fact_at": max(heard, default=None),
    }
