"""The command `buildrelay`.  Exit codes: 0 done, 1 failed, 2 wrong use or setting."""

import argparse
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine

from webhook_app import (
    VERSION,
    api_health,
    cli_subscribers,
    credentials,
    db,
    deliveries,
    endpoints,
    grants,
    health,
    loglines,
    queries,
    registration,
    replays,
    settings,
    subscribers,
    supervisor,
    tokens,
    up,
    waiting,
)
from webhook_app.account import Account
from webhook_app.embedded import EmbeddedError
from webhook_app.migrations import NewerSchema
from webhook_app.platforms import PollError
from webhook_app.redaction import SHAPES, redactor
from webhook_app.sealing import SealError
from webhook_app.settings import Settings, SettingsError, SourceSettings, secret_texts
from webhook_app.times import iso, utc_now

REDIS_SECONDS = 2.0
"""A Redis that says nothing for so long is away: a command does not wait for it."""

MOST_LISTED = 100_000
MOST_TRIES = 200
MOST_NAME = 255


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit."""
    chosen = _parser().parse_args(arguments)
    try:
        code = chosen.run(chosen)
        sys.stdout.flush()
    except WRONG as error:
        code = _complain(error, 2)
    except db.SchemaMissing as error:
        code = _complain(f"the schema is not current ({error}): run `buildrelay migrate`", 1)
    except db.StoreUnavailable as error:
        code = _complain(error.in_full(), 1)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    raise SystemExit(code)


class NoStore(Exception):
    """There is no database to work on; the message is the one line a person needs."""


WRONG = (
    SettingsError, EmbeddedError, SealError, up.CannotStart, NoStore, NewerSchema, cli_subscribers.WrongUse,
)  # fmt: skip
"""Errors of use or settings: exit code 2."""


def _complain(reason: object, code: int) -> int:
    print(f"buildrelay: {SHAPES.name(str(reason))}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="buildrelay", description="Relay CI builds: pushes first, polling as the safety net."
    )
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_processes(commands)
    _add_subscribers(commands)
    _add_deliveries(commands)
    _add_tokens(commands)
    _add_sources(commands)
    doctor = _command(commands, "doctor", _doctor, "Check everything BuildRelay stands on; say the mend.")
    doctor.add_argument("--json", action="store_true", help="the findings as JSON")
    _command(commands, "rekey", _rekey, "Seal every stored secret with the newest of ENCRYPTION_KEYS.")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help_: str
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=help_, description=help_)
    made.set_defaults(run=run)
    return made


# ---- processes -------------------------------------------------------------------------------


def _add_processes(commands: Any) -> None:
    started = _command(commands, "up", _up, "Run everything on this machine, in this terminal.")
    started.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    started.add_argument("--port", type=int, help="port to listen on (default: PORT, or 8000)")
    started.add_argument("--data-dir", type=_directory, help="where data and secrets live (default: ./data)")
    demo = _command(
        commands, "demo", _demo, "Run everything against simulated CI platforms and a subscriber."
    )
    demo.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    demo.add_argument(
        "--builds", type=int, help="stop after so many builds and say how it went (default: go on)"
    )
    demo.add_argument("--loss", type=float, default=0.1, help="share of pushes lost, doubled, reordered")
    demo.add_argument("--seed", type=int, default=1, help="another seed, other builds")
    demo.add_argument(
        "--data-dir", type=_directory, help="where data lives (default: a new temporary directory)"
    )
    _command(commands, "migrate", _migrate, "Bring the database to the present schema.")
    _command(commands, "worker", _worker, "Run the workers (deliveries; polling).")
    _command(commands, "scheduler", _scheduler, "Run the scheduler.")


def _directory(text: str) -> Path:
    try:
        return settings.directory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error} is needed") from None


def _up(chosen: argparse.Namespace) -> int:
    supervisor.tie_to_starter()
    data_dir = chosen.data_dir or settings.data_dir(os.environ)
    _warn_of_misspelt(data_dir)
    supervisor.end_process(up.up(chosen.host, chosen.port, data_dir))


def _demo(chosen: argparse.Namespace) -> int:
    from webhook_app.simulated import demo

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # one tidy end for both
    return demo.run(chosen.port, chosen.builds, chosen.loss, chosen.seed, chosen.data_dir)


def _migrate(_chosen: argparse.Namespace) -> int:
    _warn_of_misspelt()
    values = _settings()
    loglines.setup(values.log_format, values.log_level, settings.redact(values))
    up.prepare(values)
    print("The database has the present schema.")
    return 0


def _worker(_chosen: argparse.Namespace) -> int:
    _warn_of_misspelt()
    values = _settings()
    how = up.log_lines(values)
    supervisor.end_process(supervisor.supervise(up.workers(_environment()), timing=up.timing(values), **how))


def _scheduler(_chosen: argparse.Namespace) -> int:
    _warn_of_misspelt()
    _settings()
    os.environ.update(_environment())
    runpy.run_module("jobs.schedule", run_name="__main__", alter_sys=True)
    return 0


def _warn_of_misspelt(data_dir: Path | None = None) -> None:
    """Log a warning for each variable that looks like a misspelt setting: it has no effect."""
    kept = up.read_secrets(data_dir or settings.data_dir(os.environ))
    format_ = settings.log_format(os.environ)
    for name, meant in settings.misspelt(os.environ, kept).items():
        print(loglines.line(format_, f"{name} is no setting: did you mean {meant}?"), file=sys.stderr)


def _environment() -> dict[str, str]:
    """Our environment, and under it the secrets that `up` made in the data directory."""
    return up.under(os.environ, up.read_secrets(settings.data_dir(os.environ)))


def _settings() -> Settings:
    return settings.load(_environment())


# ---- subscribers -----------------------------------------------------------------------------


def _add_subscribers(commands: Any) -> None:
    group = _group(commands, "subscribers", "Who gets webhooks.")
    _command(group, "list", _list_subscribers, "List the subscribers.")
    add = _command(group, "add", _add_subscriber, "Register a callback URL; prints its secret, this once.")
    add.add_argument("url")
    cli_subscribers.add_options(add, changing=False)
    add.add_argument("--signing", choices=["hmac", "ed25519"], default="hmac")
    show = _command(group, "show", _show_subscriber, "Show a subscriber, and how its endpoint does.")
    show.add_argument("id")
    show.add_argument("--json", action="store_true", help="print the JSON of the API")
    change = _command(group, "change", _change_subscriber, "Change what is named of a subscriber.")
    change.add_argument("id")
    cli_subscribers.add_options(change, changing=True)
    for name, run, help_ in (
        ("remove", _remove_subscriber, "Delete a subscriber and its messages."),
        ("enable", _enable_subscriber, "Let a disabled subscriber get messages again."),
        ("test", _test_subscriber, "Send a test message and show the answer."),
    ):
        _command(group, name, run, help_).add_argument("id")
    rotate = _command(
        group, "rotate-secret", _rotate_secret, "Give a new secret; the old one signs as well for a while."
    )
    rotate.add_argument("id")
    rotate.add_argument("--grace-seconds", type=int, default=subscribers.DEFAULT_GRACE_SECONDS)
    replay = _command(group, "replay", _replay, "Send again what a subscriber missed in a range.")
    replay.add_argument("id")
    replay.add_argument("--since", type=_moment, required=True, help="a time like 2026-11-01T10:00:00Z")
    replay.add_argument("--until", type=_moment, help="before this time (default: now)")
    replay.add_argument("--only", choices=["missing", "all"], default="missing")
    replay.add_argument("--dry-run", action="store_true", help="count only")


def _group(commands: Any, name: str, help_: str) -> Any:
    return commands.add_parser(name, help=help_).add_subparsers(required=True, metavar="ACTION")


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise argparse.ArgumentTypeError("a time with its zone is needed, like 2026-11-01T10:00:00Z")
    return moment


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= MOST_LISTED:
        raise argparse.ArgumentTypeError(f"a number from 1 to {MOST_LISTED} is needed")
    return count


def _token_name(text: str) -> str:
    """As the API takes it, and on one line of a list."""
    if not (1 <= len(text) <= MOST_NAME and text.isprintable()):
        raise argparse.ArgumentTypeError(f"1 to {MOST_NAME} characters on one line are needed")
    return text


def _list_subscribers(_chosen: argparse.Namespace) -> int:
    from sqlalchemy import select

    from webhook_app.models import subscribers as table

    with db.reading(_engine(_settings())) as connection:
        for row in connection.execute(select(table).order_by(table.c.created_at)).mappings():
            wants = ", ".join(row["events"]) or "everything"
            url = subscribers.shown_url(dict(row), (), whole=False)
            print(f"{row['id']}  {row['state']:<8}  {url}  {wants}")
    return 0


def _add_subscriber(chosen: argparse.Namespace) -> int:
    values = _settings()
    wanted = cli_subscribers.fields(chosen) | {"signing": chosen.signing}
    cli_subscribers.check(wanted, values.allow_private_callbacks)

    def unit(write: db.Write) -> tuple[Mapping[str, Any], str]:
        subscribers.need_room(write, values.max_subscribers)
        return subscribers.create(write, wanted, values.encryption_keys, utc_now())

    try:
        row, secret = db.as_writer(_engine(values), unit)
    except subscribers.TooMany as error:
        raise cli_subscribers.WrongUse(str(error)) from None
    print(f"{row['id']}\nsecret: {secret}")
    return 0


def _show_subscriber(chosen: argparse.Namespace) -> int:
    values = _settings()
    with db.reading(_engine(values)) as connection:
        row = subscribers.get(connection, chosen.id)
        known = endpoints.health(connection, chosen.id)
    if row is None:
        return _done(False, "", chosen.id)
    return _print(cli_subscribers.subscriber(row, known, values.encryption_keys), chosen)


def _print(shown: Mapping[str, Any], chosen: argparse.Namespace) -> int:
    lines = [cli_subscribers.as_json(shown)] if chosen.json else cli_subscribers.as_lines(shown)
    print(*lines, sep="\n")
    return 0


def _change_subscriber(chosen: argparse.Namespace) -> int:
    values = _settings()
    wanted = cli_subscribers.fields(chosen)
    if not wanted:
        raise cli_subscribers.WrongUse("nothing is named that is to be changed: see --help")
    cli_subscribers.check(wanted, values.allow_private_callbacks)

    def unit(write: db.Write) -> tuple[Mapping[str, Any] | None, bool]:
        row = subscribers.get(write.connection, chosen.id)
        if row is None or subscribers.is_fixed(row, wanted):
            return row, False
        return row, subscribers.edit(write, row, wanted, values.encryption_keys, utc_now())

    row, dropped = db.as_writer(_engine(values), unit)
    if row is not None and subscribers.is_fixed(row, wanted):
        raise cli_subscribers.WrongUse(
            f"{chosen.id} is set by DASHBOARD_API_URL, _KEY and _FORMAT: change those"
        )
    left = "; its headers are gone: they were for the old address (--header gives new ones)"
    return _done(row is not None, f"{chosen.id} is changed{left if dropped else ''}", chosen.id)


def _remove_subscriber(chosen: argparse.Namespace) -> int:
    engine = _engine(_settings())
    row = _subscriber(engine, chosen.id)
    if row is not None and row["origin"] == "settings":
        print(f"buildrelay: {chosen.id} is set by DASHBOARD_API_URL: unset that instead", file=sys.stderr)
        return 2
    found = subscribers.remove(engine, chosen.id, utc_now())
    return _done(found, f"{chosen.id} is gone", chosen.id)


def _subscriber(engine: Engine, id_: str) -> Mapping[str, Any] | None:
    with db.reading(engine) as connection:
        return subscribers.get(connection, id_)


def _enable_subscriber(chosen: argparse.Namespace) -> int:
    values = _settings()
    found = db.as_writer(_engine(values), lambda write: endpoints.enable(write, chosen.id, utc_now()))
    _ring(values)
    return _done(found, f"{chosen.id} is active", chosen.id)


def _ring(values: Settings, *more: str) -> bool:
    """Wake a delivery worker (and ring `more`); is there one?  If not, the next to start finds the work."""
    from webhook_app import queues  # RQ: not for those who only migrate

    redis = queues.connect(values.redis_url, REDIS_SECONDS)
    with redis:
        return queues.Bell(redis).ring(queues.DELIVER, *more) and queues.is_served(redis, queues.DELIVER)


def _active(engine: Engine, id_: str) -> Mapping[str, Any] | None:
    """The subscriber if messages may be sent to it; else it was said why not."""
    row = _subscriber(engine, id_)
    if row is None:
        print(f"buildrelay: there is no {id_}", file=sys.stderr)
    elif row["state"] != "active":
        print(f"buildrelay: {id_} is disabled: enable it first", file=sys.stderr)
        return None
    return row


def _test_subscriber(chosen: argparse.Namespace) -> int:
    values = _settings()
    engine = _engine(values)
    if _active(engine, chosen.id) is None:
        return 1
    message_id = db.as_writer(engine, lambda write: endpoints.plan_test(write, chosen.id, utc_now()))
    answer = endpoints.await_answer(engine, message_id, endpoints.ANSWER_SECONDS if _ring(values) else 0.0)
    print(f"{message_id}  {answer.state}  {answer.status_code or '-'}  {answer.reason or '-'}")
    if answer.response:
        print(*map(cli_subscribers.printable, answer.response.splitlines()), sep="\n")
    return 0 if answer.state == "delivered" else 1


def _replay(chosen: argparse.Namespace) -> int:
    values = _settings()
    engine, now = _engine(values), utc_now()
    row = _active(engine, chosen.id)
    if row is None:
        return 1
    span = replays.Range(chosen.since, chosen.until or now, chosen.only == "missing")
    if chosen.dry_run:
        print(f"{replays.count(engine, row, span)} would be sent")
        return 0
    print(f"{replays.replay(engine, row, span, now).count} are on their way")
    _ring(values, "replay")
    return 0


def _rotate_secret(chosen: argparse.Namespace) -> int:
    if not 0 <= chosen.grace_seconds <= subscribers.MOST_GRACE_SECONDS:
        print(
            f"buildrelay: --grace-seconds: 0 to {subscribers.MOST_GRACE_SECONDS} is needed", file=sys.stderr
        )
        return 2
    values = _settings()

    def rotate(write: db.Write) -> tuple[str, Any] | None:
        row = subscribers.get(write.connection, chosen.id)
        if row is None:
            return None
        return subscribers.rotate_secret(write, row, chosen.grace_seconds, values.encryption_keys, utc_now())

    rotated = db.as_writer(_engine(values), rotate)
    if rotated is None:
        return _done(False, "", chosen.id)
    secret, expires_at = rotated
    print(f"secret: {secret}")
    if expires_at:
        print(f"the previous one signs as well until {iso(expires_at)}")
    return 0


# ---- deliveries ------------------------------------------------------------------------------


def _add_deliveries(commands: Any) -> None:
    group = _group(commands, "deliveries", "What was, or is to be, sent.")
    list_ = _command(group, "list", _list_deliveries, "List the dead deliveries, or those of one subscriber.")
    list_.add_argument("--state", choices=["pending", "delivered", "dead"], help="default: dead")
    list_.add_argument("--subscriber", help="the id of one subscriber")
    list_.add_argument("--reason", help="only those that died of this reason")
    list_.add_argument("--most", type=_count, default=50, help="how many (default: %(default)s)")
    show = _command(group, "show", _show_delivery, "Show one delivery with each of its attempts.")
    show.add_argument("id")
    show.add_argument("--json", action="store_true", help="print the JSON of the API")
    retry = _command(group, "retry", _retry_delivery, "Send one delivery again, under its id.")
    retry.add_argument("id")
    redrive = _command(group, "redrive", _redrive, "Send the dead deliveries of active subscribers again.")
    redrive.add_argument("--subscriber", help="only those of this subscriber")
    redrive.add_argument("--reason", help="only those that died of this reason")


def _list_deliveries(chosen: argparse.Namespace) -> int:
    state = chosen.state or "dead"
    if chosen.subscriber is None and state != "dead":
        print("buildrelay: --state: over all subscribers only dead ones are listed", file=sys.stderr)
        return 2
    if chosen.reason is not None and state != "dead":
        raise cli_subscribers.WrongUse("--reason: only dead ones have one")
    statement = queries.dead_letters(chosen.subscriber, chosen.reason, most=chosen.most)
    if chosen.subscriber is not None and chosen.reason is None:
        statement = queries.deliveries(chosen.subscriber, state, most=chosen.most)
    values = _settings()
    with db.reading(_engine(values)) as connection:
        rows = connection.execute(statement).mappings().all()
        words = _words(connection, values, rows)
        for row in rows:
            about = f"{row['type']}  {row['build_id'] or '-'}  {row['reason'] or '-'}"
            about += f"  waits for {words[row['message']]}" if row["message"] in words else ""
            print(f"{row['id']}  {row['subscriber_id']}  {row['state']:<9}  {about}")
        if chosen.subscriber is None:
            counts = replays.dead_letters(connection)
            print(f"{sum(counts.values())} dead", *(f"{reason}={count}" for reason, count in counts.items()))
    return 0


def _show_delivery(chosen: argparse.Namespace) -> int:
    values = _settings()
    with db.reading(_engine(values)) as connection:
        row = queries.delivery(connection, chosen.id)
        if row is None:
            return _done(False, "", chosen.id)
        attempts = queries.delivery_attempts(connection, row["message"], MOST_TRIES)
        word = _words(connection, values, [row]).get(row["message"])
    return _print(cli_subscribers.delivery(row, attempts, word), chosen)


def _words(connection: Connection, values: Settings, rows: Sequence[Mapping[Any, Any]]) -> dict[int, str]:
    """What the pending ones of these deliveries wait for."""
    look = waiting.Look(connection, utc_now(), values.delivery_host_concurrency, values.encryption_keys)
    return waiting.words(look, rows)


def _retry_delivery(chosen: argparse.Namespace) -> int:
    values = _settings()

    def unit(connection: Connection) -> str | None:
        row = queries.delivery(connection, chosen.id)
        if row is None:
            return None
        if row["subscriber_state"] == "active":
            deliveries.retry(connection, row["message"], utc_now())
        return str(row["subscriber_state"])

    state = db.in_transaction(_engine(values), unit)
    if state == "disabled":
        print("buildrelay: its subscriber is disabled: enable it first", file=sys.stderr)
        return 1
    _ring(values)
    return _done(state is not None, f"{chosen.id} is on its way", chosen.id)


def _redrive(chosen: argparse.Namespace) -> int:
    values = _settings()
    engine = _engine(values)
    if chosen.subscriber is not None and _active(engine, chosen.subscriber) is None:
        return 1
    started = replays.redrive(engine, chosen.subscriber, chosen.reason, utc_now())
    _ring(values, "replay")
    print(f"{started.count} are on their way")
    return 0


# ---- sources, doctor -------------------------------------------------------------------------


def _add_sources(commands: Any) -> None:
    group = _group(commands, "sources", "The CI platforms, and our webhooks there.")
    _command(group, "list", _list_sources, "List the configured sources.")
    for name, help_ in (
        ("connect", "Register our webhook in repositories, or set right the one that is there."),
        ("disconnect", "Remove our webhook from repositories."),
    ):
        command = _command(group, name, _connect, help_)
        command.set_defaults(connects=name == "connect")
        command.add_argument("source", help="github, gitlab, or the name of a further source")
        command.add_argument("repositories", nargs="+", metavar="repository")
        command.add_argument("--url", type=_web_url, help="our address from outside (default: PUBLIC_URL)")
        command.add_argument("--dry-run", action="store_true", help="say only what would be done")


def _web_url(text: str) -> str:
    try:
        return settings.web_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} is needed") from None


def _list_sources(_chosen: argparse.Namespace) -> int:
    values = _settings()
    with db.reading(_engine(values)) as connection:
        told = health.snapshot(connection)
    for name, source in values.sources.items():
        row = told.get(name, {})
        count = len(source.webhook_secrets)
        secret = f"{count} secrets" if count > 1 else "secret" if count else "no secret"
        token = "token" if source.has_token else "no token"
        counts = f"{row.get('pushes', 0)} pushes, {row.get('missed_pushes', 0)} missed"
        failing = f"  can't be read: {row['api_error']}" if api_health.is_failing(row) else ""
        print(f"{name:<10} {source.source.platform:<8} {secret}, {token}  {counts}{failing}")
        for repository in source.repositories:
            print(f"           {repository}")
    return 0


def _source(values: Settings, name: str) -> SourceSettings | None:
    """The source of this name, whatever its case."""
    same = (one for one in values.sources.values() if one.source.name.casefold() == name.casefold())
    return next(same, None)


def _connect(chosen: argparse.Namespace) -> int:
    values = _settings()
    source = _source(values, chosen.source)
    if source is None or source.source.platform == "script":
        known = ", ".join(name for name, one in values.sources.items() if one.source.platform != "script")
        print(f"buildrelay: there is no source {chosen.source}: it is one of {known}", file=sys.stderr)
        return 2
    base = chosen.url or values.public_url
    if not base:
        print("buildrelay: --url or PUBLIC_URL is needed: where are we seen from outside?", file=sys.stderr)
        return 2
    address = registration.Address(source.source.name, base)
    if source.source.platform == "jenkins":
        print(_JENKINS.format(url=address.url))
        return 0
    try:
        if source.app or source.oauth:  # a token of our own needs no store
            source = credentials.with_token(_engine(values), values.encryption_keys, source)
    except PollError as error:
        print(f"buildrelay: {chosen.source}: {settings.redact(values)(str(error))}", file=sys.stderr)
        return 1
    account = Account(source, _engine_if_any(values), values.api_budget_reserve, secrets=secret_texts(values))
    done = [_connect_one(account, repository, address, chosen) for repository in chosen.repositories]
    return 0 if all(done) else 1


_JENKINS = """Jenkins has no API for this. In the Notification plugin of each job enter

  Format    JSON
  Protocol  HTTP
  Event     All Events
  URL       {url}

