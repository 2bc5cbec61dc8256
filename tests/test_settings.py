"""Every setting: its default, a good value, a bad value; files, aliases, YAML, further sources."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from sqlalchemy import make_url

from tests import hub
from webhook_app import settings, up
from webhook_app.settings import VARIABLES, SettingsError, load, pace

KEY = base64.urlsafe_b64encode(b"k" * 32).decode()
NEW, OLD = "a secret that is new", "a secret that is old"
VERIFIED = {"required": True, "none": False}
SIGNING = "whsec_" + "abcd" * 6
OTHER_KEY = base64.urlsafe_b64encode(b"o" * 32).decode()


def private_key(key=None, form=serialization.PrivateFormat.PKCS8, password=None):
    """A private key in PEM; RSA unless another is given."""
    sealed = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    key = key or rsa.generate_private_key(65537, 2048)
    return key.private_bytes(serialization.Encoding.PEM, form, sealed).decode()


PEM = private_key()
NAMES = [variable.name for variable in VARIABLES]
BY_NAME = {variable.name: variable for variable in VARIABLES}


def source(values, name):
    return values.sources[name]


def of(name):
    """How a variable shows in the settings, as a function of them."""
    return {
        "DATABASE_URL": lambda v: v.database_url,
        "REDIS_URL": lambda v: v.redis_url,
        "REDIS_TLS_VERIFY": lambda v: VERIFIED.get(v.redis_url.partition("ssl_cert_reqs=")[2]),
        "BUILDRELAY_DATA_DIR": lambda v: str(v.data_dir),
        "PORT": lambda v: v.port,
        "WEB_CONCURRENCY": lambda v: v.web_concurrency,
        "ENCRYPTION_KEYS": lambda v: v.encryption_keys,
        "ADMIN_TOKEN": lambda v: v.admin_token,
        "GITHUB_WEBHOOK_SECRET": lambda v: v.sources["github"].webhook_secrets,
        "GITLAB_WEBHOOK_SECRET": lambda v: v.sources["gitlab"].webhook_secrets,
        "JENKINS_WEBHOOK_SECRET": lambda v: v.sources["jenkins"].webhook_secrets,
        "BUILD_EVENT_TOKEN": lambda v: v.build_event_tokens,
        "GITHUB_TOKEN": lambda v: v.sources["github"].source.token,
        "GITHUB_APP_ID": lambda v: getattr(v.sources["github"].app, "app_id", ""),
        "GITHUB_APP_PRIVATE_KEY": lambda v: getattr(v.sources["github"].app, "private_key", ""),
        "GITHUB_APP_INSTALLATION_ID": lambda v: getattr(v.sources["github"].app, "installation_id", ""),
        "GITHUB_API_URL": lambda v: v.sources["github"].source.api_url,
        "GITHUB_REPOS": lambda v: v.sources["github"].repositories,
        "GITHUB_OWNER": lambda v: "/".join(v.sources["github"].repositories).partition("/")[0],
        "GITHUB_REPO": lambda v: "/".join(v.sources["github"].repositories).partition("/")[2],
        "ENABLE_GH": lambda v: v.sources["github"].enabled,
        "GITLAB_TOKEN": lambda v: v.sources["gitlab"].source.token,
        "GITLAB_OAUTH_CLIENT_ID": lambda v: getattr(v.sources["gitlab"].oauth, "client_id", ""),
        "GITLAB_OAUTH_CLIENT_SECRET": lambda v: getattr(v.sources["gitlab"].oauth, "client_secret", ""),
        "GITLAB_OAUTH_REFRESH_TOKEN": lambda v: getattr(v.sources["gitlab"].oauth, "refresh_token", ""),
        "DASHBOARD_API_URL": lambda v: v.dashboard_api_url,
        "DASHBOARD_API_KEY": lambda v: v.dashboard_api_key,
        "GITLAB_URL": lambda v: v.sources["gitlab"].source.api_url,
        "GITLAB_PROJECTS": lambda v: v.sources["gitlab"].repositories,
        "ENABLE_GITLAB": lambda v: v.sources["gitlab"].enabled,
        "JENKINS_URL": lambda v: v.sources["jenkins"].source.api_url,
        "JENKINS_USERNAME": lambda v: v.sources["jenkins"].source.username,
        "JENKINS_API_TOKEN": lambda v: v.sources["jenkins"].source.token,
        "JENKINS_JOBS": lambda v: v.sources["jenkins"].repositories,
        "JENKINS_DEFAULT_JOB": lambda v: "".join(v.sources["jenkins"].repositories),
        "ENABLE_JENKINS": lambda v: v.sources["jenkins"].enabled,
        "BUILD_POLL_INTERVAL": lambda v: v.poll_interval_seconds,
        "BUILD_PUSH_FRESHNESS": lambda v: v.push_freshness_seconds,
        "BUILD_POLL_PACE": lambda v: v.adaptive_pace,
        "API_BUDGET_RESERVE": lambda v: v.api_budget_reserve,
        "BUILD_MAX_POLL_TIME": lambda v: v.max_poll_seconds,
        "BUILD_MAX_CONSECUTIVE_ERRORS": lambda v: v.max_consecutive_errors,
        "BUILD_BACKOFF_MULTIPLIER": lambda v: v.backoff_multiplier,
        "GITHUB_API_TIMEOUT": lambda v: v.sources["github"].timeout_seconds,
        "GITLAB_API_TIMEOUT": lambda v: v.sources["gitlab"].timeout_seconds,
        "JENKINS_API_TIMEOUT": lambda v: v.sources["jenkins"].timeout_seconds,
        "GITHUB_API_RETRIES": lambda v: v.sources["github"].retry_attempts,
        "GITLAB_API_RETRIES": lambda v: v.sources["gitlab"].retry_attempts,
        "JENKINS_API_RETRIES": lambda v: v.sources["jenkins"].retry_attempts,
        "DISCOVERY_INTERVAL": lambda v: v.discovery_interval_seconds,
        "DISCOVERY_JITTER": lambda v: v.discovery_jitter_seconds,
        "HEARTBEAT_TIMEOUT": lambda v: v.heartbeat_timeout_seconds,
        "ALLOW_PRIVATE_CALLBACKS": lambda v: v.allow_private_callbacks,
        "PUBLIC_PROGRESS": lambda v: v.public_progress,
        "MAX_SUBSCRIBERS": lambda v: v.max_subscribers,
        "PUBLIC_URL": lambda v: v.public_url,
        "DELIVERY_RETRY_SCHEDULE": lambda v: v.delivery_retry_schedule,
        "DELIVERY_TIMEOUT": lambda v: v.delivery_timeout_seconds,
        "DELIVERY_HOST_CONCURRENCY": lambda v: v.delivery_host_concurrency,
        "STOP_GRACE_SECONDS": lambda v: v.stop_grace_seconds,
        "KEEP_ALIVE_SECONDS": lambda v: v.keep_alive_seconds,
        "DATABASE_POOLER": lambda v: v.database_pooler,
        "MAX_BYTES_IN_FLIGHT": lambda v: v.max_bytes_in_flight,
        "RETENTION_DAYS": lambda v: v.retention_days,
        "LOG_LEVEL": lambda v: v.log_level,
        "DASHBOARD_API_FORMAT": lambda v: v.dashboard_api_format,
        "LOG_FORMAT": lambda v: v.log_format,
        "SQLITE_SYNCHRONOUS": lambda v: v.sqlite_synchronous,
    }[name]


GOOD = {
    "DATABASE_URL": ("sqlite:////var/lib/x.db", "sqlite:////var/lib/x.db"),
    "REDIS_URL": (
        "rediss://:pw@example.com:6380/0",
        "rediss://:pw@example.com:6380/0?ssl_cert_reqs=required",
    ),
    "REDIS_TLS_VERIFY": ("false", False),
    "BUILDRELAY_DATA_DIR": ("/var/lib/buildrelay", "/var/lib/buildrelay"),
    "PORT": ("1", 1),
    "WEB_CONCURRENCY": ("3", 3),
    "ENCRYPTION_KEYS": (f"{KEY}, {OTHER_KEY}", (KEY, OTHER_KEY)),
    "ADMIN_TOKEN": ("abc" * 6, "abc" * 6),
    "GITHUB_WEBHOOK_SECRET": (f"{NEW}, {OLD},", (NEW, OLD)),
    "GITLAB_WEBHOOK_SECRET": (f"{SIGNING},{OLD}", (SIGNING, OLD)),
    "JENKINS_WEBHOOK_SECRET": (NEW, (NEW,)),
    "BUILD_EVENT_TOKEN": (f"{NEW},{OLD}", (NEW, OLD)),
    "GITHUB_TOKEN": ("ghs_" + "x" * 500, "ghs_" + "x" * 500),
    "GITHUB_APP_ID": ("Iv23liAbc", "Iv23liAbc"),
    "GITHUB_APP_PRIVATE_KEY": (PEM.strip().replace("\n", "\\n"), PEM.strip()),
    "GITHUB_APP_INSTALLATION_ID": ("51234567", "51234567"),
    "GITHUB_API_URL": ("https://ghe.example.com/api/v3/", "https://ghe.example.com/api/v3"),
    "GITHUB_REPOS": ("octo/one, Octo/two.js", ("octo/one", "Octo/two.js")),
    "GITHUB_OWNER": ("octo", "octo"),
    "GITHUB_REPO": ("one.js", "one.js"),
    "ENABLE_GH": ("no", False),
    "GITLAB_TOKEN": ("glpat-x", "glpat-x"),
    "GITLAB_OAUTH_CLIENT_ID": ("8f0a", "8f0a"),
    "GITLAB_OAUTH_CLIENT_SECRET": ("gloas-x", "gloas-x"),
    "GITLAB_OAUTH_REFRESH_TOKEN": ("abc", "abc"),
    "DASHBOARD_API_URL": ("http://dashboard.internal/api", "http://dashboard.internal/api"),
    "DASHBOARD_API_KEY": ("a key", "a key"),
    "GITLAB_URL": ("http://gitlab.internal:8080", "http://gitlab.internal:8080"),
    "GITLAB_PROJECTS": ("12, group/sub/project", ("12", "group/sub/project")),
    "ENABLE_GITLAB": ("0", False),
    "JENKINS_URL": ("https://ci.example.com/jenkins", "https://ci.example.com/jenkins"),
    "JENKINS_USERNAME": ("robot", "robot"),
    "JENKINS_API_TOKEN": ("11aa", "11aa"),
    "JENKINS_JOBS": ("folder/job one,nightly", ("folder/job one", "nightly")),
    "JENKINS_DEFAULT_JOB": ("folder/a, b", "folder/a, b"),
    "ENABLE_JENKINS": ("Off", False),
    "BUILD_POLL_INTERVAL": ("250", 0.25),
    "BUILD_PUSH_FRESHNESS": ("0", 0.0),
    "BUILD_POLL_PACE": ("Adaptive", True),
    "API_BUDGET_RESERVE": ("25", 0.25),
    "BUILD_MAX_POLL_TIME": ("7200000", 7200.0),
    "BUILD_MAX_CONSECUTIVE_ERRORS": ("1", 1),
    "BUILD_BACKOFF_MULTIPLIER": ("1.5", 1.5),
    "GITHUB_API_TIMEOUT": ("100", 0.1),
    "GITLAB_API_TIMEOUT": ("1500", 1.5),
    "JENKINS_API_TIMEOUT": ("60000", 60.0),
    "GITHUB_API_RETRIES": ("3", 3),
    "GITLAB_API_RETRIES": ("10", 10),
    "JENKINS_API_RETRIES": ("1", 1),
    "DISCOVERY_INTERVAL": ("300", 300.0),
    "DISCOVERY_JITTER": ("0", 0.0),
    "HEARTBEAT_TIMEOUT": ("120", 120.0),
    "ALLOW_PRIVATE_CALLBACKS": ("TRUE", True),
    "PUBLIC_PROGRESS": ("1", True),
    "MAX_SUBSCRIBERS": ("20", 20),
    "PUBLIC_URL": ("https://relay.example.com/ci/", "https://relay.example.com/ci"),
    "DELIVERY_RETRY_SCHEDULE": ("1, 2.5,3", (1.0, 2.5, 3.0)),
    "DELIVERY_TIMEOUT": ("0.5", 0.5),
    "DELIVERY_HOST_CONCURRENCY": ("4", 4),
    "STOP_GRACE_SECONDS": ("25", 25.0),
    "KEEP_ALIVE_SECONDS": ("5", 5.0),
    "DATABASE_POOLER": ("Yes", True),
    "MAX_BYTES_IN_FLIGHT": ("26214400", 26214400),
    "RETENTION_DAYS": ("7", 7),
    "LOG_LEVEL": ("Debug", "DEBUG"),
    "DASHBOARD_API_FORMAT": ("Provider", "provider"),
    "LOG_FORMAT": ("JSON", "json"),
    "SQLITE_SYNCHRONOUS": ("normal", "NORMAL"),
}

COMPANY = {
    "GITHUB_APP_ID": ["GITHUB_APP_PRIVATE_KEY"],
    "GITHUB_APP_PRIVATE_KEY": ["GITHUB_APP_ID"],
    "GITHUB_APP_INSTALLATION_ID": ["GITHUB_APP_ID", "GITHUB_APP_PRIVATE_KEY"],
    "GITHUB_OWNER": ["GITHUB_REPO"],
    "GITHUB_REPO": ["GITHUB_OWNER"],
    "GITLAB_OAUTH_CLIENT_ID": ["GITLAB_OAUTH_REFRESH_TOKEN"],
    "GITLAB_OAUTH_CLIENT_SECRET": ["GITLAB_OAUTH_CLIENT_ID", "GITLAB_OAUTH_REFRESH_TOKEN"],
    "GITLAB_OAUTH_REFRESH_TOKEN": ["GITLAB_OAUTH_CLIENT_ID"],
}
"""Variables that mean nothing without others."""


def company(name):
    beside = ["REDIS_URL"] if name == "REDIS_TLS_VERIFY" else COMPANY.get(name, [])
    return {other: GOOD[other][0] for other in beside}


WEB_URL = "a URL that begins with http:// or https://"
BAD = {
    "DATABASE_URL": ["mysql://x", "x.db", "sqlite://", "sqlite:///:memory:", "postgresql", "postgres://u:pw@h:port/x"],
    "REDIS_URL": ["http://example.com", "localhost:6379", "redis://", "redis://example.com:port"],
    "REDIS_TLS_VERIFY": ["maybe"],
    "BUILDRELAY_DATA_DIR": ["~nobody-of-this-name/data"],
    "PORT": ["0", "-1", "65536", "http", "80.5", " "],
    "WEB_CONCURRENCY": ["0", "257", "many"],
    "ENCRYPTION_KEYS": ["short", f"{KEY},short", KEY[:-2], "ü" * 44],
    "ADMIN_TOKEN": ["admin", "fifteen letters"],
    "GITHUB_WEBHOOK_SECRET": ["hush", f"{NEW},hush"],
    "JENKINS_WEBHOOK_SECRET": ["hush", f"{NEW},hush"],
    "BUILD_EVENT_TOKEN": ["hush", f"{NEW},hush"],
    "GITLAB_WEBHOOK_SECRET": ["whsec_", "whsec_%%%", f"{NEW},{SIGNING} b", SIGNING[:18], "plain"],
    "GITHUB_API_URL": ["ftp://x", "api.github.com", "https://", "https:///path", "https://[::1", "http://h:p"],
    "GITHUB_REPOS": ["octo", "octo/one,two", "https://github.com/octo/one", "octo/one two/three"],
    "GITHUB_TOKEN": ["ghp_one\nghp_two", "ghp_\x07"],
    "GITLAB_TOKEN": ["glpat-\r\nX-A: b"],
    "GITHUB_APP_ID": ["4 2", "https://github.com/apps/x"],
    "GITHUB_APP_PRIVATE_KEY": [
        "key.pem", PEM[:900], "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
        private_key(rsa.generate_private_key(65537, 1024)), private_key(password=b"pw"),
        private_key(ec.generate_private_key(ec.SECP256R1())),
    ],
    "GITHUB_APP_INSTALLATION_ID": ["0", "octo"],
    "GITLAB_OAUTH_CLIENT_ID": ["a b"],
    "GITHUB_OWNER": ["octo/one", "a b"],
    "GITHUB_REPO": ["octo/one", "one,two"],
    "ENABLE_GH": ["maybe", "2"],
    "DASHBOARD_API_URL": ["dashboard"],
    "GITLAB_URL": ["gitlab.com"],
    "ENABLE_GITLAB": ["ja"],
    "JENKINS_URL": ["//ci"],
    "ENABLE_JENKINS": ["y"],
    "BUILD_POLL_INTERVAL": ["9", "15.5", "15s", "86400001"],
    "BUILD_PUSH_FRESHNESS": ["-1", "soon"],
    "BUILD_POLL_PACE": ["slow", "15"],
    "API_BUDGET_RESERVE": ["-1", "91", "1.5"],
    "BUILD_MAX_POLL_TIME": ["99", "1h"],
    "BUILD_MAX_CONSECUTIVE_ERRORS": ["0", "1001"],
    "BUILD_BACKOFF_MULTIPLIER": ["0.9", "11", "nan", "inf", "x"],
    "GITHUB_API_TIMEOUT": ["99", "600001"],
    "GITLAB_API_TIMEOUT": ["30s"],
    "JENKINS_API_TIMEOUT": ["-30000"],
    "GITHUB_API_RETRIES": ["11", "many"],
    "GITLAB_API_RETRIES": ["-1"],
    "JENKINS_API_RETRIES": ["1.5"],
    "DISCOVERY_INTERVAL": ["0", "1d"],
    "DISCOVERY_JITTER": ["-1", "3601"],
    "HEARTBEAT_TIMEOUT": ["0", "x"],
    "ALLOW_PRIVATE_CALLBACKS": ["some"],
    "PUBLIC_PROGRESS": ["-"],
    "MAX_SUBSCRIBERS": ["0", "many"],
    "PUBLIC_URL": ["relay.example.com", "ftp://relay.example.com"],
    "DELIVERY_RETRY_SCHEDULE": [",", "5;300", "5,-1", "604801"],
    "DELIVERY_TIMEOUT": ["0", "61", "NaN"],
    "DELIVERY_HOST_CONCURRENCY": ["0", "257", "2.5"],
    "STOP_GRACE_SECONDS": ["0", "601", "9s"],
    "KEEP_ALIVE_SECONDS": ["0", "3601", "95s"],
    "DATABASE_POOLER": ["pgbouncer", "2"],
    "MAX_BYTES_IN_FLIGHT": ["26214399", "64 MiB", "67108864.5"],
    "RETENTION_DAYS": ["0", "3651", "90d"],
    "LOG_LEVEL": ["loud"],
    "DASHBOARD_API_FORMAT": ["html", "slack"],
    "LOG_FORMAT": ["xml"],
    "SQLITE_SYNCHRONOUS": ["OFF"],
}  # fmt: skip
ANYTHING_GOES = {
    "DASHBOARD_API_KEY", "GITHUB_TOKEN", "GITLAB_TOKEN", "GITLAB_PROJECTS", "JENKINS_USERNAME",
    "JENKINS_API_TOKEN", "JENKINS_JOBS", "JENKINS_DEFAULT_JOB", "GITLAB_OAUTH_CLIENT_SECRET",
    "GITLAB_OAUTH_REFRESH_TOKEN",
}  # fmt: skip


def refused(environ):
    """The one line with which these settings are refused."""
    with pytest.raises(SettingsError) as caught:
        load(environ)
    line = str(caught.value)
    assert "\n" not in line
    return line


# ---- each variable


def test_the_tables_of_this_test_name_every_variable():
    assert set(GOOD) == set(NAMES)
    assert set(BAD) | ANYTHING_GOES == set(NAMES)


def test_the_defaults_are_those_of_the_contract():
    values = load({})
    assert (values.poll_interval_seconds, values.push_freshness_seconds, values.max_poll_seconds) == (
        15,
        60,
        3600,
    )
    assert (values.max_consecutive_errors, values.backoff_multiplier) == (10, 2)
    assert [entry.timeout_seconds for entry in values.sources.values()] == [30] * 4
    assert [entry.retry_attempts for entry in values.sources.values()] == [0] * 4
    assert (values.discovery_interval_seconds, values.discovery_jitter_seconds) == (60, 10)
    assert (values.heartbeat_timeout_seconds, values.retention_days) == (90, 90)
    assert not values.allow_private_callbacks
    assert not values.public_progress
    assert values.delivery_retry_schedule == (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
    assert (values.delivery_timeout_seconds, values.port) == (15, 8000)
    assert values.web_concurrency >= 1
    assert source(values, "github").source.api_url == "https://api.github.com"
    assert list(values.sources) == ["github", "gitlab", "jenkins", "script"]
    assert [name for name, entry in values.sources.items() if entry.can_poll] == ["github", "gitlab"]
    assert values.database_url == f"sqlite:///{values.data_dir}/buildrelay.db"
    assert values.redis_url.startswith("unix://")
    assert values.data_dir.is_absolute()


@pytest.mark.parametrize("name", NAMES)
def test_each_default_is_what_its_table_says(name):
    variable = BY_NAME[name]
    assert variable.meaning
    if name not in ("DATABASE_URL", "REDIS_URL", "BUILDRELAY_DATA_DIR"):
        assert of(name)(load({})) == variable.read(variable.default)


@pytest.mark.parametrize("name", NAMES)
def test_a_good_value_is_taken(name):
    text, value = GOOD[name]
    assert of(name)(load({**company(name), name: text})) == value


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_value_is_none(name):
    empty, without = load({name: ""}), load({})
    assert of(name)(empty) == of(name)(without)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_a_bad_value_is_refused_by_name_with_what_is_allowed(name, text):
    line = refused({name: text})
    shown = "(secret)" if BY_NAME[name].secret else repr(text)
    assert line.startswith(f"{name}={shown}: ")
    assert line.endswith(" is needed")
    if BY_NAME[name].secret:
        assert repr(text) not in line


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("PORT", "x", "a whole number from 1 to 65535"),
        ("BUILD_POLL_INTERVAL", "x", "a whole number from 10 to 86400000 (milliseconds)"),
        ("HEARTBEAT_TIMEOUT", "x", "a number from 1 to 86400 (seconds)"),
        ("ENABLE_GH", "x", "true or false"),
        ("GITLAB_URL", "x", WEB_URL),
        ("GITHUB_REPOS", "x", "OWNER/REPO, comma separated,"),
    ],
)
def test_what_is_allowed_is_said_in_words(name, text, allowed):
    assert refused({name: text}) == f"{name}='{text}': {allowed} is needed"


@pytest.mark.parametrize("name", sorted(ANYTHING_GOES))
def test_secrets_and_names_are_taken_as_they_are(name):
    load({**company(name), name: "ü{}\\ \t;:'\"%s"})


# ---- nothing secret is shown


SECRETS = {
    name: f"hush-hush-hush-{number}"
    for number, name in enumerate(
        name for name in NAMES if BY_NAME[name].secret and name not in COMPANY
        and name not in ("ENCRYPTION_KEYS", "DATABASE_URL", "REDIS_URL", "DASHBOARD_API_URL")
    )
}  # fmt: skip


def test_no_secret_shows_when_settings_are_printed():
    environ = SECRETS | {
        "ENCRYPTION_KEYS": KEY, "DATABASE_URL": "postgres://u:hush-db@h/d", "REDIS_URL": "redis://:hush-r@h",
        "DASHBOARD_API_URL": "https://hooks.example.com/hush-d",
    }  # fmt: skip
    shown = repr(load(environ))
    assert "hush" not in shown
    assert KEY not in shown


@pytest.mark.parametrize("name", ["GITHUB_API_URL", "GITLAB_URL", "JENKINS_URL"])
def test_a_password_in_an_address_is_refused_and_not_shown(name):
    line = refused({name: "https://robot:hush@example.com"})
    assert line == f"{name}=(secret): {WEB_URL}, without user or password in it, is needed"


def test_what_lends_tokens_is_not_shown_and_takes_no_token_beside_it():
    lender = {"GITHUB_APP_ID": "42", "GITHUB_APP_PRIVATE_KEY": PEM}
    assert "PRIVATE KEY" not in repr(load(lender))
    assert PEM not in refused({"GITHUB_APP_PRIVATE_KEY": PEM})
    line = refused(lender | {"GITHUB_TOKEN": "hush"})
    assert line == "GITHUB_TOKEN: it is set beside GITHUB_APP_ID: only one of them is needed"
    lender = {
        "GITLAB_OAUTH_CLIENT_ID": "a",
        "GITLAB_OAUTH_REFRESH_TOKEN": "hush",
        "GITLAB_OAUTH_CLIENT_SECRET": "hush",
    }
    assert "hush" not in repr(load(lender))
    assert refused(lender | {"GITLAB_TOKEN": "hush"}).startswith(
        "GITLAB_TOKEN: it is set beside GITLAB_OAUTH_CL"
    )


@pytest.mark.parametrize(
    ("name", "missing"), [(name, one) for name, others in COMPANY.items() for one in others]
)
def test_what_means_nothing_alone_asks_for_the_other(name, missing):
    environ = {name: GOOD[name][0], **company(name)}
    del environ[missing]
    assert refused(environ).startswith(f"{missing}='': a value is needed beside ")


def test_the_key_of_an_app_may_lie_in_a_file_as_github_gives_it(tmp_path):
    pem = private_key(form=serialization.PrivateFormat.TraditionalOpenSSL)
    path = tmp_path / "app.private-key.pem"
    path.write_text(pem)
    environ = {"GITHUB_APP_ID": "42", "GITHUB_APP_PRIVATE_KEY_FILE": str(path)}
    assert source(load(environ), "github").app.private_key == pem.strip()


def test_the_one_repository_and_the_one_job_count_only_where_there_is_no_list():
    one = {"GITHUB_OWNER": "octo", "GITHUB_REPO": "one", "JENKINS_DEFAULT_JOB": "nightly"}
    assert source(load(one), "github").repositories == ("octo/one",)
    assert source(load(one), "jenkins").repositories == ("nightly",)
    listed = load(one | {"GITHUB_REPOS": "octo/two", "JENKINS_JOBS": "a,b"})
    assert source(listed, "github").repositories == ("octo/two",)
    assert source(listed, "jenkins").repositories == ("a", "b")
    assert source(load({"GITHUB_OWNER": "octo", "GITHUB_REPOS": "octo/two"}), "github").repositories == (
        "octo/two",
    )


def test_a_short_secret_is_refused_with_the_way_to_make_one():
    line = refused({"ADMIN_TOKEN": "fifteen letters"})
    assert line.startswith(
        "ADMIN_TOKEN=(secret): a secret of at least 16 characters (as `openssl rand -hex 32`"
    )
    assert "fifteen" not in line


def test_a_secret_with_a_comma_in_it_is_refused_as_two():
    line = refused({"GITHUB_WEBHOOK_SECRET": "one secret of its own, of a hook"})
    assert "a comma separates secrets: this one has 2 parts, the shortest of 9 characters" in line


def test_the_secret_of_a_further_source_is_as_long(with_file):
    line = refused(with_file("sources: [{name: ghe, platform: github, webhook_secret: hush}]"))
    assert line.startswith("sources: ghe: webhook_secret=(secret): a secret of at least 16 characters")


# ---- files


@pytest.mark.parametrize("name", ["ADMIN_TOKEN", "PORT", "GITHUB_WEBHOOK_SECRET", "JENKINS_JOBS"])
def test_each_value_may_come_from_a_file(tmp_path, name):
    text, value = GOOD[name]
    path = tmp_path / "value"
    path.write_text(f"{text}\n")
    assert of(name)(load({f"{name}_FILE": str(path)})) == value


def test_the_variable_wins_over_its_file(tmp_path):
    path = tmp_path / "value"
    path.write_text("1000")
    assert load({"PORT": "2000", "PORT_FILE": str(path)}).port == 2000


def test_a_file_that_is_not_there_is_named():
    line = refused({"ADMIN_TOKEN_FILE": "/nowhere/token"})
    assert line.startswith("ADMIN_TOKEN_FILE='/nowhere/token': a readable file is needed")


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "value"
    path.write_bytes(b"\xff\xfe\x00")
    assert refused({"ADMIN_TOKEN_FILE": str(path)}).startswith("ADMIN_TOKEN_FILE=")


def test_a_bad_value_in_a_file_is_refused_like_any_other(tmp_path):
    path = tmp_path / "value"
    path.write_text("eighty\n")
    assert refused({"PORT_FILE": str(path)}).startswith("PORT='eighty\\n': a whole number")
    path.write_text("hush")
    assert "hush" not in refused({"ENCRYPTION_KEYS_FILE": str(path)})


# ---- aliases


@pytest.mark.parametrize(
    ("alias", "name"), [(alias, variable.name) for variable in VARIABLES for alias in variable.aliases]
)
def test_an_alias_is_as_good_as_the_name_which_wins(tmp_path, alias, name):
    text, value = GOOD[name]
    assert of(name)(load({alias: text})) == value
    assert of(name)(load({alias: "7", name: text})) == value
    path = tmp_path / "value"
    path.write_text(text)
    assert of(name)(load({f"{alias}_FILE": str(path)})) == value


def test_a_bad_alias_is_named_as_it_was_written():
    assert refused({"WORKER_POLL_INTERVAL": "x"}).startswith("WORKER_POLL_INTERVAL='x': ")


def test_the_aliases_of_the_older_systems():
    assert {alias for variable in VARIABLES for alias in variable.aliases} == {
        "WORKER_POLL_INTERVAL", "WORKER_JITTER_SECONDS", "OM_BUILD_EVENT_TOKEN",
    }  # fmt: skip


WORKER = """
ENABLE_GH=true
ENABLE_JENKINS=false
WORKER_POLL_INTERVAL=60
GITHUB_TOKEN=ghp_your_token_here
GITHUB_REPOS=myorg/frontend-app,myorg/backend-api,myorg/infrastructure
JENKINS_URL=http://jenkins.company.com
JENKINS_USERNAME=jenkins-user
JENKINS_API_TOKEN=your_api_token
JENKINS_JOBS=myapp-pipeline,database-migrations
DASHBOARD_API_URL=http://localhost:8000
DASHBOARD_API_KEY=your-secure-api-key
"""


def test_the_environment_of_the_original_worker_is_read_as_it_stands():
    values = load(dict(line.split("=", 1) for line in WORKER.split()))
    assert [name for name, entry in values.sources.items() if entry.can_poll] == ["github", "gitlab"]
    assert len(source(values, "github").repositories) == 3
    assert source(values, "jenkins").repositories == ("myapp-pipeline", "database-migrations")
    assert (values.dashboard_api_url, values.dashboard_api_key) == (
        "http://localhost:8000",
        "your-secure-api-key",
    )


# ---- databases


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("postgres://u:p@h:5432/d", "postgresql+psycopg://u:p@h:5432/d"),
        ("postgres://u:p@h/d?sslmode=require", "postgresql+psycopg://u:p@h/d?sslmode=require"),
        ("postgresql://u:p%40x@h/d", "postgresql+psycopg://u:p%40x@h/d"),
        ("postgresql+psycopg://h/d", "postgresql+psycopg://h/d"),
        ("postgresql:///d?host=/run/pg", "postgresql+psycopg:///d?host=/run/pg"),
        ("sqlite:///relative.db", "sqlite:///relative.db"),
    ],
)
def test_the_databases_as_heroku_and_others_write_them(text, url):
    made = load({"DATABASE_URL": text}).database_url
    assert made == url
    assert make_url(made).get_backend_name() in ("postgresql", "sqlite")


def test_an_unix_socket_of_redis():
    assert load({"REDIS_URL": "unix:///run/redis.sock"}).redis_url == "unix:///run/redis.sock"


def test_where_nothing_is_said_all_lives_in_the_data_directory(tmp_path):
    values = load({"BUILDRELAY_DATA_DIR": str(tmp_path)})
    assert values.data_dir == tmp_path
    assert values.database_url == f"sqlite:///{tmp_path}/buildrelay.db"
    assert values.redis_url == f"unix://{tmp_path}/redis.sock"


@pytest.mark.parametrize(
    ("environ", "end"),
    [
        ({}, "?ssl_cert_reqs=required"), ({"REDIS_TLS_VERIFY": "true"}, "?ssl_cert_reqs=required"),
        ({"DYNO": "web.1"}, "?ssl_cert_reqs=none"), ({"REDIS_TLS_VERIFY": "false"}, "?ssl_cert_reqs=none"),
        ({"DYNO": "web.1", "REDIS_TLS_VERIFY": "true"}, "?ssl_cert_reqs=required"),
    ],
)  # fmt: skip
def test_redis_over_tls_is_verified_but_on_heroku(environ, end):
    assert load(environ | {"REDIS_URL": "rediss://:pw@h:1"}).redis_url == f"rediss://:pw@h:1{end}"
    assert load(environ | {"REDIS_URL": "redis://:pw@h:1"}).redis_url == "redis://:pw@h:1"
    authority = "rediss://h:1?ssl_ca_certs=/etc/ca.pem"
    assert load(environ | {"REDIS_URL": authority}).redis_url == authority + end.replace("?", "&")
    own = "rediss://h:1?ssl_cert_reqs=optional"
    assert load(environ | {"REDIS_URL": own}).redis_url == own


# ---- sources


def test_the_token_of_build_scripts_does_not_sign_for_jenkins():
    values = load({"BUILD_EVENT_TOKEN": OLD, "JENKINS_WEBHOOK_SECRET": NEW})
    assert source(values, "jenkins").webhook_secrets == (NEW,)
    assert source(values, "script").webhook_secrets == (OLD,)
    assert not source(values, "script").can_poll


@pytest.mark.parametrize(
    ("environ", "pollable"),
    [
        ({}, {"github", "gitlab"}),
        ({"ENABLE_GH": "false"}, {"gitlab"}),
        ({"JENKINS_URL": "https://ci.example.com"}, {"github", "gitlab", "jenkins"}),
        ({"JENKINS_URL": "https://ci.example.com", "ENABLE_JENKINS": "false"}, {"github", "gitlab"}),
    ],
)
def test_what_is_on_and_has_an_api_can_be_polled(environ, pollable):
    assert {name for name, entry in load(environ).sources.items() if entry.can_poll} == pollable


def test_the_pace_of_polling():
    made = pace(
        load({"BUILD_POLL_INTERVAL": "2000", "BUILD_MAX_POLL_TIME": "60000", "HEARTBEAT_TIMEOUT": "5"})
    )
    assert (made.interval_seconds, made.freshness_seconds, made.max_seconds) == (2, 60, 60)
    assert (made.max_errors, made.multiplier, made.heartbeat_timeout_seconds) == (10, 2, 5)


# ---- the YAML file


@pytest.fixture
def with_file(tmp_path):
    """`with_file(text, environ)`: the environment that names a YAML file with this text."""

    def make(text, environ=None):
        path = tmp_path / "buildrelay.yaml"
        path.write_text(text)
        return {"BUILDRELAY_CONFIG": str(path), **(environ or {})}

    return make


DOCUMENT = """
polling:
  interval: 15000 # 15 seconds
  max_poll_time: 1800000
  max_consecutive_errors: 5
  backoff_multiplier: 3

