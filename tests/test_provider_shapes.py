"""Events as the platforms' own webhooks: a reception of BuildRelay at the other end takes them for such."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import select

from jobs import deliver as job
from jobs.resources import Desk, Resources
from tests.caller import KEY, jenkins
from tests.facts import PACE, at, github, gitlab
from webhook_app import builds, db, formats, models, platforms, provider_shapes, settings, subscribers
from webhook_app.formats import Told
from webhook_app.lifecycle import Conclusion, State
from webhook_app.platforms import Source
from webhook_app.room import Room
from webhook_app.simulated.httpd import Response, Server
from webhook_app.times import utc_now

API_KEY = "the-key-of-the-dashboard"
PLATFORMS = ("github", "gitlab", "jenkins")
ENDS = [
    (State.COMPLETED, Conclusion.SUCCESS), (State.COMPLETED, Conclusion.SKIPPED),
    (State.FAILED, Conclusion.FAILURE), (State.CANCELLED, Conclusion.CANCELLED),
    (State.TIMEOUT, Conclusion.TIMED_OUT),
]  # fmt: skip
STATES = [(State.QUEUED, None), (State.IN_PROGRESS, None), *ENDS]
IDS = {
    "github": ("octo/web", "github:octo:web:77", "https://github.com/octo/web/actions/runs/77"),
    "gitlab": ("group/sub/project", "gitlab:4101:77", "https://gitlab.com/group/sub/project/-/pipelines/77"),
    "jenkins": ("folder/web", "jenkins:folder:web:77", "https://ci.example/jenkins/job/folder/job/web/77/"),
}


def data_of(platform, state, conclusion=None, **more):
    repository, build_id, url = IDS[platform]
    begun, over = state is not State.QUEUED, state.terminal
    return {
        "build_id": build_id, "sequence": 3, "event_id": 7, "source": platform, "platform": platform,
        "repository": repository, "workflow": "CI" if platform == "github" else None, "branch": "main",
        "commit": "c0ffee", "number": 77, "attempt": 1, "state": state.value, "previous_state": None,
        "conclusion": conclusion.value if conclusion else None, "url": url,
        "started_at": "2026-11-01T09:58:30Z" if begun else None,
        "ended_at": "2026-11-01T10:00:00Z" if over else None, "duration_seconds": 90.0 if over else None,
        "progress": 60, "observed_by": "push", "error": None,
    } | more  # fmt: skip


def rendered(data, type_=None):
    return formats.render("provider", Told("msg_1", type_ or f"build.{data['state']}", at(0), data))[1]


def read_back(platform, data):
    """What the platform's own parser makes of the body."""
    headers = {
        "content-type": "application/json",
        **provider_shapes.shape(f"build.{data['state']}", data).headers,
    }
    webhook = platforms.find()[platform].parse_webhook(Source(platform, platform), headers, rendered(data))
    (seen,) = webhook.observations
    return seen


@pytest.mark.parametrize(("state", "conclusion"), STATES)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_platforms_own_parser_reads_the_same_build(platform, state, conclusion):
    data = data_of(platform, state, conclusion)
    seen = read_back(platform, data)
    assert seen.build_id.casefold() == data["build_id"]
    assert (seen.branch, seen.commit, seen.url) == ("main", "c0ffee", data["url"])
    if platform != "jenkins" and state is not State.QUEUED:
        assert seen.started_at is None or seen.started_at.isoformat() == "2026-11-01T09:58:30+00:00"
    if state is State.TIMEOUT and platform != "github":  # which have no word for it without their jobs
        state, conclusion = State.FAILED, Conclusion.FAILURE
    assert (seen.state, seen.conclusion) == (state, conclusion)
    if state.terminal:
        assert seen.ended_at.isoformat() == "2026-11-01T10:00:00+00:00"


@pytest.mark.parametrize(("state", "conclusion"), STATES)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_other_time_stands_in_for_that_of_the_creation(platform, state, conclusion):
    seen = read_back(platform, data_of(platform, state, conclusion))
    assert seen.created_at == (seen.started_at if platform == "jenkins" else None)


