"""The command `buildrelay`.  Exit codes: 0 done, 1 failed, 2 wrong use or setting."""

import argparse
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from webhook_app import VERSION, db, destinations, migrations, settings, subscribers, supervisor, tokens, up
from webhook_app.embedded import EmbeddedError
from webhook_app.settings import Settings, SettingsError
from webhook_app.times import iso, utc_now


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit."""
    chosen = _parser().parse_args(arguments)
    try:
        code = chosen.run(chosen)
    except (SettingsError, EmbeddedError) as error:
        print(f"buildrelay: {error}", file=sys.stderr)
        code = 2
    except db.StoreUnavailable as error:
        print(f"buildrelay: the database does not answer: {error}", file=sys.stderr)
        code = 1
    raise SystemExit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="buildrelay", description="Relay CI builds: pushes first, polling as the safety net."
    )
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_processes(commands)
    _add_subscribers(commands)
    _add_tokens(commands)
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
    started.add_argument("--data-dir", type=Path, help="where data and secrets live (default: ./data)")
    demo = _command(
        commands, "demo", _demo, "Run everything against simulated CI platforms and a subscriber."
    )
    demo.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    demo.add_argument(
        "--builds", type=int, help="stop after so many builds and say how it went (default: go on)"
    )
    demo.add_argument("--loss", type=float, default=0.1, help="share of pushes lost, doubled, reordered")
    demo.add_argument("--seed", type=int, default=1, help="another seed, other builds")
    demo.add_argument("--data-dir", type=Path, help="where data lives (default: a new temporary directory)")
    _command(commands, "migrate", _migrate, "Bring the database to the present schema.")
    _command(commands, "worker", _worker, "Run the workers (deliveries; polling).")
    _command(commands, "scheduler", _scheduler, "Run the scheduler.")


def _up(chosen: argparse.Namespace) -> int:
    supervisor.tie_to_starter()
    data_dir = chosen.data_dir or Path(os.environ.get("BUILDRELAY_DATA_DIR") or "data")
    return up.up(chosen.host, chosen.port, data_dir)


def _demo(chosen: argparse.Namespace) -> int:
    from webhook_app.simulated import demo

    return demo.run(chosen.port, chosen.builds, chosen.loss, chosen.seed, chosen.data_dir)


def _migrate(_chosen: argparse.Namespace) -> int:
    values = _settings()
    migrations.upgrade(db.connect(values.database_url, values.sqlite_synchronous))
    print("The database has the present schema.")
    return 0


def _worker(_chosen: argparse.Namespace) -> int:
    _settings()
    return supervisor.supervise(up.workers(_environment()))


def _scheduler(_chosen: argparse.Namespace) -> int:
    _settings()
    os.environ.update(_environment())
    runpy.run_module("jobs.schedule", run_name="__main__", alter_sys=True)
    return 0


def _environment() -> dict[str, str]:
    """Our environment, and under it the secrets that `up` made in the data directory."""
    data_dir = Path(os.environ.get("BUILDRELAY_DATA_DIR") or "data")
    return {**up.read_secrets(data_dir), **os.environ}


def _settings() -> Settings:
    return settings.load(_environment())


# ---- subscribers and tokens ------------------------------------------------------------------


def _add_subscribers(commands: Any) -> None:
    group = commands.add_parser("subscribers", help="Who gets webhooks.").add_subparsers(
        required=True, metavar="ACTION"
    )
    _command(group, "list", _list_subscribers, "List the subscribers.")
    add = _command(group, "add", _add_subscriber, "Register a callback URL; prints its secret, this once.")
    add.add_argument("url")
    for name in ("events", "sources", "repositories", "branches"):
        add.add_argument(f"--{name}", action="append", default=[], help="a glob; may be given more than once")
    add.add_argument("--description")
    add.add_argument("--unordered", action="store_true", help="do not keep each build's messages in order")
    add.add_argument("--signing", choices=["hmac", "ed25519"], default="hmac")
    for name, run, help_ in (
        ("remove", _remove_subscriber, "Delete a subscriber and its messages."),
        ("enable", _enable_subscriber, "Let a disabled subscriber get messages again."),
        ("rotate-secret", _rotate_secret, "Give a new secret; the old one signs as well for a while."),
    ):
        one = _command(group, name, run, help_)
        one.add_argument("id")
        if name == "rotate-secret":
            one.add_argument("--grace-seconds", type=int, default=subscribers.DEFAULT_GRACE_SECONDS)


def _list_subscribers(_chosen: argparse.Namespace) -> int:
    from sqlalchemy import select

    from webhook_app.models import subscribers as table

    with db.reading(_engine(_settings())) as connection:
        for row in connection.execute(select(table).order_by(table.c.created_at)).mappings():
            wants = ", ".join(row["events"]) or "everything"
            print(f"{row['id']}  {row['state']:<8}  {row['url']}  {wants}")
    return 0


def _add_subscriber(chosen: argparse.Namespace) -> int:
    values = _settings()
    try:
        destinations.check_callback_url(chosen.url, values.allow_private_callbacks)
    except destinations.OutboundError as error:
        print(f"buildrelay: {chosen.url}: {error}", file=sys.stderr)
        return 2
    wanted: Mapping[str, Any] = {
        "url": chosen.url,
        "events": chosen.events,
        "sources": chosen.sources,
        "repositories": chosen.repositories,
        "branches": chosen.branches,
        "description": chosen.description,
        "ordered": not chosen.unordered,
        "signing": chosen.signing,
    }
    row, secret = db.as_writer(
        _engine(values),
        lambda write: subscribers.create(write, wanted, values.encryption_keys, utc_now()),
    )
    print(f"{row['id']}\nsecret: {secret}")
    return 0


def _remove_subscriber(chosen: argparse.Namespace) -> int:
    found = db.as_writer(_engine(_settings()), lambda write: subscribers.remove(write, chosen.id))
    return _done(found, f"{chosen.id} is gone", chosen.id)


def _enable_subscriber(chosen: argparse.Namespace) -> int:
    values = _settings()
    fresh = {"state": "active", "disabled_reason": None, "failing_since": None, "failures": 0}
    found = db.as_writer(
        _engine(values),
        lambda write: subscribers.change(write, chosen.id, fresh, values.encryption_keys, utc_now()),
    )
    return _done(found, f"{chosen.id} is active", chosen.id)


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


def _add_tokens(commands: Any) -> None:
    group = commands.add_parser("tokens", help="API tokens.").add_subparsers(required=True, metavar="ACTION")
    _command(group, "list", _list_tokens, "List the API tokens.")
    add = _command(group, "add", _add_token, "Make an API token; prints it, this once.")
    add.add_argument("name")
    add.add_argument("--scope", choices=["read", "write", "admin"], default="read")
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
        lambda write: tokens.create(write.connection, chosen.name, [chosen.scope], utc_now()),
    )
    print(f"{row['id']}\ntoken: {token}")
    return 0


def _remove_token(chosen: argparse.Namespace) -> int:
    found = db.as_writer(_engine(_settings()), lambda write: tokens.remove(write.connection, chosen.id))
    return _done(found, f"{chosen.id} is revoked", chosen.id)


def _engine(values: Settings) -> Any:
    return db.connect(values.database_url, values.sqlite_synchronous)


def _done(found: bool, said: str, id_: str) -> int:
    if not found:
        print(f"buildrelay: there is no {id_}", file=sys.stderr)
        return 1
    print(said)
    return 0
