"""A backlog at a real endpoint that is dead, minute by minute of a clock that the test moves."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import func, select

from jobs.deliver import attempt, deliver
from jobs.resources import Resources
from jobs.schedule import Metronome
from tests.facts import NOON, PACE, at, github
from webhook_app import builds, circuit, db, deliveries, endpoints, models, settings, subscribers
from webhook_app.circuit import CLOSED, OPEN
from webhook_app.lifecycle import State
from webhook_app.retries import RetryPolicy
from webhook_app.room import FIRST_IN_FLIGHT, Room
from webhook_app.simulated.subscriber import Subscriber

KEY = Fernet.generate_key().decode()
BUILDS = 150
STORY = (State.QUEUED, State.IN_PROGRESS, State.COMPLETED)


class Workers:
    """Some workers side by side, each with its own room, whose tries are real and whose time is the test's."""

    def __init__(self, held, count):
        self.held = held
        self.rooms = [Room() for _ in range(count)]
        self.policy = RetryPolicy(held.settings.delivery_retry_schedule, lambda: 0.5)
        self.now = NOON
        self.turns = 0
        self.tries = Counter()

    def run_until(self, end, is_done=lambda _engine: False):
        """Turn after turn; where nothing is to be done the clock goes on to when something is."""
        while self.now < end and not is_done(self.held.engine):
            self.turns += 1
            went = [self._turn(room) for room in self.rooms]
            self.now += timedelta(seconds=0.02)
            if not any(went):
                with db.reading(self.held.engine) as connection:
                    self.now = max(self.now, deliveries.next_due(connection) or end)

    def _turn(self, room):
        claimed = db.in_transaction(
            self.held.engine, lambda connection: deliveries.claim(connection, self.now, room, 15)
        )
        rows = [claimed.subscribers[message.subscriber] for message in claimed.messages]
        for row in rows:
            room.began(row)
        sent = self.held.threads.map(
            lambda message, row: attempt(self.held, message, row), claimed.messages, rows
        )
        tried = [replace(one, started_at=self.now) for one in sent]
        for one, row in zip(tried, rows, strict=True):
            room.ended(row, one.reason is None)
        self.tries[int((self.now - NOON).total_seconds())] += len(tried)
        db.in_transaction(self.held.engine, lambda connection: self._settle(connection, tried))
        return len(tried)

    def _settle(self, connection, tried):
        deliveries.settle(connection, tried, self.now, self.policy)
        endpoints.note(connection, tried, self.now)


@pytest.fixture
def held(engine, redis_client):
    """What a worker works with, on either database."""
    with ThreadPoolExecutor(16) as threads:
        values = settings.load({"ENCRYPTION_KEYS": KEY, "ALLOW_PRIVATE_CALLBACKS": "true"})
        yield Resources(values, engine, redis_client, threads)


def backlog(held, endpoint, **more):
    """A subscriber with all states of all builds to be sent; its id."""
    wanted = {"url": endpoint.url, "signing": "hmac", **more}
    row, secret = db.as_writer(held.engine, lambda write: subscribers.create(write, wanted, (KEY,), NOON))
    endpoint.add_secret(secret)
    facts = [github(state, run=run) for run in range(BUILDS) for state in STORY]
    db.as_writer(held.engine, lambda write: builds.record(write, facts, NOON, PACE))
    return row["id"]


def counts(engine):
    columns = models.messages.c
    with db.reading(engine) as connection:
        found = connection.execute(select(columns.state, func.count()).group_by(columns.state))
        return {row[0]: row[1] for row in found}


def is_delivered(engine):
    return counts(engine) == {"delivered": BUILDS * len(STORY)}


def between(workers, first, last):
    """Tries that began in these seconds; the last one is not included."""
    return sum(count for second, count in workers.tries.items() if first <= second < last)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("answer", [{"status": 500}, None])
def test_a_dead_endpoint_gets_few_tries_and_all_it_missed_once_it_is_back(held, ordered, answer):
    with Subscriber() as endpoint:
        backlog(held, endpoint, ordered=ordered)
        workers = Workers(held, 2)
        if answer is None:  # nobody listens there
            port = int(endpoint.url.rpartition(":")[2].partition("/")[0])
            endpoint.close()
        else:
            endpoint.behave(**answer)
        workers.run_until(at(60))
        burst = between(workers, 0, 1)
        assert 5 <= burst <= 2 * FIRST_IN_FLIGHT
        assert between(workers, 1, 60) <= 5, "after 5 s, 10 s and 20 s more, a little more or less"
        workers.run_until(at(3600))
        assert 10 <= between(workers, 60, 3600) <= 20, "one in 5 minutes at last"
        assert max(workers.tries[second] for second in range(60, 3600)) == 1
        assert workers.turns < 3 * sum(workers.tries.values()), "nothing turns in vain meanwhile"
        if answer is None:
            with Subscriber(*endpoint._secrets, port=port) as again:
                assert_all_comes(workers, again, ordered)
        else:
            assert endpoint.report()["received"] == sum(workers.tries.values())
            endpoint.behave(status=200)
            assert_all_comes(workers, endpoint, ordered)


def assert_all_comes(workers, endpoint, ordered):
    back_at = workers.now
    workers.run_until(back_at + timedelta(days=4), is_delivered)
    assert is_delivered(workers.held.engine)
    report = endpoint.report()
    assert (report["messages"], report["builds"], report["gaps"]) == (BUILDS * len(STORY), BUILDS, 0)
    assert not ordered or report["order_violations"] == 0
    with db.reading(workers.held.engine) as connection:
        (row,) = connection.execute(select(models.subscribers)).mappings()
        tries = connection.execute(select(func.max(models.messages.c.attempts))).scalar()
    assert (row["failing_since"], circuit.of(dict(row)).state) == (None, CLOSED)
    assert tries <= 5, "no message lost tries by waiting"


def test_the_job_asks_to_be_woken_for_the_probe_and_not_before(held, redis_client, monkeypatch):
    """Or a backlog that may not go would wake it again and again."""
    monkeypatch.setattr(circuit, "FIRST_WAIT_SECONDS", 300.0)  # longer than the burst takes on any machine
    with Subscriber() as endpoint:
        endpoint.behave(status=500)
        one = backlog(held, endpoint)
        deliver(held)
        with db.reading(held.engine) as connection:
            row = subscribers.get(connection, one)
        assert circuit.of(row).state == OPEN
        assert endpoint.report()["received"] <= FIRST_IN_FLIGHT
    woken = [due for name, due in redis_client.zrange(Metronome.scheduled_jobs_key, 0, -1, withscores=True)
             if name.startswith(b"once-deliver-")]  # fmt: skip
    assert woken == [int(row["probe_at"].timestamp()) + 1]
