"""Deliveries while everything goes wrong, on both databases: endpoints that fail, hang, are gone or never recover,
workers killed with SIGKILL, secrets rotated and received late, replays, all by chance and at once.

What must hold afterwards: every message was delivered or is dead with a reason, and comes when it is asked for
again; each build's messages came in order; one event never had two ids; and every signature was right.
"""

import os
import random
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import event, func, insert, select

from tests.facts import NOON, PACE, github
from webhook_app import builds, circuit, db, deliveries, endpoints, models, queues, replays, subscribers
from webhook_app.deliveries import Tried
from webhook_app.lifecycle import State
from webhook_app.replays import Range
from webhook_app.retries import RetryPolicy
from webhook_app.room import Room
from webhook_app.simulated.subscriber import Behaviour, Subscriber
from webhook_app.times import utc_now

KEYS = (Fernet.generate_key().decode(),)
STORY = (State.QUEUED, State.IN_PROGRESS, State.COMPLETED)
BUILDS, WORKERS, CROWD = 40, 3, 6
EVENTS = BUILDS * len(STORY)
DEAD_END = 4
"""So many builds are on a branch whose subscriber never recovers."""
TIMEOUT_SECONDS = 0.5
MOODS = (
    {"status": 500},
    {"status": 503},
    {"status": 200, "delay_seconds": 0.05},
    {"hang": True},
    {"status": 302},
)
MOOD_SECONDS = 0.15
"""A bad mood is followed by a good one: no message may meet as many bad ones in a row as it has tries."""
CALM = {"status": 200, "delay_seconds": 0.0, "hang": False}


def worker_environment(store_url, redis_url, directory, schedule):
    return os.environ | {
        "DATABASE_URL": store_url,
        "REDIS_URL": redis_url,
        "BUILDRELAY_DATA_DIR": str(directory),
        "ENCRYPTION_KEYS": KEYS[0],
        "ALLOW_PRIVATE_CALLBACKS": "true",
        "DELIVERY_TIMEOUT": str(TIMEOUT_SECONDS),
        "DELIVERY_RETRY_SCHEDULE": ",".join(schedule),
        "LOG_LEVEL": "error",
    }


PROBE_SECONDS = 0.02, 0.05
"""The first and the longest wait of an open circuit: with those of real life a storm would last for days."""
WORKER = f"""
from jobs import worker
from webhook_app import circuit
circuit.FIRST_WAIT_SECONDS, circuit.LONGEST_WAIT_SECONDS = {PROBE_SECONDS}
worker.main()
"""


def start_worker(env):
    # no preexec_fn here: forking beside the endpoints' threads may deadlock in it
    return subprocess.Popen([sys.executable, "-c", WORKER, "deliver", "replay"], env=env)


@dataclass
class Party:
    """A subscriber and its endpoint.  `rotations`: secrets made but not yet known to it, and when they were made."""

    id: str
    endpoint: Subscriber
    secret: str
    rotations: list[tuple[str, datetime]] = field(default_factory=list)


def subscribe(engine, endpoint, **more):
    wanted = {"url": endpoint.url, "signing": "hmac", "events": ["build.*"], **more}
    row, secret = db.as_writer(engine, lambda write: subscribers.create(write, wanted, KEYS, utc_now()))
    endpoint.add_secret(secret)
    return Party(row["id"], endpoint, secret)


def row_of(engine, party):
    with db.reading(engine) as connection:
        return subscribers.get(connection, party.id)


def counts(engine, party=None):
    states = select(models.messages.c.state, func.count()).group_by(models.messages.c.state)
    if party is not None:
        states = states.where(models.messages.c.subscriber == party.id)
    with db.reading(engine) as connection:
        return {row[0]: row[1] for row in connection.execute(states)}


def tries(engine, *conditions):
    statement = select(func.count()).select_from(models.delivery_attempts).where(*conditions)
    with db.reading(engine) as connection:
        return connection.execute(statement).scalar()


def rotate(engine, party):
    """The old secret is good for an hour; the endpoint hears of the new one later."""

    def unit(write):
        row = subscribers.get(write.connection, party.id)
        return subscribers.rotate_secret(write, row, 3600, KEYS, utc_now())[0]

    party.rotations.append((db.as_writer(engine, unit), utc_now()))


