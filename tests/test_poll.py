"""Polling from the claim to the record: the jobs against simulated GitHub, GitLab and Jenkins servers."""

import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from itertools import pairwise

import pytest
from sqlalchemy import select

from jobs import poll as poll_job
from pollers import client, stale
from tests.hub import clean_environment
from tests.stand import FRESH, INTERVAL, ON_SQLITE, change, environment, stands
from tests.test_collect import answering
from webhook_app import budget, builds, db, models, platforms, polling, queries, queues, settings
from webhook_app.budget import Lane, Spent
from webhook_app.lifecycle import ObservedBy, State
from webhook_app.platforms import PollError, PollFault
from webhook_app.simulated import github as simulated_github
from webhook_app.simulated import github_bodies
from webhook_app.simulated.facts import truth_of
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.gitlab import rate_limited as gitlab_rate_limited
from webhook_app.simulated.httpd import Response, dropped, hang, json_response
from webhook_app.simulated.judge import judge
from webhook_app.simulated.world import PLATFORMS, World


@pytest.fixture
def make_stand(engine, redis_client, monkeypatch):
    """`make_stand(platforms, builds, …)`: see `tests.stand.stands`."""
    with stands(engine, redis_client, monkeypatch) as make:
        yield make


@pytest.fixture
def one(make_stand):
    """`one(platform, kind, …)`: a stand with one build that runs, was pushed and has gone stale; and the build."""

    def make(platform="github", kind="success", **more):
        stand = make_stand((platform,), 1, kinds={platform: [kind]}, **more)
        (build,) = stand.world.builds
        running = (moment.at for moment in build.moments if truth_of(platform, moment).state == "in_progress")
        stand.clock.at = next(running, build.begins_at)
        stand.push(build)
        stand.clock.advance(FRESH)
        return stand, build

    return make


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
    assert len(stand.notices()) == 2


# ---- not found


@ON_SQLITE
@pytest.mark.parametrize(
    "build_id", ["github:Octo-Demo:storefront:99", "gitlab:4101:99", "jenkins:platform:web:99"]
)
def test_a_build_that_only_a_request_named_fails_at_once(make_stand, build_id):
    stand = make_stand()
    source = stand.held.settings.sources[build_id.partition(":")[0]].source
    db.as_writer(stand.engine, lambda write: builds.named(write, build_id, source, stand.now()))
    stand.poll()
    with db.reading(stand.engine) as connection:
        row = connection.execute(select(models.builds)).mappings().one()
    assert (row["state"], row["conclusion"], row["next_poll_at"]) == ("failed", "failure", None)
    assert row["error"].startswith(f"not found on {source.name}: HTTP 404")
    with db.reading(stand.engine) as connection:
        made = connection.execute(select(models.events.c.type)).scalars().all()
    assert made == ["build.failed"]
    assert stand.pauses() == {}


@ON_SQLITE
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_build_that_only_a_request_named_is_found(make_stand, platform):
    stand = make_stand((platform,), 1, kinds={platform: ["success"]}, speed=0.1)
    (build,) = stand.world.builds
    source = stand.held.settings.sources[platform].source
    db.as_writer(stand.engine, lambda write: builds.named(write, build.build_id, source, stand.now()))
    stand.poll()
    assert stand.row(build)["poll_count"] == 1
    stand.clock.at = build.ends_at + 1
    stand.poll()
    assert (stand.row(build)["state"], stand.row(build)["conclusion"]) == ("completed", "success")


