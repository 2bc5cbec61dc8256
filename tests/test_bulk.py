"""Rows straight through the driver: the same values as through SQLAlchemy, its errors, and no table read whole."""

from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import bindparam, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from tests.facts import NOON, PACE, at, github
from webhook_app import builds, bulk, db, models
from webhook_app.lifecycle import State

BODY = bytes(range(256))
TEXT = "a 'quoted' \"word\", \\ and \\n; %s ? :x {} ünïcödé 𝄞 \t\n"


def inbound(id_, **more):
    return {
        "id": id_, "delivery_key": f"key {id_}", "source": "github", "hook_id": "", "event": "ping",
        "delivery_id": TEXT, "headers": {"b": TEXT, "a": "1"}, "body": BODY, "status": "applied",
        "reason": None, "build": None, "received_at": NOON,
    } | more  # fmt: skip


def event(id_, **more):
    data = {"z": TEXT, "a": [1.5, None, True, {"deep": 2**53}], "m": {}}
    return {
        "id": id_, "build": None, "sequence": id_, "type": "build.queued", "data": data, "change": None,
        "observed_by": "push", "timestamp": at(0.000001),
    } | more  # fmt: skip


def all_rows(connection, table):
    return [dict(row) for row in connection.execute(select(table).order_by(table.c.id)).mappings()]


@pytest.mark.parametrize(("table", "row"), [(models.inbound, inbound), (models.events, event)])
def test_what_is_inserted_is_what_sqlalchemy_would_have_inserted(engine, table, row):
    given = [row(1), row(2), row(3)]
    with engine.begin() as connection:
        bulk.insert(connection, table, given[:2])
        connection.execute(insert(table), given[2:])
    with db.reading(engine) as connection:
        assert all_rows(connection, table) == given
        json, moment = ("headers", "received_at") if table is models.inbound else ("data", "timestamp")
        stored = text(f"SELECT CAST({json} AS text), CAST({moment} AS text) FROM {table.name}")
        assert len(set(connection.execute(stored).all())) == 1  # to the byte


def test_a_kept_statement_gives_what_sqlalchemy_would_give(engine):
    e, given = models.events.c, {"when": at(5), "change": "broke", "what": {"words": TEXT}}
    values = {"timestamp": bindparam("when"), "data": bindparam("what"), "change": bindparam("change")}
    change = update(models.events).where(e.sequence > 1).values(values).returning(e.id, e.data, e.timestamp)
    with engine.begin() as connection:
        bulk.insert(connection, models.events, [event(1), event(2)])
        assert bulk.run(connection, change, given) == [(2, given["what"], given["when"])]
        assert connection.execute(change, given).all() == bulk.run(connection, change, given)
        assert (
            bulk.run(connection, select(e.id).where(e.change == bindparam("change")), {"change": "fixed"})
            == []
        )


def test_no_rows_are_no_statement(engine):
    with engine.begin() as connection:
        bulk.insert(connection, models.inbound, [])
        bulk.update(connection, models.inbound, [])
        assert bulk.find(connection, models.inbound, "delivery_key", []) == []


def test_whole_rows_are_found_changed_and_found_again(engine):
    facts = [github(State.IN_PROGRESS, run=run, started_at=at(run / 7)) for run in range(1, 4)]
    db.as_writer(engine, lambda write: builds.record(write, facts, NOON, PACE))
    with engine.begin() as connection:
        expected = all_rows(connection, models.builds)
        found = bulk.find(connection, models.builds, "key", {"github:1", "github:3", "github:9", TEXT})
        assert sorted(found, key=lambda row: row["id"]) == [expected[0], expected[2]]
        assert all(row["started_at"].tzinfo is NOON.tzinfo and row["waiting"] is False for row in found)
        changed = [
            row
            | {
                "jobs": {"1": {"name": TEXT}},
                "waiting": True,
                "ended_at": None,
                "started_at": at(9),
                "error": TEXT,
            }
            for row in found
        ]
        bulk.update(connection, models.builds, changed)
    with db.reading(engine) as connection:
        after = {row["id"]: row for row in all_rows(connection, models.builds)}
        assert after == {row["id"]: row for row in [*changed, expected[1]]}


def test_times_are_stored_in_utc_and_never_without_a_zone(engine):
    east = datetime(2026, 11, 1, 14, 0, 0, tzinfo=timezone(timedelta(hours=2)))
    with engine.begin() as connection:
        bulk.insert(connection, models.inbound, [inbound(1, received_at=east)])
        assert all_rows(connection, models.inbound)[0]["received_at"] == NOON
        stored = connection.execute(text("SELECT CAST(received_at AS text) FROM inbound")).scalar_one()
        assert stored.startswith("2026-11-01 12:00:00")


def test_a_time_without_a_zone_is_refused(tmp_path):
    engine = db.connect(f"sqlite:///{tmp_path / 'x.db'}")
    models.metadata.create_all(engine)
    with engine.begin() as connection, pytest.raises(ValueError, match="without a zone"):
        bulk.insert(connection, models.inbound, [inbound(1, received_at=NOON.replace(tzinfo=None))])
    engine.dispose()


def test_the_drivers_errors_are_told_as_sqlalchemy_tells_them(engine):
    with pytest.raises(IntegrityError) as told, engine.begin() as connection:
        bulk.insert(connection, models.inbound, [inbound(1), inbound(1)])
    assert not told.value.connection_invalidated
    with db.reading(engine) as connection:
        assert all_rows(connection, models.inbound) == []


def test_a_connection_that_is_lost_on_the_way_makes_the_whole_unit_run_again(postgres_engine):
    lost = []

    def unit(write):
        bulk.insert(write.connection, models.inbound, [inbound(write.new_id("inbound"))])
        if not lost:
            lost.append(write.connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
            with postgres_engine.begin() as other:
                other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": lost[0]})
        return bulk.find(write.connection, models.inbound, "delivery_key", ["key 1"])

    assert len(db.as_writer(postgres_engine, unit)) == 1
    with db.reading(postgres_engine) as connection:
        assert len(all_rows(connection, models.inbound)) == 1


def test_an_error_is_a_dbapi_error_with_the_drivers_own_inside(engine):
    with pytest.raises(DBAPIError) as told, engine.begin() as connection:
        bulk.look_up(connection, "SELECT nothing FROM nowhere WHERE nobody", ["x"])
    assert isinstance(told.value.orig, engine.dialect.loaded_dbapi.Error)


def test_a_table_that_grew_is_not_read_whole_by_plans_from_when_it_was_small(postgres_engine):
    """Without ANALYZE: autovacuum comes once a minute, reception begins at once."""
    with postgres_engine.begin() as connection:
        for first in range(1, 600, 20):  # more than the five runs after which a plan is kept
            bulk.insert(connection, models.inbound, [inbound(first + place) for place in range(20)])
            keys = [f"key {first + place}" for place in range(20)]
            assert len(bulk.find(connection, models.inbound, "delivery_key", keys)) == 20
    read = text("SELECT pg_stat_get_xact_tuples_returned('inbound'::regclass)")  # by sequential scans
    with postgres_engine.begin() as connection:
        assert len(bulk.find(connection, models.inbound, "delivery_key", ["key 1", "key 599"])) == 2
        assert connection.execute(read).scalar_one() == 0