def adopt(engine, party):
    """The endpoint changes over to a new secret, once nothing claimed before is under way.

    It forgets the old one for what is signed from now on: a try that its sender gave up may still lie unread.
    """
    secret, made_at = party.rotations[0]
    lease = timedelta(seconds=TIMEOUT_SECONDS + deliveries.LEASE_MARGIN_SECONDS)
    columns = models.messages.c
    older = select(func.count()).where(
        columns.subscriber == party.id, columns.claim.is_not(None), columns.due_at <= made_at + lease
    )
    with db.reading(engine) as connection:
        if connection.execute(older).scalar():
            return
    party.endpoint.add_secret(secret)
    party.endpoint.remove_secret(party.secret, signed_after=utc_now().timestamp())
    party.secret = secret
    del party.rotations[0]


def replay_by_job(engine, party, only_missing=False):
    """As a large replay leaves it: all of it for the workers."""
    task = {
        "kind": "replay", "subscriber": party.id, "since": NOON - timedelta(days=3650), "until": utc_now(),
        "only_missing": only_missing, "after": 0, "last": EVENTS * 2, "created_at": utc_now(),
    }  # fmt: skip
    db.in_transaction(engine, lambda connection: connection.execute(insert(models.recoveries), task))


class Storm:
    """Workers that are killed, and endpoints whose mood and secrets change, until `calm`."""

    def __init__(self, engine, store_url, redis_url, directory, moody, seed):
        self.engine, self.moody = engine, moody
        self.env = worker_environment(store_url, redis_url, directory, ["0.1"] * 40)
        self.redis = queues.connect(redis_url)
        self.random = random.Random(seed)
        self.calm = threading.Event()
        self.done = threading.Event()
        self.kills = self.rotations = self.adoptions = self.replays = 0
        self.error = None
        self.workers = [start_worker(self.env) for _ in range(WORKERS)]
        self.threads = [threading.Thread(target=target) for target in (self._run, self._feel)]
        for thread in self.threads:
            thread.start()

    def _feel(self):
        """Apart from what waits for the store or a worker's end: a mood must not last as long as that."""
        while not self.done.wait(MOOD_SECONDS):
            for party in self.moody:
                was_well = party.endpoint.behaviour == Behaviour()
                mood = random.choice(MOODS) if was_well and not self.calm.is_set() else {}
                party.endpoint.behave(**CALM | mood)

    def _run(self):
        try:
            while not self.done.wait(MOOD_SECONDS):
                queues.enqueue_once(self.redis, queues.DELIVER)
                queues.enqueue_once(self.redis, queues.REPLAY)
                self._pass()
        except Exception as error:
            self.error = error
            raise

    def _pass(self):
        for party in self.moody:
            if party.rotations:
                before = len(party.rotations)
                adopt(self.engine, party)
                self.adoptions += before - len(party.rotations)
        if self.calm.is_set():
            return
        if self.random.random() < 0.15:
            self._kill(self.random.randrange(WORKERS))
        rotated = self.random.choice(self.moody)
        if self.random.random() < 0.15 and len(rotated.rotations) < subscribers.MOST_OLD_SECRETS:
            rotate(self.engine, rotated)
            self.rotations += 1
        if self.random.random() < 0.05:
            replay_by_job(self.engine, self.random.choice(self.moody))
            self.replays += 1

    def _kill(self, victim):
        self.workers[victim].kill()
        self.workers[victim].wait(60)
        self.workers[victim] = start_worker(self.env)
        self.kills += 1

    def stop(self):
        self.done.set()
        for thread in self.threads:
            thread.join(60)
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.wait(60)
        assert self.error is None


@pytest.fixture
def parties(engine):
    """Two moody subscribers, ordered and not; one that never recovers; one that will be gone for a while."""
    with Subscriber() as one, Subscriber() as two, Subscriber() as three, Subscriber() as four:
        three.behave(status=500)
        yield (
            subscribe(engine, one), subscribe(engine, two, ordered=False),
            subscribe(engine, three, branches=["dead-end"]), subscribe(engine, four),
        )  # fmt: skip


def tell(engine, chance):
    """All states of all builds, those of each build in order, else by chance; yields after each."""
    left = [[run, list(STORY)] for run in range(BUILDS)]
    while left:
        story = chance.choice(left)
        branch = "dead-end" if story[0] < DEAD_END else "main"
        fact = github(story[1].pop(0), run=story[0], branch=branch)
        db.as_writer(engine, lambda write, fact=fact: builds.record(write, [fact], utc_now(), PACE))
        left = [one for one in left if one[1]]
        yield


