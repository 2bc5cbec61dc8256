"""Nothing is lost, doubled, disordered or wrong while every process is killed again and again.

Platforms push, and redeliver under the same id until they get a 2xx, while web, workers, scheduler and
Redis are `kill -9`ed in turn.  Afterwards the rows of the database, the API and what the subscriber
saw are held against each other and against the truth of the simulated platforms.

`BUILDRELAY_KILL_PUSHES=10000` makes it as long as one likes; `BUILDRELAY_KILL_SECONDS` is the time over
which the builds begin.
"""

import os
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from sqlalchemy import select

from tests import hub as hubs
from tests import postgres
from tests.hub import running, until
from webhook_app import db, models
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.gitlab import GitLabServer
from webhook_app.simulated.jenkins import JenkinsServer
from webhook_app.simulated.judge import judge
from webhook_app.simulated.scripts import KINDS
from webhook_app.simulated.sender import Secrets, Sender
from webhook_app.simulated.subscriber import Subscriber
from webhook_app.simulated.world import World

PUSHES = int(os.environ.get("BUILDRELAY_KILL_PUSHES", "1500"))
SECONDS = float(os.environ.get("BUILDRELAY_KILL_SECONDS", max(12.0, PUSHES / 100)))
PUSHES_PER_BUILD = 3.5
SPEED = 8.0
KILL_EVERY_SECONDS = 1.0
VICTIMS = ("web", "deliver", "poll", "collect", "scheduler", "redis", "a web process")
AT_WORK_PUSHES = 20
RECOVERY_SECONDS = 240.0

HOOK_EVENTS = {"workflow_run", "Pipeline Hook", "notification"}
"""The hooks are set up for runs only: about three pushes for each build."""

_b, _e, _i, _m = models.builds.c, models.events.c, models.inbound.c, models.messages.c

PACE = {
    "BUILD_POLL_INTERVAL": "2000",
    "BUILD_PUSH_FRESHNESS": "5000",
    "DELIVERY_TIMEOUT": "2",
    "DELIVERY_RETRY_SCHEDULE": "1,1,2,2,5,5,5",
    "GITHUB_API_TIMEOUT": "2000",
    "GITLAB_API_TIMEOUT": "2000",
    "JENKINS_API_TIMEOUT": "2000",
}


def a_world():
    """Builds of every kind that is pushed at all; none yet."""
    kinds = {name: [kind for kind in KINDS[name] if kind != "startup_failure"] for name in KINDS}
    return World(11, 0, speed=SPEED, kinds=kinds)


def of_runs(build):
    """The build, with pushes about the run only."""
    moments = (
        replace(moment, events=tuple(event for event in moment.events if event.name in HOOK_EVENTS))
        for moment in build.moments
    )
    return replace(build, moments=tuple(moments))


class Killer(threading.Thread):
    """Kills one process after the other, for `seconds` or until `close`d.

    The supervisor waits longer and longer before it starts what dies so often.  So the web server is killed
    at work, once it took some pushes, and not as soon as it is there: else it would never take any.
    """

    def __init__(self, hub, sender, seconds):
        super().__init__(name="killer", daemon=True)
        self.hub = hub
        self.sender = sender
        self.kills = Counter()
        self._until = time.monotonic() + seconds
        self._sent = 0
        self._done = threading.Event()

    def run(self):
        rounds = Random(11)
        while time.monotonic() < self._until:
            for victim in rounds.sample(VICTIMS, len(VICTIMS)):
                if self._done.wait(KILL_EVERY_SECONDS):
                    return
                self._kill(victim)

    def _kill(self, victim):
        pid = self._pid(victim)
        sent = len(self.sender.results)
        if pid is None or ("web" in victim and sent < self._sent + AT_WORK_PUSHES):
            return
        if "web" in victim:
            self._sent = sent
        with suppress(ProcessLookupError):  # a web process goes by itself when its master was killed
            os.kill(pid, signal.SIGKILL)
            self.kills[victim] += 1

    def _pid(self, victim):
        if victim != "a web process":
            return self.hub.pid(victim)
        web = self.hub.pid("web")
        return next((each.pid for each in hubs.children(web)), None) if web else None

    def close(self):
        self._done.set()
        self.join(60)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request):
    """`(environment, url_of)`: settings that name a fresh store, and its SQLAlchemy URL once it runs."""
    if request.param == "sqlite":
        yield {}, lambda hub: f"sqlite:///{hub.data_dir / 'buildrelay.db'}"
        return
    with postgres.fresh_database(request.getfixturevalue("postgres_url")) as url:
        yield {"DATABASE_URL": url}, lambda _hub: url


def test_nothing_is_lost_while_everything_is_killed(store, capsys):
    environment, url_of = store
    with ExitStack() as stack:
        world = a_world()
        servers = {
            "github": stack.enter_context(GitHubServer(world, limit=10_000_000, points=10_000_000)),
            "gitlab": stack.enter_context(GitLabServer(world)),
            "jenkins": stack.enter_context(JenkinsServer(world)),
        }
        hub = stack.enter_context(running(environment | PACE | _platform_settings(servers)))
        subscriber = stack.enter_context(Subscriber())
        subscriber.behave(delay_seconds=0.05)  # so that deliveries are under way when a worker is killed
        subscriber.add_secret(hub.subscribe(subscriber.url)["secret"])

        sender = stack.enter_context(_sender(world, hub, servers))
        world.extend(round(PUSHES / PUSHES_PER_BUILD), spread_seconds=SECONDS * SPEED, every_kind=True)
        sender.add(map(of_runs, world.builds))
        began = time.monotonic()
        kills = _kill_until_all_is_sent(hub, world, sender)
        sent_after = time.monotonic() - began

        engine = db.connect(url_of(hub))
        stack.callback(engine.dispose)
        began = time.monotonic()
        until(lambda: _quiet_rows(engine), RECOVERY_SECONDS, "the last delivery")
        _wait_for_the_truth(world, hub, subscriber)
        rows = until(lambda: _quiet_rows(engine), RECOVERY_SECONDS, "a moment with nothing to deliver")
        counts = _check_rows(rows, sender) | _check_subscriber(rows, subscriber)
        counts |= {"builds": len(world.builds), "kills": sum(kills.values())}
        with capsys.disabled():
            print(f"\n  {engine.dialect.name}: {_told(counts)}; {dict(kills)}")
            print(
                f"  sent in {sent_after:.0f} s, quiet {time.monotonic() - began:.1f} s after; {sender.report()}"
            )
        assert min(kills[victim] for victim in VICTIMS) >= 1


