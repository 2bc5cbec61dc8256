"""What a simulated build is at a moment, and what that means in BuildRelay's words.  Pure.

Times are POSIX seconds (UTC) as float; the body builders turn them into each platform's form.
A build is a list of `Moment`s, each a whole snapshot, so that a REST read and a webhook of the
same moment can never disagree.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

TERMINAL = frozenset({"completed", "failed", "cancelled", "timeout"})
"""The states that are ends."""


def seeded(*parts: object) -> Random:
    """Chance that is the same for the same parts, on every machine and Python."""
    return Random(":".join(map(str, parts)))  # noqa: S311 - a simulation, no secret


class Truth(NamedTuple):
    """What BuildRelay ought to say: `state`, `conclusion` (or None) and `attempt`."""

    state: str
    conclusion: str | None
    attempt: int

    @property
    def terminal(self) -> bool:
        """Is the build over?"""
        return self.state in TERMINAL


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a GitHub job; numbers have gaps, as GitHub's do."""

    number: int
    name: str
    status: str
    conclusion: str | None = None
    started_at: float | None = None
    completed_at: float | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A GitHub job, a GitLab job or a Jenkins stage; `status` and `conclusion` in the platform's words."""

    id: int
    name: str
    stage: str
    status: str
    created_at: float
    conclusion: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    steps: tuple[Step, ...] = ()
    manual: bool = False
    allow_failure: bool = False
    failure_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """A webhook that the platform sends at a moment; `job_id` for events about one job."""

    name: str
    action: str
    job_id: int | None = None


@dataclass(frozen=True, slots=True)
class Moment:
    """The whole state of a build from `at` on, until its next moment.

    `started`: a job has begun (in this attempt on GitHub, ever on GitLab).  `retired`: GitLab jobs
    that were retried.  `events`: what is pushed when the moment comes.
    """

    at: float
    attempt: int
    attempt_started_at: float
    status: str
    conclusion: str | None
    started: bool
    jobs: tuple[Job, ...]
    retired: tuple[Job, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Repository:
    """A GitHub repository, a GitLab project or a Jenkins job (`owner` is then its folder)."""

    platform: str
    id: int
    owner: str
    name: str

    @property
    def full_name(self) -> str:
        """`owner/name`."""
        return f"{self.owner}/{self.name}"


@dataclass(frozen=True, slots=True)
class Build:
    """One simulated build with its whole script.

    `run_id`: run, pipeline or (Jenkins) queue id.  `number`: run number, iid, build number.
    `kind` is the name of the script in `scripts`.
    """

    build_id: str
    kind: str
    repository: Repository
    run_id: int
    number: int
    workflow: str
    branch: str
    commit: str
    title: str
    moments: tuple[Moment, ...]

    @property
    def platform(self) -> str:
        """`github`, `gitlab` or `jenkins`."""
        return self.repository.platform

    @property
    def begins_at(self) -> float:
        """When the platform first shows it."""
        return self.moments[0].at

    @property
    def ends_at(self) -> float:
        """When its script is over."""
        return self.moments[-1].at

    def index_at(self, now: float) -> int:
        """Index of the moment that holds at `now`; -1 before the build begins."""
        return bisect_right(self.moments, now, key=lambda moment: moment.at) - 1

    def moment_at(self, now: float) -> Moment | None:
        """The moment that holds at `now`; None before the build begins."""
        index = self.index_at(now)
        return self.moments[index] if index >= 0 else None


def truth_of(platform: str, moment: Moment) -> Truth:
    """The state, conclusion and attempt that BuildRelay ought to show for this moment."""
    reader = {"github": _github, "gitlab": _gitlab, "jenkins": _jenkins}[platform]
    state, conclusion = reader(moment)
    return Truth(state, conclusion, moment.attempt)


_GITHUB_ENDS: Mapping[str | None, tuple[str, str]] = {
    "success": ("completed", "success"),
    "neutral": ("completed", "neutral"),
    "skipped": ("completed", "skipped"),
    "failure": ("failed", "failure"),
    "startup_failure": ("failed", "failure"),
    "timed_out": ("timeout", "timed_out"),
    "stale": ("timeout", "stale"),
    "cancelled": ("cancelled", "cancelled"),
}


def _github(moment: Moment) -> tuple[str, str | None]:
    if moment.status == "completed":
        if moment.conclusion == "action_required":  # waits for an approval: no end
            return "queued", "action_required"
        return _GITHUB_ENDS[moment.conclusion]
    return _open(moment.started or moment.status == "in_progress")


def _open(in_progress: bool) -> tuple[str, None]:
    return ("in_progress" if in_progress else "queued"), None


_GITLAB_ENDS: Mapping[str, tuple[str, str]] = {
    "success": ("completed", "success"),
    "skipped": ("completed", "skipped"),
    "canceled": ("cancelled", "cancelled"),
}
_RAN_TOO_LONG = ("job_execution_timeout", "stuck_or_timeout_failure")


def _gitlab(moment: Moment) -> tuple[str, str | None]:
    if moment.status == "failed":
        failed = [job for job in moment.jobs if job.status == "failed" and not job.allow_failure]
        if failed and all(job.failure_reason in _RAN_TOO_LONG for job in failed):
            return "timeout", "timed_out"
        return "failed", "failure"
    if moment.status in _GITLAB_ENDS:
        return _GITLAB_ENDS[moment.status]
    return _open(moment.started or moment.status in ("running", "canceling"))


_JENKINS_ENDS: Mapping[str | None, tuple[str, str]] = {
    "SUCCESS": ("completed", "success"),
    "UNSTABLE": ("failed", "failure"),
    "FAILURE": ("failed", "failure"),
    "NOT_BUILT": ("completed", "skipped"),
    "ABORTED": ("cancelled", "cancelled"),
}


def _jenkins(moment: Moment) -> tuple[str, str | None]:
    """While it is building, a result that is already set says nothing."""
    return _open(True) if moment.status == "building" else _JENKINS_ENDS[moment.conclusion]
