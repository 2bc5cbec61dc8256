"""Published vectors, forgeries, and the reference library as a second opinion."""

import base64
import json
from datetime import UTC, datetime

import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st

from webhook_app import signing

# The vectors of the Standard Webhooks reference libraries.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MSG_ID, TIMESTAMP, BODY = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
V1 = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
PRIVATE = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
PUBLIC = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="
V1A = "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg=="

anything = st.text(st.characters(codec=None), max_size=40)


def headers(signature: str = V1, msg_id: str = MSG_ID, timestamp: object = TIMESTAMP) -> dict[str, str]:
    return {"webhook-id": msg_id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}


def verify(sent: dict[str, str], secrets: tuple[str, ...] = (SECRET,), now: float = TIMESTAMP) -> bool:
    return signing.verify_v1(sent, BODY, secrets, now)


# ---- GitHub --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("secret", "body", "signature"),
    [
        (
            "It's a Secret to Everybody",
            b"Hello, World!",
            "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
        ),
        (
            "jenkins-secret",
            b'{"name":"web"}',
            "sha256=9407b3e9193a025a57b2b0ab2a3f34fe4ddeee5a4a40c46a50939eed61a8fb9c",
        ),
    ],
)
def test_github_vectors(secret, body, signature):
    assert signing.github_signature(secret, body) == signature
    assert signing.verify_github(signature, body, (secret,))
    assert signing.verify_github(signature, body, ("new", "", secret))
    assert signing.verify_github(signature, body, (secret, "old"))


@pytest.mark.parametrize("form", ["{}x", "{}\n", " {}", "{}=", "SHA256{}", ""])
def test_github_header_of_another_form_is_refused(form):
    signature = signing.github_signature("s", b"body")
    assert not signing.verify_github(form.replace("{}", signature), b"body", ("s",))
    assert not signing.verify_github(signature.upper(), b"body", ("s",))
    assert not signing.verify_github(signature.replace("sha256", "sha1"), b"body", ("s",))
    assert not signing.verify_github(None, b"body", ("s",))


def test_an_empty_secret_verifies_nothing():
    assert not signing.verify_github(signing.github_signature("", b"body"), b"body", ("",))
    assert not signing.verify_token("", ("",))
    empty = "v1," + base64.b64encode(b"\0" * 32).decode()
    assert not verify(headers(empty), ("", "whsec_", "whsec_=="))


def test_every_secret_is_tried_even_after_a_match(monkeypatch):
    tried = []
    genuine = signing.github_signature

    def noted(secret: str, body: bytes) -> str:
        tried.append(secret)
        return genuine(secret, body)

    monkeypatch.setattr(signing, "github_signature", noted)
    assert signing.verify_github(genuine("a", b""), b"", ("a", "b", "c"))
    assert not signing.verify_github(None, b"", ("d",))
    assert tried == ["a", "b", "c", "d"]


def test_token():
    assert signing.verify_token("t", ("s", "t"))
    assert not signing.verify_token("t", ("s", "tt"))
    assert not signing.verify_token(None, ("t",))
    assert not signing.verify_token("t", ())


# ---- Standard Webhooks ---------------------------------------------------------------------------


def test_v1_vectors():
    assert signing.sign_v1(SECRET, MSG_ID, TIMESTAMP, BODY) == V1
    assert verify(headers())
    gitlab = "whsec_dGVzdHRlc3R0ZXN0dGVzdHRlc3R0ZXN0dGVzdHRlc3Q="
    msg_id, body = "f5e5f430-f57b-4e6e-9fac-d9128cd7232f", b'{"object_kind":"pipeline"}'
    signature = "v1,1ltsaPIYm+XEt0VYbQI1/4rbH/PjQ6cYkwy6+MKUlXM="
    assert signing.sign_v1(gitlab, msg_id, 1744578123, body) == signature
    assert signing.verify_v1(headers(signature, msg_id, 1744578123), body, (gitlab,), 1744578124)


