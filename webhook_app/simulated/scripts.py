"""How a build of each kind goes, moment by moment.  Pure: all chance comes from the script's own `Random`.

`write(platform, kind, …)` returns the moments of one build; `KINDS` holds the kinds with their weights.
Durations are written as a person would see them and divided by the script's speed, except the gap
before a GitLab re-run: GitLab numbers no attempts, so its clock has to move by more than the
whole second that its webhooks can tell apart.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from random import Random
from typing import Any

from webhook_app.simulated.facts import Event, Job, Moment, Step

RERUN_GAP_SECONDS = 2.5
"""Least time between the end of a build and its re-run, whatever the speed."""


class Script:
    """Writes the moments of one build, in the order of time."""

    def __init__(self, rng: Random, at: float, speed: float, first_job_id: int) -> None:
        self.rng = rng
        self.at = at
        self.speed = speed
        self.attempt = 1
        self.attempt_started_at = at
        self.status = ""
        self.started = False
        self.jobs: list[Job] = []
        self.retired: list[Job] = []
        self.moments: list[Moment] = []
        self._next_job_id = first_job_id

    def wait(self, low: float, high: float) -> None:
        """Let between `low` and `high` seconds pass, divided by the speed."""
        self.at += self.rng.uniform(low, high) / self.speed

    def note(self, status: str, conclusion: str | None = None, events: Iterable[Event] = ()) -> None:
        """The build now looks like this, and these webhooks say so; no two moments share a millisecond."""
        self.status = status
        if self.moments:
            self.at = max(self.at, self.moments[-1].at + 0.002)
        self.moments.append(
            Moment(
                self.at, self.attempt, self.attempt_started_at, status, conclusion, self.started,
                tuple(self.jobs), tuple(self.retired), tuple(events),
            )
        )  # fmt: skip

    def add_job(self, name: str, stage: str, status: str, **facts: Any) -> int:
        """A new job with the next id; returns its index."""
        self.jobs.append(Job(self._next_job_id, name, stage, status, self.at, **facts))
        self._next_job_id += 1
        return len(self.jobs) - 1

    def change(self, index: int, **facts: Any) -> Job:
        """Change facts of a job; returns it."""
        self.jobs[index] = replace(self.jobs[index], **facts)
        return self.jobs[index]

    def rerun(self) -> None:
        """A person looks at the end and starts the next attempt."""
        begun = self.at
        self.wait(3, 15)
        self.at = max(self.at, begun + RERUN_GAP_SECONDS)
        self.attempt += 1
        self.attempt_started_at = self.at


# GitHub ------------------------------------------------------------------------------------------

_STEPS = (
    (1, "Set up job"),
    (2, "Run actions/checkout@v5"),
    (3, "Install dependencies"),
    (4, "Build"),
    (5, "Run tests"),
    (9, "Post Run actions/checkout@v5"),
    (10, "Complete job"),
)


def _run_event(action: str) -> Event:
    return Event("workflow_run", action)


def _job_event(action: str, job: Job) -> Event:
    return Event("workflow_job", action, job.id)


def _github_queue_job(script: Script, name: str, status: str = "queued") -> int:
    index = script.add_job(name, "", status)
    script.note(script.status or "queued", None, [_job_event(status, script.jobs[index])])
    return index


def _github_start_job(script: Script, index: int) -> None:
    steps = tuple(Step(number, name, "queued") for number, name in _STEPS)
    job = script.change(
        index, status="in_progress", started_at=script.at, steps=_begin_step(steps, 0, script.at)
    )
    events = [_job_event("in_progress", job)]
    if not script.started:
        events.insert(0, _run_event("in_progress"))
    script.started = True
    script.note("in_progress", None, events)


def _begin_step(steps: tuple[Step, ...], index: int, at: float) -> tuple[Step, ...]:
    begun = replace(steps[index], status="in_progress", started_at=at)
    return (*steps[:index], begun, *steps[index + 1 :])


def _end_step(steps: tuple[Step, ...], index: int, at: float, conclusion: str) -> tuple[Step, ...]:
    ended = replace(steps[index], status="completed", conclusion=conclusion, completed_at=at)
    return (*steps[:index], ended, *steps[index + 1 :])


def _github_steps(script: Script, index: int, end: str) -> None:
    """Step after step; no webhook tells of them, only REST shows them."""
    bad = end in ("failure", "cancelled", "timed_out")
    last = script.rng.randint(2, 4) if bad else len(_STEPS) - 1
    for position in range(last + 1):
        script.wait(0.5, 3)
        conclusion = (
            ("failure" if end == "failure" else "cancelled") if bad and position == last else "success"
        )
        steps = _end_step(script.jobs[index].steps, position, script.at, conclusion)
        if position < last:
            steps = _begin_step(steps, position + 1, script.at)
            script.change(index, steps=steps)
            script.note("in_progress")
    for position in range(last + 1, len(_STEPS)):
        steps = _end_step(_begin_step(steps, position, script.at), position, script.at, "skipped")
    script.change(index, steps=steps)


def _github_job(script: Script, name: str, end: str) -> None:
    index = _github_queue_job(script, name)
    script.wait(0.5, 4)
    _github_start_job(script, index)
    _github_finish_job(script, index, end)


def _github_finish_job(script: Script, index: int, end: str) -> None:
    _github_steps(script, index, end)
    conclusion = "success" if end == "neutral" else end
    job = script.change(index, status="completed", conclusion=conclusion, finished_at=script.at)
    script.note("in_progress", None, [_job_event("completed", job)])


def _github_end(script: Script, end: str) -> None:
    script.wait(0.2, 1)
    script.note("completed", end, [_run_event("completed")])


def _github_request(script: Script) -> None:
    script.note("queued", None, [_run_event("requested")])
    script.wait(0.1, 1)


def _github_jobs(script: Script, end: str, names: Iterable[str] = ("build", "test")) -> None:
    names = tuple(names)
    for name in names:
        _github_job(script, name, end if name == names[-1] else "success")
    _github_end(script, end)


def _github_plain(end: str) -> Callable[[Script], None]:
    def write_it(script: Script) -> None:
        _github_request(script)
        _github_jobs(script, end)

    return write_it


def _github_skipped(script: Script) -> None:
    _github_request(script)
    index = script.add_job(
        "build", "", "completed", conclusion="skipped", started_at=script.at, finished_at=script.at
    )
    script.note("queued", None, [_job_event("completed", script.jobs[index])])
    _github_end(script, "skipped")


def _github_never_ran(end: str) -> Callable[[Script], None]:
    """Cancelled or given up while still in the queue."""

    def write_it(script: Script) -> None:
        _github_request(script)
        index = _github_queue_job(script, "build")
        script.wait(3, 8)
        job = script.change(
            index, status="completed", conclusion="cancelled", started_at=script.at, finished_at=script.at
        )
        script.note("completed", end, [_job_event("completed", job), _run_event("completed")])

    return write_it


def _github_unapproved(script: Script) -> None:
    """A run of a fork: `requested` says completed, action_required; nobody has approved it."""
    script.note("completed", "action_required", [_run_event("requested")])


def _github_approved(script: Script) -> None:
    _github_unapproved(script)
    script.wait(4, 12)
    script.note("queued")
    _github_jobs(script, "success")


def _github_gate(script: Script) -> None:
    """A deployment that waits for a person between two jobs."""
    _github_request(script)
    _github_job(script, "build", "success")
    index = script.add_job("deploy", "", "waiting")
    script.note("waiting", None, [_job_event("waiting", script.jobs[index])])
    script.wait(4, 10)
    job = script.change(index, status="queued")
    script.note("in_progress", None, [_job_event("queued", job)])
    script.wait(0.5, 2)
    _github_start_job(script, index)
    _github_finish_job(script, index, "success")
    _github_end(script, "success")


def _github_rerun(*ends: str) -> Callable[[Script], None]:
    """Re-runs of the failed jobs: the finished ones show up again, under new ids."""

    def write_it(script: Script) -> None:
        _github_request(script)
        _github_jobs(script, ends[0])
        for end in ends[1:]:
            _github_next_attempt(script)
            _github_jobs(script, end, ("test",))

    return write_it


def _github_next_attempt(script: Script) -> None:
    script.rerun()
    script.started = False
    done, script.jobs = script.jobs[0], []
    index = script.add_job(
        done.name, "", "completed", conclusion="success", started_at=done.started_at,
        finished_at=done.finished_at, steps=done.steps,
    )  # fmt: skip
    requested = [_run_event("requested")] if script.rng.random() < 0.5 else []
    script.note("queued", None, [*requested, _job_event("completed", script.jobs[index])])
    script.wait(0.1, 1)


def _github_startup_failure(script: Script) -> None:
    """A workflow file that can't be read: no job, and no webhook at all."""
    script.note("completed", "startup_failure")


