"""Discovery: builds whose every push was lost are found, and nothing else is touched."""

from dataclasses import replace

import pytest
from sqlalchemy import func, select

from pollers import discovery
from pollers.discovery import Place
from tests.facts import PACE, at, github
from tests.stand import INTERVAL, ON_SQLITE, stands
from webhook_app import builds, db, models, queues
from webhook_app.lifecycle import State
from webhook_app.simulated import github as simulated_github
from webhook_app.simulated.httpd import Response, dropped
from webhook_app.simulated.world import PLATFORMS


@pytest.fixture
def make_stand(engine, redis_client, monkeypatch):
    """`make_stand(platforms, builds, …)`: see `tests.stand.stands`."""
    with stands(engine, redis_client, monkeypatch) as make:
        yield make


@ON_SQLITE
@pytest.mark.parametrize("platform", PLATFORMS)
def test_discovery_adds_builds_that_nobody_spoke_of(make_stand, platform):
    stand = make_stand((platform,), 6, kinds={platform: ["success"]}, speed=0.1)
    stand.clock.advance(30)
    stand.discover()
    for build in stand.world.builds:
        row = stand.row(build)
        assert row["state"] == stand.world.truth(build.build_id).state
        assert row["build_id"] == build.build_id
        assert (row["observed_by"], row["last_push_at"], row["polling"]) == ("poll", None, "active")
        assert stand.wait(build) == INTERVAL
    assert stand.redis.exists(queues.bell_key(queues.DELIVER))


@ON_SQLITE
@pytest.mark.parametrize("platform", PLATFORMS)
def test_discovery_never_touches_known_builds(make_stand, platform):
    stand = make_stand((platform,), 4, kinds={platform: ["success"]})
    known, *unknown = stand.world.builds
    stand.push(known, State.QUEUED)
    before = stand.row(known)
    stand.clock.at = stand.world.ends_at + 1
    stand.discover()
    assert stand.row(known) == before
    assert [stand.row(build)["state"] for build in unknown] == ["completed"] * 3
    queues.answer(stand.redis, queues.DELIVER)
    stand.discover()
    assert not stand.redis.exists(queues.bell_key(queues.DELIVER)), "nothing was new"
    assert all(stand.row(build)["sequence"] == 1 for build in unknown)


@ON_SQLITE
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_build_that_is_found_after_its_end_has_its_true_times(make_stand, platform):
    stand = make_stand((platform,), 1, kinds={platform: ["success"]})
    (build,) = stand.world.builds
    stand.clock.at = build.ends_at + 3600
    stand.discover()
    row = stand.row(build)
    assert (row["state"], row["polling"], row["next_poll_at"]) == ("completed", "done", None)
    assert abs(row["ended_at"].timestamp() - build.ends_at) < 5


@ON_SQLITE
def test_a_pipeline_that_is_found_after_it_ran_out_of_time_is_a_timeout(make_stand):
    stand = make_stand(("gitlab",), 1, kinds={"gitlab": ["timeout"]})
    (build,) = stand.world.builds
    stand.clock.at = build.ends_at + 60
    stand.servers["gitlab"].inject(Response(502), times=1, path_contains="/jobs")
    stand.discover()
    assert stand.row(build) is None, "not before it is clear how it ended"
    stand.discover(after=60)
    assert (stand.row(build)["state"], stand.row(build)["conclusion"]) == ("timeout", "timed_out")
    asked = stand.servers["gitlab"].count("/jobs")
    stand.discover(after=60)
    assert stand.servers["gitlab"].count("/jobs") == asked


@ON_SQLITE
def test_what_began_long_ago_is_history(make_stand):
    stand = make_stand(("github", "jenkins"), 4)
    stand.clock.at = stand.world.ends_at + discovery.LOOK_BACK.total_seconds() + 60
    stand.discover()
    assert [stand.row(build) for build in stand.world.builds] == [None] * 4


@ON_SQLITE
def test_discovery_goes_on_where_one_place_fails(make_stand):
    stand = make_stand(("github", "gitlab"), 12)
    stand.servers["github"].inject(dropped(), path_contains="payments-api")
    stand.servers["gitlab"].inject(simulated_github.html())
    stand.discover()
    found = {build.repository.full_name for build in stand.world.builds if stand.row(build)}
    expected = {build.repository.full_name for build in stand.world.builds if build.platform == "github"}
    assert found == expected - {"Octo-Demo/payments-api"}
    assert stand.pauses() == {}


@ON_SQLITE
def test_a_place_that_is_named_twice_makes_each_build_once(make_stand):
    stand = make_stand(("gitlab",), 3, GITLAB_PROJECTS="4101,acme/shop-frontend,4102,acme/infrastructure")
    stand.discover()
    assert all(stand.row(build)["sequence"] >= 1 for build in stand.world.builds)
    with db.reading(stand.engine) as connection:
        assert connection.execute(select(func.count()).select_from(models.builds)).scalar() == 3


@ON_SQLITE
def test_a_name_that_is_no_repository_is_not_asked_for(make_stand):
    stand = make_stand(("jenkins",), 1)
    source = stand.held.settings.sources["jenkins"]
    assert discovery.look(source, Place("jenkins", "../admin"), stand.now()).builds == ()
    assert stand.requests() == {"jenkins": 0}


@pytest.mark.parametrize(
    ("seen", "found"),
    [
        ({"attempt": 1}, False),
        ({"attempt": 2}, True),
        ({"attempt": None, "state": State.IN_PROGRESS}, True),
        ({"attempt": None, "state": State.FAILED}, False),
        ({"attempt": None, "state": State.COMPLETED}, True),
    ],
)
def test_a_rerun_that_nobody_told_is_found_though_its_build_is_known(engine, seen, found):
    end = github(State.TIMEOUT, platform_at=at(10))
    db.as_writer(engine, lambda write: builds.record(write, [end], at(10), PACE))
    listed = replace(github(State.QUEUED, by="poll", platform_at=at(500)), **seen)
    with db.reading(engine) as connection:
        assert bool(discovery.unknown(connection, [listed])) is found
