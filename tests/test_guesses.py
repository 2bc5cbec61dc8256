"""Wrong API tokens are slowed per address and counted; right ones pass."""

import pytest
from redis import Redis

from tests.caller import ADMIN
from webhook_app import queues
from webhook_app.web import guesses
from webhook_app.web.guesses import BURST, Guesses


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def counted(redis_client, clock):
    return Guesses(redis_client, clock)


def exhaust(counted, address):
    assert [counted.note(address) for _ in range(BURST)] == [0] * BURST
    return counted.note(address)


def test_a_burst_passes_and_then_one_at_a_time(counted, clock):
    assert exhaust(counted, "192.0.2.1") == 1
    assert [counted.note("192.0.2.1") for _ in range(100)] == [1] * 100
    clock.now += 1
    assert [counted.note("192.0.2.1"), counted.note("192.0.2.1")] == [0, 1]
    clock.now += 2 * BURST
    assert exhaust(counted, "192.0.2.1") == 1
    assert counted.note("192.0.2.2") == 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True), ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False), ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("", "", True), ("192.0.2.1", "192.0.2.2", False),
    ],
)  # fmt: skip
def test_who_counts_as_one(counted, one, other, same):
    exhaust(counted, one)
    assert (counted.note(other) > 0) == same


def test_memory_is_bounded(counted, monkeypatch):
    monkeypatch.setattr(guesses, "MOST_ADDRESSES", 50)
    for number in range(200):
        counted.note(f"192.0.2.{number}")
    assert len(counted._until) == 50


def test_redis_is_told_once_a_second_and_may_be_away(counted, clock, redis_client, tmp_path):
    for _ in range(20):
        counted.note("192.0.2.1")
    assert queues.wrong_tokens(redis_client) == 1
    clock.now += 1
    counted.note("192.0.2.1")
    assert queues.wrong_tokens(redis_client) == 21
    counted.redis = Redis(unix_socket_path=str(tmp_path / "no.sock"))
    clock.now += 1
    counted.note("192.0.2.1")
    counted.redis = redis_client
    counted.flush()
    assert queues.wrong_tokens(redis_client) == 22


def test_wrong_tokens_are_slowed_and_right_ones_never(local, clock):
    local.app.extensions["buildrelay"].guesses.clock = clock
    right, wrong, none = local.as_(local.token_with("read")), local.as_("brt_wrong"), local.as_(None)
    for _ in range(BURST):
        wrong("GET", "/api/builds", 401)
    refused = wrong.client.get("/api/builds", headers={"Authorization": "Bearer brt_wrong"})
    assert (refused.status_code, refused.mimetype) == (429, "application/problem+json")
    assert refused.headers["Retry-After"] == "1"
    local("GET", "/api/builds")
    right("GET", "/api/builds")
    none("GET", "/api/builds", 401)
    headers = {"Authorization": "Bearer brt_wrong", "X-Forwarded-For": "198.51.100.7", "Forwarded": "for=1"}
    assert wrong.client.get("/api/builds", headers=headers).status_code == 429
    elsewhere = {"environ_base": {"REMOTE_ADDR": "198.51.100.7"}}
    wrong("GET", "/api/builds", 401, **elsewhere)


def test_no_answer_of_the_api_is_kept_by_a_cache(local):
    made = local.client.post(
        "/api/tokens",
        json={"name": "t", "scopes": ["read"]},
        headers={"Authorization": f"Bearer {ADMIN}"},
    )
    subscriber = local.client.post(
        "/api/subscribers",
        json={"url": "https://hooks.example.com/ci"},
        headers={"Authorization": f"Bearer {ADMIN}"},
    )
    rotated = local.client.post(
        f"/api/subscribers/{subscriber.json['id']}/rotate-secret",
        headers={"Authorization": f"Bearer {ADMIN}"},
    )
    refused = local.client.get("/api/builds")
    assert [answer.status_code for answer in (made, subscriber, rotated, refused)] == [201, 201, 200, 401]
    for answer in (made, subscriber, rotated, refused):
        assert answer.headers["Cache-Control"] == "no-store"
