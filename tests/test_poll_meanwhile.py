"""Polling while pushes come, people are awaited and somebody looks on."""

from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import pairwise

import pytest

from tests.stand import FRESH, INTERVAL, ON_SQLITE, change, one_stale, stands
from webhook_app import db, health, polling, queries
from webhook_app.lifecycle import State
from webhook_app.simulated import github as simulated_github
from webhook_app.simulated import github_bodies
from webhook_app.simulated.facts import truth_of
from webhook_app.simulated.httpd import Response, json_response
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


# ---- a push that is late, wherever it waits


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_push_that_waits_while_the_poll_tells_its_change_first_is_not_missed(make_stand, platform):
    """As on a busy machine: reception has the push, and its group is not committed yet."""
    stand = make_stand((platform,), 8, kinds={platform: ["success"]}, speed=0.1)
    stand.push_all()
    for build in sorted(stand.world.builds, key=lambda build: build.ends_at):
        stand.clock.at = max(build.ends_at + 1, stand.clock())
        change(
            stand, build, {"next_poll_at": stand.now(), "last_push_at": stand.now() - timedelta(minutes=2)}
        )
        stand.poll()
        assert stand.row(build)["state"] == "completed"
        stand.clock.advance(3)
        stand.push(build, State.COMPLETED)
    with db.reading(stand.engine) as connection:
        row = health.snapshot(connection)[platform]
    assert (row["missed_pushes"], row["late_pushes"]) == (0, row["changes_polled"])
    assert row["late_pushes"] >= 8
    assert stand.notices("source.deaf", "source.hears") == []


# ---- what else a platform may say


@ON_SQLITE
@pytest.mark.parametrize(
    ("kind", "state"),
    [("timeout", "timeout"), ("mixed", "failed"), ("failure", "failed"), ("bad_yaml", "failed")],
)
def test_a_failed_pipeline_is_asked_for_its_jobs_before_it_is_called_failed(one, kind, state):
    stand, build = one("gitlab", kind)
    stand.clock.at = build.ends_at + FRESH
    stand.poll()
    assert stand.row(build)["state"] == state == stand.world.truth(build.build_id).state
    assert stand.servers["gitlab"].count("/jobs") == 1
    assert stand.types(build).count(state) == 1


@ON_SQLITE
def test_a_pipeline_that_succeeded_is_not_asked_for_its_jobs(one):
    stand, build = one("gitlab", "success")
    stand.clock.at = build.ends_at + FRESH
    stand.poll()
    assert stand.servers["gitlab"].count("/jobs") == 0


@ON_SQLITE
def test_a_follow_up_that_fails_is_made_again_before_anything_is_said(one):
    stand, build = one("gitlab", "timeout")
    stand.clock.at = build.ends_at + FRESH
    stand.servers["gitlab"].inject(Response(502), times=1, path_contains="/jobs")
    stand.poll()
    assert (stand.row(build)["state"], stand.row(build)["consecutive_errors"]) == ("in_progress", 1)
    stand.poll(after=2 * INTERVAL)
    assert stand.row(build)["state"] == "timeout"


@ON_SQLITE
@pytest.mark.parametrize("status", [403, 404])
def test_where_jobs_are_hidden_from_our_token_a_failure_is_a_failure(one, status):
    stand, build = one("gitlab", "timeout")
    stand.clock.at = build.ends_at + FRESH
    stand.servers["gitlab"].inject(json_response({"message": "hidden"}, status), path_contains="/jobs")
    stand.poll()
    assert (stand.row(build)["state"], stand.row(build)["polling"]) == ("failed", "done")


@ON_SQLITE
def test_a_renamed_repository_is_followed_and_then_asked_by_its_new_name(one):
    stand, build = one(speed=0.01)
    server, moment = stand.servers["github"], stand.world.moment(build.build_id)
    moved, new = f"/repositories/{build.repository.id}/actions/runs", "/repos/New-Owner/new.name/actions/runs"
    run = github_bodies.run(build, moment, server.url)
    run["repository"]["full_name"] = "New-Owner/new.name"
    body = {"total_count": 1, "workflow_runs": [run]}
    tokens = []
    answer = server._answer

    def renamed(request):
        tokens.append(request.headers.get("authorization"))
        if build.repository.full_name in request.path:
            return json_response({"message": "Moved Permanently"}, 301, {"Location": server.url + moved})
        return json_response(body) if request.path in (moved, new) else answer(request)

    server._answer = renamed
    stand.poll()
    row = stand.row(build)
    assert (row["repository"], row["poll_count"], row["consecutive_errors"]) == ("New-Owner/new.name", 1, 0)
    assert row["build_id"] == build.build_id
    stand.poll(after=INTERVAL)
    old = server.path_of(build).rpartition("/")[0]
    assert server.requests == {old: 1, moved: 1, new: 1}
    assert set(tokens) == {f"Bearer {server.tokens[0]}"}


