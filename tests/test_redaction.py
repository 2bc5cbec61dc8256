"""What may be secret is masked, whatever stands around it, and the rest of a text stays."""

import base64
import json
import re
import time
from dataclasses import replace
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.leaks import PLAIN_LINES, leaks
from webhook_app.platforms import github, gitlab
from webhook_app.redaction import MASK, SHAPES, redactor
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


LEAKS = leaks("shapes")


def test_there_are_two_hundred_forms():
    assert len(LEAKS) >= 200
    assert len({leak.name for leak in LEAKS}) == len({leak.secret for leak in LEAKS}) == len(LEAKS)


@pytest.mark.parametrize("around", ["{}", "before\n{}\nafter", 'text "quoted" {}'])
@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.name)
def test_no_form_of_a_secret_is_shown(leak, around):
    shown = redactor([])(around.format(leak.text))
    pieces = [leak.secret[at : at + 8] for at in range(len(leak.secret) - 7)]
    assert not any(piece in shown for piece in pieces), shown


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.name)
def test_what_is_masked_is_not_masked_again(leak):
    redact = redactor([])
    assert redact(redact(leak.text)) == redact(leak.text)


@pytest.mark.parametrize("line", PLAIN_LINES)
def test_the_rest_stays(line):
    redact = redactor(["a-secret-of-ours"])
    assert redact(line) == line
    assert redact.name(line) == line


@given(st.text(alphabet="0123456789abcdef", min_size=7, max_size=64), st.uuids(), st.integers(0, 65535))
def test_digests_ids_and_addresses_stay(digest, uuid, port):
    line = f"{digest} sha256:{digest} {uuid} https://h.example:{port}/@scope/{uuid}?page={port}#L{port} v1.{port}"
    assert redactor(["a-secret-of-ours"])(line) == line


def test_names_are_masked_by_the_form_of_a_secret_alone():
    """A branch may be called `fix/password=reset`; a token in its place goes all the same."""
    redact = redactor(["known-secret-one", "postgres"])
    token = FORMS[0]
    assert redact.name("fix/password=reset") == "fix/password=reset"
    assert redact.name(f"fix/{token}") == "fix/***"
    assert redact.name("of/known-secret-one") == "of/***"
    assert redact.name("fix/postgresql-upgrade") == "fix/postgresql-upgrade", "a weak password is a word"
    assert redact.name("https://me:pa/ss@host/x") == "https://***@host/x"


@pytest.mark.parametrize(
    "branch",
    ["feature/sk-1234-fix-the-login-page", "i18n/sk-SK-2024-11-translations", "pypi-Release-2024-11-28-rc1"],
)
def test_branches_that_only_begin_like_a_token_stay(branch):
    assert SHAPES.name(branch) == branch


def test_a_token_behind_an_option_goes():
    token = "gh" + "p_" + HEX[:36].ljust(36, "A")
    for text in (f"mytool -t{token}", rf"\x3d{token}", f"export A=x{token}"):
        assert token not in SHAPES(text)


def test_what_follows_a_secret_option_in_a_list_goes():
    told = ["deploy", "--password", "hunter2hunter2", "--verbose", "yes"]
    assert SHAPES.value({"args": told}) == {"args": ["deploy", "--password", "***", "--verbose", "yes"]}


def test_identities_stay_different():
    redact = redactor([])
    first, second = (redact.identity(f"run {token}") for token in FORMS[:2])
    assert first != second
    assert first.startswith("run ***~~")
    assert redact.identity(f"run {FORMS[0]}".upper().lower()) == redact.identity(f"run {FORMS[0]}")
    assert redact.identity("nightly-7") == "nightly-7"


