"""The circuit breaker of an endpoint: after failures in a row one message at a time is tried.  Pure.

* closed: nothing is limited.  Five failures in a row open it.
* open: at `probe_at` one message may be sent, the probe.  Each probe that fails doubles the wait for
  the next one.  A success leads to half open.
* half open: at most `concurrency_limit` messages are under way, over all workers; each success doubles
  it, and the fifth success closes the circuit.  A failure opens it again.

A try that began in another state than the present one and failed changes nothing: of 128 that were under
way when an endpoint died, five open the circuit, and the others neither lengthen the wait nor open it
again later.  A success counts whenever the try began.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any

from webhook_app.retries import JITTER

CLOSED, OPEN, HALF_OPEN = STATES = ("closed", "open", "half_open")

FAILURES_TO_OPEN = 5
FIRST_WAIT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 300.0
FULL_CONCURRENCY = 16
"""The limit that is none any more: what a worker allows a subscriber that it knows nothing of."""
LONGEST_LEASE_SECONDS = 90.0
"""More than any probe may be under way: the longest `DELIVERY_TIMEOUT` with its margin is 75 s."""


@dataclass(frozen=True, slots=True)
class Circuit:
    """Those columns of a subscriber that are its circuit.

    `probe_at`: when the next probe may begin; while one is under way, when its lease ends.
    `probe_wait_seconds`: the present wait between two probes, before jitter.
    """

    failures_in_row: int = 0
    probe_at: datetime | None = None
    probe_wait_seconds: float | None = None
    concurrency_limit: int | None = None

    @property
    def state(self) -> str:
        """One of `STATES`."""
        return _state(self.probe_at, self.concurrency_limit)

    def is_probe_due(self, now: datetime) -> bool:
        """Whether a probe may begin now.

        A `probe_at` further ahead than any wait or lease is from before the clock was set back: then it may.
        """
        if self.probe_at is None:
            return False
        wait = (self.probe_wait_seconds or 0.0) * (1 + JITTER)
        furthest = now + timedelta(seconds=max(wait, LONGEST_LEASE_SECONDS))
        return self.probe_at <= now or self.probe_at > furthest

    def after(self, well: bool, begun_in: str, now: datetime, jitter: Callable[[], float]) -> "Circuit":
        """The circuit after one try came back; `begun_in`: its state when the try began; `jitter()`: 0..1."""
        if well:
            return self._after_success()
        failed = replace(self, failures_in_row=self.failures_in_row + 1)
        if self.state == CLOSED:
            opens = failed.failures_in_row >= FAILURES_TO_OPEN
            return failed._opened(FIRST_WAIT_SECONDS, now, jitter) if opens else failed
        if begun_in != self.state:
            return failed
        wait = 2 * self.probe_wait_seconds if self.probe_wait_seconds else FIRST_WAIT_SECONDS
        return failed._opened(min(wait, LONGEST_WAIT_SECONDS), now, jitter)

    def _after_success(self) -> "Circuit":
        if self.state == CLOSED:
            return Circuit()
        limit = 1 if self.concurrency_limit is None else 2 * self.concurrency_limit
        return Circuit(concurrency_limit=limit) if limit < FULL_CONCURRENCY else Circuit()

    def _opened(self, wait: float, now: datetime, jitter: Callable[[], float]) -> "Circuit":
        seconds = wait * (1 - JITTER + 2 * JITTER * jitter())
        return Circuit(self.failures_in_row, now + timedelta(seconds=seconds), wait)


COLUMNS = tuple(field.name for field in fields(Circuit))
"""The names of the columns."""


def state_of(row: Mapping[str, Any]) -> str:
    """The state of a subscriber's row; cheap, since a claim asks it of every queue."""
    return _state(row["probe_at"], row["concurrency_limit"])


def _state(probe_at: datetime | None, limit: int | None) -> str:
    if probe_at is not None:
        return OPEN
    return CLOSED if limit is None else HALF_OPEN


def of(row: Mapping[str, Any]) -> Circuit:
    """The circuit of a subscriber's row."""
    return Circuit(*(row[name] for name in COLUMNS))


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A subscriber's circuit as API and command line show it: the state, and the columns."""
    here = of(row)
    return {"state": here.state, **{name: getattr(here, name) for name in COLUMNS}}