platforms:
  github:
    timeout: 20000
    retry_attempts: 3
  gitlab:
    timeout: 21000
    retry_attempts: 2
  jenkins:
    timeout: 22000
    retry_attempts: 0
"""


def test_the_sections_of_the_original_document_are_read(with_file):
    values = load(with_file(DOCUMENT))
    assert (values.max_poll_seconds, values.max_consecutive_errors, values.backoff_multiplier) == (1800, 5, 3)
    three = [source(values, name) for name in ("github", "gitlab", "jenkins")]
    assert [one.timeout_seconds for one in three] == [20, 21, 22]
    assert [one.retry_attempts for one in three] == [3, 2, 0]
    assert "a whole number from 0 to 10" in refused(with_file("platforms: {gitlab: {retry_attempts: some}}"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "JENKINS_JOBS"])
@pytest.mark.parametrize("written", [str.upper, str.lower])
def test_each_setting_may_stand_in_the_file(with_file, name, written):
    text, value = GOOD[name]
    assert of(name)(load(with_file(f"{written(name)}: '{text}'", company(name)))) == value


def test_plain_yaml_values_mean_what_they_say(with_file):
    values = load(
        with_file(
            "enable_gh: no\npublic_progress: true\nport: 8080\nheartbeat_timeout: 12.5\n"
            "admin_token: 0123456701234567\nbuild_event_token: 12:30:00.00000000\ngithub_repos: [octo/one, octo/two]\n"
            "delivery_retry_schedule:\n  - 5\n  - 10\ngitlab_token:\njenkins_username: null\n"
            "worker_poll_interval: 33\npolling:\n"
        )
    )
    assert not source(values, "github").enabled
    assert values.public_progress
    assert (values.port, values.heartbeat_timeout_seconds) == (8080, 12.5)
    assert (values.admin_token, values.build_event_tokens) == ("0123456701234567", ("12:30:00.00000000",)), (
        "no number, no time of day"
    )
    assert source(values, "github").repositories == ("octo/one", "octo/two")
    assert values.delivery_retry_schedule == (5, 10)
    assert (source(values, "gitlab").source.token, source(values, "jenkins").source.username) == ("", "")
    assert values.discovery_interval_seconds == 33


def test_the_environment_wins_over_the_file(with_file, tmp_path):
    file = "port: 1000\npolling:\n  interval: 1000\n"
    assert load(with_file(file, {"PORT": "2000"})).port == 2000
    assert load(with_file(file, {"BUILD_POLL_INTERVAL": "3000"})).poll_interval_seconds == 3
    path = tmp_path / "port"
    path.write_text("4000")
    assert load(with_file(file, {"PORT_FILE": str(path)})).port == 4000


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("prot: 8000", "prot"),
        ("polling:\n  intervall: 5", "polling.intervall"),
        ("polling: 15000", "polling"),
        ("platforms:\n  github:\n    timeuot: 5", "platforms.github.timeuot"),
        ("platforms:\n  bitbucket:\n    timeout: 5", "platforms.bitbucket.timeout"),
        ("port:\n  number: 5", "port.number"),
        ("buildrelay_config: other.yaml", "buildrelay_config"),
        ("8000: port", "8000"),
    ],
)
def test_an_unknown_key_is_refused(with_file, text, key):
    assert refused(with_file(text)).startswith(f"BUILDRELAY_CONFIG: {key!r} is no setting; allowed are ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("port: eighty", "PORT='eighty': "),
        ("polling:\n  interval: 5", "BUILD_POLL_INTERVAL='5': "),
        ("encryption_keys: hush", "ENCRYPTION_KEYS=(secret): "),
    ],
)
def test_a_bad_value_in_the_file_is_named_as_its_variable(with_file, text, line):
    assert refused(with_file(text)).startswith(line)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}"])
def test_an_empty_file_changes_nothing(with_file, text):
    assert load(with_file(text)) == load({})


@pytest.mark.parametrize("text", ["- port", "port", "42"])
def test_a_file_that_is_no_mapping_is_refused(with_file, text):
    assert "a mapping of settings is needed" in refused(with_file(text))


@pytest.mark.parametrize(
    "text",
    [
        "a: b\nadmin_token: 'hush",
        "admin_token: hush: hush",
        "admin_token: *hush",
        "port: [1\n",
        "a: b\n\tport: 1",
    ],
)
def test_a_broken_file_is_refused_with_the_place_and_without_what_stands_there(with_file, text):
    line = refused(with_file(text))
    assert re.search(r"a readable YAML file is needed: line \d can't be read$", line)
    assert "hush" not in line


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    assert "a readable YAML file is needed" in refused({"BUILDRELAY_CONFIG": str(tmp_path / "none.yaml")})
    assert "a readable YAML file is needed" in refused({"BUILDRELAY_CONFIG": str(tmp_path)})
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "a readable YAML file is needed" in refused({"BUILDRELAY_CONFIG": str(path)})


def test_a_file_can_start_nothing(with_file, tmp_path):
    """Tags that make Python objects are texts here."""
    made = tmp_path / "made"
    load(with_file(f'admin_token: !!python/object/apply:os.mkdir ["{made}"]'))
    assert not made.exists()


# ---- further sources

FURTHER = """
sources:
  - name: ghe
    platform: github
    api_url: https://ghe.example.com/api/v3/
    token: abc
    webhook_secret: [a secret that is new, a secret that is old]
    repositories: [team/app]
    timeout: 5000
    retry_attempts: 4
  - name: gitlab_2
    platform: gitlab
    api_url: https://gitlab.example.com
    webhook_secret: a secret that is new, a secret that is old
    repositories: 12, group/project
    enabled: "false"
  - name: ci-3
    platform: jenkins
    username: robot
