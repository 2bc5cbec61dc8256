"""When a build is polled: the pure rules over its polling columns (spec section 10).

A build is due when `next_poll_at` has come; None means never.  `polling` is one of

* `idle`: not polled in this attempt, pushes have kept it fresh so far
* `requested`: somebody asked for it, the first poll is to come
* `active`: polled
* `done`: it has ended
* `stopped`: by hand
* `timeout`, `error`: we gave up

A push moves the next poll out by the freshness window and starts the clock of
`max_poll_seconds` anew; so with all pushes present not one poll is made inside that window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

WAITING_FACTOR = 20
"""A build that waits for a person or a date is polled this many times more slowly."""

MOST_BACKOFF_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Pace:
    """The settings of polling, in seconds."""

    interval_seconds: float
    freshness_seconds: float
    max_seconds: float
    max_errors: int
    multiplier: float
    heartbeat_timeout_seconds: float = 90.0


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
        "doubtful": ask,
        "poll_deadline_at": _deadline(build, now, pace),
        "next_poll_at": due if ask else _not_while_fresh(build, due, pace),
    }


def _deadline(build: Columns, now: datetime, pace: Pace) -> datetime | None:
    """When polling gives up; while a person is awaited no clock runs, it begins when the build goes on."""
    if build["waiting"]:
        return None
    deadline: datetime | None = build["poll_deadline_at"]
    return deadline or now + timedelta(seconds=pace.max_seconds)


def _not_while_fresh(build: Columns, due: datetime, pace: Pace) -> datetime:
    """`due`, but not before the freshness of the last push is over: it may have come while we read."""
    last_push: datetime | None = build["last_push_at"]
    return due if last_push is None else max(due, last_push + timedelta(seconds=pace.freshness_seconds))


def after_error(build: Columns, now: datetime, pace: Pace, message: str, fault: str) -> dict[str, Any]:
    """Changes after a poll that failed; `polling` becomes `error` when it was one too many."""
    errors = build["consecutive_errors"] + 1
    gives_up = errors >= pace.max_errors
    due = now + timedelta(seconds=_backoff(build, errors, pace))
    if not build["doubtful"]:
        due = _not_while_fresh(build, due, pace)
    return {
        "polling": "error" if gives_up else "active",
        "poll_count": build["poll_count"] + 1,
        "last_poll_at": now,
        "consecutive_errors": errors,
        "poll_error": message,
        "poll_fault": fault,
        "poll_deadline_at": _deadline(build, now, pace),
        "next_poll_at": None if gives_up else due,
    }


def _backoff(build: Columns, errors: int, pace: Pace) -> float:
    """Seconds to wait after so many failures in a row: an hour at most, never less than without failure."""
    usual = interval(build, pace)
    try:
        wait = usual * pace.multiplier**errors
    except OverflowError:
        wait = MOST_BACKOFF_SECONDS
    return max(usual, min(wait, MOST_BACKOFF_SECONDS))


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
