"""`buildrelay up`: everything on one machine in one terminal.

Secrets that are missing are made once and kept in `DIR/secrets.env` (0600); environment and YAML file win.
"""

import base64
import fcntl
import os
import re
import secrets
import shlex
import stat
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TypedDict

from cryptography.fernet import Fernet

from webhook_app import db, embedded, loglines, migrations, settings, subscribers, supervisor
from webhook_app.settings import Settings, SourceSettings
from webhook_app.supervisor import Child, Timing
from webhook_app.times import utc_now

SECRETS_FILE = "secrets.env"
RUN_DIRECTORY = "run"
READY_SECONDS = 1.0
"""For Redis to say which workers serve; it is asked again."""


def read_secrets(data_dir: Path) -> dict[str, str]:
    """The variables of `DIR/secrets.env`; empty if there is none.

    As a shell reads them: `export` before a name and quotes around a value don't count.
    Raises `CannotStart`.
    """
    lines = map(str.strip, _read_text(data_dir / SECRETS_FILE).splitlines())
    pairs = (line.removeprefix("export ").partition("=") for line in lines if not line.startswith("#"))
    return {name.strip(): _unquoted(value.strip()) for name, sign, value in pairs if sign}


def under(environ: Mapping[str, str], kept: Mapping[str, str]) -> dict[str, str]:
    """The environment, and of what is kept in `secrets.env` that which nobody set elsewhere."""
    given = settings.given(environ)
    return {name: value for name, value in kept.items() if name not in given} | {
        name: value for name, value in environ.items() if value
    }


