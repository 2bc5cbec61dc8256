"""Requests still arriving and answers still leaving: nobody may hold a thread by being slow.

`wanted` says how much of a request must have come before it gets one; the worker lets the kernel collect
that.  What is left of a larger body is read by a thread, and that has a deadline, as has each answer: the
worker notes each connection that begins a request, reception notes how far its body is, and a thread of the
worker ends the reading of what is late.  An answer can still be written then.  One that is not read in its
time is cut off.
"""

import contextlib
import re
import socket
import threading
import time

HEAD_SECONDS = 5.0
PIECE_SECONDS = 5.0
"""For the first bytes of a body or an answer, and for each further piece of `PIECE_BYTES`."""

PIECE_BYTES = 64 * 1024
LOOK_SECONDS = 0.5

COLLECTED_BYTES = 256 * 1024
"""As much of a request waits in the kernel; nearly every delivery is smaller."""

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,9})[ \t]*(?:\r\n|$)")


def wanted(seen: bytes) -> int:
    """How many bytes of a request must be here before it gets a thread, if `seen` is what came so far."""
    head, end, body = seen.partition(b"\r\n\r\n")
    fields = head.lower()
    if not end:
        more = 1
    elif b"\r\nexpect:" in fields:  # its sender waits for a word of ours
        more = 0
    elif length := _LENGTH.search(fields):
        more = int(length[1]) - len(body)
    else:  # a chunked body ends with an empty line
        more = int(b"\r\ntransfer-encoding:" in fields and not body.endswith(b"\r\n\r\n"))
    return min(len(seen) + max(more, 0), COLLECTED_BYTES)


Deadline = tuple[float, int]
"""Monotonic seconds, and what is shut down then."""


class Arrivals:
    """The connections that a process reads or writes, each with its deadline."""

    def __init__(self) -> None:
        self._until: dict[socket.socket, Deadline] = {}
        self._late: set[socket.socket] = set()
        self._mutex = threading.Lock()

    def begin(self, sock: socket.socket) -> None:
        """A request begins to arrive."""
        with self._mutex:
            self._until[sock] = time.monotonic() + HEAD_SECONDS, socket.SHUT_RD

    def goes_on(self, sock: socket.socket | None) -> None:
        """Its head, or a piece of its body, has come: the next piece has its own time."""
        with self._mutex:
            if sock in self._until:
                self._until[sock] = time.monotonic() + PIECE_SECONDS, socket.SHUT_RD

    def leaves(self, sock: socket.socket, count: int) -> Deadline | None:
        """Set the deadline for `count` bytes that are sent now; gives the one before, for `has_left`."""
        seconds = PIECE_SECONDS * (1 + count // PIECE_BYTES)
        with self._mutex:
            before = self._until.get(sock)
            self._until[sock] = time.monotonic() + seconds, socket.SHUT_RDWR
        return before

    def has_left(self, sock: socket.socket, before: Deadline | None) -> None:
        """They are out.  After `100 Continue` a body is yet to arrive."""
        with self._mutex:
            if before is None:
                self._until.pop(sock, None)
            else:
                self._until[sock] = before

    def end(self, sock: socket.socket | None) -> bool:
        """It is here, or it is over; was its reading ended because it was late?"""
        with self._mutex:
            self._until.pop(sock, None)  # type: ignore[arg-type]
            was_late = sock in self._late
            self._late.discard(sock)
        return was_late

    def came_late(self, sock: socket.socket) -> None:
        """The reading of a request was ended before it was here; `end` tells."""
        with self._mutex:
            self._late.add(sock)

    def cut_late(self) -> int:
        """Cut all that is late; how many."""
        now = time.monotonic()
        with self._mutex:
            late = [(sock, how) for sock, (until, how) in self._until.items() if until < now]
            for sock, how in late:
                del self._until[sock]
                if how == socket.SHUT_RD:
                    self._late.add(sock)
                with contextlib.suppress(OSError):  # it is closed already
                    sock.shutdown(how)
        return len(late)

    def watch(self) -> None:
        """Cut what is late, for ever; runs in a thread of its own."""
        while True:
            time.sleep(LOOK_SECONDS)
            self.cut_late()


ARRIVALS = Arrivals()
"""Those of this process."""