def test_v1a_vectors():
    assert signing.sign_v1a(PRIVATE, MSG_ID, TIMESTAMP, BODY) == V1A
    assert signing.verify_v1a(headers(V1A), BODY, (PUBLIC,), TIMESTAMP)
    assert signing.new_ed25519_pair(base64.b64decode(PRIVATE[5:])[:32]) == (PRIVATE, PUBLIC)


@pytest.mark.parametrize(
    "signature",
    [
        V1.replace("1OE=", "1OA="),
        V1.replace("v1,", "v2,"),
        V1.replace("v1,", "v1a,"),
        V1.replace("v1,", ""),
        V1.replace(",", ""),
        "",
        "v1",
        "v1,",
        ",",
        "v1,é",
        f"{V1},{V1}",
    ],
)
def test_v1_forgery(signature):
    assert not verify(headers(signature))


def test_v1_any_entry_of_the_list_may_match():
    other = "v1,Ceo5qEr07ixe2NLpvHk3FH9bwy/WavXrAFQ/9tdO6mc="
    assert verify(headers(f"{other} {other.replace('v1', 'v2')} {V1} {other}"))
    assert verify(headers(f"no-comma v1,%%% {V1A} {V1}"))
    assert not verify(headers(f"{other} {other}"))
    assert signing.verify_v1a(headers(f"{V1} v1a,AAAA v1a,é {V1A}"), BODY, (PUBLIC,), TIMESTAMP)
    assert not signing.verify_v1a(headers(V1), BODY, (PUBLIC,), TIMESTAMP)
    assert not verify(headers(V1A))


def test_v1_secret_with_or_without_prefix_and_padding():
    padded = "whsec_" + base64.b64encode(b"k" * 25).decode()
    assert padded.endswith("==")
    signature = signing.sign_v1(padded, MSG_ID, TIMESTAMP, BODY)
    for secret in (padded, padded[6:], padded.rstrip("="), padded[6:].rstrip("=")):
        assert signing.sign_v1(secret, MSG_ID, TIMESTAMP, BODY) == signature
        assert verify(headers(signature), ("whsec_not base64!", "", secret, SECRET))


@pytest.mark.parametrize("drift", [-300, -299.5, 0, 300])
def test_v1_time_within_the_tolerance(drift):
    assert verify(headers(), now=TIMESTAMP + drift)
    assert signing.verify_v1a(headers(V1A), BODY, (PUBLIC,), TIMESTAMP + drift)


@pytest.mark.parametrize("drift", [-7200.0, -301, 0, 301, 86_400])
def test_the_age_of_a_right_signature_is_told_whatever_it_is(drift):
    def age(of):
        return signing.v1_age_seconds(of, BODY, ("whsec_d3Jvbmc=", SECRET), TIMESTAMP + drift)

    assert age(headers()) == drift
    assert age(headers(V1.replace("v1,", "v1,A"))) is None
    assert age(headers() | {"webhook-timestamp": str(TIMESTAMP + 1)}) is None


@pytest.mark.parametrize("drift", [-301, -300.5, 301, float("nan"), float("inf")])
def test_v1_time_beyond_the_tolerance(drift):
    assert not verify(headers(), now=TIMESTAMP + drift)
    assert not signing.verify_v1a(headers(V1A), BODY, (PUBLIC,), TIMESTAMP + drift)
    if abs(drift) < 400:
        assert signing.verify_v1(headers(), BODY, (SECRET,), TIMESTAMP + drift, tolerance_seconds=400)


@pytest.mark.parametrize(
    "timestamp",
    ["", "soon", "1614265330.0", "+1614265330", " 1614265330", "1614265330\n", "-1", "9" * 13, "１614265330"],
)
def test_v1_timestamp_is_digits(timestamp):
    text = f"{MSG_ID}.{timestamp}.".encode() + BODY
    signature = signing._v1(signing._hmac_key(SECRET), text)
    assert not verify(headers(signature, timestamp=timestamp))


