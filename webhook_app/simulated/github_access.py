"""Who may ask the simulated GitHub, and how often: tokens, an App with real JWTs, both kinds of limits."""

import base64
import binascii
import json
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

LONGEST_JWT_SECONDS = 600
WINDOW_SECONDS = 60.0
PERMISSIONS: Mapping[str, str] = {
    "actions": "write",
    "checks": "read",
    "contents": "write",
    "metadata": "read",
    "repository_hooks": "write",
}
"""What an account may do unless a test takes some of it away."""


@dataclass(frozen=True)
class App:
    """A GitHub App with one installation; `private_key` is the PEM that its owner downloaded."""

    app_id: int
    client_id: str
    installation_id: int
    private_key: str

    @classmethod
    def create(cls, app_id: int = 4711, installation_id: int = 51_234_567) -> Self:
        """An App with a fresh key of 2048 bits."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        return cls(app_id, f"Iv23li{app_id}", installation_id, pem.decode())

    @cached_property
    def public_key(self) -> rsa.RSAPublicKey:
        """The half that GitHub keeps."""
        key = serialization.load_pem_private_key(self.private_key.encode(), None)
        assert isinstance(key, rsa.RSAPrivateKey)
        return key.public_key()

    def objection(self, token: str, now: float) -> str | None:
        """What is wrong with a JWT, in GitHub's words; None if it is good."""
        claims = _claims(token, self.public_key)
        if claims is None:
            return "A JSON web token could not be decoded"
        if str(claims.get("iss")) not in (str(self.app_id), self.client_id):
            return "'Issuer' claim ('iss') must be an Integer"
        return _untimely(claims.get("iat"), claims.get("exp"), now)


def _claims(token: str, key: rsa.RSAPublicKey) -> dict[str, Any] | None:
    """The claims of a JWT whose RS256 signature is right, else None."""
    try:
        head, body, signature = token.split(".")
        if json.loads(_unpacked(head)).get("alg") != "RS256":
            return None
        key.verify(_unpacked(signature), f"{head}.{body}".encode(), padding.PKCS1v15(), hashes.SHA256())
        claims: dict[str, Any] = json.loads(_unpacked(body))
    except (ValueError, AttributeError, InvalidSignature, binascii.Error):
        return None
    return claims


def _unpacked(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def _untimely(iat: object, exp: object, now: float) -> str | None:
    if not isinstance(iat, int | float) or iat > now:
        return (
            "'Issued at' claim ('iat') must be an Integer representing the time that the assertion was issued"
        )
    if not isinstance(exp, int | float) or exp <= now:
        return (
            "'Expiration time' claim ('exp') must be a numeric value representing the future time at which "
            "the assertion expires"
        )
    if exp > now + LONGEST_JWT_SECONDS:
        return "'Expiration time' claim ('exp') is too far in the future"
    return None


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token is good for: `account` has the budget; None in `repositories`: all that there are."""

    account: str
    installation: bool = False
    expires_at: float | None = None
    permissions: Mapping[str, str] | None = None
    repositories: frozenset[str] | None = None

    def sees(self, full_name: str) -> bool:
        """Does it reach this repository?"""
        return self.repositories is None or full_name.partition("/")[2] in self.repositories


class Tokens:
    """The tokens that are accepted: personal ones for ever, those of an installation for their time."""

    def __init__(self, personal: tuple[str, ...], app: App | None, now: Callable[[], float]) -> None:
        self.personal = personal
        self.app = app
        self.lifetime_seconds = 3600.0
        self.issued: list[str] = []
        self._now = now
        self._grants: dict[str, Grant] = {}

    def grant(self, token: str) -> Grant | None:
        """What this token is good for now; None for one that is unknown, revoked or expired."""
        if token in self.personal:
            return Grant(token)
        grant = self._grants.get(token)
        over = grant and grant.expires_at is not None and grant.expires_at <= self._now()
        return None if over else grant

    def account(self, token: str) -> str:
        """Whose budget a token uses; all tokens of an installation share one."""
        grant = self._grants.get(token)
        return grant.account if grant else token

    def issue(self, permissions: Mapping[str, str], repositories: frozenset[str] | None) -> tuple[str, float]:
        """A new installation token, in the long form of 2026, and its end."""
        assert self.app
        parts = ".".join(secrets.token_urlsafe(size) for size in (48, 180, 256))
        token, expires_at = f"ghs_{self.app.app_id}_{parts}", self._now() + self.lifetime_seconds
        account = f"installation {self.app.installation_id}"
        self._grants[token] = Grant(account, True, expires_at, permissions, repositories)
        self.issued.append(token)
        return token, expires_at

    def revoke(self, token: str) -> None:
        """Accept it no more."""
        self._grants.pop(token, None)
        self.personal = tuple(kept for kept in self.personal if kept != token)


@dataclass
class Limits:
    """Primary and secondary limits, per account.

    `limit`: requests an hour, refused with `limit_status`; a 304 is free.  `points`: of a rolling minute (a
    read costs 1, a write 5, a 304 too).  `concurrency`: requests in flight.  Who breaks a secondary
    limit is refused for `retry_after` seconds (60 if it isn't told).
    """

    now: Callable[[], float]
    limit: int
    limit_status: int = 403
    points: int = 900
    concurrency: int = 100
    retry_after: int | None = None
    secondary_hits: int = 0
    refused: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _used: dict[str, tuple[int, int]] = field(default_factory=dict)
    _spent: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)
    _totals: Counter[str] = field(default_factory=Counter)
    _blocked_until: dict[str, float] = field(default_factory=dict)

    def reset_at(self) -> int:
        """When the hour is over, POSIX seconds."""
        return (int(self.now() // 3600) + 1) * 3600

    def used(self, account: str) -> int:
        """Requests of this hour that cost budget."""
        hour, used = self._used.get(account, (0, 0))
        return used if hour == int(self.now() // 3600) else 0

    def spend(self, account: str) -> None:
        """One request more."""
        with self._lock:
            self._used[account] = (int(self.now() // 3600), self.used(account) + 1)

    def exhausted(self, account: str) -> bool:
        """Is the hour's budget spent?  Counts those that ask in spite of it."""
        spent = self.used(account) >= self.limit
        self.refused += spent
        return spent

    def too_fast(self, account: str, cost: int, in_flight: int) -> bool:
        """Does this request break a secondary limit, or come while an earlier break is being punished?"""
        with self._lock:
            refused = self._punished(account, in_flight, cost)
            self.secondary_hits += refused
            if not refused:
                self._spent.setdefault(account, deque()).append((self.now(), cost))
                self._totals[account] += cost
            return refused

    def _punished(self, account: str, in_flight: int, cost: int) -> bool:
        if self.now() < self._blocked_until.get(account, 0.0):
            return True
        broken = in_flight > self.concurrency or self.points_of(account) + cost > self.points
        if broken:
            self._blocked_until[account] = self.now() + (self.retry_after or WINDOW_SECONDS)
            self._spent.pop(account, None)
            self._totals.pop(account, None)
        return broken

    def points_of(self, account: str) -> int:
        """The points of the last 60 seconds."""
        spent = self._spent.setdefault(account, deque())
        while spent and spent[0][0] <= self.now() - WINDOW_SECONDS:
            self._totals[account] -= spent.popleft()[1]
        return self._totals[account]
