"""What a token may still ask: the reckoning, as tables and as an hour in a few lines."""

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.facts import NOON, at
from webhook_app import budget
from webhook_app.budget import Ledger, Spent
from webhook_app.platforms import Limits, Manners, PollError, PollFault

MANNERS = Manners(at_once=1, per_minute=3600, free_unchanged=True, lists_changes=False)
RESERVE = 0.1


def told(remaining, reset_seconds=3600, limit=5000, **more):
    """A ledger just after an answer that told these limits."""
    return replace(
        Ledger(NOON, limit=limit, remaining=remaining, reset_at=at(reset_seconds), credit=0.0, turns=60.0),
        **more,
    )


@pytest.mark.parametrize(
    ("ledger", "seconds", "allowed"),
    [
        (Ledger(NOON), 0, 10),  # nothing told: only the turns bound it
        (Ledger(NOON), 1, 60),
        (told(5000), 0, 0),
        (told(5000), 8, 10),  # 4500 in 3600 s
        (told(2750), 8, 5),
        (told(500), 3000, 0),  # the reserve is not touched
        (told(100), 3000, 0),
        (told(5000), 1000, 60),  # a burst is bounded by turns,
        (told(5000, price=1.0, turns=600), 1000, 60),
        (told(5000, price=0.1), 8, 60),  # and by the price: nine of ten cost nothing
        (told(5000, price=0.5), 8, 20),
        (told(0), 3600, 60),  # the window is over: we know nothing of the new one yet
    ],
)
def test_how_much_may_be_asked(ledger, seconds, allowed):
    assert budget.allowance(budget.reckoned(ledger, at(seconds), MANNERS, RESERVE)) == allowed


def test_a_clock_that_goes_back_takes_nothing_away():
    ledger = budget.reckoned(told(5000, credit=5.0), at(-100), MANNERS, RESERVE)
    assert (ledger.credit, ledger.turns) == (5.0, 60.0)


def test_what_was_spent_is_charged_and_what_was_told_is_kept():
    before = told(5000, credit=20.0, requests=7, counted=3)
    after = budget.charged(before, Spent(10, 4, Limits(5000, 4000, 600)), at(5))
    assert (after.credit, after.turns, after.requests, after.counted) == (16.0, 50.0, 17, 7)
    assert (after.remaining, after.reset_at) == (4000, at(605))
    assert before.price > after.price > 0.9
    assert budget.charged(before, Spent(), at(5)) == before
    silent = budget.charged(before, Spent(1, 1, None), at(5))
    assert (silent.remaining, silent.reset_at) == (5000, before.reset_at)


@given(
    share=st.floats(0.05, 1.0), wish=st.integers(1, 40), others=st.integers(0, 3), start=st.integers(0, 5000)
)
def test_however_much_is_wished_for_the_reserve_is_left_at_the_end_of_the_hour(share, wish, others, start):
    """`share` of the requests cost budget, others spend some of it as well."""
    remaining, ledger, debt = start, told(start, price=1.0), 0.0
    for second in range(0, 3600, 10):
        now = at(second)
        ledger = budget.reckoned(ledger, now, MANNERS, RESERVE)
        count = min(budget.allowance(ledger), wish * 10)
        debt += count * share
        counted, debt = int(debt), debt - int(debt)
        remaining = max(remaining - counted - others, 0)
        spent = Spent(count, counted, Limits(5000, remaining, 3600 - second))
        ledger = budget.charged(ledger, spent, now)
    assert remaining >= min(start, 500) - 360 * others - 110


def test_all_that_may_be_spent_is_spent_when_much_is_due():
    remaining, ledger = 5000, told(5000)
    for second in range(3600):
        ledger = budget.reckoned(ledger, at(second), MANNERS, RESERVE)
        count = budget.allowance(ledger)
        remaining -= count
        ledger = budget.charged(
            ledger, Spent(count, count, Limits(5000, remaining, 3600 - second)), at(second)
        )
    assert 500 <= remaining < 520


@pytest.mark.parametrize(
    ("ledger", "seconds"),
    [
        (Ledger(NOON), 1),
        (Ledger(NOON, turns=-119), 2),
        (told(5000, credit=1.0), 1),
        (told(5000, credit=-4.0), 4),
        (told(500, credit=0.0), 3600),
        (told(500, credit=0.0, reset_seconds=90), 90),
    ],
)
def test_how_long_until_one_may_be_asked(ledger, seconds):
    assert budget.wait_seconds(ledger, NOON, MANNERS, RESERVE) == pytest.approx(seconds)


def test_limits_hit_in_a_row_double_our_own_patience_and_a_good_read_ends_the_row():
    limited = PollError(PollFault.RATE_LIMITED, "slow down")
    ledger = Ledger(NOON)
    waits = []
    for _ in range(4):
        pause = budget.pause_for("github", limited, NOON, ledger.strikes)
        waits.append((pause.until - NOON) / timedelta(seconds=1))
        ledger = budget.struck(ledger, [limited], worked=True)
    assert waits == [60, 120, 240, 480]
    other = PollError(PollFault.UNAVAILABLE, "down")
    assert budget.struck(ledger, [other], worked=False).strikes == 4
    assert budget.struck(ledger, [other], worked=True).strikes == 0
    as_told = PollError(PollFault.RATE_LIMITED, "slow down", 7.0)
    assert budget.pause_for("github", as_told, NOON, 4).until == at(7)


def test_a_window_just_heard_of_may_be_spent_in_proportion():
    after = budget.charged(Ledger(NOON), Spent(1, 1, Limits(5000, 4000, 600)), NOON)
    assert after.credit == 4000 * budget.BURST_SHARE - 1
    assert budget.charged(after, Spent(1, 1, Limits(5000, 3999, 600)), NOON).credit == after.credit - 1


def test_only_a_large_budget_is_plenty():
    assert budget.has_plenty(told(5000, credit=100.0), RESERVE)
    assert not budget.has_plenty(told(60, limit=60, credit=10.0), RESERVE)
    assert budget.has_plenty(Ledger(NOON), RESERVE)


@pytest.mark.parametrize(
    ("ledger", "rich"),
    [
        (Ledger(NOON), True),
        (told(5000, credit=100.0), True),
        (told(5000, credit=40.0), False),
        (told(500), False),
    ],
)
def test_only_a_rich_lane_asks_what_is_merely_nice_to_know(ledger, rich):
    assert budget.is_rich(ledger, RESERVE) is rich