@pytest.mark.parametrize("missing", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_v1_every_header_is_needed(missing):
    for signature, check, key in ((V1, signing.verify_v1, SECRET), (V1A, signing.verify_v1a, PUBLIC)):
        sent = headers(signature)
        del sent[missing]
        assert not check(sent, BODY, (key,), TIMESTAMP)


@pytest.mark.parametrize("msg_id", ["", "a.b", "é"])
def test_v1_id_must_not_move_the_boundaries(msg_id):
    with pytest.raises(ValueError, match="id"):
        signing.sign_v1(SECRET, msg_id, TIMESTAMP, BODY)
    with pytest.raises(ValueError, match="id"):
        signing.sign_v1a(PRIVATE, msg_id, TIMESTAMP, BODY)
    signature = signing._v1(signing._hmac_key(SECRET), f"{msg_id}.{TIMESTAMP}.".encode() + BODY)
    assert not verify(headers(signature, msg_id))


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!", "whsec_a", "é", "\ud800"])
def test_signing_with_a_broken_secret_is_refused(secret):
    with pytest.raises(ValueError, match=r"base64|empty|bytes"):
        signing.sign_v1(secret, MSG_ID, TIMESTAMP, BODY)
    with pytest.raises(ValueError, match=r"base64|empty|bytes"):
        signing.sign_v1a(secret, MSG_ID, TIMESTAMP, BODY)


def test_new_secrets():
    assert signing.new_hmac_secret(bytes(32)) == "whsec_" + "A" * 43 + "="
    for size in (0, 23, 65):
        with pytest.raises(ValueError, match="24 to 64"):
            signing.new_hmac_secret(bytes(size))
    for size in (0, 31, 33, 64):
        with pytest.raises(ValueError, match="32"):
            signing.new_ed25519_pair(bytes(size))


# ---- any input -----------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from([*headers()]), anything), st.binary(max_size=40), st.lists(anything))
def test_no_input_raises_and_no_guess_passes(sent, body, secrets):
    for check in (signing.verify_v1, signing.verify_v1a):
        assert not check(sent, body, (SECRET, PUBLIC, *secrets), 0.0)
        assert not check(headers() | sent, body, tuple(secrets), TIMESTAMP)
    guess = sent.get("webhook-id")
    assert not signing.verify_github(guess, body, tuple(secrets))
    assert signing.verify_token(guess, tuple(secrets)) in (True, False)


@given(st.binary(min_size=24, max_size=64), st.binary(max_size=100), st.integers(0, 10**11), st.data())
def test_what_is_signed_verifies_and_nothing_else(random_bytes, body, timestamp, data):
    secret = signing.new_hmac_secret(random_bytes)
    private, public = signing.new_ed25519_pair(random_bytes.ljust(32, b"\0")[:32])
    for check, key, signature in (
        (signing.verify_v1, secret, signing.sign_v1(secret, "msg_1", timestamp, body)),
        (signing.verify_v1a, public, signing.sign_v1a(private, "msg_1", timestamp, body)),
    ):
        sent = headers(signature, "msg_1", timestamp)
        assert check(sent, body, (key,), timestamp)
        assert not check(sent, body + b"x", (key,), timestamp)
        assert not check(sent | {"webhook-id": "msg_2"}, body, (key,), timestamp)
        assert not check(sent | {"webhook-timestamp": str(timestamp + 1)}, body, (key,), timestamp)
        at = data.draw(st.integers(len("v1a,"), len(signature) - 4))
        other = signature[:at] + ("A" if signature[at] != "A" else "B") + signature[at + 1 :]
        assert not check(sent | {"webhook-signature": other}, body, (key,), timestamp)


# ---- the reference library -----------------------------------------------------------------------


@given(st.binary(min_size=24, max_size=64), st.dictionaries(st.text(max_size=5), st.text(max_size=20)))
def test_the_reference_library_agrees(random_bytes, message):
    secret, body = signing.new_hmac_secret(random_bytes), json.dumps(message, ensure_ascii=False).encode()
    now = datetime.now(UTC).replace(microsecond=0)
    theirs = standardwebhooks.Webhook(secret)
    ours = signing.sign_v1(secret, "msg_1", int(now.timestamp()), body)
    assert theirs.sign("msg_1", now, body.decode()) == ours
    sent = headers(f"v1,AAAA {ours}", "msg_1", int(now.timestamp()))
    assert theirs.verify(body, sent) == message
    assert signing.verify_v1(sent, body, (secret,), now.timestamp())
