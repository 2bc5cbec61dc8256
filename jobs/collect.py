"""The collecting job: what ended builds left, read once, failed ones first, and only from budget to spare.

Each source is read by one thread, one build after the other: platforms ask for that, and a slow one
holds up no other.  Any number of jobs may run at once; a claim is one's own.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timedelta

from sqlalchemy import Connection, select, update

from jobs.resources import Resources, resources
from jobs.schedule import ring_at
from pollers import budget, endings
from pollers.budget import Ledger, Spent
from pollers.endings import Look
from webhook_app import builds, collection, credentials, db, models, platforms, queues, settings
from webhook_app.builds import ErrorFound
from webhook_app.collection import Brought, Claimed
from webhook_app.credentials import Keyring
from webhook_app.platforms import PollError, PollFault
from webhook_app.redaction import redactor
from webhook_app.settings import SourceSettings
from webhook_app.times import utc_now

log = logging.getLogger(__name__)

LONGEST_DRAIN_SECONDS = 45.0
"""With the longest look behind it, less than the 180 s that a job may take."""
SOON = timedelta(minutes=1)


def collect(held: Resources | None = None) -> None:
    """Look at every ended attempt that is due, and ask to be woken when the next one is.

    `held`: what to work with; None (as a worker calls it) takes this process's own.
    """
    held = held or resources()
    queues.answer(held.redis, queues.COLLECT)
    secrets = settings.secret_texts(held.settings)
    until = time.monotonic() + LONGEST_DRAIN_SECONDS
    sources = [source for source in held.settings.sources.values() if source.can_poll]
    counts = list(held.threads.map(lambda source: _drain(held, source, secrets, until), sources))
    if any(counts):
        log.info("collected attempts=%d", sum(counts))
    _come_back(held, sources)


def _come_back(held: Resources, sources: list[SourceSettings]) -> None:
    now = utc_now()
    with db.reading(held.engine) as connection:
        spare = [one.source.name for one in sources if _spare(held, connection, one, now)]
        due = collection.next_due(connection, spare)
    if due is not None and due < now + SOON:
        ring_at(held.redis, queues.COLLECT, due)


def _drain(held: Resources, source: SourceSettings, secrets: Sequence[str], until: float) -> int:
    """One source, until nothing is due, the budget is short or the time is up; how many looks."""
    count = 0
    while time.monotonic() < until:
        claimed = _claim(held, source)
        if claimed is None:
            break
        _settle(held, source, claimed, _look(held, source, claimed, secrets))
        count += 1
    return count


def _claim(held: Resources, source: SourceSettings) -> Claimed | None:
    now = utc_now()
    with db.reading(held.engine) as connection:
        if not _spare(held, connection, source, now):
            return None
    return db.in_transaction(
        held.engine, lambda connection: collection.claim(connection, source.source.name, now)
    )


def _look(held: Resources, source: SourceSettings, claimed: Claimed, secrets: Sequence[str]) -> Look:
    """With a token that can be used; a refused one is renewed once.  A lent one is a secret as well."""
    keyring = Keyring(held.engine, held.settings.encryption_keys)
    try:
        lent = keyring.source(source, utc_now())
        look = endings.look(source, lent, claimed, redactor([*secrets, lent.token]))
        if look.fault is not None and look.fault.fault is PollFault.UNAUTHORIZED:
            renewed = keyring.refreshed(source, lent, utc_now())
            if renewed is not None:
                look = endings.look(source, renewed, claimed, redactor([*secrets, renewed.token]))
    except PollError as fault:
        seconds = fault.retry_after_seconds or endings.UNAUTHORIZED_SECONDS
        return Look(Brought(postponed_seconds=seconds), fault)
    return look


def _settle(held: Resources, source: SourceSettings, claimed: Claimed, look: Look) -> None:
    """Store what was found, and the error as a fact about the build, in one transaction."""
    now = utc_now()

    def unit(write: db.Write) -> int:
        _charge(held, write, source, look, now)
        if not collection.settle(write, claimed, look.brought, now) or not look.brought.error:
            return 0
        fact = ErrorFound(claimed.target.key, claimed.target.attempt, look.brought.error)
        return sum(outcome.events for outcome in builds.record(write, [fact], now, held.pace))

    if db.as_writer(held.engine, unit):
        queues.Bell(held.redis).ring(queues.DELIVER)


# ---- the governor --------------------------------------------------------------------------------

_l = models.budgets.c
_LEDGER = [entry.name for entry in fields(Ledger)]


def _ledger(connection: Connection, source: SourceSettings) -> Ledger | None:
    """What the source's token may ask; None: nobody has asked yet."""
    of_lane = select(models.budgets).where(_l.lane == credentials.lane(source))
    row = connection.execute(of_lane).mappings().one_or_none()
    return Ledger(**{name: row[name] for name in _LEDGER}) if row else None


def _spare(held: Resources, connection: Connection, source: SourceSettings, now: datetime) -> bool:
    """Is there budget that reading states does not need?  Logs and artifacts yield to it."""
    if source.source.platform not in platforms.polled() or source.source.name in budget.paused(
        connection, now
    ):
        return False
    ledger, reserve = _ledger(connection, source), held.settings.api_budget_reserve
    manners = platforms.polled()[source.source.platform].MANNERS
    return ledger is None or budget.is_rich(budget.reckoned(ledger, now, manners, reserve), reserve)


def _charge(held: Resources, write: db.Write, source: SourceSettings, look: Look, now: datetime) -> None:
    """Note what a look cost.

    Whoever reads states with this token meanwhile owns its row and will store his own reckoning; the
    platform's next answer tells him what we took.
    """
    ledger = _ledger(write.connection, source)
    if look.fault is not None:
        budget.note(write, set(), [(source.source.name, look.fault)], now, ledger.strikes if ledger else 0)
    if ledger is None or look.spent == Spent():
        return
    manners = platforms.polled()[source.source.platform].MANNERS
    ledger = budget.reckoned(ledger, now, manners, held.settings.api_budget_reserve)
    spent = budget.charged(ledger, look.spent, now)
    spent = budget.struck(spent, [look.fault] if look.fault else [], worked=look.fault is None)
    write.connection.execute(
        update(models.budgets)
        .where(_l.lane == credentials.lane(source))
        .values({name: getattr(spent, name) for name in _LEDGER})
    )
