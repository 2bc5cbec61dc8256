"""Polling from the claim to the record: the jobs against simulated GitHub, GitLab and Jenkins servers."""

from functools import partial

import pytest

from jobs import poll as poll_job
from pollers import stale
from tests.stand import FRESH, INTERVAL, ON_SQLITE, one_stale, stands
from webhook_app import db, queues
from webhook_app.simulated.judge import judge
from webhook_app.simulated.world import PLATFORMS


@pytest.fixture
def make_stand(engine, redis_client, monkeypatch):
    """`make_stand(platforms, builds, …)`: see `tests.stand.stands`."""
    with stands(engine, redis_client, monkeypatch) as make:
        yield make


@pytest.fixture
def one(make_stand):
    """`one(platform, kind, …)`: see `tests.stand.one_stale`."""
    return partial(one_stale, make_stand)


NO_RERUNS = {
    "github": [
        "success", "failure", "cancelled", "timed_out", "neutral", "skipped", "cancelled_queued", "stale",
        "approved", "unapproved", "gate", "startup_failure",
    ],
    "gitlab": [
        "success", "warnings", "failure", "timeout", "mixed", "canceled", "canceled_pending", "skipped",
        "bad_yaml", "manual", "manual_forever", "delayed",
    ],
}  # fmt: skip


# ---- the way of one poll


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_stale_build_is_read_until_it_ends_and_never_again(one, platform):
    stand, build = one(platform, "success", speed=0.1)
    stand.poll()
    assert stand.requests() == {platform: 1}
    row = stand.row(build)
    assert (row["state"], row["polling"], row["poll_count"]) == ("in_progress", "active", 1)
    assert stand.wait(build) == INTERVAL
    stand.clock.at = build.ends_at + 1
    stand.poll()
    row = stand.row(build)
    assert (row["state"], row["conclusion"], row["polling"]) == ("completed", "success", "done")
    told = [event for event in stand.events(build) if event["type"] != "build.progress"]
    assert [(event["type"], event["observed_by"]) for event in told] == [
        ("build.in_progress", "push"), ("build.polling_started", "poll"), ("build.completed", "poll"),
        ("build.polling_completed", "poll"),
    ]  # fmt: skip
    stand.poll(after=86_400)
    assert stand.requests() == {platform: 2}


def test_whatever_the_platforms_do_polling_alone_finds_the_truth(make_stand):
    stand = make_stand(count=30, kinds=NO_RERUNS, every_kind=True, spread=60, speed=0.5)
    while not stand.world.settled():
        stand.discover(after=5)
        stand.poll(after=10)
    for _ in range(2):
        stand.discover()
        stand.poll(after=20 * INTERVAL)

    def shown(build_id):
        return stand.row(stand.world.build(build_id))

    verdict = judge(stand.world, shown)
    assert verdict.ok, str(verdict)
    assert verdict.builds == 30
    for build in stand.world.builds:
        assert [event["sequence"] for event in stand.events(build)] == list(
            range(1, stand.row(build)["sequence"] + 1)
        )


@ON_SQLITE
def test_a_poll_that_tells_something_wakes_the_deliveries_and_one_that_does_not_lets_them_sleep(one):
    stand, _ = one(speed=0.01)
    stand.redis.set(queues.bell_key(queues.POLL), b"1")
    stand.poll()
    assert not stand.redis.exists(queues.bell_key(queues.POLL))
    assert stand.redis.exists(queues.bell_key(queues.DELIVER))
    queues.answer(stand.redis, queues.DELIVER)
    stand.poll(after=INTERVAL)
    assert not stand.redis.exists(queues.bell_key(queues.DELIVER))


@ON_SQLITE
def test_one_job_drains_more_than_one_portion(make_stand, monkeypatch):
    monkeypatch.setattr(poll_job, "PLACES_AT_ONCE", 2)
    stand = make_stand(("github",), 40, kinds={"github": ["success"]}, speed=0.01)
    stand.push_all()
    stand.poll(after=FRESH)
    assert [stand.row(build)["poll_count"] for build in stand.world.builds] == [1] * 40
    assert len({build.repository for build in stand.world.builds}) > 2


# ---- who is due


def test_a_build_is_not_read_before_it_is_due(one):
    stand, build = one(speed=0.1)
    stand.clock.advance(-0.1)
    stand.poll()
    assert stand.requests() == {"github": 0}
    stand.poll(after=0.1)
    stand.poll(after=INTERVAL - 0.1)
    assert stand.requests() == {"github": 1}
    stand.push(build)
    stand.poll(after=FRESH - 0.1)
    assert stand.requests() == {"github": 1}


