"""The outbox: who gets a message, in which order it is claimed, and what a try does to it."""

from collections import Counter
from dataclasses import replace
from datetime import timedelta

import orjson
import pytest
from cryptography.fernet import Fernet
from sqlalchemy import select, text

from tests.facts import PACE, at, github, gitlab
from webhook_app import builds, db, deliveries, endpoints, models, signing, subscribers
from webhook_app.deliveries import Tried
from webhook_app.lifecycle import State
from webhook_app.retries import RetryPolicy
from webhook_app.room import CAUTION_IN_FLIGHT, Room

Q, P, C, F = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED
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


def claim(engine, now=START, most=200, room=None):
    """By a worker that lets everybody have half of `most` at once, unless it has a `room` of its own."""
    room = room or Room(most, per_host=most, first=most)
    return db.in_transaction(engine, lambda connection: deliveries.claim(connection, now, room, 15)).messages


def settle(engine, *tries, now=START):
    """Settle, and carry out what follows for the subscribers; what was to be done."""

    def unit(connection):
        deliveries.settle(connection, tries, now, POLICY)
        return endpoints.note(connection, tries, now)

    sentences = db.in_transaction(engine, unit)
    for sentence in sentences:
        db.as_writer(engine, lambda write, sentence=sentence: endpoints.carry_out(write, sentence, now))
    return [sentence.act for sentence in sentences]


def went(message, status=200, begun=START, **more):
    reason = None if 200 <= status < 300 else f"http_{status}"
    return Tried(message, begun, 0.01, status, reason, "", **more)


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
        ({"states": ["queued"]}, True),
        ({"states": ["failed"]}, False),
        ({"conclusions": ["success"]}, False),
        ({"changes": ["broke"]}, False),
        ({"sources": ["GitHub"]}, True),
        ({"sources": ["git*"], "branches": ["m??n"], "repositories": ["OCTO/repo"]}, True),
    ],
)
def test_filters_are_globs_and_empty_means_all(engine, wanted, gets):
    subscribe(engine, **wanted)
    record(engine, github(Q))
    assert bool(rows(engine)) is gets


FORK = {"branch": "stranger:main", "head_repository": "stranger/repo", "is_fork": True}


@pytest.mark.parametrize(
    ("wanted", "gets"),
    [
        ({}, True),
        ({"states": ["failed"]}, True),
        ({"branches": ["main"]}, False),
        ({"branches": ["*"]}, False),
        ({"changes": ["broke"]}, False),
        ({"branches": ["main"], "forks": True}, True),
        ({"branches": ["stranger:*"], "forks": True}, True),
        ({"branches": ["release"], "forks": True}, False),
        ({"changes": ["broke"], "forks": True}, True),
    ],
)
def test_a_forks_branch_is_none_of_the_repository_unless_it_is_asked_for(engine, wanted, gets):
    subscribe(engine, **wanted)
    record(engine, github(F, **FORK))
    assert bool(rows(engine)) is gets


def test_what_a_job_told_goes_to_its_branch_once_that_is_known(engine):
    """A job's push names no branch that can be relied on, and may come before its run's."""
    of_main = subscribe(engine, branches=["main"])
    all_of_it = subscribe(engine)
    record(engine, github(P, run=1, branch=None), github(P, run=2, branch=None))
    assert [row["subscriber"] for row in rows(engine)] == [all_of_it] * 2
    record(engine, github(C, run=1, branch="main"), github(C, run=2, **FORK))
    got = [(row["subscriber"], row["build"], row["sequence"]) for row in rows(engine)]
    first, second = sorted({build for _, build, _ in got})
    assert [(build, number) for id_, build, number in got if id_ == of_main] == [(first, 1), (first, 2)]
    assert sorted((build, number) for id_, build, number in got if id_ == all_of_it) == [
        (first, 1), (first, 2), (second, 1), (second, 2),
    ]  # fmt: skip
    record(engine, github(C, run=1, branch="main"))
    assert len(rows(engine)) == 6


def test_message_ids_rise_with_time_and_are_not_to_be_guessed(engine):
    subscribe(engine)
    for second in (1, 2, 3):
        record(engine, *(github(Q, run=10 * second + place) for place in range(9)), now=at(second))
    ids = [row["message_id"] for row in rows(engine)]
    assert [sorted(ids)[first : first + 9] for first in (0, 9, 18)] == [
        sorted(ids[first : first + 9]) for first in (0, 9, 18)
    ]
    assert len({message_id[16:] for message_id in ids}) == 27


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


