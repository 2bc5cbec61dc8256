"""The processes that the parts need: web, `up`, Redis, PostgreSQL, a subscriber."""

import os
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
from cryptography.fernet import Fernet

from bench import machine
from tests import postgres
from webhook_app import db, embedded, migrations, subscribers
from webhook_app.supervisor import tied_to_parent
from webhook_app.times import utc_now
from webhook_app.up import read_secrets

PYTHON = sys.executable
KEY = os.environ.get("ENCRYPTION_KEYS") or Fernet.generate_key().decode()
"""A child seals with the key of its parent."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Up:
    """A running `buildrelay up`."""

    pid: int
    port: int
    secrets: Mapping[str, str]

    def post(self, path: str, content: object) -> dict:
        """Call the API with the admin's token."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            orjson.dumps(content),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.secrets['ADMIN_TOKEN']}"},
        )
        with _DIRECT.open(request, timeout=30) as reply:
            return orjson.loads(reply.read())


@contextmanager
def gunicorn(application: str, directory: Path, env: Mapping[str, str]) -> Iterator[tuple[int, int]]:
    """A web process with our settings of gunicorn, one worker; its pid and port."""
    port = machine.free_port()
    argv = (PYTHON, "-m", "gunicorn", "--config", "python:webhook_app.gunicorn_conf", application)
    more = {"BUILDRELAY_BIND": f"127.0.0.1:{port}", "WEB_CONCURRENCY": "1"}
    with machine.process(argv, {**env, **more}, directory / "web.log") as child:
        machine.wait_until(lambda: is_listening(port), "gunicorn")
        yield child.pid, port


def is_listening(port: int) -> bool:
    """Does anything take connections there?"""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def redis(directory: Path) -> Iterator[str]:
    """The embedded Redis; its URL."""
    with machine.process(embedded.command(directory), machine.environment(), directory / "redis.log"):
        machine.wait_until(lambda: embedded.answers(directory), "Redis")
        yield embedded.redis_url(directory)


@contextmanager
def postgresql() -> Iterator[tuple[str, int]]:
    """A server as it is by default: with fsync, unlike that of the tests; a database's URL, and its pid."""
    with tempfile.TemporaryDirectory(prefix="buildrelay-pg-") as name:
        directory, bin_dir = Path(name), postgres.binaries()
        prefix, identity = postgres._unprivileged(bin_dir / "initdb", directory)
        options = {"env": postgres._ENVIRONMENT, "cwd": directory, **identity}
        data, log = directory / "data", directory / "log"
        make = [bin_dir / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run([*prefix, *make], check=True, capture_output=True, **options)
        run = [*prefix, bin_dir / "postgres", "-D", data, "-k", directory, "-c", "listen_addresses="]
        with log.open("wb") as output, subprocess.Popen(
            run, stdout=output, stderr=output, preexec_fn=tied_to_parent(), **options  # noqa: PLW1509
        ) as process:  # fmt: skip
            try:
                url = f"postgresql+psycopg://postgres@/postgres?host={directory}"
                yield postgres._when_ready(url, process, log), process.pid
            finally:
                postgres._stop(process)


def prepare(url: str, *callbacks: str) -> list[str]:
    """Make the tables and the subscribers; the subscribers' secrets."""
    engine = db.connect(url, "NORMAL")
    migrations.upgrade(engine)
    wanted = [{"url": callback, "signing": "hmac"} for callback in callbacks]
    made = db.as_writer(
        engine, lambda write: [subscribers.create(write, one, (KEY,), utc_now()) for one in wanted]
    )
    engine.dispose()
    return [secret for _, secret in made]


@contextmanager
def receiver(delay_seconds: float, directory: Path) -> Iterator[str]:
    """A subscriber that checks nothing, in a process of its own; its URL."""
    argv = (PYTHON, "-m", "bench.receiver", str(delay_seconds))
    with machine.process(
        argv, machine.environment(), directory / "receiver.log", stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        yield f"http://127.0.0.1:{child.stdout.readline().strip()}"


def worker_environment(url: str, redis_url: str, directory: Path) -> dict[str, str]:
    """What a worker needs that sends to subscribers on this machine."""
    return machine.environment(
        DATABASE_URL=url, REDIS_URL=redis_url, ENCRYPTION_KEYS=KEY, ALLOW_PRIVATE_CALLBACKS="true",
        BUILDRELAY_DATA_DIR=str(directory), LOG_LEVEL="error",
    )  # fmt: skip


@contextmanager
def worker(env: Mapping[str, str], directory: Path, *names: str) -> Iterator[int]:
    """A worker process that serves these queues; its pid."""
    with machine.process((PYTHON, "-m", "jobs.worker", *names), env, directory / "worker.log") as child:
        yield child.pid


@contextmanager
def up(data_dir: Path, log_dir: Path) -> Iterator[Up]:
    """`buildrelay up`, ready."""
    port = machine.free_port()
    argv = (PYTHON, "-m", "webhook_app", "up", "--port", str(port), "--data-dir", str(data_dir))
    with machine.process(argv, machine.environment(), log_dir / "up.log") as child:
        machine.wait_until(lambda: is_ready(port), "/readyz", pause_seconds=0.01)
        yield Up(child.pid, port, read_secrets(data_dir))


def is_ready(port: int) -> bool:
    """Does `/readyz` answer 200?"""
    try:
        with _DIRECT.open(f"http://127.0.0.1:{port}/readyz", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:  # refused, or a 503
        return False
