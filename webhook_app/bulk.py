"""Many rows at once, straight through the driver: what every push reads and writes.

What SQLAlchemy does for each value of such a row costs several times what the database does with it
(`bench/`).  Here a statement is made once per table, and a row is a dict of the very values that
SQLAlchemy would take and give.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from operator import itemgetter
from typing import Any

import orjson
from sqlalchemy import (
    JSON,
    Boolean,
    ColumnElement,
    Connection,
    LargeBinary,
    Select,
    Table,
    TextualSelect,
    UpdateBase,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DBAPIError

from webhook_app.models import Moment

Row = Mapping[str, Any]
Convert = Callable[[Any], Any]
Statement = Select[Any] | UpdateBase | TextualSelect
Conversions = tuple[tuple[int, Convert], ...]


def insert(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    """Insert rows; all have the same columns."""
    if rows:
        _write(connection, _insertion(connection.dialect.name, table, tuple(rows[0])), rows)


def update(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    """Write rows over those with the same `id`; all have the same columns."""
    if rows:
        _write(connection, _change(connection.dialect.name, table, tuple(rows[0])), rows)


def find(connection: Connection, table: Table, column: str, values: Collection[str]) -> list[dict[str, Any]]:
    """The whole rows whose text `column` has any of these values."""
    how = _selection(connection.dialect.name, table, column)
    found = look_up(connection, how.text, values)
    return [dict(zip(how.names, _converted(row, how.conversions), strict=True)) for row in found]


def look_up(connection: Connection, query: str, values: Collection[str]) -> Sequence[tuple[Any, ...]]:
    """The rows, as the driver gives them, of a query that ends in a text column, for any of its `values`.

    PostgreSQL takes one value after the other, by the column's index: for `= ANY`, a plan from when the
    table was small would read the whole table until the next ANALYZE.
    """
    if not values:
        return ()
    array: Convert = _as_json
    text = f"{query} IN (SELECT value FROM json_each(?))"
    if connection.dialect.name == "postgresql":
        text, array = _one_by_one(query), list
    return fetch(connection, text, (array([*values]),))


def run(connection: Connection, statement: Statement, values: Row) -> list[tuple[Any, ...]]:
    """The rows of a statement of SQLAlchemy's that is kept and run again and again, with bound `values`."""
    how = _made(statement, connection.dialect)
    return [_converted(row, how.conversions) for row in fetch(connection, how.text, how.parameters(values))]


def fetch(connection: Connection, text: str, parameters: Sequence[Any] = ()) -> Sequence[tuple[Any, ...]]:
    """All rows of a statement in the driver's own words, as the driver gives them."""
    with _cursor(connection, text) as cursor:
        found: list[tuple[Any, ...]] = cursor.execute(text, parameters).fetchall()
    return found


def _write(connection: Connection, how: "_Writing", rows: Sequence[Row]) -> None:
    with _cursor(connection, how.text) as cursor:
        (cursor.executemany if how.each else cursor.execute)(how.text, how.parameters(rows))


@contextmanager
def _cursor(connection: Connection, text: str) -> Iterator[Any]:
    """The driver's cursor, its errors told as SQLAlchemy tells them; a lost connection empties the pool."""
    dialect, cursor = connection.dialect, connection.connection.cursor()
    driver_error = dialect.loaded_dbapi.Error
    try:
        yield cursor
    except driver_error as error:
        lost = dialect.is_disconnect(error, connection.connection.dbapi_connection, cursor)
        if lost:
            connection.invalidate(error)
            connection.engine.dispose()
        raise DBAPIError.instance(
            text, None, error, driver_error, connection_invalidated=lost, dialect=dialect
        ) from error
    finally:
        cursor.close()


# ---- statements ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Writing:
    """`each`: the statement is run once per row."""

    text: str
    parameters: Callable[[Sequence[Row]], Any]
    each: bool = True


@dataclass(frozen=True, slots=True)
class _Reading:
    text: str
    names: tuple[str, ...]
    conversions: Conversions


