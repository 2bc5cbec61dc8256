"""Recovery: what a replay and a redrive send again, under which ids, in which order, and when interrupted."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import event, select

from jobs import replay as replay_job
from jobs.resources import Resources
from tests.facts import at, github
from tests.test_deliveries import POLICY, claim, record, rows, settle, subscribe, went
from webhook_app import db, deliveries, endpoints, models, queues, replays, settings, subscribers
from webhook_app.lifecycle import State
from webhook_app.replays import Range

Q, P, C = State.QUEUED, State.IN_PROGRESS, State.COMPLETED
NOW = at(1000)


def span(since=0, until=1000, only_missing=True):
    return Range(at(since), at(until), only_missing)


def row_of(engine, id_):
    with db.reading(engine) as connection:
        return subscribers.get(connection, id_)


def count(engine, id_, wanted):
    return replays.count(engine, row_of(engine, id_), wanted)


def replay(engine, id_, wanted, now=NOW):
    """Begin, and go on as the job does; how many messages it is said to be about."""
    started = replays.replay(engine, row_of(engine, id_), wanted, now)
    return finish(engine, started, now)


def finish(engine, started, now):
    assert bool(rows(engine, models.recoveries)) is started.left
    while replays.advance(engine, now) is not None:
        pass
    assert rows(engine, models.recoveries) == []
    return started.count


def drain(engine, now, status=200):
    """Deliver, or fail, all that is due until nothing is; `(webhook-id, run, sequence)` of each try."""
    tried = []
    while messages := claim(engine, now):
        tried += [(one.message_id, one.data.get("number"), one.data.get("sequence")) for one in messages]
        settle(engine, *[went(one, status, now) for one in messages], now=now)
    return tried


def order(tried):
    return [(run, sequence) for _, run, sequence in tried]


def ids(engine):
    return {(row["subscriber"], row["event"]): row["message_id"] for row in rows(engine)}


@pytest.fixture
def halfway(engine):
    """A subscriber that got two builds whole, then was disabled over two more, and is enabled again."""
    one = subscribe(engine, events=["build.*"])
    for run in (1, 2):
        record(engine, github(Q, run=run), github(P, run=run), now=at(run))
    assert len(drain(engine, at(10))) == 4
    db.as_writer(engine, lambda write: endpoints.disable(write, one, "in this test", at(20)))
    for run in (1, 2, 3):
        record(engine, github(C, run=run), now=at(100 + run))
    db.as_writer(engine, lambda write: endpoints.enable(write, one, at(200)))
    return one


def test_only_what_is_missing_or_all(engine, halfway):
    before = ids(engine)
    assert count(engine, halfway, span(only_missing=False)) == 7
    assert count(engine, halfway, span()) == 3
    assert replay(engine, halfway, span()) == 3
    assert sorted(order(drain(engine, NOW))) == [(1, 3), (2, 3), (3, 1)]
    assert count(engine, halfway, span()) == 0
    assert replay(engine, halfway, span(only_missing=False), at(2000)) == 7
    assert len(drain(engine, at(2000))) == 7
    assert before.items() <= ids(engine).items()


def test_an_event_keeps_its_webhook_id(engine):
    one = subscribe(engine)
    record(engine, github(Q), github(P))
    first = drain(engine, at(1))
    for again in range(3):
        replay(engine, one, span(only_missing=False), at(1000 + again))
        assert drain(engine, at(1000 + again)) == first
    assert len(rows(engine)) == 2
    tries = rows(engine, models.delivery_attempts)
    assert [tried["number"] for tried in tries] == [1] * 8


@pytest.mark.parametrize("only_missing", [True, False])
@pytest.mark.parametrize("bounds", [(0, 1000), (2, 102), (101, 103), (500, 600)])
def test_a_dry_run_counts_what_the_replay_then_sends(engine, halfway, bounds, only_missing):
    wanted = span(*bounds, only_missing)
    expected = count(engine, halfway, wanted)
    unsent = [row for row in rows(engine) if row["state"] == "pending"]
    assert unsent == []  # counting made nothing due
    assert replay(engine, halfway, wanted) == expected
    assert len(drain(engine, NOW)) == expected


def test_the_range_begins_with_since_and_ends_before_until(engine, halfway):
    assert replay(engine, halfway, span(101, 103)) == 2
    assert sorted(order(drain(engine, NOW))) == [(1, 3), (2, 3)]


def test_a_builds_messages_are_replayed_in_their_order(engine):
    one = subscribe(engine)
    for state in (Q, P, C):
        record(engine, *[github(state, run=run) for run in (1, 2)])
    assert len(drain(engine, at(1))) == 6
    replay(engine, one, span(only_missing=False))
    tried = order(drain(engine, NOW))
    for run in (1, 2):
        assert [sequence for its, sequence in tried if its == run] == [1, 2, 3]


def test_older_messages_made_later_still_come_first(engine):
    """Made by the replay, the first of a build have larger row ids than the last ones."""
    record(engine, github(Q), github(P))
    one = subscribe(engine)
    record(engine, github(C), now=at(1))
    replay(engine, one, span())
    assert order(drain(engine, NOW)) == [(1, 1), (1, 2), (1, 3)]


def test_filters_hold_as_they_are_now(engine):
    one = subscribe(engine, events=["build.completed"], branches=["main"])
    record(engine, github(C, run=1), github(C, run=2, branch="dev"), github(Q, run=3))
    assert len(drain(engine, at(1))) == 1
    assert count(engine, one, span(only_missing=False)) == 1
    wider = {"events": [], "branches": ["dev"]}
    db.as_writer(engine, lambda write: subscribers.change(write, one, wider, (), at(2)))
    assert replay(engine, one, span(only_missing=False)) == 1
    assert order(drain(engine, NOW)) == [(2, 1)]


def test_results_that_changed_are_replayed_as_they_were(engine):
    """They are noted while somebody wants to know them."""
    subscribe(engine, changes=["fixed"])
    record(engine, github(C, run=1), now=at(1))
    record(engine, github(State.FAILED, run=2), now=at(2))
    record(engine, github(State.FAILED, run=3), now=at(3))
    one = subscribe(engine, changes=["broke"])
    assert replay(engine, one, span()) == 1
    (message,) = [message for message in claim(engine, NOW) if message.subscriber == one]
    assert (message.data["number"], message.change) == (2, "broke")


def test_a_test_message_is_not_replayed(engine):
    one = subscribe(engine)
    db.as_writer(engine, lambda write: endpoints.plan_test(write, one, at(1)))
    assert len(drain(engine, at(2))) == 1
    assert count(engine, one, span(only_missing=False)) == 0


def test_what_waits_already_is_neither_counted_nor_doubled(engine):
    one = subscribe(engine)
    record(engine, github(Q))
    assert count(engine, one, span(only_missing=False)) == 0
    assert replay(engine, one, span(only_missing=False)) == 0
    assert len(rows(engine)) == 1


def test_disabled_enabled_and_replayed_everything_comes_in_order(engine):
    one = subscribe(engine, events=["build.*"])
    record(engine, *[github(Q, run=run) for run in (1, 2, 3)])
    record(engine, *[github(P, run=run) for run in (1, 2, 3)], now=at(1))
    (first, *others) = claim(engine, at(2))
    settle(engine, went(first, 410), *map(went, others), now=at(2))
    record(engine, *[github(C, run=run) for run in (1, 2, 3)], now=at(3))
    assert claim(engine, at(99)) == []
    db.as_writer(engine, lambda write: endpoints.enable(write, one, at(100)))
    assert replay(engine, one, span()) == 7
    got = [(message.data["number"], message.data["sequence"]) for message in others]
    got += order(drain(engine, NOW))
    for run in (1, 2, 3):
        assert [sequence for its, sequence in got if its == run] == [1, 2, 3]
    assert {row["state"] for row in rows(engine)} == {"delivered"}


@pytest.fixture
def small_portions(monkeypatch):
    monkeypatch.setattr(replays, "PORTION", 3)


def test_portions_are_seamless(engine, small_portions):
    record(engine, *[github(Q, run=run) for run in range(1, 10)])
    one = subscribe(engine)
    assert count(engine, one, span()) == 9
    assert replay(engine, one, span()) == 9
    assert sorted(order(drain(engine, NOW))) == [(run, 1) for run in range(1, 10)]


def test_killed_half_way_it_goes_on_where_it_was(engine, small_portions, monkeypatch):
    record(engine, *[github(Q, run=run) for run in range(1, 9)])
    one = subscribe(engine)
    started = replays.replay(engine, row_of(engine, one), span(), NOW)
    assert (started.count, started.left, len(rows(engine))) == (8, True, 3)
    plan_for = deliveries.plan_for

    def die_after_writing(*arguments):
        plan_for(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(deliveries, "plan_for", die_after_writing)
        with pytest.raises(KeyboardInterrupt):
            replays.advance(engine, NOW)
    assert len(rows(engine)) == 3
    first = drain(engine, NOW)
    assert [replays.advance(engine, NOW) for _ in range(3)] == [3, 2, None]
    assert sorted(order(first + drain(engine, NOW))) == [(run, 1) for run in range(1, 9)]
    assert len(rows(engine)) == 8


def test_several_jobs_at_once_do_each_portion_once(engine, small_portions):
    record(engine, *[github(Q, run=run) for run in range(1, 40)])
    one = subscribe(engine)
    assert replays.replay(engine, row_of(engine, one), span(), NOW).count == 39
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(lambda _: replays.advance(engine, NOW), range(20)))
    assert sum(filter(None, done)) == 36
    assert len(rows(engine)) == 39


def test_it_ends_when_its_subscriber_is_disabled_or_removed(engine, small_portions):
    record(engine, *[github(Q, run=run) for run in range(1, 9)])
    one, two = subscribe(engine), subscribe(engine)
    for id_ in (one, two):
        assert replays.replay(engine, row_of(engine, id_), span(), NOW).left
    db.as_writer(engine, lambda write: endpoints.disable(write, one, "in this test", NOW))
    subscribers.remove(engine, two, NOW)
    assert [replays.advance(engine, NOW) for _ in range(2)] == [0, None]
    assert {row["state"] for row in rows(engine)} == {"dead"}


@pytest.fixture
def backlog(engine, monkeypatch):
    """A subscriber that is disabled with eight pending messages, in portions of three."""
    monkeypatch.setattr(endpoints, "PORTION", 3)
    monkeypatch.setattr(subscribers, "REMOVED_AT_ONCE", 3)
    one = subscribe(engine)
    record(engine, *[github(Q, run=run) for run in range(1, 9)])
    db.as_writer(engine, lambda write: endpoints.disable(write, one, "in this test", NOW))
    return one


def test_what_a_disabled_subscriber_leaves_is_buried_in_portions(engine, backlog):
    assert Counter(row["state"] for row in rows(engine)) == {"dead": 3, "pending": 5}
    assert not claim(engine, NOW)
    assert [replays.advance(engine, NOW) for _ in range(3)] == [0, 0, None]
    assert {(row["state"], row["reason"]) for row in rows(engine)} == {("dead", "subscriber_disabled")}


def test_a_burial_ends_when_the_subscriber_is_enabled(engine, backlog):
    db.as_writer(engine, lambda write: endpoints.enable(write, backlog, NOW))
    assert [replays.advance(engine, NOW) for _ in range(2)] == [0, None]
    assert len(drain(engine, NOW)) == 5


def test_a_removal_killed_half_way_is_repeated(engine, backlog, monkeypatch):
    commits = []
    event.listen(engine, "commit", commits.append)
    with monkeypatch.context() as patched:
        patched.setattr(subscribers, "_remove_row", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            subscribers.remove(engine, backlog, NOW)
    assert (rows(engine), len(commits)) == ([], 5)
    assert row_of(engine, backlog)["state"] == "disabled"
    assert subscribers.remove(engine, backlog, NOW)
    assert rows(engine, models.subscribers) == []
    assert not subscribers.remove(engine, backlog, NOW)


def test_the_count_agrees_with_what_is_sent_whatever_the_filters(engine):
    record(
        engine, github(Q, run=1), github(C, run=1), github(State.FAILED, run=2, branch="dev"),
        github(Q, run=3, repository="Other/Repo"), github(Q, run=4, branch=None),
    )  # fmt: skip
    for wanted, expected in (
        ({}, 5), ({"sources": ["git*"]}, 5), ({"repositories": ["octo/*"]}, 4), ({"branches": ["main"]}, 3),
        ({"states": ["failed"]}, 1), ({"conclusions": ["success"]}, 1), ({"events": ["build.queued"]}, 3),
        ({"events": ["build.queued"], "branches": ["m*"], "repositories": ["octo/repo"]}, 1),
    ):  # fmt: skip
        one = subscribe(engine, **wanted)
        assert (count(engine, one, span()), replay(engine, one, span())) == (expected, expected), wanted


def test_the_job_goes_on_until_nothing_is_left_and_rings(engine, redis_client, small_portions):
    record(engine, *[github(Q, run=run) for run in range(1, 9)])
    one = subscribe(engine)
    held = Resources(settings.load({}), engine, redis_client, None)
    assert replays.replay(engine, row_of(engine, one), span(), NOW).left
    queues.enqueue_once(redis_client, queues.REPLAY)
    replay_job.replay(held)
    assert (len(rows(engine)), rows(engine, models.recoveries)) == (8, [])
    assert redis_client.exists(queues.bell_key(queues.DELIVER))
    assert not redis_client.exists(queues.bell_key(queues.REPLAY))


def test_a_job_whose_time_is_up_comes_back(engine, redis_client, small_portions, monkeypatch):
    monkeypatch.setattr(replay_job, "BUSY_SECONDS", 0)
    record(engine, *[github(Q, run=run) for run in range(1, 9)])
    one = subscribe(engine)
    replays.replay(engine, row_of(engine, one), span(), NOW)
    replay_job.replay(Resources(settings.load({}), engine, redis_client, None))
    assert redis_client.exists(queues.bell_key(queues.REPLAY))


# ---- redrive ---------------------------------------------------------------------------------


@pytest.fixture
def graveyard(engine):
    """Two subscribers with two dead messages each: one of a 500, one of a 404."""
    made = [subscribe(engine), subscribe(engine)]
    record(engine, github(Q, run=1), github(Q, run=2))
    for message in claim(engine):
        last = replace(message, number=len(POLICY.schedule) + 1)
        settle(engine, went(last, 500 if message.data["number"] == 1 else 404))
    assert {row["state"] for row in rows(engine)} == {"dead"}
    return made


def redrive(engine, subscriber=None, reason=None):
    return finish(engine, replays.redrive(engine, subscriber, reason, at(90_000)), at(90_000))


def test_dead_letters_are_counted_by_reason(engine, graveyard):
    with db.reading(engine) as connection:
        assert replays.dead_letters(connection) == {"http_500": 2, "http_404": 2}


@pytest.mark.parametrize(
    ("whose", "reason", "found"), [(None, None, 4), (0, None, 2), (None, "http_404", 2), (1, "http_500", 1),
    (None, "timeout", 0)],
)  # fmt: skip
def test_a_redrive_takes_what_was_asked_for(engine, graveyard, whose, reason, found):
    subscriber = None if whose is None else graveyard[whose]
    assert redrive(engine, subscriber, reason) == found
    pending = [row for row in rows(engine) if row["state"] == "pending"]
    assert len(pending) == found
    assert all((row["attempts"], row["reason"], row["settled_at"]) == (0, None, None) for row in pending)
    assert {row["subscriber"] for row in pending} <= ({subscriber} if subscriber else set(graveyard))
    assert len(drain(engine, at(90_000))) == found


def test_a_redriven_message_has_its_id_and_the_whole_schedule_before_it(engine, graveyard):
    before = ids(engine)
    assert redrive(engine) == 4
    for message in claim(engine, at(90_000)):
        assert message.message_id in before.values()
        assert message.number == 1
        settle(engine, went(message, 500), now=at(90_000))
    assert {row["state"] for row in rows(engine)} == {"pending"}


def test_the_dead_of_a_disabled_subscriber_rest_until_it_is_enabled(engine, graveyard):
    one, _ = graveyard
    db.as_writer(engine, lambda write: endpoints.disable(write, one, "in this test", at(80_000)))
    assert redrive(engine) == 2
    assert redrive(engine, one) == 0
    db.as_writer(engine, lambda write: endpoints.enable(write, one, at(85_000)))
    assert redrive(engine, one) == 2


def test_many_are_redriven_in_portions(engine, small_portions):
    subscribe(engine, ordered=False)
    record(engine, *[github(Q, run=run) for run in range(8)])
    table = models.messages
    db.in_transaction(
        engine,
        lambda connection: connection.execute(table.update().values(state="dead", due_at=None, reason="x")),
    )
    assert redrive(engine) == 8
    with db.reading(engine) as connection:
        assert set(connection.execute(select(table.c.state)).scalars()) == {"pending"}
