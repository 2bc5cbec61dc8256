"""The commands about subscribers, deliveries and keys, on a SQLite file."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import select

from tests import hub as hubs
from tests.caller import operations
from tests.facts import PACE, at, github
from webhook_app import (
    builds,
    cli,
    cli_subscribers,
    db,
    deliveries,
    endpoints,
    models,
    sealing,
    subscribers,
    tokens,
)
from webhook_app.deliveries import Tried
from webhook_app.lifecycle import State
from webhook_app.retries import RetryPolicy
from webhook_app.room import Room
from webhook_app.times import utc_now
from webhook_app.web import schemas

OLD, NEW = (Fernet.generate_key().decode() for _ in range(2))
SINCE = "2026-11-01T00:00:00Z"


class Box:
    """A store and the commands over it."""

    def __init__(self, engine, capsys):
        self.engine = engine
        self.capsys = capsys

    def __call__(self, *arguments, code=0):
        """Run a command; the lines it printed, or what it complained of."""
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        out, err = self.capsys.readouterr()
        assert ended.value.code == code, (arguments, out, err)
        return out.splitlines() if code == 0 else err.strip()

    def add(self, *more):
        id_, secret = self("subscribers", "add", "https://example.com/hook", *more)
        return id_, secret.removeprefix("secret: ")

    def row(self, id_):
        with db.reading(self.engine) as connection:
            return subscribers.get(connection, id_)

    def record(self, *facts, now=None):
        db.as_writer(self.engine, lambda write: builds.record(write, facts, now or utc_now(), PACE))

    def messages(self):
        with db.reading(self.engine) as connection:
            return connection.execute(select(models.messages).order_by(models.messages.c.id)).mappings().all()

    def bury(self):
        """Fail what is due, for good; the ids of the messages."""

        def unit(connection):
            now = utc_now()
            taken = deliveries.claim(connection, now, Room(50), 15).messages
            tried = [Tried(one, now, 0.1, 500, "http_500") for one in taken]
            deliveries.settle(connection, tried, now, RetryPolicy((), lambda: 0.5))
            return [one.message_id for one in taken]

        return db.in_transaction(self.engine, unit)


@pytest.fixture
def box(tmp_path, monkeypatch, capsys, migrated_sqlite):
    """A box whose Redis is away: commands say what they did all the same."""
    path = tmp_path / "buildrelay.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    for name in ("DASHBOARD_API_URL", "DASHBOARD_API_KEY", "DASHBOARD_API_FORMAT", "BUILDRELAY_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BUILDRELAY_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{path}")
    monkeypatch.setenv("REDIS_URL", f"unix://{tmp_path}/no.sock")
    monkeypatch.setenv("ENCRYPTION_KEYS", OLD)
    engine = db.connect(f"sqlite:///{path}")
    yield Box(engine, capsys)
    engine.dispose()
    sealing.forget()


def test_a_subscriber_is_added_with_format_and_filters(box):
    id_, secret = box.add(
        "--events", "build.*", "--branches", "main", "--format", "slack", "--state", "failed", "--state", "completed",
        "--conclusion", "failure", "--change", "broke", "--change", "fixed", "--unordered",
    )  # fmt: skip
    row = box.row(id_)
    assert (row["format"], row["states"], row["conclusions"], row["changes"], row["ordered"]) == (
        "slack", ["failed", "completed"], ["failure"], ["broke", "fixed"], False,
    )  # fmt: skip
    assert secret.startswith("whsec_")
    (line,) = box("subscribers", "list")
    assert line.startswith(id_)
    assert "build.*" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("--format", "html"), ("--state", "done"), ("--conclusion", "bad"), ("--change", "worse"),
    ],
)  # fmt: skip
def test_words_that_do_not_exist_are_refused(box, arguments):
    assert "invalid choice" in box("subscribers", "add", "https://example.com/", *arguments, code=2)
    refused = box("subscribers", "add", "https://example.com/", "--events", "build.complete", code=2)
    assert "did you mean build.completed?" in refused
    assert "https" in box("subscribers", "add", "http://example.com/", code=2)
    assert box("subscribers", "list") == []


EVERYTHING = (
    "--events", "build.*", "--events", "release.*", "--sources", "github", "--repositories", "octo/*",
    "--branches", "main", "--branches", "v*", "--state", "failed", "--conclusion", "failure", "--change", "broke",
    "--format", "slack", "--description", "for the team", "--rate-limit", "5", "--unordered",
    "--forks", "--header", "X-Team=a=b", "--header", "Authorization=Bearer hush",
)  # fmt: skip
CHOSEN = {
    "events": ["build.*", "release.*"], "sources": ["github"], "repositories": ["octo/*"],
    "branches": ["main", "v*"], "states": ["failed"], "conclusions": ["failure"], "changes": ["broke"],
    "format": "slack", "description": "for the team", "rate_limit_per_second": 5, "ordered": False,
    "forks": True,
}  # fmt: skip
HEADERS = {"X-Team": "a=b", "Authorization": "Bearer hush"}


def chosen_of(row):
    return {name: row[name] for name in CHOSEN}


@pytest.mark.parametrize("how", ["add", "change"])
def test_all_that_the_api_takes_is_chosen_on_the_command_line(box, how):
    id_, _ = box.add(*(EVERYTHING if how == "add" else ("--signing", "ed25519")))
    if how == "change":
        assert box("subscribers", "change", id_, *EVERYTHING) == [f"{id_} is changed"]
    row = box.row(id_)
    assert chosen_of(row) == CHOSEN
    assert subscribers.custom_headers(row, (OLD,)) == HEADERS


def test_the_options_are_the_fields_of_the_api():
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    cli_subscribers.add_options(parser, changing=True)
    given = parser.parse_args([*EVERYTHING, "https://example.com/"])
    assert set(schemas.SubscriberChange().fields) == set(cli_subscribers.fields(given))


def test_a_change_leaves_what_is_not_named_and_clears_what_it_is_told(box):
    id_, _ = box.add(*EVERYTHING)
    spoilt = {"failures": 7, "failing_since": at(0)}
    db.as_writer(box.engine, lambda write: subscribers.change(write, id_, spoilt, (), at(0)))
    box("subscribers", "change", id_, "--description", "another", "--ordered", "--no-forks")
    assert chosen_of(box.row(id_)) == CHOSEN | {"description": "another", "ordered": True, "forks": False}
    box(
        "subscribers",
        "change",
        id_,
        "--clear",
        "events",
        "--clear",
        "headers",
        "--clear",
        "rate_limit_per_second",
    )
    row = box.row(id_)
    assert (row["events"], row["rate_limit_per_second"], row["failures"]) == ([], None, 7)
    assert subscribers.custom_headers(row, (OLD,)) == {}
    box("subscribers", "change", id_, "--url", "https://example.org/other")
    assert subscribers.callback_url(box.row(id_), (OLD,)) == "https://example.org/other"
    assert box.row(id_)["failures"] == 0
    (line,) = box("subscribers", "list")
    assert "https://example.org/ …ther" in line
    assert "url: https://example.org/other" in box("subscribers", "show", id_)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing is named"),
        (("--url", "http://example.com/"), "https"),
        (("--events", "build.complete"), "did you mean build.completed?"),
        (("--branches", ""), "1 to 255 characters"),
        (("--branches", "x" * 256), "1 to 255 characters"),
        (("--branches", "\udcff"), "1 to 255 characters"),
        (("--branches", "x") * 101, "at most 100"),
        (("--rate-limit", "0"), "a number from 1 to 10000"),
        (("--rate-limit", "many"), "a number from 1 to 10000"),
        (("--header", "X-Team"), "NAME=VALUE is needed"),
        (("--header", "Host=x"), "the header Host is set by BuildRelay or by HTTP itself"),
        (("--header", "X-A=1", "--header", "X-A=2"), "given twice"),
        (
            (
                "--header",
                "X-A=hush\nX-B: 2",
            ),
            "X-A",
        ),
        (("--clear", "url"), "invalid choice"),
        (("--clear", "events", "--events", "build.*"), "it is set as well"),
        (("--ordered", "--unordered"), "not allowed with"),
    ],
)
def test_a_change_that_can_not_be_is_refused(box, arguments, said):
    id_, _ = box.add()
    before = box.row(id_)
    told = box("subscribers", "change", id_, *arguments, code=2)
    assert said in told
    assert "hush" not in told
    assert box.row(id_) == before


def test_headers_do_not_move_to_another_origin(box):
    id_, _ = box.add("--header", "Authorization=hush")
    assert box("subscribers", "change", id_, "--url", "https://example.com/other") == [f"{id_} is changed"]
    assert subscribers.custom_headers(box.row(id_), (OLD,)) == {"Authorization": "hush"}
    (told,) = box("subscribers", "change", id_, "--url", "https://example.org/hook")
    assert "its headers are gone" in told
    assert subscribers.custom_headers(box.row(id_), (OLD,)) == {}
    assert json.loads("\n".join(box("subscribers", "show", id_, "--json")))["headers"] == {}
    anew = ("--url", "https://example.net/hook", "--header", "X-New=1")
    assert box("subscribers", "change", id_, *anew) == [f"{id_} is changed"]
    assert subscribers.custom_headers(box.row(id_), (OLD,)) == {"X-New": "1"}


def test_what_is_not_there_can_not_be_shown_or_changed(box):
    assert "there is no sub_none" in box("subscribers", "show", "sub_none", code=1)
    assert "there is no sub_none" in box("subscribers", "change", "sub_none", "--ordered", code=1)
    assert "there is no msg_none" in box("deliveries", "show", "msg_none", code=1)


def test_a_subscriber_is_shown_without_its_secrets(box):
    id_, secret = box.add(*EVERYTHING)
    box.record(github(State.FAILED))
    lines = box("subscribers", "show", id_)
    for line in ("events: build.*, release.*", "ordered: no", "rate_limit_per_second: 5", "state: active"):
        assert line in lines
    assert "  Authorization: ***" in lines
    assert "  tries: 0" in lines
    assert "hush" not in str(lines)
    assert secret not in str(lines)
    (shown,) = [json.loads("\n".join(box("subscribers", "show", id_, "--json")))]
    assert {name: shown[name] for name in CHOSEN} == CHOSEN
    assert shown["headers"] == {"X-Team": "***", "Authorization": "***"}
    assert set(shown) == set(schemas.SubscriberWithHealth().fields)


def test_a_delivery_is_shown_with_its_attempts(box):
    id_, _ = box.add()
    box.record(github(State.FAILED))
    (message_id,) = box.bury()
    evil = "no\x1b]0;title\x07\nsecond line"
    with box.engine.begin() as connection:
        connection.execute(models.delivery_attempts.update().values(response=evil, note="the body was cut"))
    lines = box("deliveries", "show", message_id)
    for line in (
        f"id: {message_id}", f"subscriber_id: {id_}", "type: build.failed", "state: dead", "reason: http_500",
        "build_id: github:Octo:Repo:1", "attempts 1:", "  number: 1", "  status_code: 500", "  reason: http_500",
        "  duration_seconds: 0.1", "  note: the body was cut", "  response: no\\x1b]0;title\\x07\\nsecond line",
    ):  # fmt: skip
        assert line in lines
    shown = json.loads("\n".join(box("deliveries", "show", message_id, "--json")))
    assert (shown["attempts"][0]["response"], shown["attempts"][0]["note"]) == (evil, "the body was cut")
    assert set(shown) == set(schemas.DeliveryWithAttempts().fields)
    assert set(shown["attempts"][0]) == set(schemas.DeliveryAttempt().fields)


COMMAND_OF = {
    "list_subscribers": "subscribers list", "create_subscriber": "subscribers add",
    "get_subscriber": "subscribers show", "change_subscriber": "subscribers change",
    "delete_subscriber": "subscribers remove", "enable_subscriber": "subscribers enable",
    "rotate_secret": "subscribers rotate-secret", "send_test_event": "subscribers test",
    "replay_events": "subscribers replay", "list_deliveries": "deliveries list",
    "list_dead_letters": "deliveries list", "redrive_deliveries": "deliveries redrive",
    "get_delivery": "deliveries show", "retry_delivery": "deliveries retry", "list_tokens": "tokens list",
    "create_token": "tokens add", "delete_token": "tokens remove",
}  # fmt: skip


def test_each_operation_on_subscribers_deliveries_and_tokens_has_a_command(local, capsys):
    about = re.compile(r"/api/(subscribers|deliveries|tokens)\b")
    found = {operation["operationId"] for _, path, operation in operations(local) if about.match(path)}
    assert found == set(COMMAND_OF)
    for command in COMMAND_OF.values():
        with pytest.raises(SystemExit) as ended:
            cli.main([*command.split(), "--help"])
        assert ended.value.code == 0, command
    capsys.readouterr()


def test_dead_deliveries_are_listed_by_reason(box):
    id_, _ = box.add()
    box.record(github(State.FAILED))
    (message_id,) = box.bury()
    for more in ((), ("--subscriber", id_)):
        (line, *_) = box("deliveries", "list", "--reason", "http_500", *more)
        assert line.startswith(message_id)
        assert not any("msg_" in line for line in box("deliveries", "list", "--reason", "timeout", *more))
    assert "only dead ones" in box(
        "deliveries", "list", "--subscriber", id_, "--state", "pending", "--reason", "timeout", code=2
    )


def test_a_token_may_have_several_scopes(box):
    box("tokens", "add", "both", "--scope", "write", "--scope", "read")
    box("tokens", "add", "one")
    assert [line.split()[1:] for line in sorted(box("tokens", "list"), key=lambda line: line.split()[-1])] == [
        ["read,write", "both"], ["read", "one"],
    ]  # fmt: skip


def test_what_the_settings_say_of_a_subscriber_is_not_changed_by_hand(box, monkeypatch):
    monkeypatch.setenv("DASHBOARD_API_URL", "http://dashboard.internal:8080/hook")
    box("migrate")
    for more in (("--url", "https://example.com/"), ("--format", "slack"), ("--clear", "headers")):
        assert "DASHBOARD_API_URL" in box("subscribers", "change", "sub_dashboard", *more, code=2)
    box("subscribers", "change", "sub_dashboard", "--branches", "main")
    assert box.row("sub_dashboard")["branches"] == ["main"]


def test_a_replay_is_counted_and_made(box):
    for state in (State.QUEUED, State.IN_PROGRESS):
        box.record(github(state), now=at(0))
    id_, _ = box.add()
    assert box("subscribers", "replay", id_, "--since", SINCE, "--dry-run") == ["2 would be sent"]
    assert box.messages() == []
    assert box("subscribers", "replay", id_, "--since", SINCE, "--until", "2026-11-01T00:00:01Z") == [
        "0 are on their way"
    ]
    assert box("subscribers", "replay", id_, "--since", SINCE, "--only", "missing") == ["2 are on their way"]
    assert [row["sequence"] for row in box.messages()] == [1, 2]
    assert "zone" in box("subscribers", "replay", id_, "--since", "yesterday", code=2)
    assert "there is no" in box("subscribers", "replay", "sub_none", "--since", SINCE, code=1)


def test_a_disabled_subscriber_is_enabled_with_a_clean_record(box):
    id_, _ = box.add()
    db.as_writer(box.engine, lambda write: endpoints.disable(write, id_, "in this test", utc_now()))
    for command in (("subscribers", "replay", id_, "--since", SINCE), ("subscribers", "test", id_)):
        assert "enable it first" in box(*command, code=1)
    spoilt = {"on_probation": True, "warned_percent": 90, "slow_until": at(0)}
    db.as_writer(box.engine, lambda write: subscribers.change(write, id_, spoilt, (), at(0)))
    assert box("subscribers", "enable", id_) == [f"{id_} is active"]
    row = box.row(id_)
    assert {name: row[name] for name in subscribers.CLEAN_RECORD} == subscribers.CLEAN_RECORD
    assert "there is no sub_none" in box("subscribers", "enable", "sub_none", code=1)


def test_a_test_without_a_worker_says_that_it_waits(box):
    id_, _ = box.add("--events", "release.*")
    box("subscribers", "test", id_, code=1)
    (message,) = box.messages()
    assert (message["state"], message["subscriber"]) == ("pending", id_)
    assert "there is no" in box("subscribers", "test", "sub_none", code=1)


def test_a_test_shows_the_answer(box, monkeypatch):
    id_, _ = box.add()
    answer = endpoints.Answer("delivered", 200, None, "thank you")
    monkeypatch.setattr(endpoints, "await_answer", lambda *_: answer)
    line, response = box("subscribers", "test", id_)
    assert re.fullmatch(r"msg_\w+  delivered  200  -", line)
    assert response == "thank you"


def test_dead_deliveries_are_listed_retried_and_redriven(box):
    one, _ = box.add("--unordered")
    two, _ = box.add("--unordered")
    box.record(github(State.COMPLETED, run=1), github(State.COMPLETED, run=2))
    assert len(box.bury()) == 4
    *lines, total = box("deliveries", "list")
    assert total == "4 dead http_500=4"
    assert all("dead" in line and "build.completed" in line and "http_500" in line for line in lines)
    mine = box("deliveries", "list", "--subscriber", one, "--state", "dead")
    assert len(mine) == 2
    assert all(one in line for line in mine)
    assert box("deliveries", "list", "--subscriber", one, "--state", "pending") == []
    message_id = mine[0].split()[0]
    assert box("deliveries", "retry", message_id) == [f"{message_id} is on its way"]
    assert [row["message_id"] for row in box.messages() if row["state"] == "pending"] == [message_id]
    assert box("deliveries", "redrive", "--reason", "timeout") == ["0 are on their way"]
    assert box("deliveries", "redrive", "--subscriber", one) == ["1 are on their way"]
    assert box("deliveries", "redrive") == ["2 are on their way"]
    assert box("deliveries", "list") == ["0 dead"]
    assert {row["subscriber"] for row in box.messages() if row["state"] == "pending"} == {one, two}


def test_what_can_not_be_sent_again_is_said(box):
    id_, _ = box.add()
    box.record(github(State.COMPLETED))
    (message_id,) = box.bury()
    db.as_writer(box.engine, lambda write: endpoints.disable(write, id_, "in this test", utc_now()))
    assert "disabled" in box("deliveries", "retry", message_id, code=1)
    assert "disabled" in box("deliveries", "redrive", "--subscriber", id_, code=1)
    assert "there is no msg_none" in box("deliveries", "retry", "msg_none", code=1)
    assert "only dead ones" in box("deliveries", "list", "--state", "pending", code=2)


# ---- keys ------------------------------------------------------------------------------------


def test_rekey_seals_all_with_the_newest_key_and_then_nothing(box, monkeypatch):
    monkeypatch.setattr(subscribers, "REKEY_PORTION", 2)
    made = dict(box.add() for _ in range(5))
    box.add("--signing", "ed25519")
    assert box("rekey") == ["0 sealed with the newest key"]
    monkeypatch.setenv("ENCRYPTION_KEYS", f"{NEW},{OLD}")
    assert box("rekey") == ["18 sealed with the newest key"]
    assert box("rekey") == ["0 sealed with the newest key"]
    sealing.forget()
    for id_, secret in made.items():
        row = box.row(id_)
        assert subscribers.live_secrets(row, (NEW,), utc_now()) == (secret,)
        assert subscribers.custom_headers(row, (NEW,)) == {}


def test_rekey_names_what_no_key_opens_and_does_the_rest(box, monkeypatch):
    lost, _ = box.add()
    monkeypatch.setenv("ENCRYPTION_KEYS", NEW)
    kept, secret = box.add()
    newest = Fernet.generate_key().decode()
    monkeypatch.setenv("ENCRYPTION_KEYS", f"{newest},{NEW}")
    assert lost in box("rekey", code=1)
    assert subscribers.live_secrets(box.row(kept), (newest,), utc_now()) == (secret,)
    assert subscribers.live_secrets(box.row(lost), (OLD,), utc_now())


def test_one_more_than_the_most_is_refused(box, monkeypatch):
    monkeypatch.setenv("MAX_SUBSCRIBERS", "1")
    box.add()
    assert "MAX_SUBSCRIBERS allows 1" in box("subscribers", "add", "https://example.com/", code=2)


def test_without_a_key_nothing_is_stored_and_one_line_says_so(box, monkeypatch):
    monkeypatch.setenv("ENCRYPTION_KEYS", "")
    told = box("subscribers", "add", "https://example.com/", code=2)
    assert told.startswith("buildrelay: ENCRYPTION_KEYS is empty")
    assert box("subscribers", "list") == []


# ---- the subscriber of the settings ----------------------------------------------------------


def test_migrate_makes_the_subscriber_of_the_settings(box, monkeypatch):
    monkeypatch.setenv("DASHBOARD_API_URL", "http://dashboard.internal:8080/hook/")
    monkeypatch.setenv("DASHBOARD_API_KEY", "very-secret")
    for _ in range(2):
        box("migrate")
    row = box.row("sub_dashboard")
    assert (subscribers.callback_url(row, (OLD,)), row["origin"]) == (
        "http://dashboard.internal:8080/hook/",
        "settings",
    )
    assert subscribers.custom_headers(row, (OLD,)) == {"Authorization": "Bearer very-secret"}
    assert row["format"] == "standard"
    monkeypatch.setenv("DASHBOARD_API_URL", "http://dashboard.internal:8080")
    box("migrate")
    assert box.row("sub_dashboard")["format"] == "provider"
    monkeypatch.setenv("DASHBOARD_API_FORMAT", "standard")
    box("migrate")
    assert box.row("sub_dashboard")["format"] == "standard"
    assert "DASHBOARD_API_URL" in box("subscribers", "remove", "sub_dashboard", code=2)
    monkeypatch.delenv("DASHBOARD_API_URL")
    box("migrate")
    assert box("subscribers", "list") == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DASHBOARD_API_URL", "ftp://dashboard.example/"), ("DASHBOARD_API_URL", "https://user:pw@example.com/"),
        ("DASHBOARD_API_URL", "https://169.254.169.254/"), ("DASHBOARD_API_KEY", "two\nlines"),
    ],
)  # fmt: skip
def test_a_target_that_can_not_be_used_stops_the_start(box, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    told = box("migrate", code=2)
    assert told.startswith(f"buildrelay: {name}=")
    assert "lines" not in told


@pytest.mark.parametrize(
    ("given", "arguments", "said"),
    [
        ({"DATABASE_URL": "postgresql://u:sekret@127.0.0.1:1/x"}, [], "the database does not answer: "),
        ({}, ["--data-dir", "/proc/x"], "/proc/x can't be used as data directory: "),
        ({}, ["--data-dir", "/etc/passwd"], "/etc/passwd can't be used as data directory: "),
        ({}, ["--host", ""], "--host: an address is needed"),
        ({}, ["--port", "0"], "PORT='0': a whole number from 1 to 65535 is needed"),
        ({"DATABASE_URL": "postgres://u:sekret@h:port/x"}, [], "DATABASE_URL=(secret): a URL "),
        ({}, ["--port", "{used}"], "can't listen on 127.0.0.1 port {used}: Address already in use"),
    ],
)
def test_up_says_in_one_line_why_it_can_not_start(tmp_path, given, arguments, said):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        env = hubs.clean_environment({"BUILDRELAY_DATA_DIR": str(tmp_path), **given})
        command = [sys.executable, "-m", "webhook_app", "up", "--port", str(hubs.free_port())]
        command += [word.format(used=port) for word in arguments]
        made = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert made.returncode != 0
    assert made.stderr.startswith("buildrelay: " + said.format(used=port))
    assert made.stderr.count("\n") == 1
    assert "sekret" not in made.stderr + made.stdout


@pytest.mark.parametrize("config", [[], ["--config", "python:webhook_app.gunicorn_conf"]])
def test_gunicorn_says_in_one_line_which_setting_is_wrong(tmp_path, config):
    env = hubs.clean_environment(
        {"BUILDRELAY_DATA_DIR": str(tmp_path), "PORT": str(hubs.free_port()), "GITLAB_URL": "nonsense"}
    )
    command = [sys.executable, "-m", "gunicorn", "--log-level", "critical", *config, "wsgi:app"]
    made = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    (line,) = made.stderr.strip().splitlines()
    assert made.returncode != 0
    assert line.endswith(": GITLAB_URL='nonsense': a URL that begins with http:// or https:// is needed")


COMMANDS = [
    ("subscribers", "show", "sub_1"), ("subscribers", "change", "sub_1", "--ordered"), ("deliveries", "show", "1"),
    ("subscribers", "list"), ("subscribers", "add", "https://example.com/"), ("subscribers", "test", "sub_1"),
    ("subscribers", "remove", "sub_1"), ("subscribers", "rotate-secret", "sub_1"),
    ("subscribers", "replay", "sub_1", "--since", SINCE), ("deliveries", "list"), ("deliveries", "retry", "1"),
    ("deliveries", "redrive"), ("tokens", "list"), ("tokens", "add", "me"), ("sources", "list"), ("rekey",),
]  # fmt: skip


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_command_away_from_its_store_says_where_to_run_it_and_makes_none(
    tmp_path, monkeypatch, capsys, arguments
):
    monkeypatch.setenv("BUILDRELAY_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ENCRYPTION_KEYS", OLD)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    box = Box(None, capsys)
    said = box(*arguments, code=2)
    assert said.startswith(f"buildrelay: there is no store {tmp_path / 'buildrelay.db'}: ")
    assert "BUILDRELAY_DATA_DIR" in said
    assert list(tmp_path.iterdir()) == []


def test_a_command_on_a_store_without_tables_names_what_makes_them(database_url):
    engine = db.connect(database_url)
    engine.connect().close()  # SQLite: an empty file
    engine.dispose()
    command = [sys.executable, "-m", "webhook_app", "tokens", "list"]
    env = hubs.clean_environment({"DATABASE_URL": database_url})
    made = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert made.returncode == 1
    assert re.fullmatch(
        r"buildrelay: the schema is not current \(.*\): run `buildrelay migrate`\n", made.stderr
    )


def test_a_reader_that_has_enough_gets_no_trace(box):
    db.as_writer(
        box.engine,
        lambda write: [tokens.create(write.connection, "x" * 250, ["read"], utc_now()) for _ in range(900)],
    )
    made = subprocess.run(
        f"{sys.executable} -m webhook_app tokens list | head -n 1",
        shell=True, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert made.stdout.endswith("x" * 250 + "\n")
    assert made.stderr == ""


@pytest.mark.parametrize("most", ["0", "-1", "100001", "x"])
def test_a_list_has_a_length(box, most):
    assert "a number from 1 to 100000" in box("deliveries", "list", "--most", most, code=2)


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "x" * 256])
def test_a_token_has_a_name_that_fits_on_a_line(box, name):
    assert "1 to 255 characters on one line" in box("tokens", "add", name, code=2)
    assert box("tokens", "list") == []


def test_the_demo_refuses_numbers_that_make_no_sense():
    for words in (["--builds", "0"], ["--builds", "-1"], ["--loss", "1.1"], ["--loss", "-0.1"]):
        command = [sys.executable, "-m", "webhook_app", "demo", *words]
        made = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert (made.returncode, made.stderr.count("\n")) == (2, 1), made.stderr


def test_ctrl_c_during_a_command_is_no_fault(box):
    id_, _ = box.add()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = {"REDIS_URL": f"redis://127.0.0.1:{silent.getsockname()[1]}"}
        command = hubs.tied([sys.executable, "-m", "webhook_app", "subscribers", "test", id_])
        with subprocess.Popen(
            command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            ringing, _ = silent.accept()
            with ringing:  # and no answer
                process.send_signal(signal.SIGINT)
                said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")


def test_a_source_is_named_in_any_case(box):
    said = box("sources", "connect", "JENKINS", "web", "--url", "https://relay.example.com")
    assert any(line.endswith("https://relay.example.com/webhooks/jenkins") for line in said)
    assert "there is no source hudson" in box("sources", "connect", "hudson", "web", code=2)