def test_every_message_arrives_in_order_or_is_dead_with_its_reason(
    engine, store_url, redis_url, redis_client, tmp_path, parties, wait_until
):
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    ordered, unordered, hopeless, gone = parties
    storm = Storm(engine, store_url, redis_url, tmp_path, (ordered, unordered), seed)
    try:
        for step, _ in enumerate(tell(engine, random.Random(seed))):
            if step == EVENTS // 3:
                wait_until(
                    lambda: gone.endpoint.report()["messages"] > 5, 240
                )  # kills with probes in hand cost leases
                gone.endpoint.behave(status=410)
            if step % 10 == 0:
                wait_until(lambda least=step // 20: storm.kills >= least)
        failed = models.delivery_attempts.c.reason.is_not(None)
        wait_until(
            lambda: (
                min(storm.kills, storm.rotations, storm.adoptions * 3, storm.replays * 3) >= 6
                and tries(engine, failed) > 100
            ),
            240,
        )
        wait_until(lambda: row_of(engine, gone)["state"] == "disabled")
        storm.calm.set()
        wait_until(lambda: not counts(engine).get("pending"), 240)
        assert_all_settled(engine, parties)
        recover(engine, hopeless, gone)
        wait_until(lambda: not remains(engine), 240)
    finally:
        storm.stop()
    for party in parties:
        events, number = (DEAD_END * len(STORY), DEAD_END) if party is hopeless else (EVENTS, BUILDS)
        assert counts(engine, party) == {"delivered": events}
        report = party.endpoint.report()
        assert (report["messages"], report["builds"], report["gaps"]) == (events, number, 0)
        faults = party.endpoint.faults()
        if party is unordered:
            faults.pop("order_violations", None)
        assert faults == {}
    twice = sum(party.endpoint.report()["duplicates"] for party in parties)
    print(
        f"{tries(engine)} tries, {tries(engine, failed)} failed, {twice} received again, {storm.kills} workers killed, "
        f"{storm.rotations} rotations, {storm.adoptions} received, {storm.replays} replays"
    )


def assert_all_settled(engine, parties):
    ordered, unordered, hopeless, gone = parties
    assert counts(engine, ordered) == counts(engine, unordered) == {"delivered": EVENTS}
    assert counts(engine, hopeless) == {"dead": DEAD_END * len(STORY)}
    columns = models.messages.c
    with db.reading(engine) as connection:
        dead = select(columns.subscriber, columns.reason).where(columns.state == "dead").distinct()
        reasons = {tuple(row) for row in connection.execute(dead)}
    by_chance = {
        (hopeless.id, "disconnected"), (hopeless.id, "timeout"),
        (gone.id, "subscriber_disabled"),  # what waited when it was found gone
    }  # fmt: skip
    assert reasons - by_chance == {(hopeless.id, "http_500"), (gone.id, "http_410")}


def recover(engine, hopeless, gone):
    """Both are well again: redrive what is dead, and replay what was never made."""
    for party in (hopeless, gone):
        party.endpoint.behave(**CALM)
        db.as_writer(engine, lambda write, party=party: endpoints.enable(write, party.id, utc_now()))
    assert replays.redrive(engine, hopeless.id, None, utc_now()).count == DEAD_END * len(STORY)
    replay_by_job(engine, gone, only_missing=True)


def remains(engine):
    with db.reading(engine) as connection:
        under_way = connection.execute(select(func.count()).select_from(models.recoveries)).scalar()
    return under_way or set(counts(engine)) != {"delivered"}


def test_what_never_succeeds_is_dead_with_its_reason(
    engine, store_url, redis_url, redis_client, tmp_path, wait_until
):
    with Subscriber() as endpoint:
        subscribe(engine, endpoint)
        endpoint.behave(status=500)
        worker = start_worker(worker_environment(store_url, redis_url, tmp_path, ["0.1", "0.1"]))
        redis = queues.connect(redis_url)
        try:
            db.as_writer(
                engine,
                lambda write: builds.record(write, [github(state) for state in STORY], utc_now(), PACE),
            )

            def all_dead():
                queues.enqueue_once(redis, queues.DELIVER)
                return counts(engine) == {"dead": 3}

            wait_until(all_dead)
        finally:
            worker.terminate()
            worker.wait(60)
        with db.reading(engine) as connection:
            assert set(connection.execute(select(models.messages.c.reason)).scalars()) == {"http_500"}
        assert replays.redrive(engine, None, "http_500", utc_now()).count == 3
        assert counts(engine) == {"pending": 3}


class Crowd:
    """Workers side by side on one database, which claim, "send" and settle; what they saw that must not be.

    A try fails by chance.  `begun` counts tries per message; `heard` has what each lane received.
    """

    def __init__(self, engine, seed):
        self.engine, self.seed = engine, seed
        self.policy = RetryPolicy([0.01] * 200, lambda: 0.5)
        self.lock, self.done = threading.Lock(), threading.Event()
        self.begun, self.under_way, self.heard = Counter(), Counter(), defaultdict(set)
        self.faults, self.errors = [], []
        event.listen(engine, "handle_error", lambda context: self.errors.append(context.original_exception))
        self.threads = [threading.Thread(target=self._work, args=(number,)) for number in range(CROWD)]
        for thread in self.threads:
            thread.start()

    def _work(self, number):
        chance = random.Random(self.seed + number)
        room, tries = Room(16, per_host=16, first=8), []
        while tries or not self.done.is_set():
            claim = db.in_transaction(self.engine, partial(self._turn, tries, room))
            for message in claim.messages:
                self._begin(message)
            self.done.wait(chance.random() * 0.003)
            tries = [self._end(message, chance.random() < 0.3) for message in claim.messages]

    def _turn(self, tries, room, connection):
        now = utc_now()
        deliveries.settle(connection, tries, now, self.policy)
        endpoints.note(connection, tries, now)
        return deliveries.claim(connection, now, room, 15)

    def _begin(self, message):
        with self.lock:
            self.begun[message.message_id] += 1
            if message.lane is None:
                return
            if self.under_way[message.lane] or self.heard[message.lane] != set(
                range(1, message.data["sequence"])
            ):
                self.faults.append((message, set(self.heard[message.lane])))
            self.under_way[message.lane] += 1

    def _end(self, message, fails):
        with self.lock:
            if message.lane is not None:
                self.under_way[message.lane] -= 1
                if not fails:
                    self.heard[message.lane].add(message.data["sequence"])
        return Tried(message, utc_now(), 0.0, 500 if fails else 200, "http_500" if fails else None, "")

    def stop(self):
        self.done.set()
        for thread in self.threads:
            thread.join(30)


def disable_for_a_moment(engine, party):
    db.as_writer(engine, lambda write: endpoints.disable(write, party.id, "in this test", utc_now()))
    while replays.advance(engine, utc_now()) is not None:
        pass
    db.as_writer(engine, lambda write: endpoints.enable(write, party.id, utc_now()))
    replays.redrive(engine, party.id, None, utc_now())


def test_many_workers_at_once_keep_the_order_and_never_wait_for_each_other(
    postgres_engine, wait_until, monkeypatch
):
    """READ COMMITTED shows each statement another moment; then rows are locked.  Deadlocks would be repeated, slowly."""
    monkeypatch.setattr(circuit, "FIRST_WAIT_SECONDS", PROBE_SECONDS[0])
    monkeypatch.setattr(circuit, "LONGEST_WAIT_SECONDS", PROBE_SECONDS[1])
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    with Subscriber() as endpoint:
        more = ({}, {}, {"rate_limit_per_second": 200}, {"rate_limit_per_second": 200}, {"ordered": False})
        crowded = [subscribe(postgres_engine, endpoint, **each) for each in more]
    crowd = Crowd(postgres_engine, seed)
    try:
        for _ in tell(postgres_engine, random.Random(seed)):
            disable_for_a_moment(postgres_engine, crowded[-1])
        for party in crowded:
            plan_test = partial(endpoints.plan_test, subscriber_id=party.id, now=utc_now())
            db.as_writer(postgres_engine, plan_test)
        number = len(crowded) * (EVENTS + 1)
        wait_until(lambda: counts(postgres_engine) == {"delivered": number}, 240)
        crowd.heard.clear()
        for party in crowded:
            with db.reading(postgres_engine) as connection:
                row = subscribers.get(connection, party.id)
            everything = Range(NOON - timedelta(days=3650), utc_now(), only_missing=False)
            assert replays.replay(postgres_engine, row, everything, utc_now()).count == EVENTS
        wait_until(lambda: counts(postgres_engine) == {"delivered": number}, 240)
    finally:
        crowd.stop()
    assert crowd.faults == crowd.errors == []
    assert len(crowd.begun) == number
    assert tries(postgres_engine) == sum(crowd.begun.values())
