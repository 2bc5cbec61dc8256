"""Deliveries while everything goes wrong: failing endpoints, killed workers, rotations, replays, on both databases.

What must hold afterwards: every message was delivered or is dead with a reason, each build's
messages came in order, one event never had two ids, and every signature was right.
"""

import os
import random
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import func, select

from tests.facts import NOON, PACE, github
from webhook_app import builds, db, models, queues, replays, subscribers
from webhook_app.lifecycle import State
from webhook_app.simulated.subscriber import Subscriber
from webhook_app.times import utc_now

KEYS = (Fernet.generate_key().decode(),)
STORY = (State.QUEUED, State.IN_PROGRESS, State.COMPLETED)
BUILDS, WORKERS = 60, 3
MOODS = (
    {"status": 200}, {"status": 200}, {"status": 500}, {"status": 503}, {"status": 200, "delay_seconds": 0.05},
    {"hang": True}, {"status": 302}, {"status": 200},
)  # fmt: skip


def worker_environment(store_url, redis_url, directory, schedule):
    return os.environ | {
        "DATABASE_URL": store_url,
        "REDIS_URL": redis_url,
        "BUILDRELAY_DATA_DIR": str(directory),
        "ENCRYPTION_KEYS": KEYS[0],
        "ALLOW_PRIVATE_CALLBACKS": "true",
        "DELIVERY_TIMEOUT": "0.5",
        "DELIVERY_RETRY_SCHEDULE": ",".join(schedule),
        "LOG_LEVEL": "error",
    }


def start_worker(env):
    # no preexec_fn here: forking beside the endpoints' threads may deadlock in it
    return subprocess.Popen([sys.executable, "-m", "jobs.worker", "deliver"], env=env)


class Storm:
    """Workers that are killed, and endpoints whose mood changes, until `calm`."""

    def __init__(self, store_url, redis_url, directory, endpoints):
        self.env = worker_environment(store_url, redis_url, directory, ["0.2"] * 60)
        self.redis = queues.connect(redis_url)
        self.endpoints = endpoints
        self.random = random.Random(7)
        self.calm = threading.Event()
        self.done = threading.Event()
        self.kills = 0
        self.workers = [start_worker(self.env) for _ in range(WORKERS)]
        self.thread = threading.Thread(target=self._rage)
        self.thread.start()

    def _rage(self):
        while not self.done.wait(0.15):
            queues.enqueue_once(self.redis, queues.DELIVER)
            for endpoint in self.endpoints:
                endpoint.behave(**({"status": 200, "delay_seconds": 0.0, "hang": False} | (
                    {} if self.calm.is_set() else self.random.choice(MOODS)
                )))  # fmt: skip
            if not self.calm.is_set() and self.random.random() < 0.25:
                victim = self.random.randrange(WORKERS)
                self.workers[victim].kill()
                self.workers[victim].wait(10)
                self.workers[victim] = start_worker(self.env)
                self.kills += 1

    def stop(self):
        self.done.set()
        self.thread.join(30)
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.wait(15)


@pytest.fixture
def endpoints():
    with Subscriber() as one, Subscriber() as two:
        yield one, two


def subscribe(engine, endpoint, **more):
    wanted = {"url": endpoint.url, "signing": "hmac", **more}
    row, secret = db.as_writer(engine, lambda write: subscribers.create(write, wanted, KEYS, utc_now()))
    endpoint.add_secret(secret)
    return row["id"]


def rotate(engine, subscriber_id, endpoint):
    def unit(write):
        row = subscribers.get(write.connection, subscriber_id)
        return subscribers.rotate_secret(write, row, 3600, KEYS, utc_now())[0]

    endpoint.add_secret(db.as_writer(engine, unit))


def counts(engine):
    with db.reading(engine) as connection:
        rows = connection.execute(
            select(models.messages.c.state, func.count()).group_by(models.messages.c.state)
        )
        return {row[0]: row[1] for row in rows}


def failed_tries(engine):
    reason = models.delivery_attempts.c.reason
    with db.reading(engine) as connection:
        return connection.execute(select(func.count()).where(reason.is_not(None))).scalar()


def test_every_message_arrives_in_order_or_is_dead_with_its_reason(
    engine, store_url, redis_url, redis_client, tmp_path, endpoints, wait_until
):
    ids = [subscribe(engine, endpoint) for endpoint in endpoints]
    storm = Storm(store_url, redis_url, tmp_path, endpoints)
    try:
        for step, state in enumerate(STORY):
            for run in range(BUILDS):
                db.as_writer(
                    engine,
                    lambda write, run=run, state=state: builds.record(
                        write, [github(state, run=run)], utc_now(), PACE
                    ),
                )
            rotate(engine, ids[step % 2], endpoints[step % 2])
        wait_until(lambda: storm.kills >= 6 and failed_tries(engine) > 30, 120)
        row = db.as_writer(engine, lambda write: subscribers.get(write.connection, ids[0]))
        everything = replays.Range(
            NOON - timedelta(days=3650), utc_now() + timedelta(days=1), only_missing=False
        )
        replays.replay(engine, row, everything, utc_now())
        storm.calm.set()
        wait_until(lambda: not counts(engine).get("pending"), 90)
    finally:
        storm.stop()
    expected = BUILDS * len(STORY)
    assert counts(engine) == {"delivered": 2 * expected}
    for endpoint in endpoints:
        report = endpoint.report()
        assert (report["messages"], report["builds"], report["gaps"]) == (expected, BUILDS, 0)
        assert endpoint.faults() == {}
    with db.reading(engine) as connection:
        tries = connection.execute(select(func.count()).select_from(models.delivery_attempts)).scalar()
    failed = failed_tries(engine)
    print(f"{tries} tries, {failed} failed, {storm.kills} workers killed, {expected * 2} messages delivered")


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

            wait_until(all_dead, 60)
        finally:
            worker.terminate()
            worker.wait(15)
        with db.reading(engine) as connection:
            assert set(connection.execute(select(models.messages.c.reason)).scalars()) == {"http_500"}
        assert replays.redrive(engine, None, "http_500", utc_now()).count == 3
        assert counts(engine) == {"pending": 3}
