"""How long the earlier builds of a workflow and branch took.

Looked up for batches by whoever polls, and for one build by whoever asks how far it is; never by
reception.  What a running build is expected to take is then kept in its row (`keep`), so that it
does not change while the build runs.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, FromClause, Select, bindparam, or_, select, true, update

from webhook_app import models
from webhook_app.db import Write
from webhook_app.progress import EXPECTED, Expectation

__all__ = ["Expectation", "expectations", "keep"]

Row = Mapping[Any, Any]

LOOK_BACK = 200
"""The newest builds that are looked through for those that count."""
FARTHEST = 250_000
"""What lies so many builds back is no history: for a rare line among few, PostgreSQL may choose to walk down
the ids of all builds, and has to stop somewhere."""
MOST = 20
"""The number of those that count that is taken, the newest first."""
FEW = 3
"""A branch with fewer is judged by its workflow; where there are fewer first attempts re-runs count too."""

_BRANCH = ("source", "repository", "workflow", "branch")
_WORKFLOW = _BRANCH[:3]
_NEEDED = (
    "id", "workflow", "attempt", "state", "told_state", "conclusion", "started_at", "ended_at", "platform",
    "started_synthetic", "ended_synthetic", "is_fork",
)  # fmt: skip

_b = models.builds.c
_now = models.builds.alias("now")
_earlier = models.builds.alias("earlier")


def expectations(connection: Connection, builds: Iterable[Row], least: int = FEW) -> dict[int, Expectation]:
    """What builds are expected to take, by `id`; those without any history are left out.

    A branch with fewer than `least` earlier builds is judged by its workflow.  However many builds there
    are: one statement for their branches, and one for those with fewer (another each where a repository,
    workflow or branch is unknown).
    """
    builds = list(builds)
    found = _look_up(connection, builds, _BRANCH)
    rest = [build for build in builds if build["id"] not in found or found[build["id"]].count < least]
    return found | _look_up(connection, rest, _WORKFLOW)


def keep(write: Write, build: Row, expected: Expectation) -> Row:
    """Keep what this attempt is expected to take, unless somebody else has; the build with what is kept."""
    same = (_b.id == build["id"]) & (_b.attempt == build["attempt"])
    known = write.connection.execute(select(_b.report).where(same)).scalar_one_or_none()
    if known is None:
        return build  # a later attempt has begun
    report = {EXPECTED: list(expected.seconds)} | known
    if EXPECTED not in known:
        write.connection.execute(update(models.builds).where(same).values(report=report))
    return {**build, "report": report}


def _look_up(connection: Connection, builds: Iterable[Row], line: Sequence[str]) -> dict[int, Expectation]:
    """Builds of one line expect the same: the first one is asked for, for all."""
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for build in builds:
        alike[tuple(build[name] for name in line)].append(build["id"])
    asked: dict[tuple[bool, ...], list[int]] = defaultdict(list)
    for values, ids in alike.items():
        asked[tuple(value is None for value in values)].append(ids[0])
    found: dict[int, Expectation] = {}
    for unknown, firsts in asked.items():
        found |= _expected(connection, statement(unknown, connection.dialect.name), firsts)
    return {id_: found[ids[0]] for ids in alike.values() if ids[0] in found for id_ in ids}


def _expected(connection: Connection, earlier: Select[Any], ids: Sequence[int]) -> dict[int, Expectation]:
    taken: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for id_, attempt, started_at, ended_at in connection.execute(earlier, {"ids": ids}):
        taken[id_].append((attempt, (ended_at - started_at).total_seconds()))
    return {id_: _of_attempts(runs) for id_, runs in taken.items()}


def _of_attempts(runs: Sequence[tuple[int, float]]) -> Expectation:
    """Re-runs often repeat the failed jobs only: they count where there is little else."""
    first = [seconds for attempt, seconds in runs if attempt == 1]
    return Expectation.of(first if len(first) >= FEW else (seconds for _, seconds in runs))


@cache
def statement(unknown: tuple[bool, ...], dialect: str) -> Select[Any]:
    """The earlier builds of those with these `ids`: id, and the attempt, start and end of each earlier one.

    `unknown`: which of source, repository, workflow and (if the branch counts) branch are null in them.
    It walks down one index from the newest build: that of the line, or without a branch that of the
    repository.  PostgreSQL joins what it finds for each; SQLite, which can't, looks their ids up.
    """
    taken = _taken(unknown)
    if dialect == "postgresql":
        run: FromClause = taken.lateral("run")
        found: ColumnElement[bool] = true()
    else:
        run = models.builds
        found = _b.id.in_(taken.with_only_columns(taken.selected_columns.id))
    columns = (_now.c.id, run.c.attempt, run.c.started_at, run.c.ended_at)
    chosen = _now.c.id.in_(bindparam("ids", expanding=True))
    return select(*columns).select_from(_now.join(run, found)).where(chosen)


def _taken(unknown: tuple[bool, ...]) -> Select[Any]:
    """The newest that count among the newest of all, for one row of `now`."""
    equal = [_is_same(name, null) for name, null in zip(_BRANCH, unknown, strict=False)]
    walked = equal if len(equal) == len(_BRANCH) else equal[:2]
    looked_at = select(*(_earlier.c[name] for name in _NEEDED)).where(*walked)
    looked_at = looked_at.where(_earlier.c.id > _now.c.id - FARTHEST)
    newest = looked_at.order_by(_earlier.c.id.desc()).limit(LOOK_BACK).correlate(_now).subquery("newest").c
    counted = select(newest.id, newest.attempt, newest.started_at, newest.ended_at).where(
        _is_same("workflow", unknown[2], newest), *_counts(newest)
    )
    return counted.order_by(newest.id.desc()).limit(MOST).correlate(_now)


def _is_same(name: str, null: bool, earlier: Any = _earlier.c) -> ColumnElement[bool]:
    """`IS NOT DISTINCT FROM` would do for both cases, but follows no index on PostgreSQL."""
    column: ColumnElement[Any] = earlier[name]
    return column.is_(None) if null else column == _now.c[name]


def _counts(earlier: Any) -> list[ColumnElement[bool]]:
    """It ran and was a success or a failure, by the word and the clock of the platform, on no fork.

    A script's own reports are often timed by nothing but our clock.
    """
    well = (earlier.state == "completed") & (earlier.conclusion == "success")
    badly = (earlier.state == "failed") & (earlier.conclusion == "failure")
    timed = (earlier.platform == "script") | ~(earlier.started_synthetic | earlier.ended_synthetic)
    as_told = earlier.told_state == earlier.state
    return [or_(well, badly), as_told, earlier.started_at < earlier.ended_at, timed, ~earlier.is_fork]
