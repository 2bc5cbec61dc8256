"""The order of processes that write to one SQLite file: fair, reception first, and never in anybody's way."""

import multiprocessing
import os
import signal
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median

import pytest
from sqlalchemy import text

from tests.facts import NOON, PACE
from webhook_app import db, inbox, platforms, write_queue
from webhook_app.db import StoreUnavailable
from webhook_app.write_queue import NEXT, QUEUED, WRITING, WriteQueue

SPAWN = multiprocessing.get_context("spawn")
COUNT = text("UPDATE t SET n = n + 1")


@pytest.fixture
def url(tmp_path):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    engine = db.connect(url)
    db.in_transaction(engine, lambda connection: connection.execute(text("CREATE TABLE t (n INTEGER)")))
    db.in_transaction(engine, lambda connection: connection.execute(text("INSERT INTO t VALUES (0)")))
    engine.dispose()
    return url


@pytest.fixture
def patient(monkeypatch):
    """Nobody gives up a turn, or takes reception's, because this machine is slow."""
    monkeypatch.setattr(write_queue, "LONGEST_WAIT_SECONDS", 600.0)
    monkeypatch.setattr(write_queue, "PATIENCE_SECONDS", 600.0)


def is_locked(path, place):
    """Does any process, or another `WriteQueue` of this one, hold that place?"""
    writers = write_queue._Writers(place)
    assert writers.open(path.with_name(path.name + "-queue"))
    try:
        return writers._is_locked(place)
    finally:
        os.close(writers._file)


# ---- several processes ---------------------------------------------------------------------------


def _write_on(url, ready):
    """Transactions of some work each, one right after the other, for ever."""
    engine = db.connect(url)

    def unit(connection):
        connection.execute(COUNT)
        connection.execute(text("SELECT sum(value) FROM (WITH RECURSIVE s(value) AS (SELECT 1 UNION ALL"
                                " SELECT value + 1 FROM s WHERE value < 10000) SELECT value FROM s)"))  # fmt: skip

    while True:
        db.in_transaction(engine, unit)
        ready.set()


@contextmanager
def busy_writers(url, number):
    ready = [SPAWN.Event() for _ in range(number)]
    processes = [SPAWN.Process(target=_write_on, args=(url, one), daemon=True) for one in ready]
    for process in processes:
        process.start()
    try:
        for one in ready:
            assert one.wait(60)
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize(("writers", "first", "most"), [(1, False, 3), (3, False, 12), (3, True, 3)])
def test_whoever_writes_all_the_time_lets_others_in_after_a_few_transactions(
    url, writers, first, most, wait_until
):
    """Counted in transactions of the others, from just before one asks for its turn until it has it."""
    engine, waits, found = db.connect(url), [], 0

    def count():
        with db.reading(engine) as connection:
            return connection.execute(text("SELECT n FROM t")).scalar_one()

    with busy_writers(url, writers):
        for _ in range(15):
            wait_until(lambda: count() > found)  # noqa: B023  the others are at it again
            before = count()
            found = db.in_transaction(
                engine,
                lambda connection: connection.execute(text("SELECT n FROM t")).scalar_one(),
                first=first,
            )
            waits.append(found - before)
    engine.dispose()
    assert median(waits) <= most, waits


def _hold(path, held):
    with WriteQueue(path).turn(first=False):
        held.set()
        signal.pause()


def _hold_both(url, held):
    def unit(connection):
        connection.execute(COUNT)
        held.set()
        signal.pause()

    db.in_transaction(db.connect(url), unit)


@contextmanager
def holder(target, argument):
    """A process that does this, once it holds what it holds."""
    held = SPAWN.Event()
    process = SPAWN.Process(target=target, args=(argument, held), daemon=True)
    process.start()
    try:
        assert held.wait(60)
        yield process.pid
    finally:
        process.kill()
        process.join()


def test_a_killed_process_leaves_its_turn(tmp_path, patient):
    path = tmp_path / "x.db"
    path.touch()
    with holder(_hold, str(path)) as pid, ThreadPoolExecutor(1) as pool:
        entered = pool.submit(_enter, WriteQueue(str(path)), path)
        assert is_locked(path, WRITING)
        assert not entered.done()
        os.kill(pid, signal.SIGKILL)
        assert entered.result(60)


def _enter(stile, path):
    with stile.turn(first=False):
        return is_locked(path, WRITING)


def test_a_stopped_process_costs_the_others_their_order_and_nothing_else(url, tmp_path, monkeypatch):
    monkeypatch.setattr(write_queue, "LONGEST_WAIT_SECONDS", 0.05)
    engine = db.connect(url)
    with holder(_hold, str(tmp_path / "x.db")) as pid:
        os.kill(pid, signal.SIGSTOP)
        db.in_transaction(engine, lambda connection: connection.execute(COUNT), first=True)
        # Once is enough: the next ones do not wait for it at all.
        monkeypatch.setattr(write_queue, "LONGEST_WAIT_SECONDS", 3600.0)
        for first in (True, False):
            db.in_transaction(engine, lambda connection: connection.execute(COUNT), first=first)
    with db.reading(engine) as connection:
        assert connection.execute(text("SELECT n FROM t")).scalar_one() == 3
    engine.dispose()


