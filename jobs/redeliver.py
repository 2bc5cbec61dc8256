"""The redelivering job: deliveries that we missed are asked for again, and muted webhooks are noticed.

A webhook is looked at when a push of its repository was missed or after we were away, never as a constant
poll; GitLab's are also looked at once an hour, since GitLab mutes them without a word.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, bindparam, delete, select, update

from jobs.resources import Resources, resources
from webhook_app import budget, db, health, models, queues, registration, settings
from webhook_app.account import Account
from webhook_app.credentials import Keyring
from webhook_app.inbox import Arrival
from webhook_app.platforms import Hook, HookDelivery, PollError, hook_api
from webhook_app.redaction import redactor
from webhook_app.registration import Address, RegistrationError
from webhook_app.settings import SourceSettings
from webhook_app.times import utc_now

log = logging.getLogger(__name__)

MOST_AT_ONCE = 20
"""Repositories per run; the others wait for the next tick."""
MOST_ASKED = 5
"""Redeliveries per repository and run: GitLab allows five a minute."""
MOST_IN_ALL = 40
"""Redeliveries per run, which is a minute: GitHub allows 80 such requests a minute, whatever they are for.
https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api#about-secondary-rate-limits"""
LONGEST_SECONDS = 90.0
"""No look begins later: a job may take 180."""
KEPT = timedelta(days=3)
"""How long GitHub keeps deliveries.  https://docs.github.com/en/webhooks/testing-and-troubleshooting-webhooks"""
MARGIN = timedelta(minutes=10)
REFUSED_PAUSE = timedelta(days=1)
FAULT_PAUSE = timedelta(minutes=5)
CLAIM = timedelta(minutes=3)
ALERT_INTERVAL = timedelta(hours=1)
SEEN, SEEN_AFTER = timedelta(days=7), timedelta(hours=1)
"""After an absence also repositories are looked at that had builds lately, for so long."""
FORGET = timedelta(days=8)


@dataclass(frozen=True, slots=True)
class Look:
    """A repository whose webhook is to be looked at; `since` None: only the hook, not its deliveries."""

    source: str
    repository: str
    since: datetime | None


def redeliver(held: Resources | None = None) -> None:
    """Look at the webhooks that are due, one after the other.

    `held`: what to work with; None (as a worker calls it) takes this process's own.
    """
    held = held or resources()
    queues.answer(held.redis, queues.REDELIVER)
    until, asked = time.monotonic() + LONGEST_SECONDS, 0
    for look in _claim(held, utc_now()):
        if asked >= MOST_IN_ALL or time.monotonic() > until or held.desk.closing:
            break  # the others are due again when their claim is over
        asked += _follow(held, look)


def _claim(held: Resources, now: datetime) -> list[Look]:
    """Take what is due; whoever dies over it leaves it due again after `CLAIM`."""

    def unit(write: db.Write) -> list[Look]:
        columns = models.redeliveries.c
        write.connection.execute(delete(models.redeliveries).where(columns.asked_at < now - FORGET))
        found = list(due(write.connection, held.settings.sources, now))[:MOST_AT_ONCE]
        taken = [
            {"source": look.source, "repository": look.repository, "next_look_at": now + CLAIM}
            for look in found
        ]
        health.upsert(write.connection, models.hooks, taken)
        return found

    return db.as_writer(held.engine, unit)


# ---- what is due -----------------------------------------------------------------------------


def due(connection: Connection, sources: Mapping[str, SourceSettings], now: datetime) -> Iterator[Look]:
    """The repositories whose webhooks are to be looked at now."""
    able = {name for name, source in sources.items() if _can_look(source)}
    able -= set(budget.paused(connection, now))
    hooks = {
        (row["source"], row["repository"]): row for row in connection.execute(select(models.hooks)).mappings()
    }
    absence = health.last_absence(connection)
    for place, missed_at in _places(connection, sources, able, absence, now).items():
        hook: Any = hooks.get(place) or {}
        if hook.get("next_look_at") and hook["next_look_at"] > now:
            continue
        since = _since(hook.get("looked_at"), missed_at, absence, now)
        if since or (sources[place[0]].source.platform == "gitlab" and _is_stale(hook.get("looked_at"), now)):
            yield Look(*place, since)


