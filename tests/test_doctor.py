"""`buildrelay doctor`: what is well, what is not and the mend; whatever is down, it ends and says so."""

import json
import socket
import time
from datetime import timedelta

import pytest
from rq import SimpleWorker

from jobs.schedule import Metronome
from tests.facts import PACE, github
from tests.hub import clean_environment, free_port
from tests.stand import ON_SQLITE
from webhook_app import builds, cli, db, doctor, health, models, queues, registration, settings, subscribers
from webhook_app.account import Account
from webhook_app.lifecycle import State
from webhook_app.simulated.github import GitHubServer, html, rate_limited
from webhook_app.simulated.github_access import App
from webhook_app.simulated.gitlab import GitLabServer
from webhook_app.simulated.httpd import Response, dropped, hang
from webhook_app.simulated.jenkins import JenkinsServer
from webhook_app.simulated.world import World
from webhook_app.times import utc_now

URL = "http://127.0.0.1:9"
KEY = "6KzrPJkFqQKBsWIBmuZFyOAlbWg3yFuQTqHdxZ8m3mI="
OTHER_KEY = "nAw3SUMLlfUzXKSEZRJXnbWTgqCQFdvWKeuhv3QuUvU="
HOOKED = {"github": "Octo-Demo/payments-api", "gitlab": "4101"}


@pytest.fixture
def clinic(store_url, redis_url, redis_client, tmp_path, monkeypatch, capsys):
    """Real servers for everything the doctor looks at; `clinic(**variables)` examines, `clinic.run` is the command."""
    world = World(7, 0)
    with GitHubServer(world) as hub, GitLabServer(world) as lab, JenkinsServer(world) as jenkins:
        made = Clinic(store_url, redis_url, redis_client, tmp_path, hub, lab, jenkins, monkeypatch, capsys)
        yield made
        made.engine.dispose()


class Clinic:
    def __init__(self, store_url, redis_url, redis, tmp_path, hub, lab, jenkins, monkeypatch, capsys):
        self.servers = {"github": hub, "gitlab": lab, "jenkins": jenkins}
        self.redis, self.monkeypatch, self.capsys = redis, monkeypatch, capsys
        self.env = {
            "DATABASE_URL": store_url.replace("postgresql+psycopg", "postgres"), "REDIS_URL": redis_url,
            "BUILDRELAY_DATA_DIR": str(tmp_path), "ENCRYPTION_KEYS": KEY, "ADMIN_TOKEN": "admin-token-of-the-tests",
            "PUBLIC_URL": URL, "GITHUB_API_URL": hub.url, "GITHUB_TOKEN": hub.tokens[0],
            "GITHUB_REPOS": HOOKED["github"], "GITHUB_WEBHOOK_SECRET": "hush-hush-hush-hush", "GITLAB_URL": lab.url,
            "GITLAB_TOKEN": lab.tokens[0], "GITLAB_PROJECTS": HOOKED["gitlab"],
            "GITLAB_WEBHOOK_SECRET": "hush-lab-hush-lab", "JENKINS_WEBHOOK_SECRET": "hush-j-hush-j-hush-j", "JENKINS_URL": jenkins.url,
            "JENKINS_USERNAME": jenkins.username, "JENKINS_API_TOKEN": jenkins.api_token,
        }  # fmt: skip
        self.engine = db.connect(store_url)
        for name, repository in HOOKED.items():
            source = self.values().sources[name]
            made = registration.connect(Account(source, None), repository, registration.Address(name, URL))
            assert made.action == "created"
        for hook in hub.hooks.hooks:
            hook.last_status = 202  # the ping found nobody here

    def values(self, **more):
        return settings.load(self.env | more)

    def __call__(self, seconds=20.0, **more):
        """Findings that are not ok, as `check: what`."""
        found = doctor.examine(self.values(**more), seconds)
        assert all(finding.mend for finding in found if finding.level != "ok" and "time" not in finding.what)
        return {(one.level, f"{one.check}: {one.what}") for one in found if one.level != "ok"}

    def run(self, *words, **more):
        for name, value in clean_environment(self.env | more).items():
            self.monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            cli.main(["doctor", *words])
        return ended.value.code, self.capsys.readouterr().out

    def serve(self):
        """A scheduler has beaten, a worker serves every queue, pushes come."""
        Metronome(self.redis, ()).beat()
        worker = SimpleWorker(list(queues.JOBS), connection=self.redis)
        worker.register_birth()
        now = utc_now()
        pushes = [
            github(State.QUEUED, source=name, key=f"{name}:1", build_id=f"{name}:1", group=None)
            for name in self.servers
        ]
        db.as_writer(self.engine, lambda write: builds.record(write, pushes, now, PACE))


