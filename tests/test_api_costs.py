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
        assert statements == before[path][0] <= 4, path
        assert items > before[path][1] or path == "/api/sources", path


def plan_of(engine, statement):
    compiled = statement.compile(engine, compile_kwargs={"literal_binds": True})
    with engine.connect() as connection:
        return " | ".join(
            row[3]
            for row in connection.execute(text("EXPLAIN QUERY PLAN " + str(compiled).replace(":", r"\:")))
        )


SOURCES = ["github", "gitlab"]


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (queries.builds(BuildFilter(), SOURCES), "SEARCH builds USING INTEGER PRIMARY KEY (rowid<?)"),
        (queries.builds(BuildFilter(source="github"), SOURCES),
        "SEARCH builds USING INTEGER PRIMARY KEY (rowid<?)"),
        (queries.builds(BuildFilter(state="failed"), SOURCES),
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
        plan = plan_of(local.engine, queries.builds(wanted, SOURCES))
        assert "ix_builds_repository (source=? AND repository=? AND id<?)" in plan
        assert not re.search(r"SCAN builds", plan), plan


def test_polled_builds_are_found_among_the_open_ones(local):
    plan = plan_of(local.engine, queries.polled())
    assert "ix_builds_due" in plan
    assert "PRIMARY KEY" not in plan


def test_a_build_is_found_by_its_unique_indexes(local):
    columns = models.builds.c
    both = select(columns.id).where((columns.lookup == "x") | (columns.key == "y"))
    assert "SCAN" not in plan_of(local.engine, both)
