"""The webhooks of the simulated GitHub: made, changed, pinged, and what became of their deliveries.

A ping is really sent, in the caller's request.  The deliveries of builds are the sender's.
"""

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol
from urllib.parse import urlsplit

import orjson
import urllib3

from webhook_app.simulated import github_bodies as bodies
from webhook_app.simulated.facts import Repository
from webhook_app.simulated.github_api import GitHubApi, problem
from webhook_app.simulated.httpd import Request, Response, json_response
from webhook_app.simulated.targets import Target, github_delivery, post

MOST_HOOKS = 20
EVENTS = ("workflow_job", "workflow_run")
_FIRST_HOOK, _FIRST_PING = 600_000_001, 9_000_000_001


class Deliveries(Protocol):
    """What the API knows of the deliveries of builds; the sender keeps it."""

    def deliveries(self, repository: Repository, url: str = "") -> list[dict[str, Any]]:
        """Newest first, as `GET …/hooks/{id}/deliveries` lists them; `url`: only those sent there."""

    def delivery(self, number: int) -> dict[str, Any] | None:
        """One with its request and response."""

    def redeliver(self, delivery: int) -> bool:
        """Send one again; False for an unknown id."""


@dataclass
class Hook:
    """A webhook of one repository."""

    id: int
    repository: Repository
    config: dict[str, str]
    events: tuple[str, ...]
    active: bool
    created_at: float
    updated_at: float
    last_status: int | None = None

    @property
    def target(self) -> Target:
        """Where and how to send."""
        as_form = self.config.get("content_type") != "json"
        return Target(self.config["url"], self.config.get("secret", ""), self.id, as_form)


