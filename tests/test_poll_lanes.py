"""Polling with one owner per token, within the limits that the platforms tell."""

import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from sqlalchemy import select

from tests.hub import clean_environment
from tests.stand import FRESH, INTERVAL, ON_SQLITE, environment, one_stale, stands
from tests.test_collect import answering
from webhook_app import budget, builds, db, models, platforms, settings
from webhook_app.budget import Lane, Spent
from webhook_app.lifecycle import ObservedBy, State
from webhook_app.platforms import PollError, PollFault
from webhook_app.simulated import github as simulated_github
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.gitlab import rate_limited as gitlab_rate_limited
from webhook_app.simulated.httpd import Response
from webhook_app.simulated.world import World


@pytest.fixture
def make_stand(engine, redis_client, monkeypatch):
    """`make_stand(platforms, builds, …)`: see `tests.stand.stands`."""
    with stands(engine, redis_client, monkeypatch) as make:
        yield make


@pytest.fixture
def one(make_stand):
    """`one(platform, kind, …)`: see `tests.stand.one_stale`."""
    return partial(one_stale, make_stand)


# ---- the lane


LANE = Lane("lane", platforms.polled()["github"].MANNERS, 0.1)


def takes(stand, lane=LANE):
    """`take(owner, later)`: the ledger, or None if it is refused; `settle(owner, spent)`."""
    until, now = stand.now() + timedelta(seconds=45), stand.now()

    def take(owner, later=0.0):
        at_ = now + timedelta(seconds=later)
        return db.as_writer(
            stand.engine, lambda write: budget.take(write, lane, ["github"], owner, until, at_)
        )

    def settle(owner, spent):
        return db.as_writer(
            stand.engine, lambda write: budget.settle(write, lane, owner, spent, now, worked=True)
        )

    return take, settle


def test_a_lane_has_one_owner_until_it_gives_it_back_or_dies(make_stand):
    stand = make_stand(("github",), 1)
    take, settle = takes(stand)
    assert take("a") == budget.Ledger(stand.now())
    assert take("b") is None
    assert take("a") is not None
    assert take("b", later=45) is not None
    settle("a", Spent(3, 2))
    assert take("c") is None, "it was lost to b, so a gives nothing back"
    settle("b", Spent(4, 1))
    ledger = take("c")
    assert (ledger.requests, ledger.counted) == (7, 3), "what was asked was asked, whoever owned the lane"


def test_rounds_and_single_requests_take_turns(make_stand):
    stand = make_stand(("github",), 1)
    take, settle = takes(stand)
    one, other = budget.turn_owner(), budget.turn_owner()
    assert take("a round")
    assert take(one) is None
    assert take("another worker") is None
    settle("a round", Spent())
    assert take("a round") is None, "somebody waits for a single request"
    assert take(one)
    assert take("a round") is None
    settle(one, Spent())
    assert take(one) is None, "now the round is next"
    assert take(other) is None
    assert take("a round")
    settle("a round", Spent())
    assert take(one)


def test_who_waited_and_died_keeps_nobody(make_stand):
    stand = make_stand(("github",), 1)
    take, settle = takes(stand)
    assert take("a round")
    assert take(budget.turn_owner()) is None
    settle("a round", Spent())
    assert take("a round", later=0.9) is None
    assert take("a round", later=1.1)


def test_a_lane_that_another_process_reads_is_left_to_it(make_stand):
    stand = make_stand(("github", "jenkins"), 8, speed=0.01)
    stand.push_all()
    lane = budget.lane_of(stand.held.settings.sources["github"], 0.1)
    until = stand.now() + timedelta(seconds=2 * FRESH)
    db.as_writer(
        stand.engine, lambda write: budget.take(write, lane, ["github"], "another", until, stand.now())
    )
    stand.poll(after=FRESH)
    assert stand.requests()["github"] == 0
    assert stand.requests()["jenkins"] > 0
    stand.poll(after=FRESH)
    assert stand.requests()["github"] > 0


@ON_SQLITE
def test_a_list_that_is_never_answered_keeps_no_build_from_its_end(make_stand):
    """GitHub gives up on lists that are too much work, while it still tells of each run."""
    stand = make_stand(("github",), 3, kinds={"github": ["success"]})
    stand.push_all()
    server = stand.servers["github"]
    with answering(server, {r"/actions/runs$": Response(502)}) as asked:
        stand.poll(after=FRESH)
        assert {stand.row(build)["consecutive_errors"] for build in stand.world.builds} == {1}
        stand.clock.at = stand.world.ends_at + FRESH
        stand.poll()
    assert {stand.row(build)["state"] for build in stand.world.builds} == {"completed"}
    lists = [path for path in asked if path.partition("?")[0].endswith("/actions/runs")]
    assert len(lists) == 2 * len({build.repository.full_name for build in stand.world.builds})


