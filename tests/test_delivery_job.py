"""The delivery job at work: one that hangs delays nobody, and outlasts the job without being lost."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
from cryptography.fernet import Fernet
from redis import Redis
from sqlalchemy import select, update

from jobs import deliver as job
from jobs.resources import Desk, Resources
from tests.facts import PACE, github
from tests.hub import own_redis
from tests.wire import OK
from webhook_app import builds, db, deliveries, endpoints, models, queues, settings, subscribers
from webhook_app.lifecycle import State
from webhook_app.room import Room
from webhook_app.simulated.subscriber import Subscriber
from webhook_app.times import utc_now

KEY = Fernet.generate_key().decode()


@pytest.fixture
def make_held(engine, redis_client):
    """`make_held(**environment)`: what the job works with, on either database."""
    with ThreadPoolExecutor(32) as threads:

        def make(**more):
            env = {"ENCRYPTION_KEYS": KEY, "ALLOW_PRIVATE_CALLBACKS": "true", **more}
            values = settings.load(env)
            desk = Desk(Room(per_host=values.delivery_host_concurrency))
            return Resources(values, engine, redis_client, threads, desk=desk)

        yield make


@pytest.fixture
def pair():
    with Subscriber() as one, Subscriber() as two:
        yield one, two


def subscribe(held, endpoint, **more):
    wanted = {"url": endpoint.url, "signing": "hmac", **more}
    row, secret = db.as_writer(
        held.engine, lambda write: subscribers.create(write, wanted, (KEY,), utc_now())
    )
    endpoint.add_secret(secret)
    return row["id"]


def record(held, *facts):
    db.as_writer(held.engine, lambda write: builds.record(write, facts, utc_now(), PACE))


def states(held, subscriber):
    with db.reading(held.engine) as connection:
        columns = models.messages.c
        rows = connection.execute(select(columns.state, columns.attempts, columns.claim).where(
            columns.subscriber == subscriber
        ))  # fmt: skip
        return [tuple(row) for row in rows]


def tries(held):
    with db.reading(held.engine) as connection:
        return list(connection.execute(select(models.delivery_attempts.c.reason)).scalars())


def test_while_one_hangs_new_messages_of_others_are_sent(make_held, pair, wait_until):
    held = make_held(DELIVERY_TIMEOUT="60")
    hanging, quick = pair
    hanging.behave(hang=True)
    stuck = subscribe(held, hanging)
    record(held, github(State.QUEUED))
    worker = threading.Thread(target=job.deliver, args=(held,))
    worker.start()
    try:
        wait_until(lambda: [row[1] for row in states(held, stuck)] == [1])
        good = subscribe(held, quick)
        for run in range(2, 5):
            record(held, github(State.QUEUED, run=run))
            queues.enqueue_once(held.redis, queues.DELIVER)
            wait_until(lambda run=run: len(quick.sequences(f"github:Octo:Repo:{run}")) == 1)
        wait_until(lambda: {row[0] for row in states(held, good)} == {"delivered"})
        assert {row[0] for row in states(held, stuck)} == {"pending"}
        assert worker.is_alive()
        assert tries(held) == [None] * 3
    finally:
        hanging.close()
        worker.join(60)


def test_what_came_back_is_noted_in_portions(make_held, pair, monkeypatch, wait_until):
    """All ten answers are there before the first is noted, and other writers come between the portions."""
    held, settled = make_held(), []
    settle = deliveries.settle

    def note(connection, tries, *more):
        settled.append(len(tries))
        settle(connection, tries, *more)

    def collect(drain):
        wait_until(lambda: held.desk.results.qsize() == held.desk.room.subscribers.total())
        return drain._take()

    monkeypatch.setattr(job, "MOST_TRIES", 3)
    monkeypatch.setattr(deliveries, "settle", note)
    monkeypatch.setattr(job._Drain, "_collect", collect)
    good = subscribe(held, pair[0])
    record(held, *[github(State.QUEUED, run=run) for run in range(10)])
    job.deliver(held)
    assert [number for number in settled if number] == [3, 3, 3, 1]
    assert {row[0] for row in states(held, good)} == {"delivered"}


def test_a_commit_that_was_not_confirmed_is_not_done_twice(make_held, pair, monkeypatch):
    """The connection is lost in the commit: stored all the same, the unit is repeated."""
    held = make_held()
    subscriber = subscribe(held, pair[0])
    record(held, *[github(State.QUEUED, run=run) for run in range(1, 4)])
    in_transaction, lost = db.in_transaction, []

    def twice(engine, unit, **more):
        if unit.__qualname__.startswith("_Drain._turn") and len(lost) < 4:
            lost.append(in_transaction(engine, unit, **more))
        return in_transaction(engine, unit, **more)

    monkeypatch.setattr(db, "in_transaction", twice)
    job.deliver(held)
    assert len(lost) > 1
    assert [row[0] for row in states(held, subscriber)] == ["delivered"] * 3
    assert tries(held) == [None] * 3
    assert pair[0].report()["received"] == 3


def test_what_follows_from_a_try_may_fail_and_what_was_claimed_is_sent(make_held, pair, monkeypatch):
    held = make_held()
    good = subscribe(held, pair[0])
    record(held, github(State.QUEUED, run=1))

    def away(*_):
        raise db.StoreUnavailable("away")

    monkeypatch.setattr(endpoints, "carry_out", away)
    monkeypatch.setattr(endpoints, "note", lambda *_: [endpoints.Sentence(good, "warn", 50)])
    job.deliver(held)
    assert [row[0] for row in states(held, good)] == ["delivered"]


def test_how_tries_went_is_noted_when_the_store_is_back(make_held, pair, monkeypatch):
    """It was away when the answers came: nothing is sent again, nor waits for its lease."""
    held = make_held()
    endpoint, _ = pair
    subscriber = subscribe(held, endpoint)
    record(held, github(State.QUEUED))
    settle = deliveries.settle

    def away(connection, tried, *more):
        if tried:
            raise db.StoreUnavailable("away")
        settle(connection, tried, *more)

    with monkeypatch.context() as patch:
        patch.setattr(deliveries, "settle", away)
        with pytest.raises(db.StoreUnavailable):
            job.deliver(held)
    assert [row[0] for row in states(held, subscriber)] == ["pending"]
    job.deliver(held)
    assert [row[0] for row in states(held, subscriber)] == ["delivered"]
    assert tries(held) == [None]
    assert held.desk.unsettled == []


def test_what_falls_due_meanwhile_is_sent_without_a_bell(make_held, pair, wait_until):
    held = make_held(DELIVERY_TIMEOUT="60", DELIVERY_RETRY_SCHEDULE="0.3")
    hanging, failing = pair
    hanging.behave(hang=True)
    failing.behave(fail_first=1)
    subscribe(held, hanging)
    other = subscribe(held, failing)
    record(held, github(State.QUEUED))
    worker = threading.Thread(target=job.deliver, args=(held,))
    worker.start()
    try:
        wait_until(lambda: states(held, other) == [("delivered", 2, None)])
        assert worker.is_alive()
    finally:
        hanging.close()
        worker.join(60)


def test_a_try_that_outlasts_its_job_is_settled_by_itself(make_held, pair, wait_until, monkeypatch):
    monkeypatch.setattr(job, "LONGEST_DRAIN_SECONDS", 0.1)
    held = make_held(DELIVERY_TIMEOUT="60")
    hanging, quick = pair
    hanging.behave(hang=True)
    stuck, good = subscribe(held, hanging), subscribe(held, quick)
    record(held, github(State.QUEUED))
    job.deliver(held)
    wait_until(lambda: [row[0] for row in states(held, good)] == ["delivered"])
    assert [(state, claim is None) for state, _, claim in states(held, stuck)] == [("pending", False)]
    assert held.redis.get(queues.bell_key(queues.DELIVER))  # another job takes over at once
    held.redis.flushall()
    hanging.close()
    wait_until(lambda: states(held, stuck) == [("pending", 1, None)])
    assert sorted(tries(held), key=str) == [None, "disconnected"]
    wait_until(lambda: held.redis.get(queues.bell_key(queues.DELIVER)))
    assert not held.desk.room.subscribers


def test_the_next_job_takes_over_what_the_last_one_left(make_held, pair, wait_until, monkeypatch):
    monkeypatch.setattr(job, "LONGEST_DRAIN_SECONDS", 0.1)
    held = make_held(DELIVERY_TIMEOUT="4")
    hanging, _ = pair
    hanging.behave(hang=True)
    stuck = subscribe(held, hanging)
    record(held, github(State.QUEUED), github(State.IN_PROGRESS, run=2))
    job.deliver(held)
    assert held.desk.room.subscribers == {stuck: 2}
    monkeypatch.undo()
    job.deliver(held)
    assert tries(held) == ["timeout", "timeout"]
    assert not held.desk.room.subscribers
    assert {row[1] for row in states(held, stuck)} == {1}


class NoRedis:
    """A Redis that must not be asked for anything."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        self.asked.append(name)
        raise AssertionError(f"Redis is asked for {name}")


