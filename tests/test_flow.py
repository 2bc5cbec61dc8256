"""From a platform's push to a subscriber's message, through real processes and real HTTP."""

import contextlib
import os
import re
import shlex
import signal
import sqlite3
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
from redis import Redis

from tests import hub as hubs
from tests import postgres
from tests.hub import (
    PATIENCE_SECONDS,
    Callback,
    Platforms,
    free_port,
    own_postgres,
    own_redis,
    running,
    subscribed,
    until,
)
from tests.wire import OK
from webhook_app import VERSION, supervisor
from webhook_app.up import read_secrets

DATA_FIELDS = {
    "build_id", "sequence", "event_id", "source", "platform", "repository", "workflow", "branch", "commit",
    "number", "attempt", "state", "previous_state", "conclusion", "url", "started_at", "ended_at",
    "duration_seconds", "progress", "observed_by", "error", "trigger", "head_repository", "is_fork",
}  # fmt: skip
"""What every message about a build tells."""

MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
INTERVAL_SECONDS, FRESHNESS_SECONDS, HEARTBEAT_SECONDS = 1.0, 2.0, 1.0
CALM_INTERVAL_SECONDS = 4.0
RESUME_SECONDS = 15.0
"""Work resumes so soon after Redis is back."""


@pytest.fixture(scope="module")
def platforms():
    with Platforms() as made:
        yield made


@pytest.fixture(scope="module")
def calm(platforms):
    """A BuildRelay on SQLite that trusts pushes for minutes, and polls every 4 s what it polls."""
    pace = {
        "DELIVERY_RETRY_SCHEDULE": "1,2,3",
        "BUILD_POLL_INTERVAL": str(int(CALM_INTERVAL_SECONDS * 1000)),
        "BUILD_PUSH_FRESHNESS": "600000",
    }
    with running({**platforms.environment(), **pace}) as hub:
        yield hub


@pytest.fixture(scope="module")
def calm_on_postgres(postgres_url, platforms):
    """The same on PostgreSQL."""
    with (
        postgres.fresh_database(postgres_url) as url,
        running({**platforms.environment(), "DATABASE_URL": url}) as hub,
    ):
        yield hub


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request):
    return request.getfixturevalue("calm" if request.param == "sqlite" else "calm_on_postgres")


@pytest.fixture(scope="module")
def eager(platforms):
    """A BuildRelay that distrusts silence after a second or two."""
    pace = {
        "BUILD_POLL_INTERVAL": str(int(INTERVAL_SECONDS * 1000)),
        "BUILD_PUSH_FRESHNESS": str(int(FRESHNESS_SECONDS * 1000)),
        "HEARTBEAT_TIMEOUT": str(HEARTBEAT_SECONDS),
        "DISCOVERY_INTERVAL": "1",
        "DISCOVERY_JITTER": "0",
    }
    with running({**platforms.environment(discovery=True), **pace}) as hub:
        yield hub


# ---- what builds leave -----------------------------------------------------------------------


def test_a_failed_build_shows_its_log_its_error_and_its_artifacts(postgres_url):
    """The web server, the metronome, a worker of its own, and a subscriber that is told of the error."""
    with (
        postgres.fresh_database(postgres_url) as url,
        Platforms("failure") as platforms,
        running({**platforms.environment(), "DATABASE_URL": url}) as hub,
        subscribed(hub) as callback,
    ):
        builds = [platforms.begin(name) for name in ("github", "gitlab", "jenkins")]
        for build in builds:
            for push in platforms.pushes(build):
                platforms.push(hub, push)
        for build in builds:
            path = f"/api/builds/{build.build_id}"
            until(
                lambda path=path: hub.ask("GET", f"{path}/logs").status_code == 200,
                PATIENCE_SECONDS,
                "the log",
            )
            lines = hub.get(f"{path}/logs")["lines"]
            assert "FAIL tests/test_cart.py::test_tax_is_rounded" in lines
            text = hub.ask("GET", f"{path}/logs?tail=1", headers={"Accept": "text/plain"}).text
            assert text == f"{lines[-1]}\n"
            until(
                lambda path=path: hub.get(f"{path}/artifacts")["state"] == "stored",
                PATIENCE_SECONDS,
                "the artifacts",
            )
            for artifact in hub.get(f"{path}/artifacts")["items"]:
                download = hub.ask("GET", f"{path}/artifacts/{artifact['name']}")
                assert (download.status_code, len(download.content) > 0) == (200, True)
                assert download.headers["Content-Disposition"].startswith("attachment")
            error = hub.build(build.build_id)["error"]
            assert "19.04 != 19.05" in error
            messages = callback.wait_for(hub, build.build_id)
            assert messages[-1]["data"]["error"] == error
            assert [message["type"] for message in messages].count("build.failed") == 1