class Hooks:
    """`deliveries`: usually the sender.  `app`: the webhook of the App; it gets what no other hook wants."""

    def __init__(self, server: GitHubApi) -> None:
        self.server = server
        self.deliveries: Deliveries | None = None
        self.hooks: list[Hook] = []
        self.app: Target | None = None
        self._pings: list[dict[str, Any]] = []
        self._ids, self._ping_ids = count(_FIRST_HOOK), count(_FIRST_PING)
        self._http = urllib3.PoolManager(retries=False)

    def preset(self, url: str) -> None:
        """Every repository has one webhook already, which points there; none if it is empty."""
        now, places = self.server.world.now(), self.server.world.places["github"]
        config = {"content_type": "json", "insecure_ssl": "0", "secret": "unknown", "url": url}
        self.hooks = [
            Hook(bodies.HOOK_ID, place, dict(config), EVENTS, True, now, now) for place in places if url
        ]

    def target(self, repository: Repository, event: str) -> Target | None:
        """The hook of a repository that wants this event, else the App's; None if there is none."""
        hooks = (hook for hook in self.hooks if hook.repository == repository and hook.active)
        return next((hook.target for hook in hooks if event in hook.events or "*" in hook.events), self.app)

    def settle(self, target: Target, status: int | None) -> None:
        """A delivery of this hook was answered so (None: not at all)."""
        for hook in self.hooks:
            if hook.id == target.hook_id:
                hook.last_status = status or 0

    def routes(self) -> Mapping[str, Callable[..., Response]]:
        """Below `/repos/{owner}/{repo}`."""
        return {
            "/hooks": self._collection,
            r"/hooks/(\d+)": self._one,
            r"/hooks/(\d+)/pings": self._ping,
            r"/hooks/(\d+)/deliveries": self._list_deliveries,
            r"/hooks/(\d+)/deliveries/(\d+)": self._delivery,
            r"/hooks/(\d+)/deliveries/(\d+)/attempts": self._redeliver,
        }

    def app_answer(self, request: Request, path: str) -> Response:
        """Below `/app/hook`: its address and its deliveries, of whatever repository."""
        found = re.fullmatch(r"/(config|deliveries)(?:/(\d+))?(/attempts)?", path)
        if found is None or self.app is None:
            return problem(404, "Not Found")
        if found[1] == "config":
            config = {"content_type": "json", "insecure_ssl": "0", "secret": "********"}
            return json_response(config | {"url": self.app.url})
        places = self.server.world.places["github"] if self.deliveries else ()
        known = [one for place in places for one in self._builds_to(place, self.app.url)]
        if found[2] is None:
            known.sort(key=lambda one: -int(one["id"]))
            return self.server.cursored(request, _with_status(request, known))
        if int(found[2]) not in [one["id"] for one in known] or self.deliveries is None:
            return problem(404, "Not Found")
        if found[3]:
            self.deliveries.redeliver(int(found[2]))
            return json_response({}, 202)
        return json_response(self.deliveries.delivery(int(found[2])))

    def _builds_to(self, repository: Repository, url: str) -> list[dict[str, Any]]:
        return self.deliveries.deliveries(repository, url) if self.deliveries else []

    # The hooks themselves -----------------------------------------------------------------------

    def _of(self, repository: Repository) -> list[Hook]:
        return [hook for hook in self.hooks if hook.repository == repository]

    def _find(self, repository: Repository, hook_id: str) -> Hook | None:
        return next((hook for hook in self._of(repository) if str(hook.id) == hook_id), None)

    def _collection(self, request: Request, repository: Repository) -> Response:
        if request.method == "POST":
            return self._create(repository, _content(request))
        shown = [self._body(hook) for hook in self._of(repository)]
        return self.server.paged(request, shown, 30)

    def _create(self, repository: Repository, asked: Mapping[str, Any]) -> Response:
        siblings, config = self._of(repository), asked.get("config", {})
        fault = _unfit(config) or (
            'The "push" event cannot have more than 20 hooks' if len(siblings) >= MOST_HOOKS else None
        )
        if any(hook.config["url"] == config.get("url") for hook in siblings):
            fault = "Hook already exists on this repository"
        if fault:
            return self.server.invalid("Hook", fault)
        now = self.server.world.now()
        hook = Hook(
            next(self._ids), repository, {"content_type": "form", "insecure_ssl": "0", **config},
            tuple(asked.get("events", ("push",))), asked.get("active", True), now, now,
        )  # fmt: skip
        self.hooks.append(hook)
        self._send_ping(hook)
        return json_response(self._body(hook), 201)

    def _one(self, request: Request, repository: Repository, hook_id: str) -> Response:
        hook = self._find(repository, hook_id)
        if hook is None:
            return problem(404, "Not Found")
        if request.method == "DELETE":
            self.hooks.remove(hook)
            return Response(204)
        if request.method == "PATCH":
            return self._change(hook, _content(request))
        return json_response(self._body(hook))

    def _change(self, hook: Hook, asked: Mapping[str, Any]) -> Response:
        """A `config` replaces the whole one: without a `secret` in it, the secret is gone."""
        config = asked.get("config")
        if config is not None and (fault := _unfit(config)):
            return self.server.invalid("Hook", fault)
        if config is not None:
            hook.config = {"content_type": "form", "insecure_ssl": "0", **config}
        wanted = [*asked.get("events", hook.events), *asked.get("add_events", ())]
        hook.events = tuple(
            dict.fromkeys(event for event in wanted if event not in asked.get("remove_events", ()))
        )
        hook.active = asked.get("active", hook.active)
        hook.updated_at = self.server.world.now()
        return json_response(self._body(hook))

    def _body(self, hook: Hook) -> dict[str, Any]:
        last = _last_response(hook.last_status)
        facts = {"events": list(hook.events), "active": hook.active, "last_response": last, "id": hook.id}
        times = {"created_at": bodies.iso(hook.created_at), "updated_at": bodies.iso(hook.updated_at)}
        url = hook.config["url"]
        body = bodies.hook(self.server.shown_as(hook.repository), self.server.url, url, hook.id)
        secret = {"secret": "********"} if hook.config.get("secret") else {}
        return body | facts | times | {"config": hook.config | secret}

    # Pings and deliveries -----------------------------------------------------------------------

    def _ping(self, request: Request, repository: Repository, hook_id: str) -> Response:
        hook = self._find(repository, hook_id)
        if hook is None or request.method != "POST":
            return problem(404, "Not Found")
        self._send_ping(hook)
        return Response(204)

    def _send_ping(self, hook: Hook, guid: str = "") -> None:
        repository = self.server.shown_as(hook.repository)
        content = bodies.ping(repository, self.server.url, hook.config["url"], hook.id)
        redelivery, guid = bool(guid), guid or str(uuid.uuid4())
        headers, body = github_delivery(hook.target, "ping", guid, repository, orjson.dumps(content))
        sent = post(self._http, hook.config["url"], headers, body, 10.0)
        hook.last_status = sent.status or 0
        self._pings.insert(0, bodies.delivery(
            next(self._ping_ids), guid, self.server.world.now(), sent.status, sent.seconds, ("ping", None),
            hook.repository.id, redelivery,
        ) | {
            "url": hook.config["url"],
            "request": {"headers": headers, "payload": content},
            "response": {"headers": {}, "payload": sent.body.decode(errors="replace")},
        })  # fmt: skip

    def _known(self, hook: Hook) -> list[dict[str, Any]]:
        """Every delivery of a hook, newest first."""
        url = hook.config["url"]
        wanted = "" if hook.id == bodies.HOOK_ID else url
        builds = self._builds_to(hook.repository, wanted)
        pings = [
            {key: value for key, value in ping.items() if key not in ("url", "request", "response")}
            for ping in self._pings
            if ping["url"] == url and ping["repository_id"] == hook.repository.id
        ]
        return sorted([*pings, *builds], key=lambda one: str(one["delivered_at"]), reverse=True)

    def _list_deliveries(self, request: Request, repository: Repository, hook_id: str) -> Response:
        """Paged by `cursor`, which only the `Link` header tells."""
        hook = self._find(repository, hook_id)
        if hook is None:
            return problem(404, "Not Found")
        return self.server.cursored(request, _with_status(request, self._known(hook)))

    def _delivery(self, request: Request, repository: Repository, hook_id: str, number: str) -> Response:
        hook = self._find(repository, hook_id)
        if hook is None or int(number) not in [one["id"] for one in self._known(hook)]:
            return problem(404, "Not Found")
        ping = next((one for one in self._pings if str(one["id"]) == number), None)
        return json_response(ping or (self.deliveries and self.deliveries.delivery(int(number))))

    def _redeliver(self, request: Request, repository: Repository, hook_id: str, number: str) -> Response:
        hook = self._find(repository, hook_id)
        if hook is None or request.method != "POST":
            return problem(404, "Not Found")
        ping = next((one for one in self._pings if str(one["id"]) == number), None)
        if ping:
            self._send_ping(hook, ping["guid"])
        elif self.deliveries is None or not self.deliveries.redeliver(int(number)):
            return problem(404, "Not Found")
        return json_response({}, 202)


def _with_status(request: Request, deliveries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    status = request.parameter("status")
    return [one for one in deliveries if not status or (one["status"] == "OK") == (status == "success")]


def _content(request: Request) -> dict[str, Any]:
    try:
        content = orjson.loads(request.body or b"{}")
    except orjson.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}


def _unfit(config: Mapping[str, Any]) -> str | None:
    parts = urlsplit(str(config.get("url", "")))
    return None if parts.scheme in ("http", "https") and parts.netloc else "url is missing a scheme"


def _last_response(status: int | None) -> dict[str, Any]:
    if status is None:
        return {"code": None, "status": "unused", "message": None}
    if 200 <= status < 300:
        return {"code": status, "status": "active", "message": "OK"}
    return {"code": status, "status": "invalid", "message": f"Invalid HTTP Response: {status}"}
