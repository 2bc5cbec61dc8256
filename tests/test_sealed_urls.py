"""Callback URLs hold secrets: stored sealed, shown whole only to those who may change them, never logged."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import select, update

from jobs.deliver import deliver
from jobs.resources import Resources
from tests.caller import KEY, subscribe
from tests.facts import github
from webhook_app import db, destinations, models, outbound, room, sealing, subscribers, up
from webhook_app.lifecycle import State
from webhook_app.simulated.subscriber import Subscriber
from webhook_app.times import utc_now

SLACK = "https://hooks.slack.com/services/T0001/B0002/s3cr3t-of-the-channel"
SHOWN = "https://hooks.slack.com/ …nnel"
TEAMS = "https://prod-1.example.com:8443/workflows?sig=Zm9vYmFy"
NEWER = Fernet.generate_key().decode()


def stored(api, id_):
    with db.reading(api.engine) as connection:
        return subscribers.get(connection, id_)


def write_in_clear(api, id_, url):
    """As a version does that knows nothing of sealed URLs: the other column stays."""
    columns = models.subscribers.c
    with api.engine.begin() as connection:
        connection.execute(update(models.subscribers).where(columns.id == id_).values(url=url))


def never_sealed(api, id_, url):
    write_in_clear(api, id_, url)
    with api.engine.begin() as connection:
        connection.execute(update(models.subscribers).values(sealed_url=None))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (SLACK, SHOWN), (TEAMS, "https://prod-1.example.com:8443/ …YmFy"),
        ("https://example.com/ab", "https://example.com/ …ab"), ("https://example.com?token=abcdef", "https://example.com/ …cdef"),
        ("https://example.com", "https://example.com"), ("https://example.com/", "https://example.com/"),
        ("http://[::1]:80/secret", "http://[::1]:80/ …cret"), ("https://user:pw@example.com/", "https://example.com/ …"),
        ("https://[broken/secret", "…"),
    ],
)  # fmt: skip
def test_what_everybody_may_see_of_a_url(url, shown):
    assert destinations.shown(url) == shown


@pytest.mark.parametrize("url", [SLACK, TEAMS, "http://127.0.0.1:9/secret", "https://example.com?a=b"])
def test_nothing_is_ever_sent_to_the_shown_form(url):
    """A process of an earlier version, beside a newer one, takes it for the URL."""
    shown = destinations.shown(url)
    assert destinations.origin(shown) == destinations.origin(url)
    assert room.host_of(shown) == room.host_of(url)
    with pytest.raises(destinations.OutboundError, match="space") as refused:
        outbound.send("POST", shown, {}, b"", timeout_seconds=1, byte_cap=1, guard=False)
    assert refused.value.reason == "bad_url"


def test_a_url_is_stored_sealed_and_shown_by_scope(api):
    made = subscribe(api, url=SLACK)
    path = f"/api/subscribers/{made['id']}"
    row = stored(api, made["id"])
    assert "s3cr3t" not in str(row)
    assert (row["url"], sealing.unseal(row["sealed_url"], (KEY,))) == (SHOWN, SLACK)
    assert made["url"] == SLACK
    for scope, seen in (("read", SHOWN), ("write", SLACK), ("admin", SLACK)):
        caller = api.as_(api.token_with(scope))
        assert caller("GET", path)["url"] == seen
        assert [item["url"] for item in caller("GET", "/api/subscribers")["items"]] == [seen]
    assert api("PATCH", path, json={"url": TEAMS})["url"] == TEAMS
    assert "workflows" not in str(stored(api, made["id"]))


def test_a_read_token_sees_no_more_of_a_url_in_clear(api):
    made = subscribe(api)
    never_sealed(api, made["id"], SLACK)
    reader = api.as_(api.token_with("read"))
    assert reader("GET", f"/api/subscribers/{made['id']}")["url"] == SHOWN
    assert api("GET", f"/api/subscribers/{made['id']}")["url"] == SLACK


def test_the_same_url_given_anew_is_no_new_one(api):
    made = subscribe(api, url=SLACK)
    path = f"/api/subscribers/{made['id']}"
    subscriber = models.subscribers.c
    with api.engine.begin() as connection:
        connection.execute(update(models.subscribers).where(subscriber.id == made["id"]).values(failures=3))
    assert api("PATCH", path, json={"url": SLACK})["failures"] == 3
    assert api("PATCH", path, json={"url": SLACK + "2"})["failures"] == 0


def test_the_start_and_rekey_seal_what_is_in_clear(make_api, store_url):
    api = make_api(store_url)
    settings = api.app.extensions["buildrelay"].settings
    one, two = subscribe(api), subscribe(api)
    for made in (one, two):
        never_sealed(api, made["id"], SLACK)
    assert subscribers.callback_url(stored(api, one["id"]), ()) == SLACK
    up.prepare(settings)
    for made in (one, two):
        row = stored(api, made["id"])
        assert (row["url"], subscribers.callback_url(row, (KEY,))) == (SHOWN, SLACK)
    write_in_clear(api, two["id"], TEAMS)
    subscribers.rekey(api.engine, (NEWER, KEY))
    sealing.forget()
    assert subscribers.callback_url(stored(api, one["id"]), (NEWER,)) == SLACK
    assert subscribers.callback_url(stored(api, two["id"]), (NEWER,)) == TEAMS
    assert "workflows" not in str(stored(api, two["id"]))


def test_a_url_that_an_older_process_writes_beside_us_counts(api):
    made = subscribe(api, url=SLACK)
    for url in ("https://example.com/elsewhere", "https://example.com"):
        write_in_clear(api, made["id"], url)
        assert subscribers.callback_url(stored(api, made["id"]), (KEY,)) == url
        assert api("GET", f"/api/subscribers/{made['id']}")["url"] == url


def test_the_settings_change_their_subscriber_only_when_they_change(api):
    def sync(url, key=KEY):
        return db.as_writer(
            api.engine, lambda write: subscribers.sync_static(write, url, "", (key,), utc_now())
        )

    assert (sync(SLACK), sync(SLACK), sync(TEAMS), sync(TEAMS)) == (True, False, True, False)
    assert (sync(TEAMS, NEWER), sync(TEAMS, NEWER)) == (True, False)
    row = stored(api, subscribers.STATIC_ID)
    assert (row["url"], subscribers.callback_url(row, (NEWER,))) == (destinations.shown(TEAMS), TEAMS)


@pytest.fixture
def make_held(make_api, store_url, redis_client):
    """`make_held(**settings)`: a caller of the API, and what the delivery job works with."""
    with ThreadPoolExecutor(4) as threads:

        def make(**more):
            api = make_api(store_url, ALLOW_PRIVATE_CALLBACKS="true", **more)
            held = api.app.extensions["buildrelay"]
            return api, Resources(held.settings, api.engine, redis_client, threads)

        yield make


def test_messages_go_to_the_sealed_url_and_no_line_tells_it(make_held, caplog):
    caplog.set_level(logging.DEBUG)
    api, held = make_held(DELIVERY_RETRY_SCHEDULE="0")
    with Subscriber() as endpoint:
        url = f"{endpoint.url.rstrip('/')}?key=s3cr3t-of-the-channel"
        made = subscribe(api, url=url)
        endpoint.add_secret(made["secret"])
        api.record(github(State.QUEUED), now=utc_now())
        deliver(held)
        assert endpoint.sequences("github:Octo:Repo:1") == (1,)
    api.record(github(State.COMPLETED), now=utc_now())
    deliver(held)  # refused: nobody listens there any more
    assert "s3cr3t" not in caplog.text
    reader = api.as_(api.token_with("read"))
    items = reader("GET", f"/api/subscribers/{made['id']}/deliveries")["items"]
    shown = [reader("GET", f"/api/deliveries/{item['id']}") for item in items]
    assert {tried["reason"] for one in shown for tried in one["attempts"]} == {None, "connect"}
    assert "s3cr3t" not in str(shown)
    with db.reading(api.engine) as connection:
        notices = connection.execute(select(models.notices)).mappings().all()
    assert "s3cr3t" not in str(notices)


def test_without_the_key_of_a_url_its_messages_wait(make_held):
    api, _ = make_held()
    made = subscribe(api, url="http://127.0.0.1:9/secret")
    api.record(github(State.QUEUED), now=utc_now())
    values = {"secrets": sealing.seal(sealing.unseal(stored(api, made["id"])["secrets"], (KEY,)), (NEWER,))}
    with api.engine.begin() as connection:
        connection.execute(update(models.subscribers).values(**values, headers=None))
    other, held = make_held(ENCRYPTION_KEYS=NEWER)
    deliver(held)
    (item,) = other("GET", f"/api/subscribers/{made['id']}/deliveries")["items"]
    assert (item["state"], item["reason"], item["attempt_count"]) == ("pending", "no_key", 0)
    assert other("GET", f"/api/subscribers/{made['id']}")["url"] == "http://127.0.0.1:9/ …cret"
    with db.reading(other.engine) as connection:
        assert subscribers.closed(connection, (NEWER,)) == [made["id"]]
