"""Encryption at rest: what is sealed opens with any live key, and nothing else opens it."""

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st

from webhook_app import sealing
from webhook_app.sealing import SealError, forget, reseal, seal, unseal

OLD, NEW, FOREIGN = (Fernet.generate_key().decode() for _ in range(3))


@pytest.fixture(autouse=True)
def _fresh_memory():
    forget()
    yield
    forget()


@given(st.text())
def test_any_text_comes_back(text):
    token = seal(text, (NEW, OLD))
    assert token.isascii()
    assert unseal(token, (NEW, OLD)) == text


def test_sealed_text_shows_nothing_and_is_never_the_same_twice():
    first, second = seal("whsec_swordfish", (NEW,)), seal("whsec_swordfish", (NEW,))
    assert "swordfish" not in first
    assert first != second


def test_the_newest_key_seals_and_an_older_one_still_opens():
    assert unseal(seal("s", (NEW, OLD)), (NEW,)) == "s"
    assert unseal(seal("s", (OLD,)), (NEW, OLD)) == "s"
    with pytest.raises(SealError):
        unseal(seal("s", (NEW, OLD)), (OLD,))


def test_reseal_moves_a_secret_to_the_newest_key():
    token = seal("s", (OLD,))
    moved = reseal(token, (NEW, OLD))
    assert unseal(moved, (NEW,)) == "s"
    assert Fernet(NEW).extract_timestamp(moved) == Fernet(OLD).extract_timestamp(token)


@pytest.mark.parametrize("token", ["", "x", "gAAAAA", "\u2028", "é", "\ud800", "=" * 400, "A" * 400])
@pytest.mark.parametrize("opener", [unseal, reseal])
def test_what_is_no_sealed_text_is_refused(opener, token):
    with pytest.raises(SealError):
        opener(token, (NEW,))


def test_a_changed_token_is_refused():
    token = seal("s", (NEW,))
    place = len(token) // 2
    changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
    with pytest.raises(SealError):
        unseal(changed, (NEW,))


def test_the_message_tells_the_mend_and_no_secret():
    token = seal("swordfish", (OLD,))
    with pytest.raises(SealError) as caught:
        unseal(token, (NEW, FOREIGN))
    message = str(caught.value)
    assert "ENCRYPTION_KEYS" in message
    assert "2 keys" in message
    assert not any(secret in message for secret in ("swordfish", token, OLD, NEW, FOREIGN))
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("keys", [(), ("no key",), (NEW, "")])
def test_unusable_keys_are_named_but_not_shown(keys):
    with pytest.raises(SealError, match="ENCRYPTION_KEYS") as caught:
        seal("s", keys)
    assert NEW not in str(caught.value)


def test_opened_secrets_are_remembered_until_forgotten(monkeypatch):
    token = seal("s", (NEW,))
    assert unseal(token, (NEW,)) == "s"
    monkeypatch.setattr(sealing, "_fernet", lambda keys: pytest.fail("opened again"))
    assert unseal(token, (NEW,)) == "s"
    monkeypatch.undo()
    forget()
    assert unseal.cache_info().currsize == 0


def test_a_secret_remembered_for_other_keys_is_not_given_out():
    token = seal("s", (OLD,))
    assert unseal(token, (OLD,)) == "s"
    with pytest.raises(SealError):
        unseal(token, (NEW,))


def test_the_memory_is_bounded():
    assert unseal.cache_info().maxsize == sealing.REMEMBERED