# ---- pushes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_pushes_become_a_build_and_signed_messages(either, platforms, platform):
    build = platforms.begin(platform)
    pushes = platforms.pushes(build)
    with subscribed(either) as callback:
        for push in pushes:
            answer = platforms.push(either, push)
            assert answer["status"] == "accepted"
            assert answer["build_id"] == build.build_id
        messages = callback.wait_for(either, build.build_id)
        tries = callback.tries(build.build_id)

    shown = either.build(build.build_id)
    assert (shown["state"], shown["conclusion"], shown["attempt"]) == ("completed", "success", 1)
    assert shown["repository"] == build.repository.full_name
    assert (shown["branch"], shown["commit"], shown["progress"]) == (build.branch, build.commit, 100)
    assert shown["observed_by"] == "push"

    assert [message["data"]["sequence"] for message in messages] == list(range(1, len(messages) + 1))
    states = [message["type"] for message in messages if message["type"] != "build.progress"]
    assert states in (
        ["build.queued", "build.in_progress", "build.completed"],
        ["build.in_progress", "build.completed"],
    )
    for message in messages:
        assert set(message) == {"type", "timestamp", "data"}
        assert set(message["data"]) >= DATA_FIELDS
        assert MOMENT.fullmatch(message["timestamp"])
        assert message["data"]["source"] == message["data"]["platform"] == platform
        assert message["data"]["observed_by"] == "push"
    last = messages[-1]["data"]
    for name in DATA_FIELDS & set(shown):
        assert last[name] == shown[name], name
    assert last["previous_state"] == "in_progress"

    events = either.events(build.build_id)
    assert [event["id"] for event in events] == [message["data"]["event_id"] for message in messages]
    for tried in tries:
        assert tried.headers["webhook-attempt"] == "1"
        assert tried.headers["user-agent"] == f"BuildRelay/{VERSION}"
        assert tried.headers["content-type"] == "application/json"
        assert abs(int(tried.headers["webhook-timestamp"]) - time.time()) < 60
        assert tried.headers["webhook-signature"].startswith("v1,")
    assert len({tried.id for tried in tries}) == len(tries) == len(messages)


def test_reports_of_a_script_become_a_build_and_messages(either):
    run = f"nightly-{time.time_ns()}"
    build_id = f"script:{run}"
    with subscribed(either) as callback:
        for event, more in (
            ("build_started", {"repo": "web", "branch": "main", "command": "make all"}),
            ("stage_started", {"stage": "test"}),
            ("heartbeat", {}),
            ("stage_completed", {"stage": "test", "durationMs": 12}),
            ("build_completed", {}),
        ):
            reply = either.report(run, event, **more)
            assert (reply.status_code, reply.json()["status"]) == (202, "accepted")
            assert reply.json()["build_id"] == build_id
        messages = callback.wait_for(either, build_id)
    assert [message["type"] for message in messages] == [
        "build.in_progress", "build.reported", "build.reported", "build.completed",
    ]  # fmt: skip
    assert {message["data"]["observed_by"] for message in messages} == {"report"}
    assert messages[1]["data"]["detail"] == {"type": "stage_started", "stage": "test"}
    assert either.build(build_id)["conclusion"] == "success"
    status = either.get(f"/api/builds/{build_id}/status")
    assert (status["status"], status["progress"], status["eventCount"]) == ("completed", 100, 4)


