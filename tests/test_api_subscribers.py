"""Subscribers and deliveries over the API."""

import inspect
import json
import re
from datetime import timedelta

import pytest
from cryptography.fernet import Fernet

from tests.caller import KEY, attempt, bells, pages, subscribe
from tests.facts import github
from webhook_app import (
    builds,
    db,
    endpoints,
    queues,
    subscribers,
)
from webhook_app.lifecycle import State
from webhook_app.times import utc_now

Q, P, C, F = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED


SUBSCRIBER_FIELDS = {
    "id", "url", "events", "sources", "repositories", "branches", "description", "rate_limit_per_second",
    "ordered", "forks",
    "headers", "format", "states", "conclusions", "changes", "signing", "public_key", "origin", "state",
    "disabled_reason", "failing_since", "failures", "warned_percent", "on_probation", "slow_until", "circuit",
    "created_at", "updated_at",
}  # fmt: skip


DELIVERY_FIELDS = {
    "id", "subscriber_id", "event_id", "build_id", "sequence", "type", "state", "attempt_count",
    "next_attempt_at", "waiting_for",
    "reason", "created_at", "settled_at",
}  # fmt: skip


# ---- subscribers -----------------------------------------------------------------------------


def test_a_subscriber_is_registered_and_its_secrets_are_shown_once(api):
    wanted = {
        "events": ["build.*"], "sources": ["github"], "repositories": ["octo/*"], "branches": ["main"],
        "description": "our dashboard", "rate_limit_per_second": 5, "ordered": False,
        "headers": {"X-Api-Key": "very-secret-value"}, "signing": "hmac",
    }  # fmt: skip
    made = subscribe(api, **wanted)
    assert set(made) == SUBSCRIBER_FIELDS | {"secret"}
    assert made["secret"].startswith("whsec_")
    assert made["headers"] == {"X-Api-Key": "***"}
    assert (made["state"], made["disabled_reason"], made["failures"]) == ("active", None, 0)
    for name in wanted.keys() - {"headers"}:
        assert made[name] == wanted[name]
    shown = api("GET", f"/api/subscribers/{made['id']}")
    health = {"tries": 0, "success_rate": None, "p50_ms": None, "p95_ms": None, "last_error": None}
    assert shown == {name: made[name] for name in SUBSCRIBER_FIELDS} | {"health": health}
    listed = json.dumps(api("GET", "/api/subscribers"))
    assert made["id"] in listed
    assert made["secret"] not in listed
    assert "very-secret-value" not in listed