def test_values_under_a_secret_name_go_whole():
    told = {
        "password": "hunter2", "db": {"secret": ["a", "b"], "pin": 1}, "token_count": 5, "tokens": 7, "stage": "a",
        "dbPassword": 1234, "ok": True, "list": [f"use {FORMS[0]}"], f"x {FORMS[0]}": 1, "empty_secret": "",
    }  # fmt: skip
    assert redactor([]).value(told) == {
        "password": MASK, "db": {"secret": MASK, "pin": 1}, "token_count": 5, "tokens": 7, "stage": "a",
        "dbPassword": MASK, "ok": True, "list": [f"use {MASK}"], f"x {MASK}": 1, "empty_secret": "",
    }  # fmt: skip


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
    redact = redactor([secret, "line one of the key\nline two of the key", "short", "abc"])
    coded = base64.b64encode(secret.encode()).decode()
    for form in (
        secret,
        quote(secret, safe=""),
        coded,
        "line one of the key",
        "line two of the key",
        "a short one",
    ):
        shown = redact(f"x{form}x" if form is not None and "short" not in form else form)
        assert MASK in shown
        assert form not in shown
    assert redact("shortest") == "shortest"
    assert redact("abc") == "abc", "too short to be masked without masking everything"


@given(st.binary(max_size=8), st.text(min_size=8, max_size=60), st.binary(max_size=8))
def test_our_own_secrets_go_in_base64_whatever_stands_before_them(before, secret, after):
    secret = " ".join(secret.split())
    assume(len(secret) >= 8 and secret.isprintable())
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        coded = encode(before + secret.encode() + after).decode()
        shown = redactor([secret])(f"x {coded} y")
        # a group at either end may hold bytes of others: two of its characters may stay
        assert len(shown.replace("***", "")) <= len(coded) - 4 * (len(secret.encode()) // 3) + 8, shown


def test_more_secrets_can_be_added():
    redact = redactor(["a-known-secret"]).also(["one-of-a-subscriber", "short"])
    assert redact("a-known-secret one-of-a-subscriber short shorter") == "*** *** *** shorter"


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


HOSTILE = [
    "a", "token", "password", "=", ":", "://", "://a", "://a:", "://a:b@", "--a", "?a", "?token", "&key", "eyJ", "gh",
    "'", '"', "\\", " ", "authorization:", "x-a", "x-x-", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----",
    "-----END PRIVATE KEY-----", "curl ", "curl -u", "curl -", "mysql -p", "docker login -p ", "login ", "echo a|",
    "echo a --password-stdin", "<password>", "<password", "</<password ", "<password><![CDATA[", "machine a ",
    "default login a ", "_auth", '"auth":"', "a.atlasv1.", "Q~", "aQ~", "1:AA", "key-", "0-us1", "value=", 'password" ',
    "htpasswd -b a ", "bearer ", "basic a", r"\n", "%3D", "\x1b[31m", "sk-", "eyJ-", "sk-a", "pypi-", "--password ", "token=${a",
    'token="', "smbclient -U a", "openssl -pass", "SG.a", "AKIA",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_no_text_makes_it_slow(piece):
    """Four times the text takes some four times as long; a square would take sixteen times."""
    redact = redactor(["a-secret-of-ours"])

    def cost(length: int) -> float:
        text = piece * (length // len(piece)) + " a-secret-of-ours"
        return min(processor_time(lambda: redact(text)) for _ in range(3))

    assert cost(200_000) < 10 * max(cost(50_000), 0.001)


def processor_time(act) -> float:
    began = time.process_time()
    act()
    return time.process_time() - began


def test_what_gets_lent_tokens_is_known_as_well():
    values = load({"GITHUB_API_URL": "https://g", "GITLAB_URL": "https://l"})
    app = replace(values.sources["github"], app=github.App("42", KEY))
    oauth = replace(values.sources["gitlab"], oauth=gitlab.OAuth("id", "client-secret-1", "refresh-token-1"))
    texts = secret_texts(replace(values, sources={"github": app, "gitlab": oauth}))
    shown = redactor(texts)(f"{KEY.splitlines()[3]} client-secret-1 refresh-token-1")
    assert shown == "*** *** ***"
