"""All settings, read once: environment, then an optional YAML file, then defaults.

A wrong value stops the start with `SettingsError`, one line naming the variable, the value and
what is allowed.  Every variable may also be given as `NAME_FILE`, a path whose content is the
value (Docker and Kubernetes secrets).  The table is `VARIABLES`; README and tests read it too.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import yaml
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from webhook_app import destinations, embedded, loglines, signing
from webhook_app.platforms import Source, github, gitlab
from webhook_app.polling import Pace
from webhook_app.redaction import SHAPES, Redactor, redactor


class SettingsError(Exception):
    """A value that can't be used; the message is the one line a person needs, without what looks secret."""

    def __init__(self, message: str) -> None:
        super().__init__(SHAPES.name(message))


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """One CI instance: its public part for the platform module, and how we talk to it.

    `timeout_seconds` bounds one API call, `retry_attempts` of it included.  `repositories`: where runs are discovered.
    `app` or `oauth`: what gets the token that `source` lacks (`webhook_app.credentials`).
    """

    source: Source
    enabled: bool = True
    webhook_secrets: tuple[str, ...] = field(default=(), repr=False)
    timeout_seconds: float = 30.0
    retry_attempts: int = 0
    repositories: tuple[str, ...] = ()
    app: github.App | None = None
    oauth: gitlab.OAuth | None = None

    @property
    def has_token(self) -> bool:
        """Is there a token, or what gets one?"""
        return bool(self.source.token or self.app or self.oauth)

    @property
    def can_poll(self) -> bool:
        """Is there an API to read?  (GitHub's and GitLab's public data needs no token.)"""
        return self.enabled and bool(self.source.api_url)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set, converted: seconds as float, lists as tuples."""

    data_dir: Path
    database_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    port: int = 8000
    web_concurrency: int = 1
    encryption_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_token: str = field(default="", repr=False)
    build_event_tokens: tuple[str, ...] = field(default=(), repr=False)
    sources: Mapping[str, SourceSettings] = field(default_factory=dict)
    poll_interval_seconds: float = 15.0
    push_freshness_seconds: float = 60.0
    max_poll_seconds: float = 3600.0
    adaptive_pace: bool = False
    api_budget_reserve: float = 0.1
    max_consecutive_errors: int = 10
    backoff_multiplier: float = 2.0
    discovery_interval_seconds: float = 60.0
    discovery_jitter_seconds: float = 10.0
    heartbeat_timeout_seconds: float = 90.0
    allow_private_callbacks: bool = False
    public_progress: bool = False
    max_subscribers: int = 1000
    public_url: str = ""
    dashboard_api_url: str = field(default="", repr=False)
    dashboard_api_key: str = field(default="", repr=False)
    dashboard_api_format: str = ""
    delivery_retry_schedule: tuple[float, ...] = ()
    delivery_timeout_seconds: float = 15.0
    delivery_host_concurrency: int = 128
    database_pooler: bool | None = None
    keep_alive_seconds: float = 95.0
    stop_grace_seconds: float = 9.0
    max_bytes_in_flight: int = 64 * 1024 * 1024
    retention_days: int = 90
    sqlite_synchronous: str = "FULL"
    log_level: str = "INFO"
    log_format: str = "logfmt"

    @property
    def dashboard_format(self) -> str:
        """A bare address is that of a dashboard which reads the platforms' own webhooks, at a path for each."""
        bare = bool(self.dashboard_api_url) and urlsplit(self.dashboard_api_url).path in ("", "/")
        return self.dashboard_api_format or ("provider" if bare else "standard")


@dataclass(frozen=True, slots=True)
class Variable:
    """One line of the settings table: `read` turns text into a value or raises ValueError(allowed)."""

    name: str
    default: str
    read: Callable[[str], Any]
    meaning: str
    aliases: tuple[str, ...] = ()
    secret: bool = False


def _whole(least: int, most: int, unit: str = "") -> Callable[[str], int]:
    allowed = f"a whole number from {least} to {most}" + (f" ({unit})" if unit else "")

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(allowed) from None
        if not least <= value <= most:
            raise ValueError(allowed)
        return value

    return read


def _number(least: float, most: float, unit: str = "") -> Callable[[str], float]:
    allowed = f"a number from {least:g} to {most:g}" + (f" ({unit})" if unit else "")

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(allowed) from None
        if not least <= value <= most:
            raise ValueError(allowed)
        return value

    return read


def _milliseconds(least: int, most: int) -> Callable[[str], float]:
    read = _whole(least, most, "milliseconds")
    return lambda text: read(text) / 1000


def _share(text: str) -> float:
    """A percentage as a share of one."""
    return _whole(0, 90, "percent")(text) / 100


def _flag(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "on": True}
    words |= {"false": False, "0": False, "no": False, "off": False}
    try:
        return words[text.strip().lower()]
    except KeyError:
        raise ValueError("true or false") from None


def _maybe_flag(text: str) -> bool | None:
    """None: it depends on where we run."""
    return _flag(text) if text else None


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in (part.strip() for part in text.split(",")) if word)


def _seconds_list(text: str) -> tuple[float, ...]:
    read = _number(0, 7 * 86400)
    try:
        waits = tuple(read(word) for word in _words(text))
    except ValueError:
        waits = ()
    if not waits:
        raise ValueError("seconds, comma separated, each from 0 to 604800")
    return waits


