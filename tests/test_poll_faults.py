"""Polling when builds are not found, APIs fail, and no end comes."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from email.utils import formatdate
from functools import partial

import pytest
from sqlalchemy import select

from pollers import client
from tests.stand import FRESH, INTERVAL, ON_SQLITE, change, one_stale, stands
from webhook_app import builds, db, models, polling
from webhook_app.lifecycle import State
from webhook_app.simulated import github as simulated_github
from webhook_app.simulated.httpd import Response, dropped, hang, json_response
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
    assert (row["state"], row["conclusion"], row["polling"]) == ("failed", "failure", "done")
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


def gone_for(stand, build, minutes):
    """Poll a build that its platform does not know, whenever it is due, for so long."""
    until = stand.now() + timedelta(minutes=minutes)
    while stand.now() < until:
        stand.poll()
        stand.clock.advance(min(stand.wait(build), (until - stand.now()).total_seconds()))


@ON_SQLITE
@pytest.mark.parametrize("requested", [False, True])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_build_that_was_seen_and_is_gone_fails_when_that_has_been_so_for_ten_minutes(
    one, platform, requested
):
    stand, build = one(platform)
    if requested:
        change(stand, build, polling.request(stand.now()))
    stand.servers[platform].delete(build.build_id)
    stand.poll()
    row = stand.row(build)
    assert (row["state"], row["consecutive_errors"]) == ("in_progress", 1)
    assert row["poll_error"].startswith("not_found: HTTP 404")
    assert stand.wait(build) == 2 * INTERVAL
    gone_for(stand, build, minutes=10)
    assert (stand.row(build)["state"], stand.row(build)["polling"]) == ("in_progress", "active")
    stand.poll()
    row = stand.row(build)
    assert (row["state"], row["polling"]) == ("failed", "done")
    assert row["error"].startswith(f"deleted on {platform}: HTTP 404")
    assert stand.wait(build) == 4 * INTERVAL, "it is read on"
    stand.push(build, State.COMPLETED)
    assert stand.row(build)["state"] == "completed", "the platform has the last word"


def missing_by_itself(stand, build):
    """Let reads of the build alone say "not found"; its server, and how it answered before."""
    server = stand.servers[build.platform]
    usual = server._answer
    path = f"/{build.number}/api/json" if build.platform == "jenkins" else f"/{build.run_id}"
    server._answer = lambda asked: (
        json_response({"message": "404 Not Found"}, 404) if asked.path.endswith(path) else usual(asked)
    )
    return server, usual


@ON_SQLITE
@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_incident_of_some_minutes_fails_no_build(one, platform):
    """Each read of a build says "not found" for nine minutes, while its repository can be read."""
    stand, build = one(platform, speed=0.01)
    server, usual = missing_by_itself(stand, build)
    gone_for(stand, build, minutes=9)
    assert (stand.row(build)["state"], stand.row(build)["polling"]) == ("in_progress", "active")
    server._answer = usual
    stand.poll()
    row = stand.row(build)
    assert (row["state"], row["missing_since"], row["poll_fault"]) == ("in_progress", None, None)


@ON_SQLITE
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_build_that_its_repositorys_list_shows_is_not_deleted(one, platform):
    stand, build = one(platform, speed=0.01)
    missing_by_itself(stand, build)
    gone_for(stand, build, minutes=15)
    assert stand.row(build)["state"] == "in_progress"


@ON_SQLITE
@pytest.mark.parametrize("end", ["timeout", "failed"])
def test_the_true_end_is_found_behind_any_number_of_newer_builds(make_stand, end):
    """No page of a list shows it: it is read by itself, ever more slowly."""
    stand = make_stand(("github",), 40, kinds={"github": ["success"]}, speed=0.01)
    first = min(stand.world.builds, key=lambda build: build.run_id)
    stand.push(first)
    change(stand, first, {"state": end, "conclusion": "failure", "ended_at": stand.now()})
    ended = replace_told(stand, first)
    assert ended["next_poll_at"] is not None
    stand.clock.at = max(build.ends_at for build in stand.world.builds) + 3600
    stand.poll()
    assert (stand.row(first)["state"], stand.row(first)["next_poll_at"]) == ("completed", None)
    assert stand.servers["github"].count(f"/actions/runs/{first.run_id}") == 1


def replace_told(stand, build):
    """Let the polling of a build that we ended be as it is after an end of ours."""
    row = stand.row(build)
    change(stand, build, polling.read_on(row, stand.now(), stand.held.pace))
    return stand.row(build)


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
    gone_for(stand, build, minutes=10)
    stand.poll()
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


@pytest.fixture
def at_once(monkeypatch):
    """No wait before a read is repeated."""
    monkeypatch.setattr(client, "RETRY_WAITS_SECONDS", (0.0,) * 10)


@ON_SQLITE
@pytest.mark.parametrize("name", ["502", "a dropped connection"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_read_that_fails_is_repeated_as_often_as_is_set(one, at_once, platform, name):
    stand, build = one(platform, **{f"{platform.upper()}_API_RETRIES": "2"})
    server, (answer, message) = stand.servers[platform], FAULTS[name]
    asked = server.count()
    server.inject(answer(), times=3)
    stand.poll()
    row = stand.row(build)
    assert (server.count() - asked, row["consecutive_errors"]) == (3, 1)
    assert row["poll_error"].startswith(message)
    server.inject(answer(), times=2)
    stand.poll(after=stand.wait(build))
    row = stand.row(build)
    assert (row["poll_count"], row["consecutive_errors"], row["poll_error"]) == (2, 0, None)


@ON_SQLITE
def test_each_repetition_of_a_read_costs_budget(one, at_once):
    stand, _ = one(GITHUB_API_RETRIES="3")
    stand.servers["github"].inject(simulated_github.server_error(), times=3)
    stand.poll()
    with db.reading(stand.engine) as connection:
        assert connection.execute(select(models.budgets.c.requests)).scalar_one() == 4


@ON_SQLITE
@pytest.mark.parametrize(
    "answer",
    [
        Response(403), Response(200, b"<html>"), Response(429, headers={"Retry-After": "9"}),
        Response(503, headers={"Retry-After": "9"}),
    ],
)  # fmt: skip
def test_what_would_not_be_over_in_a_moment_is_not_repeated(one, at_once, answer):
    stand, _ = one(GITHUB_API_RETRIES="5")
    server = stand.servers["github"]
    server.inject(answer)
    stand.poll()
    assert set(server.requests.values()) == {1}  # of the list, and perhaps of the run


@ON_SQLITE
def test_repetitions_end_with_the_time_of_the_read(one, monkeypatch):
    """Who hangs gets no second time-out: the lane would be kept longer than its lease."""
    stand, build = one(GITHUB_API_RETRIES="5", GITHUB_API_TIMEOUT="100")
    asked = stand.servers["github"].count()
    monkeypatch.setattr(client, "RETRY_WAITS_SECONDS", (0.1,) * 10)
    stand.servers["github"].inject(simulated_github.server_error())
    stand.poll()
    assert stand.servers["github"].count() - asked <= 1  # none, if the machine is busy
    assert stand.row(build)["consecutive_errors"] == 1


@ON_SQLITE
def test_an_endless_answer_is_cut_and_counts_as_unreadable(one, monkeypatch):
    monkeypatch.setattr(client, "ANSWER_CAP_BYTES", 1000)
    stand, build = one()
    stand.servers["github"].inject(Response(200, b"[" + b"1," * 100_000 + b"1]"))
    stand.poll()
    assert stand.row(build)["poll_error"] == "unreadable: the answer has more than 1000 bytes"


def test_too_many_errors_in_a_row_end_the_polling_of_that_build(one):
    """It is read again ever more slowly, without a word as long as that fails."""
    stand, build = one(speed=0.01, BUILD_MAX_CONSECUTIVE_ERRORS="4", BUILD_BACKOFF_MULTIPLIER="3")
    stand.servers["github"].inject(simulated_github.server_error())
    waits = []
    while stand.row(build)["polling"] != "error":
        stand.poll()
        waits.append(stand.wait(build))
        stand.clock.advance(waits[-1])
    assert waits == [45, 135, 405, 3600]
    row = stand.row(build)
    assert (row["polling"], row["state"], row["consecutive_errors"]) == ("error", "in_progress", 4)
    assert stand.types(build)[-1] == "polling_error"
    assert stand.events(build)[-1]["data"]["detail"] == {
        "poll_count": 4, "consecutive_errors": 4, "error": row["poll_error"],
    }  # fmt: skip
    assert stand.requests() == {"github": 7}, "a list, and three times a list and the build"
    told = stand.types(build)
    for wait in (7200, 14_400, 28_800, 57_600, 86_400, 86_400):
        stand.poll()
        assert stand.wait(build) == wait
        stand.clock.advance(wait)
    assert stand.types(build) == told
    assert stand.row(build)["consecutive_errors"] == 10
    stand.servers["github"].clear_faults()
    stand.push(build)
    stand.poll(after=FRESH)
    assert (stand.row(build)["poll_count"], stand.row(build)["consecutive_errors"]) == (11, 0)


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
    assert (row["state"], row["conclusion"], row["polling"]) == ("timeout", "timed_out", "timeout")
    assert row["error"] == "no end after 5 polls"
    assert stand.types(build)[-2:] == ["polling_timeout", "timeout"]
    assert stand.wait(build) == 4 * INTERVAL, "it is read on"
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