def _unquoted(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_quoted else value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(f"{path} can't be read: {error}") from error


def ensure_secrets(data_dir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Make the secrets that neither the settings nor the file have, and keep them in the file (0600).

    Returns all variables of the file, old and new.  Of two first starts at once the second takes what the
    first has made.  Raises `CannotStart`, and then the file is as it was.
    """
    with _alone_in(data_dir / RUN_DIRECTORY):
        kept = read_secrets(data_dir)
        known = kept.keys() | settings.given(environ)
        made = {name: make() for name, make in _MAKERS.items() if name not in known}
        if made:
            _append_private(data_dir / SECRETS_FILE, made)
    return kept | made


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    held = os.open(directory / "secrets.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _append_private(path: Path, made: Mapping[str, str]) -> None:
    """Write the file anew, and only then put it in place: half a secret would be taken for a whole one."""
    text = _read_text(path)
    lines = [
        *([text.removesuffix("\n")] if text else []),
        *(f"{name}={value}" for name, value in made.items()),
    ]
    target = path.resolve()
    draft = target.with_name(f"{target.name}.draft")
    try:
        with os.fdopen(
            os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
        ) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise CannotStart(f"{path} can't be written: {error.strerror}") from error


def _token() -> str:
    return secrets.token_urlsafe(32)


def _signing_token() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


_MAKERS = {
    "ENCRYPTION_KEYS": lambda: Fernet.generate_key().decode(),
    "ADMIN_TOKEN": _token,
    "GITHUB_WEBHOOK_SECRET": _token,
    "GITLAB_WEBHOOK_SECRET": _signing_token,
    "JENKINS_WEBHOOK_SECRET": _token,
    "BUILD_EVENT_TOKEN": _token,
}


def environment(data_dir: Path, host: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of the children: secrets, Redis, what a loopback host allows."""
    told = {
        **under(environ, ensure_secrets(data_dir, environ)),
        "BUILDRELAY_DATA_DIR": f"{data_dir}/",  # a blank at its end counts
        "PYTHONUNBUFFERED": "1",
    }
    given = settings.given(told)
    return told | {name: value for name, value in _ours(told, data_dir, host).items() if name not in given}


def _ours(told: Mapping[str, str], data_dir: Path, host: str) -> dict[str, str]:
    """What `up` sets unless somebody else did."""
    ours = {"REDIS_URL": embedded.redis_url(data_dir), "LOG_LEVEL": "warning"}
    if settings.load(told).database_url.startswith("sqlite:"):
        ours["WEB_CONCURRENCY"] = "1"  # SQLite has one writer; one process commits in groups
    if is_loopback(host):
        ours["ALLOW_PRIVATE_CALLBACKS"] = "true"
    return ours


def is_loopback(host: str) -> bool:
    """Is the host this machine alone?"""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def up(host: str, port: int | None, data_dir: Path, environ: Mapping[str, str] | None = None) -> int:
    """Run everything until a signal; the exit code.

    Raises `CannotStart`, and what `settings.load`, `embedded` and `prepare` raise.
    """
    environ = dict(os.environ if environ is None else environ)
    if port is not None:
        environ["PORT"] = str(port)
    data_dir = data_dir.absolute()
    if not host:
        raise CannotStart("--host: an address is needed, or 0.0.0.0 for all of them")
    os.umask(0o077)
    if make_data_dir(data_dir):
        _warn(settings.log_format(environ), f"{data_dir} was open to other users: its mode is 0700 now")
    with _only_one(data_dir):
        return _up(host, data_dir, environ)


def _up(host: str, data_dir: Path, environ: Mapping[str, str]) -> int:
    first = not (data_dir / SECRETS_FILE).exists()
    env = environment(data_dir, host, environ)
    given = settings.given(under(environ, read_secrets(data_dir)))
    values = settings.load(env)
    _check_port(host, values.port)
    prepare(values)
    url = f"http://{_bracketed(host)}:{values.port}"
    env["BUILDRELAY_BIND"] = f"{_bracketed(host)}:{values.port}"
    private = "ALLOW_PRIVATE_CALLBACKS" not in given and values.allow_private_callbacks
    return supervisor.supervise(
        children(env, data_dir, url, own_redis="REDIS_URL" not in given),
        on_ready=lambda: print(banner(url, values, first=first, private=private), flush=True),
        missing=_missing(values.redis_url),
        pid_dir=data_dir / RUN_DIRECTORY,
        timing=timing(values),
        **log_lines(values),
    )


def _warn(log_format: str, text: str) -> None:
    print(loglines.line(log_format, text), file=sys.stderr, flush=True)


def _missing(redis_url: str) -> Callable[[Sequence[int]], str]:
    """What keeps our processes, given by their pids, from doing all they are for; empty: nothing."""
    from redis.exceptions import RedisError

    from webhook_app import queues  # RQ: not for those who only migrate

    since = utc_now().replace(microsecond=0)

    def missing(pids: Sequence[int]) -> str:
        try:
            with queues.connect(redis_url, READY_SECONDS) as redis:
                served = queues.bells_served_by(redis, pids, since)
        except RedisError as error:
            return queues.trouble(error)
        unserved = [bell for bell in queues.JOBS if bell not in served]
        return f"no worker serves {', '.join(unserved)}" if unserved else ""

    return missing


def timing(values: Settings) -> Timing:
    """The waits of the supervisor."""
    return Timing(stop_seconds=values.stop_grace_seconds)


class LogLines(TypedDict):
    """How `supervisor.supervise` writes lines."""

    labelled: bool
    own_line: Callable[[str], str]


def log_lines(values: Settings) -> LogLines:
    """A supervisor's own lines in the form of all others; a label in front would break JSON."""
    own_line = partial(loglines.line, values.log_format)
    return {"labelled": values.log_format != "json", "own_line": own_line}


class CannotStart(Exception):
    """The machine does not let us; the message is the one line a person needs."""


def make_data_dir(data_dir: Path) -> bool:
    """Make the directory, and in it the one of the pid files; nobody else may open them.

    Returns whether it was there, open to others, and is closed now, with what is ours in it.  Raises
    `CannotStart` if we may not write there, or if it is open and holds other things too.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        was_open = _close(data_dir)
        (data_dir / RUN_DIRECTORY).mkdir(mode=0o700, exist_ok=True)
        tighten(data_dir)
        probe = data_dir / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        where = "" if error.filename == str(data_dir) else f" ({error.filename})"
        raise CannotStart(f"{data_dir} can't be used as data directory: {error.strerror}{where}") from error
    return was_open


_OURS = re.compile(r"buildrelay\.db.*|secrets\.env(\.draft)?|redis|redis\.sock|run|\.probe|lost\+found")
"""What we keep in a data directory, and what a file system has in each."""


def _close(data_dir: Path) -> bool:
    """Close the directory to other users; were they let in?"""
    status = data_dir.stat()
    was_open = bool(status.st_mode & 0o077)
    strange = status.st_uid != os.geteuid() or not all(
        _OURS.fullmatch(path.name) for path in data_dir.iterdir()
    )
    if was_open and strange:
        raise CannotStart(
            f"{data_dir} is open to other users of this machine: "
            f"run `chmod 700 {shlex.quote(str(data_dir))}`, or name a new directory in it as data directory"
        )
    if not strange:
        data_dir.chmod(0o700)
    return was_open


def tighten(data_dir: Path) -> None:
    """Let nobody else read what is ours in the data directory; a link's target is left as it is."""
    for top in data_dir.glob("*"):
        for path in [top, *top.rglob("*")] if _OURS.fullmatch(top.name) and not top.is_symlink() else []:
            with suppress(OSError):  # it went, or is another user's
                mode = path.lstat().st_mode
                if mode & 0o077 and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    path.chmod(0o600 if stat.S_ISREG(mode) else 0o700)


@contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Hold the data directory, until the end of the process at most; `CannotStart` if another `up` does."""
    held = os.open(data_dir / RUN_DIRECTORY / "up.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(held, data_dir)
        yield
    finally:
        os.close(held)


def _lock(held: int, data_dir: Path) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(held, 20).decode(errors="replace")
        raise CannotStart(f"another `buildrelay up` (process {pid}) runs in {data_dir}") from None
    os.ftruncate(held, 0)
    os.write(held, str(os.getpid()).encode())


def _check_port(host: str, port: int) -> None:
    """Another server there would answer in our place, and `up` would take it for its own."""
    why_not = supervisor.why_not_listen(host, port)
    if why_not:
        raise CannotStart(f"can't listen on {host} port {port}: {why_not}")


def prepare(values: Settings) -> None:
    """Bring the store to the present schema, seal URLs, and make the settings' subscriber as they say.

    Raises `StoreUnavailable`, `NewerSchema`, and `SealError` if there is nothing to seal its key with.
    """
    tighten(values.data_dir)
    if file := db.open_to_others(values.database_url):
        _warn(
            values.log_format, f"{file} can be read by other users of this machine: its mode should be 0600"
        )
    engine = db.connect(values.database_url, values.sqlite_synchronous, pooler=values.database_pooler)
    try:
        migrations.upgrade(engine)
    except db.UNAVAILABLE as error:
        raise db.unavailable(error) from error
    subscribers.seal_urls(engine, values.encryption_keys)
    db.as_writer(
        engine,
        lambda write: subscribers.sync_static(
            write,
            values.dashboard_api_url,
            values.dashboard_api_key,
            values.encryption_keys,
            utc_now(),
            values.dashboard_format,
        ),
    )
    engine.dispose()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def children(env: Mapping[str, str], data_dir: Path, url: str, *, own_redis: bool) -> list[Child]:
    """The processes, in the order of their start."""
    python = sys.executable
    redis = Child(
        "redis", embedded.command(data_dir), env, lambda: embedded.answers(data_dir), ends_last=True
    )
    web = (python, "-m", "gunicorn", "--config", "python:webhook_app.gunicorn_conf", "wsgi:app")
    return [
        *([redis] if own_redis else []),
        Child("web", web, env, lambda: _is_healthy(url)),
        *workers(env),
        Child("scheduler", (python, "-m", "jobs.schedule"), env),
    ]


def workers(env: Mapping[str, str] | None = None) -> list[Child]:
    """The worker processes: a long poll must not delay deliveries, nor a huge log polls."""
    start = (sys.executable, "-m", "jobs.worker")
    return [
        Child("deliver", (*start, "deliver"), env),
        Child("poll", (*start, "poll", "sweep", "discover", "replay"), env),
        Child("collect", (*start, "collect", "redeliver"), env),
    ]


def _is_healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/healthz", timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _shown(path: Path) -> str:
    """A path as a terminal can show it."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return text if text.isprintable() else repr(text)


_BUILT_IN = ("github", "gitlab", "jenkins")


def _hook(url: str, source: SourceSettings) -> tuple[str, str, str]:
    """A line of the banner: what a source is, where its webhooks go, and where their secret stands."""
    name = source.source.name
    where = f"{url}/webhooks/{name}"
    if name in _BUILT_IN:
        return f"{name} webhooks", where, f"secret: {name.upper()}_WEBHOOK_SECRET"
    secret = "its webhook_secret" if source.webhook_secrets else "none: every push is refused"
    return f"{name} webhooks ({source.source.platform})", where, f"secret: {secret}"


def banner(url: str, values: Settings, *, first: bool, private: bool) -> str:
    """What a person needs next."""
    rows = [
        *(_hook(url, source) for name, source in values.sources.items() if name != "script"),
        ("build scripts", f"{url}/api/internal/build-events", "secret: BUILD_EVENT_TOKEN"),
        ("API", f"{url}/docs", "token:  ADMIN_TOKEN"),
    ]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "",
        f"BuildRelay is ready at {url}/",
        "",
        *(f"  {what:<{wide[0]}}  {where:<{wide[1]}}  {secret}" for what, where, secret in rows),
        "",
        f"Secrets are in {_shown(values.data_dir / SECRETS_FILE)}" + (" (just made)" if first else "") + ".",
    ]
    if private:
        lines.append("Callbacks to private addresses are allowed, because this host is a loopback address.")
    lines += ["Ctrl-C stops everything.", ""]
    return "\n".join(lines)