@ON_SQLITE
def test_who_is_told_to_stop_begins_no_further_read(make_stand):
    stand = make_stand(("github",), 6, kinds={"github": ["success"]})
    stand.push_all()
    stand.clock.at = stand.world.ends_at + FRESH
    server = stand.servers["github"]
    usual = server._answer

    def told_to_stop(request):
        stand.held.desk.closing = True
        return usual(request)

    with answering(server, {"": told_to_stop}) as asked:
        stand.poll()
    assert len(asked) == 1
    assert {stand.row(build)["consecutive_errors"] for build in stand.world.builds} == {0}
    stand.held.desk.closing = False
    stand.poll()
    assert {stand.row(build)["state"] for build in stand.world.builds} == {"completed"}


@ON_SQLITE
def test_a_platform_that_answers_nothing_is_asked_little(make_stand):
    stand = make_stand(("github",), 6, speed=0.01)
    stand.push_all()
    server = stand.servers["github"]
    server.inject(Response(502))
    stand.poll(after=FRESH)
    repositories = {build.repository.full_name for build in stand.world.builds}
    assert server.count() == len(repositories), "a list each"
    stand.poll(after=2 * INTERVAL)
    assert server.count() == 3 * len(repositories), "and then a list and a build each"
    assert {stand.row(build)["consecutive_errors"] for build in stand.world.builds} == {2}


@ON_SQLITE
def test_a_lane_that_fails_for_a_reason_of_ours_holds_up_no_other(make_stand, monkeypatch):
    stand = make_stand(("gitlab", "github"), 4, kinds={"gitlab": ["success"], "github": ["success"]})
    stand.push_all()

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(platforms.polled()["gitlab"], "parse_list", broken)
    monkeypatch.setattr(platforms.polled()["gitlab"], "parse_poll", broken)
    stand.clock.at = stand.world.ends_at + FRESH
    with pytest.raises(ExceptionGroup):
        stand.poll()
    states = {build.platform: stand.row(build)["state"] for build in stand.world.builds}
    assert states == {"gitlab": "in_progress", "github": "completed"}


@contextmanager
def held_back(server):
    """Answer nobody before the block ends."""
    answer, arrived, gate = server._answer, threading.Event(), threading.Event()

    def wait_for_the_end(request):
        arrived.set()
        gate.wait(240)
        return answer(request)

    server._answer = wait_for_the_end
    try:
        yield arrived
    finally:
        gate.set()
        server._answer = answer


def test_two_processes_that_poll_at_once_read_each_build_once(store_url, redis_client, redis_url, tmp_path):
    """The first owns the lane and is kept waiting; the second goes home."""
    world = World(3, 40, platforms=("github",), kinds={"github": ["success"]}, spread_seconds=0, speed=0.01)
    engine = db.connect(store_url, "NORMAL")
    pace = settings.pace(settings.load({}))
    facts = [
        replace(platforms.polled()["github"].named(platforms.Source("github", "github"), build.build_id),
                observed_by=ObservedBy.PUSH, state=State.IN_PROGRESS, attempt=1)
        for build in world.builds
    ]  # fmt: skip
    then = datetime.now(UTC) - timedelta(seconds=2 * FRESH)
    db.as_writer(engine, lambda write: builds.record(write, facts, then, pace))
    with GitHubServer(world) as server:
        env = clean_environment(
            environment(world, {"github": server})
            | {"DATABASE_URL": store_url, "REDIS_URL": redis_url, "BUILDRELAY_DATA_DIR": str(tmp_path)}
        )
        command = [sys.executable, "-c", "from jobs.poll import poll; poll()"]
        with held_back(server) as arrived:
            first = subprocess.Popen(command, env=env)
            assert arrived.wait(60)
            assert subprocess.run(command, env=env, timeout=240).returncode == 0
            with db.reading(engine) as connection:
                assert set(connection.execute(select(models.builds.c.poll_count)).scalars()) == {0}
        assert first.wait(240) == 0
        assert max(server.requests.values()) == 1
    with db.reading(engine) as connection:
        counts = connection.execute(select(models.builds.c.poll_count)).scalars().all()
    assert counts == [1] * 40
    engine.dispose()


# ---- limits


