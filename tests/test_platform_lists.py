"""Lists of builds, what has to be asked after them, limits, and builds known by their id."""

import json
from datetime import UTC, datetime
from email.utils import formatdate
from urllib.parse import quote, unquote

import pytest

from tests.cases import source_of
from webhook_app import platforms
from webhook_app.platforms import (
    Answer,
    PollError,
    PollTarget,
)


def _listed(platform, repository, content):
    module = platforms.find()[platform]
    answer = Answer(200, {}, json.dumps(content).encode())
    return module.parse_list(source_of(platform), [repository], answer).observations


_GITHUB_RUN = {
    "id": 9,
    "status": "in_progress",
    "conclusion": None,
    "run_attempt": 1,
    "updated_at": "2026-11-01T10:00:00Z",
}


def test_a_github_list_gives_the_runs_that_can_be_read():
    runs = [
        _GITHUB_RUN,
        {"id": "odd"},
        _GITHUB_RUN | {"id": 10, "status": "completed", "conclusion": "success"},
        5,
    ]
    seen = _listed("github", "Acme/Web", {"total_count": 4, "workflow_runs": runs})
    assert [(one.build_id, one.state) for one in seen] == [
        ("github:Acme:Web:9", "in_progress"),
        ("github:Acme:Web:10", "completed"),
    ]


def test_a_gitlab_list_takes_the_repository_from_the_setting_or_from_the_page():
    pipeline = {
        "id": 5,
        "project_id": 7,
        "status": "manual",
        "web_url": "https://gitlab.example.com/g/p/-/pipelines/5",
    }
    for place in ("g/p", "7"):
        (seen,) = _listed("gitlab", place, [pipeline, {"id": 6}, "odd"])
        assert (seen.build_id, seen.repository, seen.waiting) == ("gitlab:7:5", "g/p", True)


def test_a_jenkins_list_names_the_builds_of_the_job():
    builds = [
        {"number": 4, "building": True, "result": None},
        {"number": 3, "building": False, "result": "SUCCESS"},
        {},
    ]
    seen = _listed("jenkins", "team/web", {"builds": builds})
    assert [(one.build_id, one.state) for one in seen] == [
        ("jenkins:team:web:4", "in_progress"),
        ("jenkins:team:web:3", "completed"),
    ]


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
@pytest.mark.parametrize("answer", [Answer(200, {}, b"<html>"), Answer(500, {}, b""), Answer(404, {}, b"{}")])
def test_a_list_that_is_none_is_a_poll_error(platform, answer):
    with pytest.raises(PollError):
        platforms.polled()[platform].parse_list(source_of(platform), ["a/b"], answer)


@pytest.mark.parametrize(
    ("platform", "repository", "path"),
    [
        ("github", "Acme/Web", "/repos/Acme/Web/actions/runs?per_page=100"),
        (
            "gitlab",
            "group/web",
            "/api/v4/projects/group%2Fweb/pipelines?order_by=updated_at&sort=desc&per_page=100",
        ),
        ("jenkins", "team/web", "/job/team/job/web/api/json?tree=builds%5B"),
    ],
)
def test_a_list_is_asked_for_where_it_is(platform, repository, path):
    request = platforms.polled()[platform].list_request(source_of(platform), [repository], None, 100)
    assert request.url.startswith(source_of(platform).api_url + path)
    assert any(value for name, value in request.headers.items() if name in ("Authorization", "PRIVATE-TOKEN"))


@pytest.mark.parametrize(
    ("platform", "repository"), [("github", "../x"), ("github", "x"), ("jenkins", "a/../b"), ("gitlab", "")]
)
def test_no_list_is_asked_for_at_a_place_that_is_none(platform, repository):
    assert platforms.polled()[platform].list_request(source_of(platform), [repository], None, 100) is None


def test_jobs_of_a_folder_are_listed_by_one_request():
    jenkins, source = platforms.polled()["jenkins"], source_of("jenkins")
    assert jenkins.together("team/web") == jenkins.together("team/api") == "team"
    assert jenkins.together("web") == "" != jenkins.together("team/web")
    request = jenkins.list_request(source, ["team/web", "team/api"], None, 30)
    assert request.url == (
        f"{source.api_url}/job/team/api/json?tree={quote('jobs[name,', safe=',')}"
        + request.url.partition("name,")[2]
    )
    assert unquote(request.url).endswith("]{0,30}]")
    content = {
        "jobs": [
            {"name": "api", "builds": [{"number": 4, "building": True, "result": None}]},
            {"name": "web", "builds": [{"number": 3, "building": False, "result": "SUCCESS"}]},
            {"name": "other", "builds": [{"number": 9, "building": True, "result": None}]},
            {"builds": 5},
        ]
    }
    answer = Answer(200, {}, json.dumps(content).encode())
    seen = jenkins.parse_list(source, ["team/web", "team/api"], answer).observations
    assert [(one.build_id, one.state) for one in seen] == [
        ("jenkins:team:api:4", "in_progress"),
        ("jenkins:team:web:3", "completed"),
    ]
    outside = jenkins.list_request(source, ["web", "api"], None, 30)
    assert outside.url.startswith(f"{source.api_url}/api/json?tree=jobs")


def test_a_gitlab_list_of_changes_looks_back_a_minute_by_gitlabs_own_clock():
    since = datetime(2026, 11, 1, 10, 0, 30, 500_000, UTC)
    request = platforms.polled()["gitlab"].list_request(source_of("gitlab"), ["7"], since, 30)
    assert request.url.endswith("&per_page=30&updated_after=2026-11-01T09:59:30Z")


