"""The simulated world runs builds as the platforms would, and its bodies look like theirs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.asking import world_of
from tests.simulation import GITHUB, GITLAB, JENKINS, SECRETS, end_of
from webhook_app.simulated.facts import Build, Job, Moment, Truth, truth_of
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.gitlab import GitLabServer
from webhook_app.simulated.jenkins import JenkinsServer
from webhook_app.simulated.scripts import KINDS, RERUN_GAP_SECONDS
from webhook_app.simulated.sender import encode, plan_pushes
from webhook_app.simulated.world import StepClock, World

REFERENCE_PAYLOADS = Path(__file__).parents[2] / "shared" / "reference" / "payloads"


@pytest.fixture
def clock() -> StepClock:
    return StepClock(1_795_000_000.25)


@pytest.fixture
def http() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


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
