"""How the API of each source answers: durations, errors by kind, and since when nothing can be read.

A round of polling that reads nothing of a source is a failed one if the source is at fault, not only a build
or a repository of it; admins hear of it after several in a row, and when the source answers again.  A limit
is no failure: the platform answers, and is waited for.
Everything is stored in the transaction that records the round, so several workers tell nothing twice.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, func, select, update

from webhook_app import health, histograms, models
from webhook_app.histograms import Histogram
from webhook_app.platforms import Answer, PollError, PollFault, Source
from webhook_app.platforms._read import poll_error
from webhook_app.redaction import redactor
from webhook_app.times import iso

FAILED_ROUNDS = 3
"""Failed rounds in a row before a source counts as failing: one is no news."""

FAILING_FOR = timedelta(seconds=60)
"""Minimum time without a successful round before admins are told."""

MOST_RESUMED = 500
"""Builds that are made due again in one transaction."""

OF_SOURCE = (PollFault.UNAVAILABLE, PollFault.UNAUTHORIZED)
"""Faults of a source as a whole."""

OF_PART = (PollFault.FORBIDDEN, PollFault.UNREADABLE)
"""Faults of one build or repository, unless every repository of the source fails.

With the others, a limit and "not found", a platform answers: a round that met only these is neither failed
nor successful.
"""

_s, _e, _b, _p = models.sources.c, models.api_errors.c, models.builds.c, models.places.c


# ---- what was measured -----------------------------------------------------------------------


@dataclass(slots=True)
class Measured:
    """Durations of requests by source, and failed ones by source and kind, not yet stored."""

    durations: dict[str, Histogram] = field(default_factory=dict)
    errors: Counter[tuple[str, PollFault]] = field(default_factory=Counter)

    def note(self, source: str, seconds: float, result: Answer | PollError) -> None:
        """Count one request."""
        self.durations.setdefault(source, Histogram(histograms.API)).add(seconds)
        if (kind := kind_of(result)) is not None:
            self.errors[source, kind] += 1

    def store(self, connection: Connection) -> None:
        """Add to what is stored.  Run by the writer."""
        for source, measured in self.durations.items():
            histograms.add(connection, source, "", measured)
        for (source, kind), count in self.errors.items():
            _count_errors(connection, source, kind, count)


def kind_of(result: Answer | PollError) -> PollFault | None:
    """The kind of error that came of a request; None: it was answered well."""
    if isinstance(result, PollError):
        return result.fault
    return poll_error(result).fault if result.status >= 400 else None


def _count_errors(connection: Connection, source: str, kind: PollFault, count: int) -> None:
    here = (_e.source == source, _e.kind == kind.value)
    before = connection.execute(select(_e.count).where(*here)).scalar() or 0
    row = {"source": source, "kind": kind.value, "count": before + count}
    health.upsert(connection, models.api_errors, [row])


def errors(connection: Connection) -> Mapping[tuple[str, str], int]:
    """How many requests have failed, by source and kind."""
    rows = connection.execute(select(models.api_errors)).mappings()
    return {(row["source"], row["kind"]): row["count"] for row in rows}


# ---- rounds ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Round:
    """What a round of polling brought of one source.

    `worked`: something of it was read.  `fault`: the gravest error of its reads; its text is masked.
    `unread`: reads were refused to our token, or there was no token; the error is the source's, of any kind.
    """

    worked: bool
    fault: PollError | None = None
    unread: bool = False


def note_round(connection: Connection, source: str, brought: Round, now: datetime) -> None:
    """Record a round of one source; tell admins if that shows a failure or its end.  Run by the writer."""
    if brought.fault is not None:
        note_error(connection, source, brought.fault, now)
    if brought.worked:
        _succeeded(connection, source, now)
    elif brought.fault is not None and _is_of_source(connection, source, brought, brought.fault.fault):
        _failed(connection, source, brought.fault, now)


def _is_of_source(connection: Connection, source: str, brought: Round, kind: PollFault) -> bool:
    """Whether the source is at fault, and not only the builds and repositories of this round."""
    return brought.unread or kind in OF_SOURCE or (kind in OF_PART and _every_list_fails(connection, source))


def _every_list_fails(connection: Connection, source: str) -> bool:
    listed = (_p.source == source, _p.same_as.is_(None), _p.next_list_at.is_not(None))
    counts = select(func.count(), func.count(_p.failing_since)).select_from(models.places).where(*listed)
    places, failing = connection.execute(counts).one()
    return bool(places) and places == failing


def is_failing(row: Mapping[str, Any]) -> bool:
    """Whether a row of `sources` shows one that can't be read; before several failed rounds it does not."""
    return row.get("api_failing_since") is not None and (
        row["api_failures"] >= FAILED_ROUNDS or row["api_notified_at"] is not None
    )


def failing_since(row: Mapping[str, Any]) -> datetime | None:
    """Since when a source can't be read; None: it can, as far as is known."""
    since: datetime | None = row["api_failing_since"] if is_failing(row) else None
    return since


def had_failed_round(connection: Connection, source: str) -> bool:
    """Whether the last round of a source failed."""
    since = connection.execute(select(_s.api_failing_since).where(_s.name == source)).scalar()
    return since is not None


