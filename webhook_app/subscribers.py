"""Who wants what: the subscribers' rows, their secrets, and which events match their filters."""

import secrets as random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any

import orjson
from sqlalchemy import Connection, delete, insert, select, update

from webhook_app import models, sealing, signing
from webhook_app.db import Write
from webhook_app.times import iso

Row = Mapping[str, Any]

DEFAULT_GRACE_SECONDS = 86_400
MOST_GRACE_SECONDS = 7 * 86_400


@dataclass(frozen=True, slots=True)
class Filters:
    """One active subscriber's globs; an empty list matches everything."""

    id: str
    events: tuple[str, ...]
    sources: tuple[str, ...]
    repositories: tuple[str, ...]
    branches: tuple[str, ...]

    def match(self, type_: str, data: Row) -> bool:
        """Does an event of this type, with this data, go to the subscriber?  Repositories ignore case."""
        return (
            _any_glob(self.events, type_)
            and _any_glob(self.sources, data.get("source"))
            and _any_glob(self.repositories, data.get("repository"), fold=True)
            and _any_glob(self.branches, data.get("branch"))
        )


def _any_glob(globs: tuple[str, ...], value: str | None, fold: bool = False) -> bool:
    if not globs:
        return True
    if value is None:
        return False
    if fold:
        return any(fnmatchcase(value.casefold(), glob.casefold()) for glob in globs)
    return any(fnmatchcase(value, glob) for glob in globs)


_cached: tuple[str, int, tuple[Filters, ...]] = ("", -1, ())


def active(write: Write) -> tuple[Filters, ...]:
    """The filters of all active subscribers, read again only when a subscriber changed.

    `counters.subscribers_revision`, read under the writer's lock, says so.
    """
    global _cached  # noqa: PLW0603  a cache of one, checked by revision
    database, revision, known = _cached
    url = str(write.connection.engine.url)
    if database == url and revision == write.last["subscribers_revision"]:
        return known
    columns = models.subscribers.c
    rows = write.connection.execute(select(models.subscribers).where(columns.state == "active"))
    found = tuple(
        Filters(row.id, tuple(row.events), tuple(row.sources), tuple(row.repositories), tuple(row.branches))
        for row in rows
    )
    _cached = (url, write.last["subscribers_revision"], found)
    return found


def create(write: Write, wanted: Mapping[str, Any], keys: Sequence[str], now: datetime) -> tuple[Row, str]:
    """Insert a subscriber made of validated API fields; its row, and its secret in clear, this once.

    For Ed25519 the secret is the public key `whpk_…`: subscribers verify with it, it is no secret.
    """
    secret, shown = _new_secret(wanted["signing"])
    row = {
        "id": f"sub_{random.token_hex(10)}",
        "url": wanted["url"],
        "events": wanted.get("events") or [],
        "sources": wanted.get("sources") or [],
        "repositories": wanted.get("repositories") or [],
        "branches": wanted.get("branches") or [],
        "description": wanted.get("description"),
        "rate_limit_per_second": wanted.get("rate_limit_per_second"),
        "ordered": wanted.get("ordered", True),
        "headers": _seal(wanted.get("headers") or {}, keys),
        "signing": wanted["signing"],
        "secrets": _seal([{"secret": secret, "until": None}], keys),
        "state": "active",
        "disabled_reason": None,
        "failing_since": None,
        "failures": 0,
        "created_at": now,
        "updated_at": now,
    }
    write.connection.execute(insert(models.subscribers), row)
    write.new_id("subscribers_revision")
    return row, shown


def _new_secret(kind: str) -> tuple[str, str]:
    if kind == "ed25519":
        private, public = signing.new_ed25519_pair(random.token_bytes(32))
        return private, public
    secret = signing.new_hmac_secret(random.token_bytes(32))
    return secret, secret


def _seal(value: Any, keys: Sequence[str]) -> str:
    return sealing.seal(orjson.dumps(value).decode(), tuple(keys))


def change(
    write: Write, subscriber_id: str, values: Mapping[str, Any], keys: Sequence[str], now: datetime
) -> bool:
    """Set columns of a subscriber (`headers` in clear); False if there is no such subscriber."""
    sealed = dict(values)
    if "headers" in sealed:
        sealed["headers"] = _seal(sealed["headers"] or {}, keys)
    write.new_id("subscribers_revision")
    result = write.connection.execute(
        update(models.subscribers)
        .where(models.subscribers.c.id == subscriber_id)
        .values(**sealed, updated_at=now)
    )
    return result.rowcount == 1


def remove(write: Write, subscriber_id: str) -> bool:
    """Delete a subscriber with its messages; False if there is none."""
    write.new_id("subscribers_revision")
    result = write.connection.execute(
        delete(models.subscribers).where(models.subscribers.c.id == subscriber_id)
    )
    return result.rowcount == 1


def rotate_secret(
    write: Write, row: Row, grace_seconds: int, keys: Sequence[str], now: datetime
) -> tuple[str, datetime | None]:
    """Give a new secret; the old one signs as well until the grace is over.

    Returns the new secret (or public key) in clear, this once, and when the previous one expires
    (None without grace).
    """
    secret, shown = _new_secret(row["signing"])
    until = now + timedelta(seconds=grace_seconds)
    live = [
        {"secret": old, "until": iso(until if end is None else min(end, until))}
        for old, end in _secrets(row, keys)
        if grace_seconds and (end is None or end > now)
    ]
    kept = [{"secret": secret, "until": None}, *live]
    change(write, row["id"], {"secrets": _seal(kept, keys)}, keys, now)
    return shown, until if live else None


def _secrets(row: Row, keys: Sequence[str]) -> list[tuple[str, datetime | None]]:
    entries = orjson.loads(sealing.unseal(row["secrets"], tuple(keys)))
    return [
        (entry["secret"], datetime.fromisoformat(entry["until"]) if entry["until"] else None)
        for entry in entries
    ]


def live_secrets(row: Row, keys: Sequence[str], now: datetime) -> tuple[str, ...]:
    """The secrets that sign now, newest first."""
    return tuple(secret for secret, until in _secrets(row, keys) if until is None or until > now)


def custom_headers(row: Row, keys: Sequence[str]) -> dict[str, str]:
    """The subscriber's own headers, in clear."""
    if not row["headers"]:
        return {}
    headers: dict[str, str] = orjson.loads(sealing.unseal(row["headers"], tuple(keys)))
    return headers


def get(connection: Connection, subscriber_id: str) -> Row | None:
    """One subscriber's row."""
    found = connection.execute(select(models.subscribers).where(models.subscribers.c.id == subscriber_id))
    row = found.mappings().one_or_none()
    return dict(row) if row is not None else None
