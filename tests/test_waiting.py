"""What a pending delivery waits for, each word with what is in the store then, as the API shows it."""

from datetime import timedelta

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import update

from tests.caller import KEY, bells, subscribe
from tests.facts import github, gitlab
from webhook_app import cli, db, deliveries, endpoints, models, subscribers, waiting
from webhook_app.deliveries import Tried
from webhook_app.lifecycle import State
from webhook_app.retries import RetryPolicy
from webhook_app.room import FIRST_IN_FLIGHT, Room
from webhook_app.times import utc_now

Q, P = State.QUEUED, State.IN_PROGRESS


def record(api, *facts):
    """In the past by a second, so that all is due whatever the clock's grain."""
    api.record(*facts, now=utc_now() - timedelta(seconds=1))


def claim(api, room=None, most=200):
    room = room or Room(most, per_host=most, first=most)
    return db.in_transaction(
        api.engine, lambda connection: deliveries.claim(connection, utc_now(), room, 15)
    ).messages


def settle(api, messages, status=500, reason="http_500", **more):
    now, policy = utc_now(), RetryPolicy((300,) * 9, lambda: 0.5)
    tried = [Tried(message, now, 0.1, status, reason, "", **more) for message in messages]

    def unit(connection):
        deliveries.settle(connection, tried, now, policy)
        endpoints.note(connection, tried, now)

    db.in_transaction(api.engine, unit)


def change(api, subscriber, **values):
    db.as_writer(api.engine, lambda write: subscribers.change(write, subscriber["id"], values, (), utc_now()))


def words(api, subscriber):
    """The words of a subscriber's deliveries, the oldest event first; each as the single delivery has it."""
    items = api("GET", f"/api/subscribers/{subscriber['id']}/deliveries?limit=200")["items"]
    items.sort(key=lambda item: item["event_id"])
    for item in items[:3]:
        single = api("GET", f"/api/deliveries/{item['id']}")
        assert single["waiting_for"] == item["waiting_for"]
    return [item["waiting_for"] for item in items]


def test_worker_while_nobody_has_taken_it_and_while_one_has_it(api):
    one = subscribe(api)
    record(api, github(Q))
    assert words(api, one) == ["worker"]
    assert len(claim(api)) == 1
    assert words(api, one) == ["worker"]


def test_null_for_what_is_delivered_or_dead(api):
    one = subscribe(api)
    record(api, github(Q, run=1), github(Q, run=2))
    settle(api, claim(api, most=2), 200, None)
    api("GET", "/api/deliveries")
    with api.engine.connect().execution_options(writing=True) as connection, connection.begin():
        columns = models.messages.c
        dead = {"state": "dead", "due_at": None, "reason": "http_500", "settled_at": utc_now()}
        connection.execute(update(models.messages).where(columns.state == "pending").values(dead))
    assert words(api, one) == [None, None]
    (buried,) = api("GET", "/api/deliveries")["items"]
    assert (buried["state"], buried["waiting_for"]) == ("dead", None)


def test_retry_while_its_own_schedule_has_it_wait(api):
    one = subscribe(api)
    record(api, github(Q))
    settle(api, claim(api))
    assert words(api, one) == ["retry"]


def test_order_while_an_earlier_message_of_its_build_is_pending(api):
    one, unordered = subscribe(api), subscribe(api, ordered=False)
    record(api, github(Q), github(P), github(Q, run=2))
    assert words(api, one) == ["worker", "order", "worker"]
    assert words(api, unordered) == ["worker"] * 3
    settle(api, [message for message in claim(api) if message.subscriber == one["id"]])
    assert words(api, one) == ["retry", "order", "retry"]


def test_rate_limit_for_what_is_beyond_the_rate(api):
    one = subscribe(api, rate_limit_per_second=2)
    record(api, *[github(Q, run=run) for run in range(5)])
    assert words(api, one) == ["worker", "worker", "rate_limit", "rate_limit", "rate_limit"]
    change(api, one, paced_until=utc_now() + timedelta(seconds=60))
    assert words(api, one) == ["rate_limit"] * 5


def test_slow_down_while_the_endpoint_asked_to_be_left_alone(api):
    one = subscribe(api)
    record(api, github(Q))
    settle(api, claim(api), 429, "http_429", retry_after="300")
    record(api, github(Q, run=2))
    assert words(api, one) == ["retry", "slow_down"]


def test_probe_while_the_circuit_is_open(api):
    one = subscribe(api)
    record(api, *[github(Q, run=run) for run in range(8)], github(P, run=7))
    settle(api, claim(api, most=10))
    shown = api("GET", f"/api/subscribers/{one['id']}")["circuit"]
    assert (shown["state"], shown["failures_in_row"], shown["probe_wait_seconds"]) == ("open", 5, 5)
    assert shown["probe_at"].endswith("Z")
    assert shown["concurrency_limit"] is None
    assert words(api, one) == ["retry"] * 5 + ["probe"] * 3 + ["order"]
    change(api, one, probe_at=utc_now())
    assert len(claim(api)) == 1
    assert words(api, one) == ["retry"] * 5 + ["worker"] + ["probe"] * 2 + ["order"]
    change(api, one, slow_until=utc_now() + timedelta(seconds=600))
    assert words(api, one)[6] == "slow_down", "which lasts longer"


