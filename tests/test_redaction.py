"""What may be secret is masked, whatever stands around it, and the rest of a text stays."""

import base64
import json
import re
from dataclasses import replace
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webhook_app.platforms import github, gitlab
from webhook_app.redaction import MASK, redactor
from webhook_app.settings import load, secret_texts

HEX = "0123456789abcdef" * 4
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
FORMS = [
    f"ghp_{HEX[:36]}",
    f"gho_{HEX[:36]}",
    f"ghu_{HEX[:36]}",
    f"ghr_{HEX[:36]}",
    f"ghs_12345_{JWT}",
    f"github_pat_{HEX[:22]}_{HEX[:59]}",
    f"glpat-{HEX[:20]}",
    f"glpat-{HEX[:27]}.01.{HEX[:9]}",
    f"gldt-{HEX[:20]}",
    f"glcbt-64_{HEX[:20]}",
    f"xoxb-{HEX[:12]}-{HEX[:12]}-{HEX[:24]}",
    f"xoxe.xoxp-1-{HEX[:40]}",
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE",
    f"AIza{HEX[:35]}",
    f"sk_live_{HEX[:24]}",
    f"npm_{HEX[:36]}",
    f"pypi-AgEIcHlwaS5vcmc{HEX}",
    f"dckr_pat_{HEX[:27]}",
    f"whsec_{base64.b64encode(bytes(32)).decode()}",
    JWT,
]
KEY = (
    "-----BEGIN RSA PRIVATE KEY-----\n"
    + "".join(f"MIIEpAIBAAKCAQEA{n:048d}\n" for n in range(12))
    + "-----END RSA PRIVATE KEY-----"
)


@pytest.mark.parametrize("token", FORMS)
@pytest.mark.parametrize(
    "around", ["{}", "use {} now", "x={};y", '"{}",', "({})", "https://h/p?a={}&b=1", "a:{}:b"]
)
def test_tokens_are_known_by_their_form(token, around):
    shown = redactor([])(around.format(token))
    assert MASK in shown
    assert token not in shown
    assert token[-12:] not in shown


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("password=hunter2", "password=***"),
        ("PASSWORD: hunter2 and more", "PASSWORD: *** and more"),
        ('"password": "two words, both"', '"password": ***'),
        ('{"api_key":"abc","n":1}', '{"api_key":***,"n":1}'),
        (r"{\"client_secret\":\"abc\"}", None),
        ("DB_PASSWORD='it is long'; next", "DB_PASSWORD=***; next"),
        ("export MY_SECRET_2=abc", "export MY_SECRET_2=***"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG", "aws_secret_access_key = ***"),
        ("mysql --password hunter2 -h db", "mysql --password *** -h db"),
        ("deploy --auth-token=abc --dry-run", "deploy --auth-token=*** --dry-run"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: ***"),
        ("> authorization: Digest username=\"u\", response=\"r\"", None),
        ("curl -H 'PRIVATE-TOKEN: abc' https://h", "curl -H 'PRIVATE-TOKEN: ***' https://h"),
        ("Set-Cookie: session=abc; HttpOnly", "Set-Cookie: ***"),
        ("sent Bearer abcdefghijklmnop ok", "sent Bearer *** ok"),
        ("git clone https://user:pass@host/x.git", "git clone https://***@host/x.git"),
        ("redis://:hunter2@db:6379/0", "redis://***@db:6379/0"),
        ("GET /x?access_token=abc&page=2", "GET /x?access_token=***&page=2"),
        ("https://b/blob?sv=1&sig=abc%3D&se=2", "https://b/blob?sv=1&sig=***&se=2"),
        ("https://hooks.slack.com/services/T00/B00/abcdef", "https://hooks.slack.com/***"),
    ],
)  # fmt: skip
def test_credentials_are_known_by_what_stands_before_them(line, shown):
    masked = redactor([])(line)
    assert MASK in masked
    for secret in ("hunter2", "abc", "dXNlcjpwYXNz", "K7MDENG", "both", "long"):
        assert secret not in masked.replace("abcdefghijklmnop", "")
    if shown is not None:
        assert masked == shown


@pytest.mark.parametrize(
    "line",
    [
        "148 tests passed in 11.4 s",
        "src/tokenizer.py:12:3: error: bad indent",
        "Compiling secretary v0.2.1 (https://example.com/a@b/c)",
        "commit 7111be6be7f5ff0558607111aa00bb11cc22dd33",
        "AssertionError: 19.04 != 19.05",
        "-----BEGIN CERTIFICATE-----",
        "FAIL tests/test_cart.py::test_tax_is_rounded",
    ],
)
def test_the_rest_stays(line):
    assert redactor(["a-secret-of-ours"])(line) == line


