"""What the API says and does about delivery: filters, formats, health, tests, replays, dead letters."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from rq import Queue, SimpleWorker
from sqlalchemy import select

from jobs.deliver import deliver
from jobs.resources import Resources
from tests.caller import KEY, attempt, bells, pages, subscribe
from tests.facts import at, github
from tests.test_api_subscribers import SUBSCRIBER_FIELDS
from webhook_app import db, endpoints, models, queues, signing, subscribers
from webhook_app.lifecycle import State
from webhook_app.simulated.subscriber import Subscriber
from webhook_app.times import iso, utc_now

Q, P, C, F = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED


def path_of(subscriber, *parts):
    return "/".join(["/api/subscribers", subscriber["id"], *parts])


def deliveries_of(api, subscriber):
    return [item["type"] for item in api("GET", path_of(subscriber, "deliveries"))["items"]]


def disable(api, subscriber):
    db.as_writer(
        api.engine, lambda write: endpoints.disable(write, subscriber["id"], "in this test", utc_now())
    )


# ---- fields ----------------------------------------------------------------------------------


def test_formats_and_fine_filters_are_kept_changed_and_used(api):
    wanted = {
        "format": "slack", "states": ["failed", "timeout"], "conclusions": ["failure"], "changes": ["broke"],
    }  # fmt: skip
    made = subscribe(api, **wanted)
    shown = api("GET", path_of(made))
    assert {name: made[name] for name in wanted} == {name: shown[name] for name in wanted} == wanted
    assert (made["origin"], made["public_key"]) == ("api", None)
    for run, state in enumerate((C, F, F, C), 1):
        api.record(github(state, run=run))
    assert deliveries_of(api, made) == ["build.failed"]
    changed = api(
        "PATCH",
        path_of(made),
        json={"format": "teams", "states": [], "conclusions": [], "changes": ["fixed"]},
    )
    assert (changed["format"], changed["states"], changed["changes"]) == ("teams", [], ["fixed"])
    api.record(github(F, run=5))
    api.record(github(C, run=6))
    assert deliveries_of(api, made) == ["build.completed", "build.failed"]
    api("PATCH", path_of(made), 422, json={"format": "html"})


def test_defaults_are_everything_in_the_standard_shape(api):
    made = subscribe(api)
    assert (made["format"], made["states"], made["conclusions"], made["changes"]) == ("standard", [], [], [])
    assert (made["on_probation"], made["warned_percent"], made["slow_until"]) == (False, 0, None)


def test_an_ed25519_subscriber_shows_the_key_that_verifies(api):
    made = subscribe(api, signing="ed25519")
    assert made["public_key"] == made["secret"]
    assert made["public_key"].startswith("whpk_")
    rotated = api("POST", path_of(made, "rotate-secret"))
    assert api("GET", path_of(made))["public_key"] == rotated["secret"] != made["secret"]
    with db.reading(api.engine) as connection:
        (secret, _) = subscribers.live_secrets(subscribers.get(connection, made["id"]), (KEY,), utc_now())
    assert signing.public_key(secret) == rotated["secret"]


def test_health_is_that_of_the_last_tries(api):
    made = subscribe(api, ordered=False)
    api.record(*(github(C, run=run) for run in range(4)), now=utc_now())
    assert attempt(api, 200) == 4
    api.record(github(C, run=9), now=utc_now())
    assert attempt(api, 503, "http_503") == 1
    shown = api("GET", path_of(made))
    assert shown["health"] == {
        "tries": 5, "success_rate": 0.8, "p50_ms": 250, "p95_ms": 250, "last_error": "http_503",
    }  # fmt: skip
    assert (shown["failures"], shown["slow_until"]) != (0, None)
    assert "health" not in api("GET", "/api/subscribers")["items"][0]


# ---- the subscriber of the settings ----------------------------------------------------------


def sync(api, url, key="first-key"):
    return db.as_writer(api.engine, lambda write: subscribers.sync_static(write, url, key, (KEY,), utc_now()))


def test_the_settings_make_change_and_remove_one_subscriber(api):
    assert sync(api, "") is False
    assert sync(api, "http://dashboard.internal/hook")
    assert sync(api, "http://dashboard.internal/hook") is False
    (made,) = api("GET", "/api/subscribers")["items"]
    assert (made["id"], made["origin"], made["events"]) == ("sub_dashboard", "settings", ["build.*"])
    assert made["headers"] == {"Authorization": "***"}
    assert headers_of(api) == {"Authorization": "Bearer first-key"}
    assert sync(api, "http://dashboard.internal/hook", "second-key")
    assert headers_of(api) == {"Authorization": "Bearer second-key"}
    disable(api, made)
    assert sync(api, "https://new.example/hook", "second-key")
    (changed,) = api("GET", "/api/subscribers")["items"]
    assert (changed["url"], changed["state"]) == ("https://new.example/hook", "active")
    assert sync(api, "https://new.example/hook", "")
    assert headers_of(api) == {}
    api.record(github(C))
    assert deliveries_of(api, made) == ["build.completed"]
    assert sync(api, "")
    assert api("GET", "/api/subscribers")["items"] == []
    api.record(github(C, run=2))


def headers_of(api):
    with db.reading(api.engine) as connection:
        return subscribers.custom_headers(subscribers.get(connection, "sub_dashboard"), (KEY,))


def test_what_the_settings_say_is_not_changed_over_the_api(api):
    sync(api, "http://10.0.0.9/hook")
    made = {"id": "sub_dashboard"}
    for body in ({"url": "https://elsewhere.example/"}, {"headers": {}}, {"format": "slack"}):
        assert "DASHBOARD_API_URL" in api("PATCH", path_of(made), 409, json=body)["detail"]
    assert "DASHBOARD_API_URL" in api("DELETE", path_of(made), 409)["detail"]
    changed = api("PATCH", path_of(made), json={"branches": ["main"], "description": "ours"})
    assert changed["branches"] == ["main"]
    assert sync(api, "http://10.0.0.9/hook") is False
    assert api("GET", path_of(made))["branches"] == ["main"]
    assert api("POST", path_of(made, "rotate-secret"))["secret"].startswith("whsec_")


# ---- test messages ---------------------------------------------------------------------------


@pytest.fixture
def served(make_api, migrated_sqlite, tmp_path):
    """A caller whose bell is answered by a worker, in a thread of the test, and an endpoint on loopback."""
    store = tmp_path / "served.db"
    store.write_bytes(migrated_sqlite.read_bytes())
    caller = make_api(f"sqlite:///{store}", ALLOW_PRIVATE_CALLBACKS="true")
    held = caller.app.extensions["buildrelay"]
    SimpleWorker([queues.DELIVER], connection=held.redis).register_birth()
    stop = threading.Event()
    with ThreadPoolExecutor(4) as threads, Subscriber() as endpoint:
        resources = Resources(held.settings, caller.engine, held.redis, threads)

        def work():
            jobs = Queue(queues.DELIVER, connection=held.redis)
            while not stop.wait(0.02):
                if jobs.count:
                    jobs.empty()
                    deliver(resources)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            yield caller, endpoint
        finally:
            stop.set()
            worker.join()


def test_a_test_shows_what_the_endpoint_answered(served):
    caller, endpoint = served
    made = subscribe(caller, url=endpoint.url)
    endpoint.add_secret(made["secret"])
    answer = caller("POST", path_of(made, "test"), 202)
    assert (answer["state"], answer["status_code"], answer["reason"]) == ("delivered", 200, None)
    assert endpoint.types() == {"subscriber.test": 1}
    assert caller("GET", f"/api/deliveries/{answer['delivery_id']}")["state"] == "delivered"
    endpoint.remove_secret(made["secret"])
    refused = caller("POST", path_of(made, "test"), 202)
    assert (refused["state"], refused["status_code"], refused["reason"]) == ("pending", 401, "http_401")
    endpoint.close()
    away = caller("POST", path_of(made, "test"), 202)
    assert (away["status_code"], away["reason"]) == (None, "connect")


def test_few_wait_for_an_answer_at_a_time(served):
    """Or tests of endpoints that hang would take all threads from the webhooks."""
    caller, endpoint = served
    made = subscribe(caller, url=endpoint.url)
    endpoint.add_secret(made["secret"])
    endpoint.behave(delay_seconds=0.5)
    waiting = caller.app.extensions["buildrelay"].waiting
    while waiting.acquire(blocking=False):
        pass
    assert caller("POST", path_of(made, "test"), 202)["state"] == "pending"
    waiting.release()
    for _ in range(2):
        assert caller("POST", path_of(made, "test"), 202)["state"] == "delivered"


def test_a_test_that_nobody_sends_is_answered_at_once(api):
    made = subscribe(api)
    answer = api("POST", path_of(made, "test"), 202)
    assert (answer["state"], answer["status_code"], answer["reason"], answer["response"]) == (
        "pending", None, None, None,
    )  # fmt: skip
    assert bells(api) == {queues.DELIVER}


def test_a_test_that_is_dead_before_it_was_sent_says_so(api):
    """It waited behind another message, whose failure disabled the subscriber."""
    made = subscribe(api)
    message_id = db.as_writer(api.engine, lambda write: endpoints.plan_test(write, made["id"], utc_now()))
    assert endpoints.await_answer(api.engine, message_id, 0).state == "pending"
    disable(api, made)
    assert endpoints.await_answer(api.engine, message_id, 60) == endpoints.Answer(
        "dead", reason="subscriber_disabled"
    )


# ---- replay ----------------------------------------------------------------------------------


def replay(api, subscriber, status=202, **more):
    return api("POST", path_of(subscriber, "replay"), status, json={"since": iso(at(-60)), **more})


def test_a_replay_is_counted_first_and_then_sent(api):
    api.record(github(Q), github(P), github(C))
    made = subscribe(api)
    assert replay(api, made, 200, dry_run=True) == {"count": 3}
    assert api("GET", path_of(made, "deliveries"))["items"] == []
    assert bells(api) == set()
    assert replay(api, made) == {"count": 3}
    assert bells(api) == {queues.DELIVER}
    assert [attempt(api, 200) for _ in range(4)] == [1, 1, 1, 0]
    assert replay(api, made) == {"count": 0}
    assert replay(api, made, 200, only="all", dry_run=True) == {"count": 3}
    assert replay(api, made, until=iso(at(0)), only="all") == {"count": 0}
    assert replay(api, made, since=iso(at(0)), until=iso(at(1)), only="all") == {"count": 3}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "since"), ({"since": "yesterday"}, "since"), ({"since": "2026-11-01T10:00:00"}, "since"),
        ({"since": "2026-11-01T10:00:00Z", "until": "2026-11-01T10:00:00Z"}, "until"),
        ({"since": "2026-11-01T10:00:00Z", "only": "some"}, "only"),
        ({"since": "2026-11-01T10:00:00Z", "dry_run": "yes"}, "dry_run"),
        ({"since": "2026-11-01T10:00:00Z", "from": 1}, "from"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_replay_is_named(local, body, field):
    made = subscribe(local)
    assert field in local("POST", path_of(made, "replay"), 422, json=body)["errors"]["json"]


def test_a_disabled_subscriber_gets_everything_after_enable_and_replay(api):
    made = subscribe(api, events=["build.*"])
    api.record(github(Q), now=utc_now())
    disable(api, made)
    api.record(github(P), github(C), now=utc_now())
    assert "enable" in replay(api, made, 409)["detail"]
    replay(api, {"id": "sub_none"}, 404)
    enabled = api("POST", path_of(made, "enable"))
    assert set(enabled) == SUBSCRIBER_FIELDS
    assert replay(api, made)["count"] == 3
    items = api("GET", path_of(made, "deliveries"))["items"]
    assert [(item["sequence"], item["state"]) for item in items] == [
        (3, "pending"),
        (2, "pending"),
        (1, "pending"),
    ]


def test_enable_gives_a_clean_record(api):
    made = subscribe(api)
    spoilt = {
        "failures": 30, "failing_since": at(0), "on_probation": True, "warned_percent": 90,
        "slow_until": utc_now() + timedelta(days=1), "state": "disabled", "disabled_reason": "x",
    }  # fmt: skip
    db.as_writer(api.engine, lambda write: subscribers.change(write, made["id"], spoilt, (), at(0)))
    shown = api("GET", path_of(made))
    assert (shown["on_probation"], shown["warned_percent"], shown["failures"]) == (True, 90, 30)
    assert shown["slow_until"].endswith("Z")
    enabled = api("POST", path_of(made, "enable"))
    assert {name: enabled[name] for name in spoilt} == {
        "failures": 0, "failing_since": None, "on_probation": False, "warned_percent": 0, "slow_until": None,
        "state": "active", "disabled_reason": None,
    }  # fmt: skip
    api("POST", path_of({"id": "sub_none"}, "enable"), 404)


def test_a_new_address_begins_without_the_failures_of_the_old_one(api):
    made = subscribe(api)
    spoilt = {"failures": 30, "failing_since": at(0), "on_probation": True, "warned_percent": 90}
    clean = {"failures": 0, "failing_since": None, "on_probation": False, "warned_percent": 0}
    db.as_writer(api.engine, lambda write: subscribers.change(write, made["id"], spoilt, (), at(0)))
    same = api("PATCH", path_of(made), json={"url": made["url"], "description": "the same"})
    assert (same["failures"], same["on_probation"]) == (30, True)
    moved = api("PATCH", path_of(made), json={"url": "https://example.net/moved"})
    assert {name: moved[name] for name in spoilt} == clean
    db.as_writer(api.engine, lambda write: endpoints.disable(write, made["id"], "in this test", utc_now()))
    assert api("PATCH", path_of(made), json={"url": made["url"]})["state"] == "disabled"


# ---- dead letters ----------------------------------------------------------------------------


@pytest.fixture
def buried(api):
    """Two subscribers with five dead deliveries each."""
    made = [subscribe(api, ordered=False) for _ in range(2)]
    api.record(*(github(C, run=run) for run in range(5)), now=utc_now())
    messages = models.messages
    db.in_transaction(
        api.engine,
        lambda connection: [
            connection.execute(
                messages.update()
                .where(messages.c.subscriber == one["id"])
                .values(state="dead", due_at=None, reason=reason, settled_at=utc_now())
            )
            for one, reason in zip(made, ("http_500", "timeout"), strict=True)
        ],
    )
    return made


def test_dead_letters_are_listed_with_their_reasons(api, buried):
    one, two = buried
    items, count = pages(api, "/api/deliveries", limit=3)
    assert (len(items), len({item["id"] for item in items}), count) == (10, 10, 4)
    assert {(item["subscriber_id"], item["reason"]) for item in items} == {
        (one["id"], "http_500"), (two["id"], "timeout"),
    }  # fmt: skip
    keys = [(item["subscriber_id"], item["event_id"]) for item in items]
    assert keys == sorted(keys, reverse=True)
    for query in ({"subscriber": one["id"]}, {"reason": "http_500"}, {"state": "dead", "reason": "http_500"}):
        found, _ = pages(api, "/api/deliveries", limit=2, **query)
        assert {item["subscriber_id"] for item in found} == {one["id"]}
        assert len(found) == 5
    assert api("GET", "/api/deliveries?reason=http_404")["items"] == []
    assert api("GET", "/api/deliveries?subscriber=sub_none")["items"] == []


def test_the_tries_after_a_redrive_follow_those_before(api, buried):
    (item, *_) = api("GET", f"/api/deliveries?subscriber={buried[0]['id']}")["items"]
    numbers = (1, 2, 3, 1, 2)

    def note_tries(connection):
        columns = models.messages.c
        message = connection.execute(select(columns.id).where(columns.message_id == item["id"])).scalar()
        tried = {"message": message, "subscriber": buried[0]["id"], "duration_ms": 1, "reason": "http_500"}
        for second, number in enumerate(numbers):
            connection.execute(
                models.delivery_attempts.insert(), tried | {"number": number, "started_at": at(second)}
            )

    db.in_transaction(api.engine, note_tries)
    shown = api("GET", f"/api/deliveries/{item['id']}")["attempts"]
    assert tuple(tried["number"] for tried in shown) == numbers


def test_dead_letters_are_redriven(api, buried):
    one, two = buried
    assert api("POST", "/api/deliveries/redrive", 202, json={"reason": "http_404"}) == {"count": 0}
    api("POST", "/api/deliveries/redrive", 404, json={"subscriber_id": "sub_none"})
    api("POST", "/api/deliveries/redrive", 422, json={"subscriber": one["id"]})
    ids = {item["id"] for item in api("GET", f"/api/deliveries?subscriber={one['id']}")["items"]}
    answer = api(
        "POST", "/api/deliveries/redrive", 202, json={"subscriber_id": one["id"], "reason": "http_500"}
    )
    assert answer == {"count": 5}
    assert bells(api) == {queues.DELIVER}
    pending = api("GET", path_of(one, "deliveries") + "?state=pending")["items"]
    assert {item["id"] for item in pending} == ids
    assert attempt(api, 200) == 5
    disable(api, two)
    api("POST", "/api/deliveries/redrive", 409, json={"subscriber_id": two["id"]})
    assert api("POST", "/api/deliveries/redrive", 202) == {"count": 0}
    api("POST", path_of(two, "enable"))
    assert api("POST", "/api/deliveries/redrive", 202, json={}) == {"count": 5}
    assert api("GET", f"/api/deliveries?subscriber={two['id']}")["items"] == []
