"""The clock is set back or forward: what is due in seconds stays so, and nobody fails for a silence that was none."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import insert, select, update

from jobs import sweep as sweep_job
from jobs.schedule import Metronome, ring_at
from tests.facts import github
from tests.stand import stands
from webhook_app import clock, db, deliveries, health, models, queues, replays, subscribers
from webhook_app.clock import Steps
from webhook_app.deliveries import Tried
from webhook_app.lifecycle import Observation, ObservedBy, State
from webhook_app.models import Moment
from webhook_app.retries import RetryPolicy
from webhook_app.room import Room
from webhook_app.times import utc_now

KEYS = (Fernet.generate_key().decode(),)
HOURS = 2 * 3600.0
SCRIPT = "script:run-1"


class Ticks:
    """A monotonic clock beside the one of the stand: `set_clock` moves the wall clock alone."""

    def __init__(self, stand):
        self.stand, self.shift = stand, 0.0

    def __call__(self):
        return self.stand.clock() - self.shift

    def set_clock(self, seconds):
        self.stand.clock.at += seconds
        self.shift += seconds


@dataclass
class Machine:
    """A process that sweeps; another one is started with `process`."""

    stand: object
    ticks: Ticks

    def process(self):
        """One more process that has swept once."""
        steps = Steps(self.stand.clock, self.ticks)
        held = replace(self.stand.held, started_at=self.stand.now(), steps=steps)
        sweep_job.sweep(held)
        return held


@pytest.fixture
def machine(engine, redis_client, monkeypatch):
    with stands(engine, redis_client, monkeypatch) as make:
        stand = make(("github",), 1, speed=0.001)
        yield Machine(stand, Ticks(stand))


def report(stand, key=SCRIPT):
    stand.record(
        Observation(
            source="script", platform="script", observed_by=ObservedBy.REPORT, key=key, build_id=key,
            state=State.IN_PROGRESS, raw_status="in_progress",
        )
    )  # fmt: skip


def column(engine, of, *where):
    with db.reading(engine) as connection:
        return connection.execute(select(of).where(*where)).scalars().all()


def waits(stand, of, *where):
    """Seconds from now to the times in a column."""
    times = column(stand.engine, of, of.is_not(None), *where)
    return [(at - stand.now()).total_seconds() for at in times]


def a_retry_and_a_backlog(stand):
    """A message that is to be tried again after 100 s, and one that is due; they have different subscribers."""
    for name in ("one", "other"):
        wanted = {"url": f"https://{name}.example.com/", "signing": "hmac"}
        db.as_writer(
            stand.engine, lambda write, wanted=wanted: subscribers.create(write, wanted, KEYS, stand.now())
        )
    stand.record(github(State.QUEUED, run=1))
    first = claim(stand)[0]
    failed = Tried(first, stand.now(), 0.1, 500, "http_500", "")
    policy = RetryPolicy((100,), lambda: 0.5)
    db.in_transaction(stand.engine, lambda c: deliveries.settle(c, [failed], stand.now(), policy))
    db.in_transaction(
        stand.engine,
        lambda c: c.execute(
            update(models.messages).where(models.messages.c.claim.is_not(None))
            .values(claim=None, due_at=stand.now())
        ),
    )  # fmt: skip
    return first


def move(stand):
    """What `jobs.replay` does after the sweep."""
    while replays.advance(stand.engine, stand.now()) is not None:
        pass


def claim(stand):
    return db.in_transaction(
        stand.engine, lambda connection: deliveries.claim(connection, stand.now(), Room(50), 15)
    ).messages


def test_every_time_either_decides_and_is_moved_or_tells_what_has_happened():
    history = {
        "builds": {
            "started_at",
            "ended_at",
            "platform_at",
            "platform_created_at",
            "created_at",
            "updated_at",
        },
        "subscribers": {"created_at", "updated_at"},
        "messages": {"created_at", "settled_at"},
        "attempts": {"started_at", "ended_at"},
        "artifacts": {"created_at", "expires_at", "listed_at"},
        "recoveries": {"since", "until", "created_at"},
        "notices": {"created_at", "read_at"},
        "credentials": {"expires_at"},  # the platform's
        "places": {"list_clock"},  # the platform's
        "events": {"timestamp"},
        "inbound": {"received_at"},
        "delivery_attempts": {"started_at"},
        "tokens": {"created_at"},
        "collections": {"noted_at"},
        "redeliveries": {"asked_at"},
        "unchanged": {"read_at"},
        "workers": {"alive_at"},  # only whether it changes
    }
    for table in models.metadata.sorted_tables:
        times = {one.name for one in table.c if isinstance(one.type, Moment)}
        decide = set(clock.DECIDING.get(table, ()))
        assert decide | history.get(table.name, set()) == times, table.name
        assert not decide & history.get(table.name, set())


@pytest.mark.parametrize("restarted", [False, True], ids=["a living process", "after a restart"])
def test_set_back_by_hours_it_postpones_nothing_that_is_due_in_seconds(machine, restarted, monkeypatch):
    stand, (build,) = machine.stand, machine.stand.world.builds
    held = machine.process()
    stand.push(build)
    report(stand)
    a_retry_and_a_backlog(stand)
    source = {"name": "github", "paused_until": stand.now() + timedelta(seconds=30)}
    db.as_writer(stand.engine, lambda write: health.upsert(write.connection, models.sources, [source]))
    db.in_transaction(
        stand.engine,
        lambda c: c.execute(
            update(models.subscribers).values(slow_until=stand.now() + timedelta(seconds=20.5))
        ),
    )
    stand.clock.advance(15)
    sweep_job.sweep(held)
    b, m = models.builds.c, models.messages.c
    before = {
        "poll": waits(stand, b.next_poll_at, b.platform == "github"),
        "heartbeat": waits(stand, b.next_poll_at, b.platform == "script"),
        "retry": waits(stand, m.due_at, m.reason == "http_500"),
        "slow": waits(stand, models.subscribers.c.slow_until),
        "pause": waits(stand, models.sources.c.paused_until),
    }
    assert (before["heartbeat"], before["retry"]) == ([75], [85])
    machine.ticks.set_clock(-HOURS)
    monkeypatch.setattr(clock, "MESSAGES_AT_ONCE", 1)
    if restarted:
        machine.process()
    else:
        sweep_job.sweep(held)
    for _ in range(2):
        move(stand)
        assert waits(stand, b.next_poll_at, b.platform == "github") == before["poll"]
        assert waits(stand, b.next_poll_at, b.platform == "script") == before["heartbeat"]
        assert waits(stand, m.due_at, m.reason == "http_500") == before["retry"]
        assert waits(stand, m.due_at, m.reason.is_(None)) == [0]
        assert waits(stand, models.subscribers.c.slow_until) == before["slow"]
        assert waits(stand, models.sources.c.paused_until) == before["pause"]
        assert max(waits(stand, b.last_push_at)) <= 0
        sweep_job.sweep(held)  # again, and by another one
        machine.process()
    assert [one["kind"] for one in stand.notices("relay.was_down", "relay.clock_set")] == ["relay.clock_set"]
    stand.clock.advance(30)
    assert [message.number for message in claim(stand)] == [2]
    sweep_job.sweep(held)
    assert stand.notices("relay.was_down") == []


def test_of_several_processes_one_moves_the_times(machine):
    stand = machine.stand
    report(stand)
    processes = [machine.process() for _ in range(4)]
    machine.ticks.set_clock(-HOURS)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(sweep_job.sweep, processes))
    assert waits(stand, models.builds.c.next_poll_at) == [90]
    assert len(stand.notices("relay.clock_set")) == 1


@pytest.mark.parametrize("behind", [30, HOURS], ids=["slightly", "by hours"])
def test_a_machine_whose_clock_is_behind_all_the_time_moves_nothing(machine, behind):
    stand = machine.stand
    held = machine.process()
    late = Steps(lambda: stand.clock() - behind, machine.ticks)
    late.note()
    report(stand)
    for _ in range(3):
        stand.clock.advance(15)
        sweep_job.sweep(held)
        stand.clock.at -= behind
        sweep_job.sweep(replace(held, steps=late))
        stand.clock.at += behind
    assert waits(stand, models.builds.c.next_poll_at) == [45]
    assert stand.notices("relay.clock_set") == []


def test_a_clock_that_is_set_back_a_little_moves_nothing(machine):
    stand = machine.stand
    held = machine.process()
    report(stand)
    machine.ticks.set_clock(-59)
    sweep_job.sweep(held)
    assert waits(stand, models.builds.c.next_poll_at) == [90 + 59]


@pytest.mark.parametrize("how", ["set forward", "slept", "was down"])
def test_after_skipped_hours_no_script_is_failed_before_it_could_be_heard(machine, how):
    stand = machine.stand
    held = machine.process()
    report(stand)
    if how == "was down":
        stand.clock.advance(HOURS)
        held = machine.process()
    else:
        machine.ticks.set_clock(HOURS)
        sweep_job.sweep(held)
    row = Row(SCRIPT)
    assert stand.row(row)["state"] == "in_progress"
    assert waits(stand, models.builds.c.next_poll_at) == [90]
    stand.clock.advance(60)
    sweep_job.sweep(held)
    sweep_job.sweep(replace(held, steps=Steps(stand.clock, machine.ticks)))
    stand.clock.advance(30)
    sweep_job.sweep(held)
    assert stand.row(row)["error"] == "no heartbeat for 90 s", "silence that could be heard still counts"


@dataclass(frozen=True)
class Row:
    build_id: str


@pytest.mark.parametrize("first", ["the sweep", "the polling"])
def test_a_clock_set_forward_times_no_build_out(machine, first):
    stand, (build,) = machine.stand, machine.stand.world.builds
    stand.held = machine.process()
    stand.push(build)
    stand.clock.advance(60)
    stand.poll()
    deadline = waits(stand, models.builds.c.poll_deadline_at)
    assert deadline == [3600]
    machine.ticks.set_clock(HOURS)
    if first == "the sweep":
        sweep_job.sweep(stand.held)
    stand.poll()
    assert stand.row(build)["state"] != "timeout"
    (left,) = waits(stand, models.builds.c.poll_deadline_at)
    assert 3600 - 60 <= left <= 3600 + 60


def test_a_single_ring_from_before_the_clock_was_set_back_is_forgotten(redis_client):
    ring_at(redis_client, queues.DELIVER, utc_now() + timedelta(hours=2))
    ring_at(redis_client, queues.DELIVER, utc_now() + timedelta(minutes=59))
    Metronome(redis_client, ()).enqueue_jobs()
    assert redis_client.zcard(Metronome.scheduled_jobs_key) == 1


def test_a_large_backlog_is_moved_before_any_replay_goes_on(machine, monkeypatch):
    stand = machine.stand
    held = machine.process()
    wanted = {"url": "https://ci.example.com/", "signing": "hmac"}
    db.as_writer(stand.engine, lambda write: subscribers.create(write, wanted, KEYS, stand.now()))
    stand.record(*(github(State.QUEUED, run=run) for run in range(20)))
    replay = {
        "kind": "redrive", "only_missing": False, "after": 0, "last": 10**9, "created_at": stand.now(),
    }  # fmt: skip
    db.as_writer(stand.engine, lambda write: write.connection.execute(insert(models.recoveries), replay))
    monkeypatch.setattr(clock, "MESSAGES_AT_ONCE", 7)
    machine.ticks.set_clock(-HOURS)
    sweep_job.sweep(held)
    assert stand.redis.exists(queues.bell_key(queues.REPLAY))
    assert [replays.advance(stand.engine, stand.now()) for _ in range(3)] == [7, 7, 6]
    assert waits(stand, models.messages.c.due_at) == [0] * 20
    assert column(stand.engine, models.recoveries.c.kind) == ["redrive"]
