"""The webhooks of the simulated GitLab: made, changed, tested, sent again, and switched off when they fail.

What became of the pushes is the sender's; a test is sent from here, in the caller's request.
"""

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import urllib3

from webhook_app.simulated import gitlab_bodies as bodies
from webhook_app.simulated.facts import Event, Repository
from webhook_app.simulated.gitlab_api import GitLabApi
from webhook_app.simulated.httpd import Request, Response, json_response
from webhook_app.simulated.sender import Push, Secrets, Sent, encode
from webhook_app.simulated.targets import Target, post

FIRST_PAUSE_AFTER, GIVE_UP_AFTER = 4, 40
LONGEST_PAUSE_SECONDS = 86_400.0
EVENTS_KEPT_SECONDS = 7 * 86_400.0
RESENDS_A_MINUTE = 5
_SWITCHES = (
    "push_events", "tag_push_events", "merge_requests_events", "issues_events", "confidential_issues_events",
    "note_events", "confidential_note_events", "job_events", "pipeline_events", "wiki_page_events",
    "deployment_events", "feature_flag_events", "releases_events", "milestone_events", "emoji_events",
    "resource_access_token_events", "repository_update_events",
)  # fmt: skip
_SWITCH_OF = {"Pipeline Hook": "pipeline_events", "Job Hook": "job_events"}


class Sendings(Protocol):
    """What the API knows of sent events; the sender keeps it."""

    def record(self, repository: Repository, url: str = "") -> list[tuple[int, Sent]]:
        """Newest first, each under its number; `url`: only what went there."""

    def request_of(self, sent: Sent) -> tuple[dict[str, str], bytes]:
        """Headers and body."""

    def resend(self, number: int) -> Sent | None:
        """Send one again at once; None for an unknown number."""


@dataclass
class Hook:
    """A webhook of one project; `token` and `signing_token` are never shown again."""

    id: int
    repository: Repository
    url: str
    created_at: float
    token: str = ""
    signing_token: str = ""
    name: str | None = None
    description: str | None = None
    enable_ssl_verification: bool = True
    switches: dict[str, bool] = field(default_factory=lambda: {"push_events": True})
    failures: int = 0
    disabled_until: float | None = None
    resent_at: list[float] = field(default_factory=list)

    @property
    def target(self) -> Target:
        """Where and how to send; a signing token counts before a plain one."""
        return Target(self.url, self.signing_token or self.token, self.id)


