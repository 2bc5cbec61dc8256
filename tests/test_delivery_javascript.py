"""What the delivery job really sent, judged by the JavaScript libraries of Standard Webhooks and Svix.

Python's `svix` hands verification to `standardwebhooks`, as JavaScript's does; it would bring pydantic and httpx.
"""

import base64
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import standardwebhooks

from jobs.deliver import deliver
from jobs.resources import Resources
from tests import node
from tests.caller import Caller, subscribe
from tests.facts import github
from tests.test_signing import BODY, MSG_ID, PUBLIC, TIMESTAMP, V1A, headers
from webhook_app.lifecycle import State
from webhook_app.simulated.httpd import Request, Response, Server
from webhook_app.times import utc_now

SOURCES = Path(__file__).parent / "javascript"
LIBRARIES = ("standardwebhooks", "svix")
NO_MATCH = "No matching signature found"


@pytest.fixture(scope="session")
def judge(pytestconfig):
    """`judge((library, key, headers, body), …)`: True, or why it was refused, of each."""
    directory = node.install(SOURCES, pytestconfig)

    def run(*messages):
        asked = [
            {"with": library, "key": key, "headers": sent, "body": base64.b64encode(body).decode()}
            for library, key, sent, body in messages
        ]
        done = subprocess.run(
            ["node", directory / "verify.mjs"], input=json.dumps(asked).encode(), capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    return run


@dataclass
class Relay:
    """The API, a subscriber that keeps the requests it gets, and the delivery job between them."""

    api: Caller
    held: Resources
    server: Server
    requests: list[Request]

    def subscribe(self, signing="hmac"):
        made = subscribe(self.api, url=f"{self.server.url}/hook", signing=signing)
        return f"/api/subscribers/{made['id']}", made["secret"]

    def rotate(self, path, grace_seconds):
        return self.api("POST", f"{path}/rotate-secret", json={"grace_seconds": grace_seconds})["secret"]

    def send(self, run, branch="main"):
        """Record a build and let the job deliver its message: headers and body as they arrived."""
        self.api.record(github(State.QUEUED, run=run, branch=branch), now=utc_now())
        deliver(self.held)
        request = self.requests.pop()
        assert not self.requests
        return dict(request.headers), request.body


@pytest.fixture
def relay(make_api, migrated_sqlite, tmp_path):
    store = tmp_path / "relay.db"
    store.write_bytes(migrated_sqlite.read_bytes())
    api = make_api(f"sqlite:///{store}", ALLOW_PRIVATE_CALLBACKS="true")
    held = api.app.extensions["buildrelay"]
    requests = []

    def receive(request):
        requests.append(request)
        return Response(200)

    with ThreadPoolExecutor(4) as threads, Server(receive) as server:
        yield Relay(api, Resources(held.settings, api.engine, held.redis, threads), server, requests)


def by_all(key, sent):
    return [(library, key, *sent) for library in LIBRARIES]


def test_hmac_messages_verify_and_changed_ones_do_not(relay, judge):
    _, secret = relay.subscribe()
    sent, body = relay.send(1)
    other = {**sent, "webhook-id": sent["webhook-id"] + "x"}
    assert judge(
        *by_all(secret, (sent, body)), *by_all(secret, (sent, body + b" ")), *by_all(secret, (other, body)),
        *by_all("whsec_" + base64.b64encode(bytes(32)).decode(), (sent, body)),
    ) == [True] * 2 + [NO_MATCH] * 6  # fmt: skip


def test_a_body_that_is_not_ascii_verifies(relay, judge):
    _, secret = relay.subscribe()
    sent, body = relay.send(1, branch="größe/日本語-🚀")
    assert "größe/日本語-🚀".encode() in body
    assert judge(*by_all(secret, (sent, body))) == [True, True]
    assert standardwebhooks.Webhook(secret).verify(body, sent)["data"]["branch"] == "größe/日本語-🚀"


def test_while_a_secret_is_rotated_the_old_and_the_new_one_verify(relay, judge):
    path, old = relay.subscribe()
    new = relay.rotate(path, 3600)
    newest = relay.rotate(path, 3600)
    sent = relay.send(1)
    assert len(sent[0]["webhook-signature"].split()) == 3
    assert judge(*(one for key in (old, new, newest) for one in by_all(key, sent))) == [True] * 6
    assert all(standardwebhooks.Webhook(key).verify(sent[1], sent[0]) for key in (old, new, newest))
    last = relay.rotate(path, 0)
    sent = relay.send(2)
    assert (
        judge(*by_all(last, sent), *by_all(newest, sent), *by_all(old, sent)) == [True] * 2 + [NO_MATCH] * 4
    )


def test_ed25519_messages_verify_with_nodes_own_crypto_also_during_rotation(relay, judge):
    path, old = relay.subscribe("ed25519")
    assert relay.api("GET", path)["public_key"] == old
    new = relay.rotate(path, 3600)
    sent, body = relay.send(1, branch="größe")
    told = judge(
        ("ed25519", old, sent, body), ("ed25519", new, sent, body), ("ed25519", new, sent, body + b" "),
        ("ed25519", PUBLIC, sent, body),
    )  # fmt: skip
    assert told == [True, True, NO_MATCH, NO_MATCH]
    assert relay.api("GET", path)["public_key"] == new


def test_the_libraries_refuse_v1a_alone(relay, judge):
    _, public = relay.subscribe("ed25519")
    sent = relay.send(1)
    assert sent[0]["webhook-signature"].startswith("v1a,")
    assert judge(*by_all(public.removeprefix("whpk_"), sent)) == [NO_MATCH] * 2


def test_the_published_ed25519_vector(judge):
    altered = V1A.replace("v1a,h", "v1a,i")
    assert judge(
        ("ed25519", PUBLIC, headers(V1A), BODY), ("ed25519", PUBLIC, headers(altered), BODY),
        ("ed25519", PUBLIC, headers(V1A, MSG_ID, TIMESTAMP + 1), BODY),
    ) == [True, NO_MATCH, NO_MATCH]  # fmt: skip


def test_the_lock_names_no_registry():
    node.check_lock(SOURCES, "standardwebhooks", "svix")
