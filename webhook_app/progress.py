"""Percent done, what it rests on, and how long it will still take.  Pure.

`basis` in spec words: `steps` (GitHub steps of jobs), `jobs` (jobs over / jobs known), `history`
(time passed / what earlier runs took), `report` (told by the build script or Jenkins), `none`.

A build's `progress` is what was told; events and lists carry it.  The status adds an estimate from
history where that is more.  Neither ever falls within an attempt: what the attempt is expected to take
is kept in its `report` from the first look on, and so is the estimate when something happens to it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from webhook_app.lifecycle import Detail, JobStatus, State

PLANNED, EXECUTED, PREPARED = 10, 70, 80
"""Progress API: 0-10 planning, 10-70 tasks, 70-80 deployment preparation, 80-100 deployment."""

EVENT_STEP = 5
"""A `build.progress` event tells each fifth percent that is reached: at most 19 in an attempt."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Percent 0-100 and its basis."""

    percent: int
    basis: str


@dataclass(frozen=True, slots=True)
class Expectation:
    """How long earlier runs took: seconds, ascending, at least one."""

    seconds: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Expectation":
        """From durations in any order."""
        return cls(tuple(sorted(seconds)))

    @property
    def count(self) -> int:
        """How many runs it rests on."""
        return len(self.seconds)

    @property
    def median(self) -> float:
        """Half of them took longer."""
        return self.quantile(0.5)

    def quantile(self, q: float) -> float:
        """The seconds within which a share `q` (0 to 1) of the runs were over; between two, in proportion."""
        at = q * (self.count - 1)
        low = int(at)
        high = min(low + 1, self.count - 1)
        return self.seconds[low] + (at - low) * (self.seconds[high] - self.seconds[low])

    def remaining(self, elapsed: float) -> float | None:
        """Seconds to go for a run that has taken `elapsed`: the median of those that took longer.

        None when none ever did: then nobody knows.
        """
        longer = [seconds for seconds in self.seconds if seconds > elapsed]
        return Expectation(tuple(longer)).median - elapsed if longer else None


def is_worth_telling(before: int, after: int) -> bool:
    """Is a rise from `before` to `after` percent worth a `build.progress` event?"""
    return after // EVENT_STEP > before // EVENT_STEP


def of_jobs(jobs: Mapping[str, Mapping[str, Any]], complete: bool) -> Progress | None:
    """From the jobs of an attempt, as stored (`status`, `steps_done`, `steps_total`); None without jobs.

    Not `complete`: more jobs may follow, so one more is reckoned with; else the end of the first job
    would show 99 for the rest of the build.  99 at most: only the end of the build is 100.
    """
    if not jobs:
        return None
    done = sum(_share_done(job) for job in jobs.values())
    reckoned = len(jobs) if complete else len(jobs) + 1
    basis = "steps" if any(job["steps_total"] for job in jobs.values()) else "jobs"
    return Progress(min(int(100 * done / reckoned), 99), basis)


def _share_done(job: Mapping[str, Any]) -> float:
    if job["status"] == JobStatus.COMPLETED:
        return 1.0
    return min(job["steps_done"] / job["steps_total"], 1.0) if job["steps_total"] else 0.0


def of_report(report: Mapping[str, Any], detail: Detail) -> tuple[dict[str, Any], Progress]:
    """Fold a script event into `report` (`phase`, `tasks_total`, `tasks_done`); new report and percent."""
    known = {"phase": "executing", "tasks_total": 0, "tasks_done": 0, **report}
    fold = _FOLDS.get(detail.type)
    if fold is not None:
        fold(known, detail.data)
    return known, Progress(_percent(known), "report")


def _planning(report: dict[str, Any], _data: Mapping[str, Any]) -> None:
    if not (report["tasks_done"] or report.get("planned")):
        _enter(report, "planning")


def _enter(report: dict[str, Any], phase: str) -> None:
    """A late word of an earlier phase does not bring that phase back."""
    if report["phase"] != "deploying":
        report["phase"] = phase


