"""`buildrelay up`: everything on one machine in one terminal.

Secrets that are missing are made once and kept in `DIR/secrets.env` (0600); the environment wins.
"""

import base64
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from cryptography.fernet import Fernet

from webhook_app import db, embedded, migrations, settings, subscribers, supervisor
from webhook_app.settings import Settings
from webhook_app.supervisor import Child
from webhook_app.times import utc_now

SECRETS_FILE = "secrets.env"


def read_secrets(data_dir: Path) -> dict[str, str]:
    """The variables of `DIR/secrets.env`; empty if there is none."""
    path = data_dir / SECRETS_FILE
    if not path.exists():
        return {}
    pairs = (line.partition("=") for line in path.read_text(encoding="utf-8").splitlines())
    return {name.strip(): value.strip() for name, sign, value in pairs if sign and not name.startswith("#")}


def ensure_secrets(data_dir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Make the secrets that neither the environment nor the file has, and keep them in the file (0600).

    Returns all variables of the file, old and new.
    """
    kept = read_secrets(data_dir)
    made = {
        name: make()
        for name, make in _MAKERS.items()
        if name not in kept and not environ.get(name) and not environ.get(f"{name}_FILE")
    }
    if made:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _append_private(data_dir / SECRETS_FILE, "".join(f"{name}={value}\n" for name, value in made.items()))
    return kept | made


def _append_private(path: Path, text: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with os.fdopen(os.open(path, flags, 0o600), "a", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)


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
    made = {
        **ensure_secrets(data_dir, environ),
        **{name: value for name, value in environ.items() if value},
        "BUILDRELAY_DATA_DIR": str(data_dir),
        "PYTHONUNBUFFERED": "1",
    }
    made.setdefault("REDIS_URL", embedded.redis_url(data_dir))
    if made.get("DATABASE_URL", "sqlite:").startswith("sqlite:"):
        made.setdefault("WEB_CONCURRENCY", "1")  # SQLite has one writer; one process commits in groups
    made.setdefault("LOG_LEVEL", "warning")
    if is_loopback(host):
        made.setdefault("ALLOW_PRIVATE_CALLBACKS", "true")
    return made


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

    Raises `SettingsError`, `EmbeddedError`, `StoreUnavailable`, `CannotStart`.
    """
    given = os.environ if environ is None else environ
    data_dir = data_dir.expanduser().absolute()
    _make(data_dir)
    first = not (data_dir / SECRETS_FILE).exists()
    env = environment(data_dir, host, given)
    if port is not None:
        env["PORT"] = str(port)
    values = settings.load(env)
    _check_port(host, values.port)
    prepare(values)
    url = f"http://{_bracketed(host)}:{values.port}"
    env["BUILDRELAY_BIND"] = f"{_bracketed(host)}:{values.port}"
    private = "ALLOW_PRIVATE_CALLBACKS" not in given and values.allow_private_callbacks
    return supervisor.supervise(
        children(env, data_dir, url, own_redis=not given.get("REDIS_URL")),
        on_ready=lambda: print(banner(url, values, first=first, private=private), flush=True),
        pid_dir=data_dir / "run",
    )


class CannotStart(Exception):
    """The machine does not let us; the message is the one line a person needs."""


def _make(data_dir: Path) -> None:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = data_dir / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CannotStart(f"{data_dir} can't be used as data directory: {error.strerror}") from error


def _check_port(host: str, port: int) -> None:
    """Another server there would answer in our place, and `up` would take it for its own."""
    why_not = supervisor.why_not_listen(host, port)
    if why_not:
        raise CannotStart(f"can't listen on {host} port {port}: {why_not}")


def prepare(values: Settings) -> None:
    """Bring the store to the present schema, and the subscriber of the settings to what they say.

    Raises `StoreUnavailable`, and `SealError` if there is nothing to seal that subscriber's key with.
    """
    engine = db.connect(values.database_url, values.sqlite_synchronous)
    try:
        migrations.upgrade(engine)
    except db.UNAVAILABLE as error:
        raise db.StoreUnavailable(
            str(getattr(error, "orig", None) or error).strip().split("\n")[0]
        ) from error
    db.as_writer(
        engine,
        lambda write: subscribers.sync_static(
            write, values.dashboard_api_url, values.dashboard_api_key, values.encryption_keys, utc_now()
        ),
    )
    engine.dispose()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def children(env: Mapping[str, str], data_dir: Path, url: str, *, own_redis: bool) -> list[Child]:
    """The processes, in the order of their start."""
    python = sys.executable
    redis = Child("redis", embedded.command(data_dir), env, lambda: embedded.answers(data_dir))
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
        Child("poll", (*start, "poll", "sweep", "discover", "redeliver", "replay"), env),
        Child("collect", (*start, "collect"), env),
    ]


def _is_healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/healthz", timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def banner(url: str, values: Settings, *, first: bool, private: bool) -> str:
    """What a person needs next."""
    hooks = [
        (f"{name} webhooks", f"{url}/webhooks/{name}", f"{name.upper()}_WEBHOOK_SECRET")
        for name in ("github", "gitlab", "jenkins")
    ]
    hooks.append(("build scripts", f"{url}/api/internal/build-events", "BUILD_EVENT_TOKEN"))
    lines = [
        "",
        f"BuildRelay is ready at {url}/",
        "",
        *(f"  {what:<17} {where:<52} secret: {secret}" for what, where, secret in hooks),
        f"  {'API':<17} {url + '/docs':<52} token:  ADMIN_TOKEN",
        "",
        f"Secrets are in {values.data_dir / SECRETS_FILE}" + (" (just made)" if first else "") + ".",
    ]
    if private:
        lines.append("Callbacks to private addresses are allowed, because this host is a loopback address.")
    lines += ["Ctrl-C stops everything.", ""]
    return "\n".join(lines)