def test_github_is_told_what_a_dashboard_reads_of_a_run():
    body = json.loads(rendered(data_of("github", State.FAILED, Conclusion.FAILURE, trigger="pull_request")))
    run = body["workflow_run"]
    assert body["action"] == "completed"
    assert body["repository"] == {"full_name": "octo/web", "name": "web", "owner": {"login": "octo"}}
    assert {name: run[name] for name in ("id", "name", "run_number", "run_attempt", "head_branch", "event")} == {
        "id": 77, "name": "CI", "run_number": 77, "run_attempt": 1, "head_branch": "main",
        "event": "pull_request",
    }  # fmt: skip
    assert (run["status"], run["conclusion"], run["html_url"]) == ("completed", "failure", IDS["github"][2])
    assert (run["run_started_at"], run["updated_at"]) == ("2026-11-01T09:58:30Z", "2026-11-01T10:00:00Z")
    assert json.loads(rendered(data_of("github", State.QUEUED)))["action"] == "requested"


def test_jenkins_is_told_as_the_notification_plugin_tells_it():
    body = json.loads(rendered(data_of("jenkins", State.COMPLETED, Conclusion.SUCCESS)))
    assert (body["name"], body["url"]) == ("web", "job/folder/job/web/")
    build = body["build"]
    assert (build["phase"], build["status"], build["number"]) == ("COMPLETED", "SUCCESS", 77)
    assert (build["url"], build["duration"]) == ("job/folder/job/web/77/", 90_000)
    assert build["timestamp"] == 1793527200000
    without_page = json.loads(rendered(data_of("jenkins", State.QUEUED, url=None)))
    assert without_page["build"]["url"] == "job/folder/job/web/77/"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_build_of_which_little_is_known_makes_a_body_all_the_same(platform):
    data = data_of(platform, State.FAILED)
    names = (
        "repository",
        "workflow",
        "branch",
        "commit",
        "url",
        "started_at",
        "ended_at",
        "duration_seconds",
    )
    assert json.loads(rendered(data | dict.fromkeys(names)))


@pytest.mark.parametrize(
    ("type_", "platform", "sent"),
    [
        ("build.queued", "github", True), ("build.timeout", "jenkins", True), ("build.failed", "gitlab", True),
        ("build.progress", "github", False), ("build.polling_started", "github", False),
        ("build.reported", "script", False), ("build.failed", "script", False),
        ("subscriber.disabled", None, False), ("release.started", None, False),
    ],
)  # fmt: skip
def test_only_what_a_platform_sends_goes_out(type_, platform, sent):
    wants = subscribers.Filters("s", (), (), (), (), format="provider")
    data = {"platform": platform} if platform else {}
    assert wants.match(type_, data) is sent
    assert subscribers.Filters("s", (), (), (), ()).match(type_, data)


@pytest.mark.parametrize(
    ("url", "format_", "sent_to"),
    [
        ("https://d.example", "provider", "https://d.example/api/webhook/{}"),
        ("https://d.example:8000/", "provider", "https://d.example:8000/api/webhook/{}"),
        ("https://d.example/?team=a", "provider", "https://d.example/api/webhook/{}?team=a"),
        ("https://d.example/hook", "provider", "https://d.example/hook"),
        ("https://d.example", "standard", "https://d.example"),
    ],
)
@pytest.mark.parametrize(
    ("platform", "name"), [("github", "github-actions"), ("gitlab", "gitlab"), ("jenkins", "jenkins")]
)
def test_an_address_without_a_path_gets_that_of_the_platform(url, format_, sent_to, platform, name):
    message = claimed(data_of(platform, State.QUEUED))
    assert job.deliveries.target(url, message, format_) == sent_to.format(name)


def claimed(data, type_="build.queued"):
    return job.deliveries.Claimed(1, "msg_1", "sub_1", None, 1, "c", type_, at(0), data)


@pytest.mark.parametrize(
    ("environ", "format_"),
    [
        ({"DASHBOARD_API_URL": "http://localhost:8000"}, "provider"),
        ({"DASHBOARD_API_URL": "http://localhost:8000/"}, "provider"),
        ({"DASHBOARD_API_URL": "http://localhost:8000/hook"}, "standard"),
        ({"DASHBOARD_API_URL": "http://localhost:8000/hook", "DASHBOARD_API_FORMAT": "provider"}, "provider"),
        ({"DASHBOARD_API_URL": "http://localhost:8000", "DASHBOARD_API_FORMAT": "standard"}, "standard"),
        ({}, "standard"),
    ],
)
def test_the_format_follows_from_the_address_unless_it_is_set(environ, format_):
    assert settings.load(environ).dashboard_format == format_