@ON_SQLITE
@pytest.mark.parametrize("requested", [False, True])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_build_that_was_seen_and_is_gone_fails_when_a_second_read_says_so(one, platform, requested):
    stand, build = one(platform)
    if requested:
        change(stand, build, polling.request(stand.now()))
    stand.servers[platform].delete(build.build_id)
    stand.poll()
    row = stand.row(build)
    assert (row["state"], row["consecutive_errors"]) == ("in_progress", 1)
    assert row["poll_error"].startswith("not_found: HTTP 404")
    assert stand.wait(build) == 2 * INTERVAL
    stand.poll(after=2 * INTERVAL)
    row = stand.row(build)
    assert (row["state"], row["polling"], row["next_poll_at"]) == ("failed", "done", None)
    assert row["error"].startswith(f"deleted on {platform}: HTTP 404")
    stand.push(build, State.COMPLETED)
    assert stand.row(build)["state"] == "completed", "the platform has the last word"


@ON_SQLITE
def test_a_build_whose_repository_is_hidden_as_well_is_not_failed_and_admins_are_told_once(one):
    """GitHub's 404 also means a missing permission."""
    stand, build = one()
    stand.servers["github"].inject(json_response({"message": "Not Found"}, 404))
    for count in range(1, 5):
        stand.poll()
        row = stand.row(build)
        assert (row["state"], row["consecutive_errors"]) == ("in_progress", count)
        stand.clock.advance(stand.wait(build))
    (notice,) = stand.notices()
    assert (notice["kind"], notice["subject"]) == (
        "source.not_found",
        f"github: {build.repository.full_name}",
    )
    stand.servers["github"].clear_faults()
    stand.poll()
    assert stand.row(build)["consecutive_errors"] == 0


@ON_SQLITE
def test_a_build_known_by_a_job_alone_was_seen_too(make_stand):
    """A job's webhook says nothing about the status of its run."""
    stand = make_stand(("github",), 1)
    (build,) = stand.world.builds
    stand.push(build, raw_status=None)
    change(stand, build, polling.request(stand.now()))
    stand.servers["github"].delete(build.build_id)
    stand.poll()
    assert (stand.row(build)["state"], stand.row(build)["consecutive_errors"]) == ("in_progress", 1)


# ---- faults of a poll


FAULTS = {
    "502": (lambda: simulated_github.server_error(502), "unavailable: HTTP 502"),
    "500 as HTML": (lambda: simulated_github.html(500), "unavailable: HTTP 500"),
    "no answer in time": (hang, "unavailable: "),
    "a dropped connection": (dropped, "unavailable: "),
    "a page": (simulated_github.html, "unreadable: HTTP 200, but "),
    "a list": (lambda: json_response([]), "unreadable: "),
    "nothing in it": (lambda: json_response({}), "unreadable: "),
    "half of it": (lambda: Response(200, b'{"id": 1, "sta', {}), "unreadable: HTTP 200, but "),
    "another build": (
        lambda: json_response(
            {"id": 1, "project_id": 1, "number": 1_000_000, "building": False, "result": "SUCCESS",
             "status": "completed", "conclusion": "success"}
        ),
        "unreadable: ",
    ),
    "forbidden": (lambda: json_response({"message": "Resource not accessible"}, 403), "forbidden: HTTP 403"),
    "blocked for legal reasons": (lambda: json_response({"message": "DMCA"}, 451), "forbidden: HTTP 451"),
    "cut off": (
        lambda: Response(200, b'{"workflow_runs": []}', {"Content-Type": "application/json"}, cut_after=9),
        "unavailable: ",
    ),
}  # fmt: skip


@ON_SQLITE
@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_poll_backs_off_and_the_next_good_one_forgets_it(one, name):
    stand, build = one("github", speed=0.01, GITHUB_API_TIMEOUT="150")
    answer, message = FAULTS[name]
    server = stand.servers["github"]
    server.inject(answer(), times=3)  # a list, and by itself twice; or a list, and then both
    stand.poll()
    row = stand.row(build)
    assert row["poll_error"].startswith(message)
    assert (row["state"], row["consecutive_errors"], row["polling"]) == ("in_progress", 1, "active")
    assert stand.wait(build) == 2 * INTERVAL
    stand.poll(after=2 * INTERVAL)
    assert stand.row(build)["consecutive_errors"] == 2
    assert stand.wait(build) == 4 * INTERVAL
    stand.poll(after=4 * INTERVAL)
    row = stand.row(build)
    assert (row["consecutive_errors"], row["poll_error"], row["poll_count"]) == (0, None, 3)
    assert stand.wait(build) == INTERVAL
    assert stand.pauses() == {}


