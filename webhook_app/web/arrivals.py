"""Requests still arriving and answers still leaving: nobody may hold a thread by being slow.

`wanted` says how much of a request must have come before it gets a thread; the worker lets the kernel collect
that.  What is left of a larger body is collected without a thread too (`uploads`).

Each answer has a deadline: the worker notes what it writes, and a thread of it cuts off what is not read in
time.
"""

import contextlib
import re
import socket
import threading
import time

PIECE_SECONDS = 5.0
"""For the first bytes of an answer, and for each further piece of `PIECE_BYTES`."""

PIECE_BYTES = 64 * 1024
LOOK_SECONDS = 0.5

COLLECTED_BYTES = 64 * 1024
"""Of a body, or of a head, as much waits in the kernel; nearly every delivery is smaller.

The kernel's memory is nobody's budget, so all seats together may not hold much of it.
"""

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,9})[ \t]*(?:\r\n|$)")


def wanted(seen: bytes) -> int:
    """How many bytes of a request must be here before it gets a thread, if `seen` is what came so far.

    No more than `seen`: its body is chunked, large, or its sender waits for a word of ours, so a thread reads
    the head and decides whether the body is wanted at all.
    """
    head, end, body = seen.partition(b"\r\n\r\n")
    if not end:
        return len(seen) + (len(seen) < COLLECTED_BYTES)
    fields = head.lower()
    length = _LENGTH.search(fields)
    if length is None or int(length[1]) > COLLECTED_BYTES or b"\r\nexpect:" in fields:
        return len(seen)
    return len(seen) + max(int(length[1]) - len(body), 0)


class Arrivals:
    """The connections that a process writes answers to, each with its deadline."""

    def __init__(self) -> None:
        self._until: dict[socket.socket, float] = {}
        self._mutex = threading.Lock()

    def leaves(self, sock: socket.socket, count: int) -> None:
        """Set the deadline for `count` bytes that are sent now."""
        seconds = PIECE_SECONDS * (1 + count // PIECE_BYTES)
        with self._mutex:
            self._until[sock] = time.monotonic() + seconds

    def has_left(self, sock: socket.socket) -> None:
        """They are out."""
        with self._mutex:
            self._until.pop(sock, None)

    def cut_late(self) -> int:
        """Cut all that is late; how many."""
        now = time.monotonic()
        with self._mutex:
            late = [sock for sock, until in self._until.items() if until < now]
            for sock in late:
                del self._until[sock]
                with contextlib.suppress(OSError):  # it is closed already
                    sock.shutdown(socket.SHUT_RDWR)
        return len(late)

    def watch(self) -> None:
        """Cut what is late, for ever; runs in a thread of its own."""
        while True:
            time.sleep(LOOK_SECONDS)
            self.cut_late()


ARRIVALS = Arrivals()
"""Those of this process."""
