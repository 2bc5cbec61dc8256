"""Discovery: builds whose every push was lost are found, and nothing else is touched."""

import re
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import func, insert, select

from pollers import discovery, repository, stale
from tests.facts import at, github
from tests.stand import FRESH, INTERVAL, ON_SQLITE, change, stands
from webhook_app import db, models, polling, queues
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
def test_discovery_never_touches_builds_with_a_recent_push(make_stand, platform):
    stand = make_stand((platform,), 4, kinds={platform: ["success"]})
    known, *unknown = stand.world.builds
    stand.clock.at = stand.world.ends_at + discovery.GRACE_SECONDS
    stand.push(known, State.QUEUED)
    before = stand.row(known)
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
    stand.servers["gitlab"].inject(Response(502), times=2, path_contains="/jobs")
    stand.discover()
    assert stand.row(build) is None, "not before it is clear how it ended"
    stand.discover(after=60)
    assert (stand.row(build)["state"], stand.row(build)["conclusion"]) == ("timeout", "timed_out")
    asked = stand.servers["gitlab"].count("/jobs")
    assert asked == 3  # by its id, by its path, and again
    stand.discover(after=60)
    assert stand.servers["gitlab"].count("/jobs") == asked


@ON_SQLITE
def test_a_pipeline_that_is_found_while_it_waits_for_a_person_has_begun(make_stand):
    """A list does not tell when it began: the pipeline itself does."""
    stand = make_stand(("gitlab",), 1, kinds={"gitlab": ["manual_forever"]})
    (build,) = stand.world.builds
    stand.clock.at = build.ends_at + 60
    stand.discover()
    row = stand.row(build)
    assert (
        (row["state"], row["waiting"])
        == (stand.world.truth(build.build_id).state, True)
        == ("in_progress", True)
    )


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
    stand = make_stand(("gitlab",), 12, GITLAB_PROJECTS="4101,acme/shop-frontend,4102,acme/infrastructure")
    stand.discover()
    assert all(stand.row(build)["sequence"] >= 1 for build in stand.world.builds)
    with db.reading(stand.engine) as connection:
        assert connection.execute(select(func.count()).select_from(models.builds)).scalar() == 12
    stand.discover(after=60)
    before = stand.servers["gitlab"].count("/pipelines")
    stand.discover(after=60)
    assert stand.servers["gitlab"].count("/pipelines") - before == 2, "each project by one name only"


@ON_SQLITE
def test_a_repository_that_is_renamed_there_and_back_is_listed_on(make_stand):
    stand = make_stand(("github",), 1)
    (place,) = stand.world.places["github"][:1]
    now, name = stand.now(), place.full_name

    def rename(write):
        blank = {"source": "github", "repository": name, "next_list_at": now, "errors": 0}
        write.connection.execute(insert(models.places), blank)
        discovery.note_alias(write, "github", name, "octo/new-name", now)
        discovery.note_alias(write, "github", "octo/new-name", name, now)
        return stale.work(write.connection, stand.held.settings.sources, now, 9)

    (found,) = db.as_writer(stand.engine, rename)
    assert found.repositories == [name]


@ON_SQLITE
def test_a_repository_that_nobody_configured_is_listed_for_a_week_after_its_last_new_build(make_stand):
    stand = make_stand(("github",), 1, kinds={"github": ["success"]}, speed=0.1, GITHUB_REPOS="")
    (build,) = stand.world.builds
    stand.discover()
    assert stand.requests() == {"github": 0}
    stand.clock.at = build.ends_at
    stand.push(build, State.COMPLETED)
    for days, listed in ((0, 1), (6.9, 1), (0.2, 0)):
        before = stand.requests()["github"]
        stand.discover(after=days * 86_400)
        assert stand.requests()["github"] - before == listed
    stand.push(replace_build(build), State.COMPLETED)
    before = stand.requests()["github"]
    stand.discover()
    assert stand.requests()["github"] - before == 1


