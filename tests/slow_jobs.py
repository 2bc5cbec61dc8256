"""Jobs of the tests of workers: they take so long, and do nothing; and what no worker may ever run."""

import os
import time
from pathlib import Path
from typing import Any


def short() -> None:
    """Be over at once."""


def long() -> None:
    """Go on until the worker is killed."""
    time.sleep(60)


def trace(*_given: Any) -> None:
    """Show that it was run."""
    Path(os.environ["TRACE"]).touch()


class Pickled:
    """Runs `trace` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """Say how to make it again."""
        return trace, ()
