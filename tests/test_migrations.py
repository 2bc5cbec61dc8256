"""The schema: what migrations make is what the models say, from an empty or an older store, once or many times."""

import os
import subprocess
import sys

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    JSON,
    Boolean,
    DateTime,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    inspect,
    select,
    text,
)
from sqlalchemy.exc import IntegrityError

from tests.facts import NOON, PACE, github
from webhook_app import builds, db, migrations, models
from webhook_app.lifecycle import State

REVISIONS = [
    revision.revision
    for revision in reversed(list(ScriptDirectory.from_config(migrations.config()).walk_revisions()))
]


@pytest.fixture
def empty(database_url):
    made = db.connect(database_url)
    yield made
    made.dispose()


def test_migrations_make_what_the_models_say(empty):
    migrations.upgrade(empty)
    with empty.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), models.metadata) == []
    assert migrations.is_current(empty)


def test_a_store_of_a_later_program_is_left_as_it_is(empty, database_url):
    migrations.upgrade(empty)
    with empty.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'later'"))
    command_line = [sys.executable, "-m", "webhook_app", "migrate"]
    env = os.environ | {"DATABASE_URL": database_url}
    made = subprocess.run(command_line, env=env, capture_output=True, text=True, timeout=60)
    assert made.returncode == 2
    assert made.stderr.startswith("buildrelay: the store was written by a newer BuildRelay, this one is ")
    assert made.stderr.count("\n") == 1
    assert not migrations.is_current(empty)


def test_a_second_run_changes_nothing(empty):
    migrations.upgrade(empty)
    migrations.upgrade(empty)
    with empty.connect() as connection:
        assert connection.execute(select(models.counters.c.events)).scalars().all() == [0]


@pytest.mark.parametrize("older", REVISIONS[:-1])
def test_an_older_store_is_upgraded_with_all_that_is_in_it(empty, older):
    migrations.upgrade(empty, older)
    assert not migrations.is_current(empty)
    with empty.connect().execution_options(writing=True) as connection, connection.begin():
        connection.execute(
            text(
                "INSERT INTO inbound (id, source, hook_id, event, delivery_id, headers, body, status, received_at) "
                "VALUES (1, 'github', '', 'workflow_run', 'd', '{}', :body, 'unreadable', :now)"
            ),
            {"body": b"x", "now": NOON.replace(tzinfo=None)},
        )
        connection.execute(text("UPDATE counters SET inbound = 1, events = 41"))
    migrations.upgrade(empty)
    assert migrations.is_current(empty)
    db.as_writer(empty, lambda write: builds.record(write, [github(State.QUEUED)], NOON, PACE))
    with empty.connect() as connection:
        assert connection.execute(select(models.inbound.c.delivery_id)).scalars().all() == ["d"]
        assert connection.execute(select(models.events.c.id)).scalars().all() == [42]


@pytest.mark.parametrize("older", REVISIONS[:-1])
def test_an_upgrade_keeps_every_row_of_every_table(empty, older):
    migrations.upgrade(empty, older)
    tables = MetaData()
    tables.reflect(empty, resolve_fks=True)
    filled = [table for table in tables.sorted_tables if table.name not in ("alembic_version", "counters")]
    with empty.connect().execution_options(writing=True) as connection, connection.begin():
        for table in filled:
            connection.execute(table.insert(), [{column.name: some(column) for column in table.columns}])
    with empty.connect() as connection:
        before = {table.name: connection.execute(select(table)).mappings().all() for table in filled}
    migrations.upgrade(empty)
    with empty.connect() as connection:
        after = {table.name: connection.execute(select(table)).mappings().all() for table in filled}
    assert after == before


@pytest.mark.parametrize(
    ("found", "is_read"),
    [
        ({"polling": "error", "state": "in_progress"}, True),
        ({"polling": "timeout", "state": "timeout"}, True),
        ({"polling": "done", "state": "failed"}, True),
        ({"polling": "done", "state": "failed", "told_state": "failed"}, False),
        ({"polling": "done", "state": "failed", "platform": "script"}, False),
        ({"polling": "stopped", "state": "timeout"}, False),
        ({"polling": "stopped", "state": "in_progress"}, False),
    ],
)
def test_builds_that_an_older_program_read_no_more_are_read_again(empty, found, is_read):
    migrations.upgrade(empty, "0011")
    tables = MetaData()
    tables.reflect(empty, only=["builds"])
    builds_then = tables.tables["builds"]
    row = {column.name: some(column) for column in builds_then.columns}
    row |= {"told_state": "in_progress", "platform": "github", "next_poll_at": None, **found}
    with empty.connect().execution_options(writing=True) as connection, connection.begin():
        connection.execute(builds_then.insert(), [row])
    migrations.upgrade(empty)
    with empty.connect() as connection:
        due, deadline = connection.execute(
            select(models.builds.c.next_poll_at, models.builds.c.poll_deadline_at)
        ).one()
    assert (due, deadline) == ((NOON, None) if is_read else (None, NOON))


def some(column):
    """A value that the column can hold; equal for what refers to a row and for the row."""
    kinds = (
        (JSON, []), (Boolean, True), (DateTime, NOON), (LargeBinary, b"x"), (Integer, 1), (Float, 1.5),
    )  # fmt: skip
    return next((value for kind, value in kinds if isinstance(column.type, kind)), "1")


def test_references_are_kept_after_an_upgrade(empty):
    """SQLite must not look at them while a table is made anew; afterwards it must."""
    migrations.upgrade(empty)
    with pytest.raises(IntegrityError), empty.begin() as connection:
        connection.execute(models.attempts.insert().values(build=7, **ATTEMPT))


ATTEMPT = {"attempt": 1, "state": "failed", "progress": 0, "observed_by": "push"}


def test_several_processes_may_migrate_at_once(database_url, empty, tmp_path):
    env = os.environ | {"DATABASE_URL": database_url, "BUILDRELAY_DATA_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "webhook_app", "migrate"]
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate(timeout=240)[0] for process in processes] == [
        b"The database has the present schema.\n"
    ] * 3
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert migrations.is_current(empty)


def test_each_step_can_be_taken_back(empty):
    migrations.upgrade(empty)
    made = migrations.config()
    made.attributes["engine"] = empty
    command.downgrade(made, "base")
    assert set(inspect(empty).get_table_names()) == {"alembic_version"}