def test_a_subscriber_with_nothing_but_a_url_gets_everything(api):
    made = subscribe(api)
    assert [made[name] for name in ("events", "sources", "repositories", "branches")] == [[], [], [], []]
    assert (made["ordered"], made["signing"], made["headers"]) == (True, "hmac", {})
    assert made["forks"] is False
    api.record(github(C))
    (item,) = api("GET", f"/api/subscribers/{made['id']}/deliveries")["items"]
    assert item["type"] == "build.completed"
    assert subscribe(api, signing="ed25519")["secret"].startswith("whpk_")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "url"), ({"url": "http://hooks.example.com/"}, "url"), ({"url": "https://127.0.0.1/"}, "url"),
        ({"url": "https://user:pw@example.com/"}, "url"), ({"url": "no url"}, "url"),
        ({"url": "https://x\x00y.com"}, "url"),
        ({"url": None}, "url"), ({"events": "build.*"}, "events"), ({"events": [1]}, "events"),
        ({"events": [""]}, "events"),
        ({"headers": {"Host": "x"}}, "headers"), ({"headers": {"X-A": "a\r\nX-B: b"}}, "headers"),
        ({"headers": {"webhook-id": "1"}}, "headers"), ({"headers": []}, "headers"), ({"ordered": "yes"},
        "ordered"),
        ({"rate_limit_per_second": 0}, "rate_limit_per_second"), ({"rate_limit_per_second": "5"},
        "rate_limit_per_second"),
        ({"signing": "rsa"}, "signing"), ({"secret": "mine"}, "secret"), ({"state": "disabled"}, "state"),
        ({"branches": ["x"] * 101}, "branches"), ({"forks": "yes"}, "forks"), ({"format": "html"}, "format"), ({"states": ["done"]}, "states"),
        ({"conclusions": "success"}, "conclusions"), ({"changes": ["worse"]}, "changes"),
        ({"origin": "settings"}, "origin"), ({"id": "sub_dashboard"}, "id"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_subscriber_is_named(local, body, field):
    answer = local(
        "POST", "/api/subscribers", 422, json={"url": "https://example.com/"} | body if body else body
    )
    assert field in answer["errors"]["json"], answer
    assert local("GET", "/api/subscribers")["items"] == []


@pytest.mark.parametrize(
    ("glob", "told"),
    [
        ("build.complete", "did you mean build.completed?"),
        ("builds.*", "did you mean build.*?"),
        ("BUILD.*", "did you mean build.*?"),
        ("build", "did you mean build.*?"),
        ("release.publish", "did you mean release.published?"),
        ("subscriber.tests", "did you mean subscriber.test?"),
        ("workflow_run", "types are build.*, release.*, subscriber.*"),
    ],
)
def test_a_glob_that_no_event_type_matches_is_refused_with_the_nearest_one(local, glob, told):
    made = subscribe(local)
    for method, path in (("POST", "/api/subscribers"), ("PATCH", f"/api/subscribers/{made['id']}")):
        body = {"url": "https://example.com/", "events": ["build.failed", glob]}
        errors = local(method, path, 422, json=body)["errors"]["json"]["events"]
        assert errors == {"1": [f"no event type matches {glob!r}: {told}"]}


def test_every_event_type_and_each_glob_that_matches_one_is_taken(local):
    globs = [*subscribers.EVENT_TYPES, "build.*", "release.*", "subscriber.*", "*", "build.fail*", "*.failed"]
    globs += ["build.[cf]*", "release.build_*", "build.polling_*"]
    assert subscribe(local, events=globs)["events"] == globs


def test_the_event_types_are_those_that_the_program_makes():
    made = {f"build.{state.value}" for state in State}
    for module in (builds, endpoints):
        made |= set(re.findall(r'"((?:build|subscriber)\.[a-z_]+)"', inspect.getsource(module)))
    assert made == {type_ for type_ in subscribers.EVENT_TYPES if not type_.startswith("release.")}


@pytest.mark.parametrize("host", ["hook.example.", "b\xfccher.example", "i\u2764.ws", "xn--i-7iq.ws"])
def test_a_name_is_taken_and_shown_as_it_was_given(local, host):
    made = subscribe(local, url=f"https://{host}/x")
    assert made["url"] == local("GET", f"/api/subscribers/{made['id']}")["url"] == f"https://{host}/x"


def test_private_addresses_where_they_are_allowed(make_api, migrated_sqlite, tmp_path):
    path = tmp_path / "private.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    api = make_api(f"sqlite:///{path}", ALLOW_PRIVATE_CALLBACKS="true")
    assert subscribe(api, url="http://127.0.0.1:9/hook")["url"] == "http://127.0.0.1:9/hook"


@pytest.mark.parametrize(
    ("url", "keeps"),
    [
        ("https://hooks.example.com/other?a=b", True), ("https://HOOKS.example.com.:443/ci", True),
        ("https://hooks.example.com:8443/ci", False), ("https://hooks.example.org/ci", False),
        ("https://sub.hooks.example.com/ci", False), ("http://hooks.example.com/ci", False),
        ("http://hooks.example.com:443/ci", False),
    ],
)  # fmt: skip
def test_headers_do_not_move_to_another_origin(make_api, migrated_sqlite, tmp_path, url, keeps):
    path = tmp_path / "private.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    api = make_api(f"sqlite:///{path}", ALLOW_PRIVATE_CALLBACKS="true")
    made = subscribe(api, headers={"Authorization": "Bearer secret"})
    assert made["url"] == "https://hooks.example.com/ci"
    path = f"/api/subscribers/{made['id']}"
    kept = {"Authorization": "***"} if keeps else {}
    assert api("PATCH", path, json={"url": url})["headers"] == kept
    assert api("GET", path)["headers"] == kept
    with db.reading(api.engine) as connection:
        row = subscribers.get(connection, made["id"])
    assert subscribers.custom_headers(row, (KEY,)) == ({"Authorization": "Bearer secret"} if keeps else {})
    anew = {"url": "https://third.example.com/", "headers": {"X-New": "1"}}
    assert api("PATCH", path, json=anew)["headers"] == {"X-New": "***"}
    assert api("PATCH", path, json={"url": "https://fourth.example.com/", "headers": {}})["headers"] == {}


def test_headers_that_no_key_opens_do_not_move_either(make_api, migrated_sqlite, tmp_path):
    path = tmp_path / "sealed.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    made = subscribe(make_api(f"sqlite:///{path}"), headers={"X-A": "1"})
    other = make_api(f"sqlite:///{path}", ENCRYPTION_KEYS=Fernet.generate_key().decode())
    other("PATCH", f"/api/subscribers/{made['id']}", json={"url": "https://hooks.example.org/ci"})
    with db.reading(other.engine) as connection:
        assert subscribers.custom_headers(subscribers.get(connection, made["id"]), (KEY,)) == {}


def test_a_change_takes_what_is_named_and_leaves_the_rest(api):
    made = subscribe(api, branches=["main"], description="old", headers={"X-A": "1"})
    path = f"/api/subscribers/{made['id']}"
    changed = api(
        "PATCH", path, json={"description": None, "events": ["build.failed"], "headers": {"X-B": "2"}}
    )
    assert (changed["description"], changed["events"], changed["headers"]) == (
        None,
        ["build.failed"],
        {"X-B": "***"},
    )
    assert (changed["branches"], changed["url"]) == (["main"], made["url"])
    assert {name: api("GET", path)[name] for name in SUBSCRIBER_FIELDS} == changed
    assert api("PATCH", path, json={})["events"] == ["build.failed"]
    api("PATCH", path, 422, json={"url": "https://10.0.0.1/"})
    api("PATCH", path, 422, json={"signing": "ed25519"})
    api("PATCH", path, 422)
    assert api("PATCH", path, json={"rate_limit_per_second": 5.0})["rate_limit_per_second"] == 5
    api("PATCH", path, json={"rate_limit_per_second": None})
    api("PATCH", path, 415, data=b'{"ordered": false}', content_type="text/plain")
    api("PATCH", "/api/subscribers/sub_none", 404, json={"events": []})
    api.record(github(C))
    assert api("GET", f"{path}/deliveries")["items"] == []
    api.record(github(F, run=2))
    assert [item["type"] for item in api("GET", f"{path}/deliveries")["items"]] == ["build.failed"]


def test_a_deleted_subscriber_is_gone_with_its_deliveries(api):
    made = subscribe(api)
    api.record(github(C))
    (item,) = api("GET", f"/api/subscribers/{made['id']}/deliveries")["items"]
    api("DELETE", f"/api/subscribers/{made['id']}", 204)
    for method, path in (
        ("DELETE", ""), ("GET", ""), ("GET", "/deliveries"), ("POST", "/test"), ("POST", "/enable"), ("POST",
        "/rotate-secret"),
    ):  # fmt: skip
        api(method, f"/api/subscribers/{made['id']}{path}", 404)
    api("GET", f"/api/deliveries/{item['id']}", 404)
    api("POST", f"/api/deliveries/{item['id']}/retry", 404)
    api.record(github(C, run=2))


def test_a_rotated_secret_leaves_the_old_one_valid_for_the_grace(api):
    made = subscribe(api)
    path = f"/api/subscribers/{made['id']}/rotate-secret"
    rotated = api("POST", path, json={"grace_seconds": 60})
    assert set(rotated) == {"secret", "previous_expires_at"}
    assert rotated["secret"] not in (made["secret"], None)
    with db.reading(api.engine) as connection:
        row = subscribers.get(connection, made["id"])
    assert subscribers.live_secrets(row, (KEY,), utc_now()) == (rotated["secret"], made["secret"])
    assert subscribers.live_secrets(row, (KEY,), utc_now() + timedelta(seconds=61)) == (rotated["secret"],)
    assert api("POST", path)["previous_expires_at"] is not None
    assert api("POST", path, json={"grace_seconds": 0})["previous_expires_at"] is None
    api("POST", path, 422, json={"grace_seconds": -1})
    api("POST", path, 422, json={"grace_seconds": 8 * 86_400})


def test_there_is_a_most_of_subscribers(make_api, migrated_sqlite, tmp_path):
    path = tmp_path / "full.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    api = make_api(f"sqlite:///{path}", MAX_SUBSCRIBERS="2")
    first, _ = subscribe(api), subscribe(api)
    refused = api("POST", "/api/subscribers", 422, json={"url": "https://hooks.example.com/ci"})
    assert "MAX_SUBSCRIBERS allows 2" in refused["detail"]
    api("PATCH", f"/api/subscribers/{first['id']}", json={"description": "still mine"})
    api("DELETE", f"/api/subscribers/{first['id']}", 204)
    subscribe(api)


def test_subscribers_are_listed_in_pages(api):
    ids = sorted(subscribe(api)["id"] for _ in range(5))
    items, count = pages(api, "/api/subscribers", limit=2)
    assert ([item["id"] for item in items], count) == (ids, 3)


def test_without_an_encryption_key_nothing_is_stored_in_clear(make_api, migrated_sqlite, tmp_path):
    path = tmp_path / "keys.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    made = subscribe(make_api(f"sqlite:///{path}"), headers={"X-A": "1"})
    other = make_api(f"sqlite:///{path}", ENCRYPTION_KEYS=Fernet.generate_key().decode())
    assert other("GET", f"/api/subscribers/{made['id']}")["headers"] is None
    assert "ENCRYPTION_KEYS" in other("POST", f"/api/subscribers/{made['id']}/rotate-secret", 503)["detail"]
    without = make_api(f"sqlite:///{path}", ENCRYPTION_KEYS="")
    assert (
        "ENCRYPTION_KEYS"
        in without("POST", "/api/subscribers", 503, json={"url": "https://example.com"})["detail"]
    )


# ---- deliveries ------------------------------------------------------------------------------


def test_a_delivery_with_its_attempts_and_its_retry(api):
    subscriber = subscribe(api)
    api.record(github(C), now=utc_now())
    assert attempt(api, 500, "http_500") == 1
    (item,) = api("GET", f"/api/subscribers/{subscriber['id']}/deliveries")["items"]
    assert set(item) == DELIVERY_FIELDS
    assert item["build_id"] == "github:Octo:Repo:1"
    assert (item["state"], item["reason"], item["attempt_count"], item["sequence"]) == (
        "pending",
        "http_500",
        1,
        1,
    )
    shown = api("GET", f"/api/deliveries/{item['id']}")
    assert set(shown) == DELIVERY_FIELDS | {"attempts"}
    (tried,) = shown["attempts"]
    shown_fields = {"number", "started_at", "duration_seconds", "status_code", "reason", "response", "note"}
    assert set(tried) == shown_fields
    assert (tried["number"], tried["status_code"], tried["duration_seconds"]) == (1, 500, 0.25)
    assert tried["response"] == "the answer"
    assert attempt(api, 500, "http_500", utc_now() + timedelta(seconds=120)) == 1
    assert api("GET", f"/api/deliveries/{item['id']}")["state"] == "dead"
    again = api("POST", f"/api/deliveries/{item['id']}/retry", 202)
    assert (again["state"], again["id"], again["reason"]) == ("pending", item["id"], None)
    assert queues.DELIVER in bells(api)
    assert attempt(api, 204) == 1
    final = api("GET", f"/api/deliveries/{item['id']}")
    assert (final["state"], final["next_attempt_at"], len(final["attempts"])) == ("delivered", None, 3)
    assert final["settled_at"] is not None


def test_deliveries_are_filtered_by_state_and_paged(api):
    subscriber = subscribe(api, ordered=False)
    api.record(*(github(C, run=run) for run in range(1, 4)), now=utc_now())
    assert attempt(api, 200) == 3
    api.record(github(C, run=4), github(C, run=5), now=utc_now())
    path = f"/api/subscribers/{subscriber['id']}/deliveries"
    items, count = pages(api, path, limit=2)
    assert [item["build_id"][-1] for item in items] == ["5", "4", "3", "2", "1"]
    assert count == 3
    assert [item["build_id"][-1] for item in pages(api, path, state="pending")[0]] == ["5", "4"]
    assert len(pages(api, path, state="delivered", limit=2)[0]) == 3


def test_a_test_event_goes_to_this_subscriber_only(api):
    subscriber, other = subscribe(api, events=["build.failed"]), subscribe(api)
    answer = api("POST", f"/api/subscribers/{subscriber['id']}/test", 202)
    assert list(answer) == ["delivery_id", "state", "status_code", "reason", "response"]
    assert bells(api) == {queues.DELIVER}
    shown = api("GET", f"/api/deliveries/{answer['delivery_id']}")
    assert (shown["type"], shown["build_id"], shown["state"]) == ("subscriber.test", None, "pending")
    assert api("GET", f"/api/subscribers/{other['id']}/deliveries")["items"] == []
    (made,) = api("GET", "/api/events")["items"]
    assert (made["type"], made["build_id"], made["data"]["subscriber_id"]) == (
        "subscriber.test",
        None,
        subscriber["id"],
    )
    assert set(made["data"]) == {"subscriber_id", "message"}
    assert attempt(api, 200) == 1


def test_a_disabled_subscriber_is_enabled_again(api):
    subscriber = subscribe(api)
    path = f"/api/subscribers/{subscriber['id']}"
    api.record(github(C), now=utc_now())
    (item,) = api("GET", f"{path}/deliveries")["items"]
    attempt(api, 500, "http_500")
    db.as_writer(api.engine, lambda write: endpoints.disable(write, subscriber["id"], "410 Gone", utc_now()))
    disabled = api("GET", path)
    assert (disabled["state"], disabled["disabled_reason"], disabled["failures"]) == (
        "disabled",
        "410 Gone",
        1,
    )
    assert api("GET", f"/api/deliveries/{item['id']}")["reason"] == "subscriber_disabled"
    api("POST", f"{path}/test", 409)
    api("POST", f"/api/deliveries/{item['id']}/retry", 409)
    enabled = api("POST", f"{path}/enable")
    assert set(enabled) == SUBSCRIBER_FIELDS
    assert (enabled["state"], enabled["disabled_reason"], enabled["failures"], enabled["failing_since"]) == (
        "active", None, 0, None,
    )  # fmt: skip
    api.record(github(C, run=2), now=utc_now())
    assert len(api("GET", f"{path}/deliveries?state=pending")["items"]) == 1
    api("POST", f"/api/deliveries/{item['id']}/retry", 202)
