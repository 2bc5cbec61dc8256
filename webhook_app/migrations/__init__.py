"""Alembic's migrations; `upgrade()` is what `buildrelay migrate` and the tests call."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from sqlalchemy import Engine

from webhook_app import VERSION


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


def is_current(engine: Engine) -> bool:
    """Is the schema the one this program was written for?"""
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_heads()
    return set(found) == set(ScriptDirectory.from_config(config()).get_heads())