def _platform_settings(servers):
    github, gitlab, jenkins = (servers[name] for name in ("github", "gitlab", "jenkins"))
    return {
        "GITHUB_API_URL": github.url,
        "GITHUB_TOKEN": github.tokens[0],
        "GITLAB_URL": gitlab.url,
        "GITLAB_TOKEN": gitlab.tokens[0],
        "JENKINS_URL": jenkins.url,
        "JENKINS_USERNAME": jenkins.username,
        "JENKINS_API_TOKEN": jenkins.api_token,
    }


def _sender(world, hub, servers):
    """Several threads; some pushes come twice, some late, and each until it got a 2xx."""
    shared = Secrets(*(hub.secrets[f"{name}_WEBHOOK_SECRET"] for name in ("GITHUB", "GITLAB", "JENKINS")))
    urls = {name: server.url for name, server in servers.items()}
    return Sender(world, hub.base, shared, urls, double=0.1, reorder=0.1, retry_until_accepted=True, lanes=8)


def _kill_until_all_is_sent(hub, world, sender):
    stream_seconds = world.ends_at - world.now()
    killer = Killer(hub, sender, 2 * stream_seconds)
    killer.start()
    try:
        last_word = 3 * stream_seconds + RECOVERY_SECONDS
        until(lambda: world.settled() and sender.finished, last_word, "the last 2xx")
    finally:
        killer.close()
    return killer.kills


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one moment."""

    inbound: list[Any]
    sequences: list[Any]
    last: list[Any]
    events: list[Any]
    messages: list[Any]


def _rows(engine):
    """What is there now, table after table."""
    with db.reading(engine) as connection:
        return Rows(
            connection.execute(select(_i.delivery_key, _i.source, _i.status)).all(),
            connection.execute(select(_e.build, _e.sequence).order_by(_e.build, _e.sequence)).all(),
            connection.execute(select(_b.id, _b.build_id, _b.sequence).order_by(_b.id)).all(),
            connection.execute(select(_e.id).order_by(_e.id)).all(),
            connection.execute(select(_m.event, _m.state, _m.attempts).order_by(_m.id)).all(),
        )


def _quiet_rows(engine):
    """The rows of a moment with nothing left to deliver, or None.

    The logs of failed builds are read for minutes, and each error they tell is one more event.  Rows that
    did not change from the first look to the second are those of one moment in between.
    """
    rows = _rows(engine)
    quiet = "pending" not in {row.state for row in rows.messages}
    return rows if quiet and rows == _rows(engine) else None


def _wait_for_the_truth(world, hub, subscriber):
    """Every build ends in its true state, and the subscriber was told so."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    while not (verdict := judge(world, hub.build, subscriber)).ok:
        assert time.monotonic() < deadline, str(verdict)
        time.sleep(1)


def _check_rows(rows, sender):
    """What got a 2xx is there once; sequences have no gaps; each event has its message, delivered."""
    _check_inbound(rows.inbound, sender)
    assert rows.sequences == [(row.id, n) for row in rows.last for n in range(1, row.sequence + 1)]
    assert sorted(row.event for row in rows.messages) == [row.id for row in rows.events]
    assert {row.state for row in rows.messages} == {"delivered"}
    return {
        "deliveries kept": len(rows.inbound),
        "events": len(rows.events),
        "messages": len(rows.messages),
        "tries": sum(row.attempts for row in rows.messages),
    }


def _check_inbound(inbound, sender):
    """Every push is there once by its delivery key, and nothing else is."""
    assert len(sender.accepted()) == len(sender.results)
    pushes = {sent.push.delivery_id: sent.push for sent in sender.accepted()}
    # Jenkins gives no ids: the digest of the body is the key, and no two bodies are equal.
    named = {id_ for id_, push in pushes.items() if push.build.platform != "jenkins"}
    kept = Counter(row.delivery_key.rpartition("|")[2] for row in inbound if row.source != "jenkins")
    assert kept == Counter(named)
    notices = Counter(row.delivery_key for row in inbound if row.source == "jenkins")
    assert set(notices.values()) == {1}
    assert len(notices) == len(pushes) - len(named)
    assert {row.status for row in inbound} == {"applied"}


def _check_subscriber(rows, subscriber):
    """It saw every event of every build, in order; what came twice came under the same webhook-id."""
    for row in rows.last:
        seen = subscriber.sequences(row.build_id)
        assert seen[: row.sequence] == tuple(range(1, row.sequence + 1)), row.build_id
    report = subscriber.report()
    assert subscriber.faults() == {}
    assert report["messages"] >= len(rows.events)
    return {"received": report["received"], "received twice": report["duplicates"]}


def _told(counts):
    return ", ".join(f"{count} {name}" for name, count in counts.items())