# GitLab ------------------------------------------------------------------------------------------

_GITLAB_JOBS = (("compile", "build"), ("unit", "test"), ("staging", "deploy"))


def _gitlab_note(script: Script, status: str, *jobs: Job) -> None:
    """A Job Hook for each changed job, and a Pipeline Hook if the pipeline's status changed."""
    events = [Event("Job Hook", job.status, job.id) for job in jobs]
    if status != script.status:
        events.append(Event("Pipeline Hook", status))
    script.note(status, None, events)


def _gitlab_create(script: Script) -> None:
    for name, stage in _GITLAB_JOBS:
        script.add_job(name, stage, "created")
    script.note("created")
    script.wait(0.2, 1)


def _gitlab_job(script: Script, index: int, end: str = "success", reason: str | None = None) -> None:
    status = "running" if script.status == "running" else "pending"
    _gitlab_note(script, status, script.change(index, status="pending"))
    script.wait(0.5, 4)
    script.started = True
    _gitlab_note(script, "running", script.change(index, status="running", started_at=script.at))
    script.wait(3, 10)
    if end == "canceled":
        _gitlab_note(script, "canceling")
        script.wait(0.2, 1)
    job = script.change(index, status=end, finished_at=script.at, failure_reason=reason)
    _gitlab_note(script, script.status, job)


