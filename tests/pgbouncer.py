"""A real PgBouncer before a PostgreSQL server, in transaction mode: each transaction gets any server connection."""

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from tests import postgres
from tests.hub import PATIENCE_SECONDS, free_port, until
from webhook_app.supervisor import tied_to_parent

CONFIG = """
[databases]
* = {server} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {size}
server_round_robin = 1
max_client_conn = 100
{more}
"""


def binary():
    """The program; where it must be there (`.ci/run`, or any CI) its absence fails the test, else it is skipped."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if found is None:
        reason = "pgbouncer is not installed"
        if os.environ.get("PGBOUNCER_NEEDED") or os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def _unprivileged():
    """It refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


@contextmanager
def before(url, size=2, more=""):
    """Yields the URL of the same database by way of a PgBouncer with so many server connections.

    `more`: further lines of its configuration.
    """
    made, port, program = make_url(url), free_port(), binary()
    host = made.query.get("host", made.host)
    with tempfile.TemporaryDirectory(prefix="buildrelay-pooler-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        config = directory / "pgbouncer.ini"
        server = f"host={host} port={made.port or 5432}" + (
            f" password={made.password}" if made.password else ""
        )
        config.write_text(CONFIG.format(server=server, user=made.username, port=port, size=size, more=more))
        through = postgres.through(url, port)
        with (
            (directory / "log").open("wb") as log,
            subprocess.Popen(
                [program, str(config)], stdout=log, stderr=log, preexec_fn=tied_to_parent(), **_unprivileged()
            ) as process,
        ):
            try:
                until(lambda: _answers(through) or process.poll() is not None, PATIENCE_SECONDS, "PgBouncer")
                assert process.poll() is None, (directory / "log").read_text()
                yield through
            finally:
                process.kill()


def _answers(url):
    try:
        postgres.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True
