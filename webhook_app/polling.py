"""When a build is polled: the pure rules over its polling columns (spec section 10).

A build is due when `next_poll_at` has come; None means never.  `polling` is one of

* `idle`: not polled in this attempt, pushes have kept it fresh so far
* `requested`: somebody asked for it, the first poll is to come
* `active`: polled
* `done`: it has ended
* `stopped`: by hand
* `timeout`, `error`: we gave up; after errors it is still read now and then, ever more slowly

A push moves the next poll out by the freshness window and starts the clock of
`max_poll_seconds` anew; so with all pushes present not one poll is made inside that window.

A build that we ended ourselves (it was given up, or not found) is read on, each time after twice as
long, until the platform tells its end, answers "not found" for a day, or retention no longer holds it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from webhook_app.lifecycle import State
from webhook_app.platforms import PollFault

WAITING_FACTOR = 20
"""A build that waits for a person or a date is polled this many times more slowly."""

MOST_BACKOFF_SECONDS = 3600.0

GONE_AFTER = timedelta(minutes=10)
"""A platform that answers "not found" for less may have an incident."""

GONE_FOR_GOOD_AFTER = timedelta(days=1)
"""A build that is not found for so long is not read any more."""

READ_ON_INTERVALS = 4
"""Poll intervals until a build that we ended ourselves is read again; each time twice as many."""

MOST_READ_ON_SECONDS = 86_400.0

FIRST_RETRY_SECONDS, MOST_RETRY_SECONDS = 3600.0, 86_400.0
"""A build that polling gave up on after errors is read again after so long, each time twice as long."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The settings of polling, in seconds."""

    interval_seconds: float
    freshness_seconds: float
    max_seconds: float
    max_errors: int
    multiplier: float
    heartbeat_timeout_seconds: float = 90.0
    retention_seconds: float = 90 * 86_400.0


Columns = Mapping[str, Any]


def after_push(build: Columns, now: datetime, pace: Pace, *, ask: bool) -> dict[str, Any]:
    """Changes after a push or a report was applied; `ask`: it could not be decided without a poll."""
    if build["polling"] == "stopped":
        return {"last_push_at": now}
    changes: dict[str, Any] = {
        "last_push_at": now,
        "poll_deadline_at": None,
        "consecutive_errors": 0,
        "poll_error": None,
        "poll_fault": None,
        "missing_since": None,
    }
    if build["polling"] in ("timeout", "error", "done"):
        changes["polling"] = "idle"
    due = now if ask else now + timedelta(seconds=_push_wait(build, pace))
    urgent = build["doubtful"] or build["polling"] == "requested"
    if urgent and build["next_poll_at"] is not None:
        due = min(due, build["next_poll_at"])
    return changes | {"next_poll_at": due, "doubtful": ask or build["doubtful"]}


def _push_wait(build: Columns, pace: Pace) -> float:
    if build["platform"] == "script":
        return pace.heartbeat_timeout_seconds
    if build["waiting"]:
        return max(pace.freshness_seconds, pace.interval_seconds * WAITING_FACTOR)
    return pace.freshness_seconds


def after_poll(build: Columns, now: datetime, pace: Pace, *, ask: bool) -> dict[str, Any]:
    """Changes after a poll that told something."""
    due = now + timedelta(seconds=interval(build, pace))
    return {
        "poll_count": build["poll_count"] + 1,
        "last_poll_at": now,
        "consecutive_errors": 0,
        "poll_error": None,
        "poll_fault": None,
        "missing_since": None,
        "doubtful": ask,
        "poll_deadline_at": _deadline(build, now, pace),
        "next_poll_at": due if ask else _not_while_fresh(build, due, pace),
    }


def _deadline(build: Columns, now: datetime, pace: Pace) -> datetime | None:
    """When polling gives up; while a person is awaited no clock runs, it begins when the build goes on."""
    if build["waiting"]:
        return None
    deadline: datetime | None = build["poll_deadline_at"]
    return deadline or now + timedelta(seconds=_allowed_seconds(build, now, pace))


def _allowed_seconds(build: Columns, now: datetime, pace: Pace) -> float:
    """How long polling may go on; a build that was given up before gets as long again as it has taken."""
    if not build["reads_after_end"]:
        return pace.max_seconds
    began: datetime = build["started_at"] or build["created_at"]
    return max(pace.max_seconds, (now - began).total_seconds())


