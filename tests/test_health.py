"""Push health: what counts as a missed push, when a source is deaf, and what we say about our absence."""

import pytest
from sqlalchemy import insert, select

from tests.facts import PACE, at, github, gitlab
from webhook_app import budget, builds, bulk, db, health, models, platforms
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


# ---- pushes that were only late --------------------------------------------------------------


def missed_at(engine):
    """Of the only repository of these tests."""
    with db.reading(engine) as connection:
        return connection.execute(select(models.repositories.c.missed_at)).scalar()


def counts(engine):
    row = source(engine)
    return row["missed_pushes"], row["late_pushes"], row["changes_polled"], row["changes_pushed"]


@pytest.mark.parametrize("after", [0, 1, 59.9])
def test_a_push_that_comes_soon_after_the_poll_was_late_and_not_missed(engine, after):
    record(engine, 1, github(Q))
    record(engine, LATE, polled(P))
    assert counts(engine) == (1, 0, 1, 1)
    assert (missed_at(engine), source(engine)["push_share"]) == (at(LATE), 0.5)
    record(engine, LATE + after, github(P))
    assert counts(engine) == (0, 1, 1, 1)
    assert (missed_at(engine), source(engine)["push_share"]) == (None, 1.0)
    record(engine, LATE + after, github(P))
    assert counts(engine) == (0, 1, 1, 1), "once"


@pytest.mark.parametrize(
    ("after", "push"),
    [(60, github(P)), (1, github(Q)), (1, github(P, run=2)), (1, github(None)), (1, github(P, attempt=2))],
    ids=["later", "an earlier state", "another build", "no state", "another attempt"],
)
def test_another_push_leaves_the_missed_one_missed(engine, after, push):
    record(engine, 1, github(Q))
    record(engine, LATE, polled(P))
    record(engine, LATE + after, push)
    assert counts(engine)[:3] == (1, 0, 1)
    assert missed_at(engine) == at(LATE)


def test_a_push_of_a_platform_without_attempts_may_be_late_as_well(engine):
    record(engine, 1, gitlab(Q, 1, {1: "queued"}))
    record(engine, LATE, gitlab(P, LATE, None, by="poll"))
    assert source(engine, "gitlab")["missed_pushes"] == 1
    record(engine, LATE + 1, gitlab(P, LATE, {1: "in_progress"}))
    row = source(engine, "gitlab")
    assert (row["missed_pushes"], row["late_pushes"]) == (0, 1)


def test_a_push_that_we_had_to_ask_for_was_missed(engine):
    record(engine, 1, github(Q), github(Q, run=2))
    record(engine, LATE, polled(P), polled(P, 2))
    asked = {"source": "github", "hook_id": "1", "guid": "g", "asked_at": at(LATE + 5)}
    looking = {"source": "github", "repository": "Octo/Repo", "next_look_at": at(LATE + 180)}
    db.as_writer(engine, lambda write: write.connection.execute(insert(models.hooks), looking))
    record(engine, LATE + 6, github(P))
    db.as_writer(engine, lambda write: write.connection.execute(models.hooks.delete()))
    db.as_writer(engine, lambda write: write.connection.execute(insert(models.redeliveries), asked))
    record(engine, LATE + 6, github(P, run=2))
    assert counts(engine)[:2] == (2, 0)
    assert missed_at(engine) == at(LATE)


def test_a_repository_keeps_the_time_of_the_miss_that_is_left(engine):
    record(engine, 1, *[github(Q, run=run) for run in (1, 2, 3)])
    for run in (1, 2, 3):
        record(engine, LATE + run, polled(P, run))
    record(engine, LATE + 10, github(P, run=3))
    assert missed_at(engine) == at(LATE + 2)
    record(engine, LATE + 10, github(P, run=1))
    assert missed_at(engine) == at(LATE + 2)
    record(engine, LATE + 10, github(P, run=2))
    assert missed_at(engine) is None


def test_while_every_push_is_taken_at_once_no_missed_change_is_looked_for(engine, monkeypatch):
    monkeypatch.setattr(health, "_count_late", None)
    record(engine, 1, github(Q), github(Q))
    record(engine, LATE, polled(P))
    record(engine, LATE + 60, github(P))


def test_missed_changes_are_forgotten_after_an_hour(engine):
    record(engine, 1, github(Q))
    record(engine, LATE, polled(P))
    for after, left in ((3600, 1), (3601, 0)):
        review(engine, LATE + after)
        with db.reading(engine) as connection:
            assert len(connection.execute(select(models.missed_changes)).all()) == left
    assert counts(engine)[:2] == (1, 0)


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


# ---- gone and back ---------------------------------------------------------------------------


def review(engine, now):
    """What the sweep does."""
    db.as_writer(engine, lambda write: health.review(write.connection, at(now)))


