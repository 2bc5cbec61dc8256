"""Who wants what: the subscribers' rows, their secrets, and which events match their filters."""

import secrets as random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import orjson
from sqlalchemy import Connection, Engine, delete, func, insert, literal_column, select, update

from webhook_app import bulk, circuit, destinations, formats, models, provider_shapes, sealing, signing
from webhook_app.db import Write, as_writer, in_transaction
from webhook_app.lifecycle import State
from webhook_app.times import iso

Row = Mapping[str, Any]

STATIC_ID = "sub_dashboard"
"""The subscriber that the settings make, if they name one."""

UNTRIED: Row = {
    "failing_since": None,
    "failures": 0,
    "on_probation": False,
    "warned_percent": 0,
    "slow_until": None,
    **asdict(circuit.Circuit()),
}
"""The columns that tell how an endpoint fares, of one that nothing is known of."""

CLEAN_RECORD: Row = {"state": "active", "disabled_reason": None, **UNTRIED}
"""The columns of a subscriber that nothing has gone wrong with."""

LONGEST_GLOB, LONGEST_DESCRIPTION, LONGEST_URL = 255, 1000, destinations.URL_LENGTH
MOST_GLOBS = 100
MOST_PER_SECOND = 10_000
"""What the API and the command take, at most."""

DEFAULT_GRACE_SECONDS = 86_400
MOST_GRACE_SECONDS = 7 * 86_400
MOST_OLD_SECRETS = 10
"""Each one that is live adds a signature to every request; receivers cap their headers at some 8 KiB."""


@dataclass(frozen=True, slots=True)
class Filters:
    """One active subscriber's globs; an empty list matches everything.

    `forks`: globs of branches and changes are held against builds of forks as well.
    """

    id: str
    events: tuple[str, ...]
    sources: tuple[str, ...]
    repositories: tuple[str, ...]
    branches: tuple[str, ...]
    states: tuple[str, ...] = ()
    conclusions: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    format: str = "standard"
    forks: bool = False

    def match(self, type_: str, data: Row, change: str | None = None) -> bool:
        """Does an event of this type, with this data, go to the subscriber?

        Sources and repositories ignore case.  In the format `provider` only what a platform sends goes out.
        """
        return (
            (not self.states or data.get("state") in self.states)
            and (not self.conclusions or data.get("conclusion") in self.conclusions)
            and (not self.changes or change in self.changes)
            and (self.format != formats.PROVIDER or provider_shapes.has_shape(type_, data))
            and self._match_globs(type_, data)
        )

    def _match_globs(self, type_: str, data: Row) -> bool:
        return (
            _any_glob(self.events, type_)
            and _any_glob(self.sources, data.get("source"), fold=True)
            and _any_glob(self.repositories, data.get("repository"), fold=True)
            and self._match_branch(data)
        )

    def _match_branch(self, data: Row) -> bool:
        """A fork's branch is none of the repository's: it counts only where it is asked for.

        Then it is known as it is shown (`stranger:main`), and by its own name.
        """
        branch: str | None = data.get("branch")
        if not data.get("is_fork"):
            return _any_glob(self.branches, branch)
        if not self.forks:
            return not (self.branches or self.changes)
        own_name = branch and branch.partition(":")[2]
        return _any_glob(self.branches, branch) or _any_glob(self.branches, own_name)


def _any_glob(globs: tuple[str, ...], value: str | None, fold: bool = False) -> bool:
    if not globs:
        return True
    if value is None:
        return False
    if fold:
        return any(fnmatchcase(value.casefold(), glob.casefold()) for glob in globs)
    return any(fnmatchcase(value, glob) for glob in globs)


EVENT_TYPES = (
    *(f"build.{state.value}" for state in State),
    "build.progress", "build.reported",
    "build.polling_started", "build.polling_completed", "build.polling_timeout", "build.polling_error",
    "release.started", "release.build_dispatched", "release.build_completed", "release.build_failed",
    "release.failed", "release.cancelled", "release.published",
    "subscriber.test", "subscriber.warning", "subscriber.disabled",
)  # fmt: skip
"""Every type an event may have, those of releases included."""

_FAMILIES = tuple(f"{name}.*" for name in dict.fromkeys(type_.partition(".")[0] for type_ in EVENT_TYPES))