def replace_build(build):
    """Another run of the same repository."""
    return replace(build, build_id=f"{build.build_id}9", run_id=build.run_id * 10 + 9)


@ON_SQLITE
def test_a_list_is_due_once_per_interval_and_a_list_made_for_due_builds_counts(make_stand):
    stand = make_stand(("github",), 8, kinds={"github": ["success"]}, speed=0.001)
    stand.clock.advance(5)
    stand.push_all()
    stand.discover()
    repositories = len(stand.world.repositories("github"))
    assert stand.requests()["github"] == repositories
    stand.poll(after=59)
    assert stand.requests()["github"] == repositories
    stand.poll(after=1)  # lists and builds are due: together
    assert stand.requests()["github"] == 2 * repositories
    assert {stand.row(build)["poll_count"] for build in stand.world.builds} == {1}


@ON_SQLITE
def test_two_repositories_are_not_listed_in_the_same_moment_for_ever(make_stand):
    stand = make_stand(("github",), 0, DISCOVERY_JITTER="10")
    stand.discover()
    with db.reading(stand.engine) as connection:
        found = connection.execute(select(models.places.c.next_list_at)).scalars().all()
    earliest = stand.now() + timedelta(seconds=60)
    assert all(earliest <= moment <= earliest + timedelta(seconds=10) for moment in found)
    assert len(set(found)) == len(found) > 1


@ON_SQLITE
def test_a_list_that_can_not_be_read_is_tried_again_and_says_why(make_stand):
    stand = make_stand(("github",), 1, speed=0.1)
    stand.servers["github"].inject(simulated_github.html(), path_contains="/actions/runs")
    stand.discover()
    with db.reading(stand.engine) as connection:
        rows = connection.execute(select(models.places)).mappings().all()
    assert {row["errors"] for row in rows} == {1}
    assert all("not JSON" in row["error"] for row in rows)
    stand.servers["github"].clear_faults()
    stand.discover(after=300)
    with db.reading(stand.engine) as connection:
        rows = connection.execute(select(models.places)).mappings().all()
    assert {(row["errors"], row["error"]) for row in rows} == {(0, None)}
    assert stand.row(stand.world.builds[0]) is not None


def test_a_new_build_is_left_to_its_push_for_a_moment_where_pushes_come():
    """Else each would count as a missed push: a list may show it before its webhook is here."""
    seen = github(State.IN_PROGRESS, by="poll", platform_at=at(0), started_at=at(0))
    assert not discovery.is_ripe(seen, at(29), 30)
    assert discovery.is_ripe(seen, at(30), 30)
    assert discovery.is_ripe(seen, at(0), 0)


@ON_SQLITE
def test_a_name_that_is_no_repository_is_not_asked_for(make_stand):
    stand = make_stand(("jenkins",), 1, JENKINS_JOBS="../admin")
    stand.discover()
    assert stand.requests() == {"jenkins": 0}
    with db.reading(stand.engine) as connection:
        (row,) = connection.execute(select(models.places)).mappings()
    assert row["errors"] == 1


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
def test_a_rerun_that_nobody_told_is_found_though_its_build_is_known(seen, found):
    listed = replace(github(State.QUEUED, by="poll", platform_at=at(500)), **seen)
    assert discovery.is_untold_rerun(listed, 1, State.TIMEOUT) is found
    assert not discovery.is_untold_rerun(listed, 1, State.IN_PROGRESS)


@pytest.mark.parametrize(("changed", "worth_a_look"), [(100, False), (101, False), (102, True)])
@pytest.mark.parametrize(
    ("state", "told"),
    [(State.FAILED, State.FAILED), (State.FAILED, State.TIMEOUT), (State.COMPLETED, State.COMPLETED)],
)
def test_a_pipeline_that_changed_after_its_end_may_have_run_again(state, told, changed, worth_a_look):
    listed = github(state, None, by="poll", platform_at=at(changed))
    assert discovery.may_have_run_again(listed, told, at(100)) is worth_a_look
    assert not discovery.is_untold_rerun(listed, 1, told)
    assert not discovery.may_have_run_again(listed, told, None)
    assert not discovery.may_have_run_again(replace(listed, attempt=1), told, at(100))