@pytest.mark.parametrize(
    ("platform", "answer", "seconds"),
    [
        ("github", simulated_github.secondary_limit, 60),
        ("github", lambda: simulated_github.secondary_limit(90), 90),
        ("github", lambda: simulated_github.rate_limited(time.time() + 600), 600),
        ("github", lambda: simulated_github.rate_limited(time.time() + 600, 429), 600),
        ("github", lambda: Response(429, b"slow down", {"Retry-After": "7200"}), 7200),
        ("github", lambda: Response(429), 60),
        ("gitlab", lambda: gitlab_rate_limited(45), 45),
        ("jenkins", lambda: Response(429, headers={"Retry-After": "20"}), 20),
    ],
)
def test_a_limit_pauses_the_source_as_told_and_delays_its_builds(make_stand, platform, answer, seconds):
    other = "jenkins" if platform == "gitlab" else "gitlab"
    stand = make_stand((platform, other), 8, kinds={platform: ["success"], other: ["success"]}, speed=0.01)
    mine = [build for build in stand.world.builds if build.platform == platform]
    late = mine[-1]
    for build in stand.world.builds:
        if build is not late:
            stand.push(build)
    server = stand.servers[platform]
    server.inject(answer())
    stand.clock.advance(15)
    stand.push(late)
    stand.poll(after=FRESH - 15)
    asked = server.count()
    assert asked <= platforms.polled()[platform].MANNERS.at_once, "nobody goes on after the first refusal"
    told, reason = stand.pauses()[platform]
    assert (told, reason) == (pytest.approx(seconds, abs=2), "rate_limited")
    stand.poll(after=15)  # the late build has become due, the other source goes on
    stand.poll(after=told - 15.1)
    assert server.count() == asked
    assert stand.servers[other].count() >= 2
    server.clear_faults()
    for build in mine:
        row = stand.row(build)
        assert (row["state"], row["consecutive_errors"], row["poll_count"]) == ("in_progress", 0, 0)
        assert row["poll_error"] is None
    stand.poll(after=0.2)
    assert all(stand.row(build)["poll_count"] == 1 for build in mine)
    assert stand.pauses() == {}
    assert stand.notices() == []


@ON_SQLITE
def test_a_paused_source_is_not_listed_either(make_stand):
    stand = make_stand(("github",), 1)
    stand.servers["github"].inject(simulated_github.secondary_limit(120), times=1)
    stand.discover()
    assert stand.pauses()["github"] == (120, "rate_limited")
    before = stand.requests()
    stand.discover(after=119)
    assert stand.requests() == before
    stand.discover(after=1)
    assert stand.requests()["github"] > before["github"]
    assert stand.row(stand.world.builds[0]) is not None
    assert stand.pauses() == {}


@ON_SQLITE
def test_a_shorter_pause_never_cuts_a_longer_one_short(one):
    stand, _ = one()
    told = [("github", PollError(PollFault.RATE_LIMITED, "x", wait)) for wait in (30.0, 600.0, None)]
    note(stand, told)
    assert stand.pauses()["github"] == (600, "rate_limited")
    note(stand, told[:1])
    assert stand.pauses()["github"] == (600, "rate_limited")


def note(stand, faults=(), worked=()):
    db.as_writer(stand.engine, lambda write: budget.note(write, set(worked), list(faults), stand.now()))


@ON_SQLITE
def test_a_read_that_worked_ends_no_pause_that_another_was_told(one):
    stand, _ = one()
    note(stand, [("github", PollError(PollFault.RATE_LIMITED, "x", 600.0))])
    note(stand, worked=["github"])
    assert "github" in stand.pauses()
    stand.clock.advance(600)
    note(stand, worked=["github"])
    assert stand.pauses() == {}


@pytest.mark.parametrize(
    "fault", [fault for fault in PollFault if fault not in ("rate_limited", "unauthorized")]
)
def test_other_faults_pause_nothing(fault):
    assert budget.pause_for("github", PollError(fault, "x", 600.0), datetime.now(UTC)) is None


@ON_SQLITE
@pytest.mark.parametrize(
    ("platform", "wrong"),
    [
        ("github", {"GITHUB_TOKEN": "old"}),
        ("gitlab", {"GITLAB_TOKEN": "old"}),
        ("jenkins", {"JENKINS_API_TOKEN": "old"}),
    ],
)
def test_a_refused_token_pauses_the_source_and_admins_are_told_once(make_stand, platform, wrong):
    stand = make_stand((platform,), 5, speed=0.01, **wrong)
    stand.push_all()
    for _ in range(3):
        stand.poll(after=budget.UNAUTHORIZED_SECONDS + FRESH)
        assert stand.pauses()[platform] == (budget.UNAUTHORIZED_SECONDS, "unauthorized")
    (notice,) = stand.notices()
    assert (notice["kind"], notice["subject"], notice["read_at"]) == ("source.unauthorized", platform, None)
    assert "token" in notice["text"]
    assert "old" not in notice["text"]
    assert stand.servers[platform].count() <= 3 * platforms.polled()[platform].MANNERS.at_once
    for build in stand.world.builds:
        assert (stand.row(build)["state"], stand.row(build)["consecutive_errors"]) == ("in_progress", 0)


@ON_SQLITE
def test_a_token_that_is_refused_again_later_is_told_again(one):
    stand, build = one(speed=0.01)
    server, good = stand.servers["github"], stand.servers["github"].tokens
    server.tokens = ("another",)
    stand.poll()
    server.tokens = good
    stand.poll(after=budget.UNAUTHORIZED_SECONDS)
    assert stand.row(build)["poll_count"] == 1
    assert stand.pauses() == {}
    server.tokens = ("another",)
    stand.poll(after=FRESH)
    told = [one["kind"] for one in stand.notices()]
    assert told == ["source.unauthorized", "source.reachable", "source.unauthorized"]
