"""The outbox: who gets a message, in which order it is claimed, and what a try does to it."""

from dataclasses import replace
from datetime import timedelta

import orjson
import pytest
from cryptography.fernet import Fernet
from sqlalchemy import select

from tests.facts import PACE, at, github
from webhook_app import builds, db, deliveries, models, signing, subscribers
from webhook_app.deliveries import RetryPolicy, Tried
from webhook_app.lifecycle import State

Q, P, C = State.QUEUED, State.IN_PROGRESS, State.COMPLETED
START = at(0)
KEYS = (Fernet.generate_key().decode(),)
SCHEDULE = (5, 300, 1800)
POLICY = RetryPolicy(SCHEDULE, lambda: 0.5)


def subscribe(engine, now=START, **wanted):
    fields = {"url": "https://example.com/hook", "signing": "hmac", **wanted}
    row, _ = db.as_writer(engine, lambda write: subscribers.create(write, fields, KEYS, now))
    return row["id"]


def record(engine, *facts, now=START):
    db.as_writer(engine, lambda write: builds.record(write, facts, now, PACE))


def claim(engine, now=START, most=100):
    return db.in_transaction(engine, lambda connection: deliveries.claim(connection, now, most, 15))


def settle(engine, *tries, now=START):
    return db.in_transaction(engine, lambda connection: deliveries.settle(connection, tries, now, POLICY))


def went(message, status=200, **more):
    reason = None if 200 <= status < 300 else f"http_{status}"
    return Tried(message, at(0), 0.01, status, reason, "", **more)


def rows(engine, table=models.messages):
    with db.reading(engine) as connection:
        return [dict(row) for row in connection.execute(select(table).order_by(table.c.id)).mappings()]


def states(engine):
    return [row["state"] for row in rows(engine)]


def test_an_event_and_its_messages_are_one_transaction(engine):
    subscribe(engine)

    def fail(write):
        builds.record(write, [github(Q)], at(0), PACE)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        db.as_writer(engine, fail)
    assert rows(engine) == []
    record(engine, github(Q))
    assert [row["state"] for row in rows(engine)] == ["pending"]


@pytest.mark.parametrize(
    ("wanted", "gets"),
    [
        ({}, True),
        ({"events": ["build.*"]}, True),
        ({"events": ["build.completed"]}, False),
        ({"events": ["release.*", "build.queued"]}, True),
        ({"repositories": ["octo/*"]}, True),
        ({"repositories": ["other/*"]}, False),
        ({"branches": ["main"]}, True),
        ({"branches": ["release/*"]}, False),
        ({"sources": ["gitlab"]}, False),
        ({"sources": ["git*"], "branches": ["m??n"], "repositories": ["OCTO/repo"]}, True),
    ],
)
def test_filters_are_globs_and_empty_means_all(engine, wanted, gets):
    subscribe(engine, **wanted)
    record(engine, github(Q))
    assert bool(rows(engine)) is gets


def test_a_new_subscriber_counts_from_the_next_event_on(engine):
    record(engine, github(Q))
    subscribe(engine)
    record(engine, github(P))
    assert [row["sequence"] for row in rows(engine)] == [2]


def test_a_builds_messages_are_claimed_one_after_the_other_and_builds_side_by_side(engine):
    subscribe(engine)
    record(engine, github(Q, run=1), github(P, run=1), github(Q, run=2))
    first = claim(engine)
    assert sorted(message.data["build_id"][-1] + str(message.data["sequence"]) for message in first) == [
        "11", "21",
    ]  # fmt: skip
    assert claim(engine, at(1)) == []
    settle(engine, *map(went, first), now=at(1))
    assert [message.data["sequence"] for message in claim(engine, at(1))] == [2]


def test_a_stuck_message_holds_only_its_own_build(engine):
    subscribe(engine)
    record(engine, github(Q, run=1), github(P, run=1), github(Q, run=2), github(P, run=2))
    one, two = sorted(claim(engine), key=lambda message: message.data["build_id"])
    settle(engine, went(one, 500), went(two), now=at(1))
    assert [message.data["build_id"] for message in claim(engine, at(1))] == ["github:Octo:Repo:2"]
    again = claim(engine, at(7))
    assert [(message.id, message.number) for message in again] == [(one.id, 2)]
    settle(engine, went(again[0]), now=at(7))
    assert [message.data["sequence"] for message in claim(engine, at(7))] == [2]


def test_an_unordered_subscriber_gets_all_at_once(engine):
    subscribe(engine, ordered=False)
    record(engine, github(Q), github(P), github(C))
    assert [message.data["sequence"] for message in claim(engine)] == [1, 2, 3]


def test_a_backoff_of_an_unordered_message_is_not_cut_short_by_its_neighbours(engine):
    subscribe(engine, ordered=False)
    record(engine, github(Q), github(P))
    one, two = claim(engine)
    settle(engine, went(one, 500), went(two), now=START)
    assert claim(engine, at(1)) == []


def test_a_worker_that_dies_gives_its_messages_back(engine):
    subscribe(engine)
    record(engine, github(Q))
    (lost,) = claim(engine)
    assert claim(engine, at(29)) == []
    (again,) = claim(engine, at(31))
    assert (again.message_id, again.number) == (lost.message_id, 2)
    # the first worker was only slow, and fails: the second one's claim stands
    settle(engine, went(lost, 500), now=at(31))
    assert rows(engine)[0]["claim"] == again.claim
    settle(engine, went(again), now=at(32))
    assert states(engine) == ["delivered"]