def test_messages_that_wait_never_hide_their_heads(engine):
    """A worker died with the heads, and nobody looked until their leases were over."""
    subscribe(engine)
    record(engine, *(github(Q, run=run) for run in range(1, 6)))
    assert len(claim(engine)) == 5
    record(engine, *(github(P, run=run) for run in range(1, 6)), now=at(1))
    taken = []
    for _ in range(5):
        again = claim(engine, at(31), most=6)
        assert len(again) <= 3
        taken += [(message.data["number"], message.data["sequence"]) for message in again]
    assert sorted(taken) == [(run, 1) for run in range(1, 6)]


def test_messages_that_wait_never_hide_other_builds(engine):
    subscribe(engine)
    record(engine, *(github(Q, run=run) for run in range(1, 6)))
    assert len(claim(engine)) == 5
    record(engine, *(github(P, run=run) for run in range(1, 6)), now=at(1))
    record(engine, github(Q, run=9), now=at(2))
    assert [message.data["number"] for message in claim(engine, at(3), most=4)] == [9]


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


def test_gone_disables_at_once_and_what_waited_is_dead(engine):
    subscriber = subscribe(engine)
    watcher = subscribe(engine, events=["subscriber.*"])
    record(engine, github(Q), github(P))
    (message,) = claim(engine)
    assert settle(engine, went(message, 410)) == ["disable"]
    assert [(row["subscriber"], row["state"], row["reason"]) for row in rows(engine)] == [
        (subscriber, "dead", "http_410"),
        (subscriber, "dead", "subscriber_disabled"),
        (watcher, "pending", None),
    ]
    record(engine, github(C))
    assert len(rows(engine)) == 3
    assert rows(engine, models.notices)[0]["kind"] == "subscriber.disabled"
    (told,) = claim(engine)
    assert (told.type, told.data["subscriber_id"]) == ("subscriber.disabled", subscriber)


def hours(count):
    return START + timedelta(hours=count)


def test_a_failing_endpoint_is_warned_of_in_stages_probed_and_then_disabled(engine):
    subscriber = subscribe(engine)
    record(engine, *[github(Q, run=run) for run in range(40)])
    messages = list(claim(engine))
    assert settle(engine, *[went(messages.pop(), 500) for _ in range(25)], now=START) == []
    acts = [settle(engine, went(messages.pop(), 500), now=hours(when)) for when in (59, 61, 62, 85, 110, 121)]
    assert acts == [[], ["warn"], [], ["warn"], ["warn"], ["probe"]]
    assert claim(engine, hours(121)) == []  # left alone before the probe
    (probe,) = claim(engine, hours(122))
    assert settle(engine, went(probe, 500, hours(122)), now=hours(122)) == ["disable"]
    words = ("50 %", "70 %", "90 %", "one more try", "was disabled")
    told = [row["text"] for row in rows(engine, models.notices)]
    assert [word for text in told for word in words if word in text] == list(words)
    with db.reading(engine) as connection:
        assert subscribers.get(connection, subscriber)["state"] == "disabled"


def test_what_was_on_its_way_before_the_pause_is_no_probe(engine):
    subscriber = subscribe(engine)
    record(engine, *[github(Q, run=run) for run in range(40)])
    messages = list(claim(engine))
    settle(engine, *[went(messages.pop(), 500) for _ in range(25)], now=START)
    assert settle(engine, went(messages.pop(), 500), now=hours(121)) == ["probe"]
    assert settle(engine, went(messages.pop(), 429, hours(121), retry_after="7200"), now=hours(121)) == []
    assert claim(engine, hours(122)) == []
    (probe,) = claim(engine, hours(124))
    # The probe's own wish to be left alone does not save it.
    assert settle(engine, went(probe, 503, hours(124), retry_after="7200"), now=hours(124)) == ["disable"]
    with db.reading(engine) as connection:
        assert subscribers.get(connection, subscriber)["disabled_reason"] == endpoints.TOO_LONG


@pytest.mark.parametrize(
    ("act", "found"),
    [
        ("warn", {}),
        ("probe", {}),
        ("disable", {}),
        ("disable", {"failing_since": START, "failures": 1}),
        ("probe", {"failing_since": START, "failures": 20, "on_probation": True, "slow_until": hours(121)}),
    ],
)
def test_a_sentence_is_void_once_another_worker_saw_a_success_or_was_first(engine, act, found):
    subscriber = subscribe(engine)
    sentence = endpoints.Sentence(subscriber, act, 50, endpoints.TOO_LONG)

    def unit(write):
        if found:
            subscribers.change(write, subscriber, found, (), START)
        before = subscribers.get(write.connection, subscriber)
        endpoints.carry_out(write, sentence, hours(122))
        return before == subscribers.get(write.connection, subscriber)

    assert db.as_writer(engine, unit)
    assert rows(engine, models.notices) == []


