"""The body of a message in the shape its subscriber asked for.  Pure; nothing in it is executed.

`standard` is the Standard Webhooks body of spec section 8, `cloudevents` the structured JSON of
CloudEvents 1.0, `slack` and `teams` what those services' incoming webhooks read, `provider` the
platform's own webhook.  A body depends on the stored event alone, so every try and replay of a message
sends the same bytes.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md
https://api.slack.com/messaging/webhooks · https://adaptivecards.io/explorer/
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

import orjson

from webhook_app import provider_shapes
from webhook_app.times import iso

Data = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Told:
    """An event as a body tells it; `change` is `broke`, `fixed`, `still_failing` or None."""

    message_id: str
    type: str
    timestamp: datetime
    data: Data
    change: str | None = None


def render(format_: str, told: Told) -> tuple[str, bytes]:
    """Content type and body.  Raises `KeyError` for a format that does not exist."""
    content_type, template = _FORMATS[format_]
    return content_type, orjson.dumps(template(told))


def standard(told: Told) -> dict[str, Any]:
    """`{"type","timestamp","data"}`."""
    return {"type": told.type, "timestamp": iso(told.timestamp), "data": told.data}


def cloudevents(told: Told) -> dict[str, Any]:
    """CloudEvents 1.0; `id` is the message's, so receivers may drop repetitions by it."""
    event = {
        "specversion": "1.0",
        "id": told.message_id,
        "source": f"/buildrelay/{quote(str(told.data.get('source') or 'hub'), safe='')}",
        "type": told.type,
        "time": iso(told.timestamp),
        "datacontenttype": "application/json",
    }
    if told.data.get("build_id"):  # an attribute without a value is left out
        event["subject"] = str(told.data["build_id"])
    return event | {"data": told.data}


HEADLINE_CHARACTERS = 300
FACT_CHARACTERS = 300
"""Slack takes 3000 characters of text and 2000 of a field; escaping makes up to five of one."""
URL_CHARACTERS = 1000
"""Escaped."""

_MARKS = {
    "completed": ("✅", "Good"),
    "failed": ("❌", "Attention"),
    "cancelled": ("⏹", "Warning"),
    "timeout": ("⏰", "Attention"),
}
_NOT_IN_A_LINK = re.compile(r"[\s<>|\x00-\x1f]")
_CHANGES = {"broke": "broke", "fixed": "is fixed", "still_failing": "still fails"}


def _headline(told: Told) -> str:
    """One line for people: `octo/web CI #12 failed on main`."""
    data = told.data
    if not data.get("build_id"):
        return _one_line(data.get("message") or told.type)
    name = [data.get("repository") or data["build_id"], data.get("workflow")]
    name.append(f"#{data['number']}" if data.get("number") is not None else None)
    verb = _CHANGES.get(told.change or "") or str(data.get("state", "")).replace("_", " ")
    where = f" on {data['branch']}" if data.get("branch") else ""
    attempt = f" (attempt {data['attempt']})" if (data.get("attempt") or 1) > 1 else ""
    return _one_line(" ".join(str(part) for part in name if part) + f" {verb}{where}{attempt}")


def _one_line(value: object) -> str:
    """Cut before it is escaped: half of an escape, or of a link, would be shown as it is."""
    return " ".join(str(value).split())[:HEADLINE_CHARACTERS]


def _link(data: Data) -> str | None:
    """The build's page, if it is one that may be linked: `!channel` in its place would call everybody."""
    url = str(data.get("url") or "")
    plain = url.startswith(("https://", "http://")) and not _NOT_IN_A_LINK.search(url)
    return url if plain and len(_slack(url)) <= URL_CHARACTERS else None


def _facts(told: Told) -> list[tuple[str, str]]:
    data = told.data
    seconds = data.get("duration_seconds")
    facts = [
        ("Commit", str(data["commit"])[:12] if data.get("commit") else ""),
        ("Duration", f"{seconds:.0f} s" if isinstance(seconds, int | float) else ""),
        ("Error", str(data["error"])[:FACT_CHARACTERS] if data.get("error") else ""),
    ]
    return [(name, value) for name, value in facts if value]


def slack(told: Told) -> dict[str, Any]:
    """A message with a link; everything from outside is escaped as Slack asks."""
    mark, _ = _MARKS.get(str(told.data.get("state")), ("🔧", ""))
    line = _slack(_headline(told))
    url = _link(told.data)
    linked = f"<{_slack(url)}|{line}>" if url else line
    fields = [{"type": "mrkdwn", "text": f"*{name}*\n{_slack(value)}"} for name, value in _facts(told)]
    blocks: list[dict[str, Any]] = [
        {"type": "section", "text": {"type": "mrkdwn", "text": f"{mark} {linked}"}}
    ]
    if fields:
        blocks.append({"type": "section", "fields": fields})
    return {"text": f"{mark} {line}", "blocks": blocks}


def _slack(text: str) -> str:
    """https://api.slack.com/reference/surfaces/formatting#escaping"""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def teams(told: Told) -> dict[str, Any]:
    """A message with an Adaptive Card."""
    mark, colour = _MARKS.get(str(told.data.get("state")), ("🔧", "Default"))
    title = {
        "type": "TextBlock",
        "text": f"{mark} {_markdown(_headline(told))}",
        "wrap": True,
        "weight": "Bolder",
        "color": colour,
    }
    facts = [{"title": name, "value": _markdown(value)} for name, value in _facts(told)]
    card: dict[str, Any] = {
        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
        "type": "AdaptiveCard",
        "version": "1.4",
        "body": [title, *([{"type": "FactSet", "facts": facts}] if facts else [])],
    }
    url = _link(told.data)
    if url:
        card["actions"] = [{"type": "Action.OpenUrl", "title": "Open the build", "url": url}]
    return {
        "type": "message",
        "attachments": [{"contentType": "application/vnd.microsoft.card.adaptive", "content": card}],
    }


_MARKDOWN = re.compile(r"[\\`*_\[\]<>~]")


def _markdown(text: str) -> str:
    """Text blocks read a little Markdown: what could be a link or emphasis is made plain."""
    return _MARKDOWN.sub(r"\\\g<0>", text)


def provider(told: Told) -> dict[str, Any]:
    """What the platform of the build would have sent."""
    return provider_shapes.shape(told.type, told.data).body(told.data, told.timestamp)


PROVIDER = "provider"

_FORMATS: dict[str, tuple[str, Callable[[Told], dict[str, Any]]]] = {
    "standard": ("application/json", standard),
    "cloudevents": ("application/cloudevents+json", cloudevents),
    "slack": ("application/json", slack),
    "teams": ("application/json", teams),
    PROVIDER: ("application/json", provider),
}

FORMATS = tuple(_FORMATS)
