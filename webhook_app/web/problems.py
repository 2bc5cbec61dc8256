"""Errors as RFC 9457 `application/problem+json`, one handler for all; no input makes a 500."""

import logging
from http import HTTPStatus
from typing import Any

import orjson
from flask import Flask, Response
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import HTTPException

from webhook_app.db import StoreUnavailable
from webhook_app.platforms import Invalid
from webhook_app.redaction import SHAPES

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5


def problem(status: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> Response:
    """A problem document: type, title, status, detail, and `more` members, without what looks secret."""
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return Response(
        orjson.dumps(_masked(content | more), option=orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE),
        status,
        headers=headers,
        content_type="application/problem+json",
    )


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {_masked(name): _masked(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_masked(inner) for inner in value]
    return SHAPES.name(value) if isinstance(value, str) else value


def store_unavailable(error: StoreUnavailable) -> Response:
    """503: nothing was accepted, come again."""
    log.error("the store is unavailable: %s", error.in_full())
    return problem(
        503,
        "the store is unavailable, nothing was accepted",
        {"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def http_error(error: HTTPException) -> Response:
    """Whatever Flask, Werkzeug or flask-smorest raise, in our form; validation messages under `errors`."""
    data = getattr(error, "data", None) or {}
    messages = data.get("messages")
    headers = {
        name: value
        for name, value in (error.get_headers() or [])
        if name.lower() in ("allow", "retry-after", "www-authenticate")
    } | dict(data.get("headers") or {})
    detail = data.get("message") or error.description or HTTPStatus(error.code or 500).phrase
    return problem(error.code or 500, str(detail), headers, **({"errors": messages} if messages else {}))


def invalid(error: Invalid, delivery_id: str) -> Response:
    """422 for a report whose author has to correct it: what is wrong, and what it may be.

    The body is kept all the same; admins find it among the unreadable deliveries.
    """
    more: dict[str, Any] = {"allowed": list(error.allowed)} if error.allowed else {}
    return problem(422, str(error), errors={error.field: [str(error)]}, delivery_id=delivery_id, **more)


def unreadable(error: ParseException) -> Response:
    """400: the server found the body's chunks broken while we read it."""
    return problem(400, f"the body can't be read: {error}")


def fault(error: Exception) -> Response:
    """A fault of ours: logged with its trace, told without."""
    log.error("unhandled fault", exc_info=error)
    return problem(500, "a fault of BuildRelay; it is in its log")


def register(app: Flask) -> None:
    """Install the handlers."""
    app.register_error_handler(StoreUnavailable, store_unavailable)
    app.register_error_handler(HTTPException, http_error)
    app.register_error_handler(ParseException, unreadable)
    app.register_error_handler(Exception, fault)
