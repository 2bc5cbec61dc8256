"""Many subscribers' messages of one event are the same whether Python or the database makes them."""

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import select

from tests.facts import NOON, PACE, github
from webhook_app import builds, db, deliveries, endpoints, fan_out, models, subscribers
from webhook_app.lifecycle import State

KEYS = (Fernet.generate_key().decode(),)


def add(engine, **more):
    wanted = {"url": "https://hooks.example.com/", "signing": "hmac", **more}
    return db.as_writer(engine, lambda write: subscribers.create(write, wanted, KEYS, NOON))[0]["id"]


def record(engine, *facts):
    db.as_writer(engine, lambda write: builds.record(write, facts, NOON, PACE))


def rows(engine):
    with db.reading(engine) as connection:
        found = connection.execute(select(models.messages).order_by(models.messages.c.id)).mappings().all()
    return [dict(row) for row in found]


def ids_of(engine):
    with db.reading(engine) as connection:
        return connection.execute(select(models.counters.c.messages)).scalar()


@pytest.fixture
def many(engine):
    """Subscribers of several wishes; their ids by wish."""
    return {
        "all": [add(engine) for _ in range(3)],
        "main": [add(engine, branches=["main"]) for _ in range(2)],
        "other": [add(engine, repositories=["other/*"])],
        "notices": [add(engine, events=["subscriber.*"]) for _ in range(2)],
    }


@pytest.mark.parametrize("least", [1, 3, 100])
def test_whoever_makes_them_the_messages_are_the_same(engine, many, monkeypatch, least):
    monkeypatch.setattr(fan_out, "LEAST", least)
    record(engine, github(State.QUEUED, branch="main"), github(State.QUEUED, run=2, branch="next"))
    made = rows(engine)
    by_build = {}
    for row in made:
        by_build.setdefault(row["build"], []).append(row["subscriber"])
    main, other = by_build.values()
    assert (main, other) == (sorted(many["all"] + many["main"]), sorted(many["all"]))
    assert sorted(row["id"] for row in made) == list(range(made[0]["id"], made[0]["id"] + len(made)))
    assert ids_of(engine) == made[-1]["id"]
    assert len({row["message_id"] for row in made}) == len(made)
    assert {(len(row["message_id"]), row["message_id"][:4]) for row in made} == {(32, "msg_")}
    constant = [
        "state", "attempts", "due_at", "claim", "reason", "created_at", "settled_at", "sequence",
    ]  # fmt: skip
    assert {tuple(row[name] for name in constant) for row in made} == {
        ("pending", 0, NOON, None, None, NOON, None, 1)
    }


@pytest.mark.parametrize("least", [1, 100])
def test_an_event_without_a_build_has_its_messages(engine, many, monkeypatch, least):
    monkeypatch.setattr(fan_out, "LEAST", least)
    db.as_writer(engine, lambda write: endpoints.disable(write, many["other"][0], "in this test", NOON))
    made = rows(engine)
    assert {row["subscriber"] for row in made} == {*many["all"], *many["notices"]}
    assert {(row["build"], row["sequence"]) for row in made} == {(None, None)}


def test_a_unit_that_fails_leaves_neither_messages_nor_gaps(engine, many, monkeypatch):
    monkeypatch.setattr(fan_out, "LEAST", 1)
    record(engine, github(State.QUEUED))
    last = ids_of(engine)

    def unit(write):
        builds.record(write, [github(State.COMPLETED)], NOON, PACE)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        db.as_writer(engine, unit)
    assert ids_of(engine) == last
    record(engine, github(State.COMPLETED))
    assert [row["id"] for row in rows(engine)] == list(range(1, len(rows(engine)) + 1))


def test_the_groups_follow_every_change(engine):
    def groups():
        def unit(write):
            return {tuple(ids) for ids in subscribers.groups(write).values()}

        return db.as_writer(engine, unit)

    one, two = sorted([add(engine), add(engine)])
    three = add(engine, states=["failed"])
    assert groups() == {(one, two), (three,)}
    db.as_writer(engine, lambda write: subscribers.change(write, two, {"states": ["failed"]}, KEYS, NOON))
    assert groups() == {(one,), tuple(sorted([two, three]))}
    db.as_writer(engine, lambda write: endpoints.disable(write, one, "in this test", NOON))
    assert groups() == {tuple(sorted([two, three]))}
    event = {"type": "build.failed", "data": {"state": "failed"}, "change": None}
    found = db.as_writer(engine, lambda write: deliveries._wanting(subscribers.groups(write), event))
    assert found == sorted([two, three])