def test_a_second_run_of_one_script_reaches_everybody_as_the_next_attempt(calm):
    run = f"nightly {time.time_ns()}"
    build_id = f"script:{run.replace(' ', '~20')}"
    with subscribed(calm) as callback:
        for event, more, status, dropped in (
            ("build_started", {"pid": "7"}, "accepted", ["pid"]),
            ("build_failed", {"durationMs": 72_000.2, "message": "no space"}, "accepted", ["durationMs"]),
            ("stage_completed", {}, "ignored", []),
            ("build_started", {}, "accepted", []),
            ("build_completed", {"message": {"text": "done"}}, "accepted", ["message"]),
        ):
            reply = calm.report(run, event, **more)
            assert (reply.status_code, reply.json()["status"]) == (202, status)
            assert reply.json()["build_id"] == build_id
            assert reply.json().get("dropped", []) == dropped
        messages = callback.wait_for(calm, build_id)
    assert [(message["type"], message["data"]["attempt"]) for message in messages] == [
        ("build.in_progress", 1), ("build.failed", 1), ("build.in_progress", 2), ("build.completed", 2),
    ]  # fmt: skip
    told = [one for one in calm.get("/api/notifications?limit=200")["items"] if one["subject"] == build_id]
    assert [one["kind"] for one in reversed(told) if one["kind"].startswith("script.")] == [
        "script.started", "script.failed", "script.started", "script.completed",
    ]  # fmt: skip
    assert "failed after 1 min 12 s: no space" in next(
        one["text"] for one in told if one["kind"] == "script.failed"
    )
    refused = calm.report(run, "build_exploded")
    assert (refused.status_code, refused.headers["Content-Type"]) == (422, "application/problem+json")
    assert "build_completed" in refused.json()["allowed"]


def test_a_forged_push_changes_nothing(calm, platforms):
    build = platforms.begin("github")
    headers, body = hubs.signed(
        platforms.pushes(build)[0], "http://x", calm.secrets | {"GITHUB_WEBHOOK_SECRET": "?"}
    )
    assert calm.post("github", headers, body).status_code == 401
    assert calm.build(build.build_id) is None


def test_a_redelivery_is_a_duplicate_even_for_a_new_process(calm, platforms):
    build = platforms.begin("gitlab")
    first = platforms.pushes(build)[0]
    assert platforms.push(calm, first)["status"] == "accepted"
    again = platforms.push(calm, first)
    assert (again["status"], again["build_id"]) == ("duplicate", build.build_id)

    old = calm.kill("web")
    until(lambda: calm.pid("web") not in (None, old), PATIENCE_SECONDS, "a new web process")
    answer = calm.push_until_taken(first, platforms.servers["gitlab"].url)
    assert (answer["status"], answer["build_id"]) == ("duplicate", build.build_id)
    assert len(calm.events(build.build_id)) == 1


def test_a_failed_delivery_is_tried_again_under_the_same_id(calm, platforms):
    build = platforms.begin("jenkins")
    with subscribed(calm) as callback:
        callback.fail_next = 1
        platforms.push(calm, platforms.pushes(build)[0])
        callback.wait_for(calm, build.build_id)
        first, second = callback.tries(build.build_id)

        def settled():  # after the callback has had it
            shown = calm.get(f"/api/deliveries/{first.id}")
            return shown["state"] != "pending" and shown

        delivery = until(settled, PATIENCE_SECONDS, "the worker's note of the second try")
    assert (first.answered, second.answered) == (500, 204)
    assert first.id == second.id
    assert first.body == second.body
    assert [one.headers["webhook-attempt"] for one in (first, second)] == ["1", "2"]
    assert second.at - first.at > 0.7  # 1 s less jitter
    assert (delivery["state"], delivery["attempt_count"]) == ("delivered", 2)
    assert [tried["status_code"] for tried in delivery["attempts"]] == [500, 204]


# ---- polling ---------------------------------------------------------------------------------


def moment(text):
    return datetime.fromisoformat(text)


def polled(hub, path, times):
    """How often a build was polled, and when last, once it was so many `times`."""
    shown = hub.get(path)
    return shown["pollCount"] >= times and (shown["pollCount"], moment(shown["lastPollTime"]))


