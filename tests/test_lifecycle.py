"""The state machine, by table and by property.  The folding of verdicts into a row is `test_builds`."""

from dataclasses import replace

import pytest

from tests.facts import at, github, gitlab
from webhook_app.lifecycle import Act, Conclusion, JobStatus, ObservedBy, Recorded, State, verdict

Q, P, C, F, X, T = (
    State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED, State.CANCELLED, State.TIMEOUT,
)  # fmt: skip
ENDS = (C, F, X, T)


def recorded(state, attempt=1, told=None, **more):
    return Recorded(attempt=attempt, state=state, told_state=told or state, **more)


@pytest.mark.parametrize("state", list(State))
def test_the_first_word_creates_the_build_in_its_state(state):
    got = verdict(None, github(state, attempt=3))
    assert (got.act, got.attempt, got.state) == (Act.CREATE, 3, state)


def test_a_first_word_without_state_creates_a_queued_build():
    assert verdict(None, github(None)).state is Q


INSIDE_ONE_ATTEMPT = [
    # recorded, seen, act
    (Q, Q, Act.ENRICH), (Q, P, Act.MOVE), *[(Q, end, Act.MOVE) for end in ENDS],
    (P, Q, Act.DROP), (P, P, Act.ENRICH), *[(P, end, Act.MOVE) for end in ENDS],
    *[(end, Q, Act.DROP) for end in ENDS], *[(end, P, Act.DROP) for end in ENDS],
    *[(one, other, Act.ENRICH if one is other else Act.DROP) for one in ENDS for other in ENDS],
]  # fmt: skip


@pytest.mark.parametrize(("known", "seen", "act"), INSIDE_ONE_ATTEMPT)
@pytest.mark.parametrize("by", ["push", "poll"])
def test_inside_a_numbered_attempt_a_build_only_moves_up(known, seen, act, by):
    got = verdict(recorded(known), github(seen, by=by))
    assert got.act is act
    assert got.state is (seen if act is Act.MOVE else known)


def test_the_table_is_exhaustive():
    assert {(known, seen) for known, seen, _ in INSIDE_ONE_ATTEMPT} == {(a, b) for a in State for b in State}


@pytest.mark.parametrize("known", list(State))
@pytest.mark.parametrize("seen", list(State))
def test_a_lower_attempt_changes_nothing_and_a_higher_one_opens(known, seen):
    assert verdict(recorded(known, attempt=2), github(seen, attempt=1)).act is Act.DROP
    got = verdict(recorded(known, attempt=2), github(seen, attempt=4))
    assert (got.act, got.attempt, got.state) == (Act.REOPEN, 4, seen)


def test_an_unknown_word_or_a_job_event_says_nothing_about_the_state():
    for state in State:
        got = verdict(recorded(state), github(None))
        assert (got.act, got.state) == (Act.ENRICH, state)


def test_waiting_after_in_progress_is_no_step_back():
    got = verdict(recorded(P), github(Q, waiting=True))
    assert (got.act, got.state) == (Act.ENRICH, P)


@pytest.mark.parametrize(("known", "late"), [(P, Q), (Q, Q)])
def test_a_late_word_neither_takes_nor_brings_the_conclusion_of_one_that_waits(known, late):
    waits = {"waiting": True, "conclusion": Conclusion.ACTION_REQUIRED}
    for now, before in ((waits, {}), ({}, waits)):
        known_now = recorded(known, platform_at=at(10), conclusion=now.get("conclusion"))
        got = verdict(known_now, github(late, platform_at=at(9), **before))
        assert (got.state, got.conclusion) == (known, now.get("conclusion"))


# ---- ends that we set ourselves


@pytest.mark.parametrize("end", ENDS)
def test_an_end_of_ours_ends_only_what_is_open(end):
    ours = github(end, by="poll", ours=True)
    assert verdict(recorded(P), ours).act is Act.MOVE
    assert verdict(recorded(C), ours).act is Act.DROP