@lru_cache
def _insertion(dialect: str, table: Table, columns: tuple[str, ...]) -> _Writing:
    """SQLite runs it once per row; PostgreSQL takes all rows as one JSON array, if no bytes are in them."""
    names = _list(columns)
    into = f"INSERT INTO {_quoted(table.name)} ({names})"
    if dialect == "postgresql" and not any(isinstance(column.type, LargeBinary) for column in table.c):
        given = f"json_populate_recordset(NULL::{_quoted(table.name)}, %s::json)"
        return _Writing(f"{into} SELECT {names} FROM {given}", lambda rows: (_as_json(rows),), each=False)
    places = ", ".join([_place(dialect)] * len(columns))
    return _Writing(f"{into} VALUES ({places})", _as_tuples(dialect, table, columns))


@lru_cache
def _change(dialect: str, table: Table, columns: tuple[str, ...]) -> _Writing:
    changed = [column for column in columns if column != "id"]
    values = ", ".join(f"{_quoted(column)} = {_place(dialect)}" for column in changed)
    text = f"UPDATE {_quoted(table.name)} SET {values} WHERE id = {_place(dialect)}"
    return _Writing(text, _as_tuples(dialect, table, (*changed, "id")))


@lru_cache
def _selection(dialect: str, table: Table, column: str) -> _Reading:
    names = tuple(table.c.keys())
    text = f"SELECT {_list(names)} FROM {_quoted(table.name)} WHERE {_quoted(column)}"
    return _Reading(text, names, _conversions(_AS_READ[dialect], table.c))


@lru_cache
def _one_by_one(query: str) -> str:
    each = f"LATERAL ({query} = given.value OFFSET 0) AS found"
    return f"SELECT found.* FROM unnest(%s::text[]) AS given(value), {each}"


@dataclass(frozen=True, slots=True)
class _Made:
    text: str
    constants: Row
    written: Mapping[str, Convert]
    order: Sequence[str] | None
    """Of places without names."""
    conversions: Conversions

    def parameters(self, values: Row) -> Any:
        given = dict(self.constants)
        for name, value in values.items():
            given[name] = self.written[name](value) if name in self.written else value
        return given if self.order is None else [given[name] for name in self.order]


@lru_cache
def _made(statement: Statement, dialect: Dialect) -> _Made:
    compiled = statement.compile(dialect=dialect)
    written = _AS_WRITTEN[dialect.name]
    types = {name: type(bound.type) for name, bound in compiled.binds.items()}
    return _Made(
        str(compiled),
        compiled.params,
        {name: written[type_] for name, type_ in types.items() if type_ in written},
        compiled.positiontup,
        _conversions(_AS_READ[dialect.name], statement.exported_columns),
    )


def _place(dialect: str) -> str:
    return "?" if dialect == "sqlite" else "%s"


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(_quoted, names))


def _quoted(name: str) -> str:
    return f'"{name}"'


# ---- values ----------------------------------------------------------------------------------


def _as_json(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()


@lru_cache(1024)
def _sqlite_text(moment: datetime) -> str:
    """As `models.Moment` stores it.  Remembered: one transaction has the same few times again and again."""
    if moment.tzinfo is None:
        raise ValueError("a time without a zone can't be stored")
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")


@lru_cache(1024)
def _sqlite_moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


_AS_WRITTEN: Mapping[str, Mapping[type, Convert]] = {
    "sqlite": {Moment: _sqlite_text, JSON: _as_json},
    "postgresql": {JSON: _as_json},
}
_AS_READ: Mapping[str, Mapping[type, Convert]] = {
    "sqlite": {Moment: _sqlite_moment, JSON: orjson.loads, Boolean: bool},
    "postgresql": {Moment: _utc},
}
"""Python's value to the driver's and back, by type of column; what is not named is the same."""


def _as_tuples(dialect: str, table: Table, columns: tuple[str, ...]) -> Callable[[Sequence[Row]], Any]:
    get, conversions = (
        itemgetter(*columns),
        _conversions(_AS_WRITTEN[dialect], (table.c[name] for name in columns)),
    )
    return lambda rows: [_converted(get(row), conversions) for row in rows]


def _conversions(known: Mapping[type, Convert], columns: Iterable[ColumnElement[Any]]) -> Conversions:
    types = [type(column.type) for column in columns]
    return tuple((place, known[type_]) for place, type_ in enumerate(types) if type_ in known)


def _converted(values: Iterable[Any], conversions: Conversions) -> tuple[Any, ...]:
    found = list(values)
    for place, convert in conversions:
        if found[place] is not None:
            found[place] = convert(found[place])
    return tuple(found)
