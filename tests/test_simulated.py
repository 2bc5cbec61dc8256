"""The simulated platforms speak as the platforms' documentation says, and the judge can be trusted."""

import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from standardwebhooks import Webhook

from webhook_app.simulated import github, gitlab
from webhook_app.simulated.facts import Build, Job, Moment, Truth, truth_of
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.gitlab import GitLabServer
from webhook_app.simulated.httpd import Request, Response, Server, dropped, hang
from webhook_app.simulated.jenkins import JenkinsServer
from webhook_app.simulated.judge import judge
from webhook_app.simulated.scripts import KINDS, RERUN_GAP_SECONDS
from webhook_app.simulated.sender import Secrets, Sender, encode, plan_pushes
from webhook_app.simulated.subscriber import Subscriber
from webhook_app.simulated.world import REPOSITORIES, StepClock, World

SIGNING_TOKEN = "whsec_" + base64.b64encode(b"simulated-signing-token!").decode()
SECRETS = Secrets(github="github-secret", gitlab=SIGNING_TOKEN, jenkins="jenkins-secret")
REFERENCE_PAYLOADS = Path(__file__).parents[2] / "shared" / "reference" / "payloads"


@pytest.fixture
def clock() -> StepClock:
    return StepClock(1_795_000_000.25)


@pytest.fixture
def http() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def world_of(clock: StepClock, platform: str, *kinds: str, builds: int = 1, **options: Any) -> World:
    chosen = {platform: kinds} if kinds else None
    return World(5, builds, platforms=[platform], kinds=chosen, now=clock, **options)


def end_of(world: World) -> float:
    return world.ends_at - world.now() + 0.001


# The world ---------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_world_and_another_seed_another() -> None:
    first, second, other = (World(seed, 40, now=StepClock(1e9)) for seed in (7, 7, 8))
    assert first.builds == second.builds
    assert first.extend(5) == second.extend(5)
    assert len(first.builds) == 45
    assert not {build.build_id for build in first.builds} & {
        build.build_id for build in other.builds if build.platform != "jenkins"
    }


def test_every_kind_comes_when_asked_for() -> None:
    kinds = {(platform, kind) for platform, weights in KINDS.items() for kind in weights}
    world = World(1, len(kinds), every_kind=True, now=StepClock())
    assert {(build.platform, build.kind) for build in world.builds} == kinds


def test_build_ids_name_platform_place_and_number() -> None:
    for build in World(1, 40, now=StepClock()).builds:
        place = build.repository
        expected = {
            "github": f"github:{place.owner}:{place.name}:{build.run_id}",
            "gitlab": f"gitlab:{place.id}:{build.run_id}",
            "jenkins": f"jenkins:{place.owner}:{place.name}:{build.number}",
        }
        assert build.build_id == expected[build.platform]


def test_moments_are_in_order_and_attempts_never_fall() -> None:
    for build in World(3, 80, every_kind=True, now=StepClock()).builds:
        assert [m.at for m in build.moments] == sorted(m.at for m in build.moments)
        attempts = [m.attempt for m in build.moments]
        assert attempts == sorted(attempts)
        assert attempts[0] == 1


def test_speed_shortens_builds_but_keeps_a_rerun_apart_from_the_end_before() -> None:
    def retry(speed: float) -> Build:
        return World(
            1, 1, platforms=["gitlab"], kinds={"gitlab": ["retry"]}, speed=speed, now=StepClock()
        ).builds[0]

    slow, fast = retry(1), retry(1000)
    assert slow.ends_at - slow.begins_at > 25
    assert fast.ends_at - fast.begins_at < RERUN_GAP_SECONDS + 0.2
    first, second = (
        max(m.at for m in fast.moments if m.attempt == 1),
        min(m.at for m in fast.moments if m.attempt == 2),
    )
    assert second - first >= RERUN_GAP_SECONDS
    ids = [{job.id for m in fast.moments if m.attempt == attempt for job in m.jobs} for attempt in (1, 2)]
    assert max(ids[1]) > max(ids[0]), "a retried job has a new, larger id"


ENDS = {
    "github": {
        "success": ("completed", "success", 1), "failure": ("failed", "failure", 1),
        "cancelled": ("cancelled", "cancelled", 1), "timed_out": ("timeout", "timed_out", 1),
        "neutral": ("completed", "neutral", 1), "skipped": ("completed", "skipped", 1),
        "cancelled_queued": ("cancelled", "cancelled", 1), "stale": ("timeout", "stale", 1),
        "approved": ("completed", "success", 1), "unapproved": ("queued", "action_required", 1),
        "gate": ("completed", "success", 1), "rerun": ("completed", "success", 2),
        "rerun_twice": ("completed", "success", 3), "startup_failure": ("failed", "failure", 1),
    },
    "gitlab": {
        "success": ("completed", "success", 1), "warnings": ("completed", "success", 1),
        "failure": ("failed", "failure", 1), "timeout": ("timeout", "timed_out", 1),
        "mixed": ("failed", "failure", 1), "canceled": ("cancelled", "cancelled", 1),
        "canceled_pending": ("cancelled", "cancelled", 1), "skipped": ("completed", "skipped", 1),
        "bad_yaml": ("failed", "failure", 1), "manual": ("completed", "success", 1),
        "manual_forever": ("in_progress", None, 1), "optional_manual": ("completed", "success", 2),
        "delayed": ("completed", "success", 1), "retry": ("completed", "success", 2),
        "retry_timeout": ("timeout", "timed_out", 2),
    },
    "jenkins": {
        "success": ("completed", "success", 1), "unstable": ("failed", "failure", 1),
        "unstable_early": ("failed", "failure", 1), "failure": ("failed", "failure", 1),
        "aborted": ("cancelled", "cancelled", 1), "not_built": ("completed", "skipped", 1),
    },
}  # fmt: skip