def _text(text: str) -> str:
    return text


def _word(text: str) -> str:
    if re.search(r"[/,\s]", text):
        raise ValueError("one name, without / and comma,")
    return text


def _directory(text: str) -> Path:
    """An absolute path; only a `~` that begins the text stands for a home."""
    try:
        return (Path(text).expanduser() if text.startswith("~") else Path(text)).absolute()
    except RuntimeError:  # ~somebody who isn't there
        raise ValueError("a directory") from None


def directory(text: str) -> Path:
    """The data directory that a command line names.  Raises `ValueError`."""
    return _directory(text)


def _repositories(text: str) -> tuple[str, ...]:
    names = _words(text)
    if not all(re.fullmatch(r"[^/\s]+/[^/\s]+", name) for name in names):
        raise ValueError("OWNER/REPO, comma separated,")
    return names


def _url(*schemes: str) -> Callable[[str], str]:
    allowed = "a URL that begins with " + " or ".join(f"{scheme}://" for scheme in schemes)

    def read(text: str) -> str:
        if not text:
            return ""
        try:
            parts = urlsplit(text)
            parts.port  # noqa: B018  a ValueError unless it is a number
        except ValueError:
            raise ValueError(allowed) from None
        web = parts.scheme.startswith("http")
        if parts.scheme == "unix" and not embedded.is_plain(unquote(parts.path)):
            raise ValueError("a socket whose path has only letters, digits and /._+,:@~- in it")
        if parts.scheme not in schemes or not (parts.hostname if web else parts.netloc or parts.path):
            raise ValueError(allowed)
        if web and "@" in parts.netloc:
            raise ValueError(allowed + ", without user or password in it,")
        return text.rstrip("/")

    return read


def web_url(text: str) -> str:
    """An http or https URL, without a slash at its end; or `ValueError`, which says what is allowed."""
    return _url("http", "https")(text)


def _callback(text: str) -> str:
    """The operator's own target: http and private addresses are allowed."""
    if text:
        try:
            destinations.check_callback_url(text, allow_private=True)
        except destinations.OutboundError as error:
            raise ValueError(f"a callback URL (not so: {error})") from None
    return text


def _dashboard_format(text: str) -> str:
    if text.lower() not in ("", "provider", "standard"):
        raise ValueError("provider or standard")
    return text.lower()


def _header_text(text: str) -> str:
    try:
        destinations.check_header("Authorization", text)
    except destinations.OutboundError:
        raise ValueError("text that fits into a header") from None
    return text


def _fernet_keys(text: str) -> tuple[str, ...]:
    keys = _words(text)
    for key in keys:
        try:
            Fernet(key)
        except (ValueError, TypeError):
            raise ValueError(
                "Fernet keys (32 random bytes in URL-safe base64), comma separated, newest first"
            ) from None
    return keys


def _app_key(text: str) -> str:
    r"""A GitHub App's key; where a variable can't hold lines, `\n` stands for their ends."""
    pem = text.replace("\\n", "\n")
    try:
        key = load_pem_private_key(pem.encode(), password=None) if text else None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if text and not (isinstance(key, RSAPrivateKey) and key.key_size >= 2048):
        raise ValueError("an RSA key in PEM without a password, as GitHub generates it,")
    return pem


def _id(text: str) -> str:
    if text and not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", text):
        raise ValueError("an id of letters and digits")
    return text


def _installation(text: str) -> str:
    if text and not re.fullmatch(r"[1-9][0-9]{0,17}", text):
        raise ValueError("a whole number above 0")
    return text


def _pooler(text: str) -> bool | None:
    """None: it is found out."""
    if not text:
        return None
    try:
        return _flag(text)
    except ValueError:
        raise ValueError("true, false or nothing (then it is found out)") from None


def _database(text: str) -> str:
    """SQLAlchemy's form; Heroku writes `postgres://`, which SQLAlchemy no longer takes."""
    if not text:
        return ""
    scheme, colon, rest = text.partition("://")
    drivers = {
        "postgres": "postgresql+psycopg",
        "postgresql": "postgresql+psycopg",
        "postgresql+psycopg": "postgresql+psycopg",
        "sqlite": "sqlite",
    }
    in_memory = scheme == "sqlite" and rest in ("", "/", "/:memory:")  # no two processes would share it
    allowed = "a URL that begins with postgres://, postgresql:// or sqlite:///PATH"
    if not colon or scheme not in drivers or in_memory:
        raise ValueError(allowed)
    url = f"{drivers[scheme]}://{_with_hosts_aside(rest) if scheme != 'sqlite' else rest}"
    try:
        made = make_url(url)
    except (ArgumentError, ValueError):  # a port that is no number
        raise ValueError(allowed) from None
    if scheme == "sqlite" and "?" in rest and "uri" not in made.query:
        raise ValueError("sqlite:///PATH, with %3F for ? and %25 for %,")
    return url


LEAST_SECRET = 16
"""Characters of a secret that others have to guess; `openssl rand -hex 32` makes 64."""


def _secret(text: str) -> str:
    """One that can't be guessed, or none."""
    if text and len(text) < LEAST_SECRET:
        raise ValueError(
            f"a secret of at least {LEAST_SECRET} characters (as `openssl rand -hex 32` makes one)"
        )
    return text


