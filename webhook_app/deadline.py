"""How long the work of this thread may still take: what waits for the store asks here.

A deadline is a time of `time.monotonic()`, kept per thread.  Nested ones only shorten it, so the limit of a
request holds for each unit in it, and that of a unit for each statement.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

UNIT_SECONDS = 7.5
"""For one unit of the store, all waits and repeats included: a push has to be answered within 10 s, and no
unit may hold the writer's lock for longer than a push can wait for it."""


class _Thread(threading.local):
    at: float | None = None
    waited: float = 0.0


_thread = _Thread()


def note_wait(seconds: float) -> None:
    """The request that this thread begins has waited so long for a thread: the time counts against it."""
    _thread.waited = seconds


def answer_at() -> float:
    """When a unit that begins now must be over, for the request to be answered in time."""
    return time.monotonic() + UNIT_SECONDS - _thread.waited


@contextmanager
def until(at: float) -> Iterator[None]:
    """Everything in this block ends at that time, or at an earlier one that holds already."""
    before = _thread.at
    _thread.at = at if before is None else min(at, before)
    try:
        yield
    finally:
        _thread.at = before


@contextmanager
def none() -> Iterator[None]:
    """No limit in this block: for a migration, which takes as long as the tables are large."""
    before = _thread.at
    _thread.at = float("inf")
    try:
        yield
    finally:
        _thread.at = before


def cap(seconds: float) -> float:
    """So many seconds, or those until the deadline if one is set and they are fewer."""
    return seconds if _thread.at is None else min(seconds, max(0.0, _thread.at - time.monotonic()))


def left() -> float:
    """Seconds until the deadline, 0 if it is over; `UNIT_SECONDS` where none is set."""
    if _thread.at is None:
        return UNIT_SECONDS
    return max(0.0, _thread.at - time.monotonic())
