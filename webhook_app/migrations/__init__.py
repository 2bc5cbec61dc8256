"""Alembic's migrations; `upgrade()` is what `buildrelay migrate` and the tests call."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine


def config() -> Config:
    """Alembic's configuration, without a file: the scripts are found beside this one."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    made.set_main_option("path_separator", "os")
    return made


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to `revision`; safe to run twice, and from several processes at once."""
    made = config()
    made.attributes["engine"] = engine
    command.upgrade(made, revision)


def is_current(engine: Engine) -> bool:
    """Is the schema the one this program was written for?"""
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_heads()
    return set(found) == set(ScriptDirectory.from_config(config()).get_heads())