def _secrets(text: str) -> tuple[str, ...]:
    """Comma separated.  A secret that holds a comma becomes two, mostly short ones: the error counts them."""
    secrets = _words(text)
    short = [len(one) for one in secrets if len(one.removeprefix(signing.HMAC_PREFIX)) < LEAST_SECRET]
    if short:
        raise ValueError(
            f"a secret of at least {LEAST_SECRET} characters (as `openssl rand -hex 32` makes one; a comma"
            f" separates secrets: this one has {len(secrets)} parts, the shortest of {min(short)} characters)"
        )
    return secrets


def _with_hosts_aside(rest: str) -> str:
    """Several hosts, which libpq takes as `USER@H1:P1,H2:P2/DB`: SQLAlchemy wants them behind the `?`."""
    head, _, query = rest.partition("?")
    place, _, database = head.partition("/")
    user, at, hosts = place.rpartition("@")
    if "," not in hosts:
        return rest
    pairs = [re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(\d*))?", host) for host in hosts.split(",")]
    if not all(pairs):
        raise ValueError("HOST:PORT, comma separated, between the user and the database")
    names, ports = zip(*[(pair[1].strip("[]"), pair[2] or "5432") for pair in pairs if pair], strict=True)
    also = f"host={','.join(names)}&port={','.join(ports)}"
    return f"{user}{at}/{database}?{also}&{query}".rstrip("&")


def _gitlab_secrets(text: str) -> tuple[str, ...]:
    """A signing token that can't be decoded would match nothing, and every push would be refused."""
    secrets = _secrets(text)
    if not all(signing.is_hmac_secret(one) for one in secrets if one.startswith(signing.HMAC_PREFIX)):
        raise ValueError("base64 after each whsec_, comma separated,")
    return secrets


def _pace(text: str) -> bool:
    """Is it the adaptive one?"""
    if text.lower() not in ("steady", "adaptive"):
        raise ValueError("steady or adaptive")
    return text.lower() == "adaptive"


def _synchronous(text: str) -> str:
    if text.upper() not in ("FULL", "NORMAL"):
        raise ValueError("FULL or NORMAL")
    return text.upper()


def _log_level(text: str) -> str:
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError("debug, info, warning or error")
    return text.upper()


def _log_format(text: str) -> str:
    if text.lower() not in loglines.FORMATS:
        raise ValueError(" or ".join(loglines.FORMATS))
    return text.lower()


_timeout = _milliseconds(100, 60_000)
_retries = _whole(0, 10)

