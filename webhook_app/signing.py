"""Verify and sign.  Pure: secrets, bytes and the time come in; a signature or yes/no comes out.

Three schemes:

* GitHub: `sha256=` + hex of HMAC-SHA256 over the raw body
  (https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries)
* Standard Webhooks 1.0: `v1,` (HMAC-SHA256) and `v1a,` (Ed25519) over `{id}.{timestamp}.{body}`
  (https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md);
  `v1` serves GitLab's signing tokens as well as our own messages
* a plain token in a header

No verifying function raises, whatever it is given; a broken secret matches nothing.  All live
secrets are tried, and comparisons take the same time wherever a guess is wrong.
"""

import hashlib
import hmac
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

TOLERANCE_SECONDS = 300.0
"""How far a signed timestamp may lie from our clock, both ways: what the reference libraries allow."""

SECRET_BYTES = range(24, 65)
"""Standard Webhooks: a symmetric secret has 24 to 64 random bytes."""

HMAC_PREFIX, PRIVATE_PREFIX, PUBLIC_PREFIX = "whsec_", "whsk_", "whpk_"
SEED_BYTES = 32

_GITHUB_SIGNATURE = re.compile(r"sha256=[0-9a-f]{64}")
_NO_SIGNATURE = "sha256=" + "0" * 64
_TIMESTAMP = re.compile(r"[0-9]{1,12}")
_KEYS_REMEMBERED = 4096


# ---- GitHub --------------------------------------------------------------------------------------


def github_signature(secret: str, body: bytes) -> str:
    """The `X-Hub-Signature-256` of `body`."""
    return "sha256=" + hmac.digest(_utf8(secret), body, "sha256").hex()


def verify_github(header: str | None, body: bytes, secrets: tuple[str, ...]) -> bool:
    """Is `header` the `X-Hub-Signature-256` of `body` under one of `secrets`?

    The digest is computed even when the header is missing, so that its absence costs the same time.
    """
    well_formed = header is not None and _GITHUB_SIGNATURE.fullmatch(header) is not None
    given = header if header is not None and well_formed else _NO_SIGNATURE
    matches = False
    for secret in filter(None, secrets):
        matches |= _same(given, github_signature(secret, body))
    return matches and well_formed


# ---- a plain token -------------------------------------------------------------------------------


def verify_token(header: str | None, secrets: tuple[str, ...]) -> bool:
    """Is `header` one of `secrets`?  Digests are compared, so that not even a length is told."""
    given = hashlib.sha256(_header_bytes(header or "")).digest()
    matches = False
    for secret in filter(None, secrets):
        matches |= hmac.compare_digest(given, hashlib.sha256(_utf8(secret)).digest())
    return matches and bool(header)


# ---- Standard Webhooks ---------------------------------------------------------------------------


def sign_v1(secret: str, msg_id: str, timestamp: int, body: bytes) -> str:
    """The `v1,…` signature (HMAC-SHA256) of a message; `timestamp` in Unix seconds.

    ValueError: a secret that is no base64 or empty, or an id that is empty or holds a `.`.
    """
    return _v1(_hmac_key(secret), _signed_text(_message_id(msg_id), str(timestamp), body))


def sign_v1a(secret_key: str, msg_id: str, timestamp: int, body: bytes) -> str:
    """The `v1a,…` signature (Ed25519) of a message under a `whsk_…` key; errors as in `sign_v1`."""
    signature = _private_key(secret_key).sign(_signed_text(_message_id(msg_id), str(timestamp), body))
    return "v1a," + b64encode(signature).decode()


def verify_v1(
    headers: Mapping[str, str],
    body: bytes,
    secrets: tuple[str, ...],
    now: float,
    tolerance_seconds: float = TOLERANCE_SECONDS,
) -> bool:
    """Does any `v1` entry of `webhook-signature` match under one of `secrets`, at a recent time?

    Header names are lower case, `now` in Unix seconds; a secret may lack `whsec_` and its padding.
    """
    return is_recent(v1_age_seconds(headers, body, secrets, now), tolerance_seconds)


def v1_age_seconds(
    headers: Mapping[str, str], body: bytes, secrets: tuple[str, ...], now: float
) -> float | None:
    """How long ago, by our clock, a message was signed whose signature is right; None: it is not.

    For those who refuse it and may still say that two clocks differ; takes as long as `verify_v1`.
    """

    def genuine(secret: str, text: bytes, entries: list[str]) -> bool:
        expected = _v1(_hmac_key(secret), text)
        matches = False
        for entry in entries:
            matches |= _same(entry, expected)
        return matches

    return _age_seconds(headers, body, secrets, now, genuine)


