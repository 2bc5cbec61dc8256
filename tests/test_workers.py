"""Who holds what: a worker that lives keeps its messages, and what a dead one held is free."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import insert, select

from jobs import deliver as job
from jobs.resources import Desk, Resources
from tests.facts import PACE, at, github
from tests.stand import ON_SQLITE
from webhook_app import builds, db, deliveries, endpoints, models, settings, subscribers, workers
from webhook_app.deliveries import Tried
from webhook_app.lifecycle import State
from webhook_app.retries import RetryPolicy
from webhook_app.room import Room
from webhook_app.simulated.subscriber import Subscriber
from webhook_app.times import utc_now

Q, P = State.QUEUED, State.IN_PROGRESS
KEYS = (Fernet.generate_key().decode(),)
POLICY = RetryPolicy((5, 300), lambda: 0.5)
ONE, OTHER = "a" * 16, "b" * 16


def subscribe(engine, **wanted):
    fields = {"url": "https://example.com/hook", "signing": "hmac", **wanted}
    row, secret = db.as_writer(engine, lambda write: subscribers.create(write, fields, KEYS, at(0)))
    return row["id"], secret


def record(engine, *facts, now=0):
    db.as_writer(engine, lambda write: builds.record(write, facts, at(now), PACE))


def claim(engine, worker=ONE, now=0):
    """Messages that a worker claims, and shows that it has."""

    def unit(connection):
        taken = deliveries.claim(connection, at(now), Room(100, per_host=100, first=100), 15, worker).messages
        workers.show(connection, worker, {message.id for message in taken}, at(now))
        return taken

    return db.in_transaction(engine, unit)


def settle(engine, *tries, now=0):
    def unit(connection):
        deliveries.settle(connection, tries, at(now), POLICY)
        endpoints.note(connection, tries, at(now))

    db.in_transaction(engine, unit)


def went(message, status=200):
    return Tried(message, at(0), 0.01, status, None if status == 200 else f"http_{status}", "")


def rows(engine, table=models.messages, order="id"):
    with db.reading(engine) as connection:
        return [dict(row) for row in connection.execute(select(table).order_by(table.c[order])).mappings()]


def late(engine, worker=ONE):
    return next(workers.Late(row["id"], row["alive_at"]) for row in _rows_of(engine) if row["id"] == worker)


def _rows_of(engine):
    return rows(engine, models.workers)


# ---- freeing ---------------------------------------------------------------------------------


def test_what_a_dead_worker_held_is_due_at_once_and_nothing_else_changes(engine):
    subscribe(engine)
    record(engine, *(github(Q, run=run) for run in range(3)))
    mine = claim(engine)
    record(engine, github(Q, run=3))
    theirs = claim(engine, OTHER)
    settle(engine, went(mine[0]), went(mine[1], 500), now=1)
    dead = late(engine)
    assert workers.free(engine, dead, at(2)) == 1
    left = {row["id"]: row for row in rows(engine)}
    assert left[mine[0].id]["state"] == "delivered"
    assert left[mine[1].id]["due_at"] == at(6), "its retry stays where it was"
    assert (left[mine[2].id]["due_at"], left[mine[2].id]["claim"]) == (at(2), None)
    assert left[theirs[0].id]["claim"] == theirs[0].claim
    assert [row["id"] for row in _rows_of(engine)] == [OTHER]
    assert workers.free(engine, dead, at(2)) == 0, "once"
    assert [message.id for message in claim(engine, OTHER, now=2)] == [mine[2].id]


def test_the_probe_of_an_open_circuit_that_a_dead_worker_held_goes_out_at_once(engine):
    """The circuit's own lease would keep the endpoint alone for as long as that worker could have taken."""
    subscribe(engine)
    for run in range(6):
        record(engine, github(Q, run=run))
    settle(engine, *(went(message, 500) for message in claim(engine)[:5]))
    assert workers.free(engine, late(engine), at(0)) == 1
    assert claim(engine, OTHER, now=1) == [], "the circuit is open"
    assert len(claim(engine, OTHER, now=10)) == 1
    assert claim(engine, ONE, now=11) == [], "one probe at a time"
    assert workers.free(engine, late(engine, OTHER), at(12)) == 1
    assert len(claim(engine, ONE, now=12)) == 1