def _can_look(source: SourceSettings) -> bool:
    known = hook_api(source.source.platform) is not None
    return known and source.can_poll and source.has_token and bool(source.webhook_secrets)


Place = tuple[str, str]


def _places(
    connection: Connection,
    sources: Mapping[str, SourceSettings],
    able: set[str],
    absence: health.Absence | None,
    now: datetime,
) -> dict[Place, datetime | None]:
    """(source, repository) of all that may have a webhook of ours, with the last push that was missed."""
    configured = [(name, repository) for name in sorted(able) for repository in sources[name].repositories]
    missed = connection.execute(select(models.repositories)).mappings()
    places: dict[Place, datetime | None] = dict.fromkeys(configured)
    if absence and now - absence.ended < SEEN_AFTER:
        places |= dict.fromkeys(_seen(connection, able, now))
    places |= {
        (row["source"], row["repository"]): row["missed_at"] for row in missed if row["source"] in able
    }
    return _each_once(connection, places)


def _each_once(
    connection: Connection, places: Mapping[Place, datetime | None]
) -> dict[Place, datetime | None]:
    """Each repository under the name its platform gives it, with its last miss."""
    columns = models.places.c
    aliases = select(columns.source, columns.repository, columns.same_as).where(columns.same_as.is_not(None))
    told = {(row.source, row.repository): row.same_as for row in connection.execute(aliases)}
    once: dict[Place, datetime | None] = {}
    for place, missed_at in places.items():
        name = (place[0], told.get(place, place[1]))
        times = [at for at in (missed_at, once.get(name)) if at is not None]
        once[name] = max(times, default=None)
    return once


def _seen(connection: Connection, able: set[str], now: datetime) -> list[Place]:
    columns = models.builds.c
    found = connection.execute(
        select(columns.source, columns.repository)
        .where(columns.created_at > now - SEEN, columns.source.in_(able), columns.repository.is_not(None))
        .distinct()
    )
    return [(row.source, row.repository) for row in found]


def _since(
    looked_at: datetime | None, missed_at: datetime | None, absence: health.Absence | None, now: datetime
) -> datetime | None:
    """From when deliveries are of interest: those of a miss or an absence that nobody looked at since."""
    begun = [missed_at - MARGIN] if missed_at and _is_news(missed_at, looked_at) else []
    if absence and _is_news(absence.ended, looked_at):
        begun.append(absence.began)
    if not begun or max(begun) < now - KEPT:
        return None
    return max(min([*begun, *([looked_at - MARGIN] if looked_at else [])]), now - KEPT)


def _is_news(at: datetime, looked_at: datetime | None) -> bool:
    return looked_at is None or at > looked_at


def _is_stale(looked_at: datetime | None, now: datetime) -> bool:
    return looked_at is None or now - looked_at > ALERT_INTERVAL


# ---- one look --------------------------------------------------------------------------------


def _follow(held: Resources, look: Look) -> int:
    """Look at one webhook and note what came of it; how many redeliveries were asked for.

    Never raises for what a platform does.
    """
    began, address = utc_now(), Address(look.source, held.settings.public_url)
    mask = redactor(settings.secret_texts(held.settings))
    try:
        account = _account(held, look)
        mask = redactor(account.secrets)
        hook = registration.ours(registration.find_hooks(account, look.repository), address)
        asked, left = _ask_again(held, account, look, hook) if hook and look.since else (0, False)
    except (PollError, RegistrationError) as error:
        why = mask(str(error))
        log.warning("webhook not looked at: %s %s: %s", look.source, look.repository, why)
        _note_fault(held, look, error, why)
        return 0
    values = {"refused": False, "next_look_at": None} | ({} if left else {"looked_at": began})
    db.as_writer(held.engine, lambda write: _note_look(write.connection, look, hook, values, utc_now()))
    return asked


def _account(held: Resources, look: Look) -> Account:
    """The source with a token that can be used; a lent one is a secret as well."""
    of = held.settings.sources[look.source]
    keyring = Keyring(held.engine, held.settings.encryption_keys)
    able = replace(of, source=keyring.source(of, utc_now()))
    secrets = [*settings.secret_texts(held.settings), able.source.token]
    reserve = held.settings.api_budget_reserve
    return Account(able, held.engine, reserve, patient=True, clock=utc_now, secrets=secrets)