def verify_v1a(
    headers: Mapping[str, str],
    body: bytes,
    public_keys: tuple[str, ...],
    now: float,
    tolerance_seconds: float = TOLERANCE_SECONDS,
) -> bool:
    """As `verify_v1`, for `v1a` entries under one of the `whpk_…` keys."""

    def genuine(public_key: str, text: bytes, entries: list[str]) -> bool:
        key = _public_key(public_key)
        return any(_verified(key, entry, text) for entry in entries if entry.startswith("v1a,"))

    return is_recent(_age_seconds(headers, body, public_keys, now, genuine), tolerance_seconds)


def is_hmac_secret(secret: str) -> bool:
    """Can `secret` sign and verify `v1`?"""
    try:
        return bool(_hmac_key(secret))
    except ValueError:
        return False


def new_hmac_secret(random_bytes: bytes) -> str:
    """A `whsec_…` secret out of 24 to 64 random bytes; ValueError for any other number of them."""
    if len(random_bytes) not in SECRET_BYTES:
        raise ValueError("a secret needs 24 to 64 random bytes")
    return HMAC_PREFIX + b64encode(random_bytes).decode()


def new_ed25519_pair(seed: bytes) -> tuple[str, str]:
    """`(whsk_…, whpk_…)` out of 32 random bytes: seed and public key in 64 bytes; the public key alone."""
    if len(seed) != SEED_BYTES:
        raise ValueError("a key pair needs 32 random bytes")
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    return PRIVATE_PREFIX + b64encode(seed + public).decode(), PUBLIC_PREFIX + b64encode(public).decode()


def public_key(secret_key: str) -> str:
    """The `whpk_…` of a `whsk_…` key; ValueError for anything else."""
    return PUBLIC_PREFIX + b64encode(_private_key(secret_key).public_key().public_bytes_raw()).decode()


def is_recent(age_seconds: float | None, tolerance_seconds: float = TOLERANCE_SECONDS) -> bool:
    """Whether it is close enough to our clock, before or behind it; None (a wrong signature) is not."""
    return age_seconds is not None and abs(age_seconds) <= tolerance_seconds


def _age_seconds(
    headers: Mapping[str, str],
    body: bytes,
    keys: tuple[str, ...],
    now: float,
    genuine: Callable[[str, bytes, list[str]], bool],
) -> float | None:
    """What both versions share: id, timestamp, and every key tried even after a match."""
    msg_id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    entries = headers.get("webhook-signature", "").split()
    if not _is_message_id(msg_id) or not _TIMESTAMP.fullmatch(timestamp):
        return None
    text = _signed_text(msg_id, timestamp, body)
    matches = False
    for key in keys:
        try:
            matches |= genuine(key, text, entries)
        except ValueError:  # a secret that can't be decoded matches nothing
            continue
    return now - int(timestamp) if matches else None


def _is_message_id(msg_id: str) -> bool:
    """The parts are joined by dots, so a dot inside the id could move a boundary."""
    return bool(msg_id) and msg_id.isascii() and "." not in msg_id


def _message_id(msg_id: str) -> str:
    if not _is_message_id(msg_id):
        raise ValueError("a message id is ASCII text without a dot")
    return msg_id


def _signed_text(msg_id: str, timestamp: str, body: bytes) -> bytes:
    return b"%b.%b.%b" % (msg_id.encode(), timestamp.encode(), body)


def _v1(key: bytes, text: bytes) -> str:
    return "v1," + b64encode(hmac.digest(key, text, "sha256")).decode()


def _verified(key: Ed25519PublicKey, entry: str, text: bytes) -> bool:
    try:
        key.verify(_base64(entry.removeprefix("v1a,")), text)
    except (InvalidSignature, ValueError):
        return False
    return True


# Keys are decoded once: signing is on the path of every delivery.


@lru_cache(_KEYS_REMEMBERED)
def _hmac_key(secret: str) -> bytes:
    key = _base64(secret.removeprefix(HMAC_PREFIX))
    if not key:
        raise ValueError("an empty secret protects nothing")
    return key


@lru_cache(_KEYS_REMEMBERED)
def _private_key(secret_key: str) -> Ed25519PrivateKey:
    raw = _base64(secret_key.removeprefix(PRIVATE_PREFIX))
    if len(raw) not in (SEED_BYTES, 2 * SEED_BYTES):
        raise ValueError("a whsk_ key has 32 or 64 bytes")
    return Ed25519PrivateKey.from_private_bytes(raw[:SEED_BYTES])


@lru_cache(_KEYS_REMEMBERED)
def _public_key(public_key: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(_base64(public_key.removeprefix(PUBLIC_PREFIX)))


# ---- bytes ---------------------------------------------------------------------------------------


def _base64(text: str) -> bytes:
    """Standard base64, padded or not; ValueError otherwise."""
    text = text.rstrip("=")
    try:
        return b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:  # binascii.Error is one
        raise ValueError("not base64") from None


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(_utf8(given), _utf8(expected))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _header_bytes(header: str) -> bytes:
    """The bytes that were sent: WSGI hands header values over as Latin-1."""
    try:
        return header.encode("latin-1")
    except UnicodeEncodeError:
        return _utf8(header)
