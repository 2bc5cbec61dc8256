"""A data directory of any name: each URL and protocol that its path goes through brings it back unchanged."""

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis import Redis

from tests import hub as hubs
from tests.hub import PATIENCE_SECONDS, until
from webhook_app import cli, db, embedded, migrations, queues, settings, up
from webhook_app.settings import SettingsError
from webhook_app.supervisor import tied_to_parent

NAMES = {
    "blank": b"a b", "tab": b"a\tb", "newline": b"a\nb", "equals": b"a=b", "question": b"a?b=c&d", "percent": b"a%41%zz",
    "hash": b"a#b", "home": b"~root", "blank ends": b" a ", "shell": b"a'\"$`\\;&b", "colon": b"a:b@c", "dashes": b"--a",
    "unicode": "ünï日".encode(), "not UTF-8": b"a\xff\xfeb", "long": b"d" * 200,
}  # fmt: skip


@pytest.fixture
def name_dir():
    """`name_dir(name)`: a directory of this name; what it leaves under /tmp goes with it."""
    with ExitStack() as stack:
        base = stack.enter_context(hubs.directory())

        def make(name):
            made = base / os.fsdecode(NAMES[name])
            made.mkdir(mode=0o700)
            stack.callback(_forget_socket, made)
            return made

        yield make


def _forget_socket(data_dir):
    own = embedded.socket_path(data_dir)
    if own.parent != data_dir and own.parent.is_dir():
        own.unlink(missing_ok=True)
        own.parent.rmdir()


@contextmanager
def _run(*command, env=None):
    with subprocess.Popen(command, env=env, cwd=hubs.ROOT, preexec_fn=tied_to_parent()) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)


@pytest.mark.parametrize("name", NAMES)
def test_database_redis_and_a_worker_are_where_the_directory_is(name, name_dir):
    data_dir, since = name_dir(name), datetime.now(UTC)
    up.make_data_dir(data_dir)
    env = hubs.clean_environment(up.environment(data_dir, "127.0.0.1", os.environ))
    values = settings.load(env)
    assert values.data_dir == data_dir
    engine = db.connect(values.database_url)
    assert db.missing_file(engine) == str(data_dir / "buildrelay.db")
    migrations.upgrade(engine)
    engine.dispose()
    assert (data_dir / "buildrelay.db").stat().st_size > 0
    with _run(*embedded.command(data_dir)):
        until(lambda: embedded.answers(data_dir), PATIENCE_SECONDS, "Redis")
        assert (data_dir / "redis" / "redis.log").is_file()
        with (
            Redis.from_url(values.redis_url) as redis,
            _run(sys.executable, "-m", "jobs.worker", "deliver", env=env) as worker,
        ):
            until(
                lambda: worker.poll() is not None or queues.bells_served_by(redis, [worker.pid], since),
                PATIENCE_SECONDS,
                "a worker",
            )
            assert worker.poll() is None, "the worker ended"
            assert queues.bells_served_by(redis, [worker.pid], since) == {"deliver"}


@pytest.mark.parametrize("name", ["tab", "question", "not UTF-8"])
def test_up_is_ready_and_stops_in_a_directory_of_any_name(name, name_dir):
    data_dir = name_dir(name) / "blank ends "
    with hubs.running(data_dir=data_dir) as hub:
        assert hub.report("r1", "build_started").status_code == 202
        until(lambda: "BuildRelay is ready" in hub.output(), PATIENCE_SECONDS, "the banner")
        assert (data_dir / "buildrelay.db").is_file()
        assert "ended" not in hub.output()
    _forget_socket(data_dir)


def test_the_socket_stays_in_a_directory_whose_path_a_client_can_read():
    assert embedded.is_plain("/srv/build_relay-1.2/data+x/a:b@c,~d")
    for name in ("a b", "a\tb", "a=b", "a\nb", "é", "a%b", "a?b", ""):
        assert not embedded.is_plain(name)


def test_workers_of_others_and_of_the_past_make_nothing_ready(redis_client):
    from tests.test_api import _register_worker

    before = datetime.now(UTC)
    _register_worker(redis_client, ["deliver"])
    assert queues.bells_served_by(redis_client, [os.getpid()], before) == {"deliver"}
    assert queues.bells_served_by(redis_client, [os.getpid()], datetime.now(UTC)) == set()
    assert queues.bells_served_by(redis_client, [1], before) == set()


def test_what_a_tilde_stands_for_and_where_it_is_a_letter(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert settings.directory("~/data") == tmp_path / "data"
    assert settings.directory("./~root") == tmp_path / "~root"
    assert settings.directory("data ").name == "data "
    with pytest.raises(SystemExit):
        cli.main(["up", "--data-dir", "~nobody-of-this-name/data"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("DATABASE_URL", "sqlite:////srv/a?b/store.db"), ("REDIS_URL", "unix:///srv/a%20b/redis.sock")],
)
def test_a_url_that_would_lead_elsewhere_is_refused_with_what_to_write(name, value):
    with pytest.raises(SettingsError, match=f"^{name}="):
        settings.load({name: value})


def test_a_url_of_sqlite_means_the_file_it_names(tmp_path):
    url = settings.load({"DATABASE_URL": f"sqlite:///{tmp_path}/a%3Fb%20c.db"}).database_url
    assert db.sqlite_file(url) == tmp_path / "a?b c.db"
    uri = settings.load({"DATABASE_URL": f"sqlite:///file:{tmp_path}/x.db?mode=rwc&uri=true"}).database_url
    assert db.sqlite_file(uri) == tmp_path / "x.db"
    assert db.sqlite_file("postgresql+psycopg://u@h/x") is None


def test_the_banner_shows_any_path_on_one_line(tmp_path):
    values = settings.load({"BUILDRELAY_DATA_DIR": f"{tmp_path}/a\n\udcff"})
    said = up.banner("http://x", values, first=True, private=False)
    assert r"a\n" in said
    said.encode()
    assert Path(up._shown(Path("/srv/ü b"))) == Path("/srv/ü b")


def test_up_says_ready_only_when_its_workers_serve():
    port, said = hubs.free_port(), "not ready yet: Redis does not answer (ConnectionError)"
    with hubs.directory() as home:
        env = hubs.clean_environment({"REDIS_URL": f"redis://127.0.0.1:{port}/0"})
        command = [sys.executable, "-m", "webhook_app", "up", "--port", str(hubs.free_port())]
        with hubs.started([*command, "--data-dir", str(home / "data")], home / "log", env) as process:
            read = (home / "log").read_text
            until(lambda: said in read() or process.poll() is not None, PATIENCE_SECONDS, "the reason")
            assert "BuildRelay is ready" not in read()
            redis = (
                embedded.find_server(),
                "--port",
                str(port),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--dir",
                home,
            )
            with _run(*map(str, redis)):
                until(lambda: "BuildRelay is ready" in read(), PATIENCE_SECONDS, "the banner")
                hubs.stop(process)