def test_a_process_that_is_stopped_in_its_transaction_makes_the_store_unavailable(
    url, monkeypatch, wait_until
):
    monkeypatch.setattr(write_queue, "LONGEST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(write_queue, "BYPASS_SECONDS", 0.05)
    monkeypatch.setattr(db, "RECEPTION_BUSY_SECONDS", 0.05)
    engine = db.connect(url, busy_seconds=0.05)
    with holder(_hold_both, url) as pid:
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(StoreUnavailable, match="locked"):
            db.in_transaction(engine, lambda connection: connection.execute(COUNT), first=True)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: _counts(engine))
    engine.dispose()


def _counts(engine):
    try:
        db.in_transaction(engine, lambda connection: connection.execute(COUNT))
    except StoreUnavailable:
        return False
    return True


# ---- the order, step by step ---------------------------------------------------------------------


@pytest.fixture
def steps(tmp_path, wait_until):
    """`steps(stile, first, name)` waits for a turn in a thread; when it is there the name is noted."""
    path, noted = tmp_path / "x.db", []
    path.touch()
    pool = ThreadPoolExecutor(8)

    def enter(stile, first, name):
        with stile.turn(first):
            noted.append(name)

    def wait(first, name):
        future = pool.submit(enter, WriteQueue(str(path)), first, name)
        wait_until(lambda: is_locked(path, NEXT if first else QUEUED))
        return future

    wait.path, wait.noted = path, noted
    yield wait
    pool.shutdown()


def test_reception_comes_before_those_that_waited(steps, patient):
    with WriteQueue(str(steps.path)).turn(first=False):
        futures = [steps(False, "worker"), steps(True, "reception")]
    for future in futures:
        future.result(60)
    assert steps.noted == ["reception", "worker"]


def test_whoever_has_waited_too_long_comes_before_reception(steps, patient, monkeypatch, wait_until):
    with WriteQueue(str(steps.path)).turn(first=True):
        monkeypatch.setattr(write_queue, "PATIENCE_SECONDS", 0.0)
        overdue = steps(False, "worker")
        wait_until(lambda: is_locked(steps.path, write_queue.OVERDUE))
        futures = [overdue, steps(True, "reception")]
    for future in futures:
        future.result(60)
    assert steps.noted == ["worker", "reception"]


def test_threads_of_one_process_come_in_their_order(tmp_path, patient, wait_until):
    stile, noted = WriteQueue(str(tmp_path / "x.db")), []

    def enter(name):
        with stile.turn(first=True):
            noted.append(name)

    line, threads = stile._writers[True].lock, []
    (tmp_path / "x.db").touch()
    with stile.turn(first=True):
        for name in "abcde":
            threads.append(threading.Thread(target=enter, args=name))
            threads[-1].start()
            wait_until(lambda: len(line._waiting) == len(threads))
    for thread in threads:
        thread.join(60)
    assert noted == list("abcde")


def test_a_thread_that_gives_up_leaves_the_line(wait_until):
    line = write_queue._FairLock()
    assert line.enter(0)
    assert not line.enter(0.01)
    line.leave()
    assert line.enter(0)


def test_pushes_are_taken_as_the_first(migrated_sqlite, tmp_path, patient, wait_until):
    path = tmp_path / "x.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    engine = db.connect(f"sqlite:///{path}")
    source = platforms.Source(name="github", platform="github")
    arrival = inbox.read(source, {"x-github-event": "ping", "x-github-delivery": "1"}, b"{}")
    with ThreadPoolExecutor(1) as pool:
        with WriteQueue(str(path)).turn(first=False):
            taken = pool.submit(inbox.take, engine, [arrival], NOON, PACE)
            wait_until(lambda: is_locked(path, NEXT))
        assert len(taken.result(60)) == 1
    engine.dispose()


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_the_file_has_the_mode_of_the_database(tmp_path, mode):
    path = tmp_path / "x.db"
    path.touch()
    path.chmod(mode)
    with WriteQueue(str(path)).turn(first=True):
        assert stat.S_IMODE((tmp_path / "x.db-queue").stat().st_mode) == mode


def test_without_such_a_file_transactions_go_on_as_before(url, tmp_path):
    """Here it is a link to a file of somebody else, which is left alone."""
    theirs, queue = tmp_path / "theirs", tmp_path / "x.db-queue"
    theirs.write_text("theirs")
    queue.unlink()
    queue.symlink_to(theirs)
    engine = db.connect(url)
    with engine.execution_options().get_execution_options()["write_queue"].turn(first=True):
        db.in_transaction(engine, lambda connection: connection.execute(COUNT))
    engine.dispose()
    assert theirs.read_text() == "theirs"


def test_a_store_in_memory_has_no_write_queue():
    for url in ("sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"):
        assert db.connect(url).get_execution_options()["write_queue"] is None
    assert "write_queue" not in db.connect("postgresql+psycopg://nobody@/none").get_execution_options()