# ---- a dashboard at the other end ------------------------------------------------------------


@contextmanager
def dashboard(make_api, database_url, secret):
    """A BuildRelay that believes to hear the platforms themselves; its caller, and what came to it."""
    other = make_api(
        database_url,
        GITHUB_WEBHOOK_SECRET=secret,
        GITLAB_WEBHOOK_SECRET=secret,
        JENKINS_WEBHOOK_SECRET=secret,
    )
    came = []

    def handle(request):
        answer = other.client.post(request.path, data=request.body, headers=dict(request.headers))
        came.append((request.path, dict(request.headers), answer.status_code, answer.json.get("status")))
        return Response(answer.status_code, answer.data)

    server = Server(handle)
    try:
        yield other, server.url, came
    finally:
        server.close()


def test_a_reception_at_the_other_end_takes_every_message_as_a_webhook(
    api, make_api, migrated_sqlite, tmp_path
):
    path = tmp_path / "other.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    wanted = {"url": "http://127.0.0.1:1", "signing": "hmac", "origin": "settings", "format": "provider"}
    wanted |= {"id": subscribers.STATIC_ID, "headers": {"Authorization": f"Bearer {API_KEY}"}}
    _, secret = db.as_writer(api.engine, lambda write: subscribers.create(write, wanted, (KEY,), utc_now()))
    with dashboard(make_api, f"sqlite:///{path}", secret) as (other, url, came):
        db.as_writer(
            api.engine, lambda write: subscribers.change(write, "sub_dashboard", {"url": url}, (), utc_now())
        )
        record(api)
        deliver(api)
        assert {(path, status) for path, _, status, _ in came} == {
            ("/api/webhook/github-actions", 202), ("/api/webhook/gitlab", 202), ("/api/webhook/jenkins", 202),
        }  # fmt: skip
        assert {told for *_, told in came} == {"accepted"}
        assert all(headers["authorization"] == f"Bearer {API_KEY}" for _, headers, *_ in came)
        assert all(headers["webhook-id"].startswith("msg_") for _, headers, *_ in came)
        assert known(other) == known(api, but="script")
        api("POST", "/api/subscribers/sub_dashboard/test", 202)
        deliver(api)
        assert (came[-1][0], came[-1][2:]) == ("/api/webhook/github-actions", (200, "pong"))


def record(api):
    """Builds of all platforms and of a script, through their states."""
    now = utc_now()
    facts = [
        github(State.QUEUED), github(State.IN_PROGRESS, started_at=at(0)), github(State.FAILED, ended_at=at(60)),
        github(State.CANCELLED, run=2, ended_at=at(9)), gitlab(State.QUEUED, 0, {1: "queued"}),
        gitlab(State.IN_PROGRESS, 1, {1: "in_progress"}), gitlab(State.COMPLETED, 9, {1: "completed"}),
    ]  # fmt: skip
    db.as_writer(api.engine, lambda write: builds.record(write, facts + of_refs(), now, PACE))
    for place in ("shop/job/feature%252Fpay", "shop/job/PR-7", "shop/job/main"):
        jenkins(
            api, {"full_url": f"https://ci.example/job/{place}/3/", "url": f"job/{place}/3/", "number": 3}
        )
    jenkins(api, {"full_url": "https://ci.example/job/web/5/", "number": 5, "timestamp": 1793527200000})
    over = {"phase": "COMPLETED", "status": "ABORTED", "timestamp": 1793527290000}
    jenkins(api, {"full_url": "https://ci.example/job/web/5/", "number": 5} | over)
    headers = {"X-Build-Token": "script-token-of-the-tests"}
    api(
        "POST",
        "/api/internal/build-events",
        202,
        json={"runId": "r", "event": "build_started"},
        headers=headers,
    )