@pytest.mark.parametrize("later", ENDS)
def test_an_end_of_ours_yields_to_the_platforms_end(later):
    got = verdict(recorded(T, told=P), github(later))
    assert (got.act, got.state) == (Act.MOVE, later)


def test_an_end_of_ours_yields_to_a_later_word_only():
    gave_up = recorded(T, told=P, platform_at=at(10))
    assert verdict(gave_up, github(P, platform_at=at(10))).act is Act.DROP
    assert verdict(gave_up, github(Q, platform_at=at(5))).act is Act.DROP
    assert verdict(gave_up, github(P, platform_at=at(11))).act is Act.MOVE
    assert verdict(gave_up, github(P, by="poll")).act is Act.MOVE


def test_a_heartbeat_after_it_was_given_up_revives_a_script():
    beat = replace(github(P, attempt=None), observed_by=ObservedBy.REPORT)
    assert verdict(recorded(F, told=P), beat).act is Act.MOVE
    assert verdict(recorded(F), beat).act is Act.DROP


# ---- GitLab: attempts without numbers

DONE = recorded(
    C, platform_at=at(100), jobs={10: JobStatus.COMPLETED, 11: JobStatus.MANUAL}, jobs_complete=True
)


def test_running_after_success_alone_cannot_be_decided_and_asks_for_a_poll():
    got = verdict(DONE, gitlab(P, 100, {10: "in_progress", 11: "manual"}))
    assert (got.act, got.ask, got.state) == (Act.ASK, True, C)


def test_a_late_running_with_an_older_clock_is_dropped():
    assert verdict(DONE, gitlab(P, 50, {10: "in_progress", 11: "manual"})).act is Act.DROP


@pytest.mark.parametrize("state", [Q, P, F])
def test_a_new_job_id_proves_a_retry(state):
    got = verdict(DONE, gitlab(state, 100, {11: "manual", 12: "in_progress"}))
    assert (got.act, got.attempt, got.state) == (Act.REOPEN, 2, state)


def test_a_new_job_id_proves_nothing_when_not_all_jobs_were_known():
    partly = replace(DONE, jobs_complete=False)
    assert verdict(partly, gitlab(P, 100, {11: "manual", 12: "in_progress"})).act is Act.ASK


def test_a_manual_job_that_was_played_opens_an_attempt():
    got = verdict(DONE, gitlab(P, 100, {10: "completed", 11: "in_progress"}))
    assert (got.act, got.attempt) == (Act.REOPEN, 2)


def test_a_manual_job_proves_nothing_when_it_was_played_before_an_end_that_a_poll_told():
    """Its push came late: the poll, which shows no jobs, had told of the same end before."""
    polled = replace(DONE, jobs_complete=False)
    assert verdict(polled, gitlab(C, 100, {10: "completed", 11: "completed"})).act is Act.ENRICH
    assert verdict(polled, gitlab(P, 100, {10: "completed", 11: "in_progress"})).act is Act.ASK


def test_a_poll_decides_by_the_platforms_clock():
    assert verdict(DONE, gitlab(P, 102, None, by="poll")).act is Act.REOPEN
    assert verdict(DONE, gitlab(P, 100.5, None, by="poll")).act is Act.ASK
    assert verdict(DONE, gitlab(P, 50, None, by="poll")).act is Act.DROP
    assert verdict(DONE, gitlab(C, 100.2, None, by="poll")).act is Act.ENRICH


def test_the_late_end_of_the_attempt_before_does_not_end_the_retry():
    retried = recorded(
        P, attempt=2, platform_at=at(200), jobs={11: JobStatus.MANUAL, 12: JobStatus.IN_PROGRESS},
        jobs_complete=True,
    )  # fmt: skip
    assert verdict(retried, gitlab(C, 100, {10: "completed", 11: "manual"})).act is Act.DROP
    assert verdict(retried, gitlab(C, 250, {11: "manual", 12: "completed"})).act is Act.MOVE
