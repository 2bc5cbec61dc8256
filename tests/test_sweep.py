"""The sweep: scripts that fell silent, and what is past its retention."""

from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import event, func, insert, select, update

from jobs import sweep as sweep_job
from tests.facts import github
from tests.stand import ON_SQLITE, stands
from webhook_app import db, deliveries, models, queues, subscribers
from webhook_app.lifecycle import Conclusion, Observation, ObservedBy, State

KEY = Fernet.generate_key().decode()


@pytest.fixture
def make_stand(engine, redis_client, monkeypatch):
    """`make_stand(platforms, builds, …)`: see `tests.stand.stands`."""
    with stands(engine, redis_client, monkeypatch) as make:
        yield make


def report(stand, state=State.IN_PROGRESS, key="script:run-1"):
    stand.record(
        Observation(
            source="script", platform="script", observed_by=ObservedBy.REPORT, key=key, build_id=key,
            state=state, conclusion=Conclusion.SUCCESS if state is State.COMPLETED else None,
            raw_status=state.value,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Script:
    build_id: str = "script:run-1"


def sweep(stand, after=0.0):
    stand.clock.advance(after)
    sweep_job.sweep(stand.held)


def test_the_sweep_tells_that_pushes_are_gone_once_time_has_shown_it(make_stand):
    stand = make_stand(("github",), 0, GITHUB_WEBHOOK_SECRET="secret-of-the-hook")
    sweep(stand)
    stand.record(*[github(State.QUEUED, run=run, by="poll", platform_at=stand.now()) for run in range(5)])
    sweep(stand, after=59)
    assert stand.notices("source.deaf") == []
    sweep(stand, after=1)
    assert len(stand.notices("source.deaf")) == 1


def test_a_script_that_falls_silent_is_failed_and_a_later_report_undoes_it(make_stand):
    stand, script = make_stand(("jenkins",), 0), Script()
    report(stand)
    sweep(stand, after=89)
    report(stand)
    sweep(stand, after=89)
    assert stand.row(script)["state"] == "in_progress"
    assert not stand.redis.exists(queues.bell_key(queues.DELIVER))
    sweep(stand, after=1)
    row = stand.row(script)
    assert (row["state"], row["conclusion"], row["error"]) == ("failed", "failure", "no heartbeat for 90 s")
    assert stand.redis.exists(queues.bell_key(queues.DELIVER))
    sweep(stand, after=3600)
    assert stand.types(script) == ["in_progress", "failed"]
    report(stand)
    assert (stand.row(script)["state"], stand.row(script)["error"]) == ("in_progress", None)
    report(stand, State.COMPLETED)
    sweep(stand, after=3600)
    assert stand.types(script) == ["in_progress", "failed", "in_progress", "completed"]


@ON_SQLITE
def test_the_heartbeat_timeout_is_a_setting(make_stand):
    stand, script = make_stand(("jenkins",), 0, HEARTBEAT_TIMEOUT="10"), Script()
    report(stand)
    sweep(stand, after=10)
    assert stand.row(script)["error"] == "no heartbeat for 10 s"


@ON_SQLITE
def test_the_sweep_leaves_other_platforms_alone_and_polls_leave_scripts_alone(make_stand):
    stand = make_stand(("github",), 1, speed=0.01)
    (build,) = stand.world.builds
    stand.push(build)
    report(stand)
    sweep(stand, after=3600)
    assert stand.row(build)["state"] == "in_progress"
    report(stand, key="script:run-2")
    stand.poll(after=80)
    assert stand.row(Script("script:run-2"))["poll_count"] == 0


def test_more_silent_scripts_than_a_portion_are_failed_in_turn(make_stand, monkeypatch):
    monkeypatch.setattr(sweep_job, "MOST_AT_ONCE", 3)
    stand = make_stand(("jenkins",), 0)
    for number in range(5):
        report(stand, key=f"script:{number}")
    sweep(stand, after=90)
    sweep(stand)
    assert {stand.row(Script(f"script:{number}"))["state"] for number in range(5)} == {"failed"}


# ---- retention


def counts(stand):
    with db.reading(stand.engine) as connection:
        tables = (models.inbound, models.events, models.messages, models.delivery_attempts)
        return [connection.execute(select(func.count()).select_from(table)).scalar() for table in tables]


def remember(stand, numbers):
    """Builds with an event, a message, a delivery attempt and a raw delivery each, at the present time."""
    for number in numbers:
        report(stand, key=f"script:{number}")
        event = stand.events(Script(f"script:{number}"))[0]
        message = {
            "id": number, "message_id": f"msg_{number}", "subscriber": "sub", "event": event["id"],
            "state": "delivered", "attempts": 1, "created_at": stand.now(),
        }  # fmt: skip
        tried = {"message": number, "number": 1, "started_at": stand.now(), "duration_ms": 5}
        raw = {
            "id": number, "source": "script", "hook_id": "", "event": "x", "delivery_id": str(number),
            "headers": {}, "body": b"", "status": "accepted", "received_at": stand.now(),
        }  # fmt: skip

        def unit(write, raw=raw, message=message, tried=tried):
            write.connection.execute(insert(models.inbound), raw)
            write.connection.execute(insert(models.messages), message)
            write.connection.execute(insert(models.delivery_attempts), tried)

        db.as_writer(stand.engine, unit)


def test_what_is_past_its_retention_goes_in_portions_and_the_rest_stays(make_stand, monkeypatch):
    monkeypatch.setattr(sweep_job, "MOST_AT_ONCE", 3)
    stand = make_stand(("jenkins",), 0, RETENTION_DAYS="30")
    db.as_writer(
        stand.engine,
        lambda write: write.connection.execute(
            insert(models.subscribers),
            {"id": "sub", "url": "https://example.com", "events": [], "sources": [], "repositories": [],
             "branches": [], "ordered": True, "signing": "hmac", "secrets": "", "state": "disabled",
             "failures": 0, "created_at": stand.now(), "updated_at": stand.now()},
        ),
    )  # fmt: skip
    remember(stand, range(1, 6))
    stand.clock.advance(29 * 86_400)
    remember(stand, range(6, 9))
    before = counts(stand)
    assert before == [8, 8, 8, 8]
    forget(stand)
    assert counts(stand) == before
    stand.clock.advance(2 * 86_400)
    forget(stand)
    assert counts(stand) == [5, 5, 5, 5]
    forget(stand)
    forget(stand)
    assert counts(stand) == [3, 3, 3, 3]
    assert stand.row(Script("script:1")) is not None, "the build itself stays"
    assert stand.events(Script("script:1")) == []
    assert len(stand.events(Script("script:6"))) == 1


def forget(stand):
    """One portion of each kind."""
    before = stand.now() - timedelta(days=stand.held.settings.retention_days)
    sweep_job.in_portions(stand.engine, sweep_job.retention(before, stand.now()), until=0.0)


def test_a_sweep_of_many_rows_lets_others_write_in_between(make_stand, monkeypatch):
    """No transaction has more rows than a portion, however many there are."""
    monkeypatch.setattr(sweep_job, "MOST_AT_ONCE", 10)
    monkeypatch.setattr(sweep_job, "BUSY_SECONDS", 600.0)
    stand = make_stand(("jenkins",), 0, RETENTION_DAYS="1")
    add_inbound(stand, 300)
    left = []
    event.listen(stand.engine, "commit", lambda _: left.append(number_of_inbound(stand)))
    sweep(stand, after=2 * 86_400)
    assert left[-1] == 0
    assert max(before - after for before, after in pairwise(left)) == 10


def test_a_sweep_that_is_not_done_in_its_time_comes_again(make_stand, monkeypatch):
    monkeypatch.setattr(sweep_job, "MOST_AT_ONCE", 10)
    monkeypatch.setattr(sweep_job, "BUSY_SECONDS", 0.0)
    stand = make_stand(("jenkins",), 0, RETENTION_DAYS="1")
    add_inbound(stand, 15)
    found = []
    for days in (2, 0):
        sweep(stand, after=days * 86_400)
        found.append((number_of_inbound(stand), stand.redis.exists(queues.bell_key(queues.SWEEP))))
        stand.redis.flushall()
    assert found == [(5, 1), (0, 0)]


def add_inbound(stand, count):
    rows = [
        {"id": number, "source": "script", "hook_id": "", "event": "x", "delivery_id": str(number), "headers": {},
         "body": b"", "status": "accepted", "received_at": stand.now()}
        for number in range(count)
    ]  # fmt: skip
    db.as_writer(stand.engine, lambda write: write.connection.execute(insert(models.inbound), rows))


def number_of_inbound(stand):
    with db.reading(stand.engine) as connection:
        return connection.execute(select(func.count()).select_from(models.inbound)).scalar_one()


def test_old_notices_go_in_portions(make_stand, monkeypatch):
    monkeypatch.setattr(sweep_job, "MOST_AT_ONCE", 3)
    stand = make_stand(("jenkins",), 0, RETENTION_DAYS="30")
    for number in range(5):
        report(stand, key=f"script:{number}")
    stand.clock.advance(29 * 86_400)
    report(stand, key="script:new")
    left = []
    for days in (0, 2, 0, 0):
        stand.clock.advance(days * 86_400)
        forget(stand)
        left.append([notice["subject"] for notice in stand.notices()])
    assert [len(each) for each in left] == [6, 3, 1, 1]
    assert left[-1] == ["script:new"]


@ON_SQLITE
def test_the_sweep_forgets_by_itself(make_stand):
    stand = make_stand(("jenkins",), 0, RETENTION_DAYS="1")
    report(stand, State.COMPLETED)
    sweep(stand, after=86_400 + 1)
    assert stand.events(Script()) == []


def test_an_event_that_somebody_is_still_to_get_is_kept(make_stand):
    stand = make_stand(("jenkins",), 0, RETENTION_DAYS="1")
    wanted = {"url": "https://ci.example.com/", "signing": "hmac"}
    row, _ = db.as_writer(stand.engine, lambda write: subscribers.create(write, wanted, (KEY,), stand.now()))
    report(stand)
    report(stand, State.COMPLETED)
    first = stand.events(Script())[0]["id"]
    settled = update(models.messages).where(models.messages.c.event == first).values(state="delivered")
    db.in_transaction(stand.engine, lambda connection: connection.execute(settled))
    sweep(stand, after=86_400 + 1)
    assert [event["data"]["state"] for event in stand.events(Script())] == ["completed"]
    db.as_writer(
        stand.engine, lambda write: deliveries.bury(write.connection, row["id"], "tls", 9, stand.now())
    )
    sweep(stand)
    assert stand.events(Script()) == []