VARIABLES: tuple[Variable, ...] = (
    Variable("DATABASE_URL", "", _database, "SQLite in the data directory, or PostgreSQL", secret=True),
    Variable("DATABASE_POOLER", "", _pooler, "true behind PgBouncer and the like; found out unless set"),
    Variable("REDIS_URL", "", _url("redis", "rediss", "unix"), "embedded by `up` unless set", secret=True),
    Variable(
        "REDIS_TLS_VERIFY", "", _maybe_flag,
        "whether the certificate of `rediss://` is verified: true; false on Heroku (where `DYNO` is set)",
    ),
    Variable("BUILDRELAY_DATA_DIR", "./data", _directory, "SQLite, embedded Redis and secrets.env live here"),
    Variable("PORT", "8000", _whole(1, 65535), "port of the web process"),
    Variable("WEB_CONCURRENCY", str(os.cpu_count() or 1), _whole(1, 256), "web processes"),
    Variable("ENCRYPTION_KEYS", "", _fernet_keys, "Fernet keys, comma separated, newest first", secret=True),
    Variable("ADMIN_TOKEN", "", _secret, "bootstrap API token with every scope; 16 characters or more", secret=True),
    Variable("GITHUB_WEBHOOK_SECRET", "", _secrets, "comma separated, all accepted; each of 16 characters or more", secret=True),
    Variable("GITLAB_WEBHOOK_SECRET", "", _gitlab_secrets, "comma separated, each of 16 characters or more; `whsec_…` is a signing token", secret=True),
    Variable("JENKINS_WEBHOOK_SECRET", "", _secrets, "comma separated, all accepted; each of 16 characters or more", secret=True),
    Variable(
        "BUILD_EVENT_TOKEN", "", _secrets, "for build scripts (`X-Build-Token`); comma separated, each of 16 characters or more",
        aliases=("OM_BUILD_EVENT_TOKEN",), secret=True,
    ),
    Variable("GITHUB_TOKEN", "", _header_text, "poll access to GitHub", secret=True),
    Variable("GITHUB_APP_ID", "", _id, "instead of a token: a GitHub App's id or client id"),
    Variable("GITHUB_APP_PRIVATE_KEY", "", _app_key, "its key in PEM, lines or `\\n`", secret=True),
    Variable("GITHUB_APP_INSTALLATION_ID", "", _installation, "its installation; else that of the first repository"),
    Variable("GITHUB_API_URL", "https://api.github.com", web_url, "GitHub's REST API"),
    Variable("GITHUB_REPOS", "", _repositories, "OWNER/REPO, comma separated: where runs are discovered"),
    Variable("GITHUB_OWNER", "", _word, "with `GITHUB_REPO`: the one repository, where `GITHUB_REPOS` is not set"),
    Variable("GITHUB_REPO", "", _word, "see `GITHUB_OWNER`"),
    Variable("ENABLE_GH", "true", _flag, "poll GitHub"),
    Variable("GITLAB_TOKEN", "", _header_text, "poll access to GitLab", secret=True),
    Variable("GITLAB_OAUTH_CLIENT_ID", "", _id, "instead of a token: an OAuth application"),
    Variable("GITLAB_OAUTH_CLIENT_SECRET", "", _text, "its secret", secret=True),
    Variable("GITLAB_OAUTH_REFRESH_TOKEN", "", _text, "the first refresh token; later ones are in the store", secret=True),
    Variable("GITLAB_URL", "https://gitlab.com", web_url, "the GitLab instance"),
    Variable("GITLAB_PROJECTS", "", _words, "ids or paths, comma separated: where pipelines are discovered"),
    Variable("ENABLE_GITLAB", "true", _flag, "poll GitLab"),
    Variable("JENKINS_URL", "", web_url, "the Jenkins controller"),
    Variable("JENKINS_USERNAME", "", _text, "user of the API token"),
    Variable("JENKINS_API_TOKEN", "", _text, "poll access to Jenkins", secret=True),
    Variable("JENKINS_JOBS", "", _words, "job paths, comma separated: where builds are discovered"),
    Variable("JENKINS_DEFAULT_JOB", "", _text, "the one job, where `JENKINS_JOBS` is not set"),
    Variable("ENABLE_JENKINS", "true", _flag, "poll Jenkins"),
    Variable("BUILD_POLL_INTERVAL", "15000", _milliseconds(10, 86_400_000), "ms between polls of one stale build"),
    Variable("BUILD_PUSH_FRESHNESS", "60000", _milliseconds(0, 86_400_000), "ms for which a push keeps a build from being polled"),
    Variable("BUILD_POLL_PACE", "steady", _pace, "`adaptive` polls sources less whose pushes prove complete"),
    Variable("API_BUDGET_RESERVE", "10", _share, "percent of an API budget that polling leaves to releases and people"),
    Variable("BUILD_MAX_POLL_TIME", "3600000", _milliseconds(100, 30 * 86_400_000), "ms of polling without an end, then `timeout`"),
    Variable("BUILD_MAX_CONSECUTIVE_ERRORS", "10", _whole(1, 1000), "failed polls in a row, then polling of that build stops"),
    Variable("BUILD_BACKOFF_MULTIPLIER", "2", _number(1, 10), "the wait grows by this after each failed poll"),
    Variable("GITHUB_API_TIMEOUT", "30000", _timeout, "ms for one GitHub API call"),
    Variable("GITHUB_API_RETRIES", "0", _retries, "how often a read that failed is repeated at once, within that time"),
    Variable("GITLAB_API_TIMEOUT", "30000", _timeout, "ms for one GitLab API call"),
    Variable("GITLAB_API_RETRIES", "0", _retries, "how often a read that failed is repeated at once, within that time"),
    Variable("JENKINS_API_TIMEOUT", "30000", _timeout, "ms for one Jenkins API call"),
    Variable("JENKINS_API_RETRIES", "0", _retries, "how often a read that failed is repeated at once, within that time"),
    Variable("DISCOVERY_INTERVAL", "60", _number(1, 86400, "seconds"), "seconds between discoveries", aliases=("WORKER_POLL_INTERVAL",)),
    Variable("DISCOVERY_JITTER", "10", _number(0, 3600, "seconds"), "seconds of jitter", aliases=("WORKER_JITTER_SECONDS",)),
    Variable("HEARTBEAT_TIMEOUT", "90", _number(1, 86400, "seconds"), "seconds without heartbeat, then a script build is failed"),
    Variable("ALLOW_PRIVATE_CALLBACKS", "false", _flag, "allow callbacks to loopback and private addresses"),
    Variable("PUBLIC_PROGRESS", "false", _flag, "the two progress endpoints need no token"),
    Variable("MAX_SUBSCRIBERS", "1000", _whole(1, 100_000), "callback URLs that may be registered; over it the API answers 422"),
    Variable("PUBLIC_URL", "", web_url, "address of this BuildRelay from outside, to tell its webhooks from others'"),
    Variable("DASHBOARD_API_URL", "", _callback, "a subscriber that `migrate` and `up` make: gets `build.*`", secret=True),
    Variable("DASHBOARD_API_KEY", "", _header_text, "sent to it as `Authorization: Bearer …`", secret=True),
    Variable("DASHBOARD_API_FORMAT", "", _dashboard_format, "`provider` or `standard`; else `provider` where that URL has no path"),
    Variable(
        "DELIVERY_RETRY_SCHEDULE", "5,300,1800,7200,18000,36000,50400,72000,86400", _seconds_list,
        "seconds before each retry, comma separated",
    ),
    Variable("DELIVERY_TIMEOUT", "15", _number(0.1, 60, "seconds"), "seconds for one delivery attempt"),
    Variable(
        "DELIVERY_HOST_CONCURRENCY", "128", _whole(1, 256),
        "requests that one worker has under way at one host, whoever's",
    ),
    Variable(
        "STOP_GRACE_SECONDS", "9", _number(1, 600, "seconds"),
        "seconds that what is under way may still take after SIGTERM",
    ),
    Variable(
        "KEEP_ALIVE_SECONDS", "95", _number(1, 3600, "seconds"),
        "seconds that an idle connection stays open: longer than the proxy before us keeps it",
    ),
    Variable(
        "MAX_BYTES_IN_FLIGHT", "67108864", _whole(25 * 1024 * 1024, 2**40, "bytes"),
        "bytes of large request bodies that one web process holds at a time; over it pushes get 503",
    ),
    Variable("RETENTION_DAYS", "90", _whole(1, 3650, "days"), "days that events, bodies, attempts and logs are kept"),
    Variable("LOG_LEVEL", "info", _log_level, "debug, info, warning or error; `up` says warning"),
    Variable("LOG_FORMAT", "logfmt", _log_format, "or `json`: one line per record, each with `time` and `level`"),
    Variable("SQLITE_SYNCHRONOUS", "FULL", _synchronous, "FULL survives a power cut, NORMAL a killed process"),
)  # fmt: skip

