"""Starts, watches and stops the processes of `buildrelay up`, in one terminal.

Children start in order, each when the one before is ready.  A child that dies is started again
with a growing wait, while the others go on.  SIGTERM, SIGINT and SIGHUP end them all; a second one changes
nothing.  Each child gets TERM once, all at the same time, so that each has the whole of
`Timing.stop_seconds` for what it has under way; only what the others need (`Child.ends_last`) goes on
until they are gone.  A moment later KILL ends what is left.

Each child leads a session of its own, so Ctrl-C in the terminal reaches only the supervisor.
No child survives a supervisor that is killed: on Linux the kernel ends them (PR_SET_PDEATHSIG);
elsewhere the next start ends what the pid file of the dead supervisor names.  PDEATHSIG follows
the thread that started the child, so `supervise` belongs in the main thread.

Nothing here sleeps: one selector waits for output and, through the signal wake-up pipe, for
signals and for children that ended.
"""

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, NoReturn

DIES_WITH = "BUILDRELAY_DIES_WITH"
LONGEST_LINE = 65_536  # bytes kept while waiting for the end of a line
READY_CHECK_SECONDS = 0.05
NOT_READY_SECONDS = 15.0
"""All have started and yet something is missing: after so long that is said."""
KILL_SECONDS = 0.3
"""Between the end of the time that the children have, and KILL for those that did not keep it."""
LAST_WORDS_SECONDS = 0.4
_COLOURS = (36, 33, 32, 35, 34, 31)
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_GET_CHILD_SUBREAPER = 37
_PR_SET_PDEATHSIG = 1  # https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html


@dataclass(frozen=True, slots=True)
class Child:
    """One process to keep running.  `env` is its whole environment (None: ours).

    `ready` is asked again and again while starting and must answer quickly; None: ready once started.
    `ends_last`: the others need it, so it ends after them.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] | None = field(default=None, repr=False)
    ready: Callable[[], bool] | None = None
    ends_last: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """Waits in seconds: between restarts (doubling), until a start has failed, from TERM until the end."""

    first_wait_seconds: float = 0.2
    longest_wait_seconds: float = 5.0
    steady_seconds: float = 30.0
    start_seconds: float = 60.0
    stop_seconds: float = 9.0


TIMING = Timing()


def why_not_listen(host: str, port: int) -> str | None:
    """Why nobody could listen there now; None if somebody could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return error.strerror or str(error)
    return None


def next_wait(timing: Timing, previous_seconds: float, lived_seconds: float) -> float:
    """Seconds to wait before a restart; `previous_seconds` is 0 before the first one."""
    if previous_seconds <= 0 or lived_seconds >= timing.steady_seconds:
        return timing.first_wait_seconds
    return min(previous_seconds * 2, timing.longest_wait_seconds)


def due_for_term(alive: Sequence[bool], last: Sequence[bool], in_time: bool) -> list[int]:
    """The indexes of living children that should have got TERM by now.

    Those that end `last` follow when the others are gone, or no longer `in_time`.
    """
    wait = in_time and any(lives and not late for lives, late in zip(alive, last, strict=True))
    return [index for index, lives in enumerate(alive) if lives and not (wait and last[index])]


def split_lines(pending: bytes, chunk: bytes) -> tuple[list[bytes], bytes]:
    """Whole lines of `pending + chunk` without their ends, and the rest; overlong lines are cut."""
    *lines, rest = (pending + chunk).split(b"\n")
    if len(rest) > LONGEST_LINE:
        lines, rest = [*lines, rest], b""
    return [line.removesuffix(b"\r") for line in lines], rest


def labels(names: Sequence[str], colour: bool) -> list[bytes]:
    """The prefix of each child's lines: equally wide, one colour each when `colour`."""
    width = max(map(len, names), default=0)
    plain = [f"{name:<{width}} | " for name in names]
    if colour:
        plain = [f"\x1b[{_COLOURS[index % len(_COLOURS)]}m{text}\x1b[0m" for index, text in enumerate(plain)]
    return [text.encode() for text in plain]


