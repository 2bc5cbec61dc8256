"""Behind a pooler that gives each transaction another server connection: all works, and nothing comes twice."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from tests import hub as hubs
from tests import pgbouncer, postgres
from webhook_app import db, migrations, settings

LIMITS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")


def shown(connection, *names):
    return [connection.execute(text(f"SHOW {name}")).scalar() for name in names]


@pytest.fixture
def store(postgres_url, migrated_postgres):
    """The URL of a migrated database."""
    with postgres.fresh_database(postgres_url, migrated_postgres) as url:
        yield url


@pytest.mark.parametrize("more", ["", "ignore_startup_parameters = options"])
def test_a_pooler_is_found_out_and_each_transaction_has_its_limits(store, more):
    """It refuses the start-up options, or swallows them."""
    with pgbouncer.before(store, more=more) as url:
        engine = db.connect(url)
        with db.reading(engine) as connection:
            assert shown(connection, *LIMITS) == ["7s", "6500ms", "5s"]
            assert connection.connection.driver_connection.prepare_threshold is None
        assert db.as_writer(engine, lambda write: shown(write.connection, *LIMITS)) == ["7s", "6500ms", "5s"]
        assert engine.dialect.pooled is True
        engine.dispose()


def test_a_server_without_a_pooler_is_not_taken_for_one(store):
    engine = db.connect(store)
    with db.reading(engine) as connection:
        assert connection.connection.driver_connection.prepare_threshold is not None
    assert not engine.dialect.pooled
    engine.dispose()


@pytest.mark.parametrize(("pooler", "pooled"), [("true", True), ("false", False), ("", None)])
def test_the_setting_says_what_is_not_to_be_found_out(store, pooler, pooled):
    values = settings.load({"DATABASE_URL": store, "DATABASE_POOLER": pooler})
    engine = db.connect(values.database_url, pooler=values.database_pooler)
    with db.reading(engine) as connection:
        prepares = connection.connection.driver_connection.prepare_threshold is not None
        assert prepares is not bool(pooled)
        assert shown(connection, *LIMITS) == ["7s", "6500ms", "5s"]
    engine.dispose()


def test_the_schema_is_made_behind_a_pooler(postgres_url):
    with postgres.fresh_database(postgres_url) as store, pgbouncer.before(store) as url:
        engine = db.connect(url)
        migrations.upgrade(engine)
        assert migrations.is_current(engine)
        engine.dispose()


def test_pushes_behind_a_pooler_are_taken_at_once_and_each_message_comes_once(postgres_url):
    """Two server connections for all processes, which are switched from one transaction to the next."""
    with (
        postgres.fresh_database(postgres_url) as store,
        pgbouncer.before(store, size=2) as url,
        hubs.own_redis() as (redis_url, _server),
        hubs.Platforms() as platforms,
        hubs.running(
            {**platforms.environment(), "DATABASE_URL": url, "REDIS_URL": redis_url, "WEB_CONCURRENCY": "2"}
        ) as hub,
        hubs.subscribed(hub) as callback,
    ):
        builds = [platforms.begin("github") for _ in range(24)]

        def send(build):
            base = platforms.servers["github"].url
            return [hub.push(push, base).status_code for push in platforms.pushes(build)]

        with ThreadPoolExecutor(4) as senders:
            answers = [status for statuses in senders.map(send, builds) for status in statuses]
        assert len(answers) >= 120
        assert set(answers) == {202}
        for build in builds:
            callback.wait_for(hub, build.build_id)
            assert len(callback.tries(build.build_id)) == len(callback.messages(build.build_id))
