"""When a build is polled: the pure rules, as tables."""

from datetime import timedelta

import pytest

from tests.facts import NOON, PACE, at
from webhook_app import polling
from webhook_app.polling import WAITING_FACTOR, Pace

SLOW = PACE.interval_seconds * WAITING_FACTOR


def build(**more):
    """The polling columns of a build that runs, with what matters said."""
    return polling.fresh_attempt() | {
        "platform": "github", "waiting": False, "last_push_at": None, "last_poll_at": None, **more
    }  # fmt: skip


# ---- after a push


@pytest.mark.parametrize(
    ("known", "ask", "seconds"),
    [
        ({}, False, 60),
        ({"next_poll_at": at(5)}, False, 60),
        ({"polling": "active", "next_poll_at": at(5)}, False, 60),
        ({"waiting": True}, False, SLOW),
        ({"platform": "script"}, False, 90),
        ({}, True, 0),
        ({"waiting": True}, True, 0),
        ({"doubtful": True, "next_poll_at": at(5)}, False, 5),
        ({"doubtful": True, "next_poll_at": at(500)}, False, 60),
        ({"polling": "requested", "next_poll_at": at(0)}, False, 0),
    ],
)
def test_a_push_sets_the_next_poll(known, ask, seconds):
    changes = polling.after_push(build(**known), NOON, PACE, ask=ask)
    assert changes["next_poll_at"] == at(seconds)
    assert changes["last_push_at"] == NOON


def test_a_push_takes_errors_and_the_deadline_away():
    known = build(polling="active", consecutive_errors=2, poll_error="x", poll_deadline_at=at(9))
    changes = polling.after_push(known, NOON, PACE, ask=False)
    assert (changes["consecutive_errors"], changes["poll_error"], changes["poll_deadline_at"]) == (
        0,
        None,
        None,
    )
    assert "polling" not in changes


@pytest.mark.parametrize("over", ["timeout", "error", "done"])
def test_a_push_revives_what_was_given_up_or_over(over):
    assert polling.after_push(build(polling=over), NOON, PACE, ask=False)["polling"] == "idle"


@pytest.mark.parametrize("ask", [False, True])
def test_a_push_starts_no_polling_that_was_stopped_by_hand(ask):
    assert polling.after_push(build(polling="stopped"), NOON, PACE, ask=ask) == {"last_push_at": NOON}


@pytest.mark.parametrize(
    ("before", "ask", "after"), [(False, False, False), (False, True, True), (True, False, True)]
)
def test_only_a_poll_ends_a_doubt(before, ask, after):
    assert polling.after_push(build(doubtful=before), NOON, PACE, ask=ask)["doubtful"] is after


# ---- after a poll


@pytest.mark.parametrize(
    ("known", "ask", "seconds"),
    [
        ({}, False, 15),
        ({"waiting": True}, False, SLOW),
        ({"last_push_at": at(-60)}, False, 15),
        ({"last_push_at": at(-1)}, False, 59),
        ({"last_push_at": at(-50)}, False, 15),
        ({"last_push_at": at(-1)}, True, 15),
        ({"last_push_at": at(-1), "waiting": True}, False, SLOW),
    ],
)
def test_a_poll_sets_the_next_one_but_not_while_a_push_is_fresh(known, ask, seconds):
    changes = polling.after_poll(build(**known), NOON, PACE, ask=ask)
    assert changes["next_poll_at"] == at(seconds)
    assert changes["doubtful"] is ask


def test_a_poll_counts_and_forgets_errors():
    changes = polling.after_poll(
        build(poll_count=4, consecutive_errors=3, poll_error="x"), NOON, PACE, ask=False
    )
    assert (changes["poll_count"], changes["consecutive_errors"], changes["poll_error"]) == (5, 0, None)
    assert changes["last_poll_at"] == NOON