def end_process(code: int) -> NoReturn:
    """End this process at once.

    The interpreter's own tidying takes a second and more on a busy machine, when seconds are counted.
    """
    with suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def tie_to_starter() -> None:
    """End when the process dies that named itself in `DIES_WITH`.

    For starters with threads, where `tied_to_parent` may deadlock (it is Python between fork and exec).
    """
    if os.environ.get(DIES_WITH) == str(os.getppid()) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tied_to_parent() -> Callable[[], None] | None:
    """A `preexec_fn` that has the kernel kill the new process when this thread ends; None off Linux."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the line above
            os.kill(os.getpid(), signal.SIGKILL)

    return tie


def _adopts_orphans() -> bool:
    """Are we given the processes whose parent died?  So is the first one of a container, and a subreaper."""
    if sys.platform != "linux":
        return False
    is_subreaper = ctypes.c_int()
    ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(is_subreaper))
    return os.getpid() == 1 or bool(is_subreaper.value)


@dataclass(slots=True)
class _Seat:
    """A child and what became of it; times are monotonic."""

    child: Child
    label: bytes
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    wait_seconds: float = 0.0
    restart: float | None = None
    was_ready: bool = False
    asked_to_end: bool = False


@dataclass(slots=True)
class _House:
    """Everything one `supervise` call holds."""

    seats: list[_Seat]
    own_label: bytes
    timing: Timing
    selector: selectors.BaseSelector
    out: BinaryIO | None
    pid_file: Path | None
    pipes: set[IO[bytes]] = field(default_factory=set)
    stopping: bool = False
    own_line: Callable[[str], str] = str
    adopts: bool = field(default_factory=_adopts_orphans)


def supervise(
    children: Sequence[Child],
    *,
    out: BinaryIO | None = None,
    on_ready: Callable[[], None] | None = None,
    missing: Callable[[Sequence[int]], str] | None = None,
    pid_dir: Path | None = None,
    timing: Timing = TIMING,
    labelled: bool = True,
    own_line: Callable[[str], str] = str,
) -> int:
    """Run `children` until a stop signal; the exit code: 0 stopped by signal, 1 a child didn't start.

    `labelled`: each line begins with the name of its child.  `own_line`: how our own lines are written.
    `out` (default: standard output) gets every line of every child, prefixed.  `on_ready` is called
    once, when all are ready and nothing is `missing`: that is given the pids of the living children and says
    what is (empty: nothing), within a second.  `pid_dir` holds one small file per running supervisor.
    """
    out = sys.stdout.buffer if out is None else out
    if pid_dir is not None:
        pid_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        end_leftovers(pid_dir)
    with selectors.DefaultSelector() as selector, _wake_ups() as wake_up:
        house = _house(children, out, selector, pid_dir, timing)
        house.own_line = own_line
        if not labelled:
            _take_labels_off(house)
        selector.register(wake_up, selectors.EVENT_READ, partial(_note_signals, house, wake_up))
        try:
            return _start_and_watch(house, on_ready, missing)
        finally:
            _stop(house)
            if house.pid_file is not None:
                house.pid_file.unlink(missing_ok=True)


def _house(
    children: Sequence[Child],
    out: BinaryIO,
    selector: selectors.BaseSelector,
    pid_dir: Path | None,
    timing: Timing,
) -> _House:
    colour = out.isatty() and not os.environ.get("NO_COLOR")
    own, *others = labels(["up", *(child.name for child in children)], colour)
    seats = [_Seat(child, label) for child, label in zip(children, others, strict=True)]
    pid_file = None if pid_dir is None else pid_dir / f"up-{os.getpid()}.json"
    return _House(seats, own, timing, selector, out, pid_file)


def _take_labels_off(house: _House) -> None:
    house.own_label = b""
    for seat in house.seats:
        seat.label = b""


@contextmanager
def _wake_ups() -> Iterator[socket.socket]:
    """A socket on which the number of each signal that arrives can be read."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    # A signal that is ignored (nohup, a shell's background job) stays so.
    wanted = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    with reader, writer:
        previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        previous = {number: signal.signal(number, _ignore) for number in (*wanted, signal.SIGCHLD)}
        try:
            yield reader
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)


def _ignore(_number: int, _frame: object) -> None:
    """The wake-up socket tells; a handler is only needed so that Python writes to it."""


def _note_signals(house: _House, wake_up: socket.socket) -> None:
    numbers = wake_up.recv(4096)
    if any(number in numbers for number in _STOP_SIGNALS):
        house.stopping = True


def _start_and_watch(
    house: _House,
    on_ready: Callable[[], None] | None,
    missing: Callable[[Sequence[int]], str] | None,
) -> int:
    for seat in house.seats:
        if not _start(house, seat):
            return 0 if house.stopping else 1
    if missing is not None:
        _await(house, missing)
    if on_ready is not None and not house.stopping:
        on_ready()
    while not house.stopping:
        _turn(house, _until_next_restart(house))
    return 0


