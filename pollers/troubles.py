"""What went wrong in a round of reads: the errors of each source, without secrets, and lists that fail again.

A list of one repository can fail for ever while the others are read; admins hear of it after several in a
row, and when it can be read again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update

from pollers import discovery
from pollers.repository import Findings
from webhook_app import api_health, health, models, redaction
from webhook_app.api_health import Round
from webhook_app.builds import Fact, PollFailed
from webhook_app.db import Write
from webhook_app.lifecycle import Observation
from webhook_app.platforms import PollError, PollFault
from webhook_app.redaction import Redactor
from webhook_app.times import iso

FAILED_LISTS = 3
"""Failed lists of a repository in a row before admins are told."""

FAILING_FOR = timedelta(seconds=60)
"""Minimum time for which they have failed before admins are told."""

_GRAVITY = (
    PollFault.NOT_FOUND, PollFault.RATE_LIMITED, PollFault.UNREADABLE, PollFault.FORBIDDEN,
    PollFault.UNAVAILABLE, PollFault.UNAUTHORIZED,
)  # fmt: skip
"""Kinds of errors, the gravest for a whole source last."""

_p = models.places.c


# ---- errors of a round -----------------------------------------------------------------------


def masked(found: Findings, mask: Redactor) -> Findings:
    """The findings with secrets masked, in errors and in what builds tell of themselves."""
    return replace(
        found,
        facts=[_masked_fact(fact, mask) for fact in found.facts],
        refused=found.refused and mask(found.refused),
        away=_masked_error(found.away, mask),
        fault=_masked_error(found.fault, mask),
        hidden={name: mask(why) for name, why in found.hidden.items()},
    )


def _masked_fact(fact: Fact, mask: Redactor) -> Fact:
    """A fact without secrets in its texts, names and refs, be they the platform's or ours about an error."""
    if isinstance(fact, PollFailed):
        return replace(fact, message=mask(fact.message))
    return redaction.masked(fact, mask) if isinstance(fact, Observation) else fact


def _masked_error(error: PollError | None, mask: Redactor) -> PollError | None:
    return error and PollError(error.fault, mask(str(error)), error.retry_after_seconds)


def errors(found: Findings) -> list[PollError]:
    """The different errors that the reads of a place met."""
    stored = [found.refused] if found.refused else []
    stored += [fact.message for fact in found.facts if isinstance(fact, PollFailed)]
    met = [error for error in (found.fault, found.away) if error is not None]
    met += [_error(text) for text in stored]
    return list({(error.fault, str(error)): error for error in met}.values())


def _error(stored: str) -> PollError:
    """The error behind a stored text: its kind, a colon, what was said."""
    kind, _, text = stored.partition(": ")
    return PollError(PollFault(kind) if kind in _GRAVITY else PollFault.UNREADABLE, text)


def gravest(errors: Iterable[PollError]) -> PollError | None:
    """The error that says most about the source as a whole."""
    return max(errors, key=lambda error: _GRAVITY.index(error.fault), default=None)


def rounds(findings: Sequence[Findings]) -> dict[str, Round]:
    """What a round brought of each source that was asked.

    That one build or repository is not known is an answer, and no error of the source.
    """
    brought: dict[str, Round] = {}
    for source in {found.place.source for found in findings}:
        of_it = [found for found in findings if found.place.source == source]
        met = [error for found in of_it for error in errors(found) if error.fault is not PollFault.NOT_FOUND]
        worked, fault = any(found.worked for found in of_it), gravest(met)
        if worked or fault is not None:
            unread = any(found.fault and found.fault.fault is not PollFault.RATE_LIMITED for found in of_it)
            brought[source] = Round(worked, fault, unread)
    return brought


# ---- lists that fail again and again ---------------------------------------------------------


def note_list(write: Write, found: Findings, now: datetime, *, source_works: bool) -> None:
    """Count failed lists of a place; tell admins if that shows trouble of the repository or its end.

    `source_works`: other reads of the source were answered.  If not, and its last round failed as well, it
    is the source's trouble, told as such.
    """
    why = found.refused or (f"{found.away.fault.value}: {found.away}" if found.away else None)
    if found.listed:
        _worked(write, found.place.source, list(found.listed), now)
    elif why is not None:
        _failed(write, found.place.source, found.place.repositories, why, now)
        if source_works or not api_health.had_failed_round(write.connection, found.place.source):
            _tell_failing(write, found.place.source, found.place.repositories, now)


def _rows(write: Write, source: str, repositories: Sequence[str]) -> Sequence[Any]:
    here = (_p.source == source, _p.repository.in_(repositories), _p.failing_since.is_not(None))
    return write.connection.execute(select(models.places).where(*here)).mappings().all()


def _change(write: Write, source: str, repositories: Sequence[str], **values: object) -> None:
    here = (_p.source == source, _p.repository.in_(repositories))
    write.connection.execute(update(models.places).where(*here).values(values))


def _failed(write: Write, source: str, repositories: Sequence[str], why: str, now: datetime) -> None:
    known = {row["repository"]: row for row in _rows(write, source, repositories)}
    for name in repositories:
        since = known[name]["failing_since"] if name in known else now
        count = known[name]["failures"] + 1 if name in known else 1
        _change(write, source, [name], failures=count, failing_since=since, error=why)


def _tell_failing(write: Write, source: str, repositories: Sequence[str], now: datetime) -> None:
    for row in _rows(write, source, repositories):
        lasts = row["failures"] >= FAILED_LISTS and now - row["failing_since"] >= FAILING_FOR
        if row["notified_at"] is None and lasts:
            _change(write, source, [row["repository"]], notified_at=now)
            _tell(write, row, now)


def _tell(write: Write, row: Any, now: datetime) -> None:
    source, name = row["source"], row["repository"]
    kind, _, text = row["error"].partition(": ")
    if kind == PollFault.NOT_FOUND:
        discovery.tell_hidden(write, source, name, text, now)
        return
    message = (
        f"The builds of {name} at {source} can't be listed since {iso(row['failing_since'])} "
        f"({row['error']}): a build whose every push is lost is not found. The rest of the source is read."
    )
    health.tell(write.connection, "source.repository_unreadable", f"{source}: {name}", message, now)


def _worked(write: Write, source: str, repositories: Sequence[str], now: datetime) -> None:
    for row in _rows(write, source, repositories):
        name = row["repository"]
        _change(write, source, [name], failures=0, failing_since=None, notified_at=None)
        if row["notified_at"] is not None:
            message = f"The builds of {name} at {source} can be listed again."
            health.tell(write.connection, "source.repository_readable", f"{source}: {name}", message, now)
