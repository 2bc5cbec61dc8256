"""Start: from the command until /readyz says that all is there."""

import tempfile
import time
from pathlib import Path

from bench import servers
from bench.table import Row, measured

PART = "start"
TIMES = 3


def run() -> list[Row]:
    """The first start in an empty directory, then a second one there; several times."""
    first, warm, stops = [], [], []
    for _ in range(TIMES):
        with tempfile.TemporaryDirectory(prefix="buildrelay-bench-") as name:
            for found in (first, warm):
                ready, stopped = _start_and_stop(Path(name))
                found.append(ready)
                stops.append(stopped)
    return [
        measured(PART, "`up` until /readyz is 200, first start", first, "{:.1f} s"),
        measured(PART, "`up` until /readyz is 200, warm start", warm, "{:.1f} s", most=5),
        measured(PART, "SIGTERM until the last process is gone", stops, "{:.1f} s", most=10),
    ]


def _start_and_stop(directory: Path) -> tuple[float, float]:
    began = time.monotonic()
    with servers.up(directory / "data", directory):
        ready = time.monotonic()
    stopped = time.monotonic()
    return ready - began, stopped - ready
