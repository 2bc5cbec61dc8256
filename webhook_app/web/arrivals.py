"""A deadline for requests that are still arriving: whoever sends a byte now and then must not hold a thread.

The worker notes each connection that begins a request, reception notes how far its body is, and a thread
of the worker ends the reading of what is late.  An answer can still be written then.
"""

import contextlib
import socket
import threading
import time

HEAD_SECONDS = 5.0
PIECE_SECONDS = 5.0
"""For the first bytes of a body, and for each further piece of `PIECE_BYTES`."""

PIECE_BYTES = 64 * 1024
LOOK_SECONDS = 0.5


class Arrivals:
    """The connections of a process that are being read, each with its deadline (monotonic seconds)."""

    def __init__(self) -> None:
        self._until: dict[socket.socket, float] = {}
        self._mutex = threading.Lock()

    def begin(self, sock: socket.socket) -> None:
        """A request begins to arrive."""
        with self._mutex:
            self._until[sock] = time.monotonic() + HEAD_SECONDS

    def goes_on(self, sock: socket.socket | None) -> None:
        """Its head, or a piece of its body, has come: the next piece has its own time."""
        with self._mutex:
            if sock in self._until:
                self._until[sock] = time.monotonic() + PIECE_SECONDS

    def end(self, sock: socket.socket | None) -> None:
        """It is here, or it is over."""
        with self._mutex:
            self._until.pop(sock, None)  # type: ignore[arg-type]

    def cut_late(self) -> int:
        """End the reading of all that is late; how many."""
        now = time.monotonic()
        with self._mutex:
            late = [sock for sock, until in self._until.items() if until < now]
            for sock in late:
                del self._until[sock]
                with contextlib.suppress(OSError):  # it is closed already
                    sock.shutdown(socket.SHUT_RD)
        return len(late)

    def watch(self) -> None:
        """Cut what is late, for ever; runs in a thread of its own."""
        while True:
            time.sleep(LOOK_SECONDS)
            self.cut_late()


ARRIVALS = Arrivals()
"""Those of this process."""
