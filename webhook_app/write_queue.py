"""The order in which processes write to one SQLite file: one after the other, reception first.

SQLite's own lock has no queue: who waits for it sleeps and tries again, so a process that takes it anew
as soon as it has released it keeps the others out for seconds.  Here every write transaction first takes its
turn on a file beside the database, by locks that the kernel releases when their process dies:

* `WRITING` is held for the transaction.
* `NEXT` (reception) or `QUEUED` (everybody else) is held by the one process of its kind that is to write
  next, so whoever has just written can't come before those that wait.
* While `NEXT` is held the others let reception go first, for `PATIENCE_SECONDS` at most; who has waited
  longer than that holds `OVERDUE`, and reception lets it go first.

The turn is about fairness alone: SQLite's lock still decides who writes.  So where there can be no turn
(no such file, a process that is stopped while it holds one) the transaction goes on without, after a
limited time.
"""

import fcntl
import os
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from webhook_app import deadline

SUFFIX = "-queue"
NEXT, QUEUED, OVERDUE, WRITING = range(4)
"""Bytes of the file that are locked."""

PATIENCE_SECONDS = 0.03
LONGEST_WAIT_SECONDS = 1.5
SHORT_WAIT_SECONDS = 0.2
"""For a turn.  Who waited the longer time found somebody stuck: for `BYPASS_SECONDS`, or until a turn
comes all the same, this process waits the shorter one."""
BYPASS_SECONDS = 10.0
LOOK_SECONDS = 0.0005

_SET, _GET = getattr(fcntl, "F_OFD_SETLK", 0), getattr(fcntl, "F_OFD_GETLK", 0)
"""Linux only (fcntl_locking(2)): locks of an open file, which the process's other files do not release."""
_FLOCK = struct.Struct("hhqqi4x")
"""`struct flock`: l_type, l_whence, l_start, l_len, l_pid."""


class WriteQueue:
    """The turns of this process at one database file.  Nothing is opened before the first turn."""

    def __init__(self, database: str) -> None:
        self._path = Path(os.path.realpath(database) + SUFFIX)
        self._writers = {True: _Writers(NEXT), False: _Writers(QUEUED)}
        self._bypassed_until = 0.0

    @contextmanager
    def turn(self, first: bool) -> Iterator[None]:
        """Wait for the turn of one write transaction, and hold it.  `first`: before those that are not."""
        writers, now = self._writers[first], time.monotonic()
        waits_long = now >= self._bypassed_until
        until = now + deadline.cap(LONGEST_WAIT_SECONDS if waits_long else SHORT_WAIT_SECONDS)
        if not writers.lock.enter(until - now):
            yield
            return
        try:
            if not writers.open(self._path):
                yield
                return
            held = writers.take_turn(until)
            if held:
                self._bypassed_until = 0.0
            elif waits_long and time.monotonic() >= now + LONGEST_WAIT_SECONDS:
                self._bypassed_until = time.monotonic() + BYPASS_SECONDS
            try:
                yield
            finally:
                writers.unlock(WRITING)
        finally:
            writers.lock.leave()


class _Writers:
    """Where one kind of writers of this process waits: one thread at a time takes the locks."""

    def __init__(self, place: int) -> None:
        self.lock = _FairLock()
        self._place = place
        self._file = -1
        self._owner = 0

    def open(self, path: Path) -> bool:
        """Open the file, once per process: a fork shares its parent's locks.  False: there can be none."""
        if self._owner != os.getpid() or self._file < 0:
            if self._file >= 0:
                os.close(self._file)
            self._file, self._owner = _open(path), os.getpid()
        return self._file >= 0

    def take_turn(self, until: float) -> bool:
        """Hold `WRITING` and nothing else; False when that took too long."""
        if not _wait(lambda: self._lock(self._place), until):
            return False
        overdue_at = time.monotonic() + PATIENCE_SECONDS
        try:
            return _wait(lambda: self._is_my_turn(overdue_at) and self._lock(WRITING), until)
        finally:
            self.unlock(self._place, OVERDUE)

    def _is_my_turn(self, overdue_at: float) -> bool:
        if self._place == NEXT:
            return not self._is_locked(OVERDUE)
        if time.monotonic() < overdue_at:
            return not self._is_locked(NEXT)
        return self._lock(OVERDUE)

    def _lock(self, place: int) -> bool:
        try:
            fcntl.fcntl(self._file, _SET, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
        except OSError:
            return False
        return True

    def _is_locked(self, place: int) -> bool:
        """By another file than this one."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
        return bool(_FLOCK.unpack(fcntl.fcntl(self._file, _GET, asked))[0] != fcntl.F_UNLCK)

    def unlock(self, *places: int) -> None:
        """Release these."""
        for place in places:
            fcntl.fcntl(self._file, _SET, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, place, 1, 0))


def _wait(is_so: Callable[[], bool], until: float) -> bool:
    while not is_so():
        if time.monotonic() >= until:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _open(path: Path) -> int:
    """The file, with the mode of the database beside it; -1 if there can be none."""
    if not _SET:
        return -1
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            file = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return os.open(path, flags)
        with suppress(FileNotFoundError):
            os.fchmod(file, stat.S_IMODE(path.with_name(path.name.removesuffix(SUFFIX)).stat().st_mode))
    except OSError:
        return -1
    return file


class _FairLock:
    """The threads of one process, in the order in which they came."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._busy = False

    def enter(self, seconds: float) -> bool:
        """Wait for one's turn; False if it did not come in that time."""
        with self._mutex:
            if not self._busy:
                self._busy = True
                return True
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        if gate.acquire(timeout=max(seconds, 0.0)):
            return True
        with self._mutex:
            if gate not in self._waiting:
                return True  # it came at the last moment
            self._waiting.remove(gate)
            return False

    def leave(self) -> None:
        """Let the next one in."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._busy = False