def check_event_glob(glob: str) -> None:
    """`ValueError`, which names the nearest type, for a glob that no event can ever match."""
    if any(fnmatchcase(type_, glob) for type_ in EVENT_TYPES):
        return
    near = get_close_matches(glob.lower(), [*_FAMILIES, *EVENT_TYPES], n=1)
    meant = f"did you mean {near[0]}?" if near else f"types are {', '.join(_FAMILIES)}"
    raise ValueError(f"no event type matches {glob!r}: {meant}")


_GLOBS = ("events", "sources", "repositories", "branches", "states", "conclusions", "changes")


def filters(row: Row) -> Filters:
    """The filters of a subscriber's row."""
    globs = {name: tuple(row[name]) for name in _GLOBS}
    return Filters(row["id"], **globs, format=row["format"], forks=row["forks"])


Groups = Mapping[Filters, tuple[str, ...]]
_cached: tuple[Engine | None, int, tuple[Filters, ...], Groups] = (None, -1, (), {})


def active(write: Write) -> tuple[Filters, ...]:
    """The filters of all active subscribers, read again only when a subscriber changed.

    `counters.subscribers_revision`, read under the writer's lock, says so.
    """
    return _active(write)[0]


def groups(write: Write) -> Groups:
    """The ids of all active subscribers, in order, by what they want: filters with an empty `id`.

    Most subscribers want the same few things, and then one look decides for all of them.
    """
    return _active(write)[1]


def _active(write: Write) -> tuple[tuple[Filters, ...], Groups]:
    global _cached  # noqa: PLW0603  a cache of one, checked by revision
    engine, revision, known, grouped = _cached
    if engine is write.connection.engine and revision == write.last["subscribers_revision"]:
        return known, grouped
    rows = bulk.run(write.connection, _ACTIVE, {})
    found = tuple(filters(dict(zip(_ACTIVE.selected_columns.keys(), row, strict=True))) for row in rows)
    by_wish: defaultdict[Filters, list[str]] = defaultdict(list)
    for one in found:
        by_wish[replace(one, id="")].append(one.id)
    grouped = {wish: tuple(ids) for wish, ids in by_wish.items()}
    if not write.gave("subscribers_revision"):  # else it may yet be rolled back, and the number given again
        _cached = (write.connection.engine, write.last["subscribers_revision"], found, grouped)
    return found, grouped


_s = models.subscribers.c
_ACTIVE = (
    select(_s.id, _s.format, _s.forks, *(_s[name] for name in _GLOBS))
    .where(_s.state == literal_column("'active'"))
    .order_by(_s.id)
)


class TooMany(Exception):
    """No further subscriber is taken; the message says how many there may be."""


def need_room(write: Write, most: int) -> None:
    """Raises `TooMany` if there are `most` subscribers already: each one costs every push some work."""
    count = write.connection.execute(select(func.count()).select_from(models.subscribers)).scalar_one()
    if count >= most:
        raise TooMany(f"there are {count} subscribers, and MAX_SUBSCRIBERS allows {most}")


