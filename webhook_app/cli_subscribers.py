"""Subscribers and deliveries on the command line: options as the API's fields, rows as lines.

Names of fields and what they may hold are those of the API (`web.schemas`), which the command can't import.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from webhook_app import circuit, destinations, formats, results, subscribers
from webhook_app.endpoints import Health
from webhook_app.lifecycle import Conclusion, State
from webhook_app.sealing import SealError
from webhook_app.subscribers import (
    LONGEST_DESCRIPTION,
    LONGEST_GLOB,
    LONGEST_URL,
    MOST_GLOBS,
    MOST_PER_SECOND,
)
from webhook_app.times import iso

MASK = "***"

_LISTS = ("events", "sources", "repositories", "branches")
_WORDS: Mapping[str, tuple[str, Sequence[str], str]] = {
    "states": ("state", [state.value for state in State], "only builds in this state"),
    "conclusions": (
        "conclusion", [conclusion.value for conclusion in Conclusion], "only builds that ended so",
    ),
    "changes": ("change", results.CHANGES, "only ends that changed the result so"),
}  # fmt: skip
"""Field: its option, what it may hold, its help."""
_EMPTY: Mapping[str, Any] = (
    {name: [] for name in (*_LISTS, *_WORDS)}
    | {"headers": {}}
    | dict.fromkeys(("description", "rate_limit_per_second"))
)
"""What can be cleared, and what is there then."""


class WrongUse(Exception):
    """Options that don't go together, or that nothing may be sent with; the message is for people."""


# ---- options ---------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, *, changing: bool) -> None:
    """All that is chosen for a subscriber; when `changing` one, nothing is so by default."""
    parser.add_argument(
        "--events", action="append", type=_event_glob, help="a glob of types; may be repeated"
    )
    for name in _LISTS[1:]:
        parser.add_argument(
            f"--{name}", action="append", type=_text(LONGEST_GLOB), help="a glob; may be repeated"
        )
    for name, (option, words, help_) in _WORDS.items():
        parser.add_argument(
            f"--{option}", f"--{name}", action="append", choices=words, help=f"{help_}; may be repeated"
        )
    parser.add_argument("--forks", action=argparse.BooleanOptionalAction, default=None,
                        help="branches and changes look at builds of forks as well")  # fmt: skip
    parser.add_argument("--format", choices=formats.FORMATS, help="the shape of the body")
    parser.add_argument("--description", type=_text(LONGEST_DESCRIPTION))
    parser.add_argument(
        "--rate-limit", type=_per_second, metavar="N", help="at most so many messages a second"
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--unordered", action="store_false", dest="ordered", default=None,
                       help="do not keep each build's messages in order")  # fmt: skip
    headers = "sent with each request; may be repeated"
    if changing:
        order.add_argument("--ordered", action="store_true", default=None, help="keep them in order")
        parser.add_argument("--url", type=_text(LONGEST_URL), help="where messages are posted from now on")
        parser.add_argument("--clear", action="append", choices=sorted(_EMPTY), default=[],
                            help="empty this field; may be repeated")  # fmt: skip
        headers += "; replaces all that there are"
    parser.add_argument("--header", action="append", type=_header, metavar="NAME=VALUE", help=headers)


def fields(chosen: argparse.Namespace) -> dict[str, Any]:
    """The API's fields that were chosen.  Raises `WrongUse`."""
    given = {name: getattr(chosen, name) for name in (*_LISTS, "forks", "format", "description", "ordered")}
    given |= {name: getattr(chosen, option) for name, (option, *_) in _WORDS.items()}
    given |= {"rate_limit_per_second": chosen.rate_limit, "headers": _headers(chosen.header)}
    given |= {"url": chosen.url}
    found = {name: value for name, value in given.items() if value is not None}
    for name in getattr(chosen, "clear", []):
        if name in found:
            raise WrongUse(f"--clear {name}: it is set as well")
        found[name] = _EMPTY[name]
    for name in _LISTS:
        if len(found.get(name, ())) > MOST_GLOBS:
            raise WrongUse(f"--{name}: at most {MOST_GLOBS} are taken")
    return found


