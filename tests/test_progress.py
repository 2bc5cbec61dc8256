"""Percent done and what it rests on, and the words of the progress API."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.facts import at
from webhook_app import progress
from webhook_app.lifecycle import Detail, JobStatus, State
from webhook_app.progress import Expectation, Progress


def jobs(*told):
    """Jobs as stored: each `(status, steps done, steps in all)`, or its status alone."""
    rows = [(one, 0, 0) if isinstance(one, str) else one for one in told]
    return {
        str(number): {"name": "", "status": status, "steps_done": done, "steps_total": total}
        for number, (status, done, total) in enumerate(rows)
    }


# ---- jobs


@pytest.mark.parametrize(
    ("told", "complete", "percent", "basis"),
    [
        (["queued", "queued"], True, 0, "jobs"),
        (["completed", "queued"], True, 50, "jobs"),
        (["completed", "in_progress", "manual"], True, 33, "jobs"),
        (["completed"] * 57 + ["queued"] * 43, True, 57, "jobs"),
        (["completed", "completed"], True, 99, "jobs"),
        ([("in_progress", 2, 4), "queued"], True, 25, "steps"),
        ([("in_progress", 9, 4), ("queued", 0, 4)], True, 50, "steps"),
        ([("completed", 0, 4)], True, 99, "steps"),
        # As GitHub tells them: one after the other, nobody knows how many will follow.
        ([("completed", 7, 7)], False, 50, "steps"),
        ([("completed", 7, 7), ("in_progress", 3, 7)], False, 47, "steps"),
        (["completed"] * 9, False, 90, "jobs"),
        (["queued"], False, 0, "jobs"),
    ],
)
def test_percent_of_jobs(told, complete, percent, basis):
    assert progress.of_jobs(jobs(*told), complete) == Progress(percent, basis)


@pytest.mark.parametrize("complete", [True, False])
def test_no_jobs_say_nothing(complete):
    assert progress.of_jobs({}, complete) is None


STORED_JOB = st.tuples(st.sampled_from(list(JobStatus)), st.integers(0, 50), st.integers(0, 50))


@given(st.lists(STORED_JOB, min_size=1), st.booleans())
def test_jobs_are_never_the_whole(told, complete):
    found = progress.of_jobs(jobs(*told), complete)
    assert 0 <= found.percent <= 99
    assert found.basis in ("steps", "jobs")


@given(st.lists(STORED_JOB, min_size=1), st.data())
def test_a_job_that_ends_never_makes_it_less(told, data):
    index = data.draw(st.integers(0, len(told) - 1))
    before = progress.of_jobs(jobs(*told), True)
    ended = [*told[:index], (JobStatus.COMPLETED, *told[index][1:]), *told[index + 1 :]]
    assert progress.of_jobs(jobs(*ended), True).percent >= before.percent


# ---- scripts


def tell(*events):
    """Fold events (`type`, or `(type, data)`) one after the other; the last report and percents on the way."""
    report, percents = {}, []
    for event in events:
        type_, data = event if isinstance(event, tuple) else (event, {})
        report, told = progress.of_report(report, Detail(type=type_, data=data))
        assert told.basis == "report"
        percents.append(told.percent)
    return report, percents


@pytest.mark.parametrize(
    ("events", "percents"),
    [
        (["build_started"], [0]),
        (["plan_started", "plan_generated"], [5, 10]),
        (
            [("plan_generated", {"tasks": ["a", "b", "c", "d"]}), *["task_completed"] * 4],
            [10, 25, 40, 55, 70],
        ),
        ([("plan_generated", {"taskCount": 2}), "task_started", "task_completed"], [10, 10, 40]),
        ([("plan_generated", {"totalTasks": 2}), *["task_completed"] * 5], [10, 40, 70, 70, 70, 70]),
        (["stage_completed", "stage_completed"], [21, 31]),
        (
            ["deploy_started", ("deploy_progress", {"progress": 0}), ("deploy_progress", {"percent": 50})],
            [70, 80, 90],
        ),
        ([("deploy_progress", {"progress": 100})], [99]),
        ([("deploy_progress", {"progress": -5})], [80]),
        ([("deploy_progress", {"progress": 1e300})], [99]),
        ([("deploy_progress", {"progress": "half"})], [80]),
        (["a_word_nobody_knows"], [0]),
    ],
)
def test_percent_of_a_script(events, percents):
    assert tell(*events)[1] == percents


@pytest.mark.parametrize("tasks", ["four", -1, 0, 100_000, True, None, {"a": 1}, 2.5])
def test_a_plan_without_a_usable_number_of_tasks_is_still_a_plan(tasks):
    report, percents = tell(("plan_generated", {"tasks": tasks}))
    assert (report["tasks_total"], percents) == (0, [10])


def test_without_a_plan_the_tasks_approach_their_end_and_never_reach_the_deployment():
    percents = tell(*["task_completed"] * 200)[1]
    assert percents == sorted(percents)
    assert percents[0] == 21
    assert percents[-1] <= progress.EXECUTED


@pytest.mark.parametrize(
    ("events", "phase"),
    [
        (["build_started"], "executing"),
        (["plan_started"], "planning"),
        (["plan_started", "plan_generated"], "executing"),
        (["plan_started", "task_completed"], "executing"),
        (["deploy_started"], "deploying"),
        (["deploy_started", "task_completed"], "deploying"),
        (["deploy_progress", "plan_started"], "deploying"),
        (["deploy_started", "plan_generated"], "deploying"),
        (["plan_generated", "plan_started"], "executing"),
        (["task_completed", "plan_started"], "executing"),
    ],
)
def test_a_late_word_does_not_bring_an_earlier_phase_back(events, phase):
    report, _ = tell(*events)
    assert report["phase"] == phase
    assert progress.status_word(State.IN_PROGRESS, report) == phase


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
TOLD = st.tuples(
    st.sampled_from([*progress._FOLDS, "build_started"]),
    st.dictionaries(st.sampled_from(["tasks", "taskCount", "progress", "percent", "x"]), JSON),
)


@given(st.lists(TOLD, min_size=1, max_size=12))
def test_whatever_a_script_tells_the_percent_stays_within_its_bounds(events):
    report, percents = tell(*events)
    assert all(0 <= percent <= 99 for percent in percents)
    assert report["phase"] in ("planning", "executing", "deploying")


def test_a_report_is_folded_into_a_copy():
    known = {"phase": "executing", "tasks_total": 2, "tasks_done": 1}
    progress.of_report(known, Detail(type="task_completed"))
    assert known["tasks_done"] == 1


# ---- events


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (0, 4, False),
        (0, 5, True),
        (4, 5, True),
        (5, 9, False),
        (9, 10, True),
        (12, 99, True),
        (95, 99, False),
    ],
)
def test_each_fifth_percent_is_worth_an_event(before, after, told):
    assert progress.is_worth_telling(before, after) is told


# ---- history


@pytest.mark.parametrize(
    ("seconds", "q", "expected"),
    [
        ([60], 0, 60), ([60], 0.5, 60), ([60], 1, 60),
        ([30, 10, 20], 0.5, 20), ([10, 20], 0.5, 15), ([10, 20, 30, 40], 0.5, 25),
        ([10, 20, 30, 40], 0, 10), ([10, 20, 30, 40], 1, 40), ([0, 10], 0.9, 9),
    ],
)  # fmt: skip
def test_a_quantile_lies_between_two_runs_in_proportion(seconds, q, expected):
    expectation = Expectation.of(seconds)
    assert expectation.quantile(q) == pytest.approx(expected)
    assert expectation.count == len(seconds)


DURATIONS = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=20)


@given(DURATIONS, st.floats(0, 1), st.floats(0, 1))
def test_quantiles_ascend_within_the_runs(seconds, one, other):
    expectation = Expectation.of(seconds)
    lower, upper = expectation.quantile(min(one, other)), expectation.quantile(max(one, other))
    assert min(seconds) <= lower <= upper * (1 + 1e-9)
    assert upper <= max(seconds) * (1 + 1e-9)


def running(started=0.0, expected=None, percent=0, basis="none", **more):
    """The columns of a running build that its status is made of."""
    report = {progress.EXPECTED: expected} if expected else {}
    build = {"state": "in_progress", "waiting": False, "started_at": at(started), "report": report}
    return build | {"progress": percent, "progress_basis": basis} | more


@pytest.mark.parametrize(
    ("build", "elapsed", "eta"),
    [
        (running(expected=[60, 100, 140]), 0, 100),
        (running(expected=[60, 100, 140]), 50, 50),
        (running(expected=[60, 100, 140]), 80, 40),  # of those that took longer: 100 and 140
        (running(expected=[60, 100, 140]), 139.75, 0.2),
        (running(expected=[60, 100, 140]), 140, None),  # overdue: nobody knows
        (running(expected=[60, 100, 140]), 1e9, None),
        (running(expected=[100]), -30, 100),  # the platform's clock is ahead of ours
        (running(), 10, None),
        (running(expected=[100], state="queued"), 10, None),
        (running(expected=[100], state="failed"), 10, None),
        (running(expected=[100], waiting=True), 10, None),
        (running(expected=[100]) | {"started_at": None}, 10, None),
    ],
)
def test_the_time_that_is_left(build, elapsed, eta):
    assert progress.eta_seconds(build, at(elapsed)) == eta


@given(DURATIONS, st.integers(-1_000_000, 10_000_000))
def test_the_time_that_is_left_is_never_negative(seconds, elapsed):
    eta = progress.eta_seconds(running(expected=sorted(seconds)), at(elapsed))
    assert (eta is None) is (elapsed >= max(seconds))
    assert eta is None or 0 <= eta <= max(seconds) + 0.05  # it is rounded


LAG = progress.LAG.total_seconds()


@pytest.mark.parametrize(
    ("build", "elapsed", "shown"),
    [
        (running(), 50, Progress(0, "none")),
        (running(expected=[100]), 50, Progress(50, "history")),
        (running(expected=[50, 100, 150]), 50.9, Progress(50, "history")),
        (running(expected=[100]), 94, Progress(94, "history")),
        (running(expected=[100]), 1e6, Progress(95, "history")),
        (running(expected=[100]), -50, Progress(0, "none")),
        (running(expected=[100], percent=60, basis="steps"), 50, Progress(60, "steps")),
        (running(expected=[100], percent=50, basis="jobs"), 50, Progress(50, "jobs")),
        (running(expected=[100], percent=49, basis="report"), 50, Progress(50, "history")),
        (running(expected=[100], percent=99, basis="jobs"), 1e6, Progress(99, "jobs")),
        (running(expected=[100], state="queued"), 50, Progress(0, "none")),
        (running(expected=[100], waiting=True), 50, Progress(0, "none")),
        (running(expected=[100], state="failed"), 50, Progress(0, "none")),
        (running(report={progress.ESTIMATED: 70}, state="failed"), 50, Progress(70, "history")),
        (running(report={progress.ESTIMATED: 70}, waiting=True), 50, Progress(70, "history")),
        (running(report={progress.ESTIMATED: 70}, state="completed", percent=100), 0, Progress(100, "none")),
    ],
)
def test_what_the_status_shows(build, elapsed, shown):
    assert progress.shown(build, at(elapsed + LAG)) == shown


# ---- the status word


@pytest.mark.parametrize(
    ("state", "report", "word"),
    [
        (None, {}, "unknown"),
        (State.QUEUED, {}, "planning"),
        (State.IN_PROGRESS, {}, "executing"),
        (State.IN_PROGRESS, {"phase": "planning"}, "planning"),
        (State.IN_PROGRESS, {"phase": "deploying"}, "deploying"),
        (State.COMPLETED, {"phase": "deploying"}, "completed"),
        (State.FAILED, {}, "failed"),
        (State.CANCELLED, {}, "failed"),
        (State.TIMEOUT, {"phase": "planning"}, "failed"),
    ],
)
def test_the_word_for_the_status(state, report, word):
    assert progress.status_word(state, report) == word