def note_error(connection: Connection, source: str, fault: PollError, now: datetime) -> None:
    """Keep the last error of a source; its text must be masked already.  Run by the writer."""
    row = {
        "name": source,
        "api_error": str(fault),
        "api_error_kind": fault.fault.value,
        "api_error_at": now,
    }
    health.upsert(connection, models.sources, [row])


def note_failed_request(
    connection: Connection, source: Source, failure: PollError, now: datetime, secrets: Iterable[str] = ()
) -> None:
    """Record a failed request beside the polling: for logs, webhooks, downloads.  Run by the writer.

    That something is not there is often so with those, and no error of the source.
    """
    _count_errors(connection, source.name, failure.fault, 1)
    if failure.fault is not PollFault.NOT_FOUND:
        note_error(connection, source.name, masked(failure, [*secrets, source.token]), now)


def masked(error: PollError, secrets: Iterable[str]) -> PollError:
    """The error without secrets in its text, as it may be stored, logged and shown."""
    return PollError(error.fault, redactor(secrets)(str(error)), error.retry_after_seconds)


def _row(connection: Connection, source: str) -> Any:
    found = connection.execute(select(models.sources).where(_s.name == source)).mappings().one_or_none()
    if found is None:
        health.upsert(connection, models.sources, [{"name": source, "api_failures": 0}])
        return _row(connection, source)
    return found


def _change(connection: Connection, source: str, **values: object) -> None:
    connection.execute(update(models.sources).where(_s.name == source).values(values))


def _failed(connection: Connection, source: str, fault: PollError, now: datetime) -> None:
    row = _row(connection, source)
    notified_at = row["api_notified_at"]
    if fault.fault is PollFault.UNAUTHORIZED:
        notified_at = notified_at or now  # the pause of the source has told it
    _change(
        connection,
        source,
        api_failures=row["api_failures"] + 1,
        api_failing_since=row["api_failing_since"] or now,
        api_notified_at=notified_at,
    )
    _tell_if_due(connection, source, now)


def review(connection: Connection, now: datetime) -> None:
    """Look again at sources whose rounds failed: time alone may make it news.  Run by the writer."""
    waiting = connection.execute(
        select(_s.name).where(_s.api_failing_since.is_not(None), _s.api_notified_at.is_(None))
    )
    for source in waiting.scalars().all():
        _tell_if_due(connection, source, now)


def _tell_if_due(connection: Connection, source: str, now: datetime) -> None:
    row = _row(connection, source)
    since = row["api_failing_since"]
    is_news = row["api_failures"] >= FAILED_ROUNDS and now - since >= FAILING_FOR
    if row["api_notified_at"] is not None or not is_news:
        return
    message = (
        f"{source} can't be read since {iso(since)}: {row['api_failures']} rounds of polling in a row failed "
        f"({row['api_error_kind']}: {row['api_error']}). Until it answers, builds are known by their pushes "
        "alone; it is tried on. See `buildrelay doctor`."
    )
    _change(connection, source, api_notified_at=now)
    health.tell(connection, "source.unreachable", source, message, now)


def _succeeded(connection: Connection, source: str, now: datetime) -> None:
    row = _row(connection, source)
    since, notified_at = row["api_failing_since"], row["api_notified_at"]
    left = _left(row, now)
    if left is not None and _resume(connection, source, left, now) < MOST_RESUMED:
        left = None
    resume_from, resume_before = left or (None, None)
    _change(
        connection,
        source,
        api_worked_at=now,
        api_failing_since=None,
        api_failures=0,
        api_notified_at=None,
        resume_from=resume_from,
        resume_before=resume_before,
    )
    if notified_at is not None:
        message = f"{source} can be read again, after {_lasted(now - since)} (since {iso(since)})."
        health.tell(connection, "source.reachable", source, message, now)


def _lasted(time: timedelta) -> str:
    seconds = max(time.total_seconds(), 0.0)
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


# ---- builds that were left when the source failed --------------------------------------------


Span = tuple[datetime, datetime]
_KINDS = tuple(kind.value for kind in OF_SOURCE)


def _left(row: Mapping[str, Any], now: datetime) -> Span | None:
    """The time in which builds were left because the source failed, up to now or to its last return."""
    if is_failing(row):
        return row["resume_from"] or row["api_failing_since"], now
    return (row["resume_from"], row["resume_before"]) if row["resume_from"] else None


def _resume(connection: Connection, source: str, left: Span, now: datetime) -> int:
    """Make a portion of the builds whose last read failed with the source due at once; how many there were.

    `left`: what failed before or since then has another cause, as has every fault of a build's own, such as
    "forbidden": its back-off goes on.  Errors in a row are kept until a read works, so that a build which
    fails by itself is given up only once.
    """
    began, ended = left
    found = connection.execute(
        select(_b.id)
        .where(
            _b.source == source,
            _b.next_poll_at > now,
            _b.last_poll_at >= began,
            _b.last_poll_at < ended,
            _b.poll_fault.in_(_KINDS),
        )
        .order_by(_b.next_poll_at)
        .limit(MOST_RESUMED)
    ).scalars().all()  # fmt: skip
    if found:
        connection.execute(update(models.builds).where(_b.id.in_(found)).values(next_poll_at=now))
    return len(found)