def _not_while_fresh(build: Columns, due: datetime, pace: Pace) -> datetime:
    """`due`, but not before the freshness of the last push is over: it may have come while we read."""
    last_push: datetime | None = build["last_push_at"]
    return due if last_push is None else max(due, last_push + timedelta(seconds=pace.freshness_seconds))


def after_error(build: Columns, now: datetime, pace: Pace, message: str, fault: str) -> dict[str, Any]:
    """Changes after a poll that failed; `polling` becomes `error` when it was one too many.

    The clock of `max_seconds` stands still then: nobody has looked whether the build ended.
    """
    errors = build["consecutive_errors"] + 1
    missing_since = _missing_since(build, now, fault)
    may_be_gone = missing_since is not None and now < missing_since + GONE_AFTER
    had_stopped = build["polling"] == "error"
    gives_up = errors >= pace.max_errors and (had_stopped or not may_be_gone)
    wait = _retry(errors - pace.max_errors) if gives_up else _backoff(build, errors, pace)
    due = now + timedelta(seconds=wait)
    if missing_since is not None and may_be_gone:
        due = min(due, missing_since + GONE_AFTER)
    if not build["doubtful"]:
        due = _not_while_fresh(build, due, pace)
    return {
        "polling": "error" if gives_up else "active",
        "poll_count": build["poll_count"] + 1,
        "last_poll_at": now,
        "consecutive_errors": errors,
        "poll_error": message,
        "poll_fault": fault,
        "missing_since": missing_since,
        "poll_deadline_at": None if gives_up else _deadline(build, now, pace),
        "next_poll_at": due,
    }


def _missing_since(build: Columns, now: datetime, fault: str) -> datetime | None:
    """Since when the platform does not know the build; another failure in between tells nothing of it."""
    known: datetime | None = build["missing_since"]
    return known or (now if fault == PollFault.NOT_FOUND else None)


def is_gone(build: Columns, now: datetime) -> bool:
    """Whether it was "not found" for long enough, its last read included, that it may be deleted."""
    missing_since: datetime | None = build["missing_since"]
    is_missing = missing_since is not None and build["poll_fault"] == PollFault.NOT_FOUND
    return is_missing and missing_since is not None and now >= missing_since + GONE_AFTER


def _backoff(build: Columns, errors: int, pace: Pace) -> float:
    """Seconds to wait after so many failures in a row: an hour at most, never less than without failure."""
    usual = interval(build, pace)
    try:
        wait = usual * pace.multiplier**errors
    except OverflowError:
        wait = MOST_BACKOFF_SECONDS
    return max(usual, min(wait, MOST_BACKOFF_SECONDS))


def _retry(retries: int) -> float:
    """Seconds until the next read of a build that polling gave up on, after so many failed ones since."""
    return min(FIRST_RETRY_SECONDS * float(1 << min(retries, 10)), MOST_RETRY_SECONDS)


def stopped_because(build: Columns) -> str | None:
    """Why nobody watches a build any more, for people; None unless polling gave up on it after errors."""
    if build["polling"] != "error":
        return None
    return f"polling stopped after {build['consecutive_errors']} errors: {build['poll_error']}"


def push_was_due(build: Columns, now: datetime, pace: Pace) -> bool:
    """Should a push have told of a change by now?

    Not of a build that only a request named (its repository may push to nobody), and not shortly after a
    push: then the poll was made because the push left something open.
    """
    last_push: datetime | None = build["last_push_at"]
    if last_push is None:
        return not build["requested"]
    return now - last_push >= timedelta(seconds=pace.freshness_seconds)


def is_polling(build: Columns) -> bool:
    """Is it being polled (or about to be, because somebody asked)?"""
    return build["polling"] in ("requested", "active")


def is_watched(build: Columns, since: datetime) -> bool:
    """Has anybody asked how far it is since then?"""
    return build["watched_at"] is not None and build["watched_at"] > since


def request(now: datetime) -> dict[str, Any]:
    """Changes when somebody asks for polling: due at once, the counts begin anew."""
    return fresh_attempt() | {"polling": "requested", "requested": True, "next_poll_at": now}


def stop() -> dict[str, Any]:
    """Changes when somebody stops the polling of a build, until a new attempt begins."""
    return {"polling": "stopped", "next_poll_at": None, "poll_deadline_at": None, "requested": False}