@pytest.mark.parametrize(
    ("known", "deadline"),
    [
        ({}, at(3600)),
        ({"poll_deadline_at": at(7)}, at(7)),
        ({"waiting": True}, None),
        ({"waiting": True, "poll_deadline_at": at(-7)}, None),
    ],
)
def test_the_deadline_is_counted_from_the_first_poll_and_not_while_a_person_is_awaited(known, deadline):
    assert polling.after_poll(build(**known), NOON, PACE, ask=False)["poll_deadline_at"] == deadline
    assert polling.after_error(build(**known), NOON, PACE, "x", "unavailable")["poll_deadline_at"] == deadline


@pytest.mark.parametrize(
    ("known", "overdue"),
    [
        ({}, False),
        ({"poll_deadline_at": at(1)}, False),
        ({"poll_deadline_at": at(0)}, True),
        ({"poll_deadline_at": at(-1)}, True),
        ({"poll_deadline_at": at(-1), "waiting": True}, False),
    ],
)
def test_overdue(known, overdue):
    assert polling.overdue(build(**known), NOON) is overdue


# ---- after a failed poll


@pytest.mark.parametrize(
    ("errors", "known", "pace", "seconds"),
    [
        (0, {}, {}, 30),
        (1, {}, {}, 60),
        (5, {}, {}, 960),
        (8, {}, {}, 3600),
        (900, {}, {"multiplier": 10}, 3600),
        (998, {}, {"multiplier": 10.0}, 3600),
        (3, {}, {"multiplier": 1}, 15),
        (0, {"waiting": True}, {}, 2 * SLOW),
        (9, {"waiting": True}, {}, 3600),
        (0, {}, {"interval_seconds": 7200.0}, 7200),
        (0, {"last_push_at": at(-5)}, {}, 55),
        (3, {"last_push_at": at(-5)}, {}, 240),
        (0, {"last_push_at": at(-5), "doubtful": True}, {}, 30),
    ],
)
def test_the_wait_grows_with_each_failure_and_is_never_shorter_than_without(errors, known, pace, seconds):
    patient = Pace(**{**as_dict(PACE), "max_errors": 1000, **pace})
    changes = polling.after_error(
        build(consecutive_errors=errors, **known), NOON, patient, "boom", "unavailable"
    )
    assert changes["next_poll_at"] == at(seconds)
    assert (changes["polling"], changes["consecutive_errors"], changes["poll_error"]) == (
        "active", errors + 1, "boom",
    )  # fmt: skip


def as_dict(pace):
    return {name: getattr(pace, name) for name in pace.__slots__}


@pytest.mark.parametrize(("errors", "gives_up"), [(0, False), (1, False), (2, True), (7, True)])
def test_one_failure_too_many_ends_the_polling(errors, gives_up):
    changes = polling.after_error(build(consecutive_errors=errors), NOON, PACE, "boom", "unavailable")
    assert (changes["polling"] == "error", changes["poll_count"]) == (gives_up, 1)
    assert (changes["next_poll_at"] - NOON >= timedelta(hours=1)) == gives_up


@pytest.mark.parametrize(("errors", "hours"), [(2, 1), (3, 2), (6, 16), (7, 24), (5000, 24)])
def test_a_build_that_polling_gave_up_on_is_read_ever_more_slowly_but_never_forgotten(errors, hours):
    known = build(consecutive_errors=errors, polling="error")
    changes = polling.after_error(known, NOON, PACE, "boom", "unavailable")
    assert (changes["polling"], changes["next_poll_at"]) == ("error", NOON + timedelta(hours=hours))


def test_one_that_polling_gave_up_on_says_why_until_a_read_works():
    known = build(consecutive_errors=7, polling="error", poll_error="x", poll_fault="unavailable")
    assert polling.stopped_because(known) == "polling stopped after 7 errors: x"
    read = known | {"polling": "active"} | polling.after_poll(known, NOON, PACE, ask=False)
    assert (polling.stopped_because(read), read["consecutive_errors"], read["poll_error"]) == (None, 0, None)


# ---- asked for, stopped, ended


