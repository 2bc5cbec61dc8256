"""The collecting job: what ended builds left, read once, failed ones first, and only from budget to spare.

What a person waits for comes first, and from the reserve.  Each source is read by one thread, one build
after the other: platforms ask for that, and a slow one holds up no other.  Any number of jobs may run at
once; a claim is one's own.
"""

import logging
import time
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection

from jobs.resources import Resources, resources
from jobs.schedule import ring_at
from pollers import endings
from pollers.endings import Look
from webhook_app import api_health, budget, builds, collection, db, platforms, queues, settings
from webhook_app.account import Account
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
        awake = [one for one in sources if not _is_off(connection, one, now)]
        spare = [one.source.name for one in awake if _has_room(held, connection, one, now)]
        due = [
            collection.next_due(connection, spare),
            collection.next_due(connection, [one.source.name for one in awake], asked=True),
        ]
    first = min((moment for moment in due if moment is not None), default=None)
    if first is not None and first < now + SOON:
        ring_at(held.redis, queues.COLLECT, first)


def _drain(held: Resources, source: SourceSettings, secrets: Sequence[str], until: float) -> int:
    """One source, until nothing is due, the budget is short or the time is up; how many looks."""
    count = 0
    while time.monotonic() < until and not held.desk.closing:
        claimed = _claim(held, source)
        if claimed is None:
            break
        _settle(held, source, claimed, _look(held, source, claimed, secrets))
        count += 1
    return count


def _claim(held: Resources, source: SourceSettings) -> Claimed | None:
    now = utc_now()
    with db.reading(held.engine) as connection:
        if _is_off(connection, source, now):
            return None
        asked_only = not _has_room(held, connection, source, now)
    return db.in_transaction(
        held.engine,
        lambda connection: collection.claim(connection, source.source.name, now, asked_only=asked_only),
    )


def _is_off(connection: Connection, source: SourceSettings, now: datetime) -> bool:
    """Is the source to be left alone?"""
    return source.source.platform not in platforms.polled() or source.source.name in budget.paused(
        connection, now
    )


def _has_room(held: Resources, connection: Connection, source: SourceSettings, now: datetime) -> bool:
    """Logs and artifacts yield to the reading of states."""
    return budget.has_room(connection, source, held.settings.api_budget_reserve, now)


def _look(held: Resources, source: SourceSettings, claimed: Claimed, secrets: Sequence[str]) -> Look:
    """With a token that can be used; a refused one is renewed once.  A lent one is a secret as well."""
    keyring = Keyring(held.engine, held.settings.encryption_keys)
    account = Account(source, held.engine, held.settings.api_budget_reserve, patient=True, clock=utc_now)
    account.secrets = secrets
    try:
        lent = keyring.source(source, utc_now())
        account.secrets = [*secrets, lent.token]
        look = endings.look(account, lent, claimed, redactor(account.secrets))
        if look.fault is not None and look.fault.fault is PollFault.UNAUTHORIZED:
            renewed = keyring.refreshed(source, lent, utc_now())
            if renewed is not None:
                account.secrets = [*secrets, renewed.token]
                look = endings.look(account, renewed, claimed, redactor(account.secrets))
    except PollError as fault:
        seconds = fault.retry_after_seconds or endings.UNAUTHORIZED_SECONDS
        look = Look(Brought(postponed_seconds=seconds), fault)
    return Look(look.brought, look.fault and api_health.masked(look.fault, account.secrets))


def _settle(held: Resources, source: SourceSettings, claimed: Claimed, look: Look) -> None:
    """Store what was found, and the error as a fact about the build, in one transaction."""
    now = utc_now()
    if look.fault is not None:
        log.warning(
            "log not read: source=%s build=%s attempt=%d kind=%s", source.source.name,
            claimed.target.build_id, claimed.target.attempt, look.fault.fault.value,
        )  # fmt: skip

    def unit(write: db.Write) -> int:
        if look.fault is not None:
            budget.note(write, set(), [(source.source.name, look.fault)], now)
        if not collection.settle(write, claimed, look.brought, now) or not look.brought.error:
            return 0
        fact = ErrorFound(claimed.target.key, claimed.target.attempt, look.brought.error)
        return sum(outcome.events for outcome in builds.record(write, [fact], now, held.pace))

    if db.as_writer(held.engine, unit):
        queues.Bell(held.redis).ring(queues.DELIVER)