@contextmanager
def speaking_plainly():
    """A port where somebody answers in plain text, and listens to the end: one that hangs up has another name."""

    def answer():
        with suppress(OSError), listening.accept()[0] as connection:
            connection.recv(1)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            while connection.recv(65536):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        pool.submit(answer)
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)


@ON_SQLITE
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://ci.invalid", "unavailable: dns"),
        ("https://127.0.0.1:{port}", "unavailable: tls"),
        ("http://127.0.0.1:1", "unavailable: connect"),
    ],
    ids=["DNS", "TLS", "nobody listens"],
)
def test_an_api_that_can_not_be_reached_says_why(one, address, message):
    stand, build = one()
    settings = stand.held.settings.sources["github"]
    with speaking_plainly() as port:
        source = replace(settings.source, api_url=address.format(port=port))
        stand.held.settings.sources["github"] = replace(settings, source=source)
        stand.poll()
    row = stand.row(build)
    assert row["poll_error"].startswith(message)
    assert (row["poll_fault"], row["consecutive_errors"], row["state"]) == ("unavailable", 1, "in_progress")
    assert stand.wait(build) == 2 * INTERVAL


@ON_SQLITE
@pytest.mark.parametrize("skew", [-7200, 7200])
def test_a_wrong_clock_of_theirs_or_ours_does_not_change_how_long_we_wait(one, skew):
    """The reset of a limit is a time by the platform's clock, and so is the Date of the same answer."""
    stand, build = one(speed=0.01)
    server = stand.servers["github"]
    now = stand.clock() + skew
    headers = {
        "X-RateLimit-Limit": "5000", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(now) + 600),
        "Date": formatdate(now, usegmt=True),
    }  # fmt: skip
    server.inject(json_response({"message": "API rate limit exceeded"}, 403, headers), times=1)
    stand.poll()
    told, reason = stand.pauses()["github"]
    assert (told, reason) == (pytest.approx(600, abs=1), "rate_limited")
    stand.poll(after=told + 0.1)
    assert stand.row(build)["poll_count"] == 1


@ON_SQLITE
def test_a_secondary_limit_met_in_earnest_is_waited_out(make_stand):
    """The platform counts 900 points a minute; ours stay below, but another user of the token may not."""
    stand = make_stand(("github",), 8, kinds={"github": ["success"]}, speed=0.01)
    stand.push_all()
    server = stand.servers["github"]
    server.limits.points = 2
    waits = []
    for _ in range(3):
        stand.poll(after=FRESH if not waits else waits[-1])
        waits.append(stand.pauses()["github"][0])
        stand.clock.advance(0.1)
    assert server.secondary_hits == 3
    assert waits == [60, 120, 240]
    assert {stand.row(build)["consecutive_errors"] for build in stand.world.builds} == {0}
    server.limits.points = 900
    stand.poll(after=waits[-1])
    assert min(stand.row(build)["poll_count"] for build in stand.world.builds) >= 1


@ON_SQLITE
def test_a_build_that_expired_is_gone_like_one_that_was_deleted(one):
    stand, build = one()
    stand.servers["github"].inject(
        json_response({"message": "Gone"}, 410), path_contains=f"/actions/runs/{build.run_id}"
    )
    stand.servers["github"].delete(build.build_id)
    stand.poll()
    assert stand.row(build)["poll_error"].startswith("not_found: HTTP 410")
    stand.poll(after=2 * INTERVAL)
    assert stand.row(build)["error"].startswith("deleted on github: HTTP 410")


