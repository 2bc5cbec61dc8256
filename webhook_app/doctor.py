"""`buildrelay doctor`: is everything there that BuildRelay stands on, and do the platforms reach it?

Every check ends by itself or is given up, none may crash, and each finding that is not ok says the mend.
No finding holds a secret.
"""

import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from webhook_app import (
    api_health,
    credentials,
    db,
    health,
    migrations,
    platforms,
    queues,
    registration,
    subscribers,
    up,
)
from webhook_app.account import Account
from webhook_app.platforms import Answer, Hook, PollError, PollFault, TokenFacts
from webhook_app.redaction import redactor
from webhook_app.registration import Address, RegistrationError
from webhook_app.settings import Settings, SourceSettings, secret_texts
from webhook_app.times import http_date, iso, utc_now

TIME_SECONDS = 45.0
"""All checks together; what has not answered by then is reported as such."""
CALL_SECONDS = 8.0
REDIS_SECONDS = 3.0
SKEW_SECONDS = 60.0
EXPIRES_SOON = timedelta(days=14)
QUIET = timedelta(days=1)
LATE_BEAT_SECONDS = 30.0

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.  `level`: ok, warn, fail.  `mend`: what to do about it, for people."""

    check: str
    level: str
    what: str
    mend: str | None = None


def is_well(findings: Sequence[Finding]) -> bool:
    """Has nothing failed?  (A warning is no failure.)"""
    return all(finding.level != FAIL for finding in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as `--json` prints them."""
    return {"ok": is_well(findings), "checks": [asdict(finding) for finding in findings]}


def as_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """The findings for a terminal."""
    for finding in findings:
        level = "FAIL" if finding.level == FAIL else finding.level
        yield f"{level:<5} {finding.check}: {finding.what}"
        if finding.mend:
            yield f"      {finding.mend}"


Check = Callable[[], Iterator[Finding]]


def examine(values: Settings, time_seconds: float = TIME_SECONDS) -> list[Finding]:
    """All findings, in an order that does not change; returns within `time_seconds`, whatever hangs."""
    until = monotonic() + time_seconds
    checks: dict[str, Check] = {
        "settings": partial(_settings, values),
        "files": partial(_modes, values),
        "database": partial(_database, values),
        "redis": partial(_redis, values),
    }
    for name, source in values.sources.items():
        if source.source.platform != "script":
            checks[name] = partial(_source, values, source, until)
    running = [(name, *_begin(name, check)) for name, check in checks.items()]
    redact = redactor(secret_texts(values)).name  # errors quote what platforms and servers say
    return [
        replace(finding, what=redact(finding.what))
        for name, done, found in running for finding in _collect(name, done, found, until)
    ]  # fmt: skip


def _begin(name: str, check: Check) -> tuple["Future[None]", list[Finding]]:
    """Run a check in a thread that holds up no exit; what it has found so far is in the list."""
    done: Future[None] = Future()
    found: list[Finding] = []

    def run() -> None:
        try:
            for finding in check():
                found.append(finding)  # noqa: PERF402  seen from outside as it grows
        except Exception as error:  # noqa: BLE001  a check that crashes is a finding
            found.append(Finding(name, FAIL, f"the check itself failed: {type(error).__name__}: {error}"))
        done.set_result(None)

    threading.Thread(target=run, name=f"doctor-{name}", daemon=True).start()
    return done, found


def _collect(name: str, done: "Future[None]", found: list[Finding], until: float) -> list[Finding]:
    try:
        done.result(max(0.0, until - monotonic()))
    except TimeoutError:
        return [*found, Finding(name, FAIL, "did not answer in time", "Look at it and its network.")]
    return found


# ---- what we stand on ------------------------------------------------------------------------