@pytest.mark.parametrize("prefix", ["", "[build] ", "  "])
def test_a_private_key_goes_whole(prefix):
    text = "before\n" + "".join(f"{prefix}{line}\n" for line in KEY.split("\n")) + "after"
    shown = redactor([])(text)
    assert "MII" not in shown
    assert shown.startswith("before\n")
    assert shown.endswith("after")
    assert "MII" not in redactor([])(json.dumps({"pem": KEY}))


def test_a_private_key_that_was_cut_goes_as_well():
    redact = redactor([])
    assert "MII" not in redact("before\n" + KEY[: len(KEY) // 2])
    assert "MII" not in redact(KEY[len(KEY) // 2 :] + "\nafter")
    assert redact(KEY[len(KEY) // 2 :] + "\nafter").endswith("\nafter")
    assert "MII" not in redact(KEY[:200] + "\n" + KEY)


def test_our_own_secrets_go_in_every_form():
    secret = "s3cr3t/with+odd=chars"
    redact = redactor([secret, "line one of it\nline two of it", "short", "abc"])
    coded = base64.b64encode(secret.encode()).decode()
    for form in (secret, quote(secret, safe=""), coded, "line one of it", "line two of it", "a short one"):
        shown = redact(f"x{form}x" if form is not None and "short" not in form else form)
        assert MASK in shown
        assert form not in shown
    assert redact("shortest") == "shortest"
    assert redact("abc") == "abc", "too short to be masked without masking everything"


def test_every_secret_of_the_settings_is_known():
    values = load(
        {
            "ADMIN_TOKEN": "the-admin-token-of-tests", "GITHUB_TOKEN": "a-github-token", "GITLAB_TOKEN": "a-gitlab-token",
            "JENKINS_URL": "https://j", "JENKINS_USERNAME": "relay", "JENKINS_API_TOKEN": "a-jenkins-token",
            "GITHUB_WEBHOOK_SECRET": "hook-secret-number-one,hook-secret-number-two", "BUILD_EVENT_TOKEN": "script-token-of-the-tests",
            "DATABASE_URL": "postgres://u:database-pw@h/d", "REDIS_URL": "redis://:redis-pw@h",
            "DASHBOARD_API_KEY": "dashboard-key",
        }
    )  # fmt: skip
    text = (
        "the-admin-token-of-tests a-github-token a-gitlab-token a-jenkins-token hook-secret-number-one hook-secret-number-two script-token-of-the-tests "
        "database-pw redis-pw dashboard-key " + base64.b64encode(b"relay:a-jenkins-token").decode()
    )
    shown = redactor(secret_texts(values))(text)
    assert re.fullmatch(r"(\*\*\*=*\s?)+", shown), shown


@given(st.text(), st.sampled_from(FORMS), st.text())
def test_no_text_around_a_token_saves_it(before, token, after):
    shown = redactor([])(f"{before}\n{token}\n{after}")
    assert token not in shown


@pytest.mark.parametrize(
    "piece", ["a", "token", "password", "=", ":", "://", "://a", "-----BEGIN PRIVATE KEY-----", "--a", "?a",
              "eyJ", "gh", "'", '"', "\\", " ", "authorization:", "-----BEGIN ", "-----END PRIVATE KEY-----", "x-a"],
)  # fmt: skip
def test_no_text_makes_it_slow(piece):
    """A pattern whose time grew with the square of the length would not come to an end here."""
    redact = redactor(["a-secret-of-ours"])
    text = piece * (400_000 // len(piece))
    assert "a-secret-of-ours" not in redact(text + " a-secret-of-ours")


def test_what_gets_lent_tokens_is_known_as_well():
    values = load({"GITHUB_API_URL": "https://g", "GITLAB_URL": "https://l"})
    app = replace(values.sources["github"], app=github.App("42", KEY))
    oauth = replace(values.sources["gitlab"], oauth=gitlab.OAuth("id", "client-secret-1", "refresh-token-1"))
    texts = secret_texts(replace(values, sources={"github": app, "gitlab": oauth}))
    shown = redactor(texts)(f"{KEY.splitlines()[3]} client-secret-1 refresh-token-1")
    assert shown == "*** *** ***"
