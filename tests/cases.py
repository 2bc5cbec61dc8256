"""The samples of webhooks and answers, and how what is read of them is written down."""

import dataclasses
import json
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from webhook_app import platforms
from webhook_app.lifecycle import Observation
from webhook_app.platforms import (
    Source,
    Webhook,
    _read,
)

SAMPLES = Path(__file__).parent / "samples"


def read(case: Path, name: str) -> Any:
    return json.loads((case / f"{name}.json").read_text(encoding="utf-8"))


def body_of(case: Path) -> bytes:
    return next(case.glob("body.*")).read_bytes()


def source_of(platform: str) -> Source:
    return Source(platform, platform, "https://ci.example.com", "a token", "relay")


def shown(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: shown(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [shown(item) for item in value] if isinstance(value, tuple) else value


def told(seen: Observation) -> dict[str, Any]:
    """The fields of an observation that differ from their defaults."""
    values = {field.name: getattr(seen, field.name) for field in dataclasses.fields(seen)}
    defaults = {field.name: field.default for field in dataclasses.fields(seen)}
    return {name: shown(value) for name, value in values.items() if value != defaults[name]}


def parse(platform: str, headers: dict[str, str], body: bytes) -> Webhook:
    return platforms.find()[platform].parse_webhook(source_of(platform), headers, body)


def assert_storable(value: Any) -> None:
    """No database and no JSON encoder may stumble over it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            assert_storable(key)
            assert_storable(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            assert_storable(inner)
    elif isinstance(value, str):
        value.encode()
        assert "\0" not in value
        assert len(value) <= _read.URL_CHARS + 100
    elif isinstance(value, float):
        assert abs(value) != float("inf")
    elif isinstance(value, int):
        assert -(2**63) <= value < 2**63


def assert_sound(seen: Observation) -> None:
    for field in dataclasses.fields(seen):
        value = getattr(seen, field.name)
        assert_storable(dataclasses.asdict(value) if field.name == "detail" and value else shown(value))
        assert not isinstance(value, datetime) or value.utcoffset() == timedelta(0)
    assert seen.build_id == "" or quote(seen.build_id, safe=":") == seen.build_id
    assert seen.build_id == unquote(seen.build_id)
    assert seen.attempt is None or 0 < seen.attempt < 2**31
    assert seen.progress is None or 0 <= seen.progress <= 100
    for url in (seen.url, seen.preview_url):
        assert url is None or url.startswith(("https://", "http://"))