def test_builds_whose_pushes_come_are_not_polled(calm, platforms):
    """A witness, polled on request, shows that the poller was at work all the while."""
    fresh = [platforms.begin(name) for name in ("github", "gitlab", "jenkins")]
    for build in fresh:
        for push in platforms.pushes(build)[:-1]:
            platforms.push(calm, push)
    witness = platforms.begin("github")
    assert calm.ask("POST", f"/api/builds/{witness.build_id}/polling").status_code == 202
    path = f"/api/builds/{witness.build_id}/polling"
    first = until(lambda: polled(calm, path, 1), PATIENCE_SECONDS, "the first poll of the witness")
    second = until(lambda: polled(calm, path, first[0] + 1), PATIENCE_SECONDS, "its next poll")
    between = (second[1] - first[1]).total_seconds() / (second[0] - first[0])
    assert CALM_INTERVAL_SECONDS <= between < 15, "its own interval, not the default"
    for build in fresh:
        platforms.push(calm, platforms.pushes(build)[-1])
        assert calm.state(build.build_id) == "completed"
        assert platforms.polls(build) == 0
        assert calm.get(f"/api/builds/{build.build_id}/polling")["pollCount"] == 0


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_a_lost_end_is_found_by_polling(eager, platforms, platform):
    with subscribed(eager) as callback:  # first: discovery may come at once
        build = platforms.begin(platform)
        *told, _lost = platforms.pushes(build)
        if platform == "jenkins":
            told = told[:-1]  # COMPLETED and FINALIZED both tell the end
        for push in told:
            platforms.push(eager, push)
        platforms.go_to(build.ends_at)
        until(lambda: eager.state(build.build_id) == "completed", PATIENCE_SECONDS, "the end")
        last_push = moment(eager.build(build.build_id)["last_push_at"])
        messages = callback.wait_for(eager, build.build_id)
    types = [message["type"] for message in messages]
    assert types.index("build.polling_started") < types.index("build.completed")
    assert types[-1] == "build.polling_completed"
    ends = [message for message in messages if message["type"] == "build.completed"]
    assert [end["data"]["observed_by"] for end in ends] == ["poll"]
    silence = moment(ends[0]["timestamp"]) - last_push
    assert silence.total_seconds() >= FRESHNESS_SECONDS, "nobody asked before it was stale"
    assert eager.get(f"/api/builds/{build.build_id}/polling")["pollCount"] >= 1

    # The late push of the end changes nothing, and nobody polls any more.
    assert platforms.push(eager, _lost)["status"] == "accepted"
    assert len(eager.events(build.build_id)) == len(messages)
    assert not eager.get(f"/api/builds/{build.build_id}/polling")["isPolling"]


def test_a_build_whose_every_push_was_lost_is_discovered(eager, platforms):
    with subscribed(eager) as callback:  # first: discovery may come at once
        build = platforms.begin("github")
        # A source that is pushed well is given that time; the platform tells whole seconds.
        platforms.go_to(build.begins_at + FRESHNESS_SECONDS + 1)
        until(lambda: eager.build(build.build_id), PATIENCE_SECONDS, "the discovery")
        platforms.go_to(build.ends_at)
        until(lambda: eager.state(build.build_id) == "completed", PATIENCE_SECONDS, "the end")
        messages = callback.wait_for(eager, build.build_id)
    assert {message["data"]["observed_by"] for message in messages} == {"poll"}
    assert eager.build(build.build_id)["last_push_at"] is None


def test_a_silent_script_fails_and_a_later_word_revives_it(eager):
    run = f"silent-{time.time_ns()}"
    build_id = f"script:{run}"
    with subscribed(eager) as callback:
        eager.report(run, "build_started")
        until(lambda: eager.state(build_id) == "failed", PATIENCE_SECONDS, "the failure")
        assert "no heartbeat" in eager.build(build_id)["error"]
        eager.report(run, "heartbeat")
        eager.report(run, "build_completed")
        assert eager.state(build_id) == "completed"
        messages = callback.wait_for(eager, build_id)
    types = [message["type"].removeprefix("build.") for message in messages]
    # A machine that stands still for a second after the heartbeat has it fail once more.
    assert re.fullmatch("in_progress failed in_progress (failed )?completed", " ".join(types))
    revived = messages[2]["data"]
    assert (revived["state"], revived["error"], revived["ended_at"]) == ("in_progress", None, None)


