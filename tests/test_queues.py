"""The bell: one job however many rings, and a web process that never waits for Redis."""

import importlib
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from rq import Callback, Queue, Worker
from rq.serializers import JSONSerializer
from rq.webhook import Webhook

from tests.hub import PATIENCE_SECONDS, own_redis, until
from tests.slow_jobs import Pickled
from webhook_app import queues
from webhook_app.queues import DELIVER, POLL, SWEEP, Bell, WakeUp


def waiting(redis, bell):
    """The ids of the jobs that wait in the queue of `bell`."""
    return Queue(bell, connection=redis).job_ids


def begin(redis, bell):
    """What a worker does: take the job off the queue, and begin it."""
    assert redis.lpop(Queue(bell, connection=redis).key)
    queues.answer(redis, bell)


def test_many_rings_queue_one_job_until_it_begins(redis_client):
    bell = Bell(redis_client)
    assert [bell.ring(DELIVER) for _ in range(5)] == [True] * 5
    (first,) = waiting(redis_client, DELIVER)
    begin(redis_client, DELIVER)
    assert bell.ring(DELIVER)
    assert bell.ring(DELIVER)
    (second,) = waiting(redis_client, DELIVER)
    assert first != second


def test_a_job_that_waits_for_long_is_not_joined_by_others(redis_client):
    """The workers are away: rings go on, and each of them is older news than the job that waits."""
    for _ in range(20):
        assert Bell(redis_client).ring(DELIVER)
        redis_client.delete(queues.bell_key(DELIVER))  # it expires after seconds
    assert len(waiting(redis_client, DELIVER)) == 1


def test_a_ring_between_taking_a_job_and_beginning_it_is_kept(redis_client):
    bell = Bell(redis_client)
    bell.ring(DELIVER)
    redis_client.lpop(Queue(DELIVER, connection=redis_client).key)
    bell.ring(DELIVER)  # the job that was taken will see this work: it has yet to begin
    queues.answer(redis_client, DELIVER)
    assert bell.ring(DELIVER)
    assert len(waiting(redis_client, DELIVER)) == 1


def test_only_the_first_ring_tells_that_it_queued(redis_client):
    assert queues.enqueue_once(redis_client, POLL)
    assert not queues.enqueue_once(redis_client, POLL)


def test_each_bell_is_by_itself(redis_client):
    assert Bell(redis_client).ring(*queues.JOBS)
    for bell, name in queues.JOBS.items():
        (job_id,) = waiting(redis_client, bell)
        assert WakeUp.fetch(job_id, connection=redis_client).func_name == name
    before = {bell: waiting(redis_client, bell) for bell in queues.JOBS}
    begin(redis_client, POLL)
    Bell(redis_client).ring(*queues.JOBS)
    after = {bell: waiting(redis_client, bell) for bell in queues.JOBS}
    assert {bell for bell in queues.JOBS if before[bell] != after[bell]} == {POLL}
    assert all(len(jobs) == 1 for jobs in after.values())


def test_a_queued_job_leaves_nothing_behind_but_its_failure(redis_client):
    queues.enqueue_once(redis_client, POLL)
    job = WakeUp.fetch(waiting(redis_client, POLL)[0], connection=redis_client)
    assert (job.result_ttl, job.failure_ttl, job.timeout) == (0, 60, queues.JOB_TIMEOUT_SECONDS)


def test_a_bell_whose_job_was_lost_rings_again_when_its_key_expires(redis_client, wait_until):
    bell = Bell(redis_client)
    bell.ring(DELIVER)
    Queue(DELIVER, connection=redis_client).empty()
    bell.ring(DELIVER)
    assert waiting(redis_client, DELIVER) == []
    assert 0 < redis_client.pttl(queues.bell_key(DELIVER)) <= queues.BELL_TTL_SECONDS * 1000
    redis_client.pexpire(queues.bell_key(DELIVER), 1)
    wait_until(lambda: not redis_client.exists(queues.bell_key(DELIVER)))
    bell.ring(DELIVER)
    assert len(waiting(redis_client, DELIVER)) == 1


@pytest.mark.parametrize(("bell", "name"), queues.JOBS.items())
def test_each_name_is_a_job_that_can_be_called(bell, name):
    module, _, function = name.rpartition(".")
    assert callable(getattr(importlib.import_module(module), function))


# ---- Redis can't be written


@pytest.fixture
def own():
    """A client for the test's own server, and its URL."""
    with own_redis() as (url, _server), Redis.from_url(url) as client:
        yield client, url


def test_a_redis_that_was_demoted_costs_it_all_its_connections(own):
    """The next ones go where the address leads by then."""
    admin, url = own
    with queues.connect(url, connections=2) as client:
        held = [client.connection_pool.get_connection() for _ in range(2)]
        for one in held:
            client.connection_pool.release(one)
        known = {one["id"] for one in admin.client_list()}
        admin.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(RedisConnectionError, match="can't be written"):
            client.set("a", "b")
        assert len(known & {one["id"] for one in admin.client_list()}) == 1  # the one that asks
        admin.execute_command("REPLICAOF", "NO", "ONE")
        assert client.set("a", "b")