@pytest.mark.parametrize("kind", ["optional_manual", "retry_timeout"])
def test_a_pipeline_that_ended_the_same_way_again_between_two_lists_is_a_new_attempt(make_stand, kind):
    """Nobody told of it: its own time of the end does, which a list lacks."""
    stand = make_stand(("gitlab",), 1, kinds={"gitlab": [kind]}, speed=0.05)
    (build,) = stand.world.builds
    while not stand.world.truth(build.build_id).terminal:
        stand.clock.advance(1)
    stand.discover(after=20)
    first = stand.row(build)
    assert (first["attempt"], first["polling"]) == (1, "done")
    stand.clock.at = build.ends_at
    stand.discover(after=60)
    again = stand.row(build)
    assert (again["attempt"], again["state"]) == (2, stand.world.truth(build.build_id).state)
    assert again["ended_at"] > first["ended_at"]
    asked = stand.servers["gitlab"].count(f"/pipelines/{build.run_id}")
    stand.discover(after=60)
    assert stand.row(build)["attempt"] == 2
    assert stand.servers["gitlab"].count(f"/pipelines/{build.run_id}") == asked, "it is known now"


@ON_SQLITE
def test_all_that_changed_on_gitlab_while_we_were_away_is_found(make_stand, monkeypatch):
    monkeypatch.setattr(repository, "FEW", 2)
    monkeypatch.setattr(repository, "MANY", 5)
    stand = make_stand(("gitlab",), 60, kinds={"gitlab": ["success"]}, spread=900)
    stand.clock.advance(60)
    stand.discover()
    found = sum(stand.row(build) is not None for build in stand.world.builds)
    stand.clock.at = stand.world.ends_at + 60
    stand.discover()
    assert found < 20
    assert {(stand.row(build) or {}).get("state") for build in stand.world.builds} == {"completed"}


@ON_SQLITE
def test_a_change_after_the_end_that_is_no_run_is_looked_at_once(make_stand):
    """GitLab touches pipelines long after their end, as when artifacts are unlocked."""
    stand = make_stand(("gitlab",), 1, kinds={"gitlab": ["success"]})
    (build,) = stand.world.builds
    stand.clock.at = build.ends_at + 5
    stand.discover()
    server = stand.servers["gitlab"]
    usual = server._answer

    stand.clock.advance(60)
    touched_at = f'"updated_at":"{stand.now():%Y-%m-%dT%H:%M:%S.000Z}"'.encode()

    def touched(request):
        answer = usual(request)
        return replace(answer, body=re.sub(rb'"updated_at":"[^"]*"', touched_at, answer.body))

    server._answer = touched
    stand.discover()
    stand.discover(after=60)
    asked = server.count(f"/pipelines/{build.run_id}")
    assert asked == 1
    row = stand.row(build)
    assert (row["attempt"], row["state"], row["polling"]) == (1, "completed", "done")
    assert row["ended_at"].timestamp() == pytest.approx(build.ends_at, abs=1)


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_a_list_that_shows_a_build_alive_that_we_ended_reopens_it(make_stand, platform):
    stand = make_stand((platform,), 1, kinds={platform: ["success"]}, speed=0.1)
    (build,) = stand.world.builds
    stand.push(build)
    change(stand, build, {
        "polling": "timeout", "next_poll_at": None, "state": "timeout", "conclusion": "timed_out",
        "ended_at": stand.now(), "ended_synthetic": True,
    })  # fmt: skip
    stand.discover(after=FRESH)
    row = stand.row(build)
    assert (row["state"], row["conclusion"], row["ended_at"]) == ("in_progress", None, None)
    assert row["polling"] == "active"
    stand.clock.at = build.ends_at + FRESH
    stand.poll()
    assert (stand.row(build)["state"], stand.row(build)["next_poll_at"]) == ("completed", None)


