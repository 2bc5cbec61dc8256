"""Push health: what counts as a missed push, when a source is deaf, and what we say about our absence."""

import pytest
from sqlalchemy import event, select

from tests.facts import PACE, at, github, gitlab
from webhook_app import budget, builds, db, health, models, platforms
from webhook_app.lifecycle import State

Q, P, C = State.QUEUED, State.IN_PROGRESS, State.COMPLETED
LATE = 100.0
"""Seconds after which a push is no longer fresh."""


def record(engine, now, *facts):
    return db.as_writer(engine, lambda write: builds.record(write, facts, at(now), PACE))


def listen(engine, *names, now=0.0):
    db.as_writer(engine, lambda write: health.listen(write.connection, names, at(now)))


def source(engine, name="github"):
    with db.reading(engine) as connection:
        return health.snapshot(connection)[name]


def notices(engine, kind=None):
    with db.reading(engine) as connection:
        rows = connection.execute(select(models.notices).order_by(models.notices.c.id)).mappings()
        return [row for row in rows if kind in (None, row["kind"])]


def polled(state, run=1, when=LATE, **more):
    return github(state, run=run, by="poll", platform_at=at(when), **more)


def miss(engine, run, now=LATE):
    """A build that nobody spoke of is found by a poll."""
    record(engine, now, polled(Q, run, now))


def test_pushes_and_their_changes_are_counted(engine):
    record(engine, 1, github(Q), github(Q), github(P))
    record(engine, 2, github(C), github(P, run=2))
    row = source(engine)
    assert (row["pushes"], row["changes_pushed"], row["polls"], row["missed_pushes"]) == (5, 4, 0, 0)
    assert (row["push_share"], row["last_push_at"], row["newest_fact_at"]) == (1.0, at(2), at(2))


def test_a_change_that_a_poll_tells_first_is_a_missed_push(engine):
    record(engine, 1, github(Q), github(Q, run=2), github(Q, run=3))
    record(engine, LATE, polled(P), polled(Q, 2), polled(C, 3))
    row = source(engine)
    assert (row["polls"], row["missed_pushes"], row["changes_pushed"]) == (3, 2, 3)
    assert (row["last_missed_at"], row["last_poll_at"]) == (at(LATE), at(LATE))
    assert row["push_share"] == pytest.approx(3 / 5)
    with db.reading(engine) as connection:
        missed = connection.execute(select(models.repositories)).mappings().all()
    assert [dict(row) for row in missed] == [
        {"source": "github", "repository": "Octo/Repo", "missed_at": at(LATE), "seen_at": at(LATE)}
    ]


def test_without_a_miss_no_repository_is_noted(engine):
    record(engine, 1, github(Q))
    record(engine, LATE, polled(Q))
    with db.reading(engine) as connection:
        assert connection.execute(select(models.repositories)).all() == []


def test_a_push_that_comes_after_the_poll_is_no_change(engine):
    record(engine, 1, github(Q))
    record(engine, LATE, polled(P))
    record(engine, LATE + 1, github(P))
    assert (source(engine)["changes_pushed"], source(engine)["missed_pushes"]) == (1, 1)


def test_a_source_without_webhook_secret_misses_nothing(engine):
    miss(engine, 1)
    record(engine, 2 * LATE, polled(C, when=2 * LATE))
    assert (source(engine)["polls"], source(engine)["missed_pushes"]) == (2, 0)
    listen(engine, "github", now=3 * LATE)
    record(engine, 4 * LATE, polled(Q, 2, 4 * LATE))
    assert source(engine)["missed_pushes"] == 1
    listen(engine, now=5 * LATE)
    record(engine, 6 * LATE, polled(C, 2, 6 * LATE))
    assert source(engine)["missed_pushes"] == 1


def test_what_was_over_before_we_listened_is_history(engine):
    listen(engine, "github", now=50)
    record(engine, LATE, polled(C, 1, when=49), polled(C, 2, when=51))
    assert source(engine)["missed_pushes"] == 1


def test_a_build_that_only_a_request_named_is_never_missed(engine):
    listen(engine, "github")
    known = platforms.Source("github", "github", "https://api.github.com")
    db.as_writer(engine, lambda write: builds.named(write, "github:Octo:Repo:1", known, at(1)))
    record(engine, LATE, polled(P))
    record(engine, LATE + 20, polled(C, when=LATE + 20))
    assert (source(engine)["polls"], source(engine)["missed_pushes"]) == (2, 0)


def test_a_poll_that_told_nothing_new_is_a_poll_and_one_that_failed_is_none(engine):
    record(engine, 1, github(Q))
    record(engine, LATE, builds.Unchanged("github:1"), builds.PollFailed("github:1", "away", "unavailable"))
    row = source(engine)
    assert (row["polls"], row["missed_pushes"], row["last_poll_at"]) == (1, 0, at(LATE))


def test_an_end_that_we_set_ourselves_is_no_missed_push(engine):
    record(engine, 1, github(Q))
    record(engine, LATE, polled(State.FAILED, ours=True))
    assert (source(engine)["polls"], source(engine)["missed_pushes"]) == (0, 0)


def test_a_poll_that_a_push_asked_for_is_no_missed_push(engine):
    record(engine, 1, gitlab(C, 1, {1: "completed"}))
    (asked,) = record(engine, 200, gitlab(P, 200, None))
    assert asked.ask
    (told,) = record(engine, 201, gitlab(P, 200, None, by="poll"))
    assert told.moved
    assert not told.missed
    assert source(engine, "gitlab")["missed_pushes"] == 0