@pytest.mark.parametrize("platform", ["github", "gitlab"])
def test_the_next_page_is_followed_on_the_same_api_only(platform):
    source = source_of(platform)
    body = b'{"workflow_runs": []}' if platform == "github" else b"[]"

    def more(link):
        answer = Answer(200, {"link": link}, body)
        return platforms.polled()[platform].parse_list(source, ["a/b"], answer).more

    good = f"{source.api_url}/repositories/5/runs?page=2"
    found = more(f'<{source.api_url}/x?page=1>; rel="prev", <{good}>; rel="next"')
    assert found.url == good
    assert any(value for name, value in found.headers.items() if name in ("Authorization", "PRIVATE-TOKEN"))
    for link in ("", "nonsense", '<https://evil.example/x>; rel="next"', f'<{good}>; rel="last"'):
        assert more(link) is None


@pytest.mark.parametrize(
    ("platform", "headers", "expected"),
    [
        ("github", {"x-ratelimit-limit": "5000", "x-ratelimit-remaining": "4990"}, (5000, 4990, 90)),
        (
            "github",
            {"x-ratelimit-limit": "30", "x-ratelimit-remaining": "3", "x-ratelimit-resource": "search"},
            None,
        ),
        ("github", {"x-ratelimit-limit": "many", "x-ratelimit-remaining": "3"}, None),
        ("gitlab", {"ratelimit-limit": "2000", "ratelimit-remaining": "0"}, (2000, 0, 90)),
        ("gitlab", {}, None),
        ("jenkins", {"x-ratelimit-limit": "5000", "x-ratelimit-remaining": "4990"}, None),
    ],
)
def test_limits_are_read_by_the_platforms_own_clock(platform, headers, expected):
    """Our clock may be wrong: the time to the reset is what lies between the answer's Date and it."""
    reset = {"x-ratelimit-reset": "1795500090", "ratelimit-reset": "1795500090"}
    date = {"date": formatdate(1_795_500_000, usegmt=True)}
    found = platforms.polled()[platform].limits(Answer(200, headers | reset | date, b""))
    assert (found and (found.limit, found.remaining, found.reset_seconds)) == expected
    assert platforms.polled()[platform].limits(Answer(200, headers, b"")) is None


@pytest.mark.parametrize(
    ("jobs", "state"),
    [
        (
            [{"status": "failed", "failure_reason": "job_execution_timeout", "allow_failure": False}],
            "timeout",
        ),
        ([{"status": "failed", "failure_reason": "script_failure", "allow_failure": False}], "failed"),
        ([], "failed"),
    ],
)
def test_a_failed_pipeline_is_asked_for_its_failed_jobs(jobs, state):
    gitlab = platforms.find()["gitlab"]
    content = {"id": 5, "project_id": 7, "status": "failed"}
    target = PollTarget("gitlab:7:5", "gitlab:7:5", "g/p", 5, 1, None)
    seen = gitlab.parse_poll(source_of("gitlab"), target, Answer(200, {}, json.dumps(content).encode()))
    request = gitlab.follow_up(source_of("gitlab"), seen)
    assert request.url.endswith("/api/v4/projects/7/pipelines/5/jobs?scope[]=failed&per_page=100")
    assert gitlab.parse_follow_up(seen, Answer(200, {}, json.dumps(jobs).encode())).state == state


@pytest.mark.parametrize(
    ("status", "started_at", "state"),
    [
        ("manual", "2026-11-01T10:00:00Z", "in_progress"),
        ("manual", None, "queued"),
        ("running", "2026-11-01T10:00:00Z", "queued"),
    ],
)
def test_a_listed_pipeline_that_waits_is_asked_whether_it_has_begun(status, started_at, state):
    gitlab = platforms.polled()["gitlab"]
    listed = {
        "id": 5,
        "project_id": 7,
        "status": "manual",
        "web_url": "https://gitlab.example.com/g/p/-/pipelines/5",
    }
    answer = Answer(200, {}, json.dumps([listed]).encode())
    (seen,) = gitlab.parse_list(source_of("gitlab"), ["7"], answer).observations
    request = gitlab.follow_up(source_of("gitlab"), seen)
    assert request.url.endswith("/api/v4/projects/7/pipelines/5")
    told = Answer(200, {}, json.dumps(listed | {"status": status, "started_at": started_at}).encode())
    assert gitlab.parse_follow_up(seen, told).state == state


@pytest.mark.parametrize(
    ("build_id", "key", "repository", "number"),
    [
        ("github:Acme:Web:12", "github:12", "Acme/Web", None),
        ("gitlab:7:5", "gitlab:7:5", None, None),
        ("jenkins:Team:Web:12", "jenkins:team:web:12", "Team/Web", 12),
    ],
)
def test_an_id_names_its_build(build_id, key, repository, number):
    platform = build_id.partition(":")[0]
    seen = platforms.find()[platform].named(source_of(platform), build_id)
    assert (seen.key, seen.build_id, seen.repository, seen.number) == (key, build_id, repository, number)
    assert seen.state is None


@pytest.mark.parametrize(
    "build_id",
    [
        "github:1",
        "github:a:b:0",
        "github:a:..:1",
        "gitlab:x:1",
        "gitlab:1",
        "jenkins:1",
        "jenkins:..:1",
    ],
)
def test_an_id_of_another_form_names_none(build_id):
    platform = build_id.partition(":")[0]
    assert platforms.find()[platform].named(source_of(platform), build_id) is None