def test_the_schedule_is_kept_and_then_the_message_is_dead_with_its_reason(engine):
    subscribe(engine)
    record(engine, github(Q), github(P))
    now, waits = at(0), []
    while (messages := claim(engine, now)) and messages[0].data["sequence"] == 1:
        settle(engine, went(messages[0], 500), now=now)
        row = rows(engine)[0]
        if row["state"] == "dead":
            break
        waits.append((row["due_at"] - now).total_seconds())
        now = row["due_at"]
    assert waits == list(SCHEDULE)
    assert (row["reason"], row["attempts"]) == ("http_500", 4)
    assert len(rows(engine, models.delivery_attempts)) == 4
    assert [message.data["sequence"] for message in claim(engine, now)] == [2]


@pytest.mark.parametrize(
    ("jitter", "asked", "status", "wait"),
    [
        (0.0, None, 500, 4), (0.5, None, 500, 5), (1.0, None, 500, 6), (0.5, "120", 503, 120),
        (0.5, "1", 500, 5), (0.5, None, 429, 60), (0.5, "7", 429, 7), (0.5, "nonsense", 500, 5),
        (0.5, "Sun, 01 Nov 2026 12:01:40 GMT", 503, 100), (0.5, "999999999", 503, 86400),
    ],
)  # fmt: skip
def test_waits_have_jitter_and_heed_the_endpoint(engine, jitter, asked, status, wait):
    subscribe(engine)
    record(engine, github(Q))
    (message,) = claim(engine)
    got = RetryPolicy(SCHEDULE, lambda: jitter).wait(went(message, status, retry_after=asked), at(0))
    assert got == pytest.approx(wait)


def test_gone_disables_at_once_and_what_waited_is_dead(engine):
    subscriber = subscribe(engine)
    record(engine, github(Q), github(P))
    (message,) = claim(engine)
    assert settle(engine, went(message, 410)) == [subscriber]
    db.as_writer(engine, lambda write: deliveries.disable(write, subscriber, "gone", KEYS, at(1)))
    assert states(engine) == ["dead", "dead"]
    assert {row["reason"] for row in rows(engine)} == {"subscriber_disabled"}
    record(engine, github(C))
    assert len(rows(engine)) == 2
    assert rows(engine, models.notices)[0]["kind"] == "subscriber.disabled"


def test_long_failure_disables_by_time_and_count(engine):
    subscriber = subscribe(engine)
    record(engine, *[github(Q, run=run) for run in range(30)])
    messages = claim(engine)
    assert settle(engine, *[went(message, 500) for message in messages[:25]], now=START) == []
    later = at(0) + timedelta(hours=121)
    assert settle(engine, went(messages[25], 500), now=later) == [subscriber]


def test_a_success_forgets_the_failures(engine):
    subscribe(engine)
    record(engine, *[github(Q, run=run) for run in range(30)])
    messages = claim(engine)
    settle(engine, *[went(message, 500) for message in messages[:25]], now=START)
    settle(engine, went(messages[25]), now=at(1))
    later = at(0) + timedelta(hours=121)
    assert settle(engine, went(messages[26], 500), now=later) == []


def test_a_request_is_signed_the_same_body_on_every_try(engine):
    subscribe(engine)
    record(engine, github(C))
    (message,) = claim(engine)
    row = rows(engine, models.subscribers)[0]
    live = subscribers.live_secrets(row, KEYS, at(0))
    content = deliveries.body(message)
    sent = deliveries.headers(message, content, live, 1_800_000_000, "BuildRelay/test")
    assert signing.verify_v1(sent, content, live, 1_800_000_000)
    again = replace(message, number=2)
    assert deliveries.body(again) == content
    assert deliveries.headers(again, content, live, 1_800_000_001, "x")["webhook-id"] == sent["webhook-id"]
    told = orjson.loads(content)
    assert (told["type"], told["data"]["build_id"], told["data"]["sequence"]) == (
        "build.completed", "github:Octo:Repo:1", 1,
    )  # fmt: skip
    assert sent["webhook-attempt"] == "1"


def test_rotation_signs_with_both_secrets_until_the_grace_is_over(engine):
    subscriber = subscribe(engine)
    old = subscribers.live_secrets(rows(engine, models.subscribers)[0], KEYS, at(0))

    def rotate(write):
        row = subscribers.get(write.connection, subscriber)
        return subscribers.rotate_secret(write, row, 3600, KEYS, at(0))

    new, expires_at = db.as_writer(engine, rotate)
    row = rows(engine, models.subscribers)[0]
    assert expires_at == at(3600)
    assert subscribers.live_secrets(row, KEYS, at(3599)) == (new, *old)
    assert subscribers.live_secrets(row, KEYS, at(3601)) == (new,)
    assert old[0] not in row["secrets"]


def test_ed25519_shows_the_public_key_and_signs_with_the_private_one(engine):
    _, shown = db.as_writer(
        engine,
        lambda write: subscribers.create(
            write, {"url": "https://x.example", "signing": "ed25519"}, KEYS, at(0)
        ),
    )
    record(engine, github(Q))
    (message,) = claim(engine)
    row = rows(engine, models.subscribers)[0]
    content = deliveries.body(message)
    sent = deliveries.headers(
        message, content, subscribers.live_secrets(row, KEYS, at(0)), 1_800_000_000, "x"
    )
    assert shown.startswith("whpk_")
    assert signing.verify_v1a(sent, content, (shown,), 1_800_000_000)


def test_a_retry_by_hand_makes_it_due_under_the_same_id(engine):
    subscribe(engine)
    record(engine, github(Q))
    (message,) = claim(engine)
    settle(engine, went(message))
    db.in_transaction(engine, lambda connection: deliveries.retry(connection, message.id, at(9)))
    (again,) = claim(engine, at(9))
    assert (again.message_id, again.number) == (message.message_id, 2)
