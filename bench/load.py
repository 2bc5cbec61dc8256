"""The load generator: requests whose bytes are ready, over connections that stay open; one thread, epoll.

Closed loop: every connection sends its next request when the answer to the last one is there.
Open loop: requests are due at given times, whatever the server does; a latency counts from when its
request was due, so that waiting for a free connection is part of it.
"""

import gc
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True, slots=True)
class Run:
    """How it went: wall and own processor time in seconds, and each request's latency in seconds."""

    seconds: float
    own_seconds: float
    latencies: Sequence[float]

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float:
        """The latency, in seconds, that this share of the requests did not exceed."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@dataclass(slots=True)
class _Connection:
    sock: socket.socket
    since: float = 0.0
    answer: bytearray = field(default_factory=bytearray)


@dataclass(slots=True)
class _Pool:
    """Up to `most` connections, each opened when it has something to send.

    A gthread worker gives a thread to each new connection and waits in it for the first bytes: idle ones
    opened in advance would block it.
    """

    port: int
    most: int
    epoll: select.epoll = field(default_factory=select.epoll)
    by_number: dict[int, _Connection] = field(default_factory=dict)
    idle: list[_Connection] = field(default_factory=list)

    @property
    def has_room(self) -> bool:
        return bool(self.idle) or len(self.by_number) < self.most

    def take(self) -> _Connection:
        """An idle connection, else a new one."""
        if self.idle:
            return self.idle.pop()
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.epoll.register(sock, select.EPOLLIN)
        connection = self.by_number[sock.fileno()] = _Connection(sock)
        return connection

    def close(self) -> None:
        for connection in self.by_number.values():
            connection.sock.close()
        self.epoll.close()


def arrivals(count: int, rate: float, rng: Random) -> list[float]:
    """Times in seconds, from 0, of a Poisson process of `rate` per second."""
    times, at = [], 0.0
    for _ in range(count):
        at += rng.expovariate(rate)
        times.append(at)
    return times


def drive(
    port: int,
    requests: Sequence[bytes],
    connections: int,
    expected: bytes,
    due: Sequence[float] | None = None,
) -> Run:
    """Send all requests to 127.0.0.1:`port`; open loop with `due` times, else closed.

    RuntimeError for an answer that does not contain `expected`.
    """
    latencies: list[float] = []
    sent, count = 0, len(requests)
    clock = time.perf_counter
    with closing(_Pool(port, connections)) as pool, _no_collector():
        own, start = time.process_time(), clock()
        while len(latencies) < count:
            while pool.has_room and sent < count and (due is None or due[sent] <= clock() - start):
                connection = pool.take()
                connection.since = due[sent] if due else clock() - start
                connection.sock.sendall(requests[sent])
                sent += 1
            wait = max(0.0, due[sent] - (clock() - start)) if due and pool.has_room and sent < count else -1
            for number, _ in pool.epoll.poll(wait):
                connection = pool.by_number[number]
                if _has_answered(connection, expected):
                    latencies.append(clock() - start - connection.since)
                    pool.idle.append(connection)
        return Run(clock() - start, time.process_time() - own, latencies)


def _has_answered(connection: _Connection, expected: bytes) -> bool:
    """Read what has come; is the answer complete?"""
    piece = connection.sock.recv(65536)
    answer = connection.answer
    answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    at = head.find(b"Content-Length: ")
    if piece and (at < 0 or len(body) < int(head[at + 16 :].split(b"\r\n", 1)[0])):
        return False
    if expected not in answer:
        raise RuntimeError(f"{expected!r} expected, got {bytes(answer[:2000])!r}")
    answer.clear()
    return True


@contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
