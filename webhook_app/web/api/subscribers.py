"""Subscribers and their deliveries."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from flask import Response
from sqlalchemy import Connection, insert

from webhook_app import db, deliveries, destinations, models, queries, queues, subscribers
from webhook_app.destinations import OutboundError
from webhook_app.queries import Row
from webhook_app.sealing import SealError
from webhook_app.times import utc_now
from webhook_app.web import schemas
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
    """A subscriber without its secrets; of its headers only the names."""
    try:
        headers = dict.fromkeys(subscribers.custom_headers(row, _keys()), MASK)
    except SealError:
        return {**row, "headers": None}
    return {**row, "headers": headers}


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
    row, secret = db.as_writer(
        state().engine, lambda write: subscribers.create(write, wanted, _keys(), utc_now())
    )
    return _shown(row) | {"secret": secret}, 201, {"Location": f"/api/subscribers/{row['id']}"}


@operation(blueprint, "GET", "/subscribers/<string:subscriber_id>", schemas.Subscriber, errors=[404])
def get_subscriber(subscriber_id: str) -> Any:
    """Get one subscriber."""
    with db.reading(state().engine) as connection:
        return _shown(_need(connection, subscriber_id))


@operation(
    blueprint, "PATCH", "/subscribers/<string:subscriber_id>", schemas.Subscriber,
    scope="write", body=schemas.SubscriberChange, errors=[404],
)  # fmt: skip
def change_subscriber(wanted: dict[str, Any], subscriber_id: str) -> Any:
    """Change what is named; `headers` are replaced as a whole."""
    _check(wanted)
    return _shown(_changed(subscriber_id, wanted))


def _changed(subscriber_id: str, values: Mapping[str, Any]) -> Row:
    def unit(write: db.Write) -> Row:
        subscribers.change(write, subscriber_id, values, _keys(), utc_now())
        return _need(write.connection, subscriber_id)

    return db.as_writer(state().engine, unit)


@operation(
    blueprint, "DELETE", "/subscribers/<string:subscriber_id>", None, scope="write", status=204, errors=[404]
)
def delete_subscriber(subscriber_id: str) -> Any:
    """Remove a subscriber, and with it its deliveries."""
    if not db.as_writer(state().engine, lambda write: subscribers.remove(write, subscriber_id)):
        abort(404, "there is no such subscriber")


@operation(
    blueprint, "POST", "/subscribers/<string:subscriber_id>/enable", schemas.Subscriber,
    scope="write", errors=[404],
)  # fmt: skip
def enable_subscriber(subscriber_id: str) -> Any:
    """Let a disabled subscriber get events again, and forget its failures."""
    fresh = {"state": "active", "disabled_reason": None, "failing_since": None, "failures": 0}
    row = _changed(subscriber_id, fresh)
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
    blueprint, "POST", "/subscribers/<string:subscriber_id>/test", schemas.Accepted,
    scope="write", status=202, errors=[404, 409],
)  # fmt: skip
def send_test_event(subscriber_id: str) -> Any:
    """Send an event of type `subscriber.test` to this subscriber, whatever its filters."""
    delivery_id = db.as_writer(state().engine, lambda write: _plan_test(write, subscriber_id, utc_now()))
    state().bell.ring(queues.DELIVER)
    return {"delivery_id": delivery_id}


def _plan_test(write: db.Write, subscriber_id: str, now: datetime) -> str:
    _need_active(_need(write.connection, subscriber_id)["state"])
    event = {
        "id": write.new_id("events"),
        "build": None,
        "sequence": None,
        "type": "subscriber.test",
        "observed_by": "report",
        "timestamp": now,
        "data": {"subscriber_id": subscriber_id, "message": "This is a test, sent on request."},
    }
    write.connection.execute(insert(models.events), event)
    return deliveries.plan_one(write, event, subscriber_id, now)


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
        rows = connection.execute(statement).mappings().all()
    return page(rows, limit, lambda row: row["event_id"])


def _need_delivery(connection: Connection, delivery_id: str) -> Row:
    row = queries.delivery(connection, delivery_id)
    if row is None:
        abort(404, "there is no such delivery")
    return row


@operation(blueprint, "GET", "/deliveries/<string:delivery_id>", schemas.DeliveryWithAttempts, errors=[404])
def get_delivery(delivery_id: str) -> Any:
    """Get one delivery with each of its attempts."""
    with db.reading(state().engine) as connection:
        row = _need_delivery(connection, delivery_id)
        tries = queries.delivery_attempts(connection, row["message"], MOST_TRIES)
    attempts = [{**tried, "duration_seconds": tried["duration_ms"] / 1000} for tried in tries]
    return {**row, "attempts": attempts}


@operation(
    blueprint, "POST", "/deliveries/<string:delivery_id>/retry", schemas.Delivery,
    scope="write", status=202, errors=[404, 409],
)  # fmt: skip
def retry_delivery(delivery_id: str) -> Any:
    """Send a delivery once more, a dead or delivered one too; its id stays the same."""

    def unit(connection: Connection) -> Row:
        row = _need_delivery(connection, delivery_id)
        _need_active(row["subscriber_state"])
        deliveries.retry(connection, row["message"], utc_now())
        return _need_delivery(connection, delivery_id)

    row = db.in_transaction(state().engine, unit)
    state().bell.ring(queues.DELIVER)
    return row
