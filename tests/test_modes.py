"""Nobody else on the machine reads our files: real processes, whatever the umask."""

import ast
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import hub as hubs
from tests.hub import PATIENCE_SECONDS, until
from webhook_app import doctor, settings, up
from webhook_app.up import CannotStart

SH = 'umask "$1"; shift; exec "$@"'
RELAY = (sys.executable, "-m", "webhook_app")


def open_ones(directory):
    """What in it, itself included, has a mode for group or others."""
    paths = [directory, *directory.rglob("*")]
    return [str(path) for path in paths if not path.is_symlink() and path.lstat().st_mode & 0o077]


def umasked(umask, *command):
    return ["/bin/sh", "-c", SH, "sh", umask, *command]


def run(umask, *command, **environ):
    env = hubs.clean_environment(environ)
    return subprocess.run(
        umasked(umask, *command), env=env, cwd=hubs.ROOT, capture_output=True, text=True, timeout=120
    )


@contextmanager
def up_in(data_dir, log, umask="022"):
    command = umasked(umask, *RELAY, "up", "--port", str(hubs.free_port()), "--data-dir", str(data_dir))
    with hubs.started(command, log, hubs.clean_environment({})) as process:
        until(lambda: "is ready" in log.read_text() or process.poll() is not None, PATIENCE_SECONDS, "it")
        yield process
        if process.poll() is None:
            hubs.stop(process)


@pytest.fixture
def home():
    with hubs.directory() as made:
        yield made


@pytest.mark.parametrize("umask", ["000", "022", "377"])
def test_all_that_up_makes_is_for_its_user_alone(umask, home):
    with up_in(home / "data", home / "log", umask) as process:
        assert process.poll() is None, (home / "log").read_text()
        assert open_ones(home / "data") == []
        names = {path.name for path in (home / "data").rglob("*")}
        assert names >= {
            "buildrelay.db",
            "buildrelay.db-wal",
            "buildrelay.db-shm",
            "redis.sock",
            "redis.log",
            "up.lock",
        }
    assert open_ones(home / "data") == []


def test_an_open_directory_of_ours_is_closed_and_that_is_said(home):
    data_dir = home / "data"
    with up_in(data_dir, home / "log"):
        pass
    for path in [data_dir, *data_dir.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    with up_in(data_dir, home / "again"):
        assert f"{data_dir} was open to other users: its mode is 0700 now" in (home / "again").read_text()
        assert open_ones(data_dir) == []


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o777])
def test_an_open_directory_with_other_things_in_it_is_refused_with_the_fix(home, mode):
    home.chmod(mode)
    (home / "my notes.txt").write_text("x")
    with pytest.raises(CannotStart, match=f"open to other users of this machine: run `chmod 700 {home}`"):
        up.make_data_dir(home)
    assert home.stat().st_mode & 0o777 == mode
    assert [path.name for path in home.iterdir()] == ["my notes.txt"]
    home.chmod(0o700)
    assert not up.make_data_dir(home)


def test_a_link_to_secrets_elsewhere_is_left_as_it_is(tmp_path):
    kept = tmp_path / "own.env"
    kept.write_text("")
    kept.chmod(0o640)
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "secrets.env").symlink_to(kept)
    up.make_data_dir(tmp_path / "data")
    assert kept.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("umask", ["000", "777"])
def test_a_store_that_migrate_makes_elsewhere_is_private_too(tmp_path, umask):
    file = tmp_path / "store.db"
    more = {"DATABASE_URL": f"sqlite:///{file}", "BUILDRELAY_DATA_DIR": str(tmp_path)}
    made = run(umask, *RELAY, "migrate", **more)
    assert (made.returncode, made.stderr) == (0, "")
    assert open_ones(tmp_path) == []
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_store_that_is_there_keeps_its_mode_and_is_warned_of(tmp_path):
    file = tmp_path / "store.db"
    url = f"sqlite:///{file}"
    more = {"DATABASE_URL": url, "BUILDRELAY_DATA_DIR": str(tmp_path / "data")}
    assert run("022", *RELAY, "migrate", **more).returncode == 0
    file.chmod(0o644)
    made = run("022", *RELAY, "migrate", **more)
    assert f"{file} can be read by other users of this machine" in made.stderr
    assert file.stat().st_mode & 0o777 == 0o644
    (finding,) = doctor._modes(settings.load(more))
    assert (finding.level, finding.check) == ("warn", "files")
    assert f"chmod 600 {file}" in finding.mend
    file.chmod(0o600)
    assert list(doctor._modes(settings.load(more))) == []


OPEN_STORE = """
import os, sys
from pathlib import Path
from webhook_app import db
os.umask(0)
with db.connect(sys.argv[1]).connect() as connection:
    connection.exec_driver_sql("CREATE TABLE a (b)")
    print({path.name: oct(path.stat().st_mode & 0o777) for path in Path(sys.argv[2]).iterdir()})
"""


def test_whoever_makes_a_store_makes_all_of_its_files_private(tmp_path):
    made = run("000", sys.executable, "-c", OPEN_STORE, f"sqlite:///{tmp_path / 'store.db'}", str(tmp_path))
    assert ast.literal_eval(made.stdout) == {f"store.db{end}": "0o600" for end in ("", "-wal", "-shm")}


def test_a_second_up_in_a_directory_is_refused_until_the_first_is_gone(home):
    data_dir = home / "data"
    command = [*RELAY, "up", "--port", str(hubs.free_port()), "--data-dir", str(data_dir)]
    with up_in(data_dir, home / "log") as first:
        second = run("022", *command)
        assert second.returncode == 2
        assert (
            second.stderr == f"buildrelay: another `buildrelay up` (process {first.pid}) runs in {data_dir}\n"
        )
        os.kill(first.pid, signal.SIGKILL)
        first.wait(PATIENCE_SECONDS)
    with up_in(data_dir, home / "log of the next") as after:
        assert after.poll() is None
        assert Path(data_dir / "run" / "up.lock").read_text() == str(after.pid)
