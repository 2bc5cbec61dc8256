"""Subscribers and their deliveries."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from flask import Response
from sqlalchemy import Connection

from webhook_app import (
    circuit,
    db,
    deliveries,
    destinations,
    endpoints,
    queries,
    queues,
    replays,
    subscribers,
    waiting,
)
from webhook_app.destinations import OutboundError
from webhook_app.endpoints import Answer
from webhook_app.queries import Row
from webhook_app.replays import Range, Started
from webhook_app.sealing import SealError
from webhook_app.times import utc_now
from webhook_app.web import auth, schemas
from webhook_app.web.api.masking import MASK
from webhook_app.web.api.spec import Blueprint, abort, operation, page
from webhook_app.web.problems import problem
from webhook_app.web.state import state

blueprint = Blueprint("subscribers", __name__, description="Callback URLs and what was delivered to them")

MOST_TRIES = 200


@blueprint.errorhandler(SealError)  # type: ignore[untyped-decorator]
def _no_key(error: SealError) -> Response:
    """Secrets can't be stored or read: that is for the operator to mend, and the message says how."""
    return problem(503, str(error))


def _keys() -> tuple[str, ...]:
    return state().settings.encryption_keys


def _shown(row: Row) -> dict[str, Any]:
    """A subscriber without its secrets; of its headers only the names, of its URL what the token may see."""
    url = subscribers.shown_url(row, _keys(), whole=auth.may("write"))
    shown = {**row, "url": url, "headers": None, "public_key": None}
    shown["circuit"] = circuit.shown(row)
    try:
        shown["headers"] = dict.fromkeys(subscribers.custom_headers(row, _keys()), MASK)
        shown["public_key"] = subscribers.public_key(row, _keys())
    except SealError:
        pass  # null says so
    return shown


def _need(connection: Connection, subscriber_id: str) -> Row:
    row = subscribers.get(connection, subscriber_id)
    if row is None:
        abort(404, "there is no such subscriber")
    return row


def _check(wanted: Mapping[str, Any]) -> None:
    """422 for a URL or headers that nothing may be sent to or with."""
    try:
        if "url" in wanted:
            destinations.check_callback_url(wanted["url"], state().settings.allow_private_callbacks)
    except OutboundError as error:
        abort(422, f"url: {error}", url=str(error))
    try:
        destinations.check_headers(wanted.get("headers") or {})
    except OutboundError as error:
        abort(422, f"headers: {error}", headers=str(error))


@operation(blueprint, "GET", "/subscribers", schemas.SubscriberPage, query=schemas.NamedPageQuery)
def list_subscribers(asked: dict[str, Any]) -> Any:
    """List subscribers, by id."""
    limit = asked["limit"]
    with db.reading(state().engine) as connection:
        rows = connection.execute(queries.subscribers(asked["cursor"], limit + 1)).mappings().all()
    listed = page(rows, limit, lambda row: row["id"])
    return listed | {"items": [_shown(row) for row in listed["items"]]}


@operation(
    blueprint, "POST", "/subscribers", schemas.CreatedSubscriber,
    scope="write", status=201, body=schemas.NewSubscriber,
)  # fmt: skip
def create_subscriber(wanted: dict[str, Any]) -> Any:
    """Register a callback URL.

    The answer holds the secret, this once: with it the subscriber verifies the signatures
    (Standard Webhooks).  For `ed25519` it is a public key.
    """
    _check(wanted)

    def unit(write: db.Write) -> tuple[Row, str]:
        subscribers.need_room(write, state().settings.max_subscribers)
        return subscribers.create(write, wanted, _keys(), utc_now())

    try:
        row, secret = db.as_writer(state().engine, unit)
    except subscribers.TooMany as error:
        abort(422, str(error))
    return _shown(row) | {"secret": secret}, 201, {"Location": f"/api/subscribers/{row['id']}"}


@operation(
    blueprint, "GET", "/subscribers/<string:subscriber_id>", schemas.SubscriberWithHealth, errors=[404]
)
def get_subscriber(subscriber_id: str) -> Any:
    """Get one subscriber, and how its endpoint did in its last 500 tries."""
    with db.reading(state().engine) as connection:
        row = _need(connection, subscriber_id)
        health = endpoints.health(connection, subscriber_id)
    return _shown(row) | {"health": health}


