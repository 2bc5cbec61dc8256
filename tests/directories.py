"""Temporary directories for what listens on a Unix socket."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_BASE = 60
"""A socket's path holds 104 bytes on macOS and 108 on Linux, the names of directory and socket included."""


@contextmanager
def short(prefix: str = "buildrelay-") -> Iterator[Path]:
    """A directory with a path short enough for a socket in it, which those under pytest's or $TMPDIR may not have."""
    base = tempfile.gettempdir()
    within = base if len(base) <= LONGEST_BASE else "/tmp"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=within) as name:
        yield Path(name)