def _settings(values: Settings) -> Iterator[Finding]:
    if values.encryption_keys:
        yield Finding("settings", OK, "encryption keys are set")
    else:
        mend = "Set ENCRYPTION_KEYS; the README says how to make one."
        yield Finding("settings", FAIL, "no encryption key: secrets can't be stored", mend)
    if values.admin_token:
        yield Finding("settings", OK, "an admin token is set")
    else:
        yield Finding("settings", WARN, "no ADMIN_TOKEN", "Set it, or use `buildrelay tokens add`.")
    address = urlsplit(values.public_url)
    if address.scheme == "http" and not up.is_loopback(address.hostname or ""):
        yield Finding("settings", WARN, "PUBLIC_URL is http: pushes travel unencrypted", "Use https.")


@contextmanager
def _store(values: Settings) -> Iterator[Engine]:
    """The store; raises `StoreUnavailable` where SQLite would make an empty one."""
    engine = db.connect(
        values.database_url, values.sqlite_synchronous, pool_size=1, pooler=values.database_pooler
    )
    try:
        if missing := db.missing_file(engine):
            raise db.StoreUnavailable(f"there is no file {missing}")
        yield engine
    finally:
        engine.dispose()


def _database(values: Settings) -> Iterator[Finding]:
    try:
        with _store(values) as engine:
            yield from _schema(migrations.standing(engine))
            db.try_write(engine)
            yield Finding("database", OK, f"{engine.dialect.name} takes writes")
            with db.reading(engine) as connection:
                yield from _closed(subscribers.closed(connection, values.encryption_keys))
    except db.SchemaMissing:
        return  # said already
    except (SQLAlchemyError, db.StoreUnavailable) as error:
        told = error if isinstance(error, db.StoreUnavailable) else db.unavailable(error)
        mend = "Look whether it runs, has room and may be written, and at DATABASE_URL."
        yield Finding("database", FAIL, _one_line(told.in_full()), mend)


def _schema(standing: str) -> Iterator[Finding]:
    found = {
        migrations.CURRENT: Finding("database", OK, "the schema is current"),
        migrations.OLDER: Finding("database", FAIL, "the schema is not current", "Run `buildrelay migrate`."),
        migrations.NEWER: Finding(
            "database", WARN, "the schema is newer than this program, and has all that it needs", "Update it."
        ),
        migrations.UNUSABLE: Finding(
            "database", FAIL, "the schema is newer than this program, and lacks what it needs", "Update it."
        ),
    }
    yield found[standing]


def _modes(values: Settings) -> Iterator[Finding]:
    """What other users of this machine may read."""
    secrets = values.data_dir / up.SECRETS_FILE
    found = [db.open_to_others(values.database_url), secrets if secrets.exists() else None]
    for file in found:
        if file is not None and file.stat().st_mode & 0o077:
            mend = f"Run `chmod 600 {shlex.quote(str(file))}`, and look who has read it."
            yield Finding("files", WARN, f"{file} is open to other users of this machine", mend)


def _closed(ids: Sequence[str]) -> Iterator[Finding]:
    if ids:
        what = f"the secrets of {ids[0]} open with none of ENCRYPTION_KEYS (subscribers: {len(ids)})"
        mend = "Put the key back that they were sealed with: their messages wait for it."
        yield Finding("database", FAIL, what, mend)


def _one_line(text: str) -> str:
    return text.strip().split("\n")[0]


def _redis(values: Settings) -> Iterator[Finding]:
    try:
        with queues.connect(values.redis_url, REDIS_SECONDS) as redis:
            queues.try_write(redis)
            yield Finding("redis", OK, "Redis takes writes")
            yield _scheduler(queues.beat(redis))
            served = queues.workers(redis)
            yield from _workers([bell for bell in queues.JOBS if not served[bell]])
    except RedisError as error:
        mend = "Look whether it runs, and at REDIS_URL. Webhooks are taken, but nothing is sent or polled."
        if queues.is_untrusted(error):
            mend = "Name who signs it (REDIS_URL with ?ssl_ca_certs=FILE), or set REDIS_TLS_VERIFY=false."
            yield Finding("redis", FAIL, "the certificate of Redis is refused", mend)
            return
        yield Finding("redis", FAIL, queues.trouble(error), mend)