def kinds(engine):
    return [one["kind"].removeprefix("source.") for one in notices(engine)]


def goes_deaf(engine):
    """Five misses in a row, and the last push 99 s ago."""
    record(engine, 1, github(Q, run=50))
    for run in range(1, 6):
        miss(engine, run)


def test_admins_are_told_once_that_pushes_are_gone_and_once_that_they_are_back(engine):
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
    record(engine, 300, github(P, run=50))
    record(engine, 301, github(C, run=50))
    assert source(engine)["deaf_since"] == at(LATE), "two pushes may be chance"
    record(engine, 302, github(Q, run=51))
    record(engine, 303, github(P, run=51))
    assert kinds(engine) == ["deaf", "hears"]
    assert source(engine)["deaf_since"] is None


def test_pushes_are_not_gone_within_a_minute_of_the_last_one(engine):
    """However many changes one round of polls brings."""
    record(engine, 50, github(Q, run=50))
    for run in range(1, 30):
        miss(engine, run)
    assert notices(engine) == []
    review(engine, 109.9)
    assert notices(engine) == []
    review(engine, 110)
    assert kinds(engine) == ["deaf"]
    review(engine, 111)
    assert kinds(engine) == ["deaf"]


def test_where_no_push_ever_came_the_minute_counts_from_when_we_listened(engine):
    listen(engine, "github", now=50)
    for run in range(1, 9):
        miss(engine, run)
    assert notices(engine) == []
    review(engine, 110)
    (told,) = notices(engine)
    assert "no push ever came" in told["text"]


def test_pushes_are_not_back_within_a_minute(engine):
    goes_deaf(engine)
    record(engine, LATE + 1, *[github(Q, run=run) for run in range(60, 70)])
    assert kinds(engine) == ["deaf"]
    review(engine, LATE + 59)
    assert kinds(engine) == ["deaf"]
    review(engine, LATE + 60)
    assert kinds(engine) == ["deaf", "hears"]


def test_pushes_between_many_misses_do_not_bring_a_source_back(engine):
    goes_deaf(engine)
    for turn in range(6):
        now = 200 + 10 * turn
        record(engine, now, github(Q, run=100 + turn))
        for run in range(5):
            miss(engine, 1000 + 10 * turn + run, now + 5)
    assert kinds(engine) == ["deaf"]


def test_late_pushes_bring_a_source_back_as_well(engine):
    goes_deaf(engine)
    for turn in range(3):
        miss(engine, 100 + turn, 200 + turn)
        record(engine, 203 + turn, github(Q, run=100 + turn))
    assert kinds(engine) == ["deaf", "hears"]


def test_gone_and_back_are_told_at_most_once_in_five_minutes(engine):
    goes_deaf(engine)
    record(engine, 200, *[github(Q, run=run) for run in range(60, 64)])
    assert kinds(engine) == ["deaf", "hears"]
    for run in range(70, 80):
        miss(engine, run, 300)
    review(engine, 499)
    assert kinds(engine) == ["deaf", "hears"]
    review(engine, 500)
    assert kinds(engine) == ["deaf", "hears", "deaf"]


def test_a_busy_machine_where_each_poll_comes_before_its_push_makes_no_notice(engine):
    """55 s of the endless demo (5 s of freshness): thirty builds change, polled at once, pushed 3 s later."""
    listen(engine, "github")
    record(engine, LATE, *[github(Q, run=run) for run in range(1, 31)])
    late = []
    for turn in range(11):
        now = LATE + 6 + 5 * turn
        fresh = [polled(Q, 1000 + 10 * turn + n, now) for n in range(10)]
        record(engine, now, *fresh)
        record(engine, now + 3, *late)
        late = [github(Q, run=1000 + 10 * turn + n) for n in range(10)]
        assert source(engine)["missed_pushes"] <= 20
    record(engine, LATE + 70, *late)
    assert notices(engine) == []
    assert counts(engine)[:3] == (0, 110, 110)
    assert source(engine)["push_share"] == pytest.approx(1.0)


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
        db.in_transaction(engine, lambda held: health.note_clock_off(held, of, age_seconds, at(now)))

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


def test_a_group_of_pushes_costs_two_more_statements_per_source(engine, monkeypatch):
    statements, fetch = [], bulk.fetch
    monkeypatch.setattr(bulk, "fetch", lambda *asked: statements.append(asked[1]) or fetch(*asked))
    record(engine, 1, *[github(Q, run=n) for n in range(20)], gitlab(P, 1, {1: "in_progress"}))
    assert sum("INSERT INTO sources" in statement for statement in statements) == 2
    assert sum("INSERT INTO histograms" in statement for statement in statements) == 1, "no time, no delay"