def test_who_showed_life_meanwhile_keeps_everything(engine):
    subscribe(engine)
    record(engine, github(Q))
    (message,) = claim(engine)
    seen = late(engine)
    workers.renew(engine, ONE, at(5))
    assert workers.free(engine, seen, at(6)) == 0
    assert rows(engine)[0]["claim"] == message.claim
    assert late(engine).alive_at == at(5)


def test_several_that_free_the_same_worker_do_it_once(engine):
    subscribe(engine)
    record(engine, *(github(Q, run=run) for run in range(50)))
    assert len(claim(engine)) == 50
    dead, start = late(engine), threading.Barrier(8)

    def free(_):
        start.wait(60)
        return workers.free(engine, dead, at(9))

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(free, range(8))) == [0] * 7 + [50]
    assert {row["due_at"] for row in rows(engine)} == {at(9)}


def test_a_lane_goes_on_in_order_after_its_worker_died(engine):
    subscribe(engine)
    record(engine, github(Q), github(P))
    (first,) = claim(engine)
    assert claim(engine, OTHER, now=1) == []  # the second waits as long as the first is claimed
    workers.free(engine, late(engine), at(6))
    (again,) = claim(engine, OTHER, now=6)
    assert (again.id, again.number) == (first.id, 2)
    settle(engine, went(again), now=7)
    (second,) = claim(engine, OTHER, now=7)
    assert second.id != first.id


@pytest.mark.parametrize("settled", [False, True], ids=["while another tries", "after another delivered it"])
def test_an_answer_of_a_worker_believed_dead_counts_if_it_was_a_success(engine, settled):
    subscribe(engine)
    record(engine, github(Q))
    (before,) = claim(engine)
    workers.free(engine, late(engine), at(6))
    (again,) = claim(engine, OTHER, now=6)
    if settled:
        settle(engine, went(again), now=7)
    settle(engine, went(before), now=8)
    assert rows(engine)[0]["state"] == "delivered"
    if not settled:
        settle(engine, went(again, 500), now=9)
    assert rows(engine)[0]["state"] == "delivered", "a later failure does not undo it"
    numbers = [row["number"] for row in rows(engine, models.delivery_attempts)]
    assert sorted(numbers) == [1, 2]


@pytest.mark.parametrize("status", [500, None], ids=["failed", "without its key"])
def test_a_failure_of_a_worker_believed_dead_puts_nothing_back(engine, status):
    subscribe(engine)
    record(engine, github(Q))
    (before,) = claim(engine)
    workers.free(engine, late(engine), at(6))
    (again,) = claim(engine, OTHER, now=6)
    failed = went(before, status) if status else replace(went(before), reason=deliveries.NO_KEY)
    settle(engine, failed, now=7)
    (row,) = rows(engine)
    assert (row["state"], row["claim"], row["attempts"]) == ("pending", again.claim, 2)
    settle(engine, went(again), now=8)
    assert rows(engine)[0]["state"] == "delivered"