def test_polling_is_started_and_stopped_by_request(calm, platforms):
    build = platforms.begin("gitlab")
    path = f"/api/builds/{build.build_id}/polling"
    assert calm.ask("GET", path).status_code == 404
    platforms.push(calm, platforms.pushes(build)[0])
    idle = calm.get(path)
    assert (idle["isPolling"], idle["reason"], idle["pollCount"]) == (False, "recent_push", 0)

    started = calm.ask("POST", path)
    assert (started.status_code, started.json()["isPolling"]) == (202, True)
    refused = calm.ask("POST", path)
    assert refused.status_code == 409
    assert refused.headers["content-type"] == "application/problem+json"
    until(lambda: calm.get(path)["pollCount"] >= 1, PATIENCE_SECONDS, "a poll")

    stopped = calm.ask("DELETE", path)
    assert (stopped.status_code, stopped.json()["isPolling"]) == (200, False)
    assert calm.get(path)["reason"] == "stopped_by_hand"
    assert calm.get(path)["nextPollTime"] is None


def test_polling_a_build_that_does_not_exist_fails_it_at_once(calm):
    build_id = "github:Octo-Demo:storefront:999999999999"
    reply = calm.ask("POST", f"/api/builds/{build_id}/polling")
    assert reply.status_code == 202
    until(lambda: calm.state(build_id) == "failed", PATIENCE_SECONDS, "the failure")
    assert "not found" in calm.build(build_id)["error"]
    assert calm.ask("POST", f"/api/builds/{build_id}/polling").status_code == 202, "it may be there by now"


# ---- Redis goes away -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_redis(platforms):
    """A BuildRelay whose Redis the test holds in its hands: `(hub, url, server)`."""
    with own_redis() as (url, server), running({**platforms.environment(), "REDIS_URL": url}) as hub:
        assert hub.pid("redis") is None
        yield hub, url, server


def resumed(callback, builds, back):
    """So many seconds after `back` came the first message."""
    tries = (tried.at for build in builds for tried in callback.tries(build.build_id))
    return min((at - back for at in tries if at > back), default=0.0)


@pytest.mark.parametrize("way", ["frozen", "killed"])
def test_without_redis_pushes_are_taken_and_delivered_after_its_return(with_redis, platforms, way):
    hub, _url, server = with_redis
    builds = [platforms.begin("github") for _ in range(5)]
    with subscribed(hub) as callback:
        if way == "frozen":
            server.signal(signal.SIGSTOP)
        else:
            server.stop(signal.SIGKILL)
        for build in builds:
            for push in platforms.pushes(build):
                assert platforms.push(hub, push)["status"] == "accepted"
        until(lambda: not hub.is_ready(), PATIENCE_SECONDS, "/readyz to notice")
        if way == "frozen":
            server.signal(signal.SIGCONT)
        else:
            server.start()
        back = time.monotonic()
        for build in builds:
            callback.wait_for(hub, build.build_id)
        assert resumed(callback, builds, back) < RESUME_SECONDS
        until(hub.is_ready, PATIENCE_SECONDS, "/readyz")


def test_flushing_redis_in_mid_stream_loses_nothing(with_redis, platforms):
    hub, url, _server = with_redis
    builds = [platforms.begin("github") for _ in range(20)]
    pushes = sorted((push for build in builds for push in platforms.pushes(build)), key=lambda push: push.at)
    with subscribed(hub) as callback, Redis.from_url(url) as redis:
        for number, push in enumerate(pushes):
            platforms.push(hub, push)
            if number % 5 == 0:
                redis.flushall()
        redis.flushall()
        flushed = time.monotonic()
        for build in builds:
            callback.wait_for(hub, build.build_id)
            assert hub.state(build.build_id) == "completed"
        assert resumed(callback, builds, flushed) < RESUME_SECONDS
        until(hub.is_ready, PATIENCE_SECONDS, "/readyz")


# ---- the store goes away ---------------------------------------------------------------------