@ON_SQLITE
@pytest.mark.parametrize("platform", ["gitlab", "jenkins"])
@pytest.mark.parametrize("name", ["502", "a dropped connection", "a page", "nothing in it", "another build"])
def test_the_other_platforms_fail_alike(one, platform, name):
    stand, build = one(platform, speed=0.01)
    answer, message = FAULTS[name]
    stand.servers[platform].inject(answer())
    stand.poll()
    row = stand.row(build)
    assert row["poll_error"].startswith(message)
    assert (row["state"], row["consecutive_errors"]) == ("in_progress", 1)


@ON_SQLITE
def test_an_endless_answer_is_cut_and_counts_as_unreadable(one, monkeypatch):
    monkeypatch.setattr(client, "ANSWER_CAP_BYTES", 1000)
    stand, build = one()
    stand.servers["github"].inject(Response(200, b"[" + b"1," * 100_000 + b"1]"))
    stand.poll()
    assert stand.row(build)["poll_error"] == "unreadable: the answer has more than 1000 bytes"


def test_too_many_errors_in_a_row_end_the_polling_of_that_build(one):
    stand, build = one(speed=0.01, BUILD_MAX_CONSECUTIVE_ERRORS="4", BUILD_BACKOFF_MULTIPLIER="3")
    stand.servers["github"].inject(simulated_github.server_error())
    waits = []
    while stand.row(build)["next_poll_at"]:
        stand.poll()
        waits.append(stand.wait(build))
        stand.clock.advance(waits[-1] or 0)
    assert waits == [45, 135, 405, None]
    row = stand.row(build)
    assert (row["polling"], row["state"], row["consecutive_errors"]) == ("error", "in_progress", 4)
    assert stand.types(build)[-1] == "polling_error"
    assert stand.events(build)[-1]["data"]["detail"] == {
        "poll_count": 4, "consecutive_errors": 4, "error": row["poll_error"],
    }  # fmt: skip
    stand.poll(after=86_400)
    assert stand.requests() == {"github": 7}, "a list, and three times a list and the build"
    stand.servers["github"].clear_faults()
    stand.push(build)
    stand.poll(after=FRESH)
    assert stand.row(build)["poll_count"] == 5


@ON_SQLITE
def test_back_off_of_a_thousand_errors_still_counts(one):
    stand, build = one(speed=0.01, BUILD_MAX_CONSECUTIVE_ERRORS="1000", BUILD_BACKOFF_MULTIPLIER="10")
    change(stand, build, {"consecutive_errors": 900})
    stand.servers["github"].inject(simulated_github.server_error())
    stand.poll()
    assert stand.row(build)["consecutive_errors"] == 901
    assert stand.wait(build) == polling.MOST_BACKOFF_SECONDS


@ON_SQLITE
def test_one_bad_build_costs_the_others_nothing(make_stand):
    stand = make_stand(("github",), 12, kinds={"github": ["success"]}, speed=0.01)
    stand.push_all()
    bad = stand.world.builds[2].repository.full_name
    stand.servers["github"].inject(dropped(), path_contains=bad)
    stand.poll(after=FRESH)
    for build in stand.world.builds:
        assert stand.row(build)["consecutive_errors"] == int(build.repository.full_name == bad)


@ON_SQLITE
@pytest.mark.parametrize("answer", [simulated_github.html, lambda: json_response({"message": "x"}, 403)])
def test_where_lists_are_refused_the_builds_are_read_one_by_one(make_stand, answer):
    stand = make_stand(("github",), 4, kinds={"github": ["success"]}, speed=0.01)
    stand.push_all()
    stand.servers["github"].inject(answer(), path_contains="/actions/runs")
    stand.poll(after=FRESH)
    assert {stand.row(build)["consecutive_errors"] for build in stand.world.builds} == {1}
    server = stand.servers["github"]
    server.clear_faults()
    handle = server._answer
    server._answer = lambda asked: answer() if asked.path.endswith("/actions/runs") else handle(asked)
    stand.poll(after=2 * INTERVAL)
    assert {stand.row(build)["consecutive_errors"] for build in stand.world.builds} == {0}
    assert [server.polls(build.build_id) for build in stand.world.builds] == [2] * 4