def test_whoever_takes_over_an_id_frees_all_that_was_held_with_it(engine):
    subscribe(engine)
    record(engine, github(Q))
    claim(engine)
    lane = {
        "limit": None, "remaining": None, "credit": 1.0, "turns": 1.0, "reckoned_at": at(0), "price": 1.0,
        "per_hour": 0.0, "strikes": 0, "requests": 0, "counted": 0, "sources": [], "owned_until": at(45),
    }  # fmt: skip
    lanes = {"mine": f"{ONE}:1", "my turn": f"turn:{ONE}:2", "theirs": f"{OTHER}:3"}
    build = rows(engine, models.builds)[0]["id"]
    ended = {
        "build": build, "source": "github", "wants_log": True, "due_at": at(300), "claim": f"{ONE}:5",
        "log_truncated": False, "noted_at": at(0),
    }  # fmt: skip
    lent = {"identity": "i", "source": "github", "version": 1, "lease": f"{ONE}:4", "leased_until": at(35)}

    def unit(write):
        write.connection.execute(
            insert(models.budgets), [{**lane, "lane": name, "owner": owner} for name, owner in lanes.items()]
        )
        tries = [ended | {"attempt": number, "tries": number} for number in (1, 2)]
        write.connection.execute(insert(models.collections), tries)
        write.connection.execute(insert(models.credentials), lent)

    db.as_writer(engine, unit)
    assert workers.release(engine, ONE, at(1)) == 1
    owners = {row["lane"]: row["owner"] for row in rows(engine, models.budgets, "lane")}
    assert owners == {"mine": None, "my turn": None, "theirs": lanes["theirs"]}
    assert rows(engine, models.credentials, "identity")[0]["leased_until"] is None
    due = [row["due_at"] for row in rows(engine, models.collections, "attempt")]
    assert due == [at(1), at(300)], "what was tried before may be what kills, and waits"
    assert rows(engine)[0]["due_at"] == at(1)


# ---- who is dead -----------------------------------------------------------------------------


class Clock:
    """Monotonic seconds, stepped by hand."""

    def __init__(self):
        self.at = 1000.0

    def __call__(self):
        return self.at


def has(engine, worker, now):
    db.in_transaction(engine, lambda connection: workers.show(connection, worker, {1}, at(now)))


@pytest.fixture
def watch(engine):
    """`watch(seconds, beats=…)`: look each half second for so long, while this worker renews its row; who is late."""
    clock = Clock()
    made = workers.Watch(OTHER, clock)

    def go(seconds, beats=False, of=None):
        found = []
        for _ in range(int(seconds * 2)):
            if beats:
                workers.renew(engine, ONE, at(clock.at))
            found = [one.worker for one in (of or made).late(engine)]
            clock.at += 0.5
        return found

    go.clock, go.watch = clock, made
    return go


def test_a_row_that_does_not_change_for_five_seconds_is_that_of_a_dead_worker(engine, watch):
    has(engine, ONE, 0)
    has(engine, OTHER, 0)
    assert watch(30, beats=True) == []
    assert watch(4.5) == []
    assert watch(0.5) == [ONE], "and who looks is not late to himself"


def test_times_of_another_clock_do_not_matter(engine, watch):
    for shift in (-86_400, 86_400):
        has(engine, ONE, shift)
        assert watch(5) == []


def test_a_watch_with_a_gap_begins_anew(engine, watch):
    """The one who looks was stopped, or the store away: nobody could have shown life."""
    has(engine, ONE, 0)
    assert watch(4) == []
    watch.clock.at += 10
    assert watch(5) == []
    assert watch(1) == [ONE]


