"""The simulated REST APIs answer, page, limit and fail as the platforms' documentation says."""

import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
import requests

from tests.asking import world_of
from tests.simulation import GITHUB, GITLAB, JENKINS, end_of
from webhook_app.simulated import github, gitlab
from webhook_app.simulated.facts import Build
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.gitlab import GitLabServer
from webhook_app.simulated.httpd import Request, Response, Server, dropped, hang
from webhook_app.simulated.jenkins import JenkinsServer
from webhook_app.simulated.world import REPOSITORIES, StepClock


@pytest.fixture
def clock() -> StepClock:
    return StepClock(1_795_000_000.25)


@pytest.fixture
def http() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


# GitHub ------------------------------------------------------------------------------------------


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