def test_probe_beside_the_last_try_before_it_is_disabled(api):
    one = subscribe(api)
    record(api, github(Q, run=1), github(Q, run=2))
    change(api, one, on_probation=True, failing_since=utc_now())
    assert len(claim(api)) == 1
    assert words(api, one) == ["worker", "probe"]


@pytest.mark.parametrize(
    ("values", "window"),
    [({}, FIRST_IN_FLIGHT), ({"failing_since": utc_now()}, 4), ({"concurrency_limit": 2}, 2)],
)
def test_concurrency_while_as_much_is_under_way_as_a_worker_allows(api, values, window):
    one = subscribe(api, ordered=False)
    record(api, *[github(Q, run=run) for run in range(20)])
    change(api, one, **values)
    assert len(claim(api, Room())) == window
    assert words(api, one) == ["worker"] * window + ["concurrency"] * (20 - window)


def test_host_while_others_of_the_same_host_have_all_it_may_get(make_api, store_url):
    api = make_api(store_url, DELIVERY_HOST_CONCURRENCY="3")
    one = subscribe(api, sources=["github"])
    two = subscribe(api, sources=["gitlab"], url="https://HOOKS.example.com:8443/other")
    elsewhere = subscribe(api, sources=["gitlab"], url="https://example.org/")
    record(api, *[github(Q, run=run) for run in range(9)])
    assert len(claim(api, Room(per_host=3))) == 3
    record(api, gitlab(Q, 0, {1: "queued"}))
    assert words(api, one) == ["worker"] * 3 + ["host"] * 6
    assert words(api, two) == ["host"]
    assert words(api, elsewhere) == ["worker"]


def test_key_while_none_opens_its_secrets(make_api, store_url):
    api = make_api(store_url)
    one = subscribe(api)
    record(api, github(Q, run=1))
    settle(api, claim(api), None, deliveries.NO_KEY)
    record(api, github(Q, run=2))
    assert words(api, one) == ["key", "slow_down"]
    without = make_api(store_url, ENCRYPTION_KEYS=Fernet.generate_key().decode())
    assert words(without, one) == ["key", "key"]


def test_what_a_disabled_subscriber_has_left_waits_for_the_worker_that_gives_it_up(api):
    one = subscribe(api)
    record(api, github(Q))
    change(api, one, state="disabled")
    assert words(api, one) == ["worker"]


def test_every_word_has_its_test():
    """Those of the public contract, and no other."""
    promised = "retry order rate_limit slow_down probe concurrency host key worker"
    assert list(waiting.WORDS) == promised.split()


def test_a_retry_by_hand_is_free_to_go_at_once_though_the_circuit_is_open(api):
    one = subscribe(api)
    record(api, *[github(Q, run=run) for run in range(12)])
    settle(api, claim(api, most=10))
    last = api("GET", f"/api/subscribers/{one['id']}/deliveries")["items"][0]
    assert last["waiting_for"] == "probe"
    assert "waiting_for" in api("POST", f"/api/deliveries/{last['id']}/retry", 202)
    assert bells(api) == {"deliver"}
    (message,) = claim(api)
    assert message.message_id == last["id"]
    assert api("GET", f"/api/deliveries/{last['id']}")["waiting_for"] == "worker"
    api("POST", f"/api/subscribers/{one['id']}/enable")
    assert api("GET", f"/api/subscribers/{one['id']}")["circuit"] == {
        "state": "closed", "failures_in_row": 0, "probe_at": None, "probe_wait_seconds": None,
        "concurrency_limit": None,
    }  # fmt: skip


def test_the_command_shows_the_same(local, redis_url, monkeypatch, capsys, tmp_path):
    one = subscribe(local)
    record(local, *[github(Q, run=run) for run in range(6)])
    settle(local, claim(local, most=10))
    (waits,) = [item for item in local("GET", f"/api/subscribers/{one['id']}/deliveries")["items"]
                if item["waiting_for"] == "probe"]  # fmt: skip
    environ = {"DATABASE_URL": str(local.engine.url), "REDIS_URL": redis_url, "ENCRYPTION_KEYS": KEY,
               "BUILDRELAY_DATA_DIR": str(tmp_path)}  # fmt: skip
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    def said(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments])
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert "waiting_for: probe\n" in said("deliveries", "show", waits["id"])
    lines = said("deliveries", "list", "--state", "pending", "--subscriber", one["id"]).splitlines()
    assert [line.rpartition("waits for ")[2] for line in lines] == ["probe"] + ["retry"] * 5
    assert "circuit:\n  state: open\n  failures_in_row: 5\n" in said("subscribers", "show", one["id"])
