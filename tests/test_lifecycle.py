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


# ---- an end that is later than the one we know

ENDED = recorded(F, platform_at=at(100), ended_at=at(100))


@pytest.mark.parametrize("jobs", [None, {10: "completed"}])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("by", ["push", "poll"])
def test_an_end_at_a_later_time_is_that_of_a_rerun(end, by, jobs):
    """With or without job ids: an external pipeline has none, and jobs of a child pipeline are not in it."""
    known = replace(ENDED, jobs={10: JobStatus.COMPLETED} if jobs else {}, jobs_complete=bool(jobs))
    got = verdict(known, gitlab(end, 700, jobs, by=by, ended_at=at(700)))
    assert (got.act, got.attempt, got.state) == (Act.REOPEN, 2, end)


def test_an_end_a_second_later_is_a_reruns_whatever_the_jobs_of_the_first_did_meanwhile():
    assert verdict(ENDED, gitlab(C, 101, None, by="push", ended_at=at(101))).act is Act.REOPEN
    jobs_went_on = replace(ENDED, platform_at=at(150))
    assert verdict(jobs_went_on, gitlab(C, 120, None, by="push", ended_at=at(120))).act is Act.REOPEN


def test_another_end_within_the_second_is_believed_when_a_poll_was_made_for_it():
    for seconds in (100, 100.9):
        seen = gitlab(C, seconds, None, by="poll", ended_at=at(seconds))
        assert verdict(ENDED, seen).act is Act.ASK
        assert verdict(replace(ENDED, doubtful=True), seen).act is Act.REOPEN
        assert verdict(replace(ENDED, doubtful=True), replace(seen, state=F)).act is Act.ENRICH


def test_an_end_at_an_earlier_time_is_late_news():
    for end in ENDS:
        got = verdict(replace(ENDED, platform_at=None), gitlab(end, 50, None, by="push", ended_at=at(50)))
        assert got.act is (Act.ENRICH if end is F else Act.DROP)


def test_another_end_of_the_same_moment_is_for_a_poll_to_decide():
    assert verdict(ENDED, gitlab(C, 100, None, by="push", ended_at=at(100))).act is Act.ASK


# ---- one identity, used twice


def jenkins(state, **more):
    return replace(github(state, attempt=None), platform="jenkins", **more)


OLD = recorded(C, queue_id="99", created_at=at(0), ended_at=at(60))


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("known", list(State))
def test_another_queue_id_is_another_build(known, state):
    first = replace(OLD, state=known, told_state=known)
    got = verdict(first, jenkins(state, queue_id="400", created_at=at(500)))
    assert (got.act, got.attempt, got.state, got.anew) == (Act.REOPEN, 2, state, True)
    assert verdict(first, jenkins(state, queue_id="98", created_at=at(-500))).act is Act.DROP


def test_without_times_queue_ids_rise():
    assert verdict(OLD, jenkins(F, queue_id="100")).act is Act.REOPEN
    assert verdict(OLD, jenkins(F, queue_id="98")).act is Act.DROP


def test_a_queue_id_that_began_anew_is_ordered_by_time():
    assert verdict(OLD, jenkins(F, queue_id="1", created_at=at(900))).act is Act.REOPEN


def test_the_same_queue_id_after_the_end_is_another_build():
    """A controller that was set up anew counts both from 1."""
    old = recorded(C, queue_id="1", created_at=at(0), ended_at=at(60))
    assert verdict(old, jenkins(P, queue_id="1", created_at=at(4000))).anew
    assert not verdict(old, jenkins(C, queue_id="1", created_at=at(0), ended_at=at(60))).anew


def test_the_same_queue_id_is_the_same_build_whatever_the_clock_says():
    got = verdict(recorded(P, queue_id="99", created_at=at(0)), jenkins(C, queue_id="99", created_at=at(90)))
    assert (got.act, got.anew) == (Act.MOVE, False)


def test_without_queue_ids_a_start_after_the_end_is_another_build():
    """Older plugins tell none."""
    old = replace(OLD, queue_id=None)
    assert verdict(old, jenkins(P, created_at=at(62))).anew
    assert not verdict(old, jenkins(P, created_at=at(60))).anew
    assert verdict(old, jenkins(C, created_at=at(-90), ended_at=at(-80))).act is Act.DROP


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_id_that_a_restored_server_gives_again_counts_on_from_the_attempts_before(number):
    old = recorded(C, attempt=2, platform_at=at(900), ended_at=at(900), created_at=at(0))
    got = verdict(old, github(P, attempt=1, created_at=at(5000), platform_at=at(5000)))
    assert (got.act, got.attempt, got.anew) == (Act.REOPEN, 3, True)
    new = recorded(P, attempt=3, attempt_base=2, created_at=at(5000), platform_at=at(5000))
    assert verdict(new, github(C, attempt=1, created_at=at(5000), platform_at=at(5100))).act is Act.MOVE
    assert verdict(new, github(P, attempt=2, created_at=at(5000), platform_at=at(6000))).attempt == 4
    late = github(F, attempt=number, created_at=at(0), platform_at=at(900), ended_at=at(900))
    assert verdict(new, late).act is Act.DROP
    late_job = github(P, attempt=number, job_created_at=at(10))
    assert verdict(new, late_job).act is Act.DROP


def test_a_build_of_an_older_store_has_no_queue_id_and_no_time_of_creation():
    old = recorded(C, ended_at=at(60))
    assert verdict(old, jenkins(P, queue_id="900", created_at=at(5000))).anew
    assert not verdict(old, jenkins(C, queue_id="55", created_at=at(0), ended_at=at(60))).anew
    assert not verdict(recorded(C), jenkins(P, queue_id="900", created_at=at(5000))).anew, "no time is known"


def test_a_higher_attempt_is_a_rerun_whatever_its_time_of_creation():
    old = recorded(C, platform_at=at(900), ended_at=at(900), created_at=at(0))
    got = verdict(old, github(P, attempt=2, created_at=at(5000), platform_at=at(5000)))
    assert (got.act, got.attempt, got.anew) == (Act.REOPEN, 2, False)