def test_without_its_store_it_accepts_nothing(platforms):
    with own_postgres() as (url, server), running({**platforms.environment(), "DATABASE_URL": url}) as hub:
        build = platforms.begin("github")
        first, second, *_ = platforms.pushes(build)
        base = platforms.servers["github"].url
        with subscribed(hub) as callback:
            assert platforms.push(hub, first)["status"] == "accepted"
            callback.wait_for(hub, build.build_id)
            server.stop(signal.SIGINT)
            for _ in range(3):
                refused = hub.push(second, base)
                assert refused.status_code == 503
                assert int(refused.headers["Retry-After"]) > 0
                assert refused.headers["content-type"] == "application/problem+json"
            until(lambda: not hub.is_ready(), PATIENCE_SECONDS, "/readyz to notice")
            server.start()
            answer = hub.push_until_taken(second, base)
            assert answer["status"] == "accepted"  # what was refused was not kept
            assert hub.push(second, base).json()["status"] == "duplicate"
            assert hub.push(first, base).json()["status"] == "duplicate"
            until(hub.is_ready, PATIENCE_SECONDS, "/readyz")
            callback.wait_for(hub, build.build_id)


# ---- beginning and end -----------------------------------------------------------------------


def test_a_stop_signal_ends_everything_in_time_even_with_a_delivery_under_way(platforms):
    grace = {"STOP_GRACE_SECONDS": "3"}
    with running(platforms.environment() | grace) as hub, Callback() as callback:
        hub.subscribe(callback.url)
        callback.hang = True
        platforms.push(hub, platforms.pushes(platforms.begin("github"))[0])
        until(lambda: callback.open_requests, PATIENCE_SECONDS, "a delivery under way")
        hubs.stop(hub.process, signal.SIGTERM)


def test_a_restart_repeats_nothing_though_every_process_gets_term_twice(platforms, serve):
    """As on a platform that signals every process: what is under way ends and is noted, Redis gone or not."""
    released = threading.Event()

    def answer_later(connection):
        connection.read_request()
        released.wait(PATIENCE_SECONDS)
        connection.say(OK)

    server = serve(answer_later)
    patient = {"STOP_GRACE_SECONDS": "120", "DELIVERY_TIMEOUT": "60"}
    with running(platforms.environment() | patient) as hub:
        hub.subscribe(server.url)
        platforms.push(hub, platforms.pushes(platforms.begin("github"))[0])
        until(lambda: server.asked, PATIENCE_SECONDS, "a delivery under way")
        everyone = {each.name: each.pid for each in hubs.family(hub.process.pid) if each.name}
        others = [(pid, supervisor.identity(pid)) for name, pid in everyone.items() if name != "deliver"]
        _to_all([hub.process.pid, *everyone.values()], signal.SIGTERM)
        until(lambda: not hubs.living(others), PATIENCE_SECONDS, "the end of all that has nothing to do")
        _to_all([hub.process.pid, everyone["deliver"]], signal.SIGTERM)
        released.set()
        assert hub.process.wait(PATIENCE_SECONDS) == 0
        with contextlib.closing(sqlite3.connect(hub.data_dir / "buildrelay.db")) as store:
            told = store.execute(
                "SELECT state, attempts FROM messages WHERE message_id = ?",
                (server.asked[0].headers["webhook-id"],),
            ).fetchall()
            tries = store.execute("SELECT number, status_code, reason FROM delivery_attempts").fetchall()
    assert told == [("delivered", 1)]
    assert tries == [(1, 200, None)]
    assert len(server.asked) == 1


