"""Wrong API tokens: slowed per address and counted.  Who has a right one is never slowed.

Each process counts for itself, in bounded memory.  Behind a reverse proxy all addresses are the proxy's:
no header that a client can write is believed.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from threading import Lock

from redis import Redis
from redis.exceptions import RedisError

from webhook_app.queues import WRONG_TOKENS_KEY

BURST = 60
"""Wrong tokens that one address may try at once."""
SECONDS_EACH = 1.0
"""After each of which it may try one more."""
MOST_ADDRESSES = 10_000
"""That are remembered; of more the one that was silent longest is forgotten."""
NOTED_SECONDS = 1.0
"""Redis is told of wrong tokens at most so often: who guesses makes no work."""


@dataclass(slots=True)
class Guesses:
    """Wrong tokens of one process.  `clock`: monotonic seconds."""

    redis: Redis
    clock: Callable[[], float] = time.monotonic
    _until: OrderedDict[str, float] = field(default_factory=OrderedDict)
    _uncounted: int = 0
    _noted_at: float = -math.inf
    _lock: Lock = field(default_factory=Lock)

    def note(self, address: str) -> int:
        """Count a wrong token from an address; how many seconds it has to wait, 0 for not yet."""
        now, who = self.clock(), _network(address)
        with self._lock:
            until = max(self._until.pop(who, now), now) + SECONDS_EACH
            wait = until - now - BURST * SECONDS_EACH
            self._until[who] = until if wait <= 0 else until - SECONDS_EACH
            if len(self._until) > MOST_ADDRESSES:
                self._until.popitem(last=False)
            self._uncounted += 1
            due = now - self._noted_at >= NOTED_SECONDS
        if due:
            self.flush()
        return math.ceil(wait) if wait > 0 else 0

    def flush(self) -> None:
        """Add what was counted to the sum of all processes; while Redis is away it is kept."""
        with self._lock:
            count, self._uncounted, self._noted_at = self._uncounted, 0, self.clock()
        if not count:
            return
        with suppress(RedisError):
            self.redis.incrby(WRONG_TOKENS_KEY, count)
            return
        with self._lock:
            self._uncounted += count


def _network(address: str) -> str:
    """What one client has: an IPv4 address, or 2^64 IPv6 addresses."""
    try:
        read = ip_address(address)
    except ValueError:  # a unix socket
        return address
    if not isinstance(read, IPv6Address):
        return address
    return str(read.ipv4_mapped or int(read) >> 64)
