"""Transactions: group commit, lost races, a store that is away, and several processes that write at once."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select, text

from tests.facts import NOON, PACE, github
from webhook_app import builds, db, models
from webhook_app.db import GroupCommit, StoreUnavailable
from webhook_app.lifecycle import State


class Recorder:
    """A unit of group commit that remembers its groups, and can be held up."""

    def __init__(self):
        self.groups = []
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, arguments):
        self.groups.append(list(arguments))
        self.entered.set()
        assert self.go_on.wait(60)
        if "bad" in arguments:
            raise ValueError("bad")
        return [f"done {argument}" for argument in arguments]


def test_a_lone_argument_does_not_wait_for_company():
    unit = Recorder()
    assert GroupCommit(unit)("a") == "done a"
    assert unit.groups == [["a"]]


def _hold_and_fill(unit, group, arguments, wait_until, join=True):
    """Start one call that is held up, then the others behind it; their futures."""
    unit.go_on.clear()
    pool = ThreadPoolExecutor(16)
    first = pool.submit(group, "first")
    assert unit.entered.wait(60)
    others = [pool.submit(group, argument) for argument in arguments]
    wait_until(lambda: len(group._waiting) == len(arguments))
    unit.go_on.set()
    pool.shutdown(wait=join)
    return [first, *others]


def test_what_comes_meanwhile_goes_together(wait_until):
    unit = Recorder()
    futures = _hold_and_fill(unit, GroupCommit(unit), list("abcde"), wait_until)
    assert [future.result() for future in futures] == ["done first", *(f"done {name}" for name in "abcde")]
    assert [len(group) for group in unit.groups] == [1, 5]


def test_a_group_has_a_limit(wait_until):
    unit = Recorder()
    _hold_and_fill(unit, GroupCommit(unit, most=2), list("abcde"), wait_until)
    assert [len(group) for group in unit.groups] == [1, 2, 2, 1]


def test_one_bad_argument_costs_the_others_nothing(wait_until):
    unit = Recorder()
    futures = _hold_and_fill(unit, GroupCommit(unit), ["a", "bad", "b"], wait_until)
    results = [future.exception() or future.result() for future in futures]
    assert [str(result) for result in results] == ["done first", "done a", "bad", "done b"]


def test_what_follows_a_group_holds_up_neither_its_members_nor_the_next(wait_until):
    """Ringing Redis may take half a second: only the thread that led waits for it."""
    unit, told, heard = Recorder(), [], threading.Event()

    def after(results):
        told.append(list(results))
        if len(told) == 2:
            assert heard.wait(60)

    group = GroupCommit(unit, after=after)
    futures = _hold_and_fill(unit, group, ["a", "bad", "b"], wait_until, join=False)
    wait_until(lambda: len(told) == 2)
    wait_until(lambda: sum(future.done() for future in futures) == 3)  # all but the one that led
    assert group("c") == "done c"
    heard.set()
    wait_until(lambda: all(future.done() for future in futures))
    assert told[:2] == [["done first"], ["done a", "done b"]]  # a failure has no result


def test_a_store_that_is_away_is_told_to_all_at_once(wait_until):
    calls = []

    def unit(arguments):
        calls.append(list(arguments))
        raise StoreUnavailable("gone")

    with pytest.raises(StoreUnavailable):
        GroupCommit(unit)("a")
    assert calls == [["a"]]


def test_ids_are_given_in_order_and_survive_a_rollback(engine):
    def fail(write):
        write.new_id("events")
        raise RuntimeError

    assert db.as_writer(engine, lambda write: write.new_id("events")) == 1
    with pytest.raises(RuntimeError):
        db.as_writer(engine, fail)
    assert db.as_writer(engine, lambda write: write.new_id("events")) == 2


def test_an_unreachable_postgresql_is_unavailable():
    engine = db.connect("postgresql+psycopg://nobody@127.0.0.1:1/none")
    with pytest.raises(StoreUnavailable):
        db.as_writer(engine, lambda write: None)
    with pytest.raises(StoreUnavailable), db.reading(engine) as connection:
        connection.execute(select(1))


def test_reads_find_living_connections_after_the_database_was_restarted(postgres_engine):
    pid, end = text("SELECT pg_backend_pid()"), text("SELECT pg_terminate_backend(:pid)")
    with postgres_engine.connect() as one, postgres_engine.connect() as two:
        pooled = {each.execute(pid).scalar_one() for each in (one, two)}
    with postgres_engine.connect() as server:
        (lost,) = pooled - {server.execute(pid).scalar_one()}
        server.execute(end, {"pid": lost})
    with db.reading(postgres_engine) as one, db.reading(postgres_engine) as two:
        assert lost not in {each.execute(pid).scalar_one() for each in (one, two)}


def test_a_locked_sqlite_is_waited_for(tmp_path):
    engine = db.connect(f"sqlite:///{tmp_path / 'x.db'}")
    db.in_transaction(engine, lambda connection: connection.execute(text("CREATE TABLE t (n INTEGER)")))
    holder = engine.connect().execution_options(writing=True)
    transaction = holder.begin()
    holder.execute(text("INSERT INTO t VALUES (1)"))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(
            db.in_transaction, engine, lambda connection: connection.execute(text("INSERT INTO t VALUES (2)"))
        )
        assert not other.done()
        transaction.commit()
        holder.close()
        other.result(60)
    with db.reading(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM t")).scalar() == 2
    engine.dispose()


def _write_many(url, number, runs):
    engine = db.connect(url)
    for run in range(1, runs + 1):
        for state in (State.QUEUED, State.IN_PROGRESS, State.COMPLETED):
            fact = github(state, run=run)
            db.as_writer(engine, lambda write, fact=fact: builds.record(write, [fact], NOON, PACE))
    engine.dispose()


def test_many_processes_that_write_the_same_builds_make_each_change_once(store_url, engine):
    runs, context = 12, multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_many, args=(store_url, n, runs)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    with db.reading(engine) as connection:
        ids = connection.execute(select(models.events.c.id).order_by(models.events.c.id)).scalars().all()
        states = connection.execute(select(models.builds.c.state)).scalars().all()
        per_build = connection.execute(
            select(func.count(), func.max(models.events.c.sequence)).group_by(models.events.c.build)
        ).all()
    assert states == ["completed"] * runs
    assert list(ids) == list(range(1, len(ids) + 1))
    # however the four interleave, a build has at most its three changes, without gaps
    assert all(count == last <= 3 for count, last in per_build)


def test_a_reader_of_the_cursor_never_sees_an_id_appear_behind_it(store_url, engine):
    """Events become visible in the order of their ids, though several processes write."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_many, args=(store_url, n, 15)) for n in range(3)]
    for process in processes:
        process.start()
    seen, cursor = [], 0
    while True:
        alive = any(process.is_alive() for process in processes)
        with db.reading(engine) as connection:
            fresh = (
                connection.execute(
                    select(models.events.c.id).where(models.events.c.id > cursor).order_by(models.events.c.id)
                )
                .scalars()
                .all()
            )
        seen += fresh
        cursor = seen[-1] if seen else 0
        if not alive and not fresh:
            break
    assert seen == list(range(1, len(seen) + 1))
    assert all(process.exitcode == 0 for process in processes)