def create(write: Write, wanted: Mapping[str, Any], keys: Sequence[str], now: datetime) -> tuple[Row, str]:
    """Insert a subscriber made of validated API fields; its row, and its secret in clear, this once.

    For Ed25519 the secret is the public key `whpk_…`: subscribers verify with it, it is no secret.
    """
    secret, shown = _new_secret(wanted["signing"])
    row = {
        "id": wanted.get("id") or f"sub_{random.token_hex(10)}",
        **_url_columns(wanted["url"], keys),
        **{name: list(wanted.get(name) or []) for name in _GLOBS},
        "format": wanted.get("format") or "standard",
        "forks": wanted.get("forks", False),
        "origin": wanted.get("origin") or "api",
        "description": wanted.get("description"),
        "rate_limit_per_second": wanted.get("rate_limit_per_second"),
        "ordered": wanted.get("ordered", True),
        "headers": _seal(wanted.get("headers") or {}, keys),
        "signing": wanted["signing"],
        "secrets": _seal([{"secret": secret, "until": None}], keys),
        **CLEAN_RECORD,
        "paced_until": None,
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
    """Set columns of a subscriber (`headers` and `url` in clear); False if there is no such subscriber."""
    sealed = dict(values)
    if "url" in sealed:
        sealed |= _url_columns(sealed["url"], keys)
    if "headers" in sealed:
        sealed["headers"] = _seal(sealed["headers"], keys) if sealed["headers"] else None
    write.new_id("subscribers_revision")
    result = write.connection.execute(
        update(models.subscribers)
        .where(models.subscribers.c.id == subscriber_id)
        .values(**sealed, updated_at=now)
    )
    return result.rowcount == 1


def edit(write: Write, row: Row, wanted: Mapping[str, Any], keys: Sequence[str], now: datetime) -> bool:
    """Change what a person named; True if headers that it had are dropped by that.

    A new URL begins without the failures of the old one, and at another origin (scheme, host or port) without
    its headers too, unless they are named: they may hold a secret that is meant for the old one.
    """
    url = wanted.get("url")
    leaves = url is not None and destinations.origin(url) != destinations.origin(row["url"])
    drops = leaves and "headers" not in wanted and _has_headers(row, keys)
    values = {**UNTRIED, **wanted} if url not in (None, _opened_url(row, keys)) else wanted
    change(write, row["id"], {**values, "headers": {}} if drops else values, keys, now)
    return drops


def _has_headers(row: Row, keys: Sequence[str]) -> bool:
    try:
        return bool(custom_headers(row, keys))
    except sealing.SealError:
        return True


def is_fixed(row: Row, wanted: Mapping[str, Any]) -> bool:
    """Whether this would change what the settings say; the next start would undo it."""
    return row["origin"] == "settings" and bool(wanted.keys() & {"url", "headers", "format"})


def sync_static(
    write: Write, url: str, api_key: str, keys: Sequence[str], now: datetime, format_: str = "standard"
) -> bool:
    """Make, change or remove the one subscriber of the settings; False if it was as it should be.

    It gets `build.*` with `Authorization: Bearer API_KEY`; an empty `url` removes it.  A new address, key
    or format gives it a clean record.  Raises `sealing.SealError` without a usable key.
    """
    row = get(write.connection, STATIC_ID)
    if not url:
        return row is not None and _remove_row(STATIC_ID, write)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    wanted: dict[str, Any] = {"url": url, "headers": headers, "format": format_}
    if row is None:
        fixed = {"id": STATIC_ID, "origin": "settings", "events": ["build.*"], "signing": "hmac"}
        create(write, wanted | fixed | {"description": "DASHBOARD_API_URL"}, keys, now)
        return True
    if (_opened_url(row, keys), row["format"]) == (url, format_) and _is_sealed_in(row, headers, keys):
        return False
    return change(write, STATIC_ID, {**CLEAN_RECORD, **wanted}, keys, now)


def _is_sealed_in(row: Row, headers: Any, keys: Sequence[str]) -> bool:
    try:
        return bool(custom_headers(row, keys) == headers)
    except sealing.SealError:
        return False  # sealed with a key that is gone: what the settings say is sealed anew


REMOVED_AT_ONCE = 200


def remove(engine: Engine, subscriber_id: str, now: datetime) -> bool:
    """Delete a subscriber with its messages; False if there is none.

    Disabled first, so that no new ones come; then in portions, since all at once would hold up every push.
    Whoever dies between leaves it disabled, to be removed again.
    """
    given_up = {"state": "disabled", "disabled_reason": "it is being removed"}
    found = as_writer(engine, lambda write: change(write, subscriber_id, given_up, (), now))
    while found and in_transaction(engine, partial(_remove_messages, subscriber_id)):
        pass
    return found and as_writer(engine, partial(_remove_row, subscriber_id))


def _remove_messages(subscriber_id: str, connection: Connection) -> int:
    columns = models.messages.c
    some = select(columns.id).where(columns.subscriber == subscriber_id).limit(REMOVED_AT_ONCE)
    return connection.execute(delete(models.messages).where(columns.id.in_(some.scalar_subquery()))).rowcount


def _remove_row(subscriber_id: str, write: Write) -> bool:
    """With the messages that it has left."""
    write.new_id("subscribers_revision")
    result = write.connection.execute(
        delete(models.subscribers).where(models.subscribers.c.id == subscriber_id)
    )
    return result.rowcount == 1


def rotate_secret(
    write: Write, row: Row, grace_seconds: int, keys: Sequence[str], now: datetime
) -> tuple[str, datetime | None]:
    """Give a new secret; the old one signs as well until the grace is over, or ten newer ones came.

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
    kept = [{"secret": secret, "until": None}, *live[:MOST_OLD_SECRETS]]
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


def callback_url(row: Row, keys: Sequence[str]) -> str:
    """Where a subscriber's messages go, whole.  Raises `SealError`.

    `url` holds what everybody may see of it.  A URL that is there in clear has no path, or an earlier version
    stored it, perhaps beside us just now: then it counts.
    """
    if destinations.MASKED not in row["url"] or not row["sealed_url"]:
        return str(row["url"])
    return sealing.unseal(row["sealed_url"], tuple(keys))


def _opened_url(row: Row, keys: Sequence[str]) -> str | None:
    try:
        return callback_url(row, keys)
    except sealing.SealError:
        return None


def shown_url(row: Row, keys: Sequence[str], whole: bool) -> str:
    """A subscriber's URL as it is shown: `whole` to those who may change it, if one of the keys opens it."""
    opened = _opened_url(row, keys) if whole else None
    return opened or (row["url"] if destinations.MASKED in row["url"] else destinations.shown(row["url"]))


def _url_columns(url: str, keys: Sequence[str]) -> dict[str, str | None]:
    shown = destinations.shown(url)
    return {"url": shown, "sealed_url": None if shown == url else sealing.seal(url, tuple(keys))}


def seal_urls(engine: Engine, keys: Sequence[str]) -> int:
    """Seal the callback URLs that an earlier version stored in clear; how many.  Without a key none."""
    return as_writer(engine, partial(_seal_urls, tuple(keys))) if keys else 0


def _seal_urls(keys: tuple[str, ...], write: Write) -> int:
    columns = models.subscribers.c
    clear = select(columns.id, columns.url).where(columns.url.not_like(f"%{destinations.MASKED}%"))
    found = {row.id: _url_columns(row.url, keys) for row in write.connection.execute(clear)}
    sealed = {id_: values for id_, values in found.items() if values["sealed_url"]}
    for id_, values in sealed.items():
        write.connection.execute(update(models.subscribers).where(columns.id == id_).values(**values))
    return len(sealed)


def public_key(row: Row, keys: Sequence[str]) -> str | None:
    """The `whpk_…` that verifies an Ed25519 subscriber's messages; None for HMAC.  Raises `SealError`."""
    if row["signing"] != "ed25519":
        return None
    (newest, _), *_ = _secrets(row, keys)
    return signing.public_key(newest)


def closed(connection: Connection, keys: Sequence[str]) -> list[str]:
    """The ids of the subscribers whose secrets, headers or URL open with none of the keys."""
    columns = models.subscribers.c
    statement = select(columns.id, columns.url, *(columns[name] for name in _SEALED)).order_by(columns.id)
    rows = connection.execute(statement).mappings()
    return [row["id"] for row in rows if _is_closed(dict(row), keys)]


def _is_closed(row: Row, keys: Sequence[str]) -> bool:
    try:
        custom_headers(row, keys)
        callback_url(row, keys)
        _secrets(row, keys)
    except sealing.SealError:
        return True
    return False


REKEY_PORTION = 20
_SEALED = ("headers", "secrets", "sealed_url")


def rekey(engine: Engine, keys: Sequence[str]) -> tuple[int, list[str]]:
    """Seal every secret, header and URL with the newest key; how many, and the ids of those no key opens.

    In portions, each its own transaction; what has the newest key already is left alone, so it can be
    stopped and repeated at any time.  Raises `SealError` without any key.
    """
    count, closed, after = seal_urls(engine, keys), list[str](), ""
    while True:
        resealed, lost, after = as_writer(engine, partial(_rekey_portion, tuple(keys), after))
        count += resealed
        closed += lost
        if not after:
            return count, closed


def _rekey_portion(keys: tuple[str, ...], after: str, write: Write) -> tuple[int, list[str], str]:
    columns = models.subscribers.c
    statement = select(columns.id, *(columns[name] for name in _SEALED)).where(columns.id > after)
    rows = write.connection.execute(statement.order_by(columns.id).limit(REKEY_PORTION)).mappings().all()
    count, closed = 0, []
    for row in rows:
        old = [name for name in _SEALED if row[name] and not sealing.is_newest(row[name], keys)]
        try:
            values = {name: sealing.reseal(row[name], keys) for name in old}
        except sealing.SealError:
            closed.append(str(row["id"]))
            continue
        if values:
            write.connection.execute(
                update(models.subscribers).where(columns.id == row["id"]).values(**values)
            )
            count += len(values)
    return count, closed, str(rows[-1]["id"]) if len(rows) == REKEY_PORTION else ""


def get(connection: Connection, subscriber_id: str) -> Row | None:
    """One subscriber's row."""
    found = connection.execute(select(models.subscribers).where(models.subscribers.c.id == subscriber_id))
    row = found.mappings().one_or_none()
    return dict(row) if row is not None else None
