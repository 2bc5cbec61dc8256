"""The polling jobs, their servers and a clock that is stepped by hand: what polling is tested with."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import Engine, select, update

from jobs import collect as collect_job
from jobs import poll as poll_job
from jobs import redeliver as redeliver_job
from jobs import sweep as sweep_job
from jobs.resources import Resources
from webhook_app import builds, db, models, platforms, settings
from webhook_app.lifecycle import Conclusion, ObservedBy, State
from webhook_app.simulated.facts import truth_of
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.gitlab import GitLabServer
from webhook_app.simulated.jenkins import JenkinsServer
from webhook_app.simulated.world import PLATFORMS, StepClock, World

ON_SQLITE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
"""For what a database can make no difference to."""

SERVERS = {"github": GitHubServer, "gitlab": GitLabServer, "jenkins": JenkinsServer}
FRESH, INTERVAL = 60, 15


@dataclass
class Stand:
    """The polling jobs with all they need, under one clock that is stepped by hand."""

    engine: Engine
    redis: Redis
    clock: StepClock
    world: World
    servers: dict[str, Any]
    held: Resources

    def now(self):
        return datetime.fromtimestamp(self.clock(), UTC)

    def restart(self):
        """From now on it is another process that works."""
        self.held = replace(self.held, started_at=self.now())

    def poll(self, after=0.0):
        """The polling job, so many seconds later."""
        self.clock.advance(after)
        poll_job.poll(self.held)

    def discover(self, after=0.0):
        """Look where builds may be that nobody told of, so many seconds later; polls what is due there as well."""
        self.clock.advance(after)
        poll_job.discover(self.held)
        poll_job.poll(self.held)

    def record(self, *facts):
        return db.as_writer(
            self.engine, lambda write: builds.record(write, facts, self.now(), self.held.pace)
        )

    def push(self, build, state=State.IN_PROGRESS, **more):
        """Record what a webhook would say about a simulated build."""
        source = self.held.settings.sources[build.platform].source
        named = platforms.polled()[build.platform].named(source, build.build_id)
        seen = replace(
            named,
            observed_by=ObservedBy.PUSH,
            state=state,
            conclusion=Conclusion.SUCCESS if state is State.COMPLETED else None,
            attempt=1 if build.platform == "github" else None,
            raw_status=state.value,
            repository=build.repository.full_name,
        )
        self.record(replace(seen, **more))

    def push_all(self):
        for build in self.world.builds:
            self.push(build)

    def row(self, build):
        with db.reading(self.engine) as connection:
            found = connection.execute(
                select(models.builds).where(models.builds.c.build_id == build.build_id)
            )
            row = found.mappings().one_or_none()
        return dict(row) if row else None

    def events(self, build):
        with db.reading(self.engine) as connection:
            found = connection.execute(
                select(models.events)
                .where(models.events.c.build == self.row(build)["id"])
                .order_by(models.events.c.id)
            )
            return [dict(event) for event in found.mappings()]

    def types(self, build):
        return [event["type"].removeprefix("build.") for event in self.events(build)]

    def wait(self, build):
        """Seconds from now to the next poll; None: never."""
        due = self.row(build)["next_poll_at"]
        return (due - self.now()).total_seconds() if due else None

    def pauses(self):
        """Paused sources: seconds from now, and why."""
        with db.reading(self.engine) as connection:
            paused = select(models.sources).where(models.sources.c.paused_until.is_not(None))
            rows = connection.execute(paused).mappings()
            return {
                row["name"]: ((row["paused_until"] - self.now()).total_seconds(), row["pause_reason"])
                for row in rows
            }

    def notices(self, *kinds):
        """What admins were told; without `kinds` all but the state of pushes."""
        with db.reading(self.engine) as connection:
            told = [dict(row) for row in connection.execute(select(models.notices)).mappings()]
        health = ("source.deaf", "source.hears")
        return [one for one in told if (one["kind"] in kinds if kinds else one["kind"] not in health)]

    def requests(self):
        return {name: server.count() for name, server in self.servers.items()}


@contextmanager
def stands(engine, redis, monkeypatch):
    """`make_stand(platforms, builds, kinds=…, speed=…, **variables)`: builds that begin now, and their servers."""
    with ExitStack() as stack:

        def make(
            names=PLATFORMS, count=1, *, kinds=None, speed=1.0, spread=0.0, every_kind=False, **variables
        ):
            clock = StepClock()
            world = World(
                7, count, platforms=names, kinds=kinds, speed=speed, spread_seconds=spread, now=clock,
                every_kind=every_kind,
            )  # fmt: skip
            servers = {name: stack.enter_context(SERVERS[name](world)) for name in names}
            values = settings.load(environment(world, servers) | variables)
            threads = stack.enter_context(ThreadPoolExecutor(16))
            for job in (poll_job, sweep_job, redeliver_job, collect_job):
                monkeypatch.setattr(job, "utc_now", lambda: datetime.fromtimestamp(clock(), UTC))
            held = Resources(values, engine, redis, threads, datetime.fromtimestamp(clock(), UTC))
            return Stand(engine, redis, clock, world, servers, held)

        yield make


def one_stale(make_stand, platform="github", kind="success", **more):
    """A stand with one build that runs, was pushed and has gone stale; and the build."""
    stand = make_stand((platform,), 1, kinds={platform: [kind]}, **more)
    (build,) = stand.world.builds
    running = (moment.at for moment in build.moments if truth_of(platform, moment).state == "in_progress")
    stand.clock.at = next(running, build.begins_at)
    stand.push(build)
    stand.clock.advance(FRESH)
    return stand, build


def environment(world, servers):
    """The settings for these servers; a platform without one is switched off."""
    env = {"ENABLE_GH": "false", "ENABLE_GITLAB": "false", "ENABLE_JENKINS": "false", "DISCOVERY_JITTER": "0"}
    if server := servers.get("github"):
        env |= {"ENABLE_GH": "true", "GITHUB_API_URL": server.url, "GITHUB_TOKEN": server.tokens[0]}
        env |= {"GITHUB_REPOS": ",".join(world.repositories("github"))}
    if server := servers.get("gitlab"):
        env |= {"ENABLE_GITLAB": "true", "GITLAB_URL": server.url, "GITLAB_TOKEN": server.tokens[0]}
        env |= {"GITLAB_PROJECTS": ",".join(world.repositories("gitlab"))}
    if server := servers.get("jenkins"):
        env |= {"ENABLE_JENKINS": "true", "JENKINS_URL": server.url, "JENKINS_USERNAME": server.username}
        env |= {
            "JENKINS_API_TOKEN": server.api_token,
            "JENKINS_JOBS": ",".join(world.repositories("jenkins")),
        }
    return env


def change(stand, build, values):
    """Change columns of a build, as the API does when somebody asks for polling or stops it."""
    row = stand.row(build)
    db.as_writer(
        stand.engine,
        lambda write: write.connection.execute(
            update(models.builds).where(models.builds.c.id == row["id"]).values(values)
        ),
    )
