"""`record()`: verdicts become rows, events and messages, on both databases."""

from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from tests.facts import NOON, PACE, at, github, gitlab, job
from webhook_app import builds, db, history, models, polling, progress
from webhook_app.builds import ErrorFound, PollFailed, Unchanged
from webhook_app.lifecycle import Act, Conclusion, Detail, Observation, ObservedBy, State
from webhook_app.platforms import Source

Q, P, C, F, T = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED, State.TIMEOUT


def record(engine, *facts, now=NOON, pace=PACE):
    return db.as_writer(engine, lambda write: builds.record(write, facts, now, pace))


def row(engine, key="github:1"):
    with db.reading(engine) as connection:
        return dict(
            connection.execute(select(models.builds).where(models.builds.c.key == key)).mappings().one()
        )


def events(engine, key="github:1"):
    with db.reading(engine) as connection:
        found = connection.execute(
            select(models.events)
            .join(models.builds, models.events.c.build == models.builds.c.id)
            .where(models.builds.c.key == key)
            .order_by(models.events.c.id)
        ).mappings()
        return [dict(event) for event in found]


def attempts(engine):
    """Those that a later one has superseded."""
    with db.reading(engine) as connection:
        found = connection.execute(select(models.attempts).order_by(models.attempts.c.attempt))
        return [dict(one) for one in found.mappings()]


def types(engine, key="github:1"):
    return [event["type"] for event in events(engine, key)]


def test_a_build_from_first_push_to_end(engine):
    record(engine, github(Q), now=at(0))
    record(engine, github(P, started_at=at(5)), now=at(6))
    record(engine, github(C, ended_at=at(65)), now=at(66))
    build = row(engine)
    assert (build["state"], build["conclusion"], build["progress"]) == ("completed", "success", 100)
    assert (build["started_at"], build["ended_at"]) == (at(5), at(65))
    assert build["next_poll_at"] is None
    made = events(engine)
    assert [event["type"] for event in made] == ["build.queued", "build.in_progress", "build.completed"]
    assert [event["sequence"] for event in made] == [1, 2, 3]
    last = made[-1]["data"]
    assert last["previous_state"] == "in_progress"
    assert last["duration_seconds"] == 60
    assert (last["sequence"], last["event_id"]) == (3, made[-1]["id"])


def test_a_batch_is_applied_in_its_order_and_equals_one_by_one(engine):
    record(engine, github(Q), github(P), github(C), github(Q, run=2))
    assert types(engine) == ["build.queued", "build.in_progress", "build.completed"]
    assert types(engine, "github:2") == ["build.queued"]


def test_duplicates_and_late_words_make_no_event(engine):
    record(engine, github(C))
    outcomes = record(engine, github(C), github(P), github(Q))
    assert [outcome.act for outcome in outcomes] == [Act.ENRICH, Act.DROP, Act.DROP]
    assert types(engine) == ["build.completed"]


def test_a_rerun_keeps_the_old_attempts_record(engine):
    record(engine, github(F, error="boom", ended_at=at(10)))
    record(engine, github(Q, attempt=2), now=at(100))
    record(engine, github(C, attempt=2), now=at(200))
    build = row(engine)
    assert (build["attempt"], build["state"], build["error"]) == (2, "completed", None)
    with db.reading(engine) as connection:
        kept = connection.execute(select(models.attempts)).mappings().one()
    assert (kept["attempt"], kept["state"], kept["error"], kept["ended_at"]) == (1, "failed", "boom", at(10))
    assert types(engine) == ["build.failed", "build.queued", "build.completed"]


def test_a_check_run_finds_its_build_by_the_suite_and_makes_none(engine):
    check = Observation(
        source="github", platform="github", observed_by=ObservedBy.PUSH, key="", build_id="",
        group="github:suite:1",
    )  # fmt: skip
    assert record(engine, check)[0].build is None
    record(engine, github(P))
    assert record(engine, check)[0].build_id == "github:Octo:Repo:1"


def test_a_check_run_finds_its_build_by_a_suite_that_came_in_the_same_batch(engine):
    record(engine, replace(github(Q), group=None))
    told = github(None, jobs=(job(7, "in_progress", 2, 4),), key="", build_id="")
    outcomes = record(engine, github(P), told)
    assert [outcome.build for outcome in outcomes] == [1, 1]
    assert row(engine)["progress"] == 25