@ON_SQLITE
@pytest.mark.parametrize("by", ["a list", "itself"])
def test_a_build_of_a_jenkins_job_that_was_made_again_is_found(make_stand, by):
    """Number 1 is there again: the queue id and the time tell that it is another build."""
    stand = make_stand(("jenkins",), 1, kinds={"jenkins": ["success"]})
    (build,) = stand.world.builds
    stand.clock.at = build.ends_at + 5
    stand.discover()
    first = stand.row(build)
    assert (first["state"], first["attempt"]) == ("completed", 1)
    server = stand.servers["jenkins"]
    usual = server._answer
    later = int((first["ended_at"].timestamp() + 60) * 1000)

    def made_again(request):
        answer = usual(request)
        body = re.sub(rb'"queueId": ?[0-9]+', b'"queueId":987654', answer.body)
        body = re.sub(rb'"timestamp": ?[0-9]+', f'"timestamp":{later}'.encode(), body)
        return replace(answer, body=body.replace(b'"SUCCESS"', b'"FAILURE"'))

    server._answer = made_again
    stand.clock.advance(3600)
    if by == "itself":
        change(stand, build, {"next_poll_at": stand.now(), "doubtful": True})
        stand.poll()
    else:
        stand.discover()
    row = stand.row(build)
    assert (row["state"], row["attempt"], row["attempt_base"]) == ("failed", 2, 1)
    assert row["queue_id"] == "987654"
    assert (row["started_at"] - first["ended_at"]).total_seconds() == pytest.approx(60, abs=0.01)


@pytest.mark.parametrize("platform", ["github", "gitlab"])
def test_a_list_that_shows_the_end_of_a_build_that_polling_gave_up_is_believed(make_stand, platform):
    stand = make_stand((platform,), 1, kinds={platform: ["success"]}, speed=0.1)
    (build,) = stand.world.builds
    stand.push(build)
    change(stand, build, {"polling": "error", "next_poll_at": None})
    stand.discover(after=FRESH)
    assert stand.row(build)["state"] == "in_progress", "it goes on"
    assert stand.row(build)["next_poll_at"] is None
    stand.clock.at = build.ends_at + FRESH
    stand.discover()
    assert (stand.row(build)["state"], stand.row(build)["next_poll_at"]) == ("completed", None)


@ON_SQLITE
def test_what_was_stopped_by_hand_stays_so(make_stand):
    stand = make_stand(("github",), 1, kinds={"github": ["success"]})
    (build,) = stand.world.builds
    stand.push(build)
    change(stand, build, polling.stop())
    stand.clock.at = build.ends_at + FRESH
    stand.discover()
    assert (stand.row(build)["state"], stand.row(build)["polling"]) == ("in_progress", "stopped")


@ON_SQLITE
def test_a_child_pipeline_is_read_by_itself_for_no_list_shows_it(make_stand):
    """The silence of a list means "nothing changed" for all others."""
    stand = make_stand(("gitlab",), 1, kinds={"gitlab": ["success"]}, speed=0.05)
    (child,) = stand.world.builds
    server = stand.servers["gitlab"]
    usual = server._answer

    def as_child(request):
        answer = usual(request)
        if request.path.endswith("/pipelines"):
            return replace(answer, body=b"[]")
        return replace(answer, body=answer.body.replace(b'"source":"push"', b'"source":"parent_pipeline"'))

    server._answer = as_child
    stand.push(child)
    other = "gitlab:9:9"  # that the list was read before, and will be again
    clock = {"list_clock": stand.now(), "listed_at": stand.now(), "next_list_at": stand.now(), "errors": 0}
    place = {"source": "gitlab", "repository": child.repository.full_name} | clock
    db.as_writer(stand.engine, lambda write: write.connection.execute(insert(models.places), place))
    stand.push(child, key=other, build_id=other)
    stand.poll(after=FRESH)
    assert stand.row(child)["unlisted"]
    stand.clock.at = child.ends_at + FRESH
    stand.poll(after=INTERVAL)
    assert stand.row(child)["state"] == "completed"