@pytest.mark.parametrize(("platform", "kind"), [(p, k) for p, kinds in KINDS.items() for k in kinds])
def test_each_kind_ends_as_its_name_says(clock: StepClock, platform: str, kind: str) -> None:
    world = world_of(clock, platform, kind)
    build = world.builds[0]
    assert world.truth(build.build_id, clock() - 1) is None
    assert not world.settled() or build.begins_at == build.ends_at
    clock.advance(end_of(world))
    assert world.settled()
    assert world.truth(build.build_id) == ENDS[platform][kind]


@pytest.mark.parametrize(
    ("platform", "status", "conclusion", "started", "expected"),
    [
        ("github", "queued", None, False, ("queued", None)),
        ("github", "waiting", None, True, ("in_progress", None)),
        ("github", "pending", None, False, ("queued", None)),
        ("github", "completed", "action_required", False, ("queued", "action_required")),
        ("github", "completed", "startup_failure", False, ("failed", "failure")),
        ("github", "completed", "stale", False, ("timeout", "stale")),
        ("gitlab", "waiting_for_resource", None, False, ("queued", None)),
        ("gitlab", "manual", None, False, ("queued", None)),
        ("gitlab", "manual", None, True, ("in_progress", None)),
        ("gitlab", "canceling", None, True, ("in_progress", None)),
        ("gitlab", "failed", None, False, ("failed", "failure")),
        ("jenkins", "building", "UNSTABLE", True, ("in_progress", None)),
        ("jenkins", "completed", "NOT_BUILT", True, ("completed", "skipped")),
    ],
)
def test_truth_follows_the_mapping_tables(
    platform: str, status: str, conclusion: str | None, started: bool, expected: tuple[str, str | None]
) -> None:
    moment = Moment(0.0, 1, 0.0, status, conclusion, started, (), (), ())
    assert truth_of(platform, moment) == Truth(*expected, 1)


@pytest.mark.parametrize(
    ("reasons", "state"),
    [
        (["job_execution_timeout"], "timeout"),
        (["stuck_or_timeout_failure", "job_execution_timeout"], "timeout"),
        (["job_execution_timeout", "script_failure"], "failed"),
        (["script_failure"], "failed"),
    ],
)
def test_a_gitlab_failure_is_a_timeout_only_if_every_blocking_job_was_too_slow(
    reasons: list[str], state: str
) -> None:
    jobs = [Job(n, "job", "test", "failed", 0.0, failure_reason=reason) for n, reason in enumerate(reasons)]
    jobs.append(Job(9, "lint", "test", "failed", 0.0, failure_reason="script_failure", allow_failure=True))
    moment = Moment(0.0, 1, 0.0, "failed", None, True, tuple(jobs), (), ())
    assert truth_of("gitlab", moment).state == state


# GitHub ------------------------------------------------------------------------------------------

GITHUB = {"Authorization": "Bearer simulated-github-token", "User-Agent": "tests"}


def runs_url(server: GitHubServer, build: Build) -> str:
    return f"{server.url}/repos/{build.repository.full_name}/actions/runs"


def test_github_wants_a_user_agent_and_a_good_token(clock: StepClock, http: requests.Session) -> None:
    world = world_of(clock, "github", "success")
    build = world.builds[0]
    with GitHubServer(world) as server:
        url = f"{runs_url(server, build)}/{build.run_id}"
        no_agent = {"Authorization": GITHUB["Authorization"], "User-Agent": ""}
        assert http.get(url, headers=no_agent).status_code == 403
        assert http.get(url, headers={**GITHUB, "Authorization": "Bearer wrong"}).status_code == 401
        assert http.get(url, headers={"User-Agent": "tests"}).status_code == 404, "private repository"
        assert http.get(url, headers=GITHUB).status_code == 200
        assert http.get(f"{url}9", headers=GITHUB).status_code == 404
        assert http.get(f"{server.url}/repos/nobody/nothing/actions/runs", headers=GITHUB).status_code == 404


def test_a_github_run_moves_with_the_clock_and_shows_steps(clock: StepClock, http: requests.Session) -> None:
    world = world_of(clock, "github", "rerun")
    build = world.builds[0]
    with GitHubServer(world) as server:
        name = build.repository.full_name.swapcase()
        url = f"{server.url}/repos/{name}/actions/runs/{build.run_id}"
        seen = []
        for moment in build.moments:
            clock.at = moment.at
            run = http.get(url, headers=GITHUB).json()
            jobs = http.get(f"{url}/jobs", headers=GITHUB).json()
            assert (run["status"], run["conclusion"], run["run_attempt"]) == (
                moment.status, moment.conclusion, moment.attempt,
            )  # fmt: skip
            assert jobs["total_count"] == len(jobs["jobs"]) == len(moment.jobs)
            assert {job["run_id"] for job in jobs["jobs"]} <= {build.run_id}
            seen.append(sum(s["status"] == "completed" for job in jobs["jobs"] for s in job["steps"]))
        assert run["created_at"] < run["run_started_at"] <= run["updated_at"]
        assert run["previous_attempt_url"].endswith("/attempts/1")
        first = http.get(f"{url}/attempts/1", headers=GITHUB).json()
        assert (first["run_attempt"], first["conclusion"]) == (1, "failure")
        assert max(seen) == 14
        assert server.polls(build.build_id) == 2 * len(build.moments) + 1


def test_github_lists_newest_first_in_pages_with_links(clock: StepClock, http: requests.Session) -> None:
    world = world_of(clock, "github", builds=40)
    clock.advance(end_of(world))
    repository = REPOSITORIES["github"][0]
    begun = [build.run_id for build in world.of(repository)][::-1]
    with GitHubServer(world) as server:
        url: str | None = f"{server.url}/repos/{repository.full_name}/actions/runs?per_page=5"
        listed: list[int] = []
        while url:
            answer = http.get(url, headers=GITHUB)
            assert answer.json()["total_count"] == len(begun)
            listed += [run["id"] for run in answer.json()["workflow_runs"]]
            url = answer.links.get("next", {}).get("url")
        assert listed == begun
        assert server.polls(world.of(repository)[0].build_id) == 0, "a list is no poll of one build"
        server.delete(world.of(repository)[0].build_id)
        assert (
            http.get(f"{server.url}/repos/{repository.full_name}/actions/runs", headers=GITHUB).json()[
                "total_count"
            ]
            == len(begun) - 1
        )


