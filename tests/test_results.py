"""What an end changed: over builds, attempts, branches, and corrections; on both databases."""

import json

import pytest
from sqlalchemy import select

from tests.facts import PACE, at, github, gitlab
from webhook_app import builds, bulk, db, models, results
from webhook_app.lifecycle import Conclusion, State

Q, P, C, F = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED
X, T = State.CANCELLED, State.TIMEOUT


@pytest.fixture
def told(engine):
    """`told(*observations)`: the changes of the ends that these made, in order."""

    def record(*facts):
        with db.reading(engine) as connection:
            before = connection.execute(select(models.counters.c.events)).scalar_one()
        db.as_writer(engine, lambda write: builds.record(write, facts, at(0), PACE))
        events = models.events.c
        with db.reading(engine) as connection:
            rows = connection.execute(
                select(events.type, events.change).where(events.id > before).order_by(events.id)
            ).all()
        assert all(row.change is None for row in rows if row.type in ("build.queued", "build.in_progress"))
        ends = ("build.completed", "build.failed", "build.cancelled", "build.timeout")
        return [row.change for row in rows if row.type in ends]

    return record


@pytest.mark.parametrize(
    ("before", "now", "word"),
    [
        (None, True, None), (None, False, "broke"), (True, True, None), (True, False, "broke"),
        (False, True, "fixed"), (False, False, "still_failing"),
    ],
)  # fmt: skip
def test_the_table(before, now, word):
    assert results.change(before, now) == word
    assert word is None or word in results.CHANGES


def test_builds_one_after_the_other(told):
    story = [C, F, F, T, C, C, F]
    words = [told(github(state, run=run))[0] for run, state in enumerate(story, 1)]
    assert words == [None, "broke", "still_failing", "still_failing", "fixed", None, "broke"]


def test_ends_of_one_transaction_are_told_as_if_they_came_alone(told):
    facts = [github(F, run=1), github(C, run=1, attempt=2), github(F, run=1, attempt=3)]
    assert told(*facts) == ["broke", "fixed", "broke"]
    assert told(github(F, run=2), github(F, run=2, attempt=2)) == ["still_failing", "still_failing"]


def test_attempts_of_one_build(told):
    assert told(github(C, run=1)) == [None]
    assert told(github(F, run=2)) == ["broke"]
    assert told(github(Q, run=2, attempt=2)) == []
    assert told(github(F, run=2, attempt=2)) == ["still_failing"]
    assert told(github(C, run=2, attempt=3)) == ["fixed"]
    assert told(github(C, run=2, attempt=4)) == [None]


def test_each_branch_workflow_repository_and_source_for_itself(told):
    assert told(github(F, run=1)) == ["broke"]
    assert told(github(F, run=2, branch="dev")) == ["broke"]
    assert told(github(F, run=3, workflow="Deploy")) == ["broke"]
    assert told(github(F, run=4, repository="octo/other")) == ["broke"]
    assert told(gitlab(F, 0, None, repository="Octo/Repo", workflow="CI", branch="main")) == ["broke"]
    assert told(github(C, run=5, branch="dev")) == ["fixed"]
    assert told(github(F, run=6)) == ["still_failing"]


def test_what_has_no_branch_is_compared_with_its_like(told):
    assert told(gitlab(F, 0, None, pipeline=1)) == ["broke"]
    assert told(gitlab(C, 0, None, pipeline=2)) == ["fixed"]
    assert told(github(F, run=1)) == ["broke"]
    assert told(github(F, run=2, branch=None)) == ["broke"]


@pytest.mark.parametrize(
    ("state", "conclusion"),
    [(X, Conclusion.CANCELLED), (C, Conclusion.SKIPPED), (C, Conclusion.NEUTRAL)],
)
def test_what_is_no_result_neither_breaks_nor_fixes(told, state, conclusion):
    assert told(github(F, run=1)) == ["broke"]
    assert told(github(state, run=2, conclusion=conclusion)) == [None]
    assert told(github(F, run=3)) == ["still_failing"]
    assert told(github(state, run=3, attempt=2, conclusion=conclusion)) == [None]
    assert told(github(C, run=3, attempt=3)) == ["fixed"]
    assert told(github(state, run=4, conclusion=conclusion)) == [None]
    assert told(github(C, run=5)) == [None]