def test_while_nobody_may_write_nobody_is_dead(engine, watch, monkeypatch):
    has(engine, ONE, 0)
    assert watch(2) == []

    def refuse(*_):
        raise db.StoreUnavailable("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(db, "in_transaction", refuse)
        for _ in range(20):
            try:
                assert watch(0.5) == []
            except db.StoreUnavailable:
                watch.clock.at += 0.5
    assert watch(5) == []


# ---- a worker at work ------------------------------------------------------------------------


@pytest.fixture
def held(engine, redis_client):
    values = settings.load({"ENCRYPTION_KEYS": KEYS[0], "ALLOW_PRIVATE_CALLBACKS": "true"})
    with ThreadPoolExecutor(32) as threads:
        yield Resources(values, engine, redis_client, threads, desk=Desk(worker=ONE))


@pytest.fixture
def attended(held):
    over = threading.Event()
    thread = threading.Thread(target=job.attend, args=(held, over))
    thread.start()
    yield held
    over.set()
    thread.join(60)


def test_a_worker_shows_life_while_it_has_messages_and_no_longer(attended, engine, wait_until):
    with Subscriber() as slow:
        slow.behave(hang=True)
        _, secret = subscribe(engine, url=slow.url)
        slow.add_secret(secret)
        record(engine, github(Q))
        worker = threading.Thread(target=job.deliver, args=(attended,))
        worker.start()
        wait_until(lambda: _rows_of(engine))
        (before,) = _rows_of(engine)
        (message,) = rows(engine)
        assert (before["id"], before["claimed"]) == (ONE, [message["id"]])
        assert message["claim"].startswith(f"{ONE}:")
        wait_until(lambda: _rows_of(engine)[0]["alive_at"] > before["alive_at"])
        slow.close()
        worker.join(60)
    assert _rows_of(engine) == []


def test_a_worker_takes_what_a_dead_one_held(attended, engine, wait_until):
    with Subscriber() as quick:
        _, secret = subscribe(engine, url=quick.url)
        quick.add_secret(secret)
        record(engine, github(Q), now=(utc_now() - at(0)).total_seconds())
        dead = claim(engine, OTHER, now=(utc_now() - at(0)).total_seconds() + 1)
        assert len(dead) == 1
        wait_until(lambda: not _rows_of(engine))  # five seconds later
        job.deliver(attended)
        assert quick.report()["received"] == 1
    assert rows(engine)[0]["state"] == "delivered"


def test_an_answer_that_the_store_could_not_take_is_noted_when_it_is_back(held, engine, monkeypatch):
    in_transaction = db.in_transaction
    with Subscriber() as quick:
        _, secret = subscribe(engine, url=quick.url)
        quick.add_secret(secret)
        record(engine, github(Q))

        def away(*given):
            if quick.report()["received"]:
                raise db.StoreUnavailable("away")
            return in_transaction(*given)

        with monkeypatch.context() as patch:
            patch.setattr(db, "in_transaction", away)
            with pytest.raises(db.StoreUnavailable):
                job.deliver(held)
        assert rows(engine)[0]["state"] == "pending"
        job.deliver(held)
        assert quick.report()["received"] == 1, "it is not sent again"
    assert rows(engine)[0]["state"] == "delivered"
    assert [row["reason"] for row in rows(engine, models.delivery_attempts)] == [None]
    assert _rows_of(engine) == []


# ---- ids of processes ------------------------------------------------------------------------

_PROCESS = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from webhook_app import db, workers
freed = workers.begin(db.connect(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], datetime.now(UTC))
print(workers.own_id(), freed, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(store_url, tmp_path):
    """`start(role)`: a process that begins; its `(id, how many messages it freed)`, and the process."""
    made = []

    def run(role="deliver", directory=tmp_path):
        command = [sys.executable, "-c", _PROCESS, store_url, str(directory), role]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        made.append(process)
        id_, freed = process.stdout.readline().split()
        return id_, int(freed), process

    yield run
    for process in made:
        with process:
            process.kill()


def test_the_next_process_has_the_id_of_the_one_that_died_and_frees_what_it_held(engine, start):
    first, _, process = start()
    second, _, _ = start()
    poller, _, _ = start("poll")
    assert len({first, second, poller}) == 3
    subscribe(engine)
    record(engine, github(Q))
    claim(engine, first)
    record(engine, github(Q, run=2))
    claim(engine, second)
    process.kill()
    process.wait(60)
    again, freed, _ = start()
    assert (again, freed) == (first, 1)
    assert [(row["claim"] or "")[:16] for row in rows(engine)] == ["", second]
    assert rows(engine)[0]["due_at"] <= utc_now() + timedelta(seconds=1)


@ON_SQLITE
def test_a_directory_that_can_not_be_written_costs_only_the_take_over(start, tmp_path):
    nowhere = tmp_path / "missing" / "data"
    ids = {start(directory=nowhere)[0] for _ in range(2)}
    assert len(ids) == 2
    assert not nowhere.exists()