_YAML_NAMES = {
    "polling.interval": "BUILD_POLL_INTERVAL",
    "polling.freshness": "BUILD_PUSH_FRESHNESS",
    "polling.max_poll_time": "BUILD_MAX_POLL_TIME",
    "polling.max_consecutive_errors": "BUILD_MAX_CONSECUTIVE_ERRORS",
    "polling.backoff_multiplier": "BUILD_BACKOFF_MULTIPLIER",
    "platforms.github.timeout": "GITHUB_API_TIMEOUT",
    "platforms.github.retry_attempts": "GITHUB_API_RETRIES",
    "platforms.gitlab.timeout": "GITLAB_API_TIMEOUT",
    "platforms.gitlab.retry_attempts": "GITLAB_API_RETRIES",
    "platforms.jenkins.timeout": "JENKINS_API_TIMEOUT",
    "platforms.jenkins.retry_attempts": "JENKINS_API_RETRIES",
}
_YAML_EMPTY = ("", "~", "null")
_SOURCE_KEYS = {
    "name", "platform", "webhook_secret", "api_url", "token", "username", "repositories", "timeout", "retry_attempts",
    "enabled",
    "app_id", "app_private_key", "app_installation_id",
    "oauth_client_id", "oauth_client_secret", "oauth_refresh_token",
}  # fmt: skip
_SOURCE_SECRETS = {"webhook_secret", "token", "app_private_key", "oauth_client_secret", "oauth_refresh_token"}
_SOURCE_READERS = {
    "app_id": _id, "app_private_key": _app_key, "app_installation_id": _installation, "oauth_client_id": _id,
}  # fmt: skip
_FOREIGN = {"github": ("oauth_",), "gitlab": ("app_",), "jenkins": ("app_", "oauth_")}
"""How the keys begin that mean nothing on a platform."""


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read all settings, or raise `SettingsError` for the first value that can't be used."""
    environ = os.environ if environ is None else environ
    file = _read_yaml(environ.get("BUILDRELAY_CONFIG", ""))
    values = {variable.name: _value(variable, environ, file) for variable in VARIABLES}
    data_dir = values["BUILDRELAY_DATA_DIR"]
    return Settings(
        data_dir=data_dir,
        database_url=values["DATABASE_URL"] or _sqlite_url(data_dir / "buildrelay.db"),
        redis_url=_redis_url(values, "DYNO" in environ) or embedded.redis_url(data_dir),
        port=values["PORT"],
        web_concurrency=values["WEB_CONCURRENCY"],
        encryption_keys=values["ENCRYPTION_KEYS"],
        admin_token=values["ADMIN_TOKEN"],
        build_event_tokens=values["BUILD_EVENT_TOKEN"],
        sources=_sources(values, file),
        poll_interval_seconds=values["BUILD_POLL_INTERVAL"],
        adaptive_pace=values["BUILD_POLL_PACE"],
        api_budget_reserve=values["API_BUDGET_RESERVE"],
        push_freshness_seconds=values["BUILD_PUSH_FRESHNESS"],
        max_poll_seconds=values["BUILD_MAX_POLL_TIME"],
        max_consecutive_errors=values["BUILD_MAX_CONSECUTIVE_ERRORS"],
        backoff_multiplier=values["BUILD_BACKOFF_MULTIPLIER"],
        discovery_interval_seconds=values["DISCOVERY_INTERVAL"],
        discovery_jitter_seconds=values["DISCOVERY_JITTER"],
        heartbeat_timeout_seconds=values["HEARTBEAT_TIMEOUT"],
        allow_private_callbacks=values["ALLOW_PRIVATE_CALLBACKS"],
        public_progress=values["PUBLIC_PROGRESS"],
        max_subscribers=values["MAX_SUBSCRIBERS"],
        public_url=values["PUBLIC_URL"],
        dashboard_api_url=values["DASHBOARD_API_URL"],
        dashboard_api_key=values["DASHBOARD_API_KEY"],
        dashboard_api_format=values["DASHBOARD_API_FORMAT"],
        delivery_retry_schedule=values["DELIVERY_RETRY_SCHEDULE"],
        delivery_timeout_seconds=values["DELIVERY_TIMEOUT"],
        delivery_host_concurrency=values["DELIVERY_HOST_CONCURRENCY"],
        database_pooler=values["DATABASE_POOLER"],
        keep_alive_seconds=values["KEEP_ALIVE_SECONDS"],
        stop_grace_seconds=values["STOP_GRACE_SECONDS"],
        max_bytes_in_flight=values["MAX_BYTES_IN_FLIGHT"],
        retention_days=values["RETENTION_DAYS"],
        sqlite_synchronous=values["SQLITE_SYNCHRONOUS"],
        log_level=values["LOG_LEVEL"],
        log_format=values["LOG_FORMAT"],
    )


