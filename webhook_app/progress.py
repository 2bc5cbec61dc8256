"""Percent done and what it rests on.  Pure.

`basis` in spec words: `steps` (GitHub steps of jobs), `jobs` (jobs over / jobs known), `history`
(reserved for durations of earlier runs), `report` (told by the build script or Jenkins), `none`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