def has(findings, level, text):
    return any(found == level and text in what for found, what in findings)


def test_a_healthy_relay_has_no_complaint(clinic):
    clinic.serve()
    assert clinic() == set()
    code, out = clinic.run()
    assert code == 0
    assert "FAIL" not in out
    assert "hush-hush-hush-hush" not in out
    code, out = clinic.run("--json")
    report = json.loads(out)
    assert (code, report["ok"]) == (0, True)
    assert {"check", "level", "what", "mend"} == set(report["checks"][0])


@pytest.mark.parametrize("installed", [True, False])
def test_a_token_that_is_lent_is_looked_at_like_any_other(clinic, installed):
    app, hub = App.create(), clinic.servers["github"]
    hub.app = hub.access.app = app if installed else None
    lender = {"GITHUB_TOKEN": "", "GITHUB_APP_ID": "4711", "GITHUB_APP_PRIVATE_KEY": app.private_key}
    clinic.serve()
    findings = clinic(**lender)
    if installed:
        assert findings == set()
    else:
        assert findings == {("fail", "github: no token is lent: unauthorized: HTTP 401: Bad credentials")}


def test_what_is_not_running_is_named(clinic):
    found = clinic()
    assert has(found, "fail", "no scheduler is running")
    assert {what for level, what in found if "no worker" in what} == {
        f"workers: no worker serves {bell}" for bell in queues.JOBS
    }
    code, out = clinic.run("--json")
    assert (code, json.loads(out)["ok"]) == (1, False)


@ON_SQLITE
def test_an_address_without_tls_is_a_warning(clinic):
    assert has(clinic(PUBLIC_URL="http://relay.example.com"), "warn", "pushes travel unencrypted")


@ON_SQLITE
def test_missing_secrets_are_named(clinic):
    found = clinic(ENCRYPTION_KEYS="", ADMIN_TOKEN="", GITHUB_WEBHOOK_SECRET="")
    assert has(found, "fail", "no encryption key")
    assert has(found, "warn", "no ADMIN_TOKEN")
    assert has(found, "warn", "github: no webhook secret")


@ON_SQLITE
def test_secrets_that_a_comma_separates_are_counted(clinic):
    secrets = "a secret of the hook, which is of its own making"
    said = "2 webhook secrets are accepted (a comma separates them)"
    assert said in clinic.run(GITHUB_WEBHOOK_SECRET=secrets)[1]
    assert said not in clinic.run()[1]


@ON_SQLITE
def test_secrets_that_open_with_no_key_are_named(clinic):
    wanted = {"url": "https://ci.example.com/", "signing": "hmac"}
    row, _ = db.as_writer(clinic.engine, lambda write: subscribers.create(write, wanted, (KEY,), utc_now()))
    said = f"database: the secrets of {row['id']} open with none of ENCRYPTION_KEYS (subscribers: 1)"
    assert not has(clinic(), "fail", said)
    assert has(clinic(ENCRYPTION_KEYS=OTHER_KEY), "fail", said)
    assert not has(clinic(ENCRYPTION_KEYS=f"{OTHER_KEY},{KEY}"), "fail", said)


@ON_SQLITE
def test_everything_down_is_said_and_nothing_crashes(clinic):
    for server in clinic.servers.values():
        server.close()
    away = {"DATABASE_URL": f"postgres://127.0.0.1:{free_port()}/none", "REDIS_URL": "redis://127.0.0.1:9/0"}
    found = clinic(**away)
    assert has(found, "fail", "the database does not answer")
    assert has(found, "fail", "Redis does not answer")
    for name in clinic.servers:
        assert has(found, "fail", f"{name}: the API: unavailable: connect")
    code, _ = clinic.run(**away)
    assert code == 1


