"""Reception: `POST /webhooks/SOURCE` and its older names.  Verified, durable, applied, then answered.

This is plain WSGI in front of Flask: routing, contexts and request objects would cost each push more
than verifying and parsing it does (`bench/` has the figures).  Everything else goes on to Flask.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from threading import Lock
from typing import Any

import orjson
from flask import Response

from webhook_app import inbox, loglines, platforms
from webhook_app.db import StoreUnavailable
from webhook_app.inbox import Arrival, Receipt
from webhook_app.platforms import BadSignature, NotJson
from webhook_app.redaction import SHAPES
from webhook_app.settings import SourceSettings
from webhook_app.web.problems import fault, invalid, problem, store_unavailable
from webhook_app.web.state import State
from webhook_app.web.uploads import (
    IN_FLIGHT,
    BodyAwaited,
    BodyRefused,
    Upload,
    arrived,
    is_awaited,
    too_large,
)

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
WSGI = Callable[[Environ, StartResponse], Iterable[bytes]]
Answer = tuple[int, Mapping[str, object]]

PREFIX = "/webhooks/"
OTHER_NAMES = {
    "/api/webhook/github-actions": "github",
    "/api/webhook/gitlab": "gitlab",
    "/api/webhook/jenkins": "jenkins",
    "/api/internal/build-events": "script",
}
"""Older addresses, and that of build scripts."""

MOST_BYTES = 25 * 1024 * 1024
"""GitHub's and GitLab's own cap."""

MOST_API_BYTES = 1024 * 1024
"""Of the body of any other request."""

MOST_NAME = 100
"""Characters of a source's name in the log: it may be anything that somebody has asked for."""

log = logging.getLogger(__name__)

LARGE_BYTES = 1024 * 1024
_PARSING = Lock()
"""Larger bodies are parsed one at a time: parsed, 25 MiB can take 600."""

_STATUS = {200: "200 OK", 202: "202 ACCEPTED"}


