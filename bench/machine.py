"""The machine: cores, processes and what they used, as Linux's /proc tells it."""

import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from webhook_app.supervisor import tied_to_parent

ROOT = Path(__file__).parent.parent
WAIT_SECONDS = 60.0
STOP_SECONDS = 15.0
_TICKS = os.sysconf("SC_CLK_TCK")


def cores() -> tuple[int, int]:
    """The core of what is measured, and the core of those that load it."""
    usable = sorted(os.sched_getaffinity(os.getpid()))
    if len(usable) < 2:
        raise RuntimeError("two cores are needed, one for the server and one for the load")
    return usable[0], usable[1]


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """This thread, and every process started meanwhile, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def process(
    argv: Sequence[str | Path], env: Mapping[str, str], log: Path, stdout: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A child that ends with us; its output goes to `log`, shown when the block fails."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            [str(word) for word in argv],
            env=dict(env),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output if stdout is None else stdout,
            stderr=output,
            text=True,
            preexec_fn=tied_to_parent(),  # noqa: PLW1509 (no thread of ours runs yet)
        )
    try:
        yield child
    except Exception:
        sys.stderr.write(log.read_text(encoding="utf-8", errors="replace")[-4000:])
        raise
    finally:
        _stop(child)


def _stop(child: subprocess.Popen[str]) -> None:
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.stdout is not None:
        child.stdout.close()


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: what a login has, and `more`; nothing of ours leaks in."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **more}


def wait_until(is_so: Callable[[], bool], what: str, pause_seconds: float = 0.02) -> None:
    """Look again and again; `TimeoutError` after a minute."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT_SECONDS:g} s for {what}")
        time.sleep(pause_seconds)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# ---- what processes used -------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """The process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [pid, *(member for child in children for member in family(int(child)))]


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time, user and system, that the processes have used so far."""
    return sum(sum(map(int, _stat(pid)[11:13])) for pid in pids) / _TICKS


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def resident_mib(pid: int) -> float:
    """Memory of the process that is in RAM, in MiB (pages shared with others count in full)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def command_line(pid: int) -> str:
    """The words the process was started with."""
    return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").replace("\0", " ").strip()


@contextmanager
def noise() -> Iterator[list[float]]:
    """Into the list: the share (0 to 1) of all cores that others used during the block."""
    found: list[float] = []
    began, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()
    yield found
    seconds = (time.monotonic() - began) * (os.cpu_count() or 1)
    found.append(max(0.0, (_busy_seconds() - busy - (_own_seconds() - own)) / seconds))


def _busy_seconds() -> float:
    words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, words)
    return (user + nice + system + irq + softirq + steal) / _TICKS


def _own_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def describe() -> str:
    """The machine in one line."""
    version = platform.python_version()
    return (
        f"{os.cpu_count()} shared cores, {platform.system()}, Python {version}; "
        f"a 4 KiB write with fdatasync takes {_sync_microseconds():.0f} µs (median)"
    )


def _sync_microseconds(count: int = 200) -> float:
    with tempfile.TemporaryFile() as file:
        times = []
        for place in range(count):
            os.pwrite(file.fileno(), bytes(4096), place * 4096)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return median(times) * 1e6