@ON_SQLITE
def test_a_store_that_was_not_migrated_is_said(clinic, tmp_path):
    (tmp_path / "new.db").touch()
    assert has(clinic(DATABASE_URL=f"sqlite:///{tmp_path}/new.db"), "fail", "the schema is not current")


@ON_SQLITE
def test_a_store_that_is_not_there_is_said_and_not_made(clinic, tmp_path):
    clinic.servers["github"].close()
    found = clinic(DATABASE_URL=f"sqlite:///{tmp_path}/no.db")
    assert has(found, "fail", "there is no file")
    assert has(found, "fail", "github: the API: unavailable: connect"), "the platforms are asked nevertheless"
    assert not (tmp_path / "no.db").exists()


@ON_SQLITE
def test_what_hangs_is_given_up_and_the_others_are_told(clinic):
    clinic.servers["github"].inject(hang())
    found = clinic(seconds=5.0)
    assert has(found, "fail", "github: did not answer in time")
    assert not any("gitlab: did not" in what for _, what in found)


@ON_SQLITE
def test_a_database_that_says_nothing_is_given_up(clinic):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        found = clinic(seconds=2.0, DATABASE_URL=f"postgres://127.0.0.1:{port}/x")
    assert has(found, "fail", "database: did not answer in time")


@ON_SQLITE
@pytest.mark.parametrize(
    ("answer", "level", "text"),
    [
        (Response(401, b"{}"), "fail", "unauthorized"),
        (html(), "fail", "unreadable"),
        (Response(502), "fail", "unavailable"),
        (dropped(), "fail", "unavailable"),
        (rate_limited(time.time() + 60), "warn", "rate_limited"),
    ],
)
@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_each_fault_of_an_api_has_its_line(clinic, platform, answer, level, text):
    clinic.servers[platform].inject(answer)
    assert has(clinic(), level, f"{platform}: the API: {text}")


@ON_SQLITE
@pytest.mark.parametrize("answer", [Response(401, b"{}"), html(), Response(502), dropped()])
def test_an_api_that_nobody_set_up_fails_nothing(clinic, answer):
    clinic.serve()
    clinic.servers["github"].inject(answer)
    alone = {"GITHUB_TOKEN": "", "GITHUB_REPOS": ""}
    code, out = clinic.run(**alone)
    assert code == 0, out
    assert "warn  github: the API: " in out
    assert "github: no token" in out


@ON_SQLITE
def test_a_source_without_token_and_repositories_that_nobody_uses_is_not_set_up(clinic):
    clinic.servers["github"].close()
    alone = {"GITHUB_TOKEN": "", "GITHUB_REPOS": "", "GITHUB_WEBHOOK_SECRET": ""}
    _, out = clinic.run(**alone)
    assert "ok    github: not set up (no webhook secret, no token, no repositories)" in out


@ON_SQLITE
@pytest.mark.parametrize(("skew", "words"), [(-90, "90 s ahead of"), (90, "90 s behind"), (50, "")])
def test_a_clock_that_is_off_is_a_warning(clinic, skew, words):
    clinic.servers["github"].date_skew_seconds = skew
    found = clinic()
    told = [what for level, what in found if level == "warn" and what.startswith("github: our clock is")]
    assert len(told) == bool(words)
    assert all(abs(int(what.split()[4]) - 90) <= 20 and words.split(" ", 2)[2] in what for what in told)


@ON_SQLITE
def test_tokens_that_end_soon_or_may_too_little(clinic):
    lab = clinic.servers["gitlab"]
    lab.token_expires_on = f"{utc_now() + timedelta(days=5):%Y-%m-%d}"
    assert has(clinic(), "warn", "gitlab: the token expires on")
    lab.token_expires_on = f"{utc_now() - timedelta(days=1):%Y-%m-%d}"
    assert has(clinic(), "fail", "gitlab: the token expired on")
    lab.token_expires_on, lab.scopes = None, ["read_user"]
    assert has(clinic(), "fail", "gitlab: the token has the scopes read_user")


@ON_SQLITE
def test_a_repository_that_can_not_be_read(clinic):
    found = clinic(GITHUB_REPOS="octo/none", GITLAB_PROJECTS="99")
    assert has(found, "fail", "github octo/none: its builds can't be read: not_found")
    assert has(found, "fail", "gitlab 99: its builds can't be read: not_found")