def test_the_share_follows_the_last_two_hundred_changes(engine):
    record(engine, 1, github(Q))
    for n in range(1, 400):
        record(engine, n, github(Q, run=n + 1))
    miss(engine, 1000, 500)
    assert source(engine)["push_share"] == pytest.approx(1 - 1 / 200)
    record(engine, 501, *[github(Q, run=n) for n in range(2000, 2050)])
    assert source(engine)["push_share"] == pytest.approx(1 - (1 / 200) * (1 - 1 / 200) ** 50)


def test_admins_are_told_once_that_a_source_is_deaf_and_once_that_it_hears_again(engine):
    record(engine, 1, github(Q, run=50))
    for run in range(1, 5):
        miss(engine, run)
    assert notices(engine) == []
    miss(engine, 5)
    miss(engine, 6)
    (told,) = notices(engine)
    assert (told["kind"], told["subject"]) == ("source.deaf", "github")
    assert "the last push came at 2026-11-01T12:00:01" in told["text"]
    assert source(engine)["deaf_since"] == at(LATE)
    record(engine, 300, github(P))
    record(engine, 301, github(C))
    assert [one["kind"] for one in notices(engine)] == ["source.deaf", "source.hears"]
    assert source(engine)["deaf_since"] is None
    for run in range(10, 15):
        miss(engine, run, 400)
    assert [one["kind"] for one in notices(engine)] == ["source.deaf", "source.hears", "source.deaf"]


def test_a_push_between_ends_the_row(engine):
    record(engine, 1, github(Q, run=50))
    for run in range(1, 9):
        miss(engine, run)
        if run == 4:
            record(engine, LATE, github(P, run=50))
    assert notices(engine) == []
    assert source(engine)["missed_in_row"] == 4


# ---- our absence -----------------------------------------------------------------------------


def live(engine, now, started=0):
    return db.as_writer(engine, lambda write: health.alive(write.connection, at(started), at(now)))


def test_an_absence_of_more_than_a_minute_is_told_from_when_to_when(engine):
    assert [live(engine, 0), live(engine, 15), live(engine, 77, started=75)] == [None, None, None]
    assert live(engine, 140, started=138) == health.Absence(at(77), at(138))
    assert live(engine, 155, started=138) is None
    (told,) = notices(engine)
    assert told["kind"] == "relay.was_down"
    assert "from 2026-11-01T12:01:17" in told["text"]
    assert "(61 s)" in told["text"]
    with db.reading(engine) as connection:
        assert health.last_absence(connection) == health.Absence(at(77), at(138))


def test_a_sweep_that_only_comes_late_is_no_absence(engine):
    live(engine, 0)
    assert live(engine, 3600) is None


def test_a_clock_that_was_put_back_is_no_absence(engine):
    live(engine, 1000, started=1000)
    assert live(engine, 100, started=100) is None
    assert live(engine, 1010, started=100) is None
    assert notices(engine) == []


def test_what_was_missed_while_we_were_away_makes_nobody_deaf(engine):
    record(engine, 1, github(Q, run=50))
    live(engine, 2)
    live(engine, 1000, started=1000)
    for run in range(1, 9):
        record(engine, 1001, polled(Q, run, when=500))
    assert source(engine)["missed_pushes"] == 8
    assert notices(engine, "source.deaf") == []


# ---- answers that make GitLab mute its hook --------------------------------------------------


def refuse(engine, now=1):
    db.in_transaction(engine, lambda connection: health.refused(connection, "gitlab", 401, at(now)))


def test_admins_are_told_before_gitlab_mutes_the_hook(engine):
    refuse(engine)
    refuse(engine)
    assert notices(engine) == []
    refuse(engine)
    refuse(engine)
    (told,) = notices(engine)
    assert (told["kind"], told["subject"]) == ("source.hook_at_risk", "gitlab")


def test_a_push_that_is_taken_ends_the_row_of_refusals(engine):
    for _ in range(3):
        refuse(engine)
        refuse(engine)
        record(engine, 2, gitlab(P, 2, {1: "in_progress"}))
    assert notices(engine) == []


def test_a_wrong_clock_is_told_once_an_hour_and_source(engine):
    def tell(now, age_seconds, of="gitlab"):
        db.in_transaction(engine, lambda held: health.tell_clock_off(held, of, age_seconds, at(now)))

    tell(0, 400)
    tell(1, -7200)
    tell(3599, 400)
    tell(5, -7200.4, of="gitlab-2")
    tell(3601, 500)
    told = notices(engine, "source.clock_off")
    assert [(one["subject"], one["created_at"]) for one in told] == [
        ("gitlab", at(0)), ("gitlab-2", at(5)), ("gitlab", at(3601)),
    ]  # fmt: skip
    assert "its time is 400 s behind our clock" in told[0]["text"]
    assert "its time is 7200 s ahead of our clock" in told[1]["text"]


def test_pauses_leave_the_counters_alone(engine):
    record(engine, 1, github(Q))
    pause = budget.Pause("github", at(60), "rate_limited", "")
    db.as_writer(engine, lambda write: budget.apply(write, pause, at(1)))
    assert (source(engine)["pushes"], source(engine)["paused_until"]) == (1, at(60))
    db.as_writer(engine, lambda write: budget.clear(write, "github", at(61)))
    assert (source(engine)["pushes"], source(engine)["paused_until"]) == (1, None)


def test_a_group_of_pushes_costs_one_more_statement_per_source(engine):
    statements = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(_connection, _cursor, statement, *_more):
        statements.append(statement)

    record(engine, 1, *[github(Q, run=n) for n in range(20)], gitlab(P, 1, {1: "in_progress"}))
    assert sum("INSERT INTO sources" in statement for statement in statements) == 2