def _scheduler(beat: int | None) -> Finding:
    mend = "Start `buildrelay scheduler`, or `buildrelay up`."
    if beat is None:
        return Finding("scheduler", FAIL, "no scheduler is running: nothing is polled or retried", mend)
    age = max(utc_now().timestamp() - beat, 0.0)
    return Finding("scheduler", OK if age < LATE_BEAT_SECONDS else FAIL, f"its last pass was {age:.0f} s ago")


def _workers(missing: Sequence[str]) -> Iterator[Finding]:
    for bell in missing:
        yield Finding("workers", FAIL, f"no worker serves {bell}", "Start `buildrelay worker`.")
    if not missing:
        yield Finding("workers", OK, f"every queue is served ({', '.join(queues.JOBS)})")


# ---- sources ---------------------------------------------------------------------------------


def _source(values: Settings, source: SourceSettings, until: float) -> Iterator[Finding]:
    name, told = source.source.name, _told(values, source.source.name)
    in_use = bool(source.has_token or source.repositories or told.get("pushes") or told.get("polls"))
    if not in_use:
        secret = "a webhook secret is set" if source.webhook_secrets else "no webhook secret"
        yield Finding(name, OK, f"not set up ({secret}, no token, no repositories)")
        return
    if len(source.webhook_secrets) > 1:
        count = len(source.webhook_secrets)
        yield Finding(name, OK, f"{count} webhook secrets are accepted (a comma separates them)")
    if not source.webhook_secrets:
        mend = "Set its webhook secret, and use `buildrelay sources connect`."
        yield Finding(name, WARN, "no webhook secret: pushes are refused, all is polled", mend)
    yield from _health(name, source, told)
    if source.can_poll:
        if not source.has_token:
            mend = "Set a token: without one only public builds can be read, and few of them an hour."
            yield Finding(name, WARN, "no token: builds are polled as anybody may", mend)
        yield from map(partial(_eased, source), _access(values, source, until))
    elif source.enabled:
        mend = "Set its address, so that builds whose pushes are lost still end."
        yield Finding(name, WARN, "no API address: builds are not polled", mend)


def _eased(source: SourceSettings, finding: Finding) -> Finding:
    """A failing API is only a warning while nobody has set up that it is read."""
    is_wanted = source.has_token or source.repositories
    return finding if is_wanted or finding.level != FAIL else replace(finding, level=WARN)


def _told(values: Settings, name: str) -> dict[str, Any]:
    """The row of the source; empty while the store is away or old."""
    try:
        with _store(values) as engine, db.reading(engine) as connection:
            row = health.snapshot(connection).get(name, {})
            return {**row, "clock_off_at": health.clock_off_at(connection, name)}
    except db.StoreUnavailable:
        return {}


def _health(name: str, source: SourceSettings, told: dict[str, Any]) -> Iterator[Finding]:
    now, last_push = utc_now(), told.get("last_push_at")
    hooks = "See the webhook below, and what the platform says of its deliveries."
    if told.get("paused_until") and told["paused_until"] > now:
        what = f"not polled until {iso(told['paused_until'])}: {told['pause_reason']}"
        yield Finding(name, WARN, what, "A refused token has to be replaced; a limit ends by itself.")
    if api_health.is_failing(told):
        what = (
            f"can't be read since {iso(told['api_failing_since'])}, {told['api_failures']} rounds of polling "
            f"failed in a row: {told['api_error_kind']}: {told['api_error']}"
        )
        mend = "Look at the platform, the network between, and its token."
        yield _eased(source, Finding(name, FAIL, what, mend))
    if told.get("deaf_since"):
        what = f"deaf since {iso(told['deaf_since'])}: polls are first to tell what changes"
        yield Finding(name, FAIL, what, hooks)
    elif source.webhook_secrets and last_push is None:
        yield Finding(name, WARN, "no push ever came", hooks)
    elif last_push is not None:
        yield _freshness(name, told, now - last_push)
    if told.get("refused_in_row"):
        what = f"its last {told['refused_in_row']} pushes were refused"
        yield Finding(name, WARN, what, "Is the webhook's secret ours? See `buildrelay sources connect`.")
    if told.get("clock_off_at") and told["clock_off_at"] > now - QUIET:
        what = f"a push with a right signature and a wrong time was refused at {iso(told['clock_off_at'])}"
        yield Finding(
            name, WARN, what, "Set the clocks of both by NTP; /api/notifications has the difference."
        )


