"""A client of the API, and what its tests share; the fixtures that make one are in `conftest`."""

from cryptography.fernet import Fernet

from tests.facts import NOON, PACE
from webhook_app import (
    builds,
    db,
    deliveries,
    endpoints,
    queues,
    settings,
)
from webhook_app.app import create_app
from webhook_app.lifecycle import Detail, Observation, ObservedBy, State
from webhook_app.room import Room
from webhook_app.times import utc_now

ADMIN = "bootstrap-token-of-the-tests"
SECRET = "github-webhook-secret"
KEY = Fernet.generate_key().decode()


class Caller:
    """A client of one application that sends a token."""

    def __init__(self, app, token=ADMIN):
        self.app = app
        self.client = app.test_client()
        self.token = token
        self.engine = app.extensions["buildrelay"].engine

    def __call__(self, method, path, status=200, **more):
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        answer = self.client.open(path, method=method, headers=headers | more.pop("headers", {}), **more)
        assert answer.status_code == status, (method, path, answer.status_code, answer.text[:500])
        if status >= 400 and answer.mimetype != "application/json":
            assert answer.mimetype == "application/problem+json"
            assert answer.json["status"] == status
        return answer.json if answer.data else None

    def as_(self, token):
        return Caller(self.app, token)

    def record(self, *facts, now=NOON):
        return db.as_writer(self.engine, lambda write: builds.record(write, facts, now, PACE))

    def token_with(self, *scopes):
        return self("POST", "/api/tokens", 201, json={"name": "t", "scopes": list(scopes)})["token"]


def application(database_url, redis_url, **more):
    return create_app(
        settings.load(
            {
                "DATABASE_URL": database_url,
                "REDIS_URL": redis_url,
                "ADMIN_TOKEN": ADMIN,
                "ENCRYPTION_KEYS": KEY,
                "GITHUB_WEBHOOK_SECRET": SECRET,
                "GITLAB_WEBHOOK_SECRET": "gitlab-token-of-the-tests",
                "JENKINS_WEBHOOK_SECRET": "jenkins-token-of-the-tests",
                "JENKINS_URL": "https://jenkins.example.com",
                "BUILD_EVENT_TOKEN": "script-token-of-the-tests",
            }
            | more
        )
    )


def script(event_, run="run-1", state=State.IN_PROGRESS, **fields):
    return Observation(
        source="script",
        platform="script",
        observed_by=ObservedBy.REPORT,
        key=f"script:{run}",
        build_id=f"script:{run}",
        state=state,
        workflow="server",
        detail=Detail(type=event_, data=fields) if event_ != "heartbeat" else None,
    )


def pages(api, path, **query):
    """All items of a list, page by page, and how many pages there were."""
    items, cursor, count = [], None, 0
    while True:
        page = api("GET", path, query_string=query | ({"cursor": cursor} if cursor else {}))
        assert set(page) == {"items", "next_cursor"}
        items += page["items"]
        count += 1
        cursor = page["next_cursor"]
        if cursor is None:
            return items, count


def operations(api):
    document = api.client.get("/openapi.json").json
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method != "parameters":
                yield method.upper(), path, operation


def address(path):
    return (
        path.replace("{inbound_id}", "1").replace("{notification_id}", "1").replace("{", "").replace("}", "")
    )


def bells(api):
    redis = api.app.extensions["buildrelay"].redis
    return {bell for bell in queues.JOBS if redis.exists(queues.bell_key(bell))}


def subscribe(api, **more):
    return api("POST", "/api/subscribers", 201, json={"url": "https://hooks.example.com/ci"} | more)


def attempt(api, status, reason=None, now=None):
    """Claim what is due and settle it as if an endpoint had answered so."""
    now = now or utc_now()
    policy = deliveries.RetryPolicy((60.0,), lambda: 0.5)

    def unit(connection):
        claimed = deliveries.claim(connection, now, Room(30), 15).messages
        tried = [deliveries.Tried(message, now, 0.25, status, reason, "the answer") for message in claimed]
        deliveries.settle(connection, tried, now, policy)
        endpoints.note(connection, tried, now)
        return len(claimed)

    return db.in_transaction(api.engine, unit)


def jenkins(api, build, status=202):
    body = {"name": "web", "url": "job/web/", "build": {"url": "job/web/5/", "phase": "STARTED"} | build}
    headers = {"X-Build-Token": "jenkins-token-of-the-tests"}
    return api("POST", "/webhooks/jenkins", status, json=body, headers=headers)