def test_a_fault_of_ours_is_not_counted_against_the_endpoint(engine):
    subscribe(engine)
    record(engine, github(Q))
    (message,) = claim(engine)
    settle(engine, replace(went(message, 500), status_code=None, reason="internal_SealError"))
    assert rows(engine, models.subscribers)[0]["failing_since"] is None
    assert rows(engine)[0]["reason"] == "internal_SealError"


def test_a_message_whose_key_is_missing_waits_and_is_not_used_up(engine):
    subscribe(engine)
    record(engine, github(Q))
    for minute in range(20):  # more often than the schedule has tries
        (message,) = claim(engine, at(61 * minute))
        assert message.number == 1
        untried = replace(went(message), status_code=None, reason=deliveries.NO_KEY)
        settle(engine, untried, now=at(61 * minute))
        assert not claim(engine, at(61 * minute + 1))
    assert [(row["state"], row["reason"], row["claim"]) for row in rows(engine)] == [
        ("pending", "no_key", None)
    ]
    assert rows(engine, models.delivery_attempts) == []
    answer = endpoints.await_answer(engine, message.message_id, 0.0)
    assert answer == endpoints.Answer("pending", reason="no_key"), "whoever sends a test is told why"
    (subscriber,) = rows(engine, models.subscribers)
    assert (subscriber["failing_since"], subscriber["failures"]) == (None, 0)
    (message,) = claim(engine, at(61 * 20))
    settle(engine, went(message), now=at(61 * 20))
    assert [(row["state"], row["reason"]) for row in rows(engine)] == [("delivered", None)]


def test_a_head_behind_the_limit_is_sent_before_its_lane(engine):
    """Paused for long, a lane may be due as a whole with its head last: it must not block itself."""
    subscribe(engine, rate_limit_per_second=1)
    record(engine, *[github(Q, run=run) for run in (1, 2)])
    for message in (*claim(engine), *claim(engine, at(2))):
        settle(engine, went(message, 500), now=at(3))
    record(engine, github(P, run=1), github(P, run=2), now=at(4))
    got = [message for seconds in range(60, 80) for message in deliver_all(engine, at(seconds))]
    assert sorted(got) == ["1.1", "1.2", "2.1", "2.2"]
    assert [name for name in got if name[0] == "1"] == ["1.1", "1.2"]


def deliver_all(engine, now):
    """Claim and deliver what is due; `BUILD.SEQUENCE` of each."""
    messages = claim(engine, now)
    settle(engine, *map(went, messages), now=now)
    return [f"{message.data['number']}.{message.data['sequence']}" for message in messages]


def test_what_is_rolled_back_is_not_remembered_about_subscribers(engine):
    one = subscribe(engine)

    def fail(write):
        endpoints.disable(write, one, "for no reason", START)
        builds.record(write, [github(Q, run=8)], START, PACE)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        db.as_writer(engine, fail)
    two = subscribe(engine)
    record(engine, github(Q))
    assert {row["subscriber"] for row in rows(engine)} == {one, two}


def test_a_probe_that_succeeds_heals(engine):
    subscriber = subscribe(engine)
    record(engine, *[github(Q, run=run) for run in range(40)])
    messages = list(claim(engine))
    settle(engine, *[went(messages.pop(), 500) for _ in range(25)], now=START)
    assert settle(engine, went(messages.pop(), 500), now=hours(121)) == ["probe"]
    (probe,) = claim(engine, hours(122))
    assert settle(engine, went(probe), now=hours(122)) == []
    with db.reading(engine) as connection:
        row = subscribers.get(connection, subscriber)
    assert (row["state"], row["failures"], row["on_probation"], row["failing_since"]) == (
        "active", 0, False, None,
    )  # fmt: skip


def test_a_success_forgets_the_failures(engine):
    subscribe(engine)
    record(engine, *[github(Q, run=run) for run in range(30)])
    messages = claim(engine)
    settle(engine, *[went(message, 500) for message in messages[:25]], now=START)
    settle(engine, went(messages[25]), now=at(1))
    assert settle(engine, went(messages[26], 500), now=hours(121)) == []


def test_an_endpoint_that_asks_for_it_is_left_alone(engine):
    subscribe(engine)
    record(engine, github(Q, run=1), github(Q, run=2))
    one, two = claim(engine)
    settle(engine, went(one, 429, retry_after="120"), went(two), now=at(0))
    record(engine, github(Q, run=3), now=at(1))
    assert claim(engine, at(119)) == []
    with db.reading(engine) as connection:
        assert deliveries.next_due(connection) == at(120)
    assert len(claim(engine, at(121))) == 2


def test_a_rate_limit_holds_over_all_claims(engine):
    subscribe(engine, rate_limit_per_second=5)
    record(engine, *[github(Q, run=run) for run in range(40)])
    taken = [len(claim(engine, at(tenths / 10))) for tenths in range(31)]
    assert sum(taken[:11]) <= 10
    assert 15 <= sum(taken) <= 20
    assert max(taken) <= 5