@pytest.mark.parametrize("closing", [True, False])
def test_who_is_to_end_rings_nobody_whatever_follows_from_a_try(make_held, pair, wait_until, closing):
    held = make_held()
    gone, _ = pair
    gone.behave(status=410)
    id_ = subscribe(held, gone)
    record(held, github(State.QUEUED), github(State.QUEUED, run=2))
    redis = held.redis
    bell = queues.bell_key(queues.REPLAY)
    if closing:
        held = replace(held, redis=NoRedis())
    drain = job._Drain(held)
    claim = drain._turn([])
    held.desk.closing = closing
    for message in claim.messages:
        drain._send(message, claim.subscribers[message.subscriber])
    wait_until(lambda: not held.desk.room.subscribers)  # each try has settled itself
    wait_until(lambda: subscribed(held, id_)["state"] == "disabled")
    if closing:
        assert held.redis.asked == []
        assert not redis.exists(bell)
    else:
        wait_until(lambda: redis.exists(bell))


def subscribed(held, id_):
    with db.reading(held.engine) as connection:
        return subscribers.get(connection, id_)


class Meter:
    """How many requests were under way at once, at most."""

    def __init__(self):
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def __enter__(self):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_):
        with self.lock:
            self.now -= 1


def test_a_host_gets_no_more_at_once_than_its_bound_whoever_its_subscribers_are(make_held, monkeypatch):
    held, meter = make_held(DELIVERY_HOST_CONCURRENCY="3"), Meter()
    attempt = job.attempt

    def metered(*arguments):
        with meter:
            return attempt(*arguments)

    monkeypatch.setattr(job, "attempt", metered)
    with Subscriber() as one, Subscriber() as two:  # two ports of one host
        for endpoint in (one, two, one, two):
            endpoint.behave(delay_seconds=0.02)
            subscribe(held, endpoint, ordered=False)
        record(held, *(github(State.QUEUED, run=run) for run in range(10)))
        job.deliver(held)
    assert meter.most == 3
    assert tries(held) == [None] * 40