class Hooks:
    """`auto_disable`: GitLab.com's rule for hooks that fail.  `sendings`: usually the sender."""

    def __init__(self, server: GitLabApi) -> None:
        self.server = server
        self.sendings: Sendings | None = None
        self.auto_disable = False
        self.hooks: list[Hook] = []
        self._ids = count(81_001)
        self._http = urllib3.PoolManager(retries=False)

    # What the sender asks -----------------------------------------------------------------------

    def target(self, repository: Repository, event: str) -> Target | None:
        """The hook of a project that wants this event and isn't disabled; None if there is none."""
        for hook in self._of(repository):
            if hook.switches.get(_SWITCH_OF[event]) and self._status(hook) == "executable":
                return hook.target
        return None

    def settle(self, target: Target, status: int | None) -> None:
        """Note the answer; one below 400 clears the failures.

        The 4th failure in a row disables the hook for a minute, each further one for twice as long, the
        40th until a test succeeds.
        """
        hook = next((hook for hook in self.hooks if hook.id == target.hook_id), None)
        if hook is None:
            return
        if status is not None and status < 400:
            hook.failures, hook.disabled_until = 0, None
            return
        hook.failures += 1
        if hook.failures >= FIRST_PAUSE_AFTER:
            pause = min(60.0 * 2 ** (hook.failures - FIRST_PAUSE_AFTER), LONGEST_PAUSE_SECONDS)
            hook.disabled_until = self.server.world.now() + pause

    def _status(self, hook: Hook) -> str:
        if not self.auto_disable:
            return "executable"
        if hook.failures >= GIVE_UP_AFTER:
            return "disabled"
        paused = hook.disabled_until is not None and self.server.world.now() < hook.disabled_until
        return "temporarily_disabled" if paused else "executable"

    # The API ------------------------------------------------------------------------------------

    def routes(self) -> Mapping[str, Callable[..., Response]]:
        """Below `/projects/:id`."""
        return {
            "/hooks": self._collection,
            r"/hooks/(\d+)": self._one,
            r"/hooks/(\d+)/test/(\w+)": self._test,
            r"/hooks/(\d+)/events": self._events,
            r"/hooks/(\d+)/events/(\d+)/resend": self._resend,
        }

    def _of(self, repository: Repository) -> list[Hook]:
        return [hook for hook in self.hooks if hook.repository == repository]

    def _find(self, repository: Repository, hook_id: str) -> Hook | None:
        return next((hook for hook in self._of(repository) if str(hook.id) == hook_id), None)

    def _collection(self, request: Request, repository: Repository) -> Response:
        if request.method != "POST":
            return self.server.paged(request, [self._body(hook) for hook in self._of(repository)])
        hook = Hook(0, repository, "", self.server.world.now())
        if refusal := _apply(hook, _content(request)):
            return refusal
        hook.id = next(self._ids)
        self.hooks.append(hook)
        return json_response(self._body(hook), 201)

    def _one(self, request: Request, repository: Repository, hook_id: str) -> Response:
        hook = self._find(repository, hook_id)
        if hook is None:
            return json_response({"message": "404 Not found"}, 404)
        if request.method == "DELETE":
            self.hooks.remove(hook)
            return Response(204)
        if request.method == "PUT" and (refusal := _apply(hook, _content(request))):
            return refusal
        return json_response(self._body(hook))

    def _body(self, hook: Hook) -> dict[str, Any]:
        until = hook.disabled_until if self._status(hook) == "temporarily_disabled" else None
        return {
            "id": hook.id, "url": hook.url, "name": hook.name, "description": hook.description,
            "created_at": bodies.iso(hook.created_at), "project_id": hook.repository.id,
            **{name: hook.switches.get(name, False) for name in _SWITCHES},
            "enable_ssl_verification": hook.enable_ssl_verification, "alert_status": self._status(hook),
            "disabled_until": bodies.iso(until), "url_variables": [], "push_events_branch_filter": None,
            "branch_filter_strategy": "wildcard", "custom_webhook_template": "", "custom_headers": [],
            "token_present": bool(hook.token), "signing_token_present": bool(hook.signing_token),
        }  # fmt: skip

    # Tests and events ---------------------------------------------------------------------------

    def _test(self, request: Request, repository: Repository, hook_id: str, trigger: str) -> Response:
        """The newest real pipeline, under a fresh id; a 2xx brings a disabled hook back."""
        hook, newest = self._find(repository, hook_id), self.server.newest(repository)
        if hook is None or request.method != "POST":
            return json_response({"message": "404 Not found"}, 404)
        if newest is None or trigger != "pipeline_events":
            return json_response({"message": "Ensure the project has CI jobs."}, 422)
        build, moment = newest
        event = Event("Pipeline Hook", moment.status)
        push = Push(self.server.world.now(), build, moment, event, str(uuid.uuid4()))
        nothing, now = Secrets("", "", ""), int(self.server.world.now())
        headers, body = encode(push, self.server.url, nothing, now, hook.target)
        status = post(self._http, hook.url, headers, body, 10.0).status
        self.settle(hook.target, status)
        if status is None or status >= 400:
            return json_response({"message": f"Hook executed but returned HTTP {status}"}, 422)
        return json_response({"message": "201 Created"}, 201)

    def _events(self, request: Request, repository: Repository, hook_id: str) -> Response:
        hook = self._find(repository, hook_id)
        if hook is None:
            return json_response({"message": "404 Not found"}, 404)
        wanted = request.parameter("status")
        events = [
            self._event(number, sent)
            for number, sent in self._sent(hook)
            if wanted in ("", _class_of(sent.status), str(sent.status))
        ]
        return self.server.paged(request, events)

    def _sent(self, hook: Hook) -> list[tuple[int, Sent]]:
        """What the log of a hook has: seven days, and nothing of what was lost on the way."""
        since = self.server.world.now() - EVENTS_KEPT_SECONDS
        listed = self.sendings.record(hook.repository, hook.url) if self.sendings else []
        return [(number, sent) for number, sent in listed if sent.at > since and not sent.push.lost]

    def _event(self, number: int, sent: Sent) -> dict[str, Any]:
        assert self.sendings
        headers, body = self.sendings.request_of(sent)
        secret = {name: "[REDACTED]" for name in ("X-Gitlab-Token",) if name in headers}
        return {
            "id": number, "url": sent.target.url if sent.target else "",
            "trigger": _SWITCH_OF[sent.push.event.name].replace("events", "hooks"),
            "request_headers": headers | secret, "request_data": json.loads(body), "response_headers": {},
            "response_body": sent.answer.decode(errors="replace"), "execution_duration": sent.seconds,
            "response_status": "internal error" if sent.status is None else str(sent.status),
        }  # fmt: skip

    def _resend(self, request: Request, repository: Repository, hook_id: str, number: str) -> Response:
        hook = self._find(repository, hook_id)
        known = hook and int(number) in [each for each, _ in self._sent(hook)]
        if hook is None or not known or self.sendings is None or request.method != "POST":
            return json_response({"message": "404 Not found"}, 404)
        now = self.server.world.now()
        hook.resent_at = [at for at in hook.resent_at if at > now - 60]
        if len(hook.resent_at) >= RESENDS_A_MINUTE:
            text = "This endpoint has been requested too many times. Try again later."
            return json_response({"message": {"error": text}}, 429)
        hook.resent_at.append(now)
        sent = self.sendings.resend(int(number))
        return json_response({"response_status": sent.status if sent else None}, 201)


def _apply(hook: Hook, asked: Mapping[str, Any]) -> Response | None:
    """Take over what was asked for; the answer if it doesn't fit, and then nothing is changed."""
    if not asked.get("url"):
        return json_response({"error": "url is missing"}, 400)
    parts = urlsplit(str(asked["url"]))
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return json_response({"error": "Invalid url given"}, 422)
    signing_token = asked.get("signing_token", hook.signing_token)
    if signing_token and not str(signing_token).startswith("whsec_"):
        return json_response({"message": {"signing_token": ["is invalid"]}}, 422)
    hook.url, hook.signing_token = str(asked["url"]), signing_token or ""
    for name in ("token", "name", "description", "enable_ssl_verification"):
        setattr(hook, name, asked.get(name, getattr(hook, name)))
    hook.switches |= {name: asked[name] in (True, "true", "1") for name in _SWITCHES if name in asked}
    return None


def _class_of(status: int | None) -> str:
    if status is None or status >= 500:
        return "server_failure"
    return "client_failure" if status >= 400 else "successful"


def _content(request: Request) -> dict[str, Any]:
    """The parameters of a body, JSON or a form."""
    if "json" not in request.headers.get("content-type", "json"):
        return {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
    try:
        content = json.loads(request.body or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