def interval(build: Columns, pace: Pace) -> float:
    """Seconds between two polls of this build."""
    return pace.interval_seconds * (WAITING_FACTOR if build["waiting"] else 1)


def overdue(build: Columns, now: datetime) -> bool:
    """Has it been polled for longer than allowed, without an end?  Never while a person is awaited."""
    deadline = build["poll_deadline_at"]
    return deadline is not None and now >= deadline and not build["waiting"]


def ended(build: Columns) -> dict[str, Any]:
    """Changes when the build is over and nothing is in doubt: it is never due again."""
    done = build["polling"] if build["polling"] in ("stopped", "timeout", "error") else "done"
    return {
        "polling": done,
        "next_poll_at": None,
        "poll_deadline_at": None,
        "doubtful": False,
        "requested": False,
    }


def is_only_named(build: Columns) -> bool:
    """Whether nobody but a request for polling has spoken of it: then the first word still creates it."""
    never_spoken_of = build["raw_status"] is None and build["last_push_at"] is None
    return bool(build["requested"]) and never_spoken_of and not State(build["state"]).terminal


def was_given_up(build: Columns) -> bool:
    """Whether we ended it ourselves, with the platform's own end still to come."""
    return State(build["state"]).terminal and not State(build["told_state"]).terminal


def read_on(build: Columns, now: datetime, pace: Pace) -> dict[str, Any]:
    """Changes when a build is over by our own word: it is read again, ever more slowly."""
    if build["polling"] == "stopped":
        return ended(build)
    reads = build["reads_after_end"]
    wait = min(_first_wait(pace) * 2.0 ** min(reads, 30), MOST_READ_ON_SECONDS)
    due = now + timedelta(seconds=wait)
    kept_until = (build["ended_at"] or now) + timedelta(seconds=pace.retention_seconds)
    return {
        **ended(build),
        "next_poll_at": due if due < kept_until else None,
        "reads_after_end": reads + 1,
    }


def _first_wait(pace: Pace) -> float:
    return pace.interval_seconds * READ_ON_INTERVALS


def after_late_push(build: Columns, now: datetime, pace: Pace) -> dict[str, Any]:
    """Changes after a push about a build that stays over by our own word: it may live, so it is read soon."""
    due = now + timedelta(seconds=_first_wait(pace))
    known: datetime | None = build["next_poll_at"]
    is_watched = build["platform"] != "script" and build["polling"] != "stopped"
    return {
        "last_push_at": now,
        "missing_since": None,
        "next_poll_at": min(due, known or due) if is_watched else known,
    }


def after_late_error(build: Columns, now: datetime, pace: Pace, message: str, fault: str) -> dict[str, Any]:
    """Changes after a failed read of a build that is over by our own word."""
    missing_since = _missing_since(build, now, fault)
    noted = {
        "poll_count": build["poll_count"] + 1,
        "last_poll_at": now,
        "poll_error": message,
        "poll_fault": fault,
        "missing_since": missing_since,
    }
    is_missing = missing_since is not None and fault == PollFault.NOT_FOUND
    if is_missing and missing_since is not None and now >= missing_since + GONE_FOR_GOOD_AFTER:
        return {**ended(build), **noted}
    return {**read_on(build, now, pace), **noted}


def fresh_attempt() -> dict[str, Any]:
    """Columns of a new build or a new attempt."""
    return {
        "polling": "idle",
        "poll_count": 0,
        "poll_deadline_at": None,
        "next_poll_at": None,
        "consecutive_errors": 0,
        "poll_error": None,
        "poll_fault": None,
        "doubtful": False,
        "requested": False,
        "missing_since": None,
        "reads_after_end": 0,
    }


def reason(build: Columns, now: datetime, pace: Pace) -> str:
    """Why it is, or is not, being polled: one word for `GET /builds/ID/polling`."""
    if build["polling"] in ("stopped", "timeout", "error", "done"):
        return {"stopped": "stopped_by_hand", "timeout": "gave_up", "error": "too_many_errors"}.get(
            build["polling"], "build_ended"
        )
    if build["requested"]:
        return "requested"
    last_push = build["last_push_at"]
    if last_push is not None and now - last_push < timedelta(seconds=pace.freshness_seconds):
        return "recent_push"
    return "no_recent_push" if build["polling"] == "active" else "not_yet_due"
