"""How long earlier builds took: which count, for whom, and along which index; on both databases."""

import pytest
from sqlalchemy import select, text, update

from tests.facts import NOON, PACE, at, github
from webhook_app import builds, db, history, models
from webhook_app.lifecycle import Conclusion, State
from webhook_app.progress import Expectation

Q, P, C, F = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED
X, T = State.CANCELLED, State.TIMEOUT


def record(engine, *facts, now=NOON):
    return db.as_writer(engine, lambda write: builds.record(write, facts, now, PACE))


def took(seconds, run, state=C, **more):
    """A build that took so long."""
    return github(state, run=run, started_at=at(0), ended_at=at(seconds), **more)


def rows(engine, *runs):
    statement = select(models.builds).where(models.builds.c.number.in_(runs))
    with db.reading(engine) as connection:
        return [dict(row) for row in connection.execute(statement).mappings()]


def expected(engine, *runs):
    """Seconds by run."""
    asked = rows(engine, *runs)
    assert len(asked) == len(runs)
    with db.reading(engine) as connection:
        found = history.expectations(connection, asked)
    return {row["number"]: found[row["id"]].seconds for row in asked if row["id"] in found}


def test_the_durations_of_earlier_builds_ascending(engine):
    record(engine, took(30, 1), took(10, 2), took(20, 3, F), github(P, run=4))
    assert expected(engine, 4) == {4: (10, 20, 30)}


def test_nothing_is_expected_without_history_or_builds(engine):
    record(engine, github(P, run=1))
    assert expected(engine, 1) == {}
    with db.reading(engine) as connection:
        assert history.expectations(connection, []) == {}


@pytest.mark.parametrize(
    "other",
    [
        took(99, 9, X),
        took(99, 9, T),
        took(99, 9, conclusion=Conclusion.SKIPPED),
        took(99, 9, conclusion=Conclusion.NEUTRAL),
        took(99, 9, F, ours=True),
        took(0, 9),
        took(-5, 9),
        github(C, run=9, ended_at=at(99)),
        github(P, run=9, started_at=at(0)),
        github(Q, run=9),
        took(99, 9, source="ghe"),
        took(99, 9, repository="Octo/Other"),
        took(99, 9, workflow="Nightly"),
        took(99, 9, branch="topic"),
    ],
)
def test_what_does_not_count(engine, other):
    record(engine, github(P, run=9)) if other.ours else None
    record(engine, *(took(seconds, seconds) for seconds in (10, 20, 30)), other, github(P, run=4))
    assert expected(engine, 4) == {4: (10, 20, 30)}


def test_an_end_of_ours_that_the_platform_confirms_counts(engine):
    record(engine, github(P, run=1, started_at=at(0)))
    record(engine, github(F, run=1, ours=True, by="poll"), now=at(50))
    record(engine, github(P, run=2))
    assert expected(engine, 2) == {}
    record(engine, github(F, run=1, ended_at=at(40)))
    assert expected(engine, 2) == {2: (40,)}


def test_the_newest_twenty_count(engine):
    record(engine, *(took(100 + run, run) for run in range(1, 26)), github(P, run=99))
    assert expected(engine, 99)[99] == tuple(range(106, 126))


def test_first_attempts_are_preferred(engine):
    record(engine, *(took(5, run, attempt=2) for run in (1, 2)), *(took(60 + run, run) for run in (3, 4)))
    record(engine, github(P, run=9))
    assert expected(engine, 9)[9] == (5, 5, 63, 64)
    record(engine, took(70, 5))
    assert expected(engine, 9)[9] == (63, 64, 70)


def test_a_branch_without_enough_history_is_judged_by_the_workflow(engine):
    record(engine, *(took(10 * run, run) for run in (1, 2, 3)), took(500, 4, branch="topic"))
    record(engine, github(P, run=8, branch="topic"), github(P, run=9, branch=None), github(P, run=10))
    assert expected(engine, 8, 9, 10) == {8: (10, 20, 30, 500), 9: (10, 20, 30, 500), 10: (10, 20, 30)}
    record(engine, took(510, 5, branch="topic"), took(520, 6, branch="topic"))
    assert expected(engine, 8) == {8: (500, 510, 520)}


def test_builds_without_names_have_their_line_as_well(engine):
    nameless = {"repository": None, "workflow": "server", "branch": None}
    record(engine, *(took(10 * run, run, **nameless) for run in (1, 2, 3)), took(99, 4, branch=None))
    record(engine, github(P, run=9, **nameless), github(P, run=10, **nameless | {"workflow": None}))
    assert expected(engine, 9, 10) == {9: (10, 20, 30)}