def _start(house: _House, seat: _Seat) -> bool:
    """Start one child and wait until it is ready; False: it failed, or we are to stop."""
    began = time.monotonic()
    deadline = began + house.timing.start_seconds
    _spawn(house, seat)
    while not house.stopping:
        if seat.process is None:
            _say(house, f"{seat.child.name} did not start")
            return False
        if seat.child.ready is None or seat.child.ready():
            seat.was_ready = True
            return True
        if time.monotonic() > deadline:
            _say(house, f"{seat.child.name} was not ready within {house.timing.start_seconds:g} s")
            return False
        _turn_for(house, READY_CHECK_SECONDS, lambda: seat.process is None or house.stopping)
    return False


def _await(house: _House, missing: Callable[[Sequence[int]], str]) -> None:
    """Keep things going until nothing is missing, and say once what is, if that takes long."""
    say_at: float | None = time.monotonic() + NOT_READY_SECONDS
    while not house.stopping and (what := missing(_pids(house))):
        if say_at is not None and time.monotonic() > say_at:
            _say(house, f"not ready yet: {what}")
            say_at = None
        _turn_for(house, READY_CHECK_SECONDS, lambda: house.stopping)


def _pids(house: _House) -> list[int]:
    """Those of the living children."""
    return [seat.process.pid for seat in house.seats if seat.process is not None]


def _turn_for(house: _House, seconds: float, enough: Callable[[], bool]) -> None:
    """Keep things going for `seconds`, or until there is reason to look sooner."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not enough():
        _turn(house, left)


def _turn(house: _House, timeout_seconds: float | None) -> None:
    """Wait for output, a signal or the timeout; then see who died and who is to start again."""
    _listen(house, timeout_seconds)
    if any(map(_has_ended, house.seats)):
        _listen(house, 0)  # a stop signal that came meanwhile explains an end
    for seat in house.seats:
        if _has_ended(seat) and seat.process is not None:
            _note_end(house, seat, seat.process)
        if seat.restart is not None and time.monotonic() >= seat.restart and not house.stopping:
            _spawn(house, seat)
    if house.adopts:
        _reap_orphans(house)


def _reap_orphans(house: _House) -> None:
    """See adopted processes that ended gone; those of `subprocess` are left to it."""
    ours = set(_pids(house))
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid in ours:  # ended just now: the next turn notes it
                return
            os.waitpid(ended.si_pid, 0)


def _has_ended(seat: _Seat) -> bool:
    return seat.process is not None and seat.process.poll() is not None


def _listen(house: _House, timeout_seconds: float | None) -> None:
    for key, _ in house.selector.select(timeout_seconds):
        key.data()


def _until_next_restart(house: _House) -> float | None:
    due = [seat.restart for seat in house.seats if seat.restart is not None]
    return max(0.0, min(due) - time.monotonic()) if due else None


def _spawn(house: _House, seat: _Seat) -> None:
    seat.started, seat.restart = time.monotonic(), None
    try:
        seat.process = subprocess.Popen(
            seat.child.argv,
            env=seat.child.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=tied_to_parent(),  # noqa: PLW1509 (the supervisor has one thread)
        )
    except OSError as error:
        _start_again_later(house, seat, f"can't be started: {error}")
        return
    if seat.process.stdout is not None:
        _pass_on(house, seat.label, seat.process.stdout)
    _write_pid_file(house)


def _pass_on(house: _House, label: bytes, pipe: IO[bytes]) -> None:
    """Have the lines that come out of `pipe` printed until its end."""
    read = partial(_read_output, house, label, pipe, bytearray())
    house.selector.register(pipe, selectors.EVENT_READ, read)
    house.pipes.add(pipe)


def _let_go(house: _House, pipe: IO[bytes]) -> None:
    house.selector.unregister(pipe)
    house.pipes.discard(pipe)
    pipe.close()


def _read_output(house: _House, label: bytes, pipe: IO[bytes], pending: bytearray) -> None:
    chunk = os.read(pipe.fileno(), LONGEST_LINE)
    lines, pending[:] = split_lines(bytes(pending), chunk)
    if not chunk:
        _let_go(house, pipe)
        lines = [*lines, bytes(pending)] if pending else lines
    for line in lines:
        _print(house, label + line)


def _print(house: _House, line: bytes) -> None:
    """Print one line.  A terminal that is gone takes none, and that must not stop the children."""
    if house.out is None:
        return
    try:
        house.out.write(line + b"\n")
        house.out.flush()
    except OSError:
        _drain(house.out)
        house.out = None


def _drain(gone: BinaryIO) -> None:
    """Lead what is still buffered to nowhere: Python would flush it at its end, fail, and exit with 120."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, gone.fileno())
    os.close(nowhere)


def _say(house: _House, text: str) -> None:
    _print(house, house.own_label + house.own_line(text).encode())