@pytest.mark.parametrize("before", ["idle", "active", "stopped", "timeout", "error"])
def test_a_request_is_due_at_once_and_counts_anew(before):
    known = build(polling=before, poll_count=9, consecutive_errors=3, poll_error="x", poll_deadline_at=at(-1))
    asked = known | polling.request(NOON)
    assert (asked["polling"], asked["next_poll_at"], asked["requested"]) == ("requested", NOON, True)
    assert (asked["poll_count"], asked["consecutive_errors"], asked["poll_deadline_at"]) == (0, 0, None)
    assert polling.is_polling(asked)


def test_stopped_is_never_due():
    stopped = build(polling="active", requested=True, next_poll_at=at(5)) | polling.stop()
    assert stopped["next_poll_at"] is None
    assert not polling.is_polling(stopped)
    assert not stopped["requested"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("idle", "done"), ("requested", "done"), ("active", "done"), ("done", "done"),
        ("stopped", "stopped"), ("timeout", "timeout"), ("error", "error"),
    ],
)  # fmt: skip
def test_what_has_ended_is_never_due_and_remembers_why_polling_ended(before, after):
    over = build(polling=before, next_poll_at=NOON, poll_deadline_at=NOON, doubtful=True, requested=True)
    over |= polling.ended(over)
    assert (over["polling"], over["next_poll_at"], over["poll_deadline_at"]) == (after, None, None)
    assert not over["doubtful"]
    assert not over["requested"]


@pytest.mark.parametrize(
    ("known", "polled"),
    [("idle", False), ("requested", True), ("active", True), ("done", False), ("stopped", False),
     ("timeout", False), ("error", False)],
)  # fmt: skip
def test_is_polling(known, polled):
    assert polling.is_polling(build(polling=known)) is polled


# ---- why


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({}, "not_yet_due"),
        ({"last_push_at": at(-59)}, "recent_push"),
        ({"last_push_at": at(-60)}, "not_yet_due"),
        ({"polling": "active"}, "no_recent_push"),
        ({"polling": "active", "last_push_at": at(-60)}, "no_recent_push"),
        ({"polling": "active", "last_push_at": at(-1)}, "recent_push"),
        ({"polling": "requested", "requested": True}, "requested"),
        ({"polling": "active", "requested": True, "last_push_at": at(-1)}, "requested"),
        ({"polling": "stopped"}, "stopped_by_hand"),
        ({"polling": "timeout"}, "gave_up"),
        ({"polling": "error"}, "too_many_errors"),
        ({"polling": "done"}, "build_ended"),
    ],
)
def test_the_reason_is_one_word(known, reason):
    assert polling.reason(build(**known), NOON, PACE) == reason


def test_with_all_pushes_present_no_poll_is_ever_due_before_its_push():
    """A push every 59 s for a day: at none of these moments a poll is due."""
    known, now = build(), NOON
    for _ in range(1464):
        assert known["next_poll_at"] is None or known["next_poll_at"] > now
        known |= polling.after_push(known, now, PACE, ask=False)
        now += timedelta(seconds=59)


# ---- after an end of ours

OVER = {"state": "timeout", "told_state": "in_progress", "ended_at": NOON, "polling": "timeout"}


@pytest.mark.parametrize(
    ("reads", "seconds"), [(0, 60), (1, 120), (2, 240), (10, 61_440), (11, 86_400), (5000, 86_400)]
)
def test_what_we_ended_is_read_on_ever_more_slowly(reads, seconds):
    changes = polling.read_on(build(**OVER, reads_after_end=reads), NOON, PACE)
    assert (changes["next_poll_at"], changes["reads_after_end"]) == (at(seconds), reads + 1)
    assert (changes["polling"], changes["requested"]) == ("timeout", False)


def test_it_is_read_on_as_long_as_retention_holds_it():
    late = NOON + timedelta(seconds=PACE.retention_seconds - 30)
    assert polling.read_on(build(**OVER), late, PACE)["next_poll_at"] is None
    assert polling.read_on(build(**OVER), late - timedelta(seconds=60), PACE)["next_poll_at"] is not None


def test_what_was_stopped_by_hand_is_not_read_on():
    assert polling.read_on(build(**OVER | {"polling": "stopped"}), NOON, PACE)["next_poll_at"] is None