def _gitlab_end(script: Script, status: str) -> None:
    script.wait(0.1, 0.6)
    for index, job in enumerate(script.jobs):
        if job.status == "created":
            script.change(index, status="canceled" if status == "canceled" else "skipped")
    _gitlab_note(script, status)


def _gitlab_broken(job_end: str, end: str, reason: str | None) -> Callable[[Script], None]:
    """The second job goes wrong, the third never runs."""

    def write_it(script: Script) -> None:
        _gitlab_create(script)
        _gitlab_job(script, 0)
        _gitlab_job(script, 1, job_end, reason)
        _gitlab_end(script, end)

    return write_it


def _gitlab_rest_succeeds(script: Script, first: int) -> None:
    for index in range(first, len(script.jobs)):
        _gitlab_job(script, index)
    _gitlab_end(script, "success")


def _gitlab_success(script: Script) -> None:
    _gitlab_create(script)
    _gitlab_rest_succeeds(script, 0)


def _gitlab_warnings(script: Script) -> None:
    """A job that may fail does: the pipeline passes with warnings."""
    _gitlab_create(script)
    script.change(1, allow_failure=True)
    _gitlab_job(script, 0)
    _gitlab_job(script, 1, "failed", "script_failure")
    _gitlab_rest_succeeds(script, 2)


def _gitlab_mixed(script: Script) -> None:
    """One job ran too long, another one failed by itself: a failure, no time-out."""
    _gitlab_create(script)
    script.add_job("lint", "test", "created")
    _gitlab_job(script, 0)
    _gitlab_job(script, 1, "failed", "job_execution_timeout")
    _gitlab_job(script, 3, "failed", "script_failure")
    _gitlab_end(script, "failed")


def _gitlab_canceled_pending(script: Script) -> None:
    _gitlab_create(script)
    _gitlab_note(script, "pending", script.change(0, status="pending"))
    script.wait(2, 6)
    script.change(0, status="canceled", finished_at=script.at)
    _gitlab_end(script, "canceled")


def _gitlab_skipped(script: Script) -> None:
    _gitlab_create(script)
    _gitlab_end(script, "skipped")


def _gitlab_bad_yaml(script: Script) -> None:
    _gitlab_note(script, "failed")


def _gitlab_manual_forever(script: Script) -> None:
    _gitlab_create(script)
    script.change(2, manual=True)
    _gitlab_job(script, 0)
    _gitlab_job(script, 1)
    script.wait(0.1, 0.6)
    _gitlab_note(script, "manual", script.change(2, status="manual"))


def _gitlab_manual(script: Script) -> None:
    """A blocking manual job: it waits, is played (its id stays) and succeeds, all in one attempt."""
    _gitlab_manual_forever(script)
    script.wait(5, 15)
    _gitlab_rest_succeeds(script, 2)


def _gitlab_optional_manual(script: Script) -> None:
    """A manual job that blocks nothing is played after the end: the pipeline runs again."""
    _gitlab_create(script)
    _gitlab_job(script, 0)
    _gitlab_job(script, 1)
    script.change(2, status="manual", manual=True, allow_failure=True)
    _gitlab_end(script, "success")
    script.rerun()
    _gitlab_rest_succeeds(script, 2)