def test_nobody_can_fill_all_the_room(engine):
    many, few = subscribe(engine, sources=["github"]), subscribe(engine, sources=["gitlab"])
    record(engine, *[github(Q, run=run) for run in range(300)])
    record(engine, *[gitlab(Q, 0, {1: "queued"}, pipeline=number) for number in range(3)], now=at(1))
    taken = claim(engine, at(2), most=128)
    assert sum(message.subscriber == many for message in taken) == 64
    assert sum(message.subscriber == few for message in taken) == 3


def test_whoever_has_the_least_under_way_comes_first(engine):
    """However old the other one's backlog is."""
    subscribe(engine, sources=["github"])
    few = subscribe(engine, sources=["gitlab"])
    record(engine, *[github(Q, run=run) for run in range(30)])
    record(engine, gitlab(Q, 0, {1: "queued"}), now=at(1))
    room = Room(5)
    for row in rows(engine, models.subscribers):
        room.began(row, 4 if row["id"] != few else 0)
    assert [message.subscriber for message in claim(engine, at(2), room=room)] == [few]


def test_a_failing_endpoint_gets_few_at_a_time(engine):
    subscribe(engine)
    record(engine, *[github(Q, run=run) for run in range(50)])
    first = claim(engine, most=2)
    settle(engine, *[went(message, 500) for message in first])
    assert len(claim(engine)) == CAUTION_IN_FLIGHT


def test_the_subscribers_of_one_host_share_what_it_may_get(engine):
    urls = ("https://one.example/a", "https://ONE.example:8443/b", "https://two.example/")
    one, also_one, two = [subscribe(engine, url=url) for url in urls]
    record(engine, *[github(Q, run=run) for run in range(50)])
    room = Room(per_host=20, first=100)
    taken = claim(engine, room=room)
    found = Counter(message.subscriber for message in taken)
    assert (found[one] + found[also_one], found[two]) == (20, 20)
    by_id = {row["id"]: row for row in rows(engine, models.subscribers)}
    for message in taken:
        room.began(by_id[message.subscriber])
    assert claim(engine, room=room) == []
    room.ended(by_id[taken[0].subscriber], well=True)
    (next_one,) = claim(engine, room=room)
    assert (next_one.subscriber == two) is (taken[0].subscriber == two)


def test_a_request_is_signed_the_same_body_on_every_try(engine):
    subscribe(engine)
    record(engine, github(C))
    (message,) = claim(engine)
    row = rows(engine, models.subscribers)[0]
    live = subscribers.live_secrets(row, KEYS, at(0))
    kind, content = deliveries.body(message)
    sent = deliveries.headers(message, kind, content, live, 1_800_000_000, "BuildRelay/test")
    assert signing.verify_v1(sent, content, live, 1_800_000_000)
    again = replace(message, number=2)
    assert deliveries.body(again) == (kind, content)
    assert (
        deliveries.headers(again, kind, content, live, 1_800_000_001, "x")["webhook-id"] == sent["webhook-id"]
    )
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


def test_of_many_rotations_the_last_ones_count(engine):
    one = subscribe(engine)

    def rotate(write):
        row = subscribers.get(write.connection, one)
        return subscribers.rotate_secret(write, row, 604_800, KEYS, at(0))[0]

    made = [db.as_writer(engine, rotate) for _ in range(15)]
    live = subscribers.live_secrets(rows(engine, models.subscribers)[0], KEYS, at(1))
    assert list(live) == made[: -subscribers.MOST_OLD_SECRETS - 2 : -1]


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
    kind, content = deliveries.body(message)
    sent = deliveries.headers(
        message, kind, content, subscribers.live_secrets(row, KEYS, at(0)), 1_800_000_000, "x"
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


def test_a_claim_reads_no_more_of_a_long_queue_than_it_takes(postgres_engine):
    """With statistics from when nothing waited: autovacuum comes once a minute, a backlog at once."""
    subscribe(postgres_engine)
    with postgres_engine.begin() as connection:
        connection.execute(text("ANALYZE"))
    record(
        postgres_engine, *(github(Q, key=f"github:{run}", build_id=f"github:o:r:{run}") for run in range(500))
    )
    walked = text(
        "SELECT sum(pg_stat_get_xact_tuples_returned(indexrelid)) FROM pg_index WHERE indrelid = 'messages'::regclass"
    )
    with postgres_engine.begin() as connection:
        claimed = deliveries.claim(connection, at(1), Room(20, per_host=10, first=10), 15).messages
        assert len(claimed) == 10
        assert connection.execute(walked).scalar_one() < 100
