"""What the simulated API servers share: counted requests, injected faults, builds that vanish.

A subclass answers `_answer(request)` and names the path under which one build is read; everything
a test wants to know ("how often was this build polled?") follows from the paths.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import Self, TypeVar

from webhook_app.simulated.facts import Build, Job, Moment, Repository
from webhook_app.simulated.httpd import Request, Response, Server
from webhook_app.simulated.world import World

T = TypeVar("T")

_DIGITS = "0123456789abcdefABCDEF0123456789abcd"
LOGGED_SECRETS = {
    "github": f"ghp_{_DIGITS}",
    "gitlab": f"glpat-{_DIGITS[:20]}",
    "jenkins": f"AKIA{_DIGITS[:16].upper()}",
}
"""What each platform's jobs carelessly write into their logs: it must be shown nowhere."""
_FILLING = "." * 998


@dataclass(slots=True)
class _Fault:
    response: Response
    path_contains: str
    times: int | None


class ApiServer:
    """The REST API of one simulated platform; a context manager.

    `list_lag_seconds`: lists show the builds as they were that long ago; reads of one build never lag.
    `port` None: no socket at all, only `answer(request)`.  `blob_url`: the address of the store that
    redirects lead to, another one so that clients must mind their tokens.

    Tests may set: `latency_seconds` of each answer (real time), `date_skew_seconds` of the `Date` header,
    `extra_log_lines` of every log, and `log_bytes` that every log has at least.
    """

    platform = ""

    def __init__(self, world: World, *, list_lag_seconds: float = 0.0, port: int | None = 0) -> None:
        self.world = world
        self.list_lag_seconds = list_lag_seconds
        self.latency_seconds = 0.0
        self.date_skew_seconds = 0.0
        self.extra_log_lines: tuple[str, ...] = ()
        self.log_bytes = 0
        self.requests: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.in_flight: Counter[str] = Counter()
        self.most_in_flight = 0
        self._faults: list[_Fault] = []
        self._deleted: set[str] = set()
        self._hidden: set[Repository] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = None if port is None else Server(self._serve, port)
        self.url = self._server.url if self._server else f"http://{self.platform}.simulated.test"
        self._store = None if port is None else Server(self._serve)
        self.blob_url = self._store.url if self._store else "http://blobs.simulated.test"

    def close(self) -> None:
        """Stop serving at once."""
        self._closing.set()
        for server in filter(None, (self._server, self._store)):
            server.close()

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

    def hide(self, repository: Repository, hidden: bool = True) -> None:
        """The account may not see this repository (or it may again): it doesn't exist for it."""
        (self._hidden.add if hidden else self._hidden.discard)(repository)

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

    # Answering ----------------------------------------------------------------------------------

    def answer(self, request: Request) -> Response:
        """The answer to a request, counted as if it had come by a socket; a delay isn't waited."""
        with self._flight(request):
            return self._handle(request)

    def _serve(self, request: Request) -> Response:
        """The same for the socket: it is in flight until its delay is over."""
        with self._flight(request):
            response = self._handle(request)
            delay = response.delay_seconds or self.latency_seconds
            if delay and self._closing.wait(delay):
                return replace(response, delay_seconds=0.0, drop=True)
            return replace(response, delay_seconds=0.0)

    @contextmanager
    def _flight(self, request: Request) -> Iterator[None]:
        account = self._account(request)
        with self._lock:
            self.in_flight[account] += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight[account])
        try:
            yield
        finally:
            with self._lock:
                self.in_flight[account] -= 1

    def _handle(self, request: Request) -> Response:
        """An injected fault keeps the date of the real clock, unless it brings its own."""
        response = self._next_fault(request.path) or self._dated(self._answer(request))
        with self._lock:
            self.requests[request.path] += 1
            self.statuses[response.status] += 1
        return response

    def _dated(self, response: Response) -> Response:
        date = formatdate(self.world.now() + self.date_skew_seconds, usegmt=True)
        return replace(response, headers={"Date": date, **response.headers})

    def _account(self, request: Request) -> str:
        """Whose request it is: the token, however it is sent."""
        return request.headers.get("private-token") or bearer(request)

    # What platforms use -------------------------------------------------------------------------

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

    def _begun(self, repository: Repository, at: float) -> list[Build]:
        """The builds that a repository had begun at `at`, newest first, without those deleted since."""
        begun = self.world.begun(repository, at)
        return [build for build in begun if build.build_id not in self._deleted] if self._deleted else begun

    def _visible(self, repository: Repository) -> list[tuple[Build, Moment]]:
        """A repository's builds as its list shows them, newest first."""
        at = self.world.now() - self.list_lag_seconds
        return as_they_were(self._begun(repository, at), at)

    def find(
        self, repository: Repository, number: str, attribute: str = "run_id"
    ) -> tuple[Build, Moment] | None:
        """One build by its `run_id` or `number`, if it has begun and was not deleted."""
        look = self.world.run if attribute == "run_id" else self.world.numbered
        return self._now(look(repository, int(number)) if number.isdigit() else None)

    def find_job(self, repository: Repository, job_id: str) -> tuple[Build, Moment, Job] | None:
        """A job as it is now, of whatever attempt, if its build was not deleted."""
        pair = self._now(self.world.with_job(self.platform, int(job_id)) if job_id.isdigit() else None)
        if pair is None or pair[0].repository != repository:
            return None
        build, now = pair
        told = (m for m in reversed(build.moments) if m.at <= now.at)
        return next(
            (
                (build, moment, one)
                for moment in told
                for one in (*moment.jobs, *moment.retired)
                if str(one.id) == job_id
            ),
            None,
        )

    def _now(self, build: Build | None) -> tuple[Build, Moment] | None:
        if build is None or build.build_id in self._deleted:
            return None
        moment = build.moment_at(self.world.now())
        return (build, moment) if moment else None

    def _repositories(self) -> tuple[Repository, ...]:
        """Those that the account may see."""
        if self.platform not in self.world.platforms:
            return ()
        places = self.world.places[self.platform]
        return tuple(place for place in places if place not in self._hidden)

    def log(self, build: Build, job_name: str, failed: bool) -> list[str]:
        """The lines of a job's log, the wanted ones and the filling included."""
        lines = log_lines(build, job_name, failed)
        filling = max(self.log_bytes - sum(map(len, lines)), 0) // len(_FILLING)
        return [lines[0], *self.extra_log_lines, *[_FILLING] * (filling + bool(self.log_bytes)), *lines[1:]]


def as_they_were(builds: Iterable[Build], at: float) -> list[tuple[Build, Moment]]:
    """Each build that had begun by `at`, with the moment that held then."""
    return [(build, moment) for build in builds if (moment := build.moment_at(at))]


def bearer(request: Request) -> str:
    """The token of `Authorization: Bearer TOKEN` (or `token TOKEN`); empty without one."""
    return request.headers.get("authorization", "").partition(" ")[2].strip()


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
        f"DEPLOY_TOKEN={LOGGED_SECRETS[build.platform]}",
    ]
    lines += [f"Compiling module {n} of 12" for n in range(1, 13)]
    if failed:
        lines += ["FAIL tests/test_cart.py::test_tax_is_rounded", "AssertionError: 19.04 != 19.05"]
        lines.append("Error: Process completed with exit code 1.")
    else:
        lines.append("148 tests passed in 11.4 s")
    return lines