@ON_SQLITE
@pytest.mark.parametrize(
    "off", [{"ENABLE_GH": "false"}, {"JENKINS_URL": ""}], ids=["disabled", "without an API"]
)
def test_a_source_that_is_off_is_never_read(make_stand, off):
    stand = make_stand(("github", "jenkins"), 6, **off)
    stand.push_all()
    stand.poll(after=10 * FRESH)
    stand.discover()
    silent = "github" if "ENABLE_GH" in off else "jenkins"
    assert stand.requests()[silent] == 0
    assert stand.requests()["jenkins" if silent == "github" else "github"] > 0


def test_the_stalest_builds_come_first(make_stand):
    stand = make_stand(("github",), 6, kinds={"github": ["success"]})
    order = [stand.world.builds[index] for index in (3, 0, 5, 1, 4, 2)]
    for build in order:
        stand.push(build)
        stand.clock.advance(1)
    stand.clock.advance(FRESH)
    with db.reading(stand.engine) as connection:
        places = stale.work(connection, stand.held.settings.sources, stand.now(), 10)
    firsts = list(dict.fromkeys(build.repository.full_name for build in order))
    assert [place.repositories for place in places] == [[name] for name in firsts]
    for place in places:
        due = [due.target.build_id for due in place.due]
        assert due == [build.build_id for build in order if build.repository.full_name in place.repositories]
    with db.reading(stand.engine) as connection:
        (only,) = stale.work(connection, stand.held.settings.sources, stand.now(), 1)
    assert only.repositories == firsts[:1]


def test_one_list_answers_for_all_the_builds_of_a_repository(make_stand):
    """And a second one that finds nothing changed costs no budget."""
    stand = make_stand(("github",), 12, kinds={"github": ["success"]}, speed=0.001)
    stand.clock.advance(10)
    stand.push_all()
    stand.poll(after=FRESH)
    server = stand.servers["github"]
    repositories = {build.repository.full_name for build in stand.world.builds}
    assert len(repositories) < 12
    assert server.count() == len(repositories)
    assert server.statuses == {200: len(repositories)}
    stand.poll(after=INTERVAL)
    assert server.statuses == {200: len(repositories), 304: len(repositories)}
    assert server.used() == len(repositories)
    assert [stand.row(build)["poll_count"] for build in stand.world.builds] == [2] * 12
    assert {stand.wait(build) for build in stand.world.builds} == {INTERVAL}


@ON_SQLITE
def test_a_build_the_list_does_not_show_is_read_by_itself(make_stand):
    stand = make_stand(("github",), 8, kinds={"github": ["success"]}, speed=0.01)
    stand.push_all()
    hidden = stand.world.builds[0]
    server = stand.servers["github"]
    begun = server._begun
    server._begun = lambda *of: [build for build in begun(*of) if build is not hidden]
    for count in (1, 2):
        stand.poll(after=FRESH)
        assert server.polls(hidden.build_id) == count
        assert stand.row(hidden)["poll_count"] == count
    others = [build for build in stand.world.builds if build is not hidden]
    alone = [
        build
        for build in others
        if sum(one.repository == build.repository for one in stand.world.builds) == 1
    ]
    assert all(server.polls(build.build_id) == 0 for build in others if build not in alone)


@ON_SQLITE
def test_a_list_that_shows_a_push_under_way_is_not_kept_as_known(make_stand):
    """The end of a fresh build is left to its push; when that was lost, the same list must tell it later."""
    stand = make_stand(("github",), 24, kinds={"github": ["success"]})
    place = stand.world.builds[0].repository
    here = [build for build in stand.world.builds if build.repository == place]
    assert len(here) >= 3
    for build in here[1:]:
        stand.push(build)
    stand.clock.at = max(stand.world.ends_at + 1, stand.clock() + FRESH)
    stand.push(here[0])  # late: the end was not told yet
    stand.poll()
    assert [stand.row(build)["state"] for build in here[1:]] == ["completed"] * (len(here) - 1)
    assert stand.row(here[0])["poll_count"] == 0
    stand.poll(after=FRESH)
    assert stand.row(here[0])["state"] == "completed"


@ON_SQLITE
def test_retried_pipelines_are_found_by_their_change_however_old_they_are(make_stand):
    """GitLab lists what changed since its own time of the last list; what it does not show is as it was."""
    stand = make_stand(("gitlab",), 9, kinds={"gitlab": ["success"]}, speed=0.001)
    stand.clock.advance(10)
    stand.push_all()
    stand.poll(after=FRESH)
    server = stand.servers["gitlab"]
    before = server.count()
    stand.poll(after=INTERVAL)
    projects = {build.repository for build in stand.world.builds}
    assert server.count() - before == len(projects)
    assert [stand.row(build)["poll_count"] for build in stand.world.builds] == [2] * 9