and let it send the secret: as the header X-Build-Token, or as an X-Hub-Signature-256 signature."""


def _connect_one(
    account: Account, repository: str, address: registration.Address, chosen: argparse.Namespace
) -> bool:
    act = registration.connect if chosen.connects else registration.disconnect
    try:
        done = act(account, repository, address, dry_run=chosen.dry_run)
    except (PollError, registration.RegistrationError) as error:
        redact = redactor([*account.secrets, account.settings.source.token])
        print(f"buildrelay: {repository}: {redact(str(error))}", file=sys.stderr)
        if isinstance(error, PollError) and error.fault in registration.HIDDEN:
            print(f"  the token needs: {registration.permission(account.settings)}", file=sys.stderr)
        return False
    would = "would be " if chosen.dry_run and done.action != "absent" else ""
    hook = f" (webhook {done.hook_id})" if done.hook_id else ""
    print(f"{repository}: {would}{done.action}{hook}")
    return True


def _doctor(chosen: argparse.Namespace) -> int:
    from webhook_app import doctor

    _warn_of_misspelt()
    findings = doctor.examine(_settings())
    if chosen.json:
        print(json.dumps(doctor.as_json(findings), indent=2))
    else:
        print(*doctor.as_lines(findings), sep="\n")
    return 0 if doctor.is_well(findings) else 1


# ---- keys and tokens -------------------------------------------------------------------------


def _rekey(_chosen: argparse.Namespace) -> int:
    values = _settings()
    engine, keys = _engine(values), values.encryption_keys
    count, closed = subscribers.rekey(engine, keys)
    lent, lost = grants.rekey(engine, keys)
    print(f"{count + lent} sealed with the newest key")
    for id_ in closed + lost:
        print(f"buildrelay: the secrets of {id_} open with none of ENCRYPTION_KEYS", file=sys.stderr)
    return 1 if closed or lost else 0


def _add_tokens(commands: Any) -> None:
    group = _group(commands, "tokens", "API tokens.")
    _command(group, "list", _list_tokens, "List the API tokens.")
    add = _command(group, "add", _add_token, "Make an API token; prints it, this once.")
    add.add_argument("name", type=_token_name)
    add.add_argument(
        "--scope", action="append", choices=tokens.SCOPES, help="may be repeated (default: read)"
    )
    remove = _command(group, "remove", _remove_token, "Revoke an API token.")
    remove.add_argument("id")


def _list_tokens(_chosen: argparse.Namespace) -> int:
    with db.reading(_engine(_settings())) as connection:
        for row in tokens.page(connection, "", 1000):
            print(f"{row['id']}  {','.join(row['scopes']):<6}  {row['name']}")
    return 0


def _add_token(chosen: argparse.Namespace) -> int:
    row, token = db.as_writer(
        _engine(_settings()),
        lambda write: tokens.create(write.connection, chosen.name, chosen.scope or ["read"], utc_now()),
    )
    print(f"{row['id']}\ntoken: {token}")
    return 0


def _remove_token(chosen: argparse.Namespace) -> int:
    found = db.as_writer(_engine(_settings()), lambda write: tokens.remove(write.connection, chosen.id))
    return _done(found, f"{chosen.id} is revoked", chosen.id)


def _engine(values: Settings) -> Engine:
    """The store that is there.  (SQLite would make an empty one of any name.)"""
    engine = db.connect(values.database_url, values.sqlite_synchronous, pooler=values.database_pooler)
    if file := db.missing_file(engine):
        raise NoStore(
            f"there is no store {file}: run this where `buildrelay up` runs, or name its directory by "
            "BUILDRELAY_DATA_DIR; DATABASE_URL names another store"
        )
    return engine


def _engine_if_any(values: Settings) -> Engine | None:
    """The store, for what is only noted in it."""
    try:
        return _engine(values)
    except NoStore:
        return None


def _done(found: bool, said: str, id_: str) -> int:
    if not found:
        print(f"buildrelay: there is no {id_}", file=sys.stderr)
        return 1
    print(said)
    return 0
