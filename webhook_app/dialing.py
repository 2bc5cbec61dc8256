"""Connects to one of several addresses, whichever answers first (RFC 8305, "happy eyeballs").

IPv6 and IPv4 take turns, first the family of the resolver's first address (RFC 6724).  When an address has
not answered for a quarter of a second, or has refused, the next one is tried while the earlier ones go on;
the first connection wins, the others are closed.  So a host is reached as long as one address of it answers,
without waiting for those that don't.  An address that this machine can't even try, such as one of IPv6 where
the kernel or the network has none, counts as one that refused.  Addresses that failed lately are tried last:
a dead one then costs its quarter of a second once.

One thread does it, with sockets that don't block.  Which addresses are allowed was judged before.
"""

import errno
import math
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from time import monotonic
from typing import Any, Generic, NamedTuple, TypeVar

DELAY_SECONDS = 0.25
"""The "Connection Attempt Delay" that RFC 8305 section 8 recommends."""

MOST_ADDRESSES = 8
"""Of one host in one go: each under way holds a socket until the end.  The next go begins with the others."""

FAILED_SECONDS = 600.0
FAILED_KEPT = 1024

_Socket = TypeVar("_Socket", bound=socket.socket)


class Address(NamedTuple):
    """Where to connect to, as `socket.getaddrinfo` gives it."""

    family: int
    sockaddr: tuple[Any, ...]


class Failures:
    """The addresses that failed lately, for all threads of a process; the oldest give way to new ones."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failed: dict[Address, float] = {}

    def note(self, address: Address) -> None:
        """It failed just now."""
        with self._lock:
            self._failed.pop(address, None)
            self._failed[address] = self._clock()
            if len(self._failed) > FAILED_KEPT:
                del self._failed[next(iter(self._failed))]

    def forget(self, address: Address) -> None:
        """It answers."""
        if address in self._failed:
            with self._lock:
                self._failed.pop(address, None)

    def lately(self, address: Address) -> bool:
        """Whether it failed lately."""
        at = self._failed.get(address)
        return at is not None and self._clock() - at < FAILED_SECONDS


FAILURES = Failures()


def in_order(addresses: Iterable[Address], failed: Callable[[Address], bool]) -> list[Address]:
    """The order of the tries: families take turns as the first address has it; what failed lately is last."""
    good: list[Address] = []
    bad: list[Address] = []
    first_family = 0
    for address in addresses:
        first_family = first_family or address.family
        (bad if failed(address) else good).append(address)
    return [*_interleaved(good, first_family), *_interleaved(bad, first_family)]


def _interleaved(addresses: Sequence[Address], family: int) -> list[Address]:
    first = [each for each in addresses if each.family == family]
    others = [each for each in addresses if each.family != family]
    return [each for pair in zip_longest(first, others) for each in pair if each is not None]


def connect(
    addresses: Iterable[Address], make: Callable[[int], _Socket], remaining: Callable[[], float]
) -> _Socket:
    """A connection to one of the addresses; `make` gives a socket of a family.

    `remaining` gives the seconds that are left, and raises `TimeoutError` when there are none.  Raises
    that, or the last `OSError` when every address refused.
    """
    order = in_order(addresses, FAILURES.lately)[:MOST_ADDRESSES]
    race = _Race(make, deque(order))
    try:
        return race.run(remaining)
    finally:
        race.end()


class _Race(Generic[_Socket]):
    """The attempts of one `connect`."""

    def __init__(self, make: Callable[[int], _Socket], waiting: deque[Address]) -> None:
        self._make = make
        self._waiting = waiting
        self._under_way: dict[int, tuple[Address, _Socket, float]] = {}
        self._poller = select.poll()
        self._next_at = 0.0
        self._failure: OSError = OSError("no address")

    def run(self, remaining: Callable[[], float]) -> _Socket:
        """Go on until one is connected, or none is left."""
        while self._waiting or self._under_way:
            seconds, now = remaining(), monotonic()
            if self._waiting and (now >= self._next_at or not self._under_way):
                won = self._begin(self._waiting.popleft(), now)
            else:
                until_next = self._next_at - now if self._waiting else seconds
                won = self._listen(min(seconds, until_next))
            if won is not None:
                return won
        raise self._failure

    def end(self) -> None:
        """Close what is still under way; what had its time and did not answer has failed."""
        now = monotonic()
        for address, sock, began in self._under_way.values():
            if now - began >= DELAY_SECONDS:
                FAILURES.note(address)
            sock.close()

    def _begin(self, address: Address, now: float) -> _Socket | None:
        try:
            sock = self._make(address.family)
        except OSError as error:  # the kernel has no such family, or no socket is left
            self._note(address, error)
            return None
        number = sock.fileno()
        self._under_way[number] = address, sock, now
        try:
            sock.setblocking(False)
            code = sock.connect_ex(address.sockaddr)
        except OSError as error:
            return self._ended(number, error)
        if code != errno.EINPROGRESS:
            return self._ended(number, _error(code))
        self._poller.register(number, select.POLLOUT)
        self._next_at = now + DELAY_SECONDS
        return None

    def _listen(self, seconds: float) -> _Socket | None:
        for number, _ in self._poller.poll(math.ceil(seconds * 1000)):
            self._poller.unregister(number)
            code = self._under_way[number][1].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            won = self._ended(number, _error(code))
            if won is not None:
                return won
        return None

    def _ended(self, number: int, error: OSError | None) -> _Socket | None:
        address, sock, _ = self._under_way.pop(number)
        if error is None:
            FAILURES.forget(address)
            return sock
        sock.close()
        self._note(address, error)
        return None

    def _note(self, address: Address, error: OSError) -> None:
        """It failed: the next one begins at once."""
        FAILURES.note(address)
        self._failure, self._next_at = error, 0.0


def _error(code: int) -> OSError | None:
    return OSError(code, os.strerror(code)) if code else None