def _note_end(house: _House, seat: _Seat, process: subprocess.Popen[bytes]) -> None:
    """The child ended: end what is left of its group, and plan its restart unless we stop."""
    _signal_group(process.pid, signal.SIGKILL)
    seat.process = None
    code = process.returncode
    reason = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    if not seat.asked_to_end:
        _start_again_later(house, seat, f"ended ({reason})")
    _write_pid_file(house)


def _start_again_later(house: _House, seat: _Seat, reason: str) -> None:
    now = time.monotonic()
    seat.wait_seconds = next_wait(house.timing, seat.wait_seconds, now - seat.started)
    seat.restart = now + seat.wait_seconds
    again = f"; next start in {seat.wait_seconds:g} s" if seat.was_ready and not house.stopping else ""
    _say(house, f"{seat.child.name} {reason}{again}")


def _signal_group(group: int, number: signal.Signals) -> None:
    # macOS answers EPERM for a group of which only ended processes are left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _stop(house: _House) -> None:
    """End all children: TERM, and KILL for what is left when the time is over."""
    house.stopping = True
    over = time.monotonic() + house.timing.stop_seconds
    _turn_until(house, over, lambda: _ask_all_to_end(house, in_time=True))
    _ask_all_to_end(house, in_time=False)
    _turn_until(house, over + KILL_SECONDS, lambda: None)
    for seat in _alive(house):
        _say(house, f"{seat.child.name} did not end within {house.timing.stop_seconds:g} s: killed")
        seat.asked_to_end = True
        if seat.process is not None:
            _signal_group(seat.process.pid, signal.SIGKILL)
    _hear_last_words(house)


def _turn_until(house: _House, until: float, before: Callable[[], None]) -> None:
    """Keep things going until a time, or until no child is left; `before` each turn do this."""
    while (left := until - time.monotonic()) > 0 and _alive(house):
        before()
        _turn(house, left)


def _ask_all_to_end(house: _House, in_time: bool) -> None:
    alive = [seat.process is not None for seat in house.seats]
    last = [seat.child.ends_last for seat in house.seats]
    for index in due_for_term(alive, last, in_time):
        _ask_to_end(house.seats[index])


def _alive(house: _House) -> list[_Seat]:
    return [seat for seat in house.seats if seat.process is not None]


def _ask_to_end(seat: _Seat) -> None:
    if seat.process is not None and not seat.asked_to_end:
        seat.asked_to_end = True
        seat.process.terminate()


def _hear_last_words(house: _House) -> None:
    """Print what is left in the pipes, and see the killed ones gone."""
    until = time.monotonic() + LAST_WORDS_SECONDS
    while (left := until - time.monotonic()) > 0 and (_alive(house) or house.pipes):
        _turn(house, left)
    for pipe in list(house.pipes):  # held open by a process that left its group
        _let_go(house, pipe)


def identity(pid: int) -> str:
    """What tells this process from a later one of the same number; empty when it doesn't exist."""
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        state, *fields = stat.rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return "" if state in "ZX" else f"{boot} {fields[18]}"  # field 22: start time in clock ticks
    asked = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()


def _write_pid_file(house: _House) -> None:
    """Note who runs.  A full disk must not end what does: on Linux nobody needs the file."""
    if house.pid_file is None:
        return
    content = {"supervisor": _identified(os.getpid()), "children": [*map(_identified, _pids(house))]}
    draft = house.pid_file.with_suffix(".draft")
    with suppress(OSError):
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.replace(house.pid_file)


def _identified(pid: int) -> tuple[int, str]:
    return pid, identity(pid)


def end_leftovers(pid_dir: Path) -> list[int]:
    """Kill the children of supervisors that died without stopping them; the pids that were killed.

    A number that belongs to another process by now is left alone, and so are the children of a
    supervisor that still runs.  A file that a power cut left without its content names nobody who lives.
    """
    killed = []
    for file in pid_dir.glob("up-*.json"):
        supervisor, children = _noted(file)
        if _same_process(*supervisor):
            continue
        for pid, known in children:
            if _same_process(pid, known):
                _signal_group(pid, signal.SIGKILL)
                killed.append(pid)
        file.unlink(missing_ok=True)
    return killed


def _noted(file: Path) -> tuple[tuple[int, str], list[tuple[int, str]]]:
    """The supervisor and the children that a pid file names."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        (pid, known), children = content["supervisor"], content["children"]
        return (int(pid), str(known)), [(int(pid), str(known)) for pid, known in children]
    except (OSError, ValueError, KeyError, TypeError):
        return (0, ""), []


def _same_process(pid: int, known: str) -> bool:
    return bool(known) and identity(pid) == known