def test_github_304_costs_no_budget_and_belongs_to_one_token(
    clock: StepClock, http: requests.Session
) -> None:
    world = world_of(clock, "github", "success")
    build = world.builds[0]
    with GitHubServer(world, ("one", "two")) as server:
        headers = {**GITHUB, "Authorization": "Bearer one"}
        for url in (runs_url(server, build), f"{runs_url(server, build)}/{build.run_id}"):
            used = server.used("one")
            first = http.get(url, headers=headers)
            tagged = {**headers, "If-None-Match": first.headers["ETag"]}
            again = http.get(url, headers=tagged)
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["X-RateLimit-Used"] == first.headers["X-RateLimit-Used"] == str(used + 1)
            assert http.get(url, headers={**tagged, "Authorization": "Bearer two"}).status_code == 200
            before = first.json()
            clock.advance(build.moments[2].at - clock())
            fresh = http.get(url, headers=tagged)
            assert fresh.status_code == 200
            assert fresh.json() != before
            clock.at = world.start_at


def test_github_refuses_when_the_budget_is_spent_until_the_hour_is_over(
    clock: StepClock, http: requests.Session
) -> None:
    world = world_of(clock, "github", "success")
    with GitHubServer(world, limit=2) as server:
        url = runs_url(server, world.builds[0])
        assert [http.get(url, headers=GITHUB).status_code for _ in range(3)] == [200, 200, 403]
        refused = http.get(url, headers=GITHUB)
        assert refused.headers["x-ratelimit-remaining"] == "0"
        core = http.get(f"{server.url}/rate_limit", headers=GITHUB).json()["resources"]["core"]
        assert (core["remaining"], str(core["reset"])) == (0, refused.headers["x-ratelimit-reset"])
        clock.advance(core["reset"] - clock())
        assert http.get(url, headers=GITHUB).status_code == 200


def test_faults_can_be_injected_and_end(clock: StepClock, http: requests.Session) -> None:
    world = world_of(clock, "github", "success")
    with GitHubServer(world) as server:
        url = runs_url(server, world.builds[0])
        server.inject(github.secondary_limit(), times=1)
        server.inject(github.server_error(502), times=1)
        server.inject(github.html(), times=1, path_contains="/actions/runs")
        server.inject(dropped(), times=1)
        limited = http.get(url, headers=GITHUB)
        assert limited.status_code == 403
        assert "secondary rate limit" in limited.json()["message"]
        assert "retry-after" not in limited.headers
        assert http.get(url, headers=GITHUB).status_code == 502
        assert http.get(url, headers=GITHUB).headers["content-type"] == "text/html"
        with pytest.raises(requests.ConnectionError):
            http.get(url, headers=GITHUB)
        server.inject(hang())
        with pytest.raises(requests.Timeout):
            http.get(url, headers=GITHUB, timeout=0.5)
        server.clear_faults()
        assert http.get(url, headers=GITHUB).status_code == 200
        assert server.count("/actions/runs") == 6


def test_closing_a_server_does_not_wait_for_a_hanging_answer() -> None:
    arrived = threading.Event()

    def handle(request: Request) -> Response:
        arrived.set()
        return hang()

    server = Server(handle)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert arrived.wait(60)
        begun = time.monotonic()
        server.close()
        assert client.recv(1) == b""
    assert time.monotonic() - begun < 30


def test_lists_may_lag_but_a_run_never_does(clock: StepClock, http: requests.Session) -> None:
    world = world_of(clock, "github", "success")
    build = world.builds[0]
    with GitHubServer(world, list_lag_seconds=10) as server:
        clock.at = build.ends_at + 1
        listed = http.get(runs_url(server, build), headers=GITHUB).json()["workflow_runs"][0]
        single = http.get(f"{runs_url(server, build)}/{build.run_id}", headers=GITHUB).json()
        assert (listed["status"], single["status"]) == ("in_progress", "completed")


def test_github_logs_and_artifacts_are_redirects_once_there_is_something(
    clock: StepClock, http: requests.Session
) -> None:
    world = world_of(clock, "github", "failure")
    build = world.builds[0]
    with GitHubServer(world) as server:
        clock.at = build.moments[3].at
        job = build.moments[3].jobs[0]
        log = f"{server.url}/repos/{build.repository.full_name}/actions/jobs/{{}}/logs"
        assert http.get(log.format(job.id), headers=GITHUB).status_code == 404, "not while it runs"
        clock.at = build.ends_at
        failed = build.moments[-1].jobs[-1]
        redirect = http.get(log.format(failed.id), headers=GITHUB, allow_redirects=False)
        assert redirect.status_code == 302
        text = http.get(redirect.headers["Location"]).content.decode("utf-8-sig")
        assert "##[error]Process completed with exit code 1." in text
        zipped = http.get(f"{runs_url(server, build)}/{build.run_id}/logs", headers=GITHUB)
        assert zipped.content.startswith(b"PK")


# GitLab ------------------------------------------------------------------------------------------

GITLAB = {"PRIVATE-TOKEN": "simulated-gitlab-token"}


def test_gitlab_authenticates_and_knows_projects_by_id_and_path(
    clock: StepClock, http: requests.Session
) -> None:
    world = world_of(clock, "gitlab", "success")
    build = world.builds[0]
    with GitLabServer(world) as server:
        rest = f"pipelines/{build.run_id}"
        by_id = f"{server.url}/api/v4/projects/{build.repository.id}/{rest}"
        by_path = f"{server.url}/api/v4/projects/{build.repository.full_name.replace('/', '%2F')}/{rest}"
        assert http.get(by_id, headers={"PRIVATE-TOKEN": "wrong"}).status_code == 401
        assert http.get(by_id).status_code == 404
        assert http.get(f"{by_id}9", headers=GITLAB).status_code == 404
        assert http.get(by_id, headers={"Authorization": "Bearer simulated-gitlab-token"}).status_code == 200
        answers = [http.get(url, headers=GITLAB) for url in (by_id, by_path)]
        assert answers[0].json() == answers[1].json()
        assert answers[0].json()["status"] == "created"
        assert int(answers[0].headers["RateLimit-Remaining"]) < int(answers[0].headers["RateLimit-Limit"])
        assert server.polls(build.build_id) == 4