def _freshness(name: str, told: dict[str, Any], age: timedelta) -> Finding:
    share, missed = told.get("push_share"), told.get("missed_pushes", 0)
    tail = f", {share:.1%} of changes are pushed first, {missed} were missed" if share is not None else ""
    mend = "Fine, if nothing was built since." if age > QUIET else None
    what = f"the last push came {_age(age)} ago{tail}"
    return Finding(name, WARN if age > QUIET else OK, what, mend)


def _age(age: timedelta) -> str:
    seconds = max(age.total_seconds(), 0.0)
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _access(values: Settings, source: SourceSettings, until: float) -> Iterator[Finding]:
    """Token, clock, repositories and their webhooks; a token that is refused ends it."""
    try:
        source = _with_token(values, source)
    except PollError as error:
        yield _refused(source.source.name, "no token is lent", error)
        return
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(_store(values))
        except db.StoreUnavailable:
            engine = None
        account = Account(source, engine, values.api_budget_reserve, secrets=secret_texts(values))
        yield from _with_access(values, account, until)


def _with_access(values: Settings, account: Account, until: float) -> Iterator[Finding]:
    source = account.settings
    name = source.source.name
    api = platforms.token_api(source.source.platform)
    assert api is not None
    began = utc_now()
    try:
        answer = registration.ask(account, api.token_call(source.source), CALL_SECONDS)
        yield from _clock(name, answer, began, utc_now())
        yield from _token(source, api.parse_token(answer))
    except PollError as error:
        yield _refused(name, "the API", error)
        return
    for place, repository in enumerate(source.repositories):
        if monotonic() > until - CALL_SECONDS:
            left = len(source.repositories) - place
            yield Finding(name, WARN, f"{left} repositories were not looked at for want of time")
            return
        yield from _repository(values, account, repository)


def _with_token(values: Settings, source: SourceSettings) -> SourceSettings:
    if source.app is None and source.oauth is None:
        return source
    try:
        with _store(values) as engine:
            return credentials.with_token(engine, values.encryption_keys, source)
    except db.StoreUnavailable as error:
        raise PollError(PollFault.UNAVAILABLE, f"the store is away: {error}") from error


def _refused(name: str, what: str, error: PollError) -> Finding:
    mends = {
        PollFault.UNAUTHORIZED: "Replace the token: it is wrong, revoked or has expired.",
        PollFault.RATE_LIMITED: "Wait: the limit ends by itself.",
        PollFault.UNAVAILABLE: "Look at the platform, the network between, and the address in the settings.",
        PollFault.NOT_FOUND: "Is it there under this name, and may the token see it?",
        PollFault.UNREADABLE: "Is this the address of the API? A proxy or a log-in page may answer instead.",
    }
    level = WARN if error.fault is PollFault.RATE_LIMITED else FAIL
    mend = mends.get(error.fault, "Look at the permissions of the token.")
    return Finding(name, level, f"{what}: {error.fault.value}: {error}", mend)


def _clock(name: str, answer: Answer, began: datetime, ended: datetime) -> Iterator[Finding]:
    theirs = http_date(answer.headers.get("date", ""))
    if theirs is None:
        return
    skew = (began + (ended - began) / 2 - theirs).total_seconds()
    if abs(skew) > SKEW_SECONDS:
        what = f"our clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} its clock"
        yield Finding(name, WARN, what, "Set the clock (NTP): signatures with a time in them are refused.")
    else:
        yield Finding(name, OK, "our clocks agree")


