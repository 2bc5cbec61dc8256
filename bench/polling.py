"""Polling under a simulated clock: requests that cost budget, and how soon a lost end is found.

The jobs are the real ones over a real store; GitHub is the simulated one, asked in process, with its ETags
and limits.  A second of simulated time is a step of the loop; pushes come (or are lost) between the steps.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from statistics import quantiles
from urllib.parse import urlsplit

from sqlalchemy import Engine, func, select

from bench import machine, servers
from bench.table import Row
from jobs import poll as poll_job
from jobs.resources import Resources
from pollers import stale
from webhook_app import builds, calls, db, migrations, models, queues, settings
from webhook_app.lifecycle import Conclusion, Observation, ObservedBy, State
from webhook_app.platforms import Answer, Call
from webhook_app.simulated.facts import Build, Moment, truth_of
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.httpd import Request
from webhook_app.simulated.world import StepClock, World, busy_world

PART = "polling"
HOUR = 3600
BUILD_SECONDS = 1800.0
JITTER = 0.03
"""Builds take 30 minutes, give or take 54 s: the better history predicts, the less the adaptive pace pays."""
TICK_BUILDS, TICK_PLACES = 10_000, 500


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table; `loss` is the share of pushes that never come."""

    active: int
    repositories: int
    loss: float
    pace: str
    most_counted: int
    finds: bool
    warm_seconds: int = HOUR
    hours: int = 1

    @property
    def name(self) -> str:
        pushes = {0.0: "push healthy", 1.0: "push dead"}.get(self.loss, f"{self.loss:.0%} of pushes lost")
        return f"{self.active} builds / {self.repositories} repositories, {pushes}, {self.pace}"


