"""What questions to the API cost the store: so many statements, each along an index."""

import re

import pytest
from sqlalchemy import event, select, text

from tests.caller import subscribe
from tests.facts import at, github
from webhook_app import (
    models,
    queries,
)
from webhook_app.lifecycle import State
from webhook_app.queries import BuildFilter

Q, P, C, F = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED


def count_statements(api, path):
    statements = []

    def note(_connection, _cursor, statement, *_):
        statements.append(statement)

    event.listen(api.engine, "before_cursor_execute", note)
    try:
        items = api("GET", path)["items"]
    finally:
        event.remove(api.engine, "before_cursor_execute", note)
    return len(statements), len(items)


def test_no_list_asks_the_database_once_per_row(local):
    subscriber = subscribe(local)
    lists = [
        "/api/builds", "/api/builds?repository=Octo/Repo", "/api/polling", "/api/subscribers", "/api/events",
        f"/api/subscribers/{subscriber['id']}/deliveries", "/api/builds/github:octo:repo:1/attempts",
        "/api/sources",
    ]  # fmt: skip

    def more(first):
        for run in range(first, first + 10):
            local.record(github(P, run=run), now=at(0))
            local.record(github(P, run=run, by="poll"), now=at(70))
            local.record(github(P, run=1, attempt=run + 1), now=at(80))
            subscribe(local)

    more(1)
    before = {path: count_statements(local, path) for path in lists}
    more(11)
    for path in lists:
        statements, items = count_statements(local, path)
        assert statements == before[path][0] <= 6, path
        assert items > before[path][1] or path == "/api/sources", path


def plan_of(engine, statement):
    compiled = statement.compile(engine, compile_kwargs={"literal_binds": True})
    with engine.connect() as connection:
        return " | ".join(
            row[3]
            for row in connection.execute(text("EXPLAIN QUERY PLAN " + str(compiled).replace(":", r"\:")))
        )


OF_TWO_SOURCES = [("github", "a/b"), ("gitlab", "a/B")]


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (queries.builds(BuildFilter()), "SEARCH builds USING INTEGER PRIMARY KEY (rowid<?)"),
        (queries.builds(BuildFilter(source="github")),
        "SEARCH builds USING INTEGER PRIMARY KEY (rowid<?)"),
        (queries.builds(BuildFilter(state="failed")),
        "SEARCH builds USING INTEGER PRIMARY KEY (rowid<?)"),
        (queries.events_of_build(0, 9).where(models.events.c.build == 1),
        "USING INDEX sqlite_autoindex_events_1 (build=?)"),
        (queries.events(5), "SEARCH events USING INTEGER PRIMARY KEY (rowid>?)"),
        (queries.inbound(), "SEARCH inbound USING INTEGER PRIMARY KEY (rowid<?)"),
        (queries.inbound(status="unreadable"), "USING INDEX ix_inbound_unreadable (id<?)"),
        (queries.deliveries("s"), "(subscriber=? AND event<?)"),
        (queries.deliveries("s", "pending"),
        "(subscriber=? AND event<?)"),
        (queries.dead_letters(reason="http_500", before=("s", 9)), "USING INDEX ix_messages_dead"),
        (queries.dead_letters("s", before=("s", 9)), "USING INDEX ix_messages_dead (subscriber=? AND id<?)"),
        (queries.subscribers("s"), "(id>?)"),
        (queries.notices(), "SEARCH notices USING INTEGER PRIMARY KEY (rowid<?)"),
    ],
)  # fmt: skip
def test_lists_follow_an_index_and_sort_nothing(local, statement, index):
    plan = plan_of(local.engine, statement)
    assert index in plan
    assert "TEMP B-TREE" not in plan
    assert not re.search(r"SCAN (?!\()", plan), plan


def test_the_first_page_of_dead_letters_walks_their_own_small_index(local):
    plan = plan_of(local.engine, queries.dead_letters())
    assert "SCAN messages USING INDEX ix_messages_dead" in plan
    assert "TEMP B-TREE" not in plan


def test_builds_of_a_repository_follow_its_index(local):
    for wanted in (
        BuildFilter(repository="a/b"),
        BuildFilter(repository="a/b", source="github", state="failed"),
    ):
        plan = plan_of(local.engine, queries.builds(wanted, OF_TWO_SOURCES))
        assert "ix_builds_repository (source=? AND repository=? AND id<?)" in plan
        assert not re.search(r"SCAN builds", plan), plan


def test_the_spellings_of_a_repository_are_read_from_an_index_one_step_for_each(local):
    plan = plan_of(local.engine, queries.distinct_repositories(["github", "gitlab"]))
    found = re.findall(r"(?:SEARCH|SCAN) builds[^|]*", plan)
    assert len(found) == 2
    for step in found:
        assert re.search(r"SEARCH builds USING COVERING INDEX \w+ \(source=\? AND repository>\?\)", step), (
            plan
        )


def test_postgresql_reads_the_spellings_of_a_repository_along_an_index(postgres_engine):
    with postgres_engine.begin() as connection:
        columns = {"source": "github", "platform": "github", "attempt": 1, "state": "completed"}
        nothing = {"told_state": "", "waiting": False, "jobs": {}, "jobs_complete": False, "progress": 0}
        more = {"progress_basis": "", "report": {}, "observed_by": "push", "sequence": 1, "polling": ""}
        counts = {"poll_count": 0, "consecutive_errors": 0, "doubtful": False, "requested": False}
        rows = [
            {
                "id": id_, "build_id": f"b{id_}", "key": f"k{id_}", "lookup": f"l{id_}",
                "repository": f"octo/{id_ % 20}", "created_at": at(0), "updated_at": at(0),
            } | columns | nothing | more | counts
            for id_ in range(1, 20_001)
        ]  # fmt: skip
        connection.execute(models.builds.insert(), rows)
    with postgres_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE builds")
        for spelled in ("OCTO/7", "octo/7"):
            assert queries.spellings(connection, spelled, ["github"]) == [("github", "octo/7")]
        statement = queries.distinct_repositories(["github"])
        compiled = str(statement.compile(postgres_engine, compile_kwargs={"literal_binds": True}))
        lines = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, TIMING OFF) {compiled}").scalars().all()
    plan = "\n".join(lines)
    assert "Index Only Scan using ix_builds" in plan
    assert "Seq Scan on builds" not in plan


def test_polled_builds_are_found_among_the_open_ones(local):
    plan = plan_of(local.engine, queries.polled())
    assert "ix_builds_due" in plan
    assert "PRIMARY KEY" not in plan


def test_a_build_is_found_by_its_unique_indexes(local):
    columns = models.builds.c
    both = select(columns.id).where((columns.lookup == "x") | (columns.key == "y"))
    assert "SCAN" not in plan_of(local.engine, both)
