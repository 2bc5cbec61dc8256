"""Alembic runs this: one connection, one transaction, one migrator at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from alembic import context
from sqlalchemy import Connection, Engine, text

from webhook_app import deadline, models, postgres

MIGRATION_LOCK = 7_208_312_001
"""PostgreSQL advisory lock: several dynos may run their release phase at once."""


def _migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=models.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        context.run_migrations()


def _run(engine: Engine) -> None:
    opened = engine.connect().execution_options(writing=True)
    with deadline.none(), opened as connection, _unreferenced(connection), connection.begin():
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(postgres.limited(postgres.UNLIMITED))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        _migrate(connection)


@contextmanager
def _unreferenced(connection: Connection) -> Iterator[None]:
    """SQLite changes a table by making it anew and dropping the old one, which must not cascade.

    The pragma counts only outside of a transaction.  Source: https://www.sqlite.org/lang_altertable.html
    """
    if connection.dialect.name != "sqlite":
        yield
        return
    cursor = connection.connection.cursor()
    cursor.execute("PRAGMA foreign_keys=OFF")
    try:
        yield
    finally:
        cursor.execute("PRAGMA foreign_keys=ON")


if context.config.attributes.get("engine") is not None:
    _run(context.config.attributes["engine"])