def test_what_lies_behind_many_open_builds_is_history_no_more(engine):
    record(engine, took(10, 1), *(github(Q, run=run) for run in range(2, 2 + history.LOOK_BACK)))
    assert expected(engine, 2) == {}


@pytest.mark.parametrize(("distance", "known"), [(history.FARTHEST - 1, True), (history.FARTHEST, False)])
def test_what_lies_far_back_is_history_no_more(engine, distance, known):
    record(engine, took(10, 1))
    (first,) = rows(engine, 1)
    given = update(models.counters).values(builds=first["id"] + distance - 1)
    db.as_writer(engine, lambda write: write.connection.execute(given))
    record(engine, github(P, run=2))
    assert (2 in expected(engine, 2)) is known


def test_a_batch_takes_two_statements_however_many_builds_and_lines(engine, monkeypatch):
    facts = [took(10 * run, run, branch=f"b{run % 7}") for run in range(1, 40)]
    record(engine, *facts, *(github(P, run=100 + n, branch=f"b{n % 9}") for n in range(50)))
    asked, sent = rows(engine, *range(100, 150)), []
    with db.reading(engine) as connection:
        execute = connection.execute
        monkeypatch.setattr(connection, "execute", lambda *args: sent.append(args) or execute(*args))
        found = history.expectations(connection, asked)
    assert len(found) == 50
    assert len(sent) == 2


# ---- what is kept


def test_what_an_attempt_is_expected_to_take_is_kept_once(engine):
    record(engine, github(P))
    (seen,) = rows(engine, 1)

    def keep(*seconds):
        return db.as_writer(engine, lambda write: history.keep(write, seen, Expectation(seconds)))["report"]

    assert keep(10, 20) == {"expected_seconds": [10, 20]}
    assert keep(99) == {"expected_seconds": [10, 20]}
    assert rows(engine, 1)[0]["report"] == {"expected_seconds": [10, 20]}
    record(engine, github(P, attempt=2))
    assert rows(engine, 1)[0]["report"] == {}
    assert keep(99) == {}  # what was looked up for the attempt before
    assert rows(engine, 1)[0]["report"] == {}


# ---- along an index

MANY = 100_000
NUMBERS = "WITH RECURSIVE n (i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < :many) SELECT i FROM n"
LINES = {"repository": "'r' || (n.i % 50)", "branch": "CASE WHEN n.i % 3 = 0 THEN 'main' ELSE 'b' || n.i END"}


def multiply(engine):
    """Make 100 000 builds of the one there is: 50 repositories, each with one long branch and many short ones."""
    own = {"id": "n.i"} | dict.fromkeys(("build_id", "key", "lookup"), "'k' || n.i") | LINES
    names = [column.name for column in models.builds.c]
    values = ", ".join(own.get(name, f'b."{name}"') for name in names)
    columns = ", ".join(f'"{name}"' for name in names)
    statement = f"INSERT INTO builds ({columns}) SELECT {values} FROM builds b, ({NUMBERS}) n WHERE b.id = 1"

    def unit(write):
        write.connection.execute(text(statement), {"many": MANY})

    db.as_writer(engine, unit)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE builds")


def plan(connection, statement, ids):
    explain = {"sqlite": "EXPLAIN QUERY PLAN ", "postgresql": "EXPLAIN ANALYZE "}[connection.dialect.name]
    compiled = statement.params(ids=ids).compile(connection.engine, compile_kwargs={"literal_binds": True})
    told = connection.execute(text(explain + str(compiled).replace(":", r"\:")))
    return "\n".join(str(row[-1]) for row in told)


def test_among_a_hundred_thousand_builds_it_walks_down_an_index(engine):
    record(engine, took(60, 1))
    multiply(engine)
    asked = list(range(3, 603))
    with db.reading(engine) as connection:
        found = history.expectations(connection, sample(connection, asked))
        assert len(found) == len(asked)
        assert {expected.seconds for expected in found.values()} == {(60,) * history.MOST}
        for unknown, index in (((False,) * 4, "ix_builds_line"), ((False,) * 3, "ix_builds_repository")):
            told = plan(connection, history.statement(unknown, connection.dialect.name), asked[:100])
            assert index in told
            assert "Seq Scan" not in told
            assert "SCAN" not in told.replace("SCAN newest", "")


def sample(connection, ids):
    """The rows with these ids."""
    return connection.execute(select(models.builds).where(models.builds.c.id.in_(ids))).mappings()