def test_who_waits_while_a_redis_is_demoted_and_whole_scripts_hear_of_it_too(own):
    admin, url = own
    with queues.connect(url) as client, ThreadPoolExecutor(1) as pool:
        waiting_ = pool.submit(client.blpop, "nothing", 60)
        until(lambda: admin.info("clients")["blocked_clients"] == 1, PATIENCE_SECONDS, "one who waits")
        admin.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(RedisConnectionError, match="can't be written"):
            waiting_.result(60)
        with pytest.raises(RedisConnectionError, match="can't be written"):
            client.eval("return redis.call('SET', KEYS[1], 1)", 1, "a")
        with pytest.raises(RedisConnectionError, match="can't be written"):
            client.pipeline().set("a", 1).set("b", 2).execute()


def test_other_errors_of_redis_are_told_as_they_are(own):
    admin, url = own
    admin.set("text", "a")
    with queues.connect(url) as client, pytest.raises(ResponseError, match="WRONGTYPE"):
        client.lpush("text", "b")


def test_who_finds_every_connection_in_use_waits_for_one(own):
    _admin, url = own
    with queues.connect(url, 0.3, connections=1) as client:
        one = client.connection_pool.get_connection()
        with pytest.raises(RedisConnectionError):
            client.ping()
        assert not Bell(client).ring(DELIVER)
        client.connection_pool.release(one)
        assert client.ping()


# ---- Redis is away


@pytest.fixture
def clock(monkeypatch):
    """The clock of the bell alone, stepped by hand."""
    hands = SimpleNamespace(at=1000.0)
    monkeypatch.setattr(queues, "time", SimpleNamespace(monotonic=lambda: hands.at))
    return hands


@pytest.fixture
def attempts(monkeypatch):
    """Each attempt to reach Redis through the bell, as the name of what was rung."""
    made = []
    really = queues.enqueue_once
    monkeypatch.setattr(queues, "enqueue_once", lambda redis, bell: made.append(bell) or really(redis, bell))
    return made


def test_an_absent_redis_is_told_without_waiting_and_then_left_alone_for_a_second(
    monkeypatch, tmp_path, clock, attempts
):
    monkeypatch.setattr("redis.retry.sleep", lambda seconds: pytest.fail("waited to try again"))
    bell = Bell(queues.connect(f"unix://{tmp_path}/nobody.sock", timeout_seconds=0.2))
    assert not bell.ring(DELIVER, POLL)
    assert not bell.ring(DELIVER)
    clock.at += queues.DEAF_SECONDS - 0.01
    assert not bell.ring(DELIVER)
    assert attempts == [DELIVER]
    clock.at += 0.02
    assert not bell.ring(DELIVER)
    assert attempts == [DELIVER, DELIVER]


def test_a_redis_that_says_nothing_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        bell = Bell(queues.connect(f"redis://127.0.0.1:{mute.getsockname()[1]}", timeout_seconds=0.2))
        began = time.monotonic()
        assert not bell.ring(DELIVER)
        assert time.monotonic() - began < 30


def test_the_bell_rings_again_once_redis_is_back(redis_client, clock, tmp_path):
    bell = Bell(queues.connect(f"unix://{tmp_path}/nobody.sock", timeout_seconds=0.2))
    assert not bell.ring(DELIVER)
    bell.redis = redis_client
    assert not bell.ring(DELIVER)
    clock.at += queues.DEAF_SECONDS
    assert bell.ring(DELIVER)
    assert len(waiting(redis_client, DELIVER)) == 1


# ---- connecting


@pytest.mark.parametrize("timeout", [None, 0.5])
def test_connecting_to_a_unix_socket(redis_url, timeout):
    with queues.connect(redis_url, timeout) as client:
        assert client.ping()


def options(client: Redis):
    return client.connection_pool.connection_kwargs


def test_a_time_limit_holds_for_connecting_and_for_each_command():
    made = options(queues.connect("redis://example.com", 0.3))
    assert (made["socket_timeout"], made["socket_connect_timeout"]) == (0.3, 0.3)
    assert made["retry"].get_retries() == 0


WORKER = """
from jobs import worker
from webhook_app import queues
queues.JOBS |= {"short": "tests.slow_jobs.short", "long": "tests.slow_jobs.long"}
worker.main()
"""


def enqueue(redis, bell, name):
    """Queue a job of these tests; the worker of `working` takes it for one of ours."""
    queue = Queue(bell, connection=redis, job_class=WakeUp, serializer=JSONSerializer)
    return queue.enqueue(f"tests.slow_jobs.{name}")