CASES = (
    Case(100, 20, 0.0, "steady", 600, finds=False),
    Case(100, 20, 0.0, "adaptive", 150, finds=False, warm_seconds=4 * HOUR),
    Case(1_000, 100, 0.01, "steady", 5_000, finds=True),
    Case(1_000, 100, 0.01, "adaptive", 1_500, finds=True, warm_seconds=2 * HOUR, hours=3),
    Case(1_000, 100, 1.0, "steady", 5_000, finds=True),
    Case(10_000, 500, 1.0, "steady", 5_000, finds=False, warm_seconds=HOUR // 2),
)


@dataclass(slots=True)
class Result:
    """What an hour brought: requests sent and counted, seconds from lost ends to their discovery."""

    sent: int = 0
    counted: int = 0
    busiest_second: int = 0
    found_after: list[float] = field(default_factory=list)
    never_found: int = 0
    seconds: float = 0.0


def run() -> list[Row]:
    """Every case, then a tick over many builds on both databases."""
    rows: list[Row] = []
    for case in CASES:
        rows += _rows(case, simulate(case))
    return rows + _ticks()


def _rows(case: Case, result: Result) -> list[Row]:
    naive = case.active * HOUR // 15
    rows = [
        Row(PART, f"{case.name}: counted requests/h (naive {naive}, sent {result.sent})", f"{result.counted}",
            "", f"≤ {case.most_counted}", result.counted <= case.most_counted),
        Row(PART, f"{case.name}: most requests in a second", f"{result.busiest_second}"),
    ]  # fmt: skip
    if not result.found_after:
        return rows
    cuts = quantiles(result.found_after, n=100)
    limits = ((50, 20), (99, 90)) if case.finds else ((50, None), (99, 900))
    for percent, most in limits:
        goal, met = (f"≤ {most} s", cuts[percent - 1] <= most) if most else ("", None)
        what = f"{case.name}: lost end found after, {percent} % of {len(result.found_after)}"
        rows.append(
            Row(PART, what, f"{cuts[percent - 1]:.0f} s", f"worst {max(result.found_after):.0f} s", goal, met)
        )
    rows.append(
        Row(PART, f"{case.name}: ends not found", f"{result.never_found}", "", "≤ 0", not result.never_found)
    )
    return rows


def simulate(case: Case, seed: int = 1) -> Result:
    """Warm up, then an hour of it."""
    clock = StepClock()
    world = busy_world(
        clock, active=case.active, repositories=case.repositories, build_seconds=BUILD_SECONDS, changes=3,
        span_seconds=case.warm_seconds + case.hours * HOUR, jitter=JITTER, seed=seed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="buildrelay-bench-") as name:
        directory = Path(name)
        with servers.redis(directory) as redis_url, GitHubServer(world, port=None) as server:
            engine = _store(f"sqlite:///{directory / 'polling.db'}")
            with _stage(engine, redis_url, clock, server, case) as stage:
                stage.go_on(case.warm_seconds)
                return stage.measure(case.hours)


def _store(url: str) -> Engine:
    engine = db.connect(url, "NORMAL")
    migrations.upgrade(engine)
    return engine


@contextmanager
def _stage(
    engine: Engine, redis_url: str, clock: StepClock, server: GitHubServer, case: Case
) -> Iterator["Stage"]:
    values = settings.load(
        {
            "GITHUB_API_URL": server.url, "GITHUB_TOKEN": server.tokens[0], "ENABLE_GITLAB": "false",
            "GITHUB_REPOS": ",".join(server.world.repositories("github")), "GITHUB_WEBHOOK_SECRET": "x" * 32,
            "BUILD_POLL_PACE": case.pace,
        }
    )  # fmt: skip
    send, utc_now = calls.send, poll_job.utc_now
    with ThreadPoolExecutor(4) as threads:
        held = Resources(values, engine, queues.connect(redis_url), threads)
        stage = Stage(held, clock, server, _pushes(server.world, case))
        calls.send = stage.send
        poll_job.utc_now = stage.now
        try:
            yield stage
        finally:
            calls.send, poll_job.utc_now = send, utc_now
            engine.dispose()


@dataclass(frozen=True, slots=True, order=True)
class Push:
    """A change of a build; `comes` False: its webhook is lost."""

    at: float
    build_id: str
    comes: bool
    build: Build = field(compare=False)
    moment: Moment = field(compare=False)


def _pushes(world: World, case: Case) -> list[Push]:
    rng = Random(2)
    return sorted(
        Push(moment.at, build.build_id, rng.random() >= case.loss, build, moment)
        for build in world.builds
        for moment in build.moments
    )


@dataclass(slots=True)
class Stage:
    """The jobs under a clock that is stepped second by second."""

    held: Resources
    clock: StepClock
    server: GitHubServer
    pushes: list[Push]
    per_second: Counter[int] = field(default_factory=Counter)
    wake_at: float = 0.0
    refresh_at: float = 0.0

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.clock(), UTC)

    def send(self, request: Call, timeout_seconds: float, most_bytes: int) -> Answer:
        """The simulated GitHub's answer, without a socket."""
        parts = urlsplit(request.url)
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.per_second[int(self.clock())] += 1
        told = self.server.answer(Request("GET", parts.path, parts.query, headers, b""))
        return Answer(told.status, {name.lower(): value for name, value in told.headers.items()}, told.body)

    def go_on(self, seconds: float) -> None:
        until = self.clock() + seconds
        while self.clock() < until:
            self.clock.advance(1)
            self._deliver()
            if self.clock() >= self.refresh_at:
                poll_job.discover(self.held)
                self.refresh_at = self.clock() + self.held.settings.discovery_interval_seconds
            if self.clock() >= self.wake_at:
                self._poll()

    def _poll(self) -> None:
        lanes = poll_job._lanes(self.held)
        poll_job._drain(lanes)
        with db.reading(self.held.engine) as connection:
            due = stale.next_due(connection, lanes[0].sources)
        first = poll_job._next_turn(due, lanes[0]) or self.now() + timedelta(seconds=15)
        self.wake_at = min(int(first.timestamp()) + 1, self.clock() + 15)

    def _deliver(self) -> None:
        facts = []
        while self.pushes and self.pushes[0].at <= self.clock():
            push = self.pushes.pop(0)
            if push.comes:
                facts.append(_observation(push))
        if facts:
            pace = self.held.pace
            db.as_writer(self.held.engine, lambda write: builds.record(write, facts, self.now(), pace))

    def measure(self, hours: int) -> Result:
        """So many hours, and long enough after them to find their last ends; requests per hour."""
        seconds = hours * HOUR
        began, start, sent = time.monotonic(), self.clock(), Counter(self.server.statuses)
        lost = [push for push in self.pushes if not push.comes and push.at < start + seconds]
        self.go_on(seconds)
        made = self.server.statuses - sent
        result = Result(made.total() // hours, (made.total() - made[304]) // hours)
        result.busiest_second = max((n for at, n in self.per_second.items() if at > start), default=0)
        self.go_on(900)
        for push in lost:
            if truth_of("github", push.moment).terminal:
                self._judge(push, result)
        result.seconds = time.monotonic() - began
        return result

    def _judge(self, push: Push, result: Result) -> None:
        state = truth_of("github", push.moment).state
        b, e = models.builds.c, models.events.c
        told = (
            select(func.min(e.timestamp))
            .join(models.builds, b.id == e.build)
            .where(b.build_id == push.build_id, e.type == f"build.{state}")
        )
        with db.reading(self.held.engine) as connection:
            found = connection.execute(told).scalar()
        if found is None:
            result.never_found += 1
        else:
            result.found_after.append(found.timestamp() - push.at)


def _observation(push: Push) -> Observation:
    build, moment = push.build, push.moment
    truth = truth_of("github", moment)
    return Observation(
        source="github", platform="github", observed_by=ObservedBy.PUSH, key=f"github:{build.run_id}",
        build_id=build.build_id, attempt=1, state=State(truth.state),
        conclusion=Conclusion(truth.conclusion) if truth.conclusion else None, raw_status=moment.status,
        repository=build.repository.full_name, workflow=build.workflow, branch=build.branch,
        number=build.number, started_at=datetime.fromtimestamp(build.begins_at, UTC),
        ended_at=datetime.fromtimestamp(moment.at, UTC) if truth.terminal else None,
        platform_at=datetime.fromtimestamp(int(moment.at), UTC),
    )  # fmt: skip


# ---- a tick over many builds -----------------------------------------------------------------------


def _ticks() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="buildrelay-bench-") as name:
        rows = [_tick("SQLite", f"sqlite:///{Path(name) / 'tick.db'}")]
    with servers.postgresql() as (url, _):
        return [*rows, _tick("PostgreSQL", url)]


