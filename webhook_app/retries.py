"""When a failed message is tried again, and how long an endpoint may fail.  Pure: the clock comes in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from webhook_app.times import http_date

JITTER = 0.2
SLOW_DOWN = frozenset({429, 502, 504})
SLOW_DOWN_SECONDS = 60.0
MOST_RETRY_AFTER_SECONDS = 86_400.0

DISABLE_AFTER = timedelta(hours=120)
DISABLE_AFTER_FAILURES = 20
WARN_PERCENTS = (50, 70, 90)
PROBE_SECONDS = 300.0
"""How long an endpoint is left alone before the one probe that decides about it."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Waits in seconds before try 2, 3, …; `jitter()` gives 0..1."""

    schedule: Sequence[float]
    jitter: Callable[[], float]

    def wait(self, number: int, status: int | None, retry_after: str | None, now: datetime) -> float | None:
        """Seconds until the try after try `number`, ±20 %, at least what was asked; None: give up."""
        if number > len(self.schedule):
            return None
        base = self.schedule[number - 1] * (1 - JITTER + 2 * JITTER * self.jitter())
        return max(base, slow_down(status, retry_after, now) or 0.0)


def slow_down(status: int | None, retry_after: str | None, now: datetime) -> float | None:
    """Seconds for which the whole endpoint is to be left alone; None if it asked for nothing.

    `Retry-After` counts with any status, 429, 502 and 504 also without it.
    """
    asked = retry_after_seconds(retry_after, now)
    if asked is None:
        return SLOW_DOWN_SECONDS if status in SLOW_DOWN else None
    return min(asked, MOST_RETRY_AFTER_SECONDS)


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """Read a Retry-After header, seconds or an HTTP date; None if it is missing or nonsense."""
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    then = http_date(text)
    if then is None:
        return None
    return max((then - now).total_seconds(), 0.0)


def percent_to_disable(failing_since: datetime | None, failures: int, now: datetime) -> int:
    """How far an endpoint is on its way to be disabled, 0 to 100: both time and count must be reached."""
    if failing_since is None:
        return 0
    by_time = (now - failing_since) / DISABLE_AFTER
    by_count = failures / DISABLE_AFTER_FAILURES
    return int(min(by_time, by_count, 1.0) * 100)


def warning_due(percent: int, warned_percent: int) -> int | None:
    """The highest stage of `WARN_PERCENTS` that is reached and was not told yet."""
    reached = [stage for stage in WARN_PERCENTS if warned_percent < stage <= percent]
    return max(reached, default=None)
