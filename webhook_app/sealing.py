"""Encryption at rest: subscriber secrets and platform tokens are stored only as sealed text.

The keys are Fernet keys (`ENCRYPTION_KEYS`, newest first).  The newest one seals, every one
opens, so a key is rotated by putting a new one in front, calling `reseal` on what is stored,
and then taking the old one away.  Nothing here logs or shows a secret, a key or a token.

Source: https://cryptography.io/en/latest/fernet/
"""

from functools import lru_cache

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

REMEMBERED = 4096
"""How many opened secrets stay in memory: opening one takes some 50 microseconds, for each delivery."""


class SealError(Exception):
    """A secret can't be sealed or opened; the message says what to mend and holds no secret."""


def seal(text: str, keys: tuple[str, ...]) -> str:
    """Encrypt `text` with the newest of `keys`; returns ASCII text, about 4/3 as long plus 100 characters.

    Raises `SealError` if there is no usable key.
    """
    return _fernet(keys).encrypt(text.encode("utf-8", "surrogatepass")).decode("ascii")


@lru_cache(maxsize=REMEMBERED)
def unseal(token: str, keys: tuple[str, ...]) -> str:
    """Decrypt what `seal` gave, with whichever of `keys` fits.

    The result is remembered in this process until `forget` is called.  Raises `SealError`.
    """
    try:
        opened = _fernet(keys).decrypt(token)
    except (InvalidToken, ValueError):
        raise _no_key_fits(keys) from None
    return opened.decode("utf-8", "surrogatepass")


def reseal(token: str, keys: tuple[str, ...]) -> str:
    """Seal the same secret with the newest key; it keeps the time at which it was first sealed.

    Raises `SealError` if no key opens `token`.
    """
    try:
        return _fernet(keys).rotate(token).decode("ascii")
    except (InvalidToken, ValueError):
        raise _no_key_fits(keys) from None


def is_newest(token: str, keys: tuple[str, ...]) -> bool:
    """Was `token` sealed with the newest of `keys`?  Raises `SealError` if there is no usable key."""
    try:
        _fernet(keys[:1]).decrypt(token)
    except (InvalidToken, ValueError):
        return False
    return True


def forget() -> None:
    """Drop every remembered secret and key, as after a rotation."""
    unseal.cache_clear()
    _fernet.cache_clear()


@lru_cache(maxsize=8)
def _fernet(keys: tuple[str, ...]) -> MultiFernet:
    if not keys:
        raise SealError("ENCRYPTION_KEYS is empty: secrets can't be stored or read without a key")
    try:
        return MultiFernet([Fernet(key) for key in keys])
    except (ValueError, TypeError):
        raise SealError("ENCRYPTION_KEYS holds something that is no Fernet key") from None


def _no_key_fits(keys: tuple[str, ...]) -> SealError:
    return SealError(
        f"a stored secret opens with none of the {len(keys)} keys in ENCRYPTION_KEYS:"
        " put the key back that it was sealed with, or store the secret again"
    )
