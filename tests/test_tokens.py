"""API tokens: only digests are stored, and a scope includes the smaller ones."""

import hashlib

import pytest
from sqlalchemy import select

from tests.facts import NOON
from webhook_app import db, models, tokens


def make(engine, *scopes):
    return db.in_transaction(engine, lambda connection: tokens.create(connection, "ci", scopes, NOON))


def test_a_token_is_recognized_until_it_is_deleted(engine):
    row, token = make(engine, "write")
    with db.reading(engine) as connection:
        assert tokens.authenticate(connection, token) == {"read", "write"}
        assert tokens.authenticate(connection, token + "x") is None
        assert tokens.authenticate(connection, "") is None
    assert db.in_transaction(engine, lambda connection: tokens.remove(connection, row["id"]))
    assert not db.in_transaction(engine, lambda connection: tokens.remove(connection, row["id"]))
    with db.reading(engine) as connection:
        assert tokens.authenticate(connection, token) is None


def test_only_the_digest_is_stored(engine):
    row, token = make(engine, "admin")
    assert token.startswith("brt_")
    assert len(token) > 40
    assert token not in str(row)
    with db.reading(engine) as connection:
        stored = dict(connection.execute(select(models.tokens)).mappings().one())
    assert stored.pop("digest") == hashlib.sha256(token.encode()).hexdigest()
    assert token not in str(stored)
    assert stored["created_at"] == NOON


def test_tokens_differ_and_are_listed_by_id_without_digests(engine):
    made = [make(engine, "read") for _ in range(3)]
    assert len({token for _, token in made}) == 3
    ids = sorted(row["id"] for row, _ in made)
    with db.reading(engine) as connection:
        listed = tokens.page(connection, "", 2)
        rest = tokens.page(connection, listed[-1]["id"], 2)
    assert [row["id"] for row in (*listed, *rest)] == ids
    assert set(listed[0]) == {"id", "name", "scopes", "created_at"}


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        (["read"], {"read"}),
        (["write"], {"read", "write"}),
        (["admin"], {"read", "write", "admin"}),
        (["read", "admin"], {"read", "write", "admin"}),
        ([], set()),
        (["root"], set()),
    ],
)
def test_scopes_include_the_smaller_ones(scopes, allowed):
    assert tokens.included(scopes) == allowed


def test_the_bootstrap_token_is_compared_whole_and_empty_is_none():
    assert tokens.is_bootstrap("abc", "abc")
    assert not tokens.is_bootstrap("abc", "abcd")
    assert not tokens.is_bootstrap("", "")
    assert not tokens.is_bootstrap("é\udce9", "abc")