@operation(
    blueprint, "PATCH", "/subscribers/<string:subscriber_id>", schemas.Subscriber,
    scope="write", body=schemas.SubscriberChange, errors=[404, 409],
)  # fmt: skip
def change_subscriber(wanted: dict[str, Any], subscriber_id: str) -> Any:
    """Change what is named; `headers` are replaced as a whole.

    The failures of an endpoint are not those of another: a new `url` begins with none.  With another scheme,
    host or port it also drops the `headers`, which may hold a secret, unless they are given anew.
    """
    _check(wanted)

    def unit(write: db.Write) -> Row:
        row = _need(write.connection, subscriber_id)
        if subscribers.is_fixed(row, wanted):
            _need_own(row)
        subscribers.edit(write, row, wanted, _keys(), utc_now())
        return _need(write.connection, subscriber_id)

    return _shown(db.as_writer(state().engine, unit))


def _need_own(row: Row) -> None:
    """409 for what the settings say: the next start would undo it."""
    if row["origin"] == "settings":
        abort(409, "DASHBOARD_API_URL, _KEY and _FORMAT set this subscriber: change them instead")


@operation(
    blueprint, "DELETE", "/subscribers/<string:subscriber_id>", None,
    scope="write", status=204, errors=[404, 409],
)  # fmt: skip
def delete_subscriber(subscriber_id: str) -> Any:
    """Remove a subscriber, and with it its deliveries."""
    with db.reading(state().engine) as connection:
        _need_own(_need(connection, subscriber_id))
    subscribers.remove(state().engine, subscriber_id, utc_now())


@operation(
    blueprint, "POST", "/subscribers/<string:subscriber_id>/enable", schemas.Subscriber,
    scope="write", errors=[404],
)  # fmt: skip
def enable_subscriber(subscriber_id: str) -> Any:
    """Let a disabled subscriber get events again, and forget its failures.

    What it missed meanwhile is sent by a replay.
    """

    def unit(write: db.Write) -> Row:
        endpoints.enable(write, subscriber_id, utc_now())
        return _need(write.connection, subscriber_id)

    row = db.as_writer(state().engine, unit)
    state().bell.ring(queues.DELIVER)
    return _shown(row)


@operation(
    blueprint, "POST", "/subscribers/<string:subscriber_id>/rotate-secret", schemas.NewSecret,
    scope="write", body=schemas.Rotation, body_needed=False, errors=[404],
)  # fmt: skip
def rotate_secret(wanted: dict[str, Any], subscriber_id: str) -> Any:
    """Make a new secret, shown this once; until the grace is over the old one signs as well."""

    def unit(write: db.Write) -> tuple[str, datetime | None]:
        row = _need(write.connection, subscriber_id)
        return subscribers.rotate_secret(write, row, wanted["grace_seconds"], _keys(), utc_now())

    secret, expires_at = db.as_writer(state().engine, unit)
    return {"secret": secret, "previous_expires_at": expires_at}


@operation(
    blueprint, "POST", "/subscribers/<string:subscriber_id>/test", schemas.Tested,
    scope="write", status=202, errors=[404, 409],
)  # fmt: skip
def send_test_event(subscriber_id: str) -> Any:
    """Send an event of type `subscriber.test` to this subscriber, whatever its filters, and show the answer.

    Waits for it up to 10 s; where no worker runs, or four others wait already, not at all.  It goes before
    what the subscriber waits for, and at once where its circuit is open: a success closes that again.
    """

    def unit(write: db.Write) -> str:
        _need_active(_need(write.connection, subscriber_id)["state"])
        return endpoints.plan_test(write, subscriber_id, utc_now())

    held = state()
    delivery_id = db.as_writer(held.engine, unit)
    heard = held.bell.ring(queues.DELIVER) and queues.is_served(held.redis, queues.DELIVER)
    return {"delivery_id": delivery_id} | asdict(_answer(delivery_id, heard))


def _answer(delivery_id: str, heard: bool) -> Answer:
    held = state()
    if not heard or not held.waiting.acquire(blocking=False):
        return endpoints.await_answer(held.engine, delivery_id, 0.0)
    try:
        return endpoints.await_answer(held.engine, delivery_id, endpoints.ANSWER_SECONDS)
    finally:
        held.waiting.release()


@operation(
    blueprint, "POST", "/subscribers/<string:subscriber_id>/replay", schemas.Counted,
    scope="write", status=202, body=schemas.Replay, errors=[404, 409], shaped={200: schemas.Counted},
)  # fmt: skip
def replay_events(wanted: dict[str, Any], subscriber_id: str) -> Any:
    """Send again what the subscriber missed in a range, or all of it; each delivery keeps its id.

    Its filters hold, as they are now.  A dry run (200) counts only.  A large one goes on after the answer.
    """
    now = utc_now()
    span = Range(wanted["since"], wanted.get("until", now), wanted["only"] == "missing")
    with db.reading(state().engine) as connection:
        row = _need(connection, subscriber_id)
    _need_active(row["state"])
    if wanted["dry_run"]:
        return {"count": replays.count(state().engine, row, span)}, 200
    return _under_way(replays.replay(state().engine, row, span, now))


