"""Where a simulated platform sends its webhooks, and how one is put on the wire."""

import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol
from urllib.parse import urlencode

import urllib3

from webhook_app.signing import github_signature
from webhook_app.simulated.facts import Repository
from webhook_app.simulated.github_bodies import HOOK_ID


class Target(NamedTuple):
    """A webhook as its sender needs it; `secret` empty: nothing is signed.  `as_form`: GitHub's old form."""

    url: str
    secret: str
    hook_id: int
    as_form: bool = False


class Hooks(Protocol):
    """The webhooks registered with a simulated platform."""

    def target(self, repository: Repository, event: str) -> Target | None:
        """Where this event goes now; None: nowhere, since no hook wants it or it is disabled."""

    def settle(self, target: Target, status: int | None) -> None:
        """It was answered so (None: not at all)."""


class Answer(NamedTuple):
    """What came back: `status` None without an answer; the first bytes of the body; how long it took."""

    status: int | None
    body: bytes
    seconds: float


def post(
    http: urllib3.PoolManager, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float
) -> Answer:
    """Post once, following nothing."""
    begun = time.monotonic()
    try:
        answer = http.request(
            "POST", url, body=body, headers=headers, timeout=timeout_seconds, redirect=False
        )
    except urllib3.exceptions.HTTPError:
        return Answer(None, b"", time.monotonic() - begun)
    return Answer(answer.status, answer.data[:4096], time.monotonic() - begun)


def github_delivery(
    target: Target, event: str, delivery_id: str, repository: Repository, body: bytes
) -> tuple[dict[str, str], bytes]:
    """Headers and body of a GitHub delivery as this hook wants it."""
    if target.as_form:
        body = urlencode({"payload": body}).encode()
    headers = github_headers(event, delivery_id, repository, target.secret, body, target.hook_id)
    kinds = {True: "application/x-www-form-urlencoded", False: "application/json"}
    return headers | {"Content-Type": kinds[target.as_form]}, body


def github_headers(
    event: str, delivery_id: str, repository: Repository, secret: str, body: bytes, hook_id: int = HOOK_ID
) -> dict[str, str]:
    """The headers of one GitHub delivery; without a secret it isn't signed."""
    return {
        "Accept": "*/*",
        "Content-Type": "application/json",
        "User-Agent": "GitHub-Hookshot/5a1e9c3",
        "X-GitHub-Delivery": delivery_id,
        "X-GitHub-Event": event,
        "X-GitHub-Hook-ID": str(hook_id),
        "X-GitHub-Hook-Installation-Target-ID": str(repository.id),
        "X-GitHub-Hook-Installation-Target-Type": "repository",
        **({"X-Hub-Signature-256": github_signature(secret, body)} if secret else {}),
    }
