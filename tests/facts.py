"""Observations for tests, with only what matters said."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from webhook_app.lifecycle import Conclusion, JobFact, JobStatus, Observation, ObservedBy, State
from webhook_app.polling import Pace

NOON = datetime(2026, 11, 1, 12, 0, 0, tzinfo=UTC)
PACE = Pace(
    interval_seconds=15, freshness_seconds=60, max_seconds=3600, max_errors=3, multiplier=2,
    heartbeat_timeout_seconds=90,
)  # fmt: skip

END_OF = {
    State.COMPLETED: Conclusion.SUCCESS,
    State.FAILED: Conclusion.FAILURE,
    State.CANCELLED: Conclusion.CANCELLED,
    State.TIMEOUT: Conclusion.TIMED_OUT,
}


def at(seconds: float) -> datetime:
    """So many seconds after noon."""
    return NOON + timedelta(seconds=seconds)


def github(
    state: State | None, attempt: int | None = 1, run: int = 1, by: str = "push", **more
) -> Observation:
    """A run on GitHub."""
    seen = Observation(
        source="github",
        platform="github",
        observed_by=ObservedBy(by),
        key=f"github:{run}",
        build_id=f"github:Octo:Repo:{run}",
        group=f"github:suite:{run}",
        attempt=attempt,
        state=state,
        conclusion=END_OF.get(state) if state else None,
        raw_status=state.value if state else None,
        repository="Octo/Repo",
        workflow="CI",
        branch="main",
        commit="c0ffee",
        number=run,
        url=f"https://example.com/runs/{run}",
    )
    return replace(seen, **more)


def job(id_: int, status: str, done: int = 0, total: int = 0) -> JobFact:
    """One job."""
    return JobFact(id=id_, name=f"job {id_}", status=JobStatus(status), steps_done=done, steps_total=total)


def gitlab(
    state: State | None, when: float, jobs: dict[int, str] | None, pipeline: int = 1, by: str = "push", **more
):
    """A pipeline on GitLab, as its hook (with all jobs) or a REST read (without) tells it at `when`."""
    seen = Observation(
        source="gitlab",
        platform="gitlab",
        observed_by=ObservedBy(by),
        key=f"gitlab:1:{pipeline}",
        build_id=f"gitlab:1:{pipeline}",
        state=state,
        conclusion=END_OF.get(state) if state else None,
        raw_status=state.value if state else None,
        repository="group/project",
        platform_at=at(when),
        jobs=tuple(job(id_, status) for id_, status in (jobs or {}).items()),
        jobs_complete=jobs is not None,
    )
    return replace(seen, **more)
