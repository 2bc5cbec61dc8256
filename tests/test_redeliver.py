"""Deliveries that we missed are asked for again: a real reception, the simulated platforms, one stepped clock."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from sqlalchemy import select
from werkzeug.serving import make_server

from jobs import redeliver as redeliver_job
from jobs import sweep as sweep_job
from tests.hub import free_port
from tests.stand import ON_SQLITE, stands
from webhook_app import app as web
from webhook_app import db, health, models, queues, registration
from webhook_app.account import Account
from webhook_app.registration import Address
from webhook_app.simulated.httpd import Response, json_response
from webhook_app.simulated.sender import Secrets, Sender
from webhook_app.web import hooks

SECRETS = Secrets(
    "github secret of the tests",
    "whsec_dGVzdHRlc3R0ZXN0dGVzdHRlc3R0ZXN0dGVzdHRlc3Q=",
    "jenkins secret of the tests",
)


class Relay:
    """BuildRelay's reception at an address that is there or not."""

    def __init__(self, monkeypatch):
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.stack = ExitStack()
        self.monkeypatch = monkeypatch

    def start(self, stand):
        now = lambda: datetime.fromtimestamp(stand.clock(), UTC)  # noqa: E731
        self.monkeypatch.setattr(web, "utc_now", now)
        self.monkeypatch.setattr(hooks, "time", SimpleNamespace(time=stand.clock, monotonic=time.monotonic))
        app = web.create_app(stand.held.settings)
        self.stack.callback(app.extensions["buildrelay"].engine.dispose)
        self.stack.callback(app.extensions["buildrelay"].redis.close)
        server = make_server("127.0.0.1", self.port, app, threaded=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.stack.callback(server.server_close)
        self.stack.callback(thread.join, 5)
        self.stack.callback(server.shutdown)

    def stop(self):
        self.stack.close()


@pytest.fixture
def relay(monkeypatch):
    made = Relay(monkeypatch)
    yield made
    made.stop()


@pytest.fixture
def make_stand(engine, redis_client, redis_url, store_url, monkeypatch, relay):
    """A stand that listens at `relay`, with a sender at its platform."""
    with stands(engine, redis_client, monkeypatch) as make:

        def made(platform, count, **more):
            variables = {
                "PUBLIC_URL": relay.base, "REDIS_URL": redis_url, "DATABASE_URL": url_of(store_url),
                f"{platform.upper()}_WEBHOOK_SECRET": getattr(SECRETS, platform), "ADMIN_TOKEN": "admin-token-of-the-tests",
            }  # fmt: skip
            kinds = {platform: ["success"]}
            stand = make((platform,), count, kinds=kinds, speed=0.1, **(variables | more))
            server = stand.servers[platform]
            sender = Sender(
                stand.world, relay.base, SECRETS, {platform: server.url}, hooks={platform: server.hooks}
            )
            if platform == "github":
                server.deliveries = sender
            else:
                server.hooks.sendings = sender
            return stand, sender

        yield made


def url_of(store_url):
    return store_url.replace("postgresql+psycopg", "postgres")


def connect(stand, platform):
    settings = stand.held.settings.sources[platform]
    for repository in settings.repositories:
        registration.connect(
            Account(settings, None), repository, Address(platform, stand.held.settings.public_url)
        )


def sweep(stand, after=0.0):
    stand.clock.advance(after)
    sweep_job.sweep(stand.held)


def restart(stand, relay):
    """Everything is started anew, and sweeps for the first time."""
    relay.start(stand)
    stand.restart()
    sweep(stand, after=1)


def redeliver(stand, after=0.0):
    stand.clock.advance(after)
    redeliver_job.redeliver(stand.held)


def attempts(stand, platform):
    path = {"github": "/attempts", "gitlab": "/resend"}[platform]
    return stand.servers[platform].count(path)


def states(stand):
    return [(stand.row(build) or {}).get("state") for build in stand.world.builds]


@pytest.mark.parametrize("platform", ["github", "gitlab"])
def test_what_was_sent_while_we_were_away_is_sent_again(make_stand, relay, platform):
    stand, sender = make_stand(platform, 2)
    sweep(stand)
    connect(stand, platform)
    stand.clock.advance(900)
    sender.send_due()
    assert {sent.status for sent in sender.results} == {None}
    assert states(stand) == [None] * 2
    restart(stand, relay)
    assert stand.redis.exists(queues.bell_key(queues.DISCOVER), queues.bell_key(queues.REDELIVER)) == 2
    assert [notice["kind"] for notice in stand.notices()] == ["relay.was_down"]
    for _ in range(10):
        redeliver(stand, after=60)
        sender.send_due()
    assert states(stand) == ["completed"] * 2
    assert all(
        stand.row(build)["last_push_at"] and not stand.row(build)["poll_count"]
        for build in stand.world.builds
    )
    told = [one.push.delivery_id for one in sender.accepted()]
    assert sorted(told) == sorted({one.push.delivery_id for one in sender.results}), "each once"


@ON_SQLITE
def test_a_missed_push_has_its_repository_looked_at_once(make_stand, relay):
    stand, sender = make_stand("github", 1)
    relay.start(stand)
    connect(stand, "github")
    sweep(stand)
    server = stand.servers["github"]
    looks = server.count("/hooks")
    redeliver(stand)
    assert server.count("/hooks") == looks, "without a miss nobody asks"
    relay.stop()
    sweep(stand, after=900)  # only reception is away
    sender.send_due()
    stand.discover()
    relay.start(stand)
    for _ in range(5):
        redeliver(stand, after=60)
        sender.send_due()
    (build,) = stand.world.builds
    with db.reading(stand.engine) as connection:
        assert health.snapshot(connection)["github"]["missed_pushes"] >= 1
        pushes = health.snapshot(connection)["github"]["pushes"]
    assert pushes == attempts(stand, "github") == len({one.push.delivery_id for one in sender.results})
    assert stand.row(build)["last_push_at"] is not None
    looks = server.count("/deliveries")
    redeliver(stand, after=3600)
    assert server.count("/deliveries") == looks


@ON_SQLITE
def test_what_arrived_in_the_end_is_not_asked_for(make_stand, relay):
    stand, sender = make_stand("github", 1)
    connect(stand, "github")
    sweep(stand)
    stand.clock.advance(300)
    sender.send_due()
    restart(stand, relay)
    for number in range(1, len(sender.results) + 1):
        sender.resend(number)  # somebody pressed "Redeliver"
    looks = stand.servers["github"].count("/deliveries")
    redeliver(stand)
    assert stand.servers["github"].count("/deliveries") > looks
    assert attempts(stand, "github") == 0


@ON_SQLITE
def test_without_permission_admins_are_told_once_and_nobody_asks_for_a_day(make_stand, relay):
    stand, _ = make_stand("github", 3)
    stand.servers["github"].permissions["repository_hooks"] = "none"
    sweep(stand)
    stand.clock.advance(120)
    restart(stand, relay)
    redeliver(stand)
    repositories = len(stand.held.settings.sources["github"].repositories)
    assert stand.servers["github"].count("/hooks") == repositories
    redeliver(stand, after=3600)
    assert stand.servers["github"].count("/hooks") == repositories
    assert len(stand.notices("source.hooks_hidden")) == 1
    redeliver(stand, after=86_400)
    assert stand.servers["github"].count("/hooks") == 2 * repositories
    assert len(stand.notices("source.hooks_hidden")) == 1


@ON_SQLITE
@pytest.mark.parametrize("status", [403, 502])
def test_secrets_in_what_the_platform_says_of_webhooks_are_masked(make_stand, relay, caplog, status):
    stand, _ = make_stand("github", 1)
    secret = SECRETS.github
    sweep(stand)
    stand.clock.advance(120)
    restart(stand, relay)
    answer = json_response({"message": f"no, {secret}"}, status)
    stand.servers["github"].inject(answer, path_contains="/hooks")
    redeliver(stand)
    lines = [one.getMessage() for one in caplog.records if "webhook not looked at" in one.getMessage()]
    assert lines
    assert all("no, ***" in line for line in lines)
    shown = [*lines, *(notice["text"] for notice in stand.notices())]
    with db.reading(stand.engine) as connection:
        shown += [row["api_error"] or "" for row in health.snapshot(connection).values()]
    assert not any(secret in text for text in shown)


@ON_SQLITE
def test_a_platform_that_fails_is_asked_later(make_stand, relay):
    stand, sender = make_stand("github", 1)
    connect(stand, "github")
    sweep(stand)
    stand.clock.advance(300)
    sender.send_due()
    restart(stand, relay)
    server = stand.servers["github"]
    server.inject(Response(502), path_contains="/hooks")
    redeliver(stand)
    server.clear_faults()
    redeliver(stand, after=60)
    assert attempts(stand, "github") == 0
    redeliver(stand, after=300)
    assert attempts(stand, "github") > 0
    assert stand.notices("source.hooks_hidden") == []


@ON_SQLITE
def test_a_run_asks_for_no_more_than_github_takes_in_a_minute(make_stand, relay, monkeypatch):
    monkeypatch.setattr(redeliver_job, "MOST_IN_ALL", 4)
    stand, sender = make_stand("github", 6)
    connect(stand, "github")
    sweep(stand)
    stand.clock.advance(900)
    sender.send_due()
    restart(stand, relay)
    redeliver(stand)
    assert attempts(stand, "github") == redeliver_job.MOST_ASKED, "the other repositories wait"
    for _ in range(30):
        redeliver(stand, after=200)
        sender.send_due()
    assert states(stand) == ["completed"] * 6


@ON_SQLITE
def test_a_limit_ends_the_looks_at_a_source_and_pauses_it(make_stand, relay):
    stand, sender = make_stand("github", 3)
    connect(stand, "github")
    assert len(stand.held.settings.sources["github"].repositories) > 1
    sweep(stand)
    stand.clock.advance(300)
    sender.send_due()
    restart(stand, relay)
    server = stand.servers["github"]
    server.inject(Response(429, headers={"Retry-After": "600"}), path_contains="/hooks")
    before = server.count()
    redeliver(stand)
    assert server.count() == before + 1, "nothing more is asked of it"
    assert stand.pauses()["github"] == (pytest.approx(600, abs=1), "rate_limited")
    server.clear_faults()
    redeliver(stand, after=601)
    assert attempts(stand, "github") > 0
    with db.reading(stand.engine) as connection:
        row = connection.execute(select(models.budgets)).mappings().one()
    assert row["requests"] == server.count() - before, "looks are charged to the token"
    assert (row["owner"], row["strikes"]) == (None, 0)


@ON_SQLITE
def test_a_look_that_was_cut_short_is_made_again(make_stand, relay, monkeypatch):
    stand, sender = make_stand("github", 1)
    connect(stand, "github")
    sweep(stand)
    stand.clock.advance(300)
    sender.send_due()
    restart(stand, relay)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(redeliver_job, "_follow", die)
        with pytest.raises(Killed):
            redeliver(stand)
    redeliver(stand, after=60)
    assert attempts(stand, "github") == 0, "another worker may be at it"
    redeliver(stand, after=150)
    assert attempts(stand, "github") > 0


def test_two_workers_at_once_ask_once(make_stand, relay):
    stand, sender = make_stand("github", 2)
    connect(stand, "github")
    sweep(stand)
    stand.clock.advance(900)
    sender.send_due()
    restart(stand, relay)
    with ThreadPoolExecutor(4) as workers:
        list(workers.map(redeliver_job.redeliver, [stand.held] * 4))
    assert attempts(stand, "github") == len(guids(stand)) > 0


@ON_SQLITE
def test_old_redeliveries_are_forgotten(make_stand, relay):
    stand, _ = make_stand("github", 1)
    row = {"source": "github", "hook_id": "1", "guid": "g", "asked_at": stand.now()}
    db.in_transaction(stand.engine, lambda connection: health.upsert(connection, models.redeliveries, [row]))
    redeliver(stand, after=7 * 86_400)
    assert guids(stand) == ["g"]
    redeliver(stand, after=2 * 86_400)
    assert guids(stand) == []


def guids(stand):
    with db.reading(stand.engine) as connection:
        return connection.execute(select(models.redeliveries.c.guid)).scalars().all()


@ON_SQLITE
def test_a_project_that_is_known_by_two_names_is_looked_at_once(make_stand, relay):
    stand, _ = make_stand("gitlab", 3)
    sweep(stand)
    stand.clock.advance(120)
    stand.discover()
    stand.poll()
    sources = stand.held.settings.sources
    with db.reading(stand.engine) as connection:
        looks = list(redeliver_job.due(connection, sources, stand.now()))
    builds = {build.repository.full_name for build in stand.world.builds}
    ids = {str(build.repository.id) for build in stand.world.builds}
    assert {look.repository for look in looks if look.since} == builds, "their pushes were missed"
    assert not ids & {look.repository for look in looks}
    assert len(looks) == len(sources["gitlab"].repositories)


@ON_SQLITE
def test_admins_are_told_once_that_gitlab_has_muted_our_webhook_and_once_that_it_works_again(
    make_stand, relay
):
    stand, _ = make_stand("gitlab", 1)
    server = stand.servers["gitlab"]
    server.hooks.auto_disable = True
    connect(stand, "gitlab")
    redeliver(stand)
    looks = server.count("/hooks")
    redeliver(stand, after=3500)
    assert server.count("/hooks") == looks, "once an hour"
    muted = server.hooks.hooks[0]
    for _ in range(40):
        server.hooks.settle(muted.target, 500)
    redeliver(stand, after=101)
    redeliver(stand, after=3700)
    told = stand.notices("source.hook_disabled")
    assert len(told) == 1
    assert "disabled" in told[0]["text"]
    server.hooks.settle(muted.target, 202)
    redeliver(stand, after=3700)
    redeliver(stand, after=3700)
    assert len(stand.notices("source.hook_enabled")) == 1
