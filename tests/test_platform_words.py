"""The words of each platform, one by one: states, ends, signatures, retries."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.cases import SAMPLES, body_of, parse, read
from webhook_app import platforms
from webhook_app.lifecycle import Act, JobStatus, Observation, Recorded, State, verdict
from webhook_app.platforms import (
    BadSignature,
    NotJson,
    Unreadable,
)


def changed(case: str, *, headers: dict[str, str] | None = None, **fields: dict[str, Any]) -> Observation:
    """The one observation of a sample in which objects of the body are updated by `fields`."""
    platform, name = case.split("/")
    payload = json.loads(body_of(SAMPLES / case))
    for key, values in fields.items():
        payload[key].update(values)
    sent = read(SAMPLES / platform / name, "headers") | (headers or {})
    (seen,) = parse(platform, sent, json.dumps(payload).encode()).observations
    return seen


@pytest.mark.parametrize(
    ("status", "conclusion", "state", "ended_as", "waiting"),
    [
        ("requested", None, "queued", None, False),
        ("queued", None, "queued", None, False),
        ("pending", None, "queued", None, False),
        ("waiting", None, "queued", None, True),
        ("in_progress", None, "in_progress", None, False),
        ("in_progress", "success", "in_progress", None, False),
        ("levitating", None, None, None, False),
        ("completed", None, "in_progress", None, False),
        ("completed", "success", "completed", "success", False),
        ("completed", "neutral", "completed", "neutral", False),
        ("completed", "skipped", "completed", "skipped", False),
        ("completed", "failure", "failed", "failure", False),
        ("completed", "startup_failure", "failed", "failure", False),
        ("completed", "mostly_harmless", "failed", "failure", False),
        ("completed", "timed_out", "timeout", "timed_out", False),
        ("completed", "stale", "timeout", "stale", False),
        ("completed", "cancelled", "cancelled", "cancelled", False),
        ("completed", "action_required", "queued", "action_required", True),
    ],
)
def test_github_words(status, conclusion, state, ended_as, waiting):
    seen = changed("github/run_requested", workflow_run={"status": status, "conclusion": conclusion})
    assert (seen.state, seen.conclusion, seen.waiting) == (state, ended_as, waiting)
    assert seen.doubtful is (status == "completed" and conclusion is None)
    assert (seen.ended_at is not None) is (seen.state is not None and seen.state.terminal)


@pytest.mark.parametrize(
    ("job", "state"),
    [
        ({"status": "waiting"}, None),
        ({"status": "completed", "conclusion": "cancelled"}, None),
        ({"status": "completed", "conclusion": "success", "steps": [{"status": "completed"}]}, None),
        ({"status": "completed", "conclusion": ["odd"]}, None),
        ({"status": "in_progress"}, State.IN_PROGRESS),
        ({"status": "in_progress", "run_attempt": None}, None),
    ],
)
def test_github_job_never_ends_its_run(job, state):
    seen = changed("github/job_queued", workflow_job=job)
    assert seen.state is state
    assert len(seen.jobs) == (seen.attempt is not None)
    assert seen.platform_at is None


@pytest.mark.parametrize(
    "name", ["Acme", "Acme/..", "Acme/a b", "Acme/a:b", "Acme/web/x", "../web", "Acme/web\n", ""]
)
def test_github_repository_must_be_safe_in_a_path(name):
    with pytest.raises(Unreadable):
        changed("github/run_requested", repository={"full_name": name})


def test_github_form_is_told_by_its_media_type_whatever_its_parameters():
    case = SAMPLES / "github" / "run_completed_failure_form"
    media_type = "Application/X-WWW-Form-Urlencoded; charset=utf-8"
    headers = {"x-github-event": "workflow_run", "content-type": media_type}
    assert parse("github", headers, body_of(case)).observations[0].state is State.FAILED
    for broken in (
        b"",
        b"payload=",
        b"other=%7B%7D",
        b"payload=%7B%7D&payload=%7B%7D",
        b"payload=%FF",
        b"\xff",
    ):
        with pytest.raises(NotJson):
            parse("github", headers, broken)


@pytest.mark.parametrize(
    ("status", "begun", "state", "conclusion", "waiting"),
    [
        *((word, False, "queued", None, False) for word in ("created", "waiting_for_resource", "preparing")),
        *((word, False, "queued", None, False) for word in ("waiting_for_callback", "pending")),
        *((word, True, "in_progress", None, False) for word in ("created", "pending")),
        *((word, False, "queued", None, True) for word in ("manual", "scheduled")),
        *((word, True, "in_progress", None, True) for word in ("manual", "scheduled")),
        *((word, False, "in_progress", None, False) for word in ("running", "canceling")),
        ("success", True, "completed", "success", False),
        ("skipped", False, "completed", "skipped", False),
        ("canceled", True, "cancelled", "cancelled", False),
        ("failed", True, "failed", "failure", False),
        ("levitating", True, None, None, False),
    ],
)
def test_gitlab_words(status, begun, state, conclusion, waiting):
    case = "gitlab/pipeline_running" if begun else "gitlab/pipeline_pending"
    seen = changed(case, object_attributes={"status": status, "finished_at": "2026-11-01 10:09:00 UTC"})
    assert (seen.state, seen.conclusion, seen.waiting) == (state, conclusion, waiting)
    assert (seen.ended_at is not None) is (seen.state is not None and seen.state.terminal)


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"failure_reason": "stuck_or_timeout_failure"}, State.TIMEOUT),
        ({"failure_reason": "script_failure"}, State.FAILED),
        ({"failure_reason": None}, State.FAILED),
        ({"failure_reason": "job_execution_timeout", "allow_failure": True}, State.FAILED),
    ],
)
def test_gitlab_failure_is_a_time_out_only_if_every_blocking_job_ran_out_of_time(job, expected):
    payload = json.loads(body_of(SAMPLES / "gitlab" / "pipeline_failed_by_time_out"))
    payload["builds"][1].update(job)
    (seen,) = parse("gitlab", {}, json.dumps(payload).encode()).observations
    assert seen.state is expected


def test_gitlab_takes_the_signature_or_the_token_as_configured():
    signed, plain = SAMPLES / "gitlab" / "pipeline_success_signed", SAMPLES / "gitlab" / "pipeline_running"
    verify = platforms.find()["gitlab"].verify
    signing_token, now = read(signed, "expected")["secrets"][0], read(signed, "expected")["now"]
    token = read(plain, "headers")["x-gitlab-token"]
    headers, body = read(signed, "headers"), body_of(signed)
    verify(headers, body, ("another token", signing_token), now)
    verify(headers | {"x-gitlab-token": "wrong"}, body, (token, signing_token), now)
    with pytest.raises(BadSignature):  # only a signing token is set, and nothing is signed
        verify(read(plain, "headers"), body_of(plain), (signing_token,), now)
    with pytest.raises(BadSignature):  # the signing token itself, sent as a token
        verify({"x-gitlab-token": signing_token}, body, (signing_token,), now)
    with pytest.raises(BadSignature):  # a bad signature never falls back to a good token
        verify(headers | {"x-gitlab-token": token}, body + b" ", (token, signing_token), now)
    sent_at = int(headers["webhook-timestamp"])
    for drift in (-300, 300):
        verify(headers, body, (signing_token,), sent_at + drift)
    for drift in (-301, 301):
        with pytest.raises(BadSignature):
            verify(headers, body, (signing_token,), sent_at + drift)


def test_a_token_may_hold_any_character():
    """WSGI hands header bytes over as Latin-1."""
    verify = platforms.find()["gitlab"].verify
    verify({"x-gitlab-token": "schlüssel".encode().decode("latin-1")}, b"", ("schlüssel",), 0.0)
    with pytest.raises(BadSignature):
        verify({"x-gitlab-token": "schlussel"}, b"", ("schlüssel",), 0.0)


def recorded(seen: Observation) -> Recorded:
    """What `seen` leaves behind when it is the first word about its build."""
    jobs = {job.id: job.status for job in seen.jobs}
    assert seen.state is not None
    return Recorded(
        attempt=1,
        state=seen.state,
        told_state=seen.state,
        platform_at=seen.platform_at,
        jobs=jobs,
        jobs_complete=seen.jobs_complete,
    )


GITLAB_END = {"object_attributes": {"status": "success", "finished_at": "2026-11-01 10:02:01 UTC"}}


@pytest.mark.parametrize(
    ("job", "act"),
    [
        ({"build_status": "created"}, Act.ENRICH),
        ({"build_status": "pending"}, Act.ENRICH),
        ({"build_status": "running", "build_started_at": "2026-11-01T10:01:02Z"}, Act.DROP),
        ({"build_status": "success", "build_finished_at": "2026-11-01T10:02:00Z"}, Act.ENRICH),
        (
            {"build_status": "running", "build_started_at": "2026-11-01T12:00:00Z", "build_id": 9009},
            Act.REOPEN,
        ),
        (
            {"build_status": "running", "build_started_at": "2026-11-01T12:00:00Z", "build_id": 9003},
            Act.REOPEN,
        ),
    ],
    ids=["created", "pending", "late", "ended", "retried", "played"],
)
def test_gitlab_job_after_the_end_of_its_pipeline_asks_for_no_poll(job, act):
    payload = json.loads(body_of(SAMPLES / "gitlab" / "job_created")) | job
    (late,) = parse("gitlab", {}, json.dumps(payload).encode()).observations
    decided = verdict(recorded(changed("gitlab/pipeline_running", **GITLAB_END)), late)
    assert (decided.act, decided.ask) == (act, False)


def test_gitlab_retry_begins_with_its_own_jobs():
    payload = json.loads(body_of(SAMPLES / "gitlab" / "pipeline_running"))
    new = {"id": 9100, "name": "test", "status": "running", "created_at": "2026-11-03 08:00:00 UTC"}
    payload["builds"][0] = new | {"started_at": "2026-11-03 08:00:09 UTC"}
    (seen,) = parse("gitlab", {}, json.dumps(payload).encode()).observations
    assert seen.started_at == datetime(2026, 11, 3, 8, 0, 9, tzinfo=UTC)
    assert seen.platform_at == seen.started_at


def test_gitlab_manual_job_that_is_still_created_was_not_played():
    """Else a pipeline event from before the end would look like a new attempt."""
    seen = changed("gitlab/pipeline_running", **GITLAB_END)
    assert seen.jobs[-1].status is JobStatus.MANUAL


@pytest.mark.parametrize(
    ("phase", "status", "state", "conclusion"),
    [
        ("QUEUED", None, "queued", None),
        ("STARTED", None, "in_progress", None),
        ("STARTED", "FAILURE", "in_progress", None),
        ("COMPLETED", "SUCCESS", "completed", "success"),
        ("FINALIZED", "UNSTABLE", "failed", "failure"),
        ("completed", "failure", "failed", "failure"),
        ("COMPLETED", "NOT_BUILT", "completed", "skipped"),
        ("COMPLETED", "ABORTED", "cancelled", "cancelled"),
        ("COMPLETED", "EXPLODED", "failed", "failure"),
        ("NONE", "SUCCESS", None, None),
    ],
)
def test_jenkins_words(phase, status, state, conclusion):
    seen = changed("jenkins/queued", build={"phase": phase, "status": status})
    assert (seen.state, seen.conclusion, seen.raw_conclusion) == (state, conclusion, status)


@pytest.mark.parametrize(
    ("url", "build_id"),
    [
        ("job/web/7/", "jenkins:web:7"),
        ("job/web/7", "jenkins:web:7"),
        ("https://ci.example.com/job/job/job/web/7/", "jenkins:job:web:7"),
        ("view/all/job/a/job/b/job/c/7/", "jenkins:a:b:c:7"),
        ("job/web/", None),
        ("job/../7/", None),
        ("job/a%2Fb/7/", "jenkins:a~252Fb:7"),
        ("job/web/label=a%2Fb/7/", "jenkins:web:~2Flabel~3Da~252Fb:7"),
        ("web/7/", None),
        ("job/web/label=linux/7/", "jenkins:web:~2Flabel~3Dlinux:7"),
        ("job/web/LABEL=linux,JDK=17/7/", "jenkins:web:~2FLABEL~3Dlinux~2CJDK~3D17:7"),
        ("job/mvn/com.acme$core/7/", "jenkins:mvn:~2Fcom.acme~24core:7"),
        ("job/mvn/com.acme%24core/7/", "jenkins:mvn:~2Fcom.acme~24core:7"),
        ("label=linux/7/", None),
        ("job/web/a=b/c=d/7/", None),
        ("job/web/../7/", None),
        (7, None),
    ],
)
def test_jenkins_build_is_known_by_its_path(url, build_id):
    change = {"url": url, "full_url": None}
    if build_id is None:
        with pytest.raises(Unreadable):
            changed("jenkins/queued", build=change)
    else:
        assert changed("jenkins/queued", build=change).build_id == build_id


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("job/web/LABEL=linux,JDK=17/4/", "job/web/LABEL%3Dlinux%2CJDK%3D17"),
        ("job/mvn/com.acme$core/4/", "job/mvn/com.acme%24core"),
        ("job/team/job/web/job/feature%252Fpay/4/", "job/team/job/web/job/feature%252Fpay"),
        ("job/a=b/4/", "job/a%3Db"),
    ],
)
def test_jenkins_is_asked_where_the_build_is(url, path):
    """Alone, in a list of its own, and never in a list of what stands beside it below its job."""
    jenkins = platforms.polled()["jenkins"]
    source = platforms.Source("jenkins", "jenkins", "https://ci.example.com/x")
    seen = changed("jenkins/queued", build={"url": url, "full_url": None})
    target = platforms.PollTarget(seen.build_id, seen.key, seen.repository, seen.number, 1, None)
    asked = jenkins.poll_request(source, target), jenkins.list_request(source, [seen.repository], None, 30)
    expected = [f"https://ci.example.com/x/{path}/4/api/json", f"https://ci.example.com/x/{path}/api/json"]
    assert [request and request.url.partition("?")[0] for request in asked] == expected
    below = "=" in url.split("/")[2] or "$" in url
    assert (jenkins.together(seen.repository) == seen.repository) is below


@pytest.mark.parametrize(
    ("job", "branch", "workflow", "trigger"),
    [
        ("job/team/job/web/job/feature%252Flogin/", "feature/login", "web", None),
        ("job/feature%252Flogin/", "feature/login", "feature%2Flogin", None),
        ("job/web/job/main/", "main", "web", None),
        ("job/web/job/PR-12/", "PR-12", "web", "pull_request"),
        ("job/main/", None, "main", None),
        ("job/team/job/deploy/", "deploy", "deploy", None),
        ("job/team/job/web/job/fix%2523 1/", "fix%23 1", "fix%23 1", None),
        ("job/web/OS=linux/", None, "OS=linux", None),
    ],
)
def test_jenkins_tells_the_branch_of_a_multibranch_job_by_its_name(job, branch, workflow, trigger):
    seen = changed("jenkins/queued", build={"url": f"{job}7/", "full_url": None, "scm": {"changes": []}})
    assert (seen.branch, seen.workflow, seen.trigger) == (branch, workflow, trigger)
    told = changed("jenkins/queued", build={"url": f"{job}7/", "scm": {"branch": "origin/other"}})
    assert told.branch == "other"
    encoded = changed(
        "jenkins/queued", build={"url": f"{job}7/", "scm": {"branch": "origin/feature%2Flogin"}}
    )
    assert encoded.branch == "feature/login"


@pytest.mark.parametrize(
    ("told", "queue_id"), [(55, "55"), (-1, None), (0, None), ("55", None), (None, None)]
)
def test_jenkins_queue_ids(told, queue_id):
    assert changed("jenkins/queued", build={"queue_id": told}).queue_id == queue_id


OCTO, FORK = {"id": 1, "full_name": "octo/web"}, {"id": 2, "full_name": "stranger/web"}


@pytest.mark.parametrize(
    ("run", "head"),
    [
        # the trigger, the branch as it is shown, the fork, is it one
        ({"event": "push", "head_repository": OCTO}, ("push", "main", None, False)),
        ({"event": "pull_request", "head_repository": OCTO}, ("pull_request", "main", None, False)),
        ({"event": "pull_request", "head_repository": FORK},
         ("pull_request", "stranger:main", "stranger/web", True)),
        ({"event": "pull_request_target", "head_repository": FORK},
         ("pull_request_target", "stranger:main", "stranger/web", True)),
        ({"event": "pull_request", "head_repository": {"full_name": "Octo/Web"}},
         ("pull_request", "main", None, False)),
        ({"event": "pull_request", "head_repository": {"full_name": "stranger/web"}},
         ("pull_request", "stranger:main", "stranger/web", True)),
        ({"event": "pull_request", "head_repository": {"id": 1, "full_name": "old/name"}},
         ("pull_request", "main", None, False)),
        ({"event": "pull_request", "head_repository": None}, ("pull_request", "unknown:main", None, True)),
        ({"event": "push", "head_repository": None}, ("push", "main", None, None)),
        ({"event": "release", "head_repository": OCTO}, ("release", "refs/tags/main", None, False)),
        ({"event": "push", "path": ".github/workflows/ci.yml@refs/tags/main", "head_repository": OCTO},
         ("tag", "refs/tags/main", None, False)),
        ({"event": None, "head_repository": "?"}, (None, "main", None, None)),
    ],
)  # fmt: skip
def test_github_tells_whose_branch_it_is(run, head):
    base = {"head_branch": "main", "repository": OCTO}
    seen = changed("github/run_in_progress", workflow_run=base | run, repository=OCTO)
    assert (seen.trigger, seen.branch, seen.head_repository, seen.is_fork) == head


def test_a_job_of_github_does_not_tell_whose_branch_it_names():
    assert changed("github/job_in_progress", workflow_job={"head_branch": "main"}).branch is None


@pytest.mark.parametrize(
    ("pipeline", "request_", "head"),
    [
        ({"source": "push"}, None, ("push", "main", None, False)),
        ({"source": "push", "tag": True}, None, ("tag", "refs/tags/main", None, False)),
        ({"source": "web", "tag": True}, None, ("web", "refs/tags/main", None, False)),
        ({"source": "merge_request_event"}, {"source_project_id": 101},
         ("pull_request", "main", None, False)),
        ({"source": "merge_request_event"}, {"source_project_id": 500},
         ("pull_request", "500:main", "500", True)),
        ({"source": "merge_request_event"},
         {"source_project_id": 500, "source": {"path_with_namespace": "a/stranger/web"}},
         ("pull_request", "a/stranger:main", "a/stranger/web", True)),
        ({"source": "merge_request_event"}, {"source_project_id": "500"},
         ("pull_request", "500:main", "500", True)),
        ({"source": "merge_request_event"}, {"source_project_id": None},
         ("pull_request", "unknown:main", "unknown", True)),
        ({"source": "schedule"}, {}, ("schedule", "main", None, False)),
    ],
)  # fmt: skip
def test_gitlab_tells_whose_branch_it_is(pipeline, request_, head):
    payload = json.loads(body_of(SAMPLES / "gitlab/pipeline_running"))
    payload["object_attributes"] |= {"ref": "main", "tag": False} | pipeline
    payload["project"]["id"], payload["merge_request"] = 101, request_
    sent = read(SAMPLES / "gitlab/pipeline_running", "headers")
    (seen,) = parse("gitlab", sent, json.dumps(payload).encode()).observations
    assert (seen.trigger, seen.branch, seen.head_repository, seen.is_fork) == head


PAGE = "https://ci.example.com/gitlab/grp/sub/app"


@pytest.mark.parametrize(
    "job",
    [
        {"project": {"path_with_namespace": "grp/sub/app", "web_url": PAGE}},
        {"repository": {"homepage": PAGE, "git_ssh_url": "git@ci.example.com:grp/sub/app.git"}},
        {"repository": {"homepage": PAGE, "url": "git@ci.example.com:grp/sub/app.git"}},
        {"repository": {"homepage": PAGE, "url": "ssh://git@ci.example.com:2222/grp/sub/app.git"}},
        {"repository": {"homepage": PAGE, "url": f"{PAGE}.git"}, "project_name": "Grp / Sub / App"},
        {"repository": {"homepage": "https://ci.example.com/grp/sub/app"}},
    ],
)
def test_gitlab_projects_path_is_the_same_in_every_hook(job):
    """Older servers tell it in several other words, and may live under a path of their own."""
    payload = json.loads(body_of(SAMPLES / "gitlab/job_running"))
    payload = {name: value for name, value in payload.items() if name not in ("project", "repository")}
    sent = read(SAMPLES / "gitlab/job_running", "headers")
    (seen,) = parse("gitlab", sent, json.dumps(payload | job).encode()).observations
    assert seen.repository == "grp/sub/app"


def test_jenkins_signature_is_never_replaced_by_the_token():
    case = SAMPLES / "jenkins" / "started_signed"
    secrets = tuple(read(case, "expected")["secrets"])
    with pytest.raises(BadSignature):
        platforms.find()["jenkins"].verify(
            {"x-hub-signature-256": "sha256=" + "0" * 64, "x-build-token": secrets[1]},
            body_of(case),
            secrets,
            0.0,
        )