def _to_all(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def test_ctrl_c_ends_everything_and_the_next_start_goes_on(platforms):
    """Two starts on one directory: secrets and builds stay."""
    build = platforms.begin("github")
    first, second, *_ = platforms.pushes(build)
    with hubs.directory() as home:
        with running(platforms.environment(), home) as hub:
            assert platforms.push(hub, first)["status"] == "accepted"
            secrets = hub.secrets
            hubs.stop(hub.process, signal.SIGINT)
        with running(platforms.environment(), home) as hub:
            assert hub.secrets == secrets
            assert platforms.push(hub, first)["status"] == "duplicate"
            assert platforms.push(hub, second)["status"] == "accepted"


def test_nothing_survives_a_killed_supervisor(platforms):
    with running(platforms.environment()) as hub:
        everyone = hubs.identified(hubs.family(hub.process.pid))
        assert {each.name for each in hubs.family(hub.process.pid)} == {
            "web", "deliver", "poll", "collect", "scheduler", "redis",
        }  # fmt: skip
        hub.process.kill()
        hub.process.wait()
        if sys.platform != "linux":  # there the next start ends what was left
            supervisor.end_leftovers(hub.data_dir / "run")
        until(lambda: not hubs.living(everyone), PATIENCE_SECONDS, "the end of all children")


@contextlib.contextmanager
def demo(loss):
    """A demo that runs, its log and its directory."""
    command = [sys.executable, "-m", "webhook_app", "demo", "--builds", "25", "--loss", loss]
    with hubs.directory() as home:
        command += ["--port", str(free_port()), "--data-dir", str(home / "data")]
        with hubs.started(command, home / "log", hubs.clean_environment({})) as process:
            yield process, home / "log", home


@pytest.fixture(scope="module")
def demos():
    """Two at once, since they mostly wait: one without any push, where polling finds everything."""
    with demo("0.3") as some, demo("1") as none:
        yield {"0.3": some, "1": none}


@pytest.mark.parametrize("loss", ["0.3", "1"])
def test_the_demo_finds_nothing_wrong(demos, loss):
    process, log, home = demos[loss]
    code, told = process.wait(600), log.read_text()
    assert code == 0, told[-10_000:]
    assert "25 builds judged: 0 wrong, 0 subscriber faults" in told
    assert re.search(r"all true +[0-9]+ s after the last build ended", told)
    assert not [each for each in hubs.processes() if str(home) in each.command]


def test_who_looks_on_at_the_demo_finds_its_secrets_where_it_says(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "webhook_app", "demo", "--port", str(port)]
    with hubs.directory() as home:
        away = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
        env = hubs.clean_environment({"ADMIN_TOKEN": "the token of another BuildRelay", **away})
        with hubs.started([*command, "--data-dir", str(home)], tmp_path / "log", env) as process:
            says = f"Secrets are in {home}/secrets.env"
            until(lambda: says in (tmp_path / "log").read_text(), PATIENCE_SECONDS, says)
            hub = hubs.Hub(f"http://127.0.0.1:{port}", home, tmp_path / "log", read_secrets(home))
            with hub.http:
                until(lambda: hub.get("/api/builds")["items"], PATIENCE_SECONDS, "a build")
            hubs.stop(process)


def procfile():
    lines = (hubs.ROOT / "Procfile").read_text().splitlines()
    return {name: shlex.split(command) for name, _, command in (line.partition(": ") for line in lines)}


def test_the_processes_of_the_procfile_work_together(platforms, postgres_url):
    made = procfile()
    assert set(made) == {"release", "web", "worker", "scheduler"}
    secrets = {
        "ADMIN_TOKEN": "admin-of-the-test",
        "GITHUB_WEBHOOK_SECRET": "github-secret-of-the-tests",
        "ENCRYPTION_KEYS": "x7d6q1sVd4hUOFNTUcXb0h8mTrmVjRZ6dZ9vM2l0n2E=",
        "BUILD_EVENT_TOKEN": "script-token-of-the-tests",
    }
    port = free_port()
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(hubs.directory())
        url = stack.enter_context(postgres.fresh_database(postgres_url))
        redis_url, _server = stack.enter_context(own_redis())
        env = hubs.clean_environment(
            {
                **platforms.environment(),
                **secrets,
                "DATABASE_URL": url.replace("postgresql+psycopg://", "postgres://"),
                "REDIS_URL": redis_url,
                "PORT": str(port),
                "WEB_CONCURRENCY": "2",
                "ALLOW_PRIVATE_CALLBACKS": "true",
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            }
        )
        log = home / "log"
        with hubs.started(made["release"], log, env) as release:
            assert release.wait(PATIENCE_SECONDS) == 0
        started = {
            name: stack.enter_context(hubs.started(made[name], log, env))
            for name in ("web", "worker", "scheduler")
        }
        hub = hubs.Hub(f"http://127.0.0.1:{port}", home, log, secrets)
        stack.enter_context(hub.http)
        hub.wait_ready()
        build = platforms.begin("github")
        with subscribed(hub) as callback:
            for push in platforms.pushes(build):
                platforms.push(hub, push)
            callback.wait_for(hub, build.build_id)
        assert hub.state(build.build_id) == "completed"
        for process in started.values():
            hubs.stop(process)