def _under_way(started: Started) -> dict[str, int]:
    state().bell.ring(queues.DELIVER, *([queues.REPLAY] if started.left else []))
    return {"count": started.count}


def _need_active(subscriber_state: str) -> None:
    if subscriber_state != "active":
        abort(409, "the subscriber is disabled: enable it first")


# ---- deliveries ------------------------------------------------------------------------------


@operation(
    blueprint, "GET", "/subscribers/<string:subscriber_id>/deliveries", schemas.DeliveryPage,
    query=schemas.DeliveriesQuery, errors=[404],
)  # fmt: skip
def list_deliveries(asked: dict[str, Any], subscriber_id: str) -> Any:
    """List what was, or is to be, delivered to a subscriber, the newest event first."""
    limit, before = asked["limit"], asked.get("cursor", queries.LARGEST_ID)
    statement = queries.deliveries(subscriber_id, asked.get("state"), before, limit + 1)
    with db.reading(state().engine) as connection:
        _need(connection, subscriber_id)
        rows = _with_words(connection, connection.execute(statement).mappings().all())
    return page(rows, limit, lambda row: row["event_id"])


def _with_words(connection: Connection, rows: Sequence[Row]) -> list[Row]:
    """Deliveries, and what the pending ones wait for."""
    values = state().settings
    look = waiting.Look(connection, utc_now(), values.delivery_host_concurrency, _keys())
    words = waiting.words(look, rows)
    return [{**row, "waiting_for": words.get(row["message"])} for row in rows]


@operation(blueprint, "GET", "/deliveries", schemas.DeliveryPage, query=schemas.DeadLettersQuery)
def list_dead_letters(asked: dict[str, Any]) -> Any:
    """List the dead deliveries with their reasons, by subscriber, the newest first."""
    limit = asked["limit"]
    statement = queries.dead_letters(
        asked.get("subscriber"), asked.get("reason"), asked.get("cursor"), limit + 1
    )
    with db.reading(state().engine) as connection:
        rows = _with_words(connection, connection.execute(statement).mappings().all())
    return page(rows, limit, lambda row: f"{row['subscriber_id']} {row['message']}")


@operation(
    blueprint, "POST", "/deliveries/redrive", schemas.Counted,
    scope="write", status=202, body=schemas.Redrive, body_needed=False, errors=[404, 409],
)  # fmt: skip
def redrive_deliveries(wanted: dict[str, Any]) -> Any:
    """Send dead deliveries of active subscribers again: of one, for one reason, or all."""
    subscriber_id = wanted.get("subscriber_id")
    if subscriber_id is not None:
        with db.reading(state().engine) as connection:
            _need_active(_need(connection, subscriber_id)["state"])
    return _under_way(replays.redrive(state().engine, subscriber_id, wanted.get("reason"), utc_now()))


def _need_delivery(connection: Connection, delivery_id: str) -> Row:
    row = queries.delivery(connection, delivery_id)
    if row is None:
        abort(404, "there is no such delivery")
    return row


def _shown_attempt(tried: Row) -> dict[str, Any]:
    """An attempt; its texts were masked when they came, but not those of an earlier version."""
    redact = state().redact
    texts = {name: tried[name] and redact(tried[name]) for name in ("response", "note")}
    return {**tried, **texts, "duration_seconds": tried["duration_ms"] / 1000}


@operation(blueprint, "GET", "/deliveries/<string:delivery_id>", schemas.DeliveryWithAttempts, errors=[404])
def get_delivery(delivery_id: str) -> Any:
    """Get one delivery with each of its attempts, and what it waits for."""
    with db.reading(state().engine) as connection:
        row = _need_delivery(connection, delivery_id)
        (shown,) = _with_words(connection, [row])
        tries = queries.delivery_attempts(connection, row["message"], MOST_TRIES)
    attempts = [_shown_attempt(tried) for tried in tries]
    return {**shown, "attempts": attempts}


@operation(
    blueprint, "POST", "/deliveries/<string:delivery_id>/retry", schemas.Delivery,
    scope="write", status=202, errors=[404, 409],
)  # fmt: skip
def retry_delivery(delivery_id: str) -> Any:
    """Send a delivery once more, a dead or delivered one too; its id stays the same.

    It goes before what the subscriber waits for, and at once where the subscriber's circuit is open.
    """

    def unit(connection: Connection) -> Row:
        row = _need_delivery(connection, delivery_id)
        _need_active(row["subscriber_state"])
        deliveries.retry(connection, row["message"], utc_now())
        (again,) = _with_words(connection, [_need_delivery(connection, delivery_id)])
        return again

    row = db.in_transaction(state().engine, unit)
    state().bell.ring(queues.DELIVER)
    return row