@pytest.fixture
def start_worker(store_url, redis_url, tmp_path):
    """`with start_worker(**environment)`: the process that delivers; killed at the end if it still runs."""

    @contextmanager
    def start(**more):
        env = os.environ | {
            "DATABASE_URL": store_url, "REDIS_URL": redis_url, "BUILDRELAY_DATA_DIR": str(tmp_path),
            "ENCRYPTION_KEYS": KEY, "ALLOW_PRIVATE_CALLBACKS": "true", **more,
        }  # fmt: skip
        with subprocess.Popen([sys.executable, "-m", "jobs.worker", "deliver"], env=env) as worker:
            try:
                yield worker
            finally:
                worker.kill()

    return start


def test_a_worker_told_to_stop_begins_nothing_new_and_notes_what_it_began(
    make_held, start_worker, wait_until
):
    held = make_held()
    with Subscriber() as slow:
        slow.behave(delay_seconds=1)
        one = subscribe(held, slow, ordered=False)
        record(held, *(github(State.QUEUED, run=run) for run in range(400)))
        queues.enqueue_once(held.redis, queues.DELIVER)
        with start_worker(STOP_GRACE_SECONDS="60") as worker:
            wait_until(lambda: slow.report()["received"] > 20)
            worker.terminate()
            assert worker.wait(60) == 0
        received = slow.report()["received"]
    assert 20 < received < 400
    assert tries(held) == [None] * received
    assert sorted(set(states(held, one))) == [("delivered", 1, None), ("pending", 0, None)]


def test_a_second_stop_signal_changes_nothing(make_held, start_worker, serve, wait_until):
    """RQ would take one that comes a second after the first as the wish to kill the job."""
    released = threading.Event()

    def answer_later(connection):
        connection.read_request()
        released.wait(60)
        connection.say(OK)

    held, server = make_held(), serve(answer_later)
    wanted = {"url": server.url, "signing": "hmac"}
    row, _ = db.as_writer(held.engine, lambda write: subscribers.create(write, wanted, (KEY,), utc_now()))
    record(held, github(State.QUEUED))
    queues.enqueue_once(held.redis, queues.DELIVER)
    with start_worker(STOP_GRACE_SECONDS="120", DELIVERY_TIMEOUT="60") as worker:
        wait_until(lambda: server.asked)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            worker.send_signal(number)
            sent = time.monotonic()
            wait_until(lambda sent=sent: time.monotonic() - sent > 1.1)
        released.set()
        assert worker.wait(60) == 0
    assert len(server.asked) == 1
    assert states(held, row["id"]) == [("delivered", 1, None)]
    assert tries(held) == [None]


