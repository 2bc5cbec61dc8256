"""The adaptive pace: who waits until when, and what ends the waiting."""

from datetime import timedelta

import pytest
from sqlalchemy import insert, update

from pollers import adaptive
from pollers.adaptive import Trust
from tests.stand import FRESH, INTERVAL, ON_SQLITE, change, stands
from webhook_app import db, models, polling
from webhook_app.lifecycle import State


@pytest.fixture
def make_stand(engine, redis_client, monkeypatch):
    """`make_stand(platforms, builds, …)`: see `tests.stand.stands`."""
    with stands(engine, redis_client, monkeypatch) as make:
        yield make


@pytest.mark.parametrize(
    ("share", "watch_from", "stretch"),
    [
        (None, None, 1),
        (0.94, None, 1),
        (0.95, 0.45, 20),
        (0.999, 0.45, 20),
        (0.9995, 0.9, 30),
        (1.0, 0.9, 30),
    ],
)
def test_how_far_a_share_of_pushed_changes_is_trusted(share, watch_from, stretch):
    assert (Trust(share).watch_from, Trust(share).list_stretch) == (watch_from, stretch)


@pytest.fixture
def trusted(make_stand):
    """`trusted(share, earlier)`: a stand whose pushes proved so complete, one running build, earlier ones of its kind."""

    def make(share=1.0, earlier=10, pace="adaptive", changes=100):
        stand = make_stand(
            ("github",), 1, kinds={"github": ["success"]}, speed=0.001, BUILD_POLL_PACE=pace,
            DISCOVERY_INTERVAL="3600",
        )  # fmt: skip
        (build,) = stand.world.builds
        stand.clock.advance(1)
        for seconds in range(earlier):
            self_made(stand, build, seconds)
        stand.push(build, workflow="CI", branch="main", started_at=stand.now())
        row = {"name": "github", "push_share": share, "changes_pushed": changes}
        db.as_writer(
            stand.engine,
            lambda write: (
                write.connection.execute(
                    update(models.sources).where(models.sources.c.name == "github").values(row)
                ).rowcount
                or write.connection.execute(insert(models.sources), row)
            ),
        )
        return stand, build

    return make


def self_made(stand, build, number):
    """An earlier build of the same workflow and branch that took 600 + 10 × `number` seconds."""
    run = 5_000 + number
    ended = stand.now() - timedelta(seconds=3600)
    stand.push(
        build, State.COMPLETED, key=f"github:{run}", build_id=f"github:o:r:{run}", workflow="CI", branch="main",
        started_at=ended - timedelta(seconds=600 + 10 * number), ended_at=ended,
    )  # fmt: skip


def test_a_build_far_from_its_end_waits_until_its_like_were_mostly_over(trusted):
    stand, build = trusted()
    begun = stand.row(build)["started_at"]
    stand.poll(after=FRESH)
    assert stand.requests() == {"github": 0}
    watched_from = begun + timedelta(seconds=681)  # 0.9 of the ten between 600 and 690 s
    assert abs(stand.row(build)["next_poll_at"] - watched_from) < timedelta(seconds=1)
    stand.poll(after=(watched_from - stand.now()).total_seconds() - 1)
    assert stand.requests() == {"github": 0}
    stand.poll(after=2)
    server = stand.servers["github"]
    assert server.polls(build.build_id) == 1, "by itself: the list changes with others too"
    stand.poll(after=INTERVAL)
    assert server.statuses == {200: 1, 304: 1}
    assert stand.row(build)["poll_count"] == 2


@ON_SQLITE
@pytest.mark.parametrize(
    ("share", "earlier", "wait"),
    [
        (0.99, 10, 640.5 - FRESH),  # 0.45: watched earlier where pushes are missed now and then
        (0.99, 7, 4 * INTERVAL),  # too little history: read by itself, four times more slowly
        (1.0, 7, 600 - FRESH),  # and forty times where no push is missed
        (0.9, 10, INTERVAL),  # pushes are missed: the full pace
        (None, 10, INTERVAL),
    ],
)
def test_how_long_a_build_waits(trusted, share, earlier, wait):
    stand, build = trusted(share, earlier)
    stand.poll(after=FRESH)
    read = stand.row(build)["poll_count"] == 1
    assert read is (wait in (INTERVAL, 4 * INTERVAL))
    if wait == 4 * INTERVAL:
        stand.poll(after=INTERVAL)
        assert stand.row(build)["poll_count"] == 1
        stand.poll(after=3 * INTERVAL)
        assert stand.row(build)["poll_count"] == 2
    else:
        assert stand.wait(build) == pytest.approx(wait, abs=1)


@ON_SQLITE
def test_a_missed_push_brings_its_repository_back_to_the_full_pace_for_a_while(trusted):
    stand, build = trusted()
    missed = {"source": "github", "repository": build.repository.full_name, "missed_at": stand.now()}
    db.as_writer(stand.engine, lambda write: write.connection.execute(insert(models.repositories), missed))
    stand.poll(after=FRESH)
    assert stand.row(build)["poll_count"] == 1
    assert stand.wait(build) == INTERVAL
    stand.poll(after=adaptive.SNAP_BACK.total_seconds())
    assert stand.row(build)["poll_count"] == 1
    assert stand.wait(build) > INTERVAL


@ON_SQLITE
def test_a_source_that_told_little_yet_has_proved_nothing(trusted):
    stand, build = trusted(changes=99)
    stand.poll(after=FRESH)
    assert stand.row(build)["poll_count"] == 1


@ON_SQLITE
def test_the_steady_pace_trusts_nobody(trusted):
    stand, build = trusted(pace="steady")
    stand.poll(after=FRESH)
    assert stand.row(build)["poll_count"] == 1
    assert stand.wait(build) == INTERVAL


@ON_SQLITE
def test_a_doubtful_build_does_not_wait(trusted):
    stand, build = trusted()
    stand.push(build, doubtful=True)
    stand.poll()
    assert stand.row(build)["poll_count"] == 1


@ON_SQLITE
def test_a_build_that_somebody_asks_to_be_polled_does_not_wait(trusted):
    stand, build = trusted()
    change(stand, build, polling.request(stand.now()))
    stand.poll()
    assert stand.row(build)["poll_count"] == 1
    stand.poll(after=INTERVAL)
    assert stand.wait(build) > INTERVAL, "once it was read it waits like the others"


@ON_SQLITE
def test_new_builds_are_looked_for_less_often_until_a_push_is_missed(trusted):
    stand, build = trusted()
    place = build.repository.full_name
    row = {"source": "github", "repository": place, "next_list_at": stand.now(), "errors": 0}
    db.as_writer(stand.engine, lambda write: write.connection.execute(insert(models.places), row))

    def next_list():
        with db.reading(stand.engine) as connection:
            found = connection.execute(models.places.select().where(models.places.c.repository == place))
            return (found.mappings().one()["next_list_at"] - stand.now()).total_seconds()

    stand.poll()
    assert next_list() == 30 * 3600
    missed = {"source": "github", "repository": place, "missed_at": stand.now()}
    db.as_writer(
        stand.engine,
        lambda write: (
            write.connection.execute(insert(models.repositories), missed),
            write.connection.execute(update(models.places).values(next_list_at=stand.now())),
        ),
    )
    stand.poll()
    assert next_list() == 3600