def _planned(report: dict[str, Any], data: Mapping[str, Any]) -> None:
    _enter(report, "executing")
    report["planned"] = True
    tasks = data.get("tasks", data.get("taskCount", data.get("totalTasks")))
    if isinstance(tasks, list):
        report["tasks_total"] = len(tasks)
    elif isinstance(tasks, int) and not isinstance(tasks, bool) and 0 < tasks < 100_000:
        report["tasks_total"] = tasks


def _task_done(report: dict[str, Any], _data: Mapping[str, Any]) -> None:
    _enter(report, "executing")
    report["tasks_done"] += 1


def _deploying(report: dict[str, Any], _data: Mapping[str, Any]) -> None:
    report["phase"] = "deploying"


def _uploading(report: dict[str, Any], data: Mapping[str, Any]) -> None:
    report["phase"] = "deploying"
    told = data.get("progress", data.get("percent"))
    report["uploaded"] = min(max(int(told), 0), 100) if isinstance(told, int | float) else 0


_FOLDS = {
    "plan_started": _planning,
    "plan_generated": _planned,
    "task_completed": _task_done,
    "stage_completed": _task_done,
    "deploy_started": _deploying,
    "deploy_progress": _uploading,
}


def _percent(report: Mapping[str, Any]) -> int:
    if report["phase"] == "planning":
        return PLANNED // 2
    if report["phase"] == "deploying":
        if "uploaded" in report:
            return min(PREPARED + (100 - PREPARED) * int(report["uploaded"]) // 100, 99)
        return EXECUTED
    done = report["tasks_done"]
    total = report["tasks_total"]
    share = min(done / total, 1.0) if total else 1 - 0.8**done  # approach the end, never reach it
    return int(PLANNED + (EXECUTED - PLANNED) * share) if done or report.get("planned") else 0


# ---- history ---------------------------------------------------------------------------------

EXPECTED, ESTIMATED = "expected_seconds", "estimated"
"""Where a build's `report` keeps what this attempt is expected to take, and the percent estimated from it."""

MOST_ESTIMATED = 95
LAG = timedelta(seconds=5)
"""The estimate of a running build is that of a moment ago: an end that is recorded while somebody reads, or
by a machine whose clock is a little behind, then does not take anything back."""

Build = Mapping[Any, Any]


def is_running(build: Build) -> bool:
    """Does it make progress with time?  Not while a person is awaited."""
    return build["state"] == State.IN_PROGRESS.value and not build["waiting"] and bool(build["started_at"])


def expectation(build: Build) -> Expectation | None:
    """What this attempt is expected to take, as kept."""
    seconds = build["report"].get(EXPECTED)
    return Expectation(tuple(seconds)) if seconds else None


def estimate(build: Build, now: datetime) -> int:
    """Percent by the time that has passed, or what was kept of it if that is more; 0 without history."""
    kept: int = build["report"].get(ESTIMATED, 0)
    expected = expectation(build)
    if expected is None or not is_running(build):
        return kept
    share = (now - build["started_at"]).total_seconds() / expected.median
    return max(kept, min(int(100 * share), MOST_ESTIMATED))


def shown(build: Build, now: datetime) -> Progress:
    """What the status shows: the percent that was told, or the estimate where that is more."""
    told = Progress(build["progress"], build["progress_basis"])
    estimated = estimate(build, now - LAG)
    return Progress(estimated, "history") if estimated > told.percent else told


def eta_seconds(build: Build, now: datetime) -> float | None:
    """Seconds until a running build is likely to end, never negative.

    None: it does not run, has no history, or has taken longer than all runs before it.
    """
    expected = expectation(build)
    if expected is None or not is_running(build):
        return None
    left = expected.remaining(max((now - build["started_at"]).total_seconds(), 0.0))
    return None if left is None else round(left, 1)


# ---- words -----------------------------------------------------------------------------------


def status_word(state: State | None, report: Mapping[str, Any]) -> str:
    """The progress API's `status`: unknown, planning, executing, deploying, completed, failed."""
    if state is None:
        return "unknown"
    if state is State.COMPLETED:
        return "completed"
    if state.terminal:
        return "failed"
    if state is State.QUEUED:
        return "planning"
    return str(report.get("phase", "executing"))