"""


def test_further_sources_have_names_of_their_own(with_file):
    values = load(with_file(FURTHER))
    assert list(values.sources) == ["github", "gitlab", "jenkins", "script", "ghe", "gitlab_2", "ci-3"]
    ghe, gitlab, jenkins = (source(values, name) for name in ("ghe", "gitlab_2", "ci-3"))
    assert (ghe.source.name, ghe.source.platform, ghe.source.api_url, ghe.source.token) == (
        "ghe", "github", "https://ghe.example.com/api/v3", "abc",
    )  # fmt: skip
    assert (ghe.webhook_secrets, ghe.repositories, ghe.timeout_seconds) == ((NEW, OLD), ("team/app",), 5)
    assert ghe.retry_attempts == 4
    assert ghe.can_poll
    assert gitlab.webhook_secrets == (NEW, OLD)
    assert gitlab.repositories == ("12", "group/project")
    assert (gitlab.enabled, gitlab.can_poll, gitlab.timeout_seconds) == (False, False, 30)
    assert (jenkins.source.username, jenkins.can_poll, jenkins.webhook_secrets) == ("robot", False, ())
    assert "abc" not in repr(values)


def test_further_sources_may_get_their_tokens_lent(with_file):
    key = PEM.replace("\n", "\n        ")
    values = load(
        with_file(
            "sources:\n"
            "  - name: ghe\n    platform: github\n    app_id: 42\n    app_installation_id: 7\n"
            f"    app_private_key: |\n        {key}\n"
            "  - name: lab\n    platform: gitlab\n    oauth_client_id: a\n    oauth_client_secret: hush\n"
            "    oauth_refresh_token: hush\n"
        )
    )
    app, oauth = source(values, "ghe").app, source(values, "lab").oauth
    assert (app.app_id, app.private_key, app.installation_id) == ("42", PEM.strip(), "7")
    assert (oauth.client_id, oauth.client_secret, oauth.refresh_token) == ("a", "hush", "hush")
    assert "hush" not in repr(values)


@pytest.mark.parametrize("text", ["sources:", "sources: []", "sources: null"])
def test_no_further_sources(with_file, text):
    assert len(load(with_file(text)).sources) == 4


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("{}", "each entry needs at least `name` and `platform`"),
        ("ghe", "each entry needs at least"),
        ("{name: x}", "each entry needs at least"),
        ("{name: x, platform: travis}", "x: platform='travis': github, gitlab or jenkins is needed"),
        ("{name: x, platform: script}", "x: platform='script': "),
        ("{name: 'a:b', platform: github}", "name='a:b': letters, digits, - and _ are needed"),
        ("{name: 'ä', platform: github}", "name='ä': "),
        ("{name: github, platform: github}", "the name 'github' is taken"),
        ("{name: GitHub, platform: github}", "the name 'GitHub' is taken"),
        ("{name: script, platform: gitlab}", "the name 'script' is taken"),
        ("{name: x, platform: github, tokn: y}", "'tokn' is no key of a source; allowed are ['api_url', "),
        ("{name: x, platform: gitlab, app_id: 4}", "x: app_id: gitlab knows no such thing"),
        ("{name: x, platform: github, oauth_client_id: 4}", "x: oauth_client_id: github knows no such thing"),
        (
            "{name: x, platform: github, app_id: 4}",
            "x: app_private_key='': a value is needed beside sources: x: app_id",
        ),
        (
            "{name: x, platform: github, app_id: 4, app_private_key: hush}",
            "x: app_private_key=(secret): an RSA",
        ),
        ("{name: x, platform: github, timeout: 5}", "x: timeout='5': a whole number from 100 to 60000 "),
        ("{name: x, platform: github, enabled: perhaps}", "x: enabled='perhaps': true or false is needed"),
        ("{name: x, platform: github, api_url: ghe}", f"x: api_url='ghe': {WEB_URL} is needed"),
        ("{name: x, platform: github, api_url: 'https://u:hush@h'}", "x: api_url=(secret): a URL "),
        ("{name: x, platform: github, repositories: app}", "x: repositories='app': OWNER/REPO, "),
    ],
)
def test_a_wrong_source_is_refused_with_what_is_allowed(with_file, entry, line):
    told = refused(with_file(f"sources:\n  - {entry}\n"))
    assert told.startswith(f"sources: {line}")
    assert "hush" not in told


def test_two_further_sources_of_one_name_are_refused(with_file):
    twice = "sources:\n  - {name: x, platform: github}\n  - {name: X, platform: gitlab}\n"
    assert refused(with_file(twice)) == "sources: the name 'X' is taken; another one is needed"


@pytest.mark.parametrize("text", ["sources: ghe", "sources: {name: ghe}"])
def test_sources_that_are_no_list_are_refused(with_file, text):
    assert refused(with_file(text)) == "sources: a list of sources is needed"


# ---- the whole


def test_settings_are_read_from_the_real_environment(monkeypatch):
    monkeypatch.setenv("PORT", "4321")
    assert settings.load().port == 4321


def test_settings_cannot_be_changed():
    values = load({})
    with pytest.raises(AttributeError):
        values.port = 1


# ---- misspelt names

FOREIGN = """
ADMIN_EMAIL ADMIN_PASSWORD BUILDRELAY_PORT BUILDRELAY_PORT_8000_TCP BUILDRELAY_PORT_8000_TCP_ADDR
BUILDRELAY_SERVICE_HOST BUILDRELAY_SERVICE_PORT BUILD_CAUSE BUILD_DISPLAY_NAME BUILD_ID BUILD_NUMBER
BUILD_TAG BUILD_URL BUILD_USER CI_JOB_TOKEN CI_PROJECT_ID CI_REGISTRY CI_REGISTRY_PASSWORD
CI_REPOSITORY_URL CI_SERVER_URL DATABASE_CONNECTION_POOL_URL GITHUB_ACTION GITHUB_ACTIONS
GITHUB_ACTION_PATH GITHUB_ACTION_REPOSITORY GITHUB_ACTOR GITHUB_ACTOR_ID GITHUB_API_TOKEN
GITHUB_APP_CLIENT_ID GITHUB_APP_NAME GITHUB_BASE_REF GITHUB_CLIENT_ID GITHUB_CLIENT_SECRET
GITHUB_ENV GITHUB_EVENT_NAME GITHUB_EVENT_PATH GITHUB_GRAPHQL_URL GITHUB_HEAD_REF GITHUB_HOST
GITHUB_JOB GITHUB_ORG GITHUB_OUTPUT GITHUB_PAT GITHUB_PATH GITHUB_PRIVATE_KEY GITHUB_REF
GITHUB_REF_NAME GITHUB_REF_PROTECTED GITHUB_REF_TYPE GITHUB_REPOSITORY GITHUB_REPOSITORY_ID
GITHUB_REPOSITORY_OWNER GITHUB_REPOSITORY_OWNER_ID GITHUB_RETENTION_DAYS GITHUB_RUN_ATTEMPT
GITHUB_RUN_ID GITHUB_RUN_NUMBER GITHUB_SERVER_URL GITHUB_SHA GITHUB_STATE GITHUB_STEP_SUMMARY
GITHUB_TRIGGERING_ACTOR GITHUB_URL GITHUB_USER GITHUB_WORKFLOW GITHUB_WORKFLOW_REF
GITHUB_WORKFLOW_SHA GITHUB_WORKSPACE GITLAB_ACCESS_TOKEN GITLAB_API_TOKEN GITLAB_API_URL GITLAB_CI
GITLAB_FEATURES GITLAB_HOST GITLAB_PRIVATE_TOKEN GITLAB_ROOT_PASSWORD GITLAB_RUNNER_TOKEN
GITLAB_USER_EMAIL GITLAB_USER_ID GITLAB_USER_LOGIN GITLAB_USER_NAME HEROKU_APP_NAME
HEROKU_POSTGRESQL_RED_URL HOSTNAME JENKINS_HOME JENKINS_JAVA_OPTS JENKINS_NODE_COOKIE JENKINS_OPTS
JENKINS_PASSWORD JENKINS_SERVER_COOKIE JENKINS_SLAVE_AGENT_PORT JENKINS_TOKEN JENKINS_UC
JENKINS_USER JENKINS_VERSION JOB_BASE_NAME JOB_NAME KUBERNETES_PORT LOG_LEVELS_JSON NODE_NAME
PGDATABASE POSTGRES_PASSWORD POSTGRES_URL PUBLIC_KEY PYTHONUNBUFFERED REDIS_TEMPORARY_URL
REDIS_TLS_URL RUNNER_ARCH RUNNER_OS RUNNER_TEMP RUN_DISPLAY_URL SECRET_KEY SSH_AUTH_SOCK WEB_MEMORY
"""
"""What GitHub Actions, GitLab CI, Jenkins, Heroku, Docker and Kubernetes set, and what other programs read."""


@pytest.mark.parametrize("name", FOREIGN.split())
def test_variables_of_other_programs_are_left_alone(name):
    assert settings.misspelt({name: "x"}) == {}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("BUILD_POLL_INTERVALL", "BUILD_POLL_INTERVAL"),
        ("BUILD_POLLING_INTERVAL", "BUILD_POLL_INTERVAL"),
        ("build_poll_interval", "BUILD_POLL_INTERVAL"),
        ("GITHUB_WEBHOOK_SECRETS", "GITHUB_WEBHOOK_SECRET"),
        ("GITHUB_WEBHOK_SECRET_FILE", "GITHUB_WEBHOOK_SECRET_FILE"),
        ("GITLAB_PROJECT", "GITLAB_PROJECTS"),
        ("ENCRYPTION_KEY", "ENCRYPTION_KEYS"),
        ("ENABLE_GITHUB", "ENABLE_GH"),
        ("LOG_LEVLE", "LOG_LEVEL"),
        ("REDIS_ULR", "REDIS_URL"),
        ("WORKER_POLL_INTERVALS", "WORKER_POLL_INTERVAL"),
        ("BUILDRELAY_CONF", "BUILDRELAY_CONFIG"),
        ("BUILDRELAY_DATADIR", "BUILDRELAY_DATA_DIR"),
    ],
)
def test_a_misspelt_name_is_told_with_the_one_that_is_meant(name, meant):
    assert settings.misspelt({name: "x"}) == {name: meant}
    assert settings.misspelt({}, [name]) == {name: meant}  # in secrets.env
    assert settings.misspelt({name: ""}) == {}
    assert settings.misspelt({name: "x", meant: "y"}) == {}  # then it is somebody else's
    assert settings.misspelt({meant: "y"}, [name, meant]) == {name: meant}


def test_no_name_that_is_known_counts_as_misspelt():
    names = {name for variable in settings.VARIABLES for name in (variable.name, *variable.aliases)}
    assert settings.misspelt(dict.fromkeys(names | {f"{name}_FILE" for name in names}, "x")) == {}


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("prot: 8000", "port"),
        ("polling:\n  intervall: 5", "polling.interval"),
        ("platforms:\n  github:\n    timeuot: 5", "platforms.github.timeout"),
        ("sourecs: []", "sources"),
        ("sources:\n- {name: ghe, platform: github, webhook_secrets: x}", "webhook_secret"),
    ],
)
def test_the_nearest_key_of_the_file_is_named(with_file, text, near):
    assert refused(with_file(text)).endswith(f": did you mean {near!r}?")


def test_the_start_of_a_process_warns_of_misspelt_names(tmp_path):
    """Without the value, which may be a secret."""
    (tmp_path / "secrets.env").write_text("ADMIN_TOKN=hush\n")
    env = {"BUILDRELAY_DATA_DIR": str(tmp_path), "GITHUB_WEBHOOK_SECRETS": "hush", "LOG_FORMAT": "json"}
    env = hub.clean_environment(env)
    command = [sys.executable, "-m", "webhook_app", "migrate"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert [(line["level"], line["msg"]) for line in lines] == [
        ("warning", "ADMIN_TOKN is no setting: did you mean ADMIN_TOKEN?"),
        ("warning", "GITHUB_WEBHOOK_SECRETS is no setting: did you mean GITHUB_WEBHOOK_SECRET?"),
    ]


# ---- .env.example

EXAMPLE = Path(__file__).parent.parent / ".env.example"


def example():
    lines = [line for line in EXAMPLE.read_text().splitlines() if line and not line.startswith("#")]
    pairs = [line.partition("=") for line in lines]
    assert all(re.fullmatch(r"[A-Z_]+", name) and sign for name, sign, _ in pairs)
    assert len({name for name, *_ in pairs}) == len(pairs)
    return {name: value for name, _, value in pairs}


def test_the_example_names_every_setting_and_no_other():
    assert set(example()) == {*NAMES, "BUILDRELAY_CONFIG"}


def test_the_example_changes_nothing_and_holds_no_secret():
    assert load(example()) == load({})
    for name, value in example().items():
        assert value in ("", BY_NAME[name].default if name in BY_NAME else "")
        assert name not in BY_NAME or not BY_NAME[name].secret or value == ""


def test_the_example_takes_nothing_from_what_up_decides(tmp_path):
    (tmp_path / "run").mkdir()
    plain, copied = (up.environment(tmp_path, "127.0.0.1", environ) for environ in ({}, example()))
    assert load(copied) == load(plain)


def test_the_example_has_no_path_of_a_machine_and_is_kept_by_git():
    text = EXAMPLE.read_text()
    assert not re.search(r"(?<![\w.:/])/(?:home|root|work|tmp|var|usr|Users)\b", text)
    ignored = (EXAMPLE.parent / ".gitignore").read_text().splitlines()
    assert ".env" in ignored
    assert not {".env*", ".env.*", ".env.example"} & set(ignored)
