"""`/docs`: the operations of the OpenAPI document as one plain page, without a script or a foreign file."""

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from flask import Response

from webhook_app.web.api.spec import BEARER

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{font-family:ui-monospace,monospace}h2{margin-top:2.5rem}"
    "section{border-top:1px solid #ccc;padding:.5rem 0}h3{margin:.5rem 0}p{margin:.3rem 0}"
)
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page(document: Mapping[str, Any]) -> Response:
    """The page for an OpenAPI document."""
    answer = Response("".join(_html(document)), mimetype="text/html")
    answer.headers["Content-Security-Policy"] = POLICY
    answer.headers["X-Content-Type-Options"] = "nosniff"
    return answer


def _html(document: Mapping[str, Any]) -> Iterator[str]:
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    yield "<meta name=viewport content='width=device-width'>"
    yield f"<h1>{title}</h1><p>Made from <a href=/openapi.json>/openapi.json</a>. Tokens are sent as "
    yield "<code>Authorization: Bearer TOKEN</code>; errors are <code>application/problem+json</code>.</p>"
    tags = document.get("tags", [])
    yield "<ul>"
    for tag in tags:
        yield f"<li><a href='#{escape(tag['name'])}'>{escape(tag['description'] or tag['name'])}</a>"
    yield "</ul>"
    for tag in tags:
        yield f"<h2 id='{escape(tag['name'])}'>{escape(tag['description'] or tag['name'])}</h2>"
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if method != "parameters" and tag["name"] in operation["tags"]:
                    yield from _operation(method, path, operation, _fields(document, operation))
    yield "</html>"


def _text(text: str) -> str:
    """Text in which `…` marks code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _fields(document: Mapping[str, Any], operation: Mapping[str, Any]) -> list[str]:
    """The fields of the JSON that an operation takes; the required ones end in `*`."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    schema = document.get("components", {}).get("schemas", {}).get(name, {})
    needed = schema.get("required", [])
    return [f"{field}*" if field in needed else field for field in schema.get("properties", {})]


def _operation(method: str, path: str, operation: Mapping[str, Any], fields: list[str]) -> Iterator[str]:
    name = escape(operation["operationId"])
    yield f"<section id={name}><h3><code>{method.upper()} {escape(path)}</code></h3>"
    yield f"<p>{_text(operation.get('summary', ''))} {_text(operation.get('description', ''))}</p>"
    yield f"<p>{escape(_scope(operation))}</p>"
    asked = [parameter["name"] for parameter in operation.get("parameters", []) if "name" in parameter]
    if asked:
        yield f"<p>Query: <code>{escape(', '.join(asked))}</code></p>"
    if fields:
        yield f"<p>Body: <code>{escape(', '.join(fields))}</code> (* needed)</p>"
    answers = sorted(status for status in operation["responses"] if status != "default")
    yield f"<p>Answers: <code>{escape(', '.join(answers))}</code>, problems otherwise</p></section>"


def _scope(operation: Mapping[str, Any]) -> str:
    scopes = [scope for entry in operation["security"] for scope in entry.get(BEARER, [])]
    return f"Scope: {', '.join(scopes)}" if scopes else "No token is needed."