def _sqlite_url(file: Path) -> str:
    """The URL of a SQLite file, whatever its path; SQLAlchemy takes a URL for UTF-8, SQLite a URI for bytes."""
    path = str(file)
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"sqlite:///{quote('file://' + quote(os.fsencode(file)))}?uri=true"
    return f"sqlite:///{quote(path)}"


def _redis_url(values: Mapping[str, Any], on_heroku: bool) -> str:
    """With what redis-py is to do about the server's certificate; Heroku's is of its own making."""
    url: str = values["REDIS_URL"]
    verify = values["REDIS_TLS_VERIFY"]
    if not url.startswith("rediss://") or "ssl_cert_reqs=" in url:
        return url
    verified = not on_heroku if verify is None else verify
    return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs={'required' if verified else 'none'}"


def data_dir(environ: Mapping[str, str]) -> Path:
    """The data directory, for what is read there before all is known.  Raises `SettingsError`."""
    path: Path = _one("BUILDRELAY_DATA_DIR", environ)
    return path


def log_format(environ: Mapping[str, str]) -> str:
    """The format of log lines, for those written before all is known.  Raises `SettingsError`."""
    format_: str = _one("LOG_FORMAT", environ)
    return format_


def _one(name: str, environ: Mapping[str, str]) -> Any:
    (variable,) = (one for one in VARIABLES if one.name == name)
    return _value(variable, environ, _read_yaml(environ.get("BUILDRELAY_CONFIG", "")))


def given(environ: Mapping[str, str]) -> set[str]:
    """The variables that are set: in the environment, under an alias, by a file, in the YAML file."""
    file = _read_yaml(environ.get("BUILDRELAY_CONFIG", ""))
    spelled = {
        variable.name: [
            f"{name}{end}" for name in (variable.name, *variable.aliases) for end in ("", "_FILE")
        ]
        for variable in VARIABLES
    }
    return {name for name, words in spelled.items() if name in file or any(map(environ.get, words))}


_FURTHER_NAMES = (
    "BUILDRELAY_CONFIG", "BUILDRELAY_BIND", "BUILDRELAY_WEB_THREADS", "BUILDRELAY_DIES_WITH",
    "BUILDRELAY_URL", "BUILDRELAY_TOKEN", "BUILDRELAY_RUN_ID", "OM_BUILD_EVENT_URL",
)  # fmt: skip
"""Variables of ours that are no lines of the table: places of processes, and what build scripts read."""

_LIKENESS = 0.905
"""How much alike (`difflib`) two names must be: less, and variables of other programs would be taken for ours."""
_SHORTEST = 8
_GUESSED = {"ENABLE_GITHUB": "ENABLE_GH"}
"""Names that are not alike, and yet what people take a setting to be called."""


def misspelt(environ: Mapping[str, str], kept: Collection[str] = ()) -> dict[str, str]:
    """Names that look like a misspelt setting, each with the one that is meant.

    `kept`: names in `secrets.env`.  Where the right name is set in the environment as well, a similar one
    there belongs to another program.
    """
    names = {name for variable in VARIABLES for name in (variable.name, *variable.aliases)}
    known = sorted(names | {f"{name}_FILE" for name in names} | set(_FURTHER_NAMES))
    given = {name for name, value in environ.items() if value}
    meant = {name: _nearest(name, known) for name in sorted(given | set(kept)) if name not in known}
    return {name: near for name, near in meant.items() if near and (name in kept or near not in given)}


def _nearest(name: str, known: Sequence[str]) -> str | None:
    upper = name.upper()
    if len(name) < _SHORTEST:
        return None
    near = get_close_matches(upper, known, n=1, cutoff=_LIKENESS)
    swapped = get_close_matches(upper, [one for one in known if sorted(one) == sorted(upper)], n=1)
    return next(iter([*near, *swapped]), _GUESSED.get(upper))


def _read_yaml(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8")
        # BaseLoader takes each value as the text it is: a secret like 0123 must not become a number.
        content = yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506  it makes nothing but texts
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = _reason(error)
        raise SettingsError(f"BUILDRELAY_CONFIG={path!r}: a readable YAML file is needed: {reason}") from None
    if content is None or content == "":
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"BUILDRELAY_CONFIG={path!r}: a mapping of settings is needed at its top")
    return _flatten(content)


def _reason(error: Exception) -> str:
    """One line; of a YAML error only the place, since its own text quotes what may be a secret.

    Of a file that can't be read without its path, which the message has already.
    """
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if not isinstance(error, yaml.YAMLError):
        return str(error)
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1} can't be read" if mark else "it can't be read"


