"""The metronome on a real Redis: each fault of stock rq-scheduler that it claims to mend, and its table."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from redis import ConnectionPool, Redis, UnixDomainSocketConnection
from rq import Queue, SimpleWorker
from rq.job import Job
from rq_scheduler import Scheduler

from jobs import schedule
from jobs.resources import resources
from jobs.schedule import LOCK_SECONDS, Metronome, Periodic, ring_at, table
from tests.hub import clean_environment
from tests.slow_jobs import Pickled
from webhook_app import embedded, queues, settings
from webhook_app.queues import DELIVER, POLL, SWEEP
from webhook_app.supervisor import tied_to_parent

ENTRIES, LOCK = Metronome.scheduled_jobs_key, Metronome.scheduler_lock_key
EVERY_SECOND = (Periodic("tick-poll", POLL, 1),)
LINES = (
    Periodic("tick-poll", POLL, 15),
    Periodic("tick-deliver", DELIVER, 5),
    Periodic("tick-sweep", SWEEP, 15),
)


def entries(redis):
    """The stored entries: id and due time in POSIX seconds."""
    return {name.decode(): due for name, due in redis.zrange(ENTRIES, 0, -1, withscores=True)}


def make_due(redis, job_id):
    redis.zadd(ENTRIES, {job_id: time.time() - 1})


def jobs_of(redis, bell):
    return Queue(bell, connection=redis).count


def take(redis, bell):
    """What a worker does: take the jobs off the queue and begin them; how many there were."""
    count = jobs_of(redis, bell)
    Queue(bell, connection=redis).empty()
    queues.answer(redis, bell)
    return count


@contextmanager
def running(metronome):
    """The metronome in a thread of its own, which must still live at the end."""
    stop = threading.Event()
    thread = threading.Thread(target=metronome.run_until, args=(stop,))
    thread.start()
    try:
        yield
        assert thread.is_alive()
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()


# ---- the table


def test_the_table_has_every_bell_once_and_each_line_an_id_of_its_own():
    lines = table(settings.load({}))
    assert sorted(line.bell for line in lines) == sorted(queues.JOBS)
    assert len({line.id for line in lines}) == len(lines)
    assert all(line.id.startswith(schedule.TICK) for line in lines)
    assert {line.bell: line.interval_seconds for line in lines}[POLL] == 15


@pytest.mark.parametrize(
    ("milliseconds", "interval"), [("200", 1), ("1000", 1), ("4000", 4), ("15000", 15), ("600000", 15)]
)
def test_the_polling_tick_follows_the_poll_interval(milliseconds, interval):
    lines = {line.bell: line for line in table(settings.load({"BUILD_POLL_INTERVAL": milliseconds}))}
    assert lines[POLL].interval_seconds == interval


def test_discovery_has_its_own_interval_and_jitter():
    values = settings.load({"DISCOVERY_INTERVAL": "120", "DISCOVERY_JITTER": "7.5"})
    (line,) = [line for line in table(values) if line.bell == queues.DISCOVER]
    assert (line.interval_seconds, line.jitter_seconds) == (120, 7.5)


# ---- fault: it looks every 60 s


def test_a_tick_of_a_second_comes_every_second(redis_client, wait_until):
    taken = []

    def three_ticks():
        taken.extend([time.monotonic()] * take(redis_client, POLL))
        return len(taken) >= 3

    with running(Metronome(redis_client, EVERY_SECOND)):
        wait_until(three_ticks)
    assert taken[-1] - taken[0] > 1


def test_a_due_entry_moves_on_by_its_interval_and_jitter(redis_client, monkeypatch):
    line = Periodic("tick-poll", POLL, 15, jitter_seconds=10)
    monkeypatch.setattr(schedule.random, "uniform", lambda least, most: most)
    metronome = Metronome(redis_client, (line,))
    metronome.enqueue_jobs()
    assert entries(redis_client)["tick-poll"] == pytest.approx(time.time() + 25, abs=2)
    metronome.enqueue_jobs()
    assert take(redis_client, POLL) == 1


# ---- fault: every boot adds the entry again, and two schedulers run it twice


def test_two_boots_make_one_entry_for_each_line_and_leave_its_time_alone(redis_client):
    Metronome(redis_client, LINES).enqueue_jobs()
    assert set(entries(redis_client)) == {line.id for line in LINES}
    redis_client.zadd(ENTRIES, {"tick-poll": time.time() + 7})
    before = entries(redis_client)
    for _ in range(3):
        Metronome(redis_client, LINES).enqueue_jobs()
    assert entries(redis_client) == before
    assert [jobs_of(redis_client, line.bell) for line in LINES] == [1, 1, 1]


def test_of_two_metronomes_one_leads_until_it_stops(redis_client, wait_until):
    first, second = Metronome(redis_client, EVERY_SECOND), Metronome(redis_client, EVERY_SECOND)
    with running(second):
        with running(first):
            wait_until(lambda: redis_client.get(LOCK))
            leaders, taken = set(), []

            def three_ticks():
                leaders.add(redis_client.get(LOCK))
                taken.extend([time.monotonic()] * take(redis_client, POLL))
                return len(taken) >= 3

            wait_until(three_ticks)
            assert len(leaders) == 1
            assert taken[-1] - taken[0] > 1, "once a second, not twice"
            assert list(entries(redis_client)) == ["tick-poll"]
        assert redis_client.get(LOCK) != first.owner.encode(), "given back, not left to end"
        wait_until(lambda: redis_client.get(LOCK) == second.owner.encode())
    assert redis_client.get(LOCK) is None


# ---- fault: the lock has no owner, and outlives a dead scheduler


def test_the_lock_of_a_dead_leader_ends_within_seconds(redis_client, wait_until):
    dead, heir = Metronome(redis_client, LINES), Metronome(redis_client, LINES)
    assert dead.acquire_lock()
    assert 0 < redis_client.pttl(LOCK) <= LOCK_SECONDS * 1000
    assert LOCK_SECONDS <= 5
    assert not heir.acquire_lock()
    redis_client.pexpire(LOCK, 1)
    wait_until(heir.acquire_lock)
    assert not dead.acquire_lock()


def test_a_leader_keeps_its_lock_by_renewing_it(redis_client):
    leader = Metronome(redis_client, LINES)
    assert leader.acquire_lock()
    redis_client.pexpire(LOCK, 500)
    assert leader.acquire_lock()
    assert redis_client.pttl(LOCK) > 1000


def test_a_lock_with_another_owner_is_neither_released_nor_prolonged(redis_client):
    late, owner = Metronome(redis_client, LINES), Metronome(redis_client, LINES)
    assert late.acquire_lock()
    redis_client.delete(LOCK)  # a pass that took longer than the lock lives
    assert owner.acquire_lock()
    redis_client.pexpire(LOCK, 500)
    assert not late.acquire_lock()
    late.remove_lock()
    assert redis_client.get(LOCK) == owner.owner.encode()
    assert redis_client.pttl(LOCK) <= 500
    owner.remove_lock()
    assert redis_client.get(LOCK) is None


# ---- fault: an entry or its job is lost and never runs again


def test_a_lost_entry_is_put_back_by_the_next_pass(redis_client):
    metronome = Metronome(redis_client, LINES)
    metronome.enqueue_jobs()
    take(redis_client, POLL)
    redis_client.zrem(ENTRIES, "tick-poll")
    metronome.enqueue_jobs()
    assert "tick-poll" in entries(redis_client)
    assert take(redis_client, POLL) == 1


def test_a_lost_job_is_put_back_by_the_next_pass(redis_client):
    metronome = Metronome(redis_client, LINES)
    metronome.enqueue_jobs()
    take(redis_client, POLL)
    redis_client.delete(Job.key_for("tick-poll"))
    make_due(redis_client, "tick-poll")
    metronome.enqueue_jobs()
    assert Job.exists("tick-poll", connection=redis_client)
    assert entries(redis_client)["tick-poll"] > time.time()
    assert take(redis_client, POLL) == 1


def test_a_job_that_is_lost_between_two_looks_ends_no_metronome(redis_client, monkeypatch):
    metronome = Metronome(redis_client, LINES)
    metronome.heal()
    fetch = queues.WakeUp.fetch

    def lost(job_id, connection):
        connection.delete(Job.key_for(job_id))
        return fetch(job_id, connection=connection)

    monkeypatch.setattr(queues.WakeUp, "fetch", lost)
    metronome.heal()
    monkeypatch.undo()
    assert all(Job.exists(line.id, connection=redis_client) for line in LINES)


def test_a_flushed_redis_has_all_its_ticks_back_after_one_pass(redis_client):
    metronome = Metronome(redis_client, LINES)
    metronome.enqueue_jobs()
    redis_client.flushall()
    metronome.enqueue_jobs()
    assert set(entries(redis_client)) == {line.id for line in LINES}
    assert [take(redis_client, line.bell) for line in LINES] == [1, 1, 1]


def test_a_clock_that_was_put_back_silences_no_tick(redis_client):
    metronome = Metronome(redis_client, LINES)
    metronome.enqueue_jobs()
    take(redis_client, POLL)
    redis_client.zadd(ENTRIES, {"tick-poll": time.time() + 3600})
    metronome.enqueue_jobs()
    assert take(redis_client, POLL) == 1


# ---- the table changes


@pytest.mark.parametrize("changed", [Periodic("tick-poll", POLL, 3), Periodic("tick-poll", SWEEP, 15)])
def test_a_changed_line_is_taken_over_and_due_at_once(redis_client, changed):
    Metronome(redis_client, LINES[:1]).enqueue_jobs()
    take(redis_client, POLL)
    Metronome(redis_client, (changed,)).enqueue_jobs()
    job = queues.WakeUp.fetch("tick-poll", connection=redis_client)
    assert (job.origin, job.meta["interval"]) == (changed.bell, changed.interval_seconds)
    assert entries(redis_client)["tick-poll"] <= time.time() + changed.interval_seconds
    assert take(redis_client, changed.bell) == 1


def test_a_tick_that_left_the_table_is_removed(redis_client):
    Metronome(redis_client, LINES).heal()
    Metronome(redis_client, LINES[:1]).enqueue_jobs()
    assert list(entries(redis_client)) == ["tick-poll"]
    assert not Job.exists("tick-deliver", connection=redis_client)
    assert jobs_of(redis_client, DELIVER) == 0


def test_what_others_scheduled_in_a_shared_redis_is_theirs(redis_client):
    theirs = Scheduler("elsewhere", connection=redis_client)
    job = theirs.schedule(datetime(2020, 1, 1), "os.getcwd", interval=60)  # noqa: DTZ001  theirs is naive
    Metronome(redis_client, LINES).enqueue_jobs()
    assert theirs.acquire_lock()
    theirs.enqueue_jobs()
    assert Queue("elsewhere", connection=redis_client).job_ids == [job.id]
    assert set(entries(redis_client)) == {line.id for line in LINES}


def test_an_entry_of_an_earlier_version_or_of_an_attacker_runs_nothing(redis_client, monkeypatch, tmp_path):
    """Both may be pickles: the first is put right, the second is dropped unread."""
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    old = Scheduler("poll", connection=redis_client)
    old.scheduled_jobs_key = ENTRIES
    for job_id in ("tick-poll", "once-poll-1", "theirs"):
        old.schedule(datetime(2020, 1, 1), "tests.slow_jobs.short", [Pickled()], interval=60, id=job_id)  # noqa: DTZ001
    for _ in range(2):
        Metronome(redis_client, LINES).enqueue_jobs()
    assert set(entries(redis_client)) == {line.id for line in LINES}
    assert queues.WakeUp.fetch("tick-poll", connection=redis_client).meta == {"interval": 15}
    assert not (tmp_path / "trace").exists()
    assert take(redis_client, POLL) == 1


# ---- fault: a crash between enqueue, ZREM and ZADD


class Killed(BaseException):
    """The process is gone; nothing of it runs on."""


class MortalConnection(UnixDomainSocketConnection):
    """A connection of a process that is killed before its `left`-th packet to Redis."""

    left = math.inf

    def send_packed_command(self, command, check_health=True):
        MortalConnection.left -= 1
        if MortalConnection.left < 0:
            raise Killed
        super().send_packed_command(command, check_health)


@pytest.fixture
def mortal(redis_url):
    """`mortal(n, pass_)`: run `pass_(redis)` in a "process" that is killed before packet n; did it survive?"""
    pool = ConnectionPool.from_url(redis_url, connection_class=MortalConnection)

    def run(packets, pass_):
        MortalConnection.left = math.inf
        with Redis(connection_pool=pool) as client:
            client.ping()
            MortalConnection.left = packets
            try:
                pass_(client)
            except Killed:
                return False
            finally:
                MortalConnection.left = math.inf
        return True

    yield run
    pool.disconnect()


def deaths(redis, mortal, prepare, pass_):
    """Kill a pass before each of its packets in turn, each time after `prepare`; yields after each death."""
    for packets in range(100):
        redis.flushall()
        prepare()
        if mortal(packets, pass_):
            assert packets > 4
            return
        yield


def test_a_kill_at_any_moment_loses_no_tick(redis_client, mortal):
    heir = Metronome(redis_client, LINES[:1])

    def prepare():
        heir.heal()
        make_due(redis_client, "tick-poll")

    def pass_(redis):
        Metronome(redis, LINES[:1]).enqueue_jobs()

    for _ in deaths(redis_client, mortal, prepare, pass_):
        assert "tick-poll" in entries(redis_client)
        assert Job.exists("tick-poll", connection=redis_client)
        heir.enqueue_jobs()
        assert jobs_of(redis_client, POLL) >= 1
        assert entries(redis_client)["tick-poll"] > time.time()


def test_a_kill_at_any_moment_loses_no_single_ring(redis_client, mortal):
    heir = Metronome(redis_client, ())

    def prepare():
        ring_at(redis_client, DELIVER, datetime.now(UTC) - timedelta(seconds=5))

    for _ in deaths(redis_client, mortal, prepare, lambda redis: Metronome(redis, ()).enqueue_jobs()):
        heir.enqueue_jobs()
        assert jobs_of(redis_client, DELIVER) >= 1
        assert entries(redis_client) == {}
        assert list(redis_client.scan_iter("rq:job:once-*")) == []


def test_a_pass_that_fails_in_the_middle_rings_again_in_the_next(redis_client, monkeypatch):
    metronome = Metronome(redis_client, LINES[:1])
    metronome.heal()

    def full(*_):
        raise Killed

    monkeypatch.setattr(schedule.queues, "enqueue_once", full)
    with pytest.raises(Killed):
        metronome.enqueue_jobs()
    monkeypatch.undo()
    metronome.enqueue_jobs()
    assert jobs_of(redis_client, POLL) == 1


# ---- fault: jobs pile up behind one that waits


def test_ticks_do_not_pile_up_behind_a_job_that_waits(redis_client):
    metronome = Metronome(redis_client, LINES[:1])
    for _ in range(20):
        metronome.enqueue_jobs()
        make_due(redis_client, "tick-poll")
        redis_client.delete(queues.bell_key(POLL))  # it expires after seconds
    assert jobs_of(redis_client, POLL) == 1
    take(redis_client, POLL)
    metronome.enqueue_jobs()
    assert jobs_of(redis_client, POLL) == 1


# ---- fault: it exits when Redis is away


class OwnRedis:
    """A server of the test's own, to be killed and started at will."""

    def __init__(self, data_dir, wait):
        self.data_dir, self.wait = data_dir, wait
        self.url = embedded.redis_url(data_dir)
        self.process = None

    def start(self):
        command = embedded.command(self.data_dir)
        self.process = subprocess.Popen(command, preexec_fn=tied_to_parent())
        self.wait(lambda: embedded.answers(self.data_dir))

    def signal(self, number):
        self.process.send_signal(number)

    def stop(self):
        for number in (signal.SIGCONT, signal.SIGKILL):
            self.signal(number)
        self.process.wait(60)

    def forget(self):
        """What a server without persistence comes back with: nothing."""
        for path in sorted((self.data_dir / "redis").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.fixture
def own_redis(tmp_path, wait_until):
    made = OwnRedis(tmp_path, wait_until)
    made.start()
    yield made
    made.stop()


def passes(monkeypatch):
    """Grows by one with each pass that begins from now on."""
    seen, acquire = [], Metronome.acquire_lock
    monkeypatch.setattr(Metronome, "acquire_lock", lambda self: seen.append(self) or acquire(self))
    return seen


def test_a_redis_that_goes_and_comes_back_empty_is_waited_for(own_redis, wait_until, caplog, monkeypatch):
    with (
        queues.connect(own_redis.url, schedule.REDIS_SECONDS) as client,
        running(Metronome(client, EVERY_SECOND)),
    ):
        wait_until(lambda: jobs_of(client, POLL) == 1)
        own_redis.stop()
        wait_until(lambda: "the metronome waits" in caplog.text)
        seen = passes(monkeypatch)
        wait_until(lambda: len(seen) > 2)
        assert caplog.text.count("the metronome waits") == 1, "not at each pass"
        own_redis.forget()
        own_redis.start()
        wait_until(lambda: jobs_of(client, POLL) == 1 and client.exists(queues.BEAT_KEY))
        assert list(entries(client)) == ["tick-poll"]


def test_a_redis_that_says_nothing_holds_the_metronome_up_no_longer_than_that(own_redis, wait_until, caplog):
    with queues.connect(own_redis.url, 0.2) as client, running(Metronome(client, EVERY_SECOND)):
        wait_until(lambda: client.exists(queues.BEAT_KEY))
        own_redis.signal(signal.SIGSTOP)
        wait_until(lambda: "the metronome waits" in caplog.text)
        own_redis.signal(signal.SIGCONT)
        client.delete(queues.BEAT_KEY)
        wait_until(lambda: client.exists(queues.BEAT_KEY))
    assert schedule.REDIS_SECONDS < LOCK_SECONDS


# ---- single rings


def test_a_single_ring_comes_once_and_cleans_up_after_itself(redis_client):
    metronome = Metronome(redis_client, ())
    when = datetime.now(UTC) + timedelta(seconds=30)
    for _ in range(3):
        ring_at(redis_client, DELIVER, when)
    ((name, due),) = entries(redis_client).items()
    assert when.timestamp() < due <= when.timestamp() + 1
    metronome.enqueue_jobs()
    assert jobs_of(redis_client, DELIVER) == 0
    make_due(redis_client, name)
    taken = []
    for _ in range(3):
        metronome.enqueue_jobs()
        taken.append(take(redis_client, DELIVER))
    assert taken == [1, 0, 0]
    assert entries(redis_client) == {}
    assert list(redis_client.scan_iter("rq:job:*")) == []


def test_a_single_ring_of_the_past_comes_with_the_next_pass(redis_client):
    ring_at(redis_client, DELIVER, datetime.now(UTC) - timedelta(hours=1))
    Metronome(redis_client, ()).enqueue_jobs()
    assert jobs_of(redis_client, DELIVER) == 1


def test_single_rings_of_different_bells_and_seconds_do_not_mix(redis_client):
    when = datetime(2026, 11, 1, tzinfo=UTC)
    ring_at(redis_client, DELIVER, when)
    ring_at(redis_client, POLL, when)
    ring_at(redis_client, POLL, when + timedelta(seconds=1))
    assert len(entries(redis_client)) == 3


def test_a_single_ring_of_a_bell_that_is_no_more_is_dropped(redis_client, monkeypatch):
    monkeypatch.setitem(queues.JOBS, "gone", "jobs.gone.gone")
    ring_at(redis_client, "gone", datetime.now(UTC) - timedelta(seconds=5))
    monkeypatch.undo()
    Metronome(redis_client, ()).enqueue_jobs()
    assert entries(redis_client) == {}


# ---- the whole


def test_each_tick_is_run_by_a_real_worker(redis_client, redis_url, store_url, monkeypatch, tmp_path):
    """Metronome, queue, worker, job: nothing stands in for anything."""
    for name in list(os.environ):
        if name not in clean_environment({}):
            monkeypatch.delenv(name)
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("DATABASE_URL", store_url.replace("postgresql+psycopg", "postgres"))
    monkeypatch.setenv("BUILDRELAY_DATA_DIR", str(tmp_path))
    resources.cache_clear()
    Metronome(redis_client, table(settings.load())).enqueue_jobs()
    worker = SimpleWorker(list(queues.JOBS), connection=redis_client, job_class=queues.WakeUp)
    worker.log_job_description = False
    worker.work(burst=True, logging_level="ERROR")
    assert not any(redis_client.exists(queues.bell_key(bell)) for bell in queues.JOBS), "each has begun"
    failed = [Queue(bell, connection=redis_client).failed_job_registry.get_job_ids() for bell in queues.JOBS]
    assert failed == [[] for _ in queues.JOBS]
    assert {key.decode() for key in redis_client.scan_iter("rq:job:*")} == {
        Job.key_for(line.id) for line in table(settings.load())
    }
    resources().engine.dispose()
    resources().threads.shutdown()
    resources.cache_clear()


@contextmanager
def scheduler_process(redis_url, tmp_path):
    env = clean_environment({"REDIS_URL": redis_url, "BUILDRELAY_DATA_DIR": str(tmp_path)})
    command = [sys.executable, "-m", "jobs.schedule"]
    with subprocess.Popen(command, env=env, preexec_fn=tied_to_parent()) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_process_beats_and_gives_its_lock_back_when_told_to_stop(
    redis_client, redis_url, wait_until, tmp_path
):
    with scheduler_process(redis_url, tmp_path) as process:
        wait_until(lambda: redis_client.exists(queues.BEAT_KEY))
        assert set(entries(redis_client)) == {line.id for line in table(settings.load({}))}
        assert abs(int(redis_client.get(queues.BEAT_KEY)) - time.time()) < 60
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert redis_client.get(LOCK) is None


def test_a_killed_process_leaves_a_lock_that_ends_and_entries_that_go_on(
    redis_client, redis_url, wait_until, tmp_path
):
    with scheduler_process(redis_url, tmp_path) as process:
        wait_until(lambda: redis_client.exists(queues.BEAT_KEY))
        process.kill()
        process.wait(60)
    heir = Metronome(redis_client, table(settings.load({})))
    assert not heir.acquire_lock()
    assert 0 < redis_client.pttl(LOCK) <= LOCK_SECONDS * 1000
    redis_client.pexpire(LOCK, 1)
    wait_until(heir.acquire_lock)
    before = entries(redis_client)
    heir.heal()
    assert entries(redis_client) == before
