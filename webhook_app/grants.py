"""Access tokens that platforms lent us for a time, sealed, shared by all workers.

A row is one way to get tokens (`Owner`: a GitHub App's installation, an OAuth application with its
first refresh token), so settings that change begin a row of their own and never meet old tokens.
`version` counts the tokens it had.  Whoever wants the next one takes the row's lease first: nobody
holds a lock of the database while a platform is asked, and a lease whose holder died ends by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson
from sqlalchemy import ColumnElement, Connection, Engine, Row, and_, delete, insert, select, update

from webhook_app import models, sealing, workers
from webhook_app.db import Write, as_writer
from webhook_app.platforms import Grant, PollError, PollFault

KEPT = timedelta(days=30)
"""How long the tokens of former settings stay, should those come back."""

_c = models.credentials.c


@dataclass(frozen=True, slots=True)
class Owner:
    """What a row belongs to: a digest of the settings that get its tokens, and a source that has them.

    Sources with the same settings share a row: a refresh token works once, whoever uses it.
    """

    identity: str
    source: str


@dataclass(frozen=True, slots=True)
class Held:
    """A row as it was read; version 0: there is none yet.

    `refused_at`: when this token took the place of one that was refused before its time.
    `failure`: what became of the last try to get the next one; before `retry_at` nobody tries again.
    `closed`: there are tokens, but no key opens them.
    """

    version: int = 0
    grant: Grant | None = None
    refreshed_at: datetime | None = None
    refused_at: datetime | None = None
    retry_at: datetime | None = None
    failure: PollError | None = None
    closed: sealing.SealError | None = None
    leased_until: datetime | None = None

    def is_given_up(self, at: datetime) -> bool:
        """Did the last try fail so shortly before `at` that another would not help?"""
        return self.failure is not None and self.retry_at is not None and at < self.retry_at

    def is_leased(self, at: datetime) -> bool:
        """Is somebody asking for the next one?"""
        return self.leased_until is not None and at < self.leased_until


def held(connection: Connection, owner: Owner, keys: Sequence[str]) -> Held:
    """What is stored for `owner`."""
    row = connection.execute(select(models.credentials).where(_is(owner))).one_or_none()
    if row is None:
        return Held()
    grant, closed = None, None
    try:
        grant = _grant(row, tuple(keys))
    except sealing.SealError as error:
        closed = error
    return Held(
        version=row.version,
        grant=grant,
        refreshed_at=row.refreshed_at,
        refused_at=row.refused_at,
        retry_at=row.retry_at,
        failure=_failure(row.failure),
        closed=closed,
        leased_until=row.leased_until,
    )


def _grant(row: Row[Any], keys: tuple[str, ...]) -> Grant | None:
    if row.tokens is None:
        return None
    access, refresh = orjson.loads(sealing.unseal(row.tokens, keys))
    return Grant(access, row.expires_at, refresh)


def _failure(told: list[Any] | None) -> PollError | None:
    if told is None:
        return None
    fault, message, retry_after_seconds = told
    return PollError(PollFault(fault), message, retry_after_seconds)


def lease(write: Write, owner: Owner, version: int, now: datetime, until: datetime) -> str | None:
    """Take the right to get the token after `version`; None if another has it, or has got one already."""
    row = write.connection.execute(select(_c.version, _c.leased_until).where(_is(owner))).one_or_none()
    if row is None:
        write.connection.execute(
            insert(models.credentials), {"source": owner.source, "identity": owner.identity, "version": 0}
        )
    elif row.version != version or (row.leased_until is not None and row.leased_until > now):
        return None
    taken = workers.token()
    write.connection.execute(
        update(models.credentials).where(_is(owner)).values(lease=taken, leased_until=until)
    )
    return taken


def store(
    write: Write, owner: Owner, version: int, grant: Grant, keys: Sequence[str], now: datetime, refused: bool
) -> bool:
    """Keep both tokens and give the lease back; False if the token after `version` is there already.

    `refused`: they take the place of one that was refused.
    """
    tokens = orjson.dumps([grant.access_token, grant.refresh_token]).decode()
    stored = write.connection.execute(
        update(models.credentials)
        .where(_is(owner), _c.version == version)
        .values(
            version=version + 1,
            tokens=sealing.seal(tokens, tuple(keys)),
            expires_at=grant.expires_at,
            refreshed_at=now,
            refused_at=now if refused else None,
            retry_at=None,
            failure=None,
            lease=None,
            leased_until=None,
        )
    )
    former = and_(_c.source == owner.source, _c.identity != owner.identity, _c.refreshed_at < now - KEPT)
    write.connection.execute(delete(models.credentials).where(former))
    return stored.rowcount == 1


def fail(write: Write, owner: Owner, taken: str, error: PollError, retry_at: datetime) -> None:
    """Give the lease back, and tell those who want the token before `retry_at` why there is none."""
    told = [error.fault.value, str(error), error.retry_after_seconds]
    write.connection.execute(
        update(models.credentials)
        .where(_is(owner), _c.lease == taken)
        .values(retry_at=retry_at, failure=told, lease=None, leased_until=None)
    )


def rekey(engine: Engine, keys: Sequence[str]) -> tuple[int, list[str]]:
    """Seal all tokens with the newest key; how many, and the sources of those no key opens.

    What has the newest key already is left alone.  Raises `SealError` without any key.
    """

    def unit(write: Write) -> tuple[int, list[str]]:
        count, closed = 0, []
        for row in write.connection.execute(select(models.credentials).where(_c.tokens.is_not(None))).all():
            try:
                count += _reseal(write, Owner(row.identity, row.source), row.tokens, tuple(keys))
            except sealing.SealError:
                closed.append(str(row.source))
        return count, closed

    return as_writer(engine, unit)


def _reseal(write: Write, owner: Owner, tokens: str, keys: tuple[str, ...]) -> int:
    if sealing.is_newest(tokens, keys):
        return 0
    resealed = sealing.reseal(tokens, keys)
    write.connection.execute(update(models.credentials).where(_is(owner)).values(tokens=resealed))
    return 1


def _is(owner: Owner) -> ColumnElement[bool]:
    return _c.identity == owner.identity