def test_a_renamed_repository_keeps_its_builds(engine):
    record(engine, github(P))
    record(engine, github(C, repository="New/Name", build_id="github:New:Name:1"))
    build = row(engine)
    assert (build["build_id"], build["repository"], build["state"]) == (
        "github:Octo:Repo:1", "New/Name", "completed",
    )  # fmt: skip


def test_progress_rises_with_jobs_and_never_falls(engine):
    record(engine, github(P, jobs=(job(1, "in_progress", 2, 4), job(2, "queued", 0, 4)), jobs_complete=True))
    assert (row(engine)["progress"], row(engine)["progress_basis"]) == (25, "steps")
    record(engine, github(None, jobs=(job(1, "completed", 4, 4),)))
    assert row(engine)["progress"] == 50
    record(engine, github(None, jobs=(job(1, "in_progress", 1, 4),)))
    assert row(engine)["progress"] == 50
    assert types(engine) == ["build.in_progress", "build.progress"]


def matrix(count):
    """What GitHub pushes about a run with so many jobs: each is queued, runs, and is done."""
    yield github(P)
    for status in ("queued", "in_progress", "completed"):
        for number in range(1, count + 1):
            yield github(None, jobs=(job(number, status, 5 * (status == "completed"), 5),))


@pytest.mark.parametrize("at_once", [1, 64])
def test_a_matrix_of_many_jobs_does_not_flood_its_subscribers(engine, at_once):
    told = list(matrix(60))
    for first in range(0, len(told), at_once):
        record(engine, *told[first : first + at_once])
    assert (row(engine)["progress"], row(engine)["progress_basis"]) == (98, "steps")
    percents = [made["data"]["progress"] for made in events(engine) if made["type"] == "build.progress"]
    steps = [percent // progress.EVENT_STEP for percent in percents]
    assert steps == list(range(1, 20))


def test_a_script_tells_details_and_each_is_one_event(engine):
    def report(state, type_=None, **data):
        return Observation(
            source="script", platform="script", observed_by=ObservedBy.REPORT, key="script:u",
            build_id="script:u", state=state, detail=Detail(type=type_, data=data) if type_ else None,
        )  # fmt: skip

    record(engine, report(P, "build_started"))
    record(engine, report(P, "stage_completed", stage="compile"))
    record(engine, report(P))  # a heartbeat
    record(engine, report(C, "build_completed"))
    assert types(engine, "script:u") == ["build.in_progress", "build.reported", "build.completed"]
    assert events(engine, "script:u")[1]["data"]["detail"] == {"type": "stage_completed", "stage": "compile"}


# ---- whose times they are


def test_the_platforms_start_replaces_ours(engine):
    """A job's push came first: all we knew was when we heard of it."""
    record(engine, github(P), now=at(900))
    assert (row(engine)["started_at"], row(engine)["started_synthetic"]) == (at(900), True)
    record(engine, github(C, started_at=at(0), ended_at=at(600), platform_at=at(600)), now=at(901))
    build = row(engine)
    assert (build["started_at"], build["ended_at"]) == (at(0), at(600))
    assert not (build["started_synthetic"])
    assert not (build["ended_synthetic"])
    assert events(engine)[-1]["data"]["duration_seconds"] == 600.0


def test_the_platforms_end_replaces_ours(engine):
    record(engine, github(P, started_at=at(0)), now=at(1))
    record(engine, github(C), now=at(700))
    assert (row(engine)["ended_at"], row(engine)["ended_synthetic"]) == (at(700), True)
    record(engine, github(C, ended_at=at(600), by="poll"), now=at(701))
    assert (row(engine)["ended_at"], row(engine)["ended_synthetic"]) == (at(600), False)


def test_a_start_of_ours_after_the_platforms_end_is_no_start(engine):
    record(engine, github(P), now=at(900))
    record(engine, github(C, ended_at=at(600)), now=at(901))
    assert (row(engine)["started_at"], row(engine)["ended_at"]) == (None, at(600))
    assert events(engine)[-1]["data"]["duration_seconds"] is None


@pytest.mark.parametrize("end", [{"ended_at": at(90)}, {"ours": True, "by": "poll"}])
def test_nothing_ends_before_it_starts(engine, end):
    record(engine, github(P, started_at=at(100)), now=at(50))
    record(engine, github(F, **end), now=at(60))
    assert (row(engine)["started_at"], row(engine)["ended_at"]) == (at(100), at(100))


def test_times_of_ours_are_no_history(engine):
    for run, start in ((1, None), (2, at(0))):
        record(engine, github(P, run=run, started_at=start), now=at(599))
        record(engine, github(C, run=run, ended_at=at(600)), now=at(601))
    record(engine, github(P, run=3, started_at=at(700)), now=at(700))
    with db.reading(engine) as connection:
        found = history.expectations(connection, [row(engine, "github:3")])
    assert [one.seconds for one in found.values()] == [(600.0,)]


def test_the_late_end_of_an_earlier_attempt_is_kept_with_it(engine):
    record(engine, github(P, started_at=at(0)), now=at(1))
    record(engine, github(P, attempt=2, started_at=at(900)), now=at(900))
    record(engine, github(F, started_at=at(0), ended_at=at(600)), now=at(950))
    (first,) = attempts(engine)
    assert (first["state"], first["conclusion"], first["ended_at"]) == ("failed", "failure", at(600))
    assert (row(engine)["state"], len(events(engine))) == ("in_progress", 2)
    record(engine, github(C, started_at=at(0), ended_at=at(601)), now=at(951))
    assert attempts(engine) == [first], "an end of the platform stays"


def test_the_late_end_of_an_earlier_use_corrects_no_attempt_of_the_present_one(engine):
    old = {"created_at": at(0), "platform_at": at(60)}
    record(engine, github(P, **old), now=at(60))
    for attempt in (1, 2):
        new = {"created_at": at(5000), "platform_at": at(5000 + 100 * attempt)}
        record(engine, github(P, attempt=attempt, **new), now=at(5000))
    assert [one["state"] for one in attempts(engine)] == ["in_progress"] * 2
    record(engine, github(F, created_at=at(0), platform_at=at(90), ended_at=at(90)), now=at(6000))
    assert [one["state"] for one in attempts(engine)] == ["in_progress"] * 2
    assert row(engine)["attempt"] == 3


# ---- whose branch it is


def test_a_fork_has_a_branch_of_its_own(engine):
    ref = {"branch": "stranger:main", "head_repository": "stranger/repo", "is_fork": True}
    record(engine, github(P, trigger="pull_request", **ref))
    data = events(engine)[-1]["data"]
    assert {name: data[name] for name in ref} == ref
    assert data["trigger"] == "pull_request"
    record(engine, github(P, branch="main", is_fork=None))
    assert row(engine)["branch"] == "stranger:main", "a word that does not tell whose branch it is"


def test_a_fuller_word_shows_a_branch_to_be_a_forks_or_a_tag(engine):
    for run, full in ((1, {"branch": "stranger:main", "is_fork": True}), (2, {"branch": "refs/tags/main"})):
        record(engine, github(P, run=run, branch="main", by="poll"))
        record(engine, github(None, run=run, **full))
        assert row(engine, f"github:{run}")["branch"] == full["branch"]


def test_a_new_use_of_an_identity_is_a_new_attempt_with_facts_of_its_own(engine):
    old = {"queue_id": "4", "created_at": at(0), "branch": "old", "commit": "c0"}
    record(engine, github(C, attempt=None, ended_at=at(60), started_at=at(0), **old), now=at(61))
    new = {"queue_id": "9", "created_at": at(900), "branch": "new", "commit": None}
    record(engine, github(P, attempt=None, started_at=at(900), **new), now=at(900))
    build = row(engine)
    assert (build["attempt"], build["attempt_base"], build["state"]) == (2, 1, "in_progress")
    assert (build["branch"], build["commit"], build["started_at"]) == ("new", None, at(900))
    assert [one["ended_at"] for one in attempts(engine)] == [at(60)]
    record(engine, github(F, attempt=None, ended_at=at(61), **old), now=at(901))
    assert row(engine)["state"] == "in_progress"
    record(engine, github(F, attempt=None, ended_at=at(930), **new), now=at(931))
    assert (row(engine)["state"], row(engine)["attempt"]) == ("failed", 2)


# ---- polling columns


def test_a_push_keeps_the_build_from_being_polled_for_the_freshness_window(engine):
    record(engine, github(P), now=at(0))
    assert row(engine)["next_poll_at"] == at(60)
    record(engine, github(None), now=at(50))
    assert row(engine)["next_poll_at"] == at(110)


def test_polls_come_at_the_interval_and_say_when_they_began_and_ended(engine):
    record(engine, github(P), now=at(0))
    record(engine, github(P, by="poll"), now=at(60))
    assert row(engine)["next_poll_at"] == at(75)
    record(engine, github(C, by="poll"), now=at(75))
    build = row(engine)
    assert (build["poll_count"], build["polling"], build["next_poll_at"]) == (2, "done", None)
    assert types(engine) == [
        "build.in_progress", "build.polling_started", "build.completed", "build.polling_completed",
    ]  # fmt: skip
    assert events(engine)[2]["observed_by"] == "poll"


def test_polling_without_an_end_times_out_and_a_later_word_is_believed(engine):
    record(engine, github(P), now=at(0))
    record(engine, github(P, by="poll"), now=at(60))
    record(engine, github(P, by="poll"), now=at(60 + 3600))
    build = row(engine)
    assert (build["state"], build["conclusion"], build["polling"]) == ("timeout", "timed_out", "timeout")
    assert build["next_poll_at"] == at(60 + 3600 + 60), "it is read on"
    assert types(engine)[-2:] == ["build.polling_timeout", "build.timeout"]
    record(engine, github(C), now=at(5000))
    assert row(engine)["state"] == "completed"


def test_a_push_restarts_the_clock_of_polling(engine):
    record(engine, github(P), now=at(0))
    record(engine, github(P, by="poll"), now=at(60))
    record(engine, github(None), now=at(3000))
    record(engine, github(P, by="poll"), now=at(3700))
    assert row(engine)["state"] == "in_progress"


def test_a_build_that_waits_for_a_person_never_times_out(engine):
    record(engine, github(Q, waiting=True, conclusion=Conclusion.ACTION_REQUIRED), now=at(0))
    for hour in range(1, 30):
        record(
            engine,
            github(Q, waiting=True, conclusion=Conclusion.ACTION_REQUIRED, by="poll"),
            now=at(hour * 3600),
        )
    build = row(engine)
    assert (build["state"], build["conclusion"]) == ("queued", "action_required")
    assert build["next_poll_at"] - build["last_poll_at"] == timedelta(
        seconds=PACE.interval_seconds * polling.WAITING_FACTOR
    )


def test_failed_polls_back_off_and_then_stop(engine):
    record(engine, github(P), now=at(0))
    waits = []
    for number in range(PACE.max_errors):
        record(engine, PollFailed("github:1", "http 500", "unavailable"), now=at(100))
        build = row(engine)
        waits.append((build["next_poll_at"] - at(100)).total_seconds())
        assert build["consecutive_errors"] == number + 1
    assert waits == [30, 60, 3600]
    assert (row(engine)["polling"], row(engine)["poll_error"]) == ("error", "http 500")
    assert types(engine)[-1] == "build.polling_error"
    record(engine, github(None), now=at(200))
    assert row(engine)["next_poll_at"] == at(260)


def test_an_undecidable_push_asks_for_a_poll_at_once_and_the_poll_settles_it(engine):
    record(engine, gitlab(C, 100, {10: "completed"}), now=at(100))
    outcome = record(engine, gitlab(P, 100, {10: "in_progress"}), now=at(101))[0]
    assert outcome.ask
    build = row(engine, "gitlab:1:1")
    assert (build["state"], build["next_poll_at"]) == ("completed", at(101))
    record(engine, gitlab(C, 100, None, by="poll"), now=at(102))
    assert row(engine, "gitlab:1:1")["next_poll_at"] is None
    assert types(engine, "gitlab:1:1") == ["build.completed"]


def test_an_undecidable_push_whose_polls_fail_is_asked_for_ever_more_slowly(engine):
    record(engine, gitlab(C, 100, {10: "completed"}), now=at(100))
    record(engine, gitlab(P, 100, {10: "in_progress"}), now=at(101))
    waits = []
    for _ in range(PACE.max_errors):
        record(engine, PollFailed("gitlab:1:1", "http 500", "unavailable"), now=at(200))
        due = row(engine, "gitlab:1:1")["next_poll_at"]
        waits.append((due - at(200)).total_seconds())
    assert waits == [30, 60, 3600]
    assert types(engine, "gitlab:1:1") == ["build.completed", "build.polling_error"]


def test_a_build_that_a_request_named_is_created_by_the_first_word_about_it(engine):
    source = Source("github", "github", "https://api.example.com")
    db.as_writer(engine, lambda write: builds.named(write, "github:Octo:Repo:1", source, at(0)))
    assert types(engine) == []
    assert row(engine)["next_poll_at"] == at(0)
    record(engine, github(Q, by="poll"), now=at(1))
    assert types(engine) == ["build.polling_started", "build.queued"]


def test_pushes_about_a_build_that_we_ended_do_not_put_its_next_read_off(engine):
    record(engine, github(P, started_at=at(0)), now=at(0))
    record(engine, github(T, by="poll", ours=True), now=at(100))
    for second in range(101, 115):
        record(engine, github(None), now=at(second))
    build = row(engine)
    assert (build["next_poll_at"], build["reads_after_end"]) == (at(160), 1)
    assert (build["state"], build["polling"], build["last_push_at"]) == ("timeout", "done", at(114))


def test_taking_back_an_end_of_ours_is_no_missed_push(engine):
    record(engine, github(P), now=at(0))
    record(engine, github(T, by="poll", ours=True), now=at(4000))
    (outcome,) = record(engine, github(P, by="poll"), now=at(5000))
    assert (outcome.act, outcome.moved, outcome.missed) == (Act.MOVE, False, False)
    (outcome,) = record(engine, github(C, by="poll"), now=at(9000))
    assert (outcome.moved, outcome.missed) == (True, True)


def test_a_build_that_was_not_found_says_so_once(engine):
    source = Source("github", "github", "https://api.example.com")
    db.as_writer(engine, lambda write: builds.named(write, "github:Octo:Repo:1", source, at(0)))
    missing = github(F, by="poll", ours=True, error="not found", raw_status=None)
    for second in range(4):
        record(engine, missing, now=at(second))
        with engine.begin() as connection:
            connection.execute(models.builds.update().values(polling.request(at(second))))
    assert types(engine) == ["build.failed"]


def test_an_end_of_ours_is_no_poll(engine):
    record(engine, github(P))
    record(engine, github(F, by="poll", ours=True, error="no heartbeat"))
    assert types(engine) == ["build.in_progress", "build.failed"]
    assert (row(engine)["error"], row(engine)["polling"]) == ("no heartbeat", "done")


@pytest.mark.parametrize("by", ["push", "poll"])
@pytest.mark.parametrize("end", ["not found", "gave up"])
def test_a_build_that_lives_on_after_an_end_of_ours_is_polled_like_any_other(engine, by, end):
    record(engine, github(P, platform_at=at(0)), now=at(0))
    if end == "not found":
        record(engine, github(F, by="poll", ours=True, error="deleted"), now=at(100))
    else:
        record(engine, github(P, by="poll"), now=at(100))
        record(engine, github(P, by="poll"), now=at(100 + PACE.max_seconds))
    assert State(row(engine)["state"]).terminal
    record(engine, github(P, by=by, platform_at=at(5000)), now=at(5000))
    assert polling.reason(row(engine), at(5001), PACE) != "build_ended"
    record(engine, Unchanged("github:1"), now=at(5100))
    build = row(engine)
    assert (build["state"], build["polling"]) == ("in_progress", "active")
    assert build["next_poll_at"] == at(5100 + PACE.interval_seconds)
    assert types(engine).count("build.polling_started") == (2 if end == "gave up" else 1)
    record(engine, github(C, by="poll", platform_at=at(5200)), now=at(5200))
    assert types(engine)[-2:] == ["build.completed", "build.polling_completed"]


# ---- any order, subset and repetition


def github_story(draw):
    """What GitHub would say, in order, about one run with up to three attempts."""
    story = []
    for attempt in range(1, draw(st.integers(1, 3)) + 1):
        end = draw(st.sampled_from([s for s in State if s.terminal]))
        base = attempt * 1000
        story += [
            github(Q, attempt, platform_at=at(base)),
            github(P, attempt, platform_at=at(base + 10)),
            github(None, attempt, jobs=(job(1, "completed", 3, 3),)),
            github(end, attempt, platform_at=at(base + 100)),
        ]
    return story


def gitlab_story(draw):
    """What GitLab would say about one pipeline that may be retried: no numbers, new job ids."""
    story = []
    for attempt in range(1, draw(st.integers(1, 3)) + 1):
        end = draw(st.sampled_from([C, F, State.CANCELLED]))
        base, first = attempt * 1000, attempt * 10
        story += [
            gitlab(Q, base, {first: "queued", first + 1: "queued"}),
            gitlab(P, base + 10, {first: "in_progress", first + 1: "queued"}),
            gitlab(P, base + 50, {first: "completed", first + 1: "in_progress"}),
            gitlab(end, base + 100, {first: "completed", first + 1: "completed"}),
        ]
    return story


@st.composite
def jumbled(draw, tell):
    """A story, and what of it arrives: any subset, in any order, with repetitions."""
    story = tell(draw)
    picks = draw(st.lists(st.integers(0, len(story) - 1), max_size=2 * len(story)))
    return story, [story[pick] for pick in picks]


@pytest.fixture(scope="module")
def one_engine(tmp_path_factory):
    made = db.connect(f"sqlite:///{tmp_path_factory.mktemp('jumble') / 'test.db'}", "NORMAL")
    from webhook_app import migrations

    migrations.upgrade(made)
    yield made
    made.dispose()


FEW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def play(engine, arrived, truth):
    """Apply what arrived, then poll until nothing is asked; the build's row."""
    key = f"{truth.key}:{uuid4().hex}"
    rekey = lambda fact: replace(fact, key=key, build_id=key, group=None)  # noqa: E731
    for fact in arrived:
        record(engine, rekey(fact))
    poll = replace(rekey(truth), observed_by=ObservedBy.POLL, jobs=(), jobs_complete=False)
    for _ in range(3):
        record(engine, poll)
    return row(engine, key)


@FEW
@given(story=jumbled(github_story))
def test_whatever_arrives_from_github_a_poll_ends_in_the_true_state(one_engine, story):
    told, arrived = story
    build = play(one_engine, arrived, told[-1])
    assert (build["state"], build["attempt"]) == (told[-1].state.value, told[-1].attempt)
    assert build["next_poll_at"] is None


@FEW
@given(story=jumbled(gitlab_story))
def test_whatever_arrives_from_gitlab_a_poll_ends_in_the_true_state(one_engine, story):
    told, arrived = story
    build = play(one_engine, arrived, told[-1])
    assert build["state"] == told[-1].state.value
    assert build["next_poll_at"] is None


def gitlab_polls(story):
    """Each running moment of a story as a poll would tell it, together with the jobs it listed."""
    return [replace(told, observed_by=ObservedBy.POLL) for told in story if told.state is P]


@FEW
@given(data=st.data())
def test_jobs_that_polls_list_hide_no_retry_and_invent_none(one_engine, data):
    story = gitlab_story(data.draw)
    facts = story + gitlab_polls(story)
    picks = data.draw(st.lists(st.integers(0, len(facts) - 1), max_size=2 * len(facts)))
    build = play(one_engine, [facts[pick] for pick in picks], story[-1])
    assert build["state"] == story[-1].state.value
    assert build["attempt"] <= len(story) // 4
    assert build["next_poll_at"] is None


@FEW
@given(data=st.data())
def test_jobs_listed_while_all_pushes_come_leave_every_attempt_in_its_place(one_engine, data):
    """Polls that are recorded late, however late, among pushes that come in their order."""
    story = gitlab_story(data.draw)
    arrived = list(story)
    for poll in gitlab_polls(story):
        soonest = arrived.index(replace(poll, observed_by=ObservedBy.PUSH)) + 1
        arrived.insert(data.draw(st.integers(soonest, len(arrived))), poll)
    build = play(one_engine, arrived, story[-1])
    assert (build["state"], build["attempt"]) == (story[-1].state.value, len(story) // 4)


@FEW
@given(data=st.data())
@pytest.mark.parametrize("tell", [github_story, gitlab_story])
def test_with_all_pushes_present_no_poll_is_needed_in_any_order(one_engine, tell, data):
    story = tell(data.draw)
    order = data.draw(st.permutations(story))
    key = f"x:{uuid4().hex}"
    for fact in order:
        record(one_engine, replace(fact, key=key, build_id=key, group=None))
    build = row(one_engine, key)
    assert build["state"] == story[-1].state.value
    made = events(one_engine, key)
    assert [event["sequence"] for event in made] == list(range(1, len(made) + 1))
    progress = [event["data"]["progress"] for event in made if event["data"]["attempt"] == build["attempt"]]
    assert progress == sorted(progress)


# ---- errors that a log tells -----------------------------------------------------------------


@st.composite
def troubled(draw, tell):
    """What of a story arrives, pushed or polled, and between it polls that fail, find nothing new, or find it gone."""
    story = tell(draw)
    key = story[0].key
    gone = replace(
        story[0], observed_by=ObservedBy.POLL, attempt=None, state=F, jobs=(), platform_at=None, ours=True, error="gone"
    )  # fmt: skip
    others = [
        PollFailed(key, "http 500", "unavailable"),
        Unchanged(key),
        gone,
        ErrorFound(key, 1, "tax is off"),
    ]
    fact = st.sampled_from(story).flatmap(
        lambda told: st.sampled_from([told, replace(told, observed_by=ObservedBy.POLL), *others])
    )
    return draw(st.lists(st.tuples(st.floats(0, 400), fact), min_size=1, max_size=30))


@FEW
@pytest.mark.parametrize("tell", [github_story, gitlab_story])
@given(data=st.data())
def test_whatever_happens_no_open_build_is_forgotten_and_none_is_polled_without_a_pause(
    one_engine, tell, data
):
    suffix, now = uuid4().hex, NOON
    for seconds, fact in data.draw(troubled(tell)):
        now += timedelta(seconds=seconds)
        changed = {"key": fact.key + suffix}
        if isinstance(fact, Observation):
            changed |= {"build_id": fact.build_id + suffix, "group": None}
        outcome = record(one_engine, replace(fact, **changed), now=now)[0]
        if outcome.build is None:
            continue
        build = row(one_engine, changed["key"])
        if not State(build["state"]).terminal and build["polling"] != "error":
            assert build["next_poll_at"] is not None, "it would never be looked at again"
        polled = isinstance(fact, PollFailed | Unchanged) or (
            isinstance(fact, Observation) and fact.observed_by is ObservedBy.POLL
        )
        if polled and build["next_poll_at"] is not None:
            assert build["next_poll_at"] > now, "it would be polled again at once, for ever"
    if outcome.build is not None:
        sequences = [event["sequence"] for event in events(one_engine, changed["key"])]
        assert sequences == list(range(1, build["sequence"] + 1))


def test_an_error_that_a_log_tells_fills_what_nobody_told_once_and_changes_no_state(engine):
    record(engine, github(F))
    before = row(engine)
    (outcome,) = record(engine, ErrorFound("github:1", 1, "from the log"), now=at(5))
    assert (outcome.act, outcome.events) == (Act.ENRICH, 1)
    after = row(engine)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"error", "sequence", "updated_at"}
    told = events(engine)[-1]
    assert (told["type"], told["observed_by"], told["data"]["error"]) == (
        "build.progress",
        "poll",
        "from the log",
    )
    (again,) = record(engine, ErrorFound("github:1", 1, "another"))
    assert (again.act, again.events, row(engine)["error"]) == (Act.DROP, 0, "from the log")


@pytest.mark.parametrize("fact", [ErrorFound("github:1", 1, "x"), ErrorFound("github:2", 1, "x")])
def test_an_error_of_another_attempt_an_open_build_or_nobody_is_dropped(engine, fact):
    record(engine, github(F), github(P, attempt=2))
    (outcome,) = record(engine, fact)
    assert (outcome.act, outcome.events, row(engine)["error"]) == (Act.DROP, 0, None)
    (open_,) = record(engine, ErrorFound("github:1", 2, "x"))
    assert (open_.act, row(engine)["error"]) == (Act.DROP, None)


def test_an_end_is_noted_for_collection_with_it_each_attempt_once(engine):
    record(
        engine,
        github(P),
        github(F),
        github(F),
        github(P, attempt=2),
        github(C, attempt=2),
        github(C, attempt=2),
    )
    record(engine, github(F, run=2, by="poll", ours=True))
    with db.reading(engine) as connection:
        rows = (
            connection.execute(select(models.collections).order_by(models.collections.c.attempt))
            .mappings()
            .all()
        )
    assert [(row["build"], row["attempt"], row["wants_log"], row["due_at"]) for row in rows] == [
        (1, 1, True, NOON), (1, 2, False, at(60)),
    ]  # fmt: skip