def in_front_of(flask: WSGI, held: State) -> WSGI:
    """A WSGI application that takes deliveries and leaves the rest to `flask`.  Raises `BodyAwaited`."""
    IN_FLIGHT.most = held.settings.max_bytes_in_flight

    def door(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        source = _source(environ["PATH_INFO"])
        if source is None:
            return _beyond(flask, environ)(environ, start_response)
        began = time.monotonic()
        answer = _answer(held, source, environ)
        _log_push(source, answer, time.monotonic() - began)
        if isinstance(answer, Response):
            return answer(environ, start_response)
        status, content = answer
        body = orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start_response(_STATUS[status], headers)
        return [body]

    return door


def _beyond(flask: WSGI, environ: Environ) -> WSGI:
    """What answers any other request: `flask`, once its body is here.

    To Flask `//metrics` is `/metrics`, to the rules of a proxy it is not: no such path has an answer.
    """
    if environ["PATH_INFO"].startswith("//"):
        return problem(404, "there is nothing at this address")
    try:
        arrived(environ, MOST_API_BYTES)
    except BodyRefused as error:
        return _refusal(error)
    return flask


def _refusal(error: BodyRefused) -> Response:
    return problem(error.status, error.detail, error.headers)


def _log_push(source: str, answer: Response | Answer, seconds: float) -> None:
    """One line per push, after its transaction: whether it was accepted or refused, with its ids."""
    if log.isEnabledFor(logging.INFO):
        name = source[:MOST_NAME]
        shown = SHAPES.name(name) if isinstance(answer, Response) else name
        fields = {"source": shown} | _log_fields(answer)
        loglines.event(log, "push", **fields, duration_ms=round(seconds * 1000, 1))


def _log_fields(answer: Response | Answer) -> dict[str, object]:
    """What an answer says, for the log."""
    if isinstance(answer, Response):
        reason = orjson.loads(answer.get_data()).get("detail")
        return {"status": answer.status_code, "result": "refused", "reason": reason}
    status, content = answer
    names = ("build_id", "delivery_id", "reason")
    return {"status": status, "result": content["status"]} | {name: content.get(name) for name in names}


def _source(path: str) -> str | None:
    """The source a path names; None if it is none of ours."""
    if path.startswith(PREFIX):
        return path[len(PREFIX) :]
    return OTHER_NAMES.get(path)


def _answer(held: State, source: str, environ: Environ) -> Response | Answer:
    """The answer to one delivery; no input and no fault escapes as an exception, only `BodyAwaited` does."""
    try:
        answer = _receive(held, source, environ)
        if isinstance(answer, Response) and "HTTP_X_GITLAB_EVENT" in environ:
            _note_refusal(held, source, answer.status_code)
        return answer
    except BodyAwaited:
        raise
    except StoreUnavailable as error:
        return store_unavailable(error)
    except Exception as error:  # noqa: BLE001  the last handler, as Flask has one
        return fault(error)


def _note_refusal(held: State, source: str, status: int) -> None:
    """GitLab mutes a hook that we refuse a few times in a row, without a word: somebody has to be told."""
    if source in held.settings.sources:
        held.refusals.note(source, status)


def _receive(held: State, source: str, environ: Environ) -> Response | Answer:
    """Take one delivery for a source; the answers are spec section 6."""
    settings = held.settings.sources.get(source)
    if settings is None:
        return problem(404, "no such source")
    platform = platforms.find()[settings.source.platform]
    refused = _refuse(environ, platform.CONTENT_TYPES)
    if refused is not None:
        return refused
    headers = _headers(environ)
    if is_awaited(environ) and not any(name in headers for name in platform.SIGNATURE_HEADERS):
        return _unauthorized()
    try:
        body = _read_body(environ)
    except BodyRefused as error:
        return _refusal(error)
    try:
        platform.verify(headers, body, settings.webhook_secrets, time.time())
    except BadSignature as error:
        if error.age_seconds is not None:
            held.refusals.clock_is_off(source, error.age_seconds)
        return _unauthorized()
    return _take(held, settings, headers, body)


def _unauthorized() -> Response:
    return problem(401, "the signature or token is missing, wrong or too old")


def _refuse(environ: Environ, content_types: tuple[str, ...]) -> Response | None:
    """Refuse what can't be taken as it stands: another method or type, too large, or compressed."""
    if environ["REQUEST_METHOD"] != "POST":
        return problem(405, "deliveries are posted", {"Allow": "POST"})
    if (_length(environ) or 0) > MOST_BYTES:
        return _refusal(too_large(MOST_BYTES))
    if environ.get("HTTP_CONTENT_ENCODING", "identity").lower() != "identity":
        return problem(415, "send the body without content encoding")
    if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() not in content_types:
        return problem(415, f"send {' or '.join(content_types)}")
    return None


def _length(environ: Environ) -> int | None:
    text = environ.get("CONTENT_LENGTH") or ""
    return int(text) if text.isascii() and text.isdigit() else None


def _read_body(environ: Environ) -> bytes:
    """The raw body.  Raises `BodyRefused`, or `BodyAwaited` if it is not here yet."""
    arrived(environ, MOST_BYTES)
    body = environ["wsgi.input"]
    if isinstance(body, Upload):
        return body.getvalue()  # its own buffer, not a copy
    return bytes(body.read(_length(environ) or 0))


def _headers(environ: Environ) -> dict[str, str]:
    """Header names in lower case, as the platform modules want them."""
    found = {_header_name(name): value for name, value in environ.items() if name.startswith("HTTP_")}
    found["content-type"] = environ.get("CONTENT_TYPE", "")
    return found


@lru_cache(256)
def _header_name(variable: str) -> str:
    return variable[5:].replace("_", "-").lower()


def _take(held: State, settings: SourceSettings, headers: dict[str, str], body: bytes) -> Response | Answer:
    try:
        with _PARSING if len(body) > LARGE_BYTES else nullcontext():
            arrival = inbox.read(settings.source, headers, body, held.redact)
    except NotJson as error:
        return problem(400, f"the body is not the JSON it says it is: {error}")
    if arrival.webhook is not None and arrival.webhook.pong:
        return 200, {"status": "pong"}
    receipt = held.take(arrival)
    delivery_id = arrival.envelope.delivery_id or str(receipt.delivery_id)
    if receipt.status == "unreadable" and arrival.invalid is not None:
        return invalid(arrival.invalid, delivery_id)
    return 202, _receipt(arrival, receipt) | {"delivery_id": delivery_id}


def _receipt(arrival: Arrival, receipt: Receipt) -> dict[str, object]:
    """What became of a delivery, and which of its fields were not taken as they were given."""
    answer: dict[str, object] = {"status": receipt.status}
    if receipt.status in ("accepted", "duplicate") or receipt.build_id is not None:
        answer["build_id"] = receipt.build_id
    if receipt.reason:
        answer["reason"] = receipt.reason
    if arrival.webhook is not None and arrival.webhook.dropped:
        answer["dropped"] = list(arrival.webhook.dropped)
    return answer
