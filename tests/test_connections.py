"""Connections: how many the formation of `app.json` needs at full load, and how long idle ones stay open."""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import requests
from redis import Redis

from tests import hub as hubs
from tests import postgres
from tests.hub import PATIENCE_SECONDS, until
from webhook_app.simulated.subscriber import Subscriber

POSTGRES_CONNECTIONS, REDIS_CONNECTIONS = 18, 15
"""At most; small plans allow 20 of each."""

READS = ("/metrics", "/readyz", "/api/builds", "/api/sources", "/api/events", "/api/notifications")


class Census:
    """Counts the connections of a database and of a Redis again and again; the most of each.  A context manager."""

    def __init__(self, database, redis):
        self.database, self.redis = database, redis
        self.most_of_postgres = self.most_of_redis = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join(PATIENCE_SECONDS)

    def _run(self):
        asked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        with closing(postgres.connect(self.database)) as session, Redis.from_url(self.redis) as client:
            while not self._over.wait(0.02):
                (count,) = session.execute(asked).fetchone()
                self.most_of_postgres = max(self.most_of_postgres, count)
                self.most_of_redis = max(self.most_of_redis, len(client.client_list()) - 1)


@contextlib.contextmanager
def formation(stack, postgres_url, platforms):
    """The processes of the Procfile as `app.json` has them: the hub, and the URLs of both stores."""
    root = hubs.ROOT
    described = json.loads((root / "app.json").read_text())
    assert {name: each["quantity"] for name, each in described["formation"].items()} == {
        "web": 1,
        "worker": 1,
        "scheduler": 1,
    }
    lines = (line.partition(": ") for line in (root / "Procfile").read_text().splitlines())
    commands = {name: shlex.split(command) for name, _, command in lines}
    home = stack.enter_context(hubs.directory())
    url = stack.enter_context(postgres.fresh_database(postgres_url))
    redis_url, _server = stack.enter_context(hubs.own_redis())
    port = hubs.free_port()
    secrets = {"ADMIN_TOKEN": "admin-of-the-test", "GITHUB_WEBHOOK_SECRET": "secret-of-github"}
    env = hubs.clean_environment(
        {
            **platforms.environment(),
            **secrets,
            "ENCRYPTION_KEYS": "x7d6q1sVd4hUOFNTUcXb0h8mTrmVjRZ6dZ9vM2l0n2E=",
            "DATABASE_URL": url,
            "REDIS_URL": redis_url,
            "PORT": str(port),
            "WEB_CONCURRENCY": described["env"]["WEB_CONCURRENCY"]["value"],
            "ALLOW_PRIVATE_CALLBACKS": "true",
            "LOG_LEVEL": "warning",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
    )
    with hubs.started(commands["release"], home / "log", env) as release:
        assert release.wait(PATIENCE_SECONDS) == 0
    started = [
        stack.enter_context(hubs.started(commands[name], home / "log", env))
        for name in described["formation"]
    ]
    hub = hubs.Hub(f"http://127.0.0.1:{port}", home, home / "log", secrets)
    stack.enter_context(hub.http)
    hub.wait_ready()
    try:
        yield hub, url, redis_url
    except BaseException:
        print(hub.output()[-20_000:])
        raise
    for process in started:
        hubs.stop(process)


def test_the_formation_of_app_json_needs_few_connections_at_full_load(postgres_url):
    """48 readers and 16 senders at once, more than the web processes have threads; endpoints are slow."""
    with (
        contextlib.ExitStack() as stack,
        hubs.Platforms() as platforms,
        Subscriber() as endpoint,
        formation(stack, postgres_url, platforms) as (hub, url, redis_url),
    ):
        endpoint.behave(delay_seconds=0.5)
        for _ in range(8):
            endpoint.add_secret(hub.subscribe(endpoint.url, ordered=False)["secret"])
        builds = [platforms.begin("github") for _ in range(32)]
        base = platforms.servers["github"].url

        def send(build):
            return [hub.push(push, base).status_code for push in platforms.pushes(build)]

        def read(number):
            headers = {"Authorization": f"Bearer {hub.secrets['ADMIN_TOKEN']}"}
            paths = [READS[(number + step) % len(READS)] for step in range(6)]
            asked = (
                requests.get(hub.base + path, headers=headers, timeout=PATIENCE_SECONDS) for path in paths
            )
            return [answer.status_code for answer in asked]

        with Census(url, redis_url) as census, ThreadPoolExecutor(64) as clients:
            sending = [clients.submit(send, build) for build in builds]
            reading = [clients.submit(read, number) for number in range(96)]
            # on a machine that is slow enough some of them wait for too long, and are told so
            assert {status for one in reading for status in one.result(300)} - {503} == {200}
            assert {status for one in sending for status in one.result(300)} == {202}
            until(lambda: sum(endpoint.types().values()) >= len(builds), PATIENCE_SECONDS, "messages")
        print(f"at most {census.most_of_postgres} to PostgreSQL, {census.most_of_redis} to Redis")
        assert 8 <= census.most_of_postgres <= POSTGRES_CONNECTIONS
        assert 4 <= census.most_of_redis <= REDIS_CONNECTIONS


# ---- idle connections of a proxy -------------------------------------------------------------


@contextlib.contextmanager
def web(migrated_sqlite, **environment):
    """A web process of its own on SQLite: its port."""
    with hubs.directory() as home:
        port = hubs.free_port()
        shutil.copy(migrated_sqlite, home / "store.db")
        env = hubs.clean_environment(
            {
                "DATABASE_URL": f"sqlite:///{home / 'store.db'}",
                "BUILDRELAY_DATA_DIR": str(home),
                "BUILDRELAY_BIND": f"127.0.0.1:{port}",
                "WEB_CONCURRENCY": "1",
                **environment,
            }
        )
        command = [
            sys.executable,
            "-m",
            "gunicorn",
            "--config",
            "python:webhook_app.gunicorn_conf",
            "wsgi:app",
        ]
        with hubs.started(command, home / "log", env):
            until(lambda: _is_healthy(port), PATIENCE_SECONDS, "the web process")
            yield port


def _is_healthy(port):
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE_SECONDS).ok
    return False


def ask(connection):
    """One request on a connection; whether it is kept afterwards."""
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while b"}" not in answer:
        answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200")
    return b"connection: close" not in answer.lower()


def test_an_idle_connection_stays_open_for_as_long_as_the_setting_says(migrated_sqlite):
    with (
        web(migrated_sqlite, KEEP_ALIVE_SECONDS="2") as port,
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as connection,
    ):
        asked = time.monotonic()
        assert ask(connection)
        assert ask(connection)
        assert connection.recv(1) == b""
        assert time.monotonic() - asked >= 2


def test_without_a_setting_it_outlives_that_of_the_router():
    told = "from webhook_app import gunicorn_conf; print(gunicorn_conf.keepalive)"
    made = subprocess.run(
        [sys.executable, "-c", told],
        env=hubs.clean_environment({}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(made.stdout) == 95


def test_idle_connections_leave_room_for_new_ones(migrated_sqlite):
    """Room for 30 connections and 24 threads: some 6 idle ones are kept, and every new one is answered."""
    with (
        web(migrated_sqlite, GUNICORN_CMD_ARGS="--worker-connections=30") as port,
        contextlib.ExitStack() as stack,
    ):
        kept = 0
        for _ in range(40):
            connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
            kept += ask(stack.enter_context(connection))
        assert 0 < kept < 12
