"""The messages of one event for many subscribers, made by the database in one statement.

A row per subscriber from Python costs several times what the indexes do (`bench/`).
"""

import secrets as random
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ARRAY, JSON, Text, TextClause, bindparam, text

from webhook_app import models
from webhook_app.db import Write

LEAST = 100
"""Subscribers from which on it pays."""

_COLUMNS = "id, message_id, subscriber, event, build, sequence, state, attempts, due_at, created_at"
_NOW = bindparam("now", type_=models.Moment)
_INSERT: Mapping[str, TextClause] = {
    "sqlite": text(
        f"INSERT INTO messages ({_COLUMNS}) SELECT :first + key, :prefix || printf('%05x', key), value,"  # noqa: S608
        " :event, :build, :sequence, 'pending', 0, :now, :now FROM json_each(:subscribers)"
    ).bindparams(_NOW, bindparam("subscribers", type_=JSON)),
    "postgresql": text(
        f"INSERT INTO messages ({_COLUMNS}) SELECT CAST(:first AS bigint) + place - 1,"  # noqa: S608
        " CAST(:prefix AS text) || lpad(to_hex(place - 1), 5, '0'), subscriber, CAST(:event AS bigint),"
        " CAST(:build AS bigint), CAST(:sequence AS integer), 'pending', 0, CAST(:now AS timestamptz),"
        " CAST(:now AS timestamptz) FROM unnest(:subscribers) WITH ORDINALITY AS given(subscriber, place)"
    ).bindparams(_NOW, bindparam("subscribers", type_=ARRAY(Text))),
}


def insert(write: Write, event: Mapping[str, Any], subscribers: Sequence[str], now: datetime) -> None:
    """Write a pending message of an event for each subscriber id, in the event's transaction.

    Ids in their order touch each page of an index once.
    """
    if not subscribers:
        return
    values = {
        "first": write.new_ids("messages", len(subscribers)),
        "prefix": f"msg_{int(now.timestamp() * 1000):012x}{random.token_hex(6)[:11]}",
        "event": event["id"],
        "build": event.get("build"),
        "sequence": event.get("sequence"),
        "now": now,
        "subscribers": list(subscribers),
    }
    write.connection.execute(_INSERT[write.connection.dialect.name], values)