def test_an_end_of_ours_that_the_platform_corrects(told):
    assert told(github(C, run=1)) == [None]
    assert told(github(P, run=2)) == []
    assert told(github(T, run=2, by="poll", ours=True)) == ["broke"]
    assert told(github(C, run=2)) == ["fixed"]
    assert told(github(P, run=3)) == []
    assert told(github(T, run=3, by="poll", ours=True)) == ["broke"]
    assert told(github(F, run=3)) == ["still_failing"]


def test_an_older_build_that_ends_later_is_compared_with_older_ones(told):
    assert told(github(C, run=1)) == [None]
    assert told(github(P, run=2), github(P, run=3)) == []
    assert told(github(F, run=3)) == ["broke"]
    assert told(github(C, run=2)) == [None]
    assert told(github(F, run=4)) == ["still_failing"]


def test_a_build_of_a_fork_is_none_of_a_branch(engine, told):
    fork = {"branch": "stranger:main", "is_fork": True}
    assert told(github(F, run=1)) == ["broke"]
    assert told(github(C, run=2)) == ["fixed"]
    assert told(github(F, run=3, **fork)) == ["broke"], "on a line of its own"
    assert told(github(C, run=4)) == [None], "what a fork broke is not broken here"
    assert told(github(C, run=5, **fork)) == ["fixed"]


def test_merge_requests_whose_branch_nobody_tells_are_no_line(told):
    nameless = {"branch": None, "trigger": "pull_request"}
    assert told(github(C, run=1, **nameless)) == [None]
    assert told(github(F, run=2, **nameless)) == [None]
    assert told(github(C, run=3, branch=None)) == [None], "a build without a branch is none of them"
    unknown = {"repository": None, "workflow": None, "branch": None}
    assert told(github(F, run=5, **unknown)) == ["broke"]
    assert told(github(C, run=6, **unknown)) == [None], "nothing says that it is a build of the same"
    assert told(github(C, run=5, attempt=2, **unknown)) == ["fixed"], "this does"
    assert told(github(F, run=4, branch=None)) == ["broke"]


def test_many_lines_with_and_without_names_in_one_batch(told):
    names = [
        ("octo/one", "CI", "main"),
        ("octo/one", None, "main"),
        (None, "CI", None),
        ("octo/one", None, None),
    ]

    def ends(state, first):
        return [
            github(state, run=first + number, repository=repository, workflow=workflow, branch=branch)
            for number, (repository, workflow, branch) in enumerate(names)
        ]

    assert told(*ends(F, 1)) == ["broke"] * 4
    assert told(*ends(C, 11), *ends(C, 21), *ends(F, 31)) == ["fixed"] * 4 + [None] * 4 + ["broke"] * 4


def test_the_newest_result_of_a_line_is_found_by_its_index(engine):
    facts = [github(C, run=run, workflow=f"CI {run % 50}") for run in range(1, 2001)]
    db.as_writer(engine, lambda write: builds.record(write, facts, at(0), PACE))
    with engine.connect() as connection:
        connection.exec_driver_sql("ANALYZE")  # as PostgreSQL does by itself within a minute
        connection.commit()
    line = {
        "build": 2001,
        "source": "github",
        "repository": "Octo/Repo",
        "workflow": "CI 7",
        "branch": "main",
    }
    for missing in ((), ("workflow",)):
        query = results._newest_of_lines(engine.dialect.name, frozenset(missing))
        how = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
        with db.reading(engine) as connection:
            plan = str(bulk.fetch(connection, how + query, (json.dumps([line]),)))
        assert "ix_builds_line" in plan
        assert "Seq Scan on builds" not in plan