def _ask_again(held: Resources, account: Account, look: Look, hook: Hook) -> tuple[int, bool]:
    """Ask for each failed delivery once: how many, and are some left for the next run?"""
    assert look.since is not None
    failed = registration.failed_deliveries(account, look.repository, hook, look.since)
    with db.reading(held.engine) as connection:
        wanted = unsettled(connection, look.source, hook.id, failed)
    for delivery in wanted[:MOST_ASKED]:
        registration.redeliver(account, look.repository, hook, delivery)
        _remember(held, look.source, hook.id, delivery.envelope.delivery_id)
    if wanted:
        log.info("redeliveries asked for: %s %s %d", look.source, look.repository, len(wanted[:MOST_ASKED]))
    return len(wanted[:MOST_ASKED]), len(wanted) > MOST_ASKED


def _remember(held: Resources, source: str, hook_id: str, guid: str) -> None:
    """After the asking: whoever dies between asks twice, which is harmless; never is too little."""
    row = {"source": source, "hook_id": hook_id, "guid": guid, "asked_at": utc_now()}
    db.in_transaction(held.engine, lambda connection: health.upsert(connection, models.redeliveries, [row]))


def unsettled(
    connection: Connection, source: str, hook_id: str, failed: Sequence[HookDelivery]
) -> list[HookDelivery]:
    """Those that never reached us and were not asked for before."""
    columns, arrived = models.redeliveries.c, models.inbound.c
    asked = set(
        connection.execute(
            select(columns.guid).where(columns.source == source, columns.hook_id == hook_id)
        ).scalars()
    )
    keys = {one: Arrival(source, one.envelope, {}, b"", None).delivery_key for one in failed}
    known = set(
        connection.execute(
            select(arrived.delivery_key).where(
                arrived.delivery_key.in_(bindparam("keys", list(keys.values()), expanding=True)),
                arrived.status != "unreadable",
            )
        ).scalars()
    )
    return [one for one in failed if one.envelope.delivery_id not in asked and keys[one] not in known]


# ---- what came of it -------------------------------------------------------------------------


def _note_look(
    connection: Connection, look: Look, hook: Hook | None, values: dict[str, Any], now: datetime
) -> None:
    """Store a look; tell admins once that a webhook is muted, and once that it works again."""
    columns = models.hooks.c
    here = (columns.source == look.source, columns.repository == look.repository)
    before = connection.execute(select(columns.alert).where(*here)).scalar()
    alert = hook.alert if hook else None
    connection.execute(update(models.hooks).where(*here).values(alert=alert, **values))
    where = f"{look.source}:{look.repository}"
    if alert and not before:
        message = (
            f"The webhook of {look.repository} at {look.source} sends nothing: {alert}. Builds are polled. "
            "Mend what it was answered (see `buildrelay doctor`), then send it a test."
        )
        health.tell(connection, "source.hook_disabled", where, message, now)
    if before and hook and not alert:
        message = f"The webhook of {look.repository} at {look.source} works again."
        health.tell(connection, "source.hook_enabled", where, message, now)


def _note_fault(held: Resources, look: Look, error: Exception, why: str) -> None:
    """Come back later; where the token may not see webhooks in a day, and admins are told once.

    `why`: the error's text without secrets.
    """
    now, columns = utc_now(), models.hooks.c
    hidden = isinstance(error, RegistrationError) or (
        isinstance(error, PollError) and error.fault in registration.HIDDEN
    )
    wait = timedelta(seconds=getattr(error, "retry_after_seconds", None) or 0)
    values = {"refused": hidden, "next_look_at": now + (REFUSED_PAUSE if hidden else max(FAULT_PAUSE, wait))}

    def unit(write: db.Write) -> None:
        told = select(columns.refused).where(columns.source == look.source, columns.refused)
        if hidden and write.connection.execute(told).first() is None:
            _tell_hidden(write.connection, look, why, now)
        here = (columns.source == look.source, columns.repository == look.repository)
        write.connection.execute(update(models.hooks).where(*here).values(values))

    db.as_writer(held.engine, unit)


def _tell_hidden(connection: Connection, look: Look, why: str, now: datetime) -> None:
    message = (
        f"Our token for {look.source} may not see the webhooks of {look.repository} ({why}), so missed "
        "deliveries can't be asked for again. Polling finds what they would have told."
    )
    health.tell(connection, "source.hooks_hidden", look.source, message, now)
