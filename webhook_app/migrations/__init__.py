"""Alembic's migrations; `upgrade()` is what `buildrelay migrate` and the tests call."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, inspect
from sqlalchemy.engine.interfaces import ReflectedColumn

from webhook_app import VERSION, models


class NewerSchema(Exception):
    """The store was written by a later program; the message is the one line a person needs."""


def config() -> Config:
    """Alembic's configuration, without a file: the scripts are found beside this one."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    made.set_main_option("path_separator", "os")
    return made


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to `revision`; safe to run twice, and from several processes at once.

    Raises `NewerSchema`, and then nothing was changed.
    """
    made = config()
    made.attributes["engine"] = engine
    try:
        command.upgrade(made, revision)
    except CommandError as error:
        if not isinstance(error.__cause__, ResolutionError):
            raise
        raise NewerSchema(
            f"the store was written by a newer BuildRelay, this one is {VERSION}: go back to it ({error})"
        ) from error


CURRENT, OLDER, NEWER, UNUSABLE = "current", "older", "newer", "unusable"


def standing(engine: Engine) -> str:
    """The schema of the store beside the one of this program.

    `older`: `buildrelay migrate` brings it.  `newer`: a later program has migrated it, and all is there that
    this one reads and writes, as between two steps of a rolling deployment.  `unusable`: it is not.
    """
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with engine.connect() as connection:
        found = set(MigrationContext.configure(connection).get_current_heads())
        ours = ScriptDirectory.from_config(config())
        if found == set(ours.get_heads()):
            return CURRENT
        if found <= {script.revision for script in ours.walk_revisions()}:
            return OLDER
        return NEWER if _has_ours(connection) else UNUSABLE


def _has_ours(connection: Connection) -> bool:
    """Are all our tables and columns there, and can a row be added that has no others?"""
    there = inspect(connection).get_multi_columns()
    for table in models.metadata.tables.values():
        columns = {column["name"]: column for column in there.get((None, table.name), [])}
        added = [column for name, column in columns.items() if name not in table.c]
        if not set(table.c.keys()) <= columns.keys() or any(map(_must_be_given, added)):
            return False
    return True


def _must_be_given(column: ReflectedColumn) -> bool:
    return not column["nullable"] and column["default"] is None and not column.get("identity")


def is_current(engine: Engine) -> bool:
    """Is the schema the one this program was written for?"""
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_heads()
    return set(found) == set(ScriptDirectory.from_config(config()).get_heads())