def change(**values):
    return lambda hook: [setattr(hook, name, value) for name, value in values.items()]


@ON_SQLITE
@pytest.mark.parametrize(
    ("platform", "spoil", "level", "text"),
    [
        ("github", change(active=False), "fail", "it is switched off"),
        ("github", change(events=("workflow_run",)), "fail", "it does not send workflow_job"),
        ("github", lambda hook: hook.config.pop("secret"), "fail", "it has no secret"),
        ("github", change(last_status=401), "fail", "its secret is not ours"),
        ("github", change(last_status=503), "warn", "its last delivery failed (HTTP 503)"),
        ("github", change(last_status=0), "warn", "its last delivery failed (HTTP none)"),
        ("github", lambda hook: hook.config.update(url="https://other.example"), "warn", "no webhook of it"),
        ("gitlab", change(failures=40), "fail", "GitLab has disabled it"),
        ("gitlab", change(switches={"job_events": True}), "fail", "it does not send pipeline_events"),
        ("gitlab", change(token=""), "fail", "it has no secret"),
        ("gitlab", change(url="https://other.example"), "warn", "no webhook of it"),
    ],
)
def test_each_fault_of_a_webhook_has_its_line(clinic, platform, spoil, level, text):
    clinic.servers["gitlab"].hooks.auto_disable = True
    (hook,) = clinic.servers[platform].hooks.hooks
    spoil(hook)
    found = clinic()
    assert has(found, level, text), found
    assert any(what.startswith(f"{platform} {HOOKED[platform]}: ") for _, what in found)


@ON_SQLITE
def test_webhooks_that_may_not_be_seen_are_a_warning(clinic):
    clinic.servers["github"].permissions["repository_hooks"] = "none"
    clinic.servers["gitlab"].access_level = 30
    found = clinic()
    assert has(found, "warn", f"github {HOOKED['github']}: the token may not see its webhooks")
    assert has(found, "warn", f"gitlab {HOOKED['gitlab']}: the token may not see its webhooks")


@ON_SQLITE
def test_without_public_url_the_path_tells_our_webhook(clinic):
    found = clinic(PUBLIC_URL="")
    assert not any("no webhook of it" in what for _, what in found)


@ON_SQLITE
def test_a_source_that_went_quiet_deaf_or_is_paused(clinic):
    now = utc_now()
    rows = [
        {"name": "github", "deaf_since": now, "paused_until": now + timedelta(hours=1), "refused_in_row": 0},
        {"name": "gitlab", "deaf_since": None, "paused_until": None, "refused_in_row": 2},
    ]
    db.in_transaction(clinic.engine, lambda connection: health.upsert(connection, models.sources, rows))
    found = clinic()
    assert has(found, "fail", "github: deaf since")
    assert not has(found, "warn", "a wrong time")
    db.in_transaction(clinic.engine, lambda held: health.note_clock_off(held, "gitlab", 400.0, now))
    assert has(clinic(), "warn", "gitlab: a push with a right signature and a wrong time was refused at")
    assert has(found, "warn", "github: not polled until")
    assert has(found, "warn", "gitlab: its last 2 pushes were refused")
    assert has(found, "warn", "gitlab: no push ever came")


@ON_SQLITE
def test_a_source_whose_polling_fails(clinic):
    row = {
        "name": "github",
        "api_failing_since": utc_now(),
        "api_failures": 4,
        "api_error": "connect: refused",
    }
    row |= {"api_error_kind": "unavailable"}
    db.in_transaction(clinic.engine, lambda connection: health.upsert(connection, models.sources, [row]))
    (what,) = (what for level, what in clinic() if level == "fail" and "can't be read since" in what)
    assert what.startswith("github: ")
    assert what.endswith("4 rounds of polling failed in a row: unavailable: connect: refused")


@ON_SQLITE
def test_a_source_that_is_not_in_use_is_not_asked(clinic):
    found = clinic(GITHUB_TOKEN="", GITHUB_REPOS="")
    assert not any(what.startswith("github") for _, what in found)
    assert clinic.servers["github"].count("/rate_limit") == 0