@ON_SQLITE
def test_a_redirect_in_a_circle_is_a_failed_poll(one):
    stand, build = one()
    server = stand.servers["github"]
    server.inject(Response(302, headers={"Location": server.path_of(build)}))
    stand.poll()
    assert stand.row(build)["poll_error"].startswith("unavailable: protocol: more than")


# ---- a push while we read


@contextmanager
def during_the_read(server, act):
    """Do `act` after the platform has made up its answer and before we get it."""
    answer = server._answer

    def late(request):
        response = answer(request)
        act()
        return response

    server._answer = late
    try:
        yield
    finally:
        server._answer = answer


@ON_SQLITE
@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_end_that_is_pushed_while_we_read_stays(one, platform):
    stand, build = one(platform, speed=0.01)
    end = stand.now() + timedelta(seconds=30)
    more = {"platform_at": end} if platform == "gitlab" else {}
    with during_the_read(stand.servers[platform], lambda: stand.push(build, State.COMPLETED, **more)):
        stand.poll()
    row = stand.row(build)
    assert (row["state"], row["conclusion"], row["next_poll_at"]) == ("completed", "success", None)
    assert stand.types(build).count("completed") == 1


@ON_SQLITE
def test_a_push_while_we_read_keeps_the_build_fresh(one):
    """Told by a push a moment ago, it need not be read again after the usual interval."""
    stand, build = one(speed=0.01)
    with during_the_read(stand.servers["github"], lambda: stand.push(build)):
        stand.poll()
    assert stand.row(build)["poll_count"] == 1
    assert stand.wait(build) == FRESH


@ON_SQLITE
def test_a_failed_read_does_not_undo_the_freshness_of_a_push_meanwhile(one):
    stand, build = one(speed=0.01)
    server = stand.servers["github"]
    server._answer = lambda _request: simulated_github.server_error()
    with during_the_read(server, lambda: stand.push(build)):
        stand.poll()
    assert stand.row(build)["consecutive_errors"] == 1
    assert stand.wait(build) == FRESH


def test_polling_that_is_stopped_while_we_read_stays_stopped(one):
    stand, build = one(speed=0.01)
    with during_the_read(stand.servers["github"], lambda: change(stand, build, polling.stop())):
        stand.poll()
    row = stand.row(build)
    assert (row["polling"], row["next_poll_at"]) == ("stopped", None)


# ---- progress while it runs


def test_the_jobs_of_a_running_build_are_read_while_somebody_asks_how_far_it_is(one):
    stand, build = one("github", speed=0.02)
    moment = next(
        moment
        for moment, following in pairwise(build.moments)
        if any(step.status == "completed" for job in moment.jobs for step in job.steps)
        and following.at > moment.at + 60
    )
    stand.clock.at = max(stand.clock(), moment.at + 1)
    server = stand.servers["github"]
    stand.poll()
    assert server.count("/jobs") == 0
    db.as_writer(
        stand.engine,
        lambda write: queries.note_look(write.connection, stand.row(build)["id"], stand.now()),
    )
    stand.poll(after=INTERVAL)
    assert server.count("/jobs") == 1
    row = stand.row(build)
    assert len(row["jobs"]) == len(moment.jobs)
    assert (row["progress_basis"], row["poll_count"]) == ("steps", 2)
    assert row["progress"] > 0
    paid = server.used()
    stand.poll(after=INTERVAL)
    assert server.count("/jobs") == 2
    assert server.used() == paid, "nothing changed, nothing paid"
    stand.poll(after=120)
    assert server.count("/jobs") == 2, "nobody asked for two minutes"


@ON_SQLITE
@pytest.mark.parametrize("platform", ["gitlab"])
def test_a_watched_build_of_the_other_platforms_makes_progress_too(one, platform):
    stand, build = one(platform, speed=0.02)
    running = [moment for moment in build.moments if truth_of(platform, moment).state == "in_progress"]
    stand.clock.at = max(stand.clock(), running[-1].at + 1)
    for _ in range(2):
        db.as_writer(
            stand.engine,
            lambda write: queries.note_look(write.connection, stand.row(build)["id"], stand.now()),
        )
        stand.poll(after=INTERVAL)
    assert stand.row(build)["progress"] > 0


@ON_SQLITE
def test_a_jobs_read_that_fails_takes_nothing_away(one):
    stand, build = one("github", speed=0.02)
    db.as_writer(
        stand.engine,
        lambda write: queries.note_look(write.connection, stand.row(build)["id"], stand.now()),
    )
    stand.servers["github"].inject(Response(502), path_contains="/jobs")
    stand.poll()
    row = stand.row(build)
    assert (row["poll_count"], row["consecutive_errors"]) == (1, 0)


@ON_SQLITE
def test_jobs_are_not_read_when_the_budget_is_short(one):
    stand, build = one("github", speed=0.02)
    stand.servers["github"].limits.limit = 60
    stand.poll()
    for _ in range(3):
        db.as_writer(
            stand.engine,
            lambda write: queries.note_look(write.connection, stand.row(build)["id"], stand.now()),
        )
        stand.poll(after=INTERVAL)
    assert stand.servers["github"].count("/jobs") <= 1
    assert stand.row(build)["poll_count"] >= 2
