"""Jobs of running builds, read from simulated servers after each change as a poll reads them."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from sqlalchemy import select

from tests.facts import PACE
from tests.stand import ON_SQLITE, SERVERS, environment
from webhook_app import builds, db, models, outbound, platforms, settings
from webhook_app.platforms import Answer, PollTarget
from webhook_app.simulated import github_bodies, gitlab_bodies
from webhook_app.simulated.facts import truth_of
from webhook_app.simulated.scripts import KINDS
from webhook_app.simulated.world import StepClock, World

PATIENT = replace(PACE, max_seconds=1e9)


class Reader:
    """A world of one platform with every kind of build, its server, and the reads of a poll."""

    def __init__(self, platform, server, world):
        self.platform = platforms.polled()[platform]
        self.source = settings.load(environment(world, {platform: server})).sources[platform].source
        self.world, self.server = world, server

    def target(self, build):
        named = self.platform.named(self.source, build.build_id)
        return PollTarget(
            build.build_id, named.key, build.repository.full_name, build.number, 1, None,
        )  # fmt: skip

    def answer(self, request):
        reply = outbound.send(
            "GET", request.url, request.headers, timeout_seconds=10, byte_cap=2**20, guard=False
        )
        return Answer(reply.status, reply.headers, reply.body)

    def read(self, build, meanwhile):
        """The build with its jobs; `meanwhile()` is called between the two requests."""
        platform, source, target = self.platform, self.source, self.target(build)
        seen = platform.parse_poll(source, target, self.answer(platform.poll_request(source, target)))
        more = platform.follow_up(source, seen)
        if more is not None:
            seen = platform.parse_follow_up(seen, self.answer(more))
        meanwhile()
        request = platform.jobs_request(source, target)
        return platform.parse_jobs(source, seen, self.answer(request)) if request else seen

    def pushes(self, build, moment):
        """What is pushed when the moment comes."""
        bodies = {"github": github_bodies, "gitlab": gitlab_bodies}[self.platform.NAME]
        for event in moment.events:
            body = json.dumps(bodies.webhook(build, moment, event, self.server.url)).encode()
            yield from self.platform.parse_webhook(
                self.source, {"x-github-event": event.name}, body
            ).observations


@pytest.fixture(params=["github", "gitlab"])
def reader(request):
    world = World(5, len(KINDS[request.param]), platforms=[request.param], every_kind=True, now=StepClock())
    with SERVERS[request.param](world) as server:
        yield Reader(request.param, server, world)


def record(engine, clock, seen):
    now = datetime.fromtimestamp(clock(), UTC)
    db.as_writer(engine, lambda write: builds.record(write, [seen], now, PATIENT))
    with db.reading(engine) as connection:
        found = connection.execute(select(models.builds).where(models.builds.c.key == seen.key))
        return found.mappings().one()


@ON_SQLITE
@pytest.mark.parametrize("seconds_between", [0.0, 0.5, 3.0, 1000.0])
def test_jobs_of_another_moment_change_no_state_and_no_attempt(engine, reader, seconds_between):
    """However much happens between the two reads, re-runs included."""
    clock, bases = reader.world.now, set()
    for build in reader.world.builds:
        percents = {}
        for moment in build.moments:
            clock.at = moment.at
            seen = reader.read(build, lambda: clock.advance(seconds_between))
            row = record(engine, clock, seen)
            true = truth_of(build.platform, moment)
            assert (row["state"], row["attempt"]) == (true.state, true.attempt), (build.kind, moment)
            assert row["progress"] >= percents.get(row["attempt"], 0)
            percents[row["attempt"]] = row["progress"]
            bases.add(row["progress_basis"])
    assert {"github": "steps", "gitlab": "jobs"}[reader.platform.NAME] in bases


@ON_SQLITE
@pytest.mark.parametrize("seconds_between", [0.0, 3.0, 1000.0])
def test_jobs_of_another_moment_hide_nothing_that_is_pushed(engine, reader, seconds_between):
    """After each push comes a poll that read the jobs later; every end and every re-run is still taken."""
    clock = reader.world.now
    for build in reader.world.builds:
        for moment in build.moments:
            true, ids = truth_of(build.platform, moment), jobs_of(build, moment.attempt)
            for pushed in reader.pushes(build, moment):
                record(engine, clock, pushed)
            clock.at = moment.at
            seen = reader.read(build, lambda: clock.advance(seconds_between))
            assert {job.id for job in seen.jobs} <= ids
            row = record(engine, clock, seen)
            assert (row["state"], row["attempt"]) == (true.state, true.attempt), (build.kind, moment)
        ends = {moment.attempt for moment in build.moments if truth_of(build.platform, moment).terminal}
        kept = {row["attempt"] for row in ended(engine, row["id"])}
        assert kept | {true.attempt} >= ends, build.kind


def jobs_of(build, attempt):
    """The ids of all jobs of an attempt."""
    return {job.id for moment in build.moments if moment.attempt == attempt for job in moment.jobs}


def ended(engine, build):
    columns = models.attempts.c
    statement = select(models.attempts).where(columns.build == build, columns.ended_at.is_not(None))
    with db.reading(engine) as connection:
        return connection.execute(statement).mappings().all()


@ON_SQLITE
def test_each_running_build_tells_how_far_it_is(engine, reader):
    clock, told = reader.world.now, set()
    for build in reader.world.builds:
        for moment in build.moments:
            clock.at = moment.at
            seen = reader.read(build, lambda: None)
            running = truth_of(build.platform, moment).state == "in_progress"
            assert not seen.jobs or not seen.state.terminal
            assert seen.jobs_complete is bool(seen.jobs)
            if running and moment.jobs:
                assert {job.id for job in seen.jobs} == {job.id for job in moment.jobs}
                told.add(build.kind)
    assert {"success", "failure"} < told