def test_a_gitlab_304_counts_as_a_request(clock: StepClock, http: requests.Session) -> None:
    world = world_of(clock, "gitlab", "success")
    build = world.builds[0]
    with GitLabServer(world, limit=3) as server:
        url = f"{server.url}{server.path_of(build)}"
        first = http.get(url, headers=GITLAB)
        assert first.headers["ETag"].startswith('W/"')
        second = http.get(url, headers={**GITLAB, "If-None-Match": first.headers["ETag"]})
        assert second.status_code == 304
        assert second.headers["RateLimit-Observed"] == "2"
        http.get(url, headers=GITLAB)
        refused = http.get(url, headers=GITLAB)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        clock.advance(61)
        assert http.get(url, headers=GITLAB).status_code == 200
        server.inject(gitlab.rate_limited(7), times=1)
        assert http.get(url, headers=GITLAB).headers["Retry-After"] == "7"


def test_gitlab_lists_what_was_updated_lately_and_so_finds_a_retried_pipeline(
    clock: StepClock, http: requests.Session
) -> None:
    world = world_of(clock, "gitlab", builds=30)
    retried = world.extend(1, spread_seconds=0)[0]
    clock.advance(end_of(world) + 1000)
    place = retried.repository
    with GitLabServer(world) as server:
        url = f"{server.url}/api/v4/projects/{place.id}/pipelines"
        order = {"order_by": "updated_at", "sort": "desc", "per_page": "100"}
        everything = http.get(url, headers=GITLAB, params=order)
        updated = [datetime.fromisoformat(item["updated_at"]) for item in everything.json()]
        assert updated == sorted(updated, reverse=True)
        assert len(updated) == len(world.of(place)) == int(everything.headers["X-Total"])
        middle = updated[len(updated) // 2] + timedelta(milliseconds=1)
        since = http.get(url, headers=GITLAB, params={**order, "updated_after": middle.isoformat()}).json()
        assert [item["updated_at"] for item in since] == [
            item["updated_at"] for item in everything.json()[: len(updated) // 2]
        ]
        page = http.get(url, headers=GITLAB, params={**order, "per_page": "2"})
        assert page.headers["X-Next-Page"] == "2"
        following = http.get(page.links["next"]["url"], headers=GITLAB).json()
        assert [item["id"] for item in page.json() + following] == [
            item["id"] for item in everything.json()[:4]
        ]


def test_gitlab_hides_retried_jobs_and_tells_why_a_job_failed(
    clock: StepClock, http: requests.Session
) -> None:
    world = world_of(clock, "gitlab", "retry_timeout")
    build = world.builds[0]
    clock.at = build.ends_at
    with GitLabServer(world) as server:
        url = f"{server.url}{server.path_of(build)}/jobs"
        jobs = http.get(url, headers=GITLAB).json()
        assert [job["id"] for job in jobs] == sorted((job["id"] for job in jobs), reverse=True)
        failed = [job for job in jobs if job["status"] == "failed"]
        assert [job["failure_reason"] for job in failed] == ["stuck_or_timeout_failure"]
        assert {job["pipeline"]["status"] for job in jobs} == {"failed"}
        everything = http.get(url, headers=GITLAB, params={"include_retried": "true"}).json()
        assert len(everything) == len(jobs) + 1
        trace = http.get(
            f"{server.url}/api/v4/projects/{build.repository.id}/jobs/{failed[0]['id']}/trace", headers=GITLAB
        )
        assert "AssertionError" in trace.text


# Jenkins -----------------------------------------------------------------------------------------

JENKINS = ("buildrelay", "simulated-jenkins-token")


def test_jenkins_wants_basic_authentication(clock: StepClock, http: requests.Session) -> None:
    world = world_of(clock, "jenkins", "success")
    build = world.builds[0]
    with JenkinsServer(world) as server:
        url = f"{server.url}{server.path_of(build)}/api/json"
        assert http.get(url).status_code == 403
        assert http.get(url, auth=("buildrelay", "wrong")).status_code == 401
        assert http.get(url, auth=JENKINS).status_code == 200
        assert http.get(url.replace("/1/", "/2/"), auth=JENKINS).status_code == 404
        assert http.get(url.replace("/1/", "/lastBuild/"), auth=JENKINS).json()["number"] == 1


def test_a_jenkins_result_may_be_set_while_it_is_building(clock: StepClock, http: requests.Session) -> None:
    world = world_of(clock, "jenkins", "unstable_early")
    build = world.builds[0]
    with JenkinsServer(world) as server:
        url = f"{server.url}{server.path_of(build)}/api/json"
        seen = []
        for moment in build.moments:
            clock.at = moment.at
            told = http.get(url, auth=JENKINS).json()
            seen.append((told["building"], told["inProgress"], told["result"]))
            assert (told["executor"] is None) is not told["building"]
        assert list(dict.fromkeys(seen)) == [
            (True, True, None), (True, True, "UNSTABLE"),
            (False, True, "UNSTABLE"), (False, False, "UNSTABLE"),
        ]  # fmt: skip
        assert told["timestamp"] == int(build.begins_at * 1000)
        stages = http.get(f"{server.url}{server.path_of(build)}/wfapi/describe", auth=JENKINS).json()
        assert [stage["name"] for stage in stages["stages"]] == ["Checkout", "Build", "Test"]
        log = http.get(f"{server.url}{server.path_of(build)}/logText/progressiveText?start=5", auth=JENKINS)
        assert int(log.headers["X-Text-Size"]) > len(log.content) + 5, "it counts hidden bytes too"
        assert "X-More-Data" not in log.headers


def test_jenkins_honours_the_tree_of_a_list_or_ignores_it(clock: StepClock, http: requests.Session) -> None:
    world = world_of(clock, "jenkins", "success", builds=8)
    place = REPOSITORIES["jenkins"][0]
    clock.advance(end_of(world))
    tree = {"tree": "builds[number,result,executor[progress]]{0,2},name"}
    for honour in (True, False):
        with JenkinsServer(world, honour_tree=honour) as server:
            url = f"{server.url}/job/{place.owner}/job/{place.name}/api/json"
            job = http.get(url, auth=JENKINS, params=tree).json()
            numbers = [build["number"] for build in job["builds"]]
            assert numbers == [build.number for build in world.of(place)][::-1][: 2 if honour else None]
            assert ("url" in job) is not honour
            expected = {"_class", "number", "result", "executor"}
            assert (set(job["builds"][0]) == expected) is honour
            if honour:
                assert set(http.get(url, auth=JENKINS).json()["builds"][0]) == {"_class", "number", "url"}


# The sender --------------------------------------------------------------------------------------


class Inbox:
    """Keeps what is posted; `answer(request)` decides on the status."""

    def __init__(self, answer: Callable[[Request], int] = lambda request: 202) -> None:
        self.requests: list[Request] = []
        self._answer = answer
        self.server = Server(self._handle)

    def _handle(self, request: Request) -> Response:
        self.requests.append(request)
        return Response(self._answer(request))


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    box = Inbox()
    yield box
    box.server.close()


def test_pushes_are_signed_as_each_platform_signs(clock: StepClock, inbox: Inbox) -> None:
    world = World(2, 30, now=clock)
    sender = Sender(world, inbox.server.url, SECRETS)
    clock.advance(end_of(world))
    sent = sender.send_due()
    sender.close()
    assert sender.finished
    assert sent == len(inbox.requests) == len(sender.accepted()) == sender.report()["planned"]
    events = Counter()
    for request in inbox.requests:
        platform = request.path.removeprefix("/webhooks/")
        events[platform, request.headers.get("x-github-event") or request.headers.get("x-gitlab-event")] += 1
        if platform == "gitlab":
            assert request.headers["idempotency-key"] == request.headers["webhook-id"]
            text = b".".join(
                (
                    request.headers["webhook-id"].encode(),
                    request.headers["webhook-timestamp"].encode(),
                    request.body,
                )
            )
            key = base64.b64decode(SIGNING_TOKEN.removeprefix("whsec_"))
            digest = base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
            assert request.headers["webhook-signature"] == f"v1,{digest}"
        else:
            secret = {"github": b"github-secret", "jenkins": b"jenkins-secret"}[platform]
            digest = hmac.new(secret, request.body, hashlib.sha256).hexdigest()
            assert request.headers["x-hub-signature-256"] == f"sha256={digest}"
    assert set(events) == {
        ("github", "workflow_run"), ("github", "workflow_job"), ("gitlab", "Pipeline Hook"),
        ("gitlab", "Job Hook"),
        ("jenkins", None),
    }  # fmt: skip


def test_a_plain_gitlab_token_is_sent_as_such(clock: StepClock) -> None:
    world = world_of(clock, "gitlab", "success")
    push = plan_pushes(world.builds, 1)[0]
    headers, _ = encode(push, "https://gitlab.com", Secrets("a", "plain", "b"), 5)
    assert headers["X-Gitlab-Token"] == "plain"
    assert "webhook-signature" not in headers
    assert headers["webhook-id"] == push.delivery_id


def test_nothing_is_lost_doubled_or_late_unless_asked_for() -> None:
    world = World(4, 60, now=StepClock())
    pushes = plan_pushes(world.builds, 4)
    assert not any(push.lost or push.copy or push.late for push in pushes)
    assert len({push.delivery_id for push in pushes}) == len(pushes)
    for build in world.builds:
        order = [push.at for push in pushes if push.build is build]
        assert order == sorted(m.at for m in build.moments for _ in m.events)


def test_the_wanted_share_is_lost_doubled_and_reordered_and_the_seed_decides_which() -> None:
    world = World(4, 300, now=StepClock())
    pushes = plan_pushes(world.builds, 4, loss=0.2, double=0.3, reorder=0.25)
    assert pushes == plan_pushes(world.builds, 4, loss=0.2, double=0.3, reorder=0.25)
    assert pushes != plan_pushes(world.builds, 5, loss=0.2, double=0.3, reorder=0.25)
    events = [push for push in pushes if not push.copy]
    assert len(events) > 2000
    kept = [push for push in events if not push.lost]
    doubled = [push for push in pushes if push.copy]
    assert sum(push.lost for push in events) / len(events) == pytest.approx(0.2, abs=0.03)
    assert len(doubled) / len(kept) == pytest.approx(0.3, abs=0.03)
    assert {push.delivery_id for push in doubled} <= {push.delivery_id for push in kept}
    # The last push of each build can't be late, and it is one of about nine.
    assert 0.17 < sum(push.late for push in kept) / len(kept) < 0.27


def test_a_late_push_goes_out_after_a_later_one_of_its_build() -> None:
    world = World(4, 100, now=StepClock())
    sending = [push for push in plan_pushes(world.builds, 4, loss=0.3, reorder=0.3) if not push.lost]
    late = [push for push in sending if push.late]
    assert late
    for push in late:
        before = [
            other for other in sending[: sending.index(push)]
            if other.build is push.build and other.moment.at >= push.moment.at
        ]  # fmt: skip
        assert before, "overtaken by nothing"


def test_a_doubled_push_has_the_same_bytes(clock: StepClock, inbox: Inbox) -> None:
    world = world_of(clock, "jenkins", "success", builds=3)
    sender = Sender(world, inbox.server.url, SECRETS, double=1.0)
    clock.advance(end_of(world) + 5)
    sender.send_due()
    sender.close()
    assert set(Counter(request.body for request in inbox.requests).values()) == {2}
    assert sender.report()["doubled"] == 12


def test_only_a_2xx_counts_as_accepted_and_platforms_do_not_retry(clock: StepClock) -> None:
    statuses = iter([202, 503, 401, 200])
    inbox = Inbox(lambda request: next(statuses))
    world = world_of(clock, "jenkins", "success")
    sender = Sender(world, inbox.server.url, SECRETS)
    clock.advance(end_of(world))
    sender.send_due()
    inbox.server.close()
    sender.close()
    assert [sent.status for sent in sender.results] == [202, 503, 401, 200]
    assert len(sender.accepted()) == 2
    assert (sender.report()["refused"], sender.report()["unanswered"]) == (2, 0)


def test_a_refused_connection_is_no_delivery(clock: StepClock, inbox: Inbox) -> None:
    inbox.server.close()
    world = world_of(clock, "jenkins", "success")
    sender = Sender(world, inbox.server.url, SECRETS)
    clock.advance(end_of(world))
    sender.send_due()
    sender.close()
    assert sender.report()["unanswered"] == 4
    assert not sender.accepted()


def test_with_retries_every_push_is_accepted_in_the_end(wait_until: Callable[..., None]) -> None:
    failures = iter([500, 503, 401, 502])
    inbox = Inbox(lambda request: next(failures, 202))
    world = World(1, 6, speed=400, spread_seconds=10, kinds={"gitlab": ["success"]})
    with Sender(world, inbox.server.url, SECRETS, retry_until_accepted=True) as sender:
        wait_until(lambda: sender.finished)
    inbox.server.close()
    report = sender.report()
    assert report["accepted"] == report["planned"] == len(inbox.requests) - 4


def test_a_failed_delivery_is_listed_and_sent_again_under_its_guid(
    clock: StepClock, inbox: Inbox, http: requests.Session
) -> None:
    world = world_of(clock, "github", "success", builds=12)
    sender = Sender(world, inbox.server.url, SECRETS, loss=0.5)
    clock.advance(end_of(world))
    sender.send_due()
    with GitHubServer(world) as server:
        server.deliveries = sender
        server.hook_url = f"{inbox.server.url}/webhooks/github"
        place = next(place for place in REPOSITORIES["github"] if world.of(place))
        hooks = f"{server.url}/repos/{place.full_name}/hooks"
        hook = http.get(hooks, headers=GITHUB).json()[0]
        listed = http.get(f"{hooks}/{hook['id']}/deliveries?status=failure", headers=GITHUB).json()
        assert listed
        assert all(delivery["status"] != "OK" for delivery in listed)
        guid = listed[0]["guid"]
        assert guid not in {request.headers["x-github-delivery"] for request in inbox.requests}
        again = http.post(f"{hooks}/{hook['id']}/deliveries/{listed[0]['id']}/attempts", headers=GITHUB)
        assert again.status_code == 202
        assert sender.send_due() == 1
        assert inbox.requests[-1].headers["x-github-delivery"] == guid
        newest = http.get(f"{hooks}/{hook['id']}/deliveries", headers=GITHUB).json()[0]
        assert (newest["guid"], newest["redelivery"], newest["status"]) == (guid, True, "OK")
    sender.close()


def test_a_ping_is_sent_for_each_github_repository(clock: StepClock, inbox: Inbox) -> None:
    sender = Sender(world_of(clock, "github", "success"), inbox.server.url, SECRETS)
    assert sender.ping() == [202, 202, 202]
    sender.close()
    assert {request.headers["x-github-event"] for request in inbox.requests} == {"ping"}


# Bodies ------------------------------------------------------------------------------------------


def test_bodies_have_a_realistic_size(clock: StepClock) -> None:
    world = world_of(clock, "github", "success")
    sizes = {
        push.event.name: len(encode(push, "https://api.github.com", SECRETS, 0)[1])
        for push in plan_pushes(world.builds, 1)
    }
    assert 14_000 < sizes["workflow_run"] < 25_000
    assert 6_000 < sizes["workflow_job"] < 14_000


def missing_keys(reference: Any, ours: Any, path: str = "") -> list[str]:
    """Where the reference has a key that our body lacks; the first item stands for a list."""
    if isinstance(reference, dict) and isinstance(ours, dict):
        absent = [f"{path}.{key}" for key in reference if key not in ours]
        return absent + [
            m
            for key in reference
            if key in ours
            for m in missing_keys(reference[key], ours[key], f"{path}.{key}")
        ]
    if isinstance(reference, list) and isinstance(ours, list) and reference and ours:
        return missing_keys(reference[0], ours[0], f"{path}[]")
    return []


REFERENCE = {
    "github/workflow_run.completed.success.json": ("github", "success", "workflow_run", "completed"),
    "github/workflow_job.in_progress.json": ("github", "success", "workflow_job", "in_progress"),
    "gitlab/pipeline_hook.success.json": ("gitlab", "success", "Pipeline Hook", "success"),
    "gitlab/job_hook.created.json": ("gitlab", "success", "Job Hook", "pending"),
    "jenkins/derived.notification.started.json": ("jenkins", "failure", "notification", "STARTED"),
    "jenkins/derived.notification.finalized.failure.json": (
        "jenkins",
        "failure",
        "notification",
        "FINALIZED",
    ),
}
OPTIONAL = {".installation", ".source_pipeline", ".organization.type", ".build.artifacts.dist/web.zip"}
OPTIONAL |= {
    f"{place}.repository.{key}" for place in ("", ".workflow_runs[]") for key in ("git_url", "ssh_url")
}


def test_bodies_have_every_field_of_the_reference_payloads_where_they_are_present(clock: StepClock) -> None:
    for name, (platform, kind, event, action) in REFERENCE.items():
        if not (REFERENCE_PAYLOADS / name).is_file():
            continue
        pushes = plan_pushes(world_of(clock, platform, kind).builds, 1)
        push = next(p for p in pushes if (p.event.name, p.event.action) == (event, action))
        ours = json.loads(encode(push, "https://ci.example.com", SECRETS, 0)[1])
        absent = missing_keys(json.loads((REFERENCE_PAYLOADS / name).read_text()), ours)
        assert set(absent) <= OPTIONAL, name


def test_rest_bodies_have_every_field_of_the_reference_payloads_where_they_are_present(
    clock: StepClock, http: requests.Session
) -> None:
    worlds = {platform: world_of(clock, platform, "success") for platform in ("github", "gitlab", "jenkins")}
    clock.advance(max(end_of(world) for world in worlds.values()))
    with (
        GitHubServer(worlds["github"]) as one,
        GitLabServer(worlds["gitlab"]) as two,
        JenkinsServer(worlds["jenkins"]) as three,
    ):
        run = f"{one.url}{one.path_of(worlds['github'].builds[0])}"
        pipeline = f"{two.url}{two.path_of(worlds['gitlab'].builds[0])}"
        build = f"{three.url}{three.path_of(worlds['jenkins'].builds[0])}/api/json"
        answers = {
            "github/rest.run.json": http.get(run, headers=GITHUB),
            "github/rest.runs_list.json": http.get(run.rpartition("/")[0], headers=GITHUB),
            "github/rest.jobs_list.json": http.get(f"{run}/jobs", headers=GITHUB),
            "github/rest.artifacts_list.json": http.get(f"{run}/artifacts", headers=GITHUB),
            "gitlab/rest.pipeline.json": http.get(pipeline, headers=GITLAB),
            "gitlab/rest.pipelines_list.json": http.get(pipeline.rpartition("/")[0], headers=GITLAB),
            "gitlab/rest.pipeline_jobs.json": http.get(f"{pipeline}/jobs", headers=GITLAB),
            "jenkins/derived.build_api.finished.json": http.get(build, auth=JENKINS),
        }
    for name, answer in answers.items():
        assert answer.status_code == 200
        if (REFERENCE_PAYLOADS / name).is_file():
            absent = missing_keys(json.loads((REFERENCE_PAYLOADS / name).read_text()), answer.json())
            assert set(absent) <= OPTIONAL, name


# The subscriber ----------------------------------------------------------------------------------

SECRET = "whsec_" + base64.b64encode(b"a-secret-of-the-subscriber").decode()


def message(webhook_id: str, sequence: int, state: str = "in_progress", **changes: Any) -> dict[str, Any]:
    conclusions = {"completed": "success", "failed": "failure"}
    data = {
        "build_id": "github:o:r:1", "sequence": sequence, "state": state, "attempt": 1,
        "conclusion": conclusions.get(state), **changes,
    }  # fmt: skip
    return {
        "id": webhook_id,
        "body": {"type": f"build.{state}", "timestamp": "2026-11-01T10:00:00Z", "data": data},
    }


@pytest.fixture
def deliver(http: requests.Session) -> Callable[..., int]:
    """Sign with an independent library, post, return the status."""

    def send(subscriber: Subscriber, content: dict[str, Any], secret: str = SECRET, **headers: str) -> int:
        body = json.dumps(content["body"])
        now = datetime.now(UTC)
        signed = {
            "webhook-id": content["id"], "webhook-timestamp": str(int(now.timestamp())),
            "webhook-attempt": "1",
            "webhook-signature": Webhook(secret).sign(content["id"], now, body),
        }  # fmt: skip
        return http.post(subscriber.url, data=body, headers={**signed, **headers}, timeout=60).status_code

    return send


@pytest.fixture
def subscriber() -> Iterator[Subscriber]:
    with Subscriber(SECRET) as one:
        yield one


def test_the_subscriber_keeps_good_messages_and_finds_no_fault(subscriber: Subscriber, deliver: Any) -> None:
    for n, state in enumerate(("queued", "in_progress", "completed"), start=1):
        assert deliver(subscriber, message(f"m{n}", n, state)) == 200
    assert subscriber.faults() == {}
    assert subscriber.sequences("github:o:r:1") == (1, 2, 3)
    assert [end[:4] for end in subscriber.ends("github:o:r:1")] == [(1, "completed", "success", 3)]
    assert subscriber.report()["messages"] == 3
    assert subscriber.types()["build.completed"] == 1


def test_the_subscriber_refuses_bad_and_old_signatures(subscriber: Subscriber, deliver: Any) -> None:
    other = "whsec_" + base64.b64encode(b"some-other-secret-entirely").decode()
    assert deliver(subscriber, message("m1", 1), other) == 401
    assert deliver(subscriber, message("m1", 1), **{"webhook-timestamp": "1600000000"}) == 401
    assert deliver(subscriber, message("m1", 1), **{"webhook-signature": ""}) == 401
    assert subscriber.report()["messages"] == 0
    assert subscriber.faults() == {"bad_signatures": 3}
    subscriber.add_secret(other)
    assert deliver(subscriber, message("m1", 1), other) == 200
    subscriber.remove_secret(other)
    assert deliver(subscriber, message("m2", 2), other) == 401


@pytest.mark.parametrize("attempt", ["", "0", "-1", "first"])
def test_the_subscriber_counts_bad_attempt_numbers(
    subscriber: Subscriber, deliver: Any, attempt: str
) -> None:
    deliver(subscriber, message("m1", 1), **{"webhook-attempt": attempt})
    assert subscriber.faults() == {"bad_attempts": 1}


def test_the_subscriber_counts_duplicates_disorder_gaps_and_doubled_events(
    subscriber: Subscriber, deliver: Any
) -> None:
    for content in (message("m1", 1), message("m1", 1), message("m3", 3)):
        deliver(subscriber, content)
    assert subscriber.report()["duplicates"] == 1
    assert subscriber.faults() == {"gaps": 1}
    deliver(subscriber, message("m2", 2))
    assert subscriber.faults() == {"order_violations": 1}
    deliver(subscriber, message("m2-again", 2))
    assert subscriber.faults() == {"order_violations": 1, "doubled_events": 1}


def test_the_subscriber_counts_what_it_cannot_read(subscriber: Subscriber, deliver: Any) -> None:
    deliver(subscriber, {"id": "m1", "body": {"type": "build.queued"}})
    deliver(subscriber, {"id": "m2", "body": {"type": "subscriber.test", "data": {}}})
    assert subscriber.faults() == {"unreadable": 1}


def test_the_subscriber_fails_the_first_tries_of_each_message_and_forgets_them(
    subscriber: Subscriber, deliver: Any
) -> None:
    subscriber.behave(fail_first=2, fail_status=503)
    assert [deliver(subscriber, message("m1", 1)) for _ in range(3)] == [503, 503, 200]
    assert deliver(subscriber, message("m2", 2)) == 503
    assert subscriber.sequences("github:o:r:1") == (1,)
    assert subscriber.report()["duplicates"] == 0
    subscriber.behave(fail_first=0, status=410)
    assert deliver(subscriber, message("m3", 3)) == 410
    assert subscriber.sequences("github:o:r:1") == (1,)


def test_the_subscriber_can_hang_and_be_slow(
    subscriber: Subscriber, http: requests.Session, deliver: Any
) -> None:
    subscriber.behave(hang=True)
    with pytest.raises(requests.Timeout):
        http.post(subscriber.url, data=b"{}", timeout=0.1)
    subscriber.behave(hang=False, delay_seconds=0.2)
    begun = time.monotonic()
    assert deliver(subscriber, message("m1", 1)) == 200
    assert time.monotonic() - begun >= 0.2


def test_the_subscriber_is_cheap(subscriber: Subscriber, deliver: Any) -> None:
    begun = time.process_time()
    for n in range(1, 201):
        deliver(subscriber, message(f"m{n}", n))
    assert time.process_time() - begun < 3.0, "200 messages, the client's own work included"
    assert subscriber.faults() == {}


# The judge ---------------------------------------------------------------------------------------


@pytest.fixture
def settled(clock: StepClock) -> World:
    world = World(6, 60, every_kind=True, now=clock)
    clock.advance(end_of(world))
    return world


def fetch_truth(world: World) -> Callable[[str], dict[str, Any]]:
    def fetch(build_id: str) -> dict[str, Any]:
        truth = world.truth(build_id)
        assert truth
        return {"build_id": build_id, **truth._asdict()}

    return fetch


def test_the_judge_accepts_the_truth(settled: World) -> None:
    verdict = judge(settled, fetch_truth(settled), exact_gitlab_attempts=True)
    assert verdict.ok
    assert (verdict.builds, verdict.moving) == (60, 0)


@pytest.mark.parametrize(
    "lie", [{"state": "queued"}, {"conclusion": "neutral_"}, {"attempt": 9}, {"attempt": 0}, None]
)
def test_the_judge_finds_a_lie(settled: World, lie: dict[str, Any] | None) -> None:
    for platform in ("github", "gitlab", "jenkins"):
        victim = next(
            build for build in settled.builds if build.platform == platform and build.kind == "success"
        )
        told: dict[str, Any] = {
            build.build_id: fetch_truth(settled)(build.build_id) for build in settled.builds
        }
        told[victim.build_id] = lie and told[victim.build_id] | lie
        verdict = judge(settled, told.get)
        assert [difference.build_id for difference in verdict.wrong] == [victim.build_id]
        assert victim.build_id in str(verdict)


def test_the_judge_lets_gitlab_count_a_retry_as_the_same_attempt(settled: World) -> None:
    def fetch(build_id: str) -> dict[str, Any]:
        return fetch_truth(settled)(build_id) | ({"attempt": 1} if build_id.startswith("gitlab:") else {})

    assert judge(settled, fetch).ok
    kinds = {difference.kind for difference in judge(settled, fetch, exact_gitlab_attempts=True).wrong}
    assert kinds == {"retry", "retry_timeout", "optional_manual"}


def test_the_judge_leaves_out_what_changed_within_the_grace_time(clock: StepClock) -> None:
    world = world_of(clock, "jenkins", "success")
    ended_at = next(m.at for m in world.builds[0].moments if m.status == "completed")
    clock.at = ended_at + 1
    assert judge(world, lambda build_id: None, grace_seconds=2).moving == 1
    clock.at = ended_at + 3
    assert judge(world, lambda build_id: None, grace_seconds=2).moving == 0


def tell_end(deliver: Any, subscriber: Subscriber, truth: Truth, sequence: int, **changes: Any) -> None:
    facts = {"build_id": "jenkins:platform:web:1", "attempt": truth.attempt, "conclusion": truth.conclusion}
    deliver(subscriber, message(f"end-{sequence}", sequence, truth.state, **facts | changes))


def test_the_judge_wants_the_present_end_told_exactly_once(
    clock: StepClock, subscriber: Subscriber, deliver: Any
) -> None:
    world = next(
        w for seed in range(9) if (w := one_jenkins_build(seed, clock)).builds[0].repository.name == "web"
    )
    build = world.builds[0]
    clock.advance(end_of(world))
    truth = world.truth(build.build_id)
    assert truth
    assert judge(world, fetch_truth(world), subscriber).faults == (
        f"{build.build_id} (success): its end was never told",
    )
    tell_end(deliver, subscriber, truth, 1)
    assert judge(world, fetch_truth(world), subscriber).ok
    tell_end(deliver, subscriber, truth, 2)
    assert judge(world, fetch_truth(world), subscriber).faults == (
        f"{build.build_id} (success): attempt 1 ended 2 times",
    )
    tell_end(deliver, subscriber, Truth("failed", "failure", 2), 3)
    assert "the last end told was failed/failure, attempt 2" in str(
        judge(world, fetch_truth(world), subscriber)
    )


def one_jenkins_build(seed: int, clock: StepClock) -> World:
    return World(seed, 1, platforms=["jenkins"], kinds={"jenkins": ["success"]}, now=clock)


def test_the_judge_finds_an_end_of_what_is_open(
    clock: StepClock, subscriber: Subscriber, deliver: Any
) -> None:
    world = world_of(clock, "gitlab", "manual_forever")
    clock.advance(end_of(world))
    assert judge(world, fetch_truth(world), subscriber).ok
    tell_end(deliver, subscriber, Truth("timeout", "timed_out", 1), 1, build_id=world.builds[0].build_id)
    assert "is open" in judge(world, fetch_truth(world), subscriber).faults[0]