def _gitlab_delayed(script: Script) -> None:
    """A job with a start delay: the pipeline is `scheduled` meanwhile."""
    _gitlab_create(script)
    _gitlab_job(script, 0)
    script.wait(0.1, 0.6)
    _gitlab_note(script, "scheduled", script.change(1, status="scheduled"))
    script.wait(4, 10)
    _gitlab_rest_succeeds(script, 1)


def _gitlab_retry(end: str, reason: str | None) -> Callable[[Script], None]:
    """Retry after a failure: same pipeline, a new id for the failed job, the old one is hidden."""

    def write_it(script: Script) -> None:
        _gitlab_broken("failed", "failed", "script_failure")(script)
        script.rerun()
        script.retired.append(script.jobs[1])
        new = script.add_job("unit", "test", "created")
        script.jobs[1] = script.jobs.pop(new)
        script.change(2, status="created")
        if end == "success":
            _gitlab_rest_succeeds(script, 1)
        else:
            _gitlab_job(script, 1, "failed", reason)
            _gitlab_end(script, end)

    return write_it


# Jenkins -----------------------------------------------------------------------------------------


def _phase(name: str) -> Event:
    return Event("notification", name)


def _jenkins_build(result: str, early: str | None = None) -> Callable[[Script], None]:
    """Stage after stage; `early` is a result that is set while the build still runs."""

    def write_it(script: Script) -> None:
        script.started = True
        script.note("building", None, [_phase("QUEUED"), _phase("STARTED")])
        stages = ("Checkout",) if result == "NOT_BUILT" else ("Checkout", "Build", "Test")
        for name in stages:
            _jenkins_stage(script, name, result if name == stages[-1] else "SUCCESS", early)
        script.wait(0.2, 1)
        script.note("completed", result, [_phase("COMPLETED")])
        script.wait(0.2, 1)
        script.note("finalized", result, [_phase("FINALIZED")])

    return write_it


def _jenkins_stage(script: Script, name: str, result: str, early: str | None) -> None:
    words = {"FAILURE": "FAILED", "NOT_BUILT": "NOT_EXECUTED"}
    index = script.add_job(name, name, "IN_PROGRESS", started_at=script.at)
    script.note("building", early if name == "Test" else None)
    script.wait(3, 10)
    script.change(index, status=words.get(result, result), finished_at=script.at)
    script.note("building", early if name == "Test" else None)


# All kinds ---------------------------------------------------------------------------------------

_WRITERS: Mapping[str, Mapping[str, Callable[[Script], None]]] = {
    "github": {
        "success": _github_plain("success"),
        "failure": _github_plain("failure"),
        "cancelled": _github_plain("cancelled"),
        "timed_out": _github_plain("timed_out"),
        "neutral": _github_plain("neutral"),
        "skipped": _github_skipped,
        "cancelled_queued": _github_never_ran("cancelled"),
        "stale": _github_never_ran("stale"),
        "approved": _github_approved,
        "unapproved": _github_unapproved,
        "gate": _github_gate,
        "rerun": _github_rerun("failure", "success"),
        "rerun_twice": _github_rerun("failure", "failure", "success"),
        "startup_failure": _github_startup_failure,
    },
    "gitlab": {
        "success": _gitlab_success,
        "warnings": _gitlab_warnings,
        "failure": _gitlab_broken("failed", "failed", "script_failure"),
        "timeout": _gitlab_broken("failed", "failed", "job_execution_timeout"),
        "mixed": _gitlab_mixed,
        "canceled": _gitlab_broken("canceled", "canceled", None),
        "canceled_pending": _gitlab_canceled_pending,
        "skipped": _gitlab_skipped,
        "bad_yaml": _gitlab_bad_yaml,
        "manual": _gitlab_manual,
        "manual_forever": _gitlab_manual_forever,
        "optional_manual": _gitlab_optional_manual,
        "delayed": _gitlab_delayed,
        "retry": _gitlab_retry("success", None),
        "retry_timeout": _gitlab_retry("failed", "stuck_or_timeout_failure"),
    },
    "jenkins": {
        "success": _jenkins_build("SUCCESS"),
        "unstable": _jenkins_build("UNSTABLE"),
        "unstable_early": _jenkins_build("UNSTABLE", early="UNSTABLE"),
        "failure": _jenkins_build("FAILURE", early="FAILURE"),
        "aborted": _jenkins_build("ABORTED"),
        "not_built": _jenkins_build("NOT_BUILT"),
    },
}