_SCOPES = {"github": {"repo", "public_repo"}, "gitlab": {"api", "read_api"}}
"""One of these a token must have to read builds, where the platform tells scopes at all."""


def _token(source: SourceSettings, facts: TokenFacts) -> Iterator[Finding]:
    name, needed = source.source.name, _SCOPES.get(source.source.platform, set())
    if not source.source.token:
        mend = "Set a token: without one GitHub allows 60 requests an hour, and webhooks can't be seen."
        yield Finding(name, WARN, "no token: only public builds can be polled", mend)
        return
    if facts.scopes is not None and not needed & set(facts.scopes):
        what = f"the token has the scopes {', '.join(facts.scopes) or '(none)'}"
        yield Finding(name, FAIL, what, f"It needs {' or '.join(sorted(needed))}.")
    else:
        tail = f" (scopes: {', '.join(facts.scopes)})" if facts.scopes else ""
        yield Finding(name, OK, f"the token is accepted{tail}")
    if facts.expires_at is not None and facts.expires_at - utc_now() < EXPIRES_SOON:
        gone = facts.expires_at <= utc_now()
        what = f"the token {'expired' if gone else 'expires'} on {facts.expires_at:%Y-%m-%d}"
        yield Finding(name, FAIL if gone else WARN, what, "Make a new one, and put it into the settings.")


# ---- repositories and their webhooks ---------------------------------------------------------


def _repository(values: Settings, account: Account, repository: str) -> Iterator[Finding]:
    source = account.settings
    name = f"{source.source.name} {repository}"
    platform = platforms.polled()[source.source.platform]
    request = platform.list_request(source.source, [repository], None, 1)
    if request is None:
        yield Finding(name, FAIL, "is no name of a repository", "Look at the settings.")
        return
    call = platforms.Call("GET", request.url, request.headers)
    try:
        platform.parse_list(source.source, [repository], registration.ask(account, call, CALL_SECONDS))
        yield Finding(name, OK, "its builds can be read")
    except PollError as error:
        yield _refused(name, "its builds can't be read", error)
        return
    if platforms.hook_api(source.source.platform) and source.source.token and source.webhook_secrets:
        yield from _webhook(values, account, repository, name)


def _webhook(values: Settings, account: Account, repository: str, name: str) -> Iterator[Finding]:
    source = account.settings
    api = platforms.hook_api(source.source.platform)
    assert api is not None
    address = Address(source.source.name, values.public_url)
    try:
        hook = registration.ours(registration.find_hooks(account, repository, CALL_SECONDS), address)
    except (PollError, RegistrationError) as error:
        if isinstance(error, PollError) and error.fault not in registration.HIDDEN:
            yield _refused(name, "its webhooks can't be read", error)
            return
        mend = f"To check and register it from here the token needs: {api.HOOK_PERMISSION}."
        yield Finding(name, WARN, "the token may not see its webhooks", mend)
        return
    if hook is None:
        mend = f"Run `buildrelay sources connect {source.source.name} {repository}`."
        what = f"no webhook of it leads to {address.url} (one of its organization or group can't be seen)"
        yield Finding(name, WARN, what, mend)
        return
    yield from _registered(source, repository, hook, name)


def _registered(source: SourceSettings, repository: str, hook: Hook, name: str) -> Iterator[Finding]:
    connect = f"Run `buildrelay sources connect {source.source.name} {repository}`."
    wrong = registration.faults(source, hook)
    for what in wrong:
        yield Finding(name, FAIL, f"webhook {hook.id}: {what}", connect)
    if registration.has_failed(hook):
        what = f"webhook {hook.id}: its last delivery failed (HTTP {hook.last_status or 'none'})"
        yield Finding(name, WARN, what, "Do we run, and can the platform reach us? Look at its deliveries.")
    elif not wrong:
        yield Finding(name, OK, f"webhook {hook.id} is active and well")