@ON_SQLITE
def test_json_of_a_fault_is_never_executed_nor_stored_whole(one):
    """What a platform says in an error is shown to people: short, and as text."""
    stand, build = one()
    said = {"message": "<script>alert(1)</script>\u0000" + "x" * 5000}
    stand.servers["github"].inject(Response(500, json.dumps(said).encode()))
    stand.poll()
    error = stand.row(build)["poll_error"]
    assert len(error) < 300
    assert "\0" not in error


# ---- giving up, and waiting


def test_polling_without_an_end_gives_up_and_the_platform_has_the_last_word(one):
    stand, build = one(speed=0.001, BUILD_MAX_POLL_TIME="60000")
    for _ in range(4):
        stand.poll()
        stand.clock.advance(INTERVAL)
    assert stand.row(build)["state"] == "in_progress"
    stand.poll()
    row = stand.row(build)
    assert (row["state"], row["conclusion"], row["next_poll_at"]) == ("timeout", "timed_out", None)
    assert row["error"] == "no end after 5 polls"
    assert stand.types(build)[-2:] == ["polling_timeout", "timeout"]
    stand.poll(after=86_400)
    assert stand.requests() == {"github": 5}
    stand.push(build, State.COMPLETED)
    assert (stand.row(build)["state"], stand.row(build)["error"]) == ("completed", None)


@ON_SQLITE
def test_failed_polls_count_towards_the_time_as_well(one):
    stand, build = one(BUILD_MAX_POLL_TIME="60000")
    stand.servers["github"].inject(simulated_github.server_error())
    stand.poll()
    stand.poll(after=30)
    stand.poll(after=60)
    assert stand.row(build)["state"] == "timeout"


@ON_SQLITE
@pytest.mark.parametrize(("platform", "kind"), [("github", "unapproved"), ("gitlab", "manual_forever")])
def test_a_build_that_waits_for_a_person_is_read_slowly_and_never_times_out(make_stand, platform, kind):
    stand = make_stand((platform,), 1, kinds={platform: [kind]}, BUILD_MAX_POLL_TIME="60000")
    (build,) = stand.world.builds
    stand.push(build, State.QUEUED)
    stand.clock.at = build.ends_at + FRESH
    stand.poll()
    assert stand.wait(build) == polling.WAITING_FACTOR * INTERVAL
    for count in range(2, 20):
        stand.poll(after=polling.WAITING_FACTOR * INTERVAL)
        assert stand.row(build)["poll_count"] == count
    assert not State(stand.row(build)["state"]).terminal
    assert "polling_timeout" not in stand.types(build)
    stand.servers[platform].inject(Response(502), times=1)
    stand.poll(after=polling.WAITING_FACTOR * INTERVAL)
    assert stand.wait(build) >= polling.WAITING_FACTOR * INTERVAL
    assert not State(stand.row(build)["state"]).terminal


@ON_SQLITE
def test_a_build_that_goes_on_after_a_long_wait_has_its_whole_time_before_it(make_stand):
    """Nobody approved it for more than an hour: that hour was not the build's."""
    stand = make_stand(("github",), 1, kinds={"github": ["approved"]}, speed=0.001)
    (build,) = stand.world.builds
    stand.push(build, State.QUEUED)
    approved_at = build.moments[1].at
    assert approved_at - stand.clock() > 3600
    stand.clock.advance(FRESH)
    while stand.clock() < approved_at:
        stand.poll()
        stand.clock.advance(stand.wait(build))
    stand.poll()
    assert (stand.row(build)["state"], stand.row(build)["waiting"]) == ("queued", False)
    assert stand.wait(build) == INTERVAL
    stand.poll(after=3590)
    assert not State(stand.row(build)["state"]).terminal
    stand.poll(after=INTERVAL)
    assert stand.row(build)["state"] == "timeout"


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