@pytest.mark.parametrize(
    ("missing_for", "fault", "goes_on"),
    [(None, "not_found", True), (86_399, "not_found", True), (86_400, "not_found", False),
     (86_400, "unavailable", True), (None, "unavailable", True)],
)  # fmt: skip
def test_what_is_not_found_for_a_day_is_not_read_any_more(missing_for, fault, goes_on):
    known = build(**OVER, missing_since=None if missing_for is None else at(-missing_for))
    changes = polling.after_late_error(known, NOON, PACE, "HTTP 404", fault)
    assert (changes["next_poll_at"] is not None) is goes_on
    assert (changes["poll_error"], changes["poll_fault"]) == ("HTTP 404", fault)


@pytest.mark.parametrize(("due", "soon"), [(at(30), at(30)), (at(5000), at(60)), (None, at(60))])
def test_a_push_about_what_we_ended_never_puts_its_next_read_off(due, soon):
    known = build(**OVER, next_poll_at=due, reads_after_end=9, missing_since=at(-5))
    changes = polling.after_late_push(known, NOON, PACE)
    assert (changes["next_poll_at"], changes["last_push_at"], changes["missing_since"]) == (soon, NOON, None)
    for more in ({"platform": "script"}, {"polling": "stopped"}):
        assert polling.after_late_push(known | more, NOON, PACE)["next_poll_at"] == due


def test_a_push_ends_what_was_missing():
    known = build(missing_since=at(-4000), poll_fault="not_found")
    assert polling.after_push(known, NOON, PACE, ask=False)["missing_since"] is None


@pytest.mark.parametrize(
    ("found", "named"),
    [({}, True), ({"raw_status": "queued"}, False), ({"last_push_at": NOON}, False), ({"requested": False}, False),
     ({"state": "failed"}, False)],
)  # fmt: skip
def test_a_build_is_only_named_until_anybody_speaks_of_it_or_it_is_over(found, named):
    known = {"requested": True, "raw_status": None, "last_push_at": None, "state": "queued"}
    assert polling.is_only_named(build(**known | found)) is named


def test_a_build_that_was_given_up_gets_as_long_again_as_it_has_taken():
    known = build(state="in_progress", started_at=at(-7000), created_at=at(-7100), reads_after_end=1)
    assert polling.after_poll(known, NOON, PACE, ask=False)["poll_deadline_at"] == at(7000)
    young = known | {"started_at": at(-10)}
    assert polling.after_poll(young, NOON, PACE, ask=False)["poll_deadline_at"] == at(PACE.max_seconds)


# ---- not found


@pytest.mark.parametrize(("missing_for", "gone"), [(0, False), (599, False), (600, True)])
def test_a_build_is_gone_after_ten_minutes_without_it(missing_for, gone):
    missing = build(poll_fault="not_found", missing_since=at(-missing_for))
    assert polling.is_gone(missing, NOON) is gone
    assert not polling.is_gone(missing | {"poll_fault": "unavailable"}, NOON)


def test_a_missing_build_is_not_given_up_before_it_may_be_gone_and_read_when_it_is():
    known = build(consecutive_errors=PACE.max_errors, missing_since=at(-590), poll_fault="not_found")
    changes = polling.after_error(known, NOON, PACE, "HTTP 404", "not_found")
    assert (changes["polling"], changes["next_poll_at"]) == ("active", at(10))
    changes = polling.after_error(known | {"missing_since": at(-600)}, NOON, PACE, "HTTP 404", "not_found")
    assert changes["polling"] == "error"
    assert polling.after_poll(known | {"started_at": None}, NOON, PACE, ask=False)["missing_since"] is None


def test_a_build_that_polling_gave_up_on_stays_so_while_it_is_missing():
    known = build(consecutive_errors=7, polling="error")
    changes = polling.after_error(known, NOON, PACE, "HTTP 404", "not_found")
    assert (changes["polling"], changes["next_poll_at"]) == ("error", NOON + polling.GONE_AFTER)
