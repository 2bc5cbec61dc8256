"""What the simulated API servers share: counted requests, injected faults, builds that vanish.

A subclass answers `_answer(request)` and names the path under which one build is read; everything
a test wants to know ("how often was this build polled?") follows from the paths.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from webhook_app.simulated.facts import Build, Moment, Repository
from webhook_app.simulated.httpd import Request, Response, Server
from webhook_app.simulated.world import REPOSITORIES, World

T = TypeVar("T")


@dataclass(slots=True)
class _Fault:
    response: Response
    path_contains: str
    times: int | None


class ApiServer:
    """The REST API of one simulated platform; a context manager.

    `list_lag_seconds`: lists show the builds as they were that long ago; reads of one build never lag.
    """

    platform = ""

    def __init__(self, world: World, *, list_lag_seconds: float = 0.0, port: int = 0) -> None:
        self.world = world
        self.list_lag_seconds = list_lag_seconds
        self.requests: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self._faults: list[_Fault] = []
        self._deleted: set[str] = set()
        self._lock = threading.Lock()
        self._server = Server(self._handle, port)
        self.url = self._server.url

    def close(self) -> None:
        """Stop serving at once."""
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What tests steer ---------------------------------------------------------------------------

    def inject(self, response: Response, *, times: int | None = None, path_contains: str = "") -> None:
        """Answer so instead, `times` times (None: until cleared), where the path contains this text."""
        with self._lock:
            self._faults.append(_Fault(response, path_contains, times))

    def clear_faults(self) -> None:
        """Answer as usual again."""
        with self._lock:
            self._faults.clear()

    def delete(self, build_id: str) -> None:
        """The build is deleted on the platform: unknown from now on."""
        self._deleted.add(build_id)

    # What tests ask -----------------------------------------------------------------------------

    def count(self, path_contains: str = "") -> int:
        """How many requests had this text in their path."""
        with self._lock:
            return sum(n for path, n in self.requests.items() if path_contains in path)

    def polls(self, build_id: str) -> int:
        """How often this build alone was read, its jobs and logs included; lists don't count."""
        build = self.world.build(build_id)
        if build is None:
            raise KeyError(build_id)
        path = self.path_of(build).casefold()
        with self._lock:
            return sum(n for seen, n in self.requests.items() if f"{seen.casefold()}/".startswith(f"{path}/"))

    def path_of(self, build: Build) -> str:
        """The path under which this build is read, without a trailing slash."""
        raise NotImplementedError

    # What platforms use -------------------------------------------------------------------------

    def _handle(self, request: Request) -> Response:
        response = self._next_fault(request.path) or self._answer(request)
        with self._lock:
            self.requests[request.path] += 1
            self.statuses[response.status] += 1
        return response

    def _next_fault(self, path: str) -> Response | None:
        with self._lock:
            for fault in self._faults:
                if fault.path_contains in path and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault.response
        return None

    def _answer(self, request: Request) -> Response:
        raise NotImplementedError

    def _visible(self, repository: Repository) -> list[tuple[Build, Moment]]:
        """A repository's builds as its list shows them, newest first."""
        at = self.world.now() - self.list_lag_seconds
        shown = [
            (build, moment)
            for build in self.world.of(repository)
            if build.build_id not in self._deleted and (moment := build.moment_at(at))
        ]
        return shown[::-1]

    def _find(
        self, repository: Repository, number: str, attribute: str = "run_id"
    ) -> tuple[Build, Moment] | None:
        """One build by its `run_id` or `number`, if it has begun and was not deleted."""
        for build in self.world.of(repository):
            if str(getattr(build, attribute)) == number and build.build_id not in self._deleted:
                moment = build.moment_at(self.world.now())
                return (build, moment) if moment else None
        return None

    def _repositories(self) -> tuple[Repository, ...]:
        return REPOSITORIES[self.platform] if self.platform in self.world.platforms else ()


def version_tag(owner: str, place: str, shown: Iterable[tuple[Build, Moment]]) -> str:
    """A weak ETag for these builds as they are shown, valid for one token (`owner`) and one URL (`place`)."""
    digest = hashlib.sha256(f"{owner}\n{place}".encode())
    for build, moment in shown:
        digest.update(f"\n{build.run_id}:{moment.at!r}".encode())
    return f'W/"{digest.hexdigest()[:40]}"'


def matches(request: Request, tag: str) -> bool:
    """Does `If-None-Match` name this ETag?"""
    given = [entry.strip() for entry in request.headers.get("if-none-match", "").split(",")]
    return tag.removeprefix("W/") in [entry.removeprefix("W/") for entry in given]


def page_of(request: Request, items: Sequence[T], default: int) -> tuple[Sequence[T], int, int, int]:
    """The asked page of `items`, its number, the page size (≤ 100) and the last page's number."""
    size = min(max(_whole(request.parameter("per_page"), default), 1), 100)
    page = max(_whole(request.parameter("page"), 1), 1)
    last = max((len(items) + size - 1) // size, 1)
    return items[(page - 1) * size : page * size], page, size, last


def _whole(text: str, default: int) -> int:
    return int(text) if text.isdigit() else default


def log_lines(build: Build, job_name: str, failed: bool) -> list[str]:
    """What a job wrote, as any platform would show it."""
    lines = [
        f"Preparing {build.repository.full_name} at {build.commit[:12]}",
        f"Job {job_name}, branch {build.branch}",
    ]
    lines += [f"Compiling module {n} of 12" for n in range(1, 13)]
    if failed:
        lines += ["FAIL tests/test_cart.py::test_tax_is_rounded", "AssertionError: 19.04 != 19.05"]
        lines.append("Error: Process completed with exit code 1.")
    else:
        lines.append("148 tests passed in 11.4 s")
    return lines