def test_a_redis_that_hangs_keeps_no_try_from_being_noted_at_the_end(
    make_held, start_worker, serve, wait_until
):
    released = threading.Event()

    def answer_later(connection):
        connection.read_request()
        released.wait(60)
        connection.say(OK)

    held, server = make_held(), serve(answer_later)
    wanted = {"url": server.url, "signing": "hmac"}
    db.as_writer(held.engine, lambda write: subscribers.create(write, wanted, (KEY,), utc_now()))
    record(held, github(State.QUEUED))
    with own_redis() as (url, redis_server), Redis.from_url(url) as redis:
        queues.enqueue_once(redis, queues.DELIVER)
        patient = f"{url}?socket_timeout=600"
        with start_worker(REDIS_URL=patient, STOP_GRACE_SECONDS="300", DELIVERY_TIMEOUT="60") as worker:
            wait_until(lambda: server.asked)
            redis_server.signal(signal.SIGSTOP)
            stopped = time.monotonic()
            wait_until(
                lambda: time.monotonic() - stopped > 50 * job.LISTEN_SECONDS
            )  # now the job waits for it
            worker.terminate()
            released.set()
            wait_until(lambda: tries(held) == [None])
    assert len(server.asked) == 1


def test_what_is_cut_at_the_end_of_the_grace_is_sent_again_and_counts_as_no_failure(
    make_held, start_worker, pair, wait_until
):
    held = make_held()
    hanging, _ = pair
    hanging.behave(hang=True)
    stuck = subscribe(held, hanging)
    record(held, github(State.QUEUED))
    queues.enqueue_once(held.redis, queues.DELIVER)
    with start_worker(STOP_GRACE_SECONDS="1", DELIVERY_TIMEOUT="60") as worker:
        wait_until(lambda: [row[1] for row in states(held, stuck)] == [1])
        worker.terminate()
        assert worker.wait(30) == 0  # long before the deadline of the try
    assert tries(held) == []
    assert [(state, claim is None) for state, _, claim in states(held, stuck)] == [("pending", False)]
    with db.reading(held.engine) as connection:
        row = subscribers.get(connection, stuck)
    assert (row["failing_since"], row["failures"]) == (None, 0)
    hanging.behave(hang=False)
    with held.engine.begin() as connection:  # the lease has run out
        connection.execute(update(models.messages).values(due_at=utc_now()))
    job.deliver(held)
    assert [state for state, _, _ in states(held, stuck)] == ["delivered"]


def test_a_subscriber_that_is_removed_meanwhile_costs_the_others_nothing(make_held, pair, wait_until):
    held = make_held(DELIVERY_TIMEOUT="0.8")
    hanging, quick = pair
    hanging.behave(hang=True)
    leaving = subscribe(held, hanging)
    record(held, github(State.QUEUED))
    worker = threading.Thread(target=job.deliver, args=(held,))
    worker.start()
    try:
        wait_until(lambda: [row[1] for row in states(held, leaving)] == [1])
        subscribers.remove(held.engine, leaving, utc_now())
        staying = subscribe(held, quick)
        record(held, github(State.QUEUED, run=2))
        worker.join(60)
        job.deliver(held)
    finally:
        hanging.close()
        worker.join(60)
    assert states(held, staying) == [("delivered", 1, None)]
    assert not held.desk.room.subscribers


def test_each_attempt_is_a_line_of_the_log_with_the_ids_that_join_it(make_held, pair, caplog):
    caplog.set_level(logging.INFO)
    held = make_held()
    good, bad = pair
    bad.behave(status=500)
    ids = [subscribe(held, good), subscribe(held, bad)]
    record(held, github(State.QUEUED))
    job.deliver(held)
    with db.reading(held.engine) as connection:
        messages = connection.execute(select(models.messages)).mappings().all()
    lines = {
        one.fields["subscriber_id"]: one.fields for one in caplog.records if one.msg == "delivery_attempt"
    }
    assert {row["subscriber"]: row["message_id"] for row in messages} == {
        id_: line["message_id"] for id_, line in lines.items()
    }
    for id_, status, reason in zip(ids, (204, 500), (None, "http_500"), strict=True):
        line = lines[id_]
        assert line["status"] == status or (status == 204 and 200 <= line["status"] < 300)
        assert (line["reason"], line["attempt"], line["type"]) == (reason, 1, "build.queued")
        assert (line["build_id"], line["event_id"]) == ("github:Octo:Repo:1", messages[0]["event"])
        assert line["duration_ms"] >= 0


def test_an_old_key_taken_away_too_early_loses_nothing_and_heals(make_held, pair, caplog):
    endpoint, _ = pair
    held = make_held()
    subscriber = subscribe(held, endpoint)
    record(held, github(State.QUEUED))
    job.deliver(make_held(ENCRYPTION_KEYS=Fernet.generate_key().decode()))
    assert states(held, subscriber) == [("pending", 0, None)]
    assert (
        f"nothing can be sent to {subscriber}: a stored secret opens with none of the 1 keys" in caplog.text
    )
    assert "Traceback" not in caplog.text
    with held.engine.begin() as connection:  # a minute later
        connection.execute(update(models.messages).values(due_at=utc_now()))
        connection.execute(update(models.subscribers).values(slow_until=None))
    job.deliver(held)
    assert states(held, subscriber) == [("delivered", 1, None)]