REFS = {
    "github": [
        {"trigger": "pull_request", "branch": "stranger:main", "head_repository": "stranger/Fork", "is_fork": True},
        {"trigger": "pull_request_target", "branch": "unknown:main", "is_fork": True},
        {"trigger": "pull_request", "branch": "feature/pay", "is_fork": False},
        {"trigger": "tag", "branch": "refs/tags/v1", "is_fork": False},
        {"trigger": "release", "branch": "refs/tags/rel/2", "is_fork": False},
        {"trigger": "workflow_dispatch", "branch": "refs/tags/v1", "is_fork": False, "workflow": None},
        {"trigger": "schedule", "branch": None, "is_fork": False},
    ],
    "gitlab": [
        {"trigger": "pull_request", "branch": "stranger/sub:main", "head_repository": "stranger/sub/fork", "is_fork": True},
        {"trigger": "pull_request", "branch": "4711:feature/a", "head_repository": "4711", "is_fork": True},
        {"trigger": "pull_request", "branch": "feature/pay", "is_fork": False},
        {"trigger": "tag", "branch": "refs/tags/v1", "is_fork": False},
        {"trigger": "web", "branch": "refs/tags/v1", "is_fork": False, "workflow": "Nightly"},
        {"trigger": "push", "branch": "main", "is_fork": False, "workflow": "push"},
    ],
}  # fmt: skip
"""Builds of forks (of one that is gone, of one known by its id), of tags, and of pull requests."""


def of_refs():
    runs = [github(State.FAILED, run=10 + i, ended_at=at(9), **ref) for i, ref in enumerate(REFS["github"])]
    return runs + [
        gitlab(State.FAILED, 9, {}, 10 + i, ended_at=at(9), **ref) for i, ref in enumerate(REFS["gitlab"])
    ]


@pytest.mark.parametrize(
    ("platform", "ref"), [(platform, ref) for platform, refs in REFS.items() for ref in refs], ids=str
)
def test_the_platforms_own_parser_reads_the_same_ref(platform, ref):
    data = data_of(platform, State.FAILED, Conclusion.FAILURE, **{"head_repository": None} | ref)
    seen = read_back(platform, data)
    assert {name: getattr(seen, name) for name in ref if name != "workflow"} == {
        name: value for name, value in ref.items() if name != "workflow"
    }
    assert seen.head_repository == data["head_repository"]
    if ref.get("workflow"):
        assert seen.workflow == ref["workflow"]


def test_a_fork_and_a_tag_are_told_as_the_platforms_tell_them():
    fork, gone, _, tag, *_ = (
        json.loads(rendered(data_of("github", State.FAILED, **ref))) for ref in REFS["github"]
    )
    assert fork["workflow_run"]["head_branch"] == gone["workflow_run"]["head_branch"] == "main"
    assert fork["workflow_run"]["head_repository"]["full_name"] == "stranger/Fork"
    assert gone["workflow_run"]["head_repository"] is None
    assert (tag["workflow_run"]["head_branch"], tag["workflow_run"]["event"]) == ("v1", "push")
    by_path, by_id, own, tag, *_ = (
        json.loads(rendered(data_of("gitlab", State.FAILED, **ref))) for ref in REFS["gitlab"]
    )
    assert by_path["object_attributes"]["source"] == "merge_request_event"
    assert (by_path["object_attributes"]["ref"], by_path["merge_request"]["source_project_id"]) == (
        "main",
        None,
    )
    assert by_path["merge_request"]["source"] == {"path_with_namespace": "stranger/sub/fork"}
    assert (by_id["object_attributes"]["ref"], by_id["merge_request"]["source_project_id"]) == (
        "feature/a",
        4711,
    )
    assert own["merge_request"]["source_project_id"] == own["project"]["id"]
    assert (tag["object_attributes"]["ref"], tag["object_attributes"]["tag"]) == ("v1", True)
    assert tag["object_attributes"]["source"] == "push"


def deliver(api):
    """Send all that is due."""
    held_by = api.app.extensions["buildrelay"]
    with ThreadPoolExecutor(8) as threads:
        held = Resources(held_by.settings, api.engine, held_by.redis, threads, desk=Desk(Room()))
        until = time.monotonic() + 60
        while pending(api):
            assert time.monotonic() < until
            job.deliver(held)


def pending(api):
    with db.reading(api.engine) as connection:
        columns = models.messages.c
        return connection.execute(select(columns.id).where(columns.state == "pending")).all()


def known(api, but=None):
    names = (
        "build_id", "state", "conclusion", "repository", "branch", "commit", "number", "url", "trigger",
        "head_repository", "is_fork",
    )  # fmt: skip
    items = api("GET", "/api/builds")["items"]
    return {tuple(one[name] for name in names) for one in items if one["platform"] != but}
