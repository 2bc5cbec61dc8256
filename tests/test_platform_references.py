"""The payloads that platforms publish are read, where they are present."""

from pathlib import Path

from tests.cases import assert_sound, parse, source_of
from webhook_app import platforms, signing
from webhook_app.platforms import (
    Answer,
    PollTarget,
    Unreadable,
)

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "payloads"

_RUN = "github:octo-org:octo-repo:289782451"
_REFERENCES: dict[str, tuple[str, str | None] | str] = {
    "github/workflow_run.requested": (_RUN, "queued"),
    "github/workflow_run.completed.success": (_RUN, "completed"),
    "github/workflow_run.completed-action-but-status-queued": (
        "github:Codertocat:Hello-World:1589141559",
        "queued",
    ),
    "github/derived.workflow_run.in_progress": (_RUN, "in_progress"),
    "github/derived.workflow_run.requested.attempt2": (_RUN, "queued"),
    "github/derived.workflow_run.completed.failure": (_RUN, "failed"),
    "github/derived.workflow_run.completed.cancelled": (_RUN, "cancelled"),
    "github/workflow_job.queued": ("github:Codertocat:Hello-World:2202229078", None),
    "github/workflow_job.waiting": ("github:lineville:elastic-machines-testing:4747967848", None),
    "github/workflow_job.in_progress": ("github:Codertocat:Hello-World:2202229078", "in_progress"),
    "github/workflow_job.in_progress.no-workflow-name": ("github:octo-org:example-workflow:940463255", None),
    "github/workflow_job.completed.failure": ("github:Codertocat:Hello-World:2202229078", None),
    "github/check_run.completed.failure": ("", None),
    "github/check_run.completed.success": ("", None),
    "github/check_run.created.queued": ("", None),
    "github/check_run.completed.form-encoded": ("", None),
    "github/ping.repository": "pong",
    "github/ping.no-repository": "pong",
    "github/check_suite.completed.success": "ignored",
    "github/deployment_status.created.with-workflow_run": "ignored",
    "github/repository_dispatch.on-demand-test": "ignored",
    "github/workflow_dispatch.sample": "ignored",
    "gitlab/pipeline_hook.success": ("gitlab:1:31", "completed"),
    "gitlab/derived.pipeline_hook.running": ("gitlab:1:31", "in_progress"),
    "gitlab/derived.pipeline_hook.manual": ("gitlab:1:31", "in_progress"),
    "gitlab/derived.pipeline_hook.canceled": ("gitlab:1:31", "cancelled"),
    "gitlab/derived.pipeline_hook.retried-running-again": ("gitlab:1:31", "in_progress"),
    "gitlab/job_hook.created": ("gitlab:380:2366", None),
    "gitlab/job_hook.created.older": ("gitlab:380:2366", None),
    "gitlab/job_hook.success.retried": ("gitlab:31537070:743121198", None),
    "jenkins/derived.notification.queued": ("jenkins:platform:web:42", "queued"),
    "jenkins/derived.notification.started": ("jenkins:platform:web:42", "in_progress"),
    "jenkins/derived.notification.completed.failure": ("jenkins:platform:web:42", "failed"),
    "jenkins/derived.notification.finalized.failure": ("jenkins:platform:web:42", "failed"),
    "jenkins/notification.finalized.success": ("jenkins:Synapse:8", "completed"),
    "jenkins/generic_event.run_started": "unreadable",
}
_REFERENCE_POLLS = {
    "github/rest.run": ("github:octocat:Hello-World:30433642", "github:30433642", "queued"),
    "gitlab/rest.pipeline": ("gitlab:21:287", "gitlab:21:287", "completed"),
    "gitlab/rest.pipeline_retry": ("gitlab:1:46", "gitlab:1:46", "queued"),
    "jenkins/derived.build_api.finished": ("jenkins:platform:web:42", "jenkins:platform:web:42", "failed"),
    "jenkins/derived.build_api.running": (
        "jenkins:platform:web:42",
        "jenkins:platform:web:42",
        "in_progress",
    ),
    "jenkins/derived.build_api.unstable-but-still-building": (
        "jenkins:platform:web:43",
        "jenkins:platform:web:43",
        "in_progress",
    ),
}


def _present(name: str) -> Path | None:
    candidates = (REFERENCE / f"{name}.{ending}" for ending in ("json", "txt"))
    return next((path for path in candidates if path.exists()), None)


def test_reference_webhooks():
    """Where the reference payloads are present, each is read as the table says."""
    for name, expected in _REFERENCES.items():
        if path := _present(name):
            assert _said_of(name, path) == expected, name


def _said_of(name, path):
    platform, file = name.split("/")
    media_type = "x-www-form-urlencoded" if path.suffix == ".txt" else "json"
    event = file.removeprefix("derived.").split(".")[0]
    headers = {"x-github-event": event, "content-type": f"application/{media_type}"}
    try:
        said = parse(platform, headers, path.read_bytes())
    except Unreadable:
        return "unreadable"
    if not said.observations:
        return "pong" if said.pong else "ignored" if said.ignored else ""
    (seen,) = said.observations
    assert_sound(seen)
    return seen.build_id, seen.state


def test_reference_polls():
    for name, (build_id, key, state) in _REFERENCE_POLLS.items():
        if path := _present(name):
            platform = platforms.find()[name.partition("/")[0]]
            target = PollTarget(build_id, key, "acme/web", 42, 1, None)
            seen = platform.parse_poll(source_of(platform.NAME), target, Answer(200, {}, path.read_bytes()))
            assert (seen.build_id, seen.key, seen.state) == (build_id, key, state), name
            assert_sound(seen)


def test_reference_form_has_the_published_signature():
    path = _present("github/check_run.completed.form-encoded")
    if path is not None:
        published = "sha256=6774da62ab1cb4280aaf1ae9efd451c0881ecb3fd16b20919f2e7e0bcb305dc2"
        assert signing.github_signature("It's a Secret to Everybody", path.read_bytes()) == published
