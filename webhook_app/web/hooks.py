"""Reception: `POST /webhooks/SOURCE` and its older names.  Verified, durable, applied, then answered."""

import time

import orjson
from flask import Blueprint, Response, request
from gunicorn.http.errors import ParseException

from webhook_app import inbox, platforms
from webhook_app.platforms import BadSignature, NotJson
from webhook_app.settings import SourceSettings
from webhook_app.web.problems import problem
from webhook_app.web.state import state

blueprint = Blueprint("hooks", __name__)

MOST_BYTES = 25 * 1024 * 1024
"""GitHub's and GitLab's own cap."""


@blueprint.post("/webhooks/<source>")
def receive(source: str) -> Response:
    """Take one delivery for a source; the answers are spec section 6."""
    settings = state().settings.sources.get(source)
    if settings is None:
        return problem(404, "no such source")
    refused = _refuse_form()
    if refused is not None:
        return refused
    platform = platforms.find()[settings.source.platform]
    if request.mimetype not in platform.CONTENT_TYPES:
        return problem(415, f"send {' or '.join(platform.CONTENT_TYPES)}")
    try:
        body = request.get_data(cache=False)
    except (OSError, ParseException) as error:  # a sender that hangs up, or whose chunks are broken
        return problem(400, f"the body can't be read: {error}")
    headers = {name.lower(): value for name, value in request.headers.items()}
    try:
        platform.verify(headers, body, settings.webhook_secrets, time.time())
    except BadSignature:
        return problem(401, "the signature or token is missing, wrong or too old")
    return _take(settings, headers, body)


def _refuse_form() -> Response | None:
    """Refuse what can't be read as it stands: too large, or compressed."""
    if (request.content_length or 0) > MOST_BYTES:
        return problem(413, f"a delivery has at most {MOST_BYTES} bytes")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        return problem(415, "send the body without content encoding")
    return None


def _take(settings: SourceSettings, headers: dict[str, str], body: bytes) -> Response:
    held = state()
    try:
        arrival = inbox.read(settings.source, headers, body)
    except NotJson as error:
        return problem(400, f"the body is not the JSON it says it is: {error}")
    if arrival.webhook is not None and arrival.webhook.pong:
        return _json(200, {"status": "pong"})
    receipt = held.take(arrival)
    answer: dict[str, object] = {"status": receipt.status}
    if receipt.status in ("accepted", "duplicate"):
        answer["build_id"] = receipt.build_id
    if receipt.reason:
        answer["reason"] = receipt.reason
    answer["delivery_id"] = arrival.envelope.delivery_id or str(receipt.delivery_id)
    return _json(202, answer)


def _json(status: int, content: dict[str, object]) -> Response:
    return Response(orjson.dumps(content), status, content_type="application/json")


@blueprint.post("/api/webhook/github-actions")
def receive_github() -> Response:
    """The older name of `/webhooks/github`."""
    return receive("github")


@blueprint.post("/api/webhook/jenkins")
def receive_jenkins() -> Response:
    """The older name of `/webhooks/jenkins`."""
    return receive("jenkins")


@blueprint.post("/api/internal/build-events")
def receive_report() -> Response:
    """Build scripts report here."""
    return receive("script")
