"""Real processes are killed with messages under way: the last message comes soon, none is lost, order is kept."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import func, select

from tests import hub as hubs
from tests import postgres
from tests.facts import PACE, github
from tests.hub import Callback, own_postgres, running, subscribed, until
from webhook_app import builds, db, migrations, models, queues, subscribers
from webhook_app.lifecycle import State
from webhook_app.simulated.subscriber import Subscriber
from webhook_app.times import utc_now

WITHIN_SECONDS = 60.0
"""A busy machine may take so long; the figures that are printed are to be below 8 s."""
SETTINGS = {"DELIVERY_TIMEOUT": "60"}
"""A message that nobody frees waits for 75 s, which no test does."""
RUNS = 6
AWAY_SECONDS = 8.0
"""Longer than a worker may go without a sign of life."""


@pytest.fixture(params=["sqlite", "postgresql"])
def environment(request):
    """Settings that name a fresh store."""
    if request.param == "sqlite":
        yield SETTINGS
        return
    with postgres.fresh_database(request.getfixturevalue("postgres_url")) as url:
        yield SETTINGS | {"DATABASE_URL": url}


@pytest.fixture
def tell(capsys, request):
    """`tell(seconds, since)`: print a figure that was seen."""

    def say(seconds, since):
        with capsys.disabled():
            print(f"\n  {request.node.name}: the last message came {seconds:.1f} s after {since}")

    return say


def hang_in_the_middle(hub, callback):
    """Script runs whose first messages are under way to an endpoint that does not answer; their build ids."""
    callback.hang = True
    names = [f"run-{number}" for number in range(RUNS)]
    for name in names:
        for event in ("build_started", "build_completed"):
            assert hub.report(name, event).status_code == 202
    until(lambda: callback.open_requests >= RUNS, WITHIN_SECONDS, "requests under way")
    return [f"script:{name}" for name in names]


def wait_for_all(hub, callback, build_ids):
    """Each message of these builds has come, in order."""
    for build_id in build_ids:
        callback.wait_for(hub, build_id, WITHIN_SECONDS)


def test_the_worker_of_up_is_killed(environment, tell):
    with running(environment) as hub, subscribed(hub) as callback:
        builds_ = hang_in_the_middle(hub, callback)
        callback.hang = False
        dead = hub.kill("deliver")
        until(lambda: hub.pid("deliver") not in (None, dead), WITHIN_SECONDS, "another worker")
        back = time.monotonic()
        wait_for_all(hub, callback, builds_)
        tell(time.monotonic() - back, "the worker was started again")


def test_everything_is_killed_and_started_again(environment, tell):
    with ExitStack() as stack:
        hub = stack.enter_context(running(environment))
        callback = stack.enter_context(Callback())
        callback.trust(hub.subscribe(callback.url)["secret"])
        builds_ = hang_in_the_middle(hub, callback)
        everyone = hubs.identified(hubs.family(hub.process.pid))
        hub.process.kill()
        hub.process.wait(WITHIN_SECONDS)
        until(lambda: not hubs.living(everyone), WITHIN_SECONDS, "the end of all it started")
        callback.hang = False
        again = stack.enter_context(running(environment, hub.data_dir))
        back = time.monotonic()
        wait_for_all(again, callback, builds_)
        tell(time.monotonic() - back, "/readyz")


def test_the_embedded_redis_dies(environment, tell):
    """What is under way is noted without it; and a worker that dies meanwhile is missed by nobody."""
    with running(environment) as hub, subscribed(hub) as callback:
        builds_ = hang_in_the_middle(hub, callback)
        callback.hang = False
        hub.kill("deliver")
        dead = hub.kill("redis")
        until(lambda: hub.pid("redis") not in (None, dead), WITHIN_SECONDS, "another Redis")
        back = time.monotonic()
        wait_for_all(hub, callback, builds_)
        tell(time.monotonic() - back, "Redis was started again")


# ---- several workers -------------------------------------------------------------------------

KEY = Fernet.generate_key().decode()


@pytest.fixture
def start_worker_on(redis_url, tmp_path):
    """`with start_worker_on(url, name)`: a process that delivers, with its own data directory as on a machine."""

    @contextmanager
    def start(store_url, name):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        env = hubs.clean_environment(SETTINGS) | {
            "DATABASE_URL": store_url, "REDIS_URL": redis_url, "BUILDRELAY_DATA_DIR": str(directory),
            "ENCRYPTION_KEYS": KEY, "ALLOW_PRIVATE_CALLBACKS": "true",
        }  # fmt: skip
        with subprocess.Popen([sys.executable, "-m", "jobs.worker", "deliver"], env=env) as worker:
            try:
                yield worker
            finally:
                worker.kill()

    return start


@pytest.fixture
def start_worker(store_url, start_worker_on):
    """`with start_worker(name)`: the same on the store of the test."""
    return partial(start_worker_on, store_url)


def record(engine, first, count):
    facts = [
        github(state, run=run) for run in range(first, first + count)
        for state in (State.QUEUED, State.IN_PROGRESS)
    ]  # fmt: skip
    db.as_writer(engine, lambda write: builds.record(write, facts, utc_now(), PACE))


def pending(engine):
    with db.reading(engine) as connection:
        columns = models.messages.c
        return connection.execute(select(columns.id).where(columns.state == "pending")).scalars().all()


@contextmanager
def slow_endpoint(engine):
    with Subscriber() as endpoint:
        wanted = {"url": endpoint.url, "signing": "hmac"}
        _, secret = db.as_writer(engine, lambda write: subscribers.create(write, wanted, (KEY,), utc_now()))
        endpoint.add_secret(secret)
        endpoint.behave(hang=True)
        yield endpoint


def ring(redis_client):
    queues.answer(redis_client, queues.DELIVER)
    queues.enqueue_once(redis_client, queues.DELIVER)


def has_claimed(engine):
    with db.reading(engine) as connection:
        return connection.execute(select(models.workers.c.claimed)).scalars().all()


def test_of_two_workers_on_two_machines_one_is_killed_and_the_other_takes_over(
    engine, redis_client, start_worker, tell
):
    with slow_endpoint(engine) as endpoint, start_worker("one") as one:
        record(engine, 0, RUNS)
        ring(redis_client)
        until(lambda: [len(ids) for ids in has_claimed(engine)] == [RUNS], WITHIN_SECONDS, "claims")
        with start_worker("two"):
            until(lambda: queues.workers(redis_client)[queues.DELIVER] == 2, WITHIN_SECONDS, "two workers")
            endpoint.behave(hang=False)
            one.kill()
            killed = time.monotonic()
            until(lambda: not pending(engine), WITHIN_SECONDS, "the last message")
            tell(time.monotonic() - killed, "the kill")
    assert endpoint.faults() == {}
    for run in range(RUNS):
        assert endpoint.sequences(f"github:Octo:Repo:{run}") == (1, 2)


def test_a_worker_that_was_only_stopped_finds_its_claims_gone_and_goes_on(
    engine, redis_client, start_worker, tell
):
    with slow_endpoint(engine) as endpoint, start_worker("one") as one:
        record(engine, 0, RUNS)
        ring(redis_client)
        until(lambda: [len(ids) for ids in has_claimed(engine)] == [RUNS], WITHIN_SECONDS, "claims")
        os.kill(one.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        with start_worker("two"):
            endpoint.behave(hang=False)
            until(lambda: not pending(engine), WITHIN_SECONDS, "the last message")
            tell(time.monotonic() - stopped, "one worker was stopped and another started")
        os.kill(one.pid, signal.SIGCONT)
        endpoint.close()  # the requests that hung fail now, and put nothing back
        until(lambda: len(failed(engine)) == RUNS, 180.0, "the failures of the one that was stopped")
        assert pending(engine) == []
        until(lambda: not has_claimed(engine), WITHIN_SECONDS, "an end of its claims")
    assert endpoint.faults() == {}


def failed(engine):
    with db.reading(engine) as connection:
        columns = models.delivery_attempts.c
        return connection.execute(select(columns.id).where(columns.reason.is_not(None))).scalars().all()


def test_a_worker_that_lives_keeps_its_messages_however_long_they_take(
    engine, redis_client, start_worker, tell
):
    """Longer than the time after which a worker without a sign of life is dead."""
    with slow_endpoint(engine) as endpoint:
        endpoint.behave(hang=False, delay_seconds=9)
        with start_worker("one"), start_worker("two"):
            record(engine, 0, 1)
            ring(redis_client)
            until(lambda: not pending(engine), WITHIN_SECONDS, "the last message")
    assert endpoint.report()["received"] == 2


def test_a_database_that_was_away_for_long_makes_no_worker_dead(redis_client, redis_url, start_worker_on):
    """None could show life meanwhile: what they have under way is not sent again."""
    with own_postgres() as (url, server):
        engine = db.connect(url)
        migrations.upgrade(engine)
        with slow_endpoint(engine) as endpoint, start_worker_on(url, "one"), start_worker_on(url, "two"):
            until(lambda: queues.workers(redis_client)[queues.DELIVER] == 2, WITHIN_SECONDS, "two workers")
            record(engine, 0, RUNS)
            endpoint.behave(hang=False, delay_seconds=AWAY_SECONDS + 7)
            ring(redis_client)
            until(lambda: has_claimed(engine), WITHIN_SECONDS, "claims")
            engine.dispose()
            server.stop()
            stopped = time.monotonic()
            until(lambda: time.monotonic() > stopped + AWAY_SECONDS, WITHIN_SECONDS, "an outage that lasts")
            server.start()
            until(lambda: attempts(engine) >= RUNS, WITHIN_SECONDS, "the answers")
            assert endpoint.report()["duplicates"] == 0
            assert failed(engine) == []
        engine.dispose()


def attempts(engine):
    with db.reading(engine) as connection:
        return connection.execute(select(func.count()).select_from(models.delivery_attempts)).scalar_one()
