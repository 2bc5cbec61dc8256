"""How many requests a worker has under way, and how many more each subscriber may get.  Pure.

Nobody can take a worker from the others: a subscriber begins with few requests at a time, and each
success in this worker allows it one more, so one that hangs holds few; nobody gets more than half of
what is free; and the subscribers of one host share what that host may get.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from webhook_app import circuit, destinations

IN_FLIGHT = 256
"""Requests under way in one worker, each with a thread."""
MOST_IN_FLIGHT = 128
"""Those of one subscriber; Python sends no more than about 2 500 messages a second anyway."""
FIRST_IN_FLIGHT = 16
"""Those of a subscriber of which this worker has seen no success since its last failure."""
CAUTION_IN_FLIGHT = 4
"""Those of a subscriber whose last try, by whatever worker, failed."""


@dataclass(slots=True)
class Room:
    """The books of one worker.  `per_host`: what all subscribers of one host may have under way together."""

    most: int = IN_FLIGHT
    per_host: int = MOST_IN_FLIGHT
    first: int = FIRST_IN_FLIGHT
    subscribers: Counter[str] = field(default_factory=Counter)
    hosts: Counter[str] = field(default_factory=Counter)
    windows: dict[str, int] = field(default_factory=dict)

    @property
    def free(self) -> int:
        """Requests that may still begin."""
        return self.most - self.subscribers.total()

    def copy(self) -> "Room":
        """Books to plan with; successes noted later are seen in both."""
        return Room(
            self.most, self.per_host, self.first, self.subscribers.copy(), self.hosts.copy(), self.windows
        )

    def began(self, row: Mapping[str, Any], count: int = 1) -> None:
        """Count requests for this subscriber's row that are under way from now on."""
        self.subscribers[row["id"]] += count
        self.hosts[host_of(row["url"])] += count

    def ended(self, row: Mapping[str, Any], well: bool) -> None:
        """One is over."""
        for counter, key in ((self.subscribers, row["id"]), (self.hosts, host_of(row["url"]))):
            counter[key] -= 1
            if counter[key] <= 0:
                del counter[key]
        window = self.windows.get(row["id"], self.first)
        self.windows[row["id"]] = min(window + 1, MOST_IN_FLIGHT) if well else self.first

    def allowed(self, row: Mapping[str, Any], now: datetime) -> int:
        """How many more this subscriber may get now; 0 or less: none.  `row`: with its `first_due_at`."""
        if row["first_due_at"] > now or (row["slow_until"] is not None and row["slow_until"] > now):
            return 0
        own = self._own(row, now)
        shared = self.per_host - self.hosts[host_of(row["url"])]
        return min(own, shared, max(1, self.free // 2), self.free)

    def _own(self, row: Mapping[str, Any], now: datetime) -> int:
        """How many more its own window and its circuit allow.

        A probe may begin beside what was under way when the circuit opened; that there is only one over all
        workers is decided in the store (`deliveries.claim`).
        """
        is_open = circuit.state_of(row) == circuit.OPEN
        if is_open and not circuit.of(row).is_probe_due(now):
            return 0
        if is_open and not row["on_probation"]:
            return 1
        return self.window(row) - self.subscribers[row["id"]]

    def window(self, row: Mapping[str, Any]) -> int:
        """How many requests of this subscriber this worker has under way, at most."""
        if row["on_probation"]:
            return 1
        if row["failing_since"] is not None:
            return CAUTION_IN_FLIGHT
        return min(self.windows.get(row["id"], self.first), row["concurrency_limit"] or MOST_IN_FLIGHT)


def host_of(url: str) -> str:
    """The host of a callback URL as it is counted: its name or address, without the port."""
    origin = destinations.origin(url)
    return origin if isinstance(origin, str) else origin[1]