KINDS: Mapping[str, Mapping[str, int]] = {
    "github": {
        "success": 44, "failure": 12, "cancelled": 6, "timed_out": 3, "neutral": 2, "skipped": 4,
        "cancelled_queued": 3, "stale": 1, "approved": 5, "unapproved": 1, "gate": 5, "rerun": 8,
        "rerun_twice": 3, "startup_failure": 3,
    },
    "gitlab": {
        "success": 42, "warnings": 6, "failure": 10, "timeout": 4, "mixed": 2, "canceled": 6,
        "canceled_pending": 2, "skipped": 3, "bad_yaml": 2, "manual": 7, "manual_forever": 1,
        "optional_manual": 3, "delayed": 2, "retry": 7, "retry_timeout": 3,
    },
    "jenkins": {
        "success": 60, "unstable": 10, "unstable_early": 5, "failure": 15, "aborted": 6, "not_built": 4,
    },
}  # fmt: skip
"""The kinds of each platform, with weights that make a realistic mix."""


def write(
    platform: str, kind: str, rng: Random, at: float, speed: float, first_job_id: int
) -> tuple[Moment, ...]:
    """The moments of one build of this kind that begins at `at` (POSIX seconds).

    `speed` divides durations.  Raises `KeyError` for a platform or kind that isn't in `KINDS`.
    """
    script = Script(rng, at, speed, first_job_id)
    _WRITERS[platform][kind](script)
    return tuple(script.moments)


# For benchmarks ----------------------------------------------------------------------------------

_NO_CHANCE = Random(0)  # noqa: S311 - never asked
_STEADY: Mapping[str, tuple[str, str, tuple[str, str | None], tuple[str, str | None]]] = {
    "github": ("queued", "in_progress", ("completed", "success"), ("completed", "failure")),
    "gitlab": ("pending", "running", ("success", None), ("failed", None)),
    "jenkins": ("building", "building", ("finalized", "SUCCESS"), ("finalized", "FAILURE")),
}
"""By platform: the words for waiting, running, a good and a bad end."""
_STAGES = {"building": "IN_PROGRESS", "SUCCESS": "SUCCESS", "FAILURE": "FAILED"}
"""A Jenkins stage has words of its own."""


def write_steady(
    platform: str, at: float, seconds: float, changes: int, good: bool, job_id: int
) -> tuple[Moment, ...]:
    """A build with one job that changes `changes` times (≥ 3): it waits a little, runs, and ends.

    Cheap, since benchmarks want it ten thousand times; a change while it runs is one more finished step.
    """
    waiting, running, *ends = _STEADY[platform]
    status, conclusion = ends[0] if good else ends[1]
    script = Script(_NO_CHANCE, at, 1.0, job_id)
    script.add_job("build", "build", _STAGES.get(waiting, waiting))
    script.note(waiting, None, _steady_events(platform, "begin", waiting))
    for step in range(changes - 2):
        script.at = at + seconds * (0.02 + 0.98 * step / (changes - 2))
        script.started = True
        began = script.moments[1].at if step else script.at
        steps = _steady_steps(step, changes - 2, began)
        script.change(0, status=_STAGES.get(running, running), started_at=began, steps=steps)
        script.note(running, None, _steady_events(platform, "run" if step == 0 else "", running))
    script.at = at + seconds
    ended = _STAGES.get(str(conclusion), status)
    script.change(0, status=ended, conclusion=conclusion, finished_at=script.at)
    script.note(status, conclusion, _steady_events(platform, "end", status))
    return tuple(script.moments)


def _steady_steps(done: int, steps: int, at: float) -> tuple[Step, ...]:
    finished = [Step(n + 1, f"Step {n + 1}", "completed", "success", at, at) for n in range(done)]
    return (*finished, *(Step(n + 1, f"Step {n + 1}", "queued") for n in range(done, steps)))


def _steady_events(platform: str, when: str, status: str) -> list[Event]:
    if not when or platform == "jenkins":
        return [_phase(name) for name in {"begin": ("STARTED",), "end": ("FINALIZED",)}.get(when, ())]
    if platform == "gitlab":
        return [Event("Pipeline Hook", status)]
    return [_run_event({"begin": "requested", "run": "in_progress", "end": "completed"}[when])]
