"""API tokens: made, listed, deleted, recognized.  Only SHA-256 digests are stored.

A digest needs no salt: a token is 32 random bytes, which no list of guesses contains.
The bootstrap token (`ADMIN_TOKEN`) is a setting and not a row; it has every scope.
"""

import hashlib
import hmac
import secrets as random
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from webhook_app import models

Row = Mapping[Any, Any]

SCOPES = ("read", "write", "admin")
"""From little to much: each one includes those before it."""

PREFIX = "brt_"
"""What a token begins with, so that secret scanners can tell one that was leaked."""

_t = models.tokens.c
_SHOWN = (_t.id, _t.name, _t.scopes, _t.created_at)
_SCOPES_OF = select(_t.scopes)


def create(connection: Connection, name: str, scopes: Sequence[str], now: datetime) -> tuple[Row, str]:
    """Store a new token; its row, and the token itself, this once.  Run in a write transaction."""
    token = PREFIX + random.token_urlsafe(32)
    row = {
        "id": f"tok_{random.token_hex(10)}",
        "name": name,
        "scopes": [scope for scope in SCOPES if scope in scopes],
        "created_at": now,
    }
    connection.execute(insert(models.tokens), row | {"digest": digest(token)})
    return row, token


def digest(token: str) -> str:
    """What is stored of a token: its SHA-256, in hex."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def page(connection: Connection, after: str, most: int) -> Sequence[Row]:
    """Up to `most` tokens with an id above `after`, by id; without their digests."""
    return (
        connection.execute(select(*_SHOWN).where(_t.id > after).order_by(_t.id).limit(most)).mappings().all()
    )


def remove(connection: Connection, token_id: str) -> bool:
    """Delete a token; False if there is none.  Run in a write transaction."""
    return connection.execute(delete(models.tokens).where(_t.id == token_id)).rowcount == 1


def is_bootstrap(presented: str, admin_token: str) -> bool:
    """Is it the bootstrap token?  Digests are compared, in constant time; an empty setting is no token."""
    same = hmac.compare_digest(digest(presented), digest(admin_token))
    return same and bool(admin_token)


def authenticate(connection: Connection, presented: str) -> frozenset[str] | None:
    """The scopes of a stored token, those it includes as well; None if it is unknown."""
    found = connection.execute(_SCOPES_OF.where(_t.digest == digest(presented))).scalar()
    return None if found is None else included(found)


def included(scopes: Iterable[str]) -> frozenset[str]:
    """All that these scopes allow: `write` includes `read`, `admin` both."""
    highest = max((SCOPES.index(scope) for scope in scopes if scope in SCOPES), default=-1)
    return frozenset(SCOPES[: highest + 1])