def check(wanted: Mapping[str, Any], allow_private: bool) -> None:
    """Raises `WrongUse` for a URL or headers that nothing may be sent to or with."""
    try:
        if "url" in wanted:
            destinations.check_callback_url(wanted["url"], allow_private)
    except destinations.OutboundError as error:
        raise WrongUse(f"{destinations.shown(wanted['url'])}: {error}") from None
    try:
        destinations.check_headers(wanted.get("headers") or {})
    except destinations.OutboundError as error:
        raise WrongUse(f"--header: {error}") from None


def _headers(pairs: Sequence[tuple[str, str]] | None) -> dict[str, str] | None:
    if pairs is None:
        return None
    headers = dict(pairs)
    if len(headers) < len(pairs):
        raise WrongUse("--header: a name is given twice")
    return headers


def _header(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError("NAME=VALUE is needed")
    return name, value


def _text(longest: int) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not 1 <= len(text) <= longest or re.search("[\0\ud800-\udfff]", text):
            raise argparse.ArgumentTypeError(f"1 to {longest} characters of text are needed")
        return text

    return read


def _event_glob(text: str) -> str:
    try:
        subscribers.check_event_glob(_text(LONGEST_GLOB)(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _per_second(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not 1 <= number <= MOST_PER_SECOND:
        raise argparse.ArgumentTypeError(f"a number from 1 to {MOST_PER_SECOND} is needed")
    return number


# ---- rows ------------------------------------------------------------------------------------

_SHOWN = (
    "id", "url", *_LISTS, *_WORDS, "forks", "format", "description", "rate_limit_per_second", "ordered",
    "headers", "signing", "public_key", "origin", "state", "disabled_reason", "failing_since", "failures",
    "warned_percent", "on_probation", "slow_until", "circuit", "created_at", "updated_at",
)  # fmt: skip
_DELIVERY = (
    "id", "subscriber_id", "event_id", "build_id", "sequence", "type", "state", "attempt_count", "due_at",
    "reason", "created_at", "settled_at",
)  # fmt: skip
_ATTEMPT = ("number", "started_at", "duration_seconds", "status_code", "reason", "note", "response")


def subscriber(row: Mapping[str, Any], health: Health, keys: Sequence[str]) -> dict[str, Any]:
    """A subscriber as it is shown: its URL whole, of its headers only the names, and no secret."""
    url = subscribers.shown_url(row, keys, whole=True)
    shown = {**row, "url": url, "headers": None, "public_key": None}
    shown["circuit"] = circuit.shown(row)
    try:
        shown["headers"] = dict.fromkeys(subscribers.custom_headers(row, keys), MASK)
        shown["public_key"] = subscribers.public_key(row, keys)
    except SealError:
        pass  # as in the API: null says so
    return {name: shown.get(name) for name in _SHOWN} | {"health": asdict(health)}


def delivery(
    row: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]], waiting_for: str | None = None
) -> dict[str, Any]:
    """A delivery with each of its attempts as it is shown.  `waiting_for`: a word of `waiting.WORDS`."""
    shown = {**{name: row[name] for name in _DELIVERY}, "waiting_for": waiting_for}
    shown["next_attempt_at"] = shown.pop("due_at")
    timed = [{**one, "duration_seconds": one["duration_ms"] / 1000} for one in attempts]
    return shown | {"attempts": [{name: one.get(name) for name in _ATTEMPT} for one in timed]}


def as_json(shown: Mapping[str, Any]) -> str:
    """The same as the JSON of the API."""
    return json.dumps(shown, indent=2, default=_plain)


def _plain(value: object) -> Any:
    return iso(value) if isinstance(value, datetime) else str(value)


def as_lines(shown: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """`name: value`, one line each; what is not there is left out."""
    for name, value in shown.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for place, inner in enumerate(value, 1):
                yield f"{indent}{name} {place}:"
                yield from as_lines(inner, indent + "  ")
        elif isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from as_lines(value, indent + "  ")
        elif value not in (None, [], {}):
            yield f"{indent}{name}: {printable(_word(value))}"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value)
    return str(_plain(value))


def printable(text: str) -> str:
    """Text from outside on one line: nothing in it moves the cursor of a terminal or changes its title."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