@pytest.fixture
def working(redis_client, redis_url, tmp_path, wait_until):
    """`with working(bell, …) as process`: a worker process that serves these bells, and has signed on."""
    path = tmp_path / "store.db"
    env = os.environ | {
        "REDIS_URL": redis_url,
        "DATABASE_URL": f"sqlite:///{path}",
        "BUILDRELAY_DATA_DIR": str(tmp_path),
        "TRACE": str(tmp_path / "trace"),
    }

    @contextmanager
    def start(*bells):
        with subprocess.Popen([sys.executable, "-c", WORKER, *bells], env=env) as process:
            try:
                wait_until(lambda: queues.is_served(redis_client, bells[0]), 30)
                yield process
            finally:
                process.kill()

    return start


@pytest.fixture
def worker(working):
    with working(POLL) as process:
        yield process


def test_a_busy_queue_keeps_no_other_from_its_turn(redis_client, working, wait_until):
    first, second, other = (enqueue(redis_client, bell, "short") for bell in (POLL, POLL, SWEEP))
    with working(POLL, SWEEP):
        wait_until(lambda: all(job.refresh() or job.is_finished for job in (first, second, other)), 30)
    assert first.started_at < other.started_at < second.started_at


def of_an_earlier_version(redis):
    Queue(POLL, connection=redis).enqueue(queues.JOBS[POLL])


def as_pickle(redis):
    Queue(POLL, connection=redis).enqueue("tests.slow_jobs.short", Pickled())


def with_pickled_meta(redis):
    Queue(POLL, connection=redis).enqueue("tests.slow_jobs.short", meta={"a": Pickled()})


def by_another_name(redis):
    Queue(POLL, connection=redis, serializer=JSONSerializer).enqueue("tests.slow_jobs.trace")


def with_arguments(redis):
    Queue(POLL, connection=redis, serializer=JSONSerializer).enqueue("tests.slow_jobs.short", 1)


def with_callbacks(redis):
    call = Callback("tests.slow_jobs.trace")
    queue = Queue(POLL, connection=redis, serializer=JSONSerializer)
    for name in ("tests.slow_jobs.short", "tests.slow_jobs.trace"):
        queue.enqueue(name, on_success=call, on_failure=call, on_stopped=call)


def abandoned_with_a_callback(redis):
    queue = Queue(POLL, connection=redis, serializer=JSONSerializer)
    job = queue.enqueue("tests.slow_jobs.short", on_failure=Callback("tests.slow_jobs.trace"))
    redis.lrem(queue.key, 0, job.id)
    redis.hset(job.key, "status", "started")
    redis.zadd(queue.started_job_registry.key, {f"{job.id}:gone": 1})


@pytest.mark.parametrize(
    "put",
    [
        of_an_earlier_version, as_pickle, with_pickled_meta, by_another_name, with_arguments, with_callbacks,
        abandoned_with_a_callback,
    ],
)  # fmt: skip
def test_what_others_put_into_a_queue_runs_nothing_and_stops_nobody(
    redis_client, working, wait_until, tmp_path, put
):
    put(redis_client)
    after = enqueue(redis_client, POLL, "short")
    with working(POLL):
        wait_until(lambda: after.refresh() or after.is_finished)
    assert not (tmp_path / "trace").exists()
    assert waiting(redis_client, POLL) == []


def test_no_url_that_a_job_names_is_called(redis_client, serve, working, wait_until):
    server = serve(lambda connection: connection.say(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
    queue = Queue(POLL, connection=redis_client, serializer=JSONSerializer)
    queue.enqueue("tests.slow_jobs.short", webhooks=[Webhook(server.url, "finished")])
    after = enqueue(redis_client, POLL, "short")
    with working(POLL):
        wait_until(lambda: after.refresh() or after.is_finished)
    assert server.connections == 0


@pytest.mark.parametrize("job", [None, "long"])
def test_a_killed_worker_is_soon_no_longer_counted(redis_client, worker, wait_until, job):
    (known,) = Worker.all(connection=redis_client)
    if job:
        enqueue(redis_client, POLL, job)
        wait_until(lambda: redis_client.hget(known.key, "state") == b"busy", 30)
    worker.kill()
    worker.wait()
    assert redis_client.ttl(known.key) <= 15
    wait_until(lambda: not queues.is_served(redis_client, POLL), 30)


def test_a_worker_with_a_long_job_is_counted_all_the_while(redis_client, worker, wait_until):
    (known,) = Worker.all(connection=redis_client)
    enqueue(redis_client, POLL, "long")
    wait_until(lambda: redis_client.hget(known.key, "state") == b"busy", 30)
    for _ in range(2):
        redis_client.expire(known.key, 8)
        wait_until(lambda: redis_client.ttl(known.key) > 8, 30)
    assert redis_client.hget(known.key, "state") == b"busy"