def _flatten(content: dict[str, Any]) -> dict[str, Any]:
    """Settings by variable name; `sources` stays as it is.  Unknown keys are refused by name."""
    names = {
        name.lower(): variable.name for variable in VARIABLES for name in (variable.name, *variable.aliases)
    }
    names |= _YAML_NAMES
    flat: dict[str, Any] = {"sources": content.pop("sources", [])}
    for key, value in _leaves(content):
        if _is_empty_section(key, value):
            continue
        if key.lower() not in names:
            raise SettingsError(
                f"BUILDRELAY_CONFIG: {key!r} is no setting; allowed are the names of the README's table"
                + _did_you_mean(key, [*_YAML_NAMES, *names, "sources"])
            )
        if value not in _YAML_EMPTY:
            flat[names[key.lower()]] = _as_text(value)
    return flat


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    near = get_close_matches(key.lower(), list(known), n=1, cutoff=0.75)
    return f": did you mean {near[0]!r}?" if near else ""


def _leaves(content: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """(`section.key`, value) of all values that are no sections themselves."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


def _is_empty_section(key: str, value: Any) -> bool:
    return value in _YAML_EMPTY and any(name.startswith(f"{key}.") for name in _YAML_NAMES)


def _value(variable: Variable, environ: Mapping[str, str], file: Mapping[str, Any]) -> Any:
    name, text = _lookup(variable, environ, file)
    return _read(name, text, variable.read, variable.secret)


def _read(name: str, text: str, read: Callable[[str], Any], secret: bool = False) -> Any:
    """`text` as `read` understands it, or the one line that says what is wrong with it."""
    try:
        return read(text.strip())
    except ValueError as error:
        hidden = secret or "@" in text  # user:password@host
        raise SettingsError(f"{name}={'(secret)' if hidden else repr(text)}: {error} is needed") from None


def _lookup(variable: Variable, environ: Mapping[str, str], file: Mapping[str, Any]) -> tuple[str, str]:
    for name in (variable.name, *variable.aliases):
        if environ.get(name):
            return name, environ[name]
        path = environ.get(f"{name}_FILE")
        if path:
            try:
                return name, Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(
                    f"{name}_FILE={path!r}: a readable file is needed: {_reason(error)}"
                ) from None
    return variable.name, file.get(variable.name, variable.default)


def _sources(values: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, SourceSettings]:
    built_in = {
        "github": SourceSettings(
            source=Source("github", "github", values["GITHUB_API_URL"], values["GITHUB_TOKEN"]),
            enabled=values["ENABLE_GH"],
            webhook_secrets=values["GITHUB_WEBHOOK_SECRET"],
            timeout_seconds=values["GITHUB_API_TIMEOUT"],
            retry_attempts=values["GITHUB_API_RETRIES"],
            repositories=values["GITHUB_REPOS"] or _the_repository(values),
            app=_app(_told("GITHUB", values), _spelled("GITHUB")),
        ),
        "gitlab": SourceSettings(
            source=Source("gitlab", "gitlab", values["GITLAB_URL"], values["GITLAB_TOKEN"]),
            enabled=values["ENABLE_GITLAB"],
            webhook_secrets=values["GITLAB_WEBHOOK_SECRET"],
            timeout_seconds=values["GITLAB_API_TIMEOUT"],
            retry_attempts=values["GITLAB_API_RETRIES"],
            repositories=values["GITLAB_PROJECTS"],
            oauth=_oauth(_told("GITLAB", values), _spelled("GITLAB")),
        ),
        "jenkins": SourceSettings(
            source=Source(
                "jenkins",
                "jenkins",
                values["JENKINS_URL"],
                values["JENKINS_API_TOKEN"],
                values["JENKINS_USERNAME"],
            ),
            enabled=values["ENABLE_JENKINS"],
            webhook_secrets=values["JENKINS_WEBHOOK_SECRET"],
            timeout_seconds=values["JENKINS_API_TIMEOUT"],
            retry_attempts=values["JENKINS_API_RETRIES"],
            repositories=values["JENKINS_JOBS"] or _the_job(values),
        ),
        "script": SourceSettings(
            source=Source("script", "script"),
            webhook_secrets=values["BUILD_EVENT_TOKEN"],
        ),
    }
    further = [_further_source(entry) for entry in _as_list(file.get("sources"))]
    for entry in further:
        if entry.source.name.casefold() in map(str.casefold, built_in):
            raise SettingsError(f"sources: the name {entry.source.name!r} is taken; another one is needed")
        built_in[entry.source.name] = entry
    return built_in


def _the_repository(values: Mapping[str, Any]) -> tuple[str, ...]:
    """`GITHUB_OWNER`/`GITHUB_REPO`, as the worker before this one had them."""
    owner, repository = values["GITHUB_OWNER"], values["GITHUB_REPO"]
    if not owner and not repository:
        return ()
    _need_both("GITHUB_OWNER", owner, "GITHUB_REPO", repository)
    return (f"{owner}/{repository}",)


def _the_job(values: Mapping[str, Any]) -> tuple[str, ...]:
    return (values["JENKINS_DEFAULT_JOB"],) if values["JENKINS_DEFAULT_JOB"] else ()


# Two functions of a source's key (`app_id`): its value, and how it is spelled where it was set.
Told = Callable[[str], Any]
Spelled = Callable[[str], str]


def _spelled(prefix: str) -> Spelled:
    return lambda key: f"{prefix}_{key.upper()}"


def _told(prefix: str, values: Mapping[str, Any]) -> Told:
    return lambda key: values[_spelled(prefix)(key)]


def _app(told: Told, spelled: Spelled) -> github.App | None:
    """The GitHub App of a source, if one is set."""
    app_id, key, installation = told("app_id"), told("app_private_key"), told("app_installation_id")
    if not app_id and not key and not installation:
        return None
    _need_both(spelled("app_id"), app_id, spelled("app_private_key"), key)
    _need_one(spelled("token"), told("token"), spelled("app_id"))
    return github.App(app_id, key, installation)


def _oauth(told: Told, spelled: Spelled) -> gitlab.OAuth | None:
    """The OAuth application of a source, if one is set; public ones have no secret."""
    client, secret, first = told("oauth_client_id"), told("oauth_client_secret"), told("oauth_refresh_token")
    if not client and not secret and not first:
        return None
    _need_both(spelled("oauth_client_id"), client, spelled("oauth_refresh_token"), first)
    _need_one(spelled("token"), told("token"), spelled("oauth_client_id"))
    return gitlab.OAuth(client, secret, first)


def _need_both(name: str, value: str, other: str, other_value: str) -> None:
    missing, present = (other, name) if value else (name, other)
    if not value or not other_value:
        raise SettingsError(f"{missing}='': a value is needed beside {present}")


def _need_one(name: str, value: str, other: str) -> None:
    if value:
        raise SettingsError(f"{name}: it is set beside {other}: only one of them is needed")


def _as_list(value: Any) -> list[Any]:
    if value is None or value in _YAML_EMPTY:
        return []
    if not isinstance(value, list):
        raise SettingsError("sources: a list of sources is needed")
    return value


def _further_source(entry: Any) -> SourceSettings:
    if not isinstance(entry, dict) or not entry.get("name") or not entry.get("platform"):
        raise SettingsError("sources: each entry needs at least `name` and `platform`")
    unknown = set(entry) - _SOURCE_KEYS
    if unknown:
        raise SettingsError(
            f"sources: {min(unknown)!r} is no key of a source; allowed are {sorted(_SOURCE_KEYS)}"
            + _did_you_mean(min(unknown), _SOURCE_KEYS)
        )
    name, platform = entry["name"], entry["platform"]
    if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)):
        raise SettingsError(f"sources: name={name!r}: letters, digits, - and _ are needed")
    if platform not in ("github", "gitlab", "jenkins"):
        raise SettingsError(f"sources: {name}: platform={platform!r}: github, gitlab or jenkins is needed")

    def spelled(key: str) -> str:
        return f"sources: {name}: {key}"

    def read(key: str, how: Callable[[str], Any], default: str = "") -> Any:
        return _read(spelled(key), _as_text(entry.get(key)) or default, how, key in _SOURCE_SECRETS)

    foreign = sorted(key for key in entry if key.startswith(_FOREIGN[platform]))
    if foreign:
        raise SettingsError(f"{spelled(foreign[0])}: {platform} knows no such thing")
    told: Told = lambda key: read(key, _SOURCE_READERS.get(key, _text))  # noqa: E731
    return SourceSettings(
        source=Source(
            name, platform, read("api_url", web_url), read("token", _header_text), read("username", _text)
        ),
        enabled=read("enabled", _flag, "true"),
        webhook_secrets=read("webhook_secret", _gitlab_secrets if platform == "gitlab" else _secrets),
        timeout_seconds=read("timeout", _timeout, "30000"),
        retry_attempts=read("retry_attempts", _retries, "0"),
        repositories=read("repositories", _repositories if platform == "github" else _words),
        app=_app(told, spelled),
        oauth=_oauth(told, spelled),
    )


def _as_text(value: Any) -> str:
    """A YAML value as an environment variable would hold it."""
    if value is None or value in _YAML_EMPTY:
        return ""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def secret_texts(settings: Settings) -> list[str]:
    """Every secret that is set, passwords of the database and Redis included: none of it may be shown."""
    found = [settings.admin_token, settings.dashboard_api_key, *settings.encryption_keys]
    found += settings.build_event_tokens
    for source in settings.sources.values():
        found += [source.source.token, *source.webhook_secrets]
        if source.source.token and source.source.username:
            found.append(f"{source.source.username}:{source.source.token}")
        found += [source.app.private_key] if source.app else []
        found += [source.oauth.client_secret, source.oauth.refresh_token] if source.oauth else []
    found += [urlsplit(url).password or "" for url in (settings.database_url, settings.redis_url)]
    return [text for text in found if text]


def redact(settings: Settings) -> Redactor:
    """What masks these settings' secrets, beside everything that looks like one."""
    return redactor(secret_texts(settings))


def pace(settings: Settings) -> Pace:
    """The settings of polling, as the pure rules want them."""
    return Pace(
        interval_seconds=settings.poll_interval_seconds,
        freshness_seconds=settings.push_freshness_seconds,
        max_seconds=settings.max_poll_seconds,
        max_errors=settings.max_consecutive_errors,
        multiplier=settings.backoff_multiplier,
        heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds,
        retention_seconds=settings.retention_days * 86_400.0,
    )
