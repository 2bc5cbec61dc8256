"""Bodies of webhooks as admins may see them: what may be secret is masked.  Pure."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

import orjson

from webhook_app import secret_shapes
from webhook_app.redaction import SHAPES, Redactor

MASK = secret_shapes.MASK
MOST_CHARACTERS = 256 * 1024
DEEPEST = 60

_SECRET_NAME = re.compile(
    r"token|secret|passw|passphrase|credential|authorization|api[-_]?key|private[-_]?key|signature",
    re.IGNORECASE,
)
_VALUES = {"variables", "parameters"}
"""GitLab's and Jenkins' fields whose names are harmless and whose values may be anything."""
_WHOLE = {"log"}


def readable(body: bytes, content_type: str, redact: Redactor = SHAPES) -> tuple[str, bool]:
    """A body as text, masked, and whether it was cut.  What is no JSON is not shown at all."""
    if content_type.partition(";")[0].strip().lower() == "application/x-www-form-urlencoded":
        body = _form_payload(body)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "(not shown: it is not JSON)", False
    text = orjson.dumps(masked(value, redact), option=orjson.OPT_INDENT_2).decode()
    return text[:MOST_CHARACTERS], len(text) > MOST_CHARACTERS


def _form_payload(body: bytes) -> bytes:
    fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=None)
    return fields.get("payload", [""])[0].encode("utf-8", "replace")


def masked(value: Any, redact: Redactor = SHAPES, depth: int = 0) -> Any:
    """A JSON value with everything masked that may be secret: by the name of its field, or by its form."""
    if depth > DEEPEST:
        return MASK
    if isinstance(value, Mapping):
        return {redact.name(name): _field(name, inner, redact, depth) for name, inner in value.items()}
    if isinstance(value, list):
        return [masked(inner, redact, depth + 1) for inner in value]
    return redact(value) if isinstance(value, str) else value


def _field(name: str, value: Any, redact: Redactor, depth: int) -> Any:
    folded = name.casefold()
    if value is None or isinstance(value, bool):
        return value
    if folded in _VALUES:
        return _values(value)
    if folded in _WHOLE or _SECRET_NAME.search(name):
        return MASK
    return masked(value, redact, depth + 1)


def _values(value: Any) -> Any:
    """Names stay, values go: `{"name": value}` and `[{"key": name, "value": value}]`."""
    if isinstance(value, Mapping):
        return dict.fromkeys(value, MASK)
    if isinstance(value, list):
        return [
            {name: inner if name in ("key", "name") else MASK for name, inner in entry.items()}
            if isinstance(entry, Mapping)
            else MASK
            for entry in value
        ]
    return MASK