def _tick(name: str, url: str) -> Row:
    """Which places are stalest, of 10 000 builds that are all due."""
    engine = _store(url)
    values = settings.load({"GITHUB_TOKEN": "x", "ENABLE_GITLAB": "false"})
    now = datetime.now(UTC)
    facts = [
        Observation(
            source="github", platform="github", observed_by=ObservedBy.PUSH, key=f"github:{n}", attempt=1,
            build_id=f"github:load:repo-{n % TICK_PLACES}:{n}", state=State.IN_PROGRESS,
            repository=f"load/repo-{n % TICK_PLACES}", workflow="CI", branch="main",
        )
        for n in range(TICK_BUILDS)
    ]  # fmt: skip
    pace, then = settings.pace(values), now - timedelta(seconds=600)
    for at in range(0, TICK_BUILDS, 500):
        db.as_writer(engine, lambda write, at=at: builds.record(write, facts[at : at + 500], then, pace))
    before = machine.resident_mib(machine.os.getpid())
    took = []
    for _ in range(20):
        began = time.perf_counter()
        with db.reading(engine) as connection:
            places = stale.work(connection, {"github": values.sources["github"]}, now, 64)
        took.append((time.perf_counter() - began) * 1000)
        assert len(places) == 64
    grown = machine.resident_mib(machine.os.getpid()) - before
    engine.dispose()
    return _tick_row(name, took, grown)


def _tick_row(name: str, took: Sequence[float], grown: float) -> Row:
    middle = sorted(took)[len(took) // 2]
    spread = f"{min(took):.0f} – {max(took):.0f} ms, memory +{grown:.0f} MiB"
    what = f"{name}: the 64 stalest places of {TICK_BUILDS} due builds"
    return Row(PART, what, f"{middle:.0f} ms", spread, "≤ 200 ms", middle <= 200)
