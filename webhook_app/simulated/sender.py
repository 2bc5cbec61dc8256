"""Pushes the platforms' signed webhooks to BuildRelay, and loses, doubles and reorders a share of them.

What happens to each push is decided by the seed alone, before anything is sent.  As on the real
platforms nothing is sent again after a failure (GitHub, GitLab and Jenkins ignore it), unless
`retry_until_accepted` is asked for.  A push counts as accepted only with a 2xx answer.
"""

import heapq
import json
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import urllib3

from webhook_app.signing import github_signature, sign_v1
from webhook_app.simulated import github_bodies, gitlab_bodies, jenkins_bodies
from webhook_app.simulated.facts import Build, Event, Moment, Repository, seeded
from webhook_app.simulated.targets import Answer, Hooks, Target, github_delivery, github_headers, post
from webhook_app.simulated.world import World

PATHS = {"github": "/webhooks/github", "gitlab": "/webhooks/gitlab", "jenkins": "/webhooks/jenkins"}
TIMEOUTS_SECONDS = {"github": 10.0, "gitlab": 10.0, "jenkins": 30.0}
"""How long each platform waits for an answer."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """The webhook secrets; GitLab's is a signing token (`whsec_…`) or a plain token."""

    github: str
    gitlab: str
    jenkins: str


@dataclass(frozen=True, slots=True)
class Push:
    """One webhook to send at `at` (POSIX seconds).

    `copy` is 1 for the second sending of a doubled event, which has the same delivery id.  `lost`:
    never sent.  `late`: held back until a later push of the same build has gone out.
    """

    at: float
    build: Build
    moment: Moment
    event: Event
    delivery_id: str
    copy: int = 0
    lost: bool = False
    late: bool = False
    redelivery: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a push: `status` None is a lost push or one without an answer; `seconds` it took.

    `target` None: no hook wanted it.  `answer`: the first bytes that came back.
    """

    push: Push
    status: int | None
    at: float
    seconds: float
    target: Target | None = None
    answer: bytes = b""

    @property
    def accepted(self) -> bool:
        """Was it answered with a 2xx?"""
        return self.status is not None and 200 <= self.status < 300


def plan_pushes(
    builds: Iterable[Build], seed: int, loss: float = 0.0, double: float = 0.0, reorder: float = 0.0
) -> list[Push]:
    """All pushes of these builds in the order of sending, the lost ones included.

    `loss`, `double`, `reorder`: shares from 0 to 1.  A doubled or late push is never a lost one, and
    the last push of a build can't be late, since nothing comes after it.
    """
    pushes = [push for build in builds for push in _plan_build(build, seed, loss, double, reorder)]
    return sorted(pushes, key=lambda push: push.at)


def _plan_build(build: Build, seed: int, loss: float, double: float, reorder: float) -> list[Push]:
    events = [(moment, event) for moment in build.moments for event in moment.events]
    on_time: list[float] = []  # when the later pushes go out that are neither lost nor late
    planned: list[Push] = []
    for index in reversed(range(len(events))):
        moment, event = events[index]
        rng = seeded(seed, "push", build.build_id, index)
        delivery_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        lost, twice, held = rng.random() < loss, rng.random() < double, rng.random() < reorder
        late = held and bool(on_time) and not lost
        at = rng.choice(on_time[-3:]) + 0.001 if late else moment.at
        push = Push(at, build, moment, event, delivery_id, lost=lost, late=late)
        planned.append(push)
        if twice and not lost:
            planned.append(replace(push, at=at + rng.uniform(0.01, 1.0), copy=1))
        if not lost and not late:
            on_time.append(at)
    return planned[::-1]


def encode(
    push: Push, base: str, secrets: Secrets, timestamp: int, target: Target | None = None
) -> tuple[dict[str, str], bytes]:
    """Headers and body of a push, signed; `base` is the platform's own address, `timestamp` Unix seconds.

    `target`: the hook it is for, whose secret counts then.
    """
    if target:
        secrets = replace(secrets, **{push.build.platform: target.secret})
    if target and target.as_form:
        body = _json(github_bodies.webhook(push.build, push.moment, push.event, base))
        return github_delivery(target, push.event.name, push.delivery_id, push.build.repository, body)
    maker = {"github": _github, "gitlab": _gitlab, "jenkins": _jenkins}[push.build.platform]
    headers, body = maker(push, base, secrets, timestamp)
    if target and push.build.platform == "github":
        headers["X-GitHub-Hook-ID"] = str(target.hook_id)
    return headers, body


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _github(push: Push, base: str, secrets: Secrets, _timestamp: int) -> tuple[dict[str, str], bytes]:
    body = _json(github_bodies.webhook(push.build, push.moment, push.event, base))
    headers = github_headers(push.event.name, push.delivery_id, push.build.repository, secrets.github, body)
    return headers, body


def _gitlab(push: Push, base: str, secrets: Secrets, timestamp: int) -> tuple[dict[str, str], bytes]:
    body = _json(gitlab_bodies.webhook(push.build, push.moment, push.event, base))
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "GitLab/19.6.1-ee",
        "Idempotency-Key": push.delivery_id,
        "webhook-id": push.delivery_id,
        "webhook-timestamp": str(timestamp),
        "X-Gitlab-Event": push.event.name,
        "X-Gitlab-Event-UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, push.build.build_id)),
        "X-Gitlab-Instance": base,
        "X-Gitlab-Webhook-UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{push.delivery_id}:{push.copy}")),
    }
    if secrets.gitlab.startswith("whsec_"):
        headers["webhook-signature"] = sign_v1(secrets.gitlab, push.delivery_id, timestamp, body)
    elif secrets.gitlab:
        headers["X-Gitlab-Token"] = secrets.gitlab
    return headers, body


def _jenkins(push: Push, base: str, secrets: Secrets, _timestamp: int) -> tuple[dict[str, str], bytes]:
    body = _json(jenkins_bodies.webhook(push.build, push.moment, push.event, base))
    headers = {
        "Accept": "text/html, image/gif, image/jpeg, */*; q=0.2",
        "Content-Type": "application/json;charset=UTF-8",
        "User-Agent": "Java/21.0.8",
        "X-Hub-Signature-256": github_signature(secrets.jenkins, body),
    }
    return headers, body


class Sender:
    """Sends the pushes of a world when they are due; a context manager that starts and stops its threads.

    `base_url`: BuildRelay's web address.  `api_urls`: the address of each platform's simulated API, put
    into the bodies.  The pushes of one build go out one after the other, those of different builds side
    by side in `lanes` threads.  Without `start`, call `send_due` to send what is due by the world's clock.
    `hooks`: platforms that send only where a hook is registered with them, under that hook's secret.
    """

    def __init__(
        self,
        world: World,
        base_url: str,
        secrets: Secrets,
        api_urls: Mapping[str, str] | None = None,
        *,
        loss: float = 0.0,
        double: float = 0.0,
        reorder: float = 0.0,
        retry_until_accepted: bool = False,
        paths: Mapping[str, str] = PATHS,
        hooks: Mapping[str, Hooks] | None = None,
        lanes: int = 4,
    ) -> None:
        self.world = world
        self.base_url = base_url.rstrip("/")
        self.secrets = secrets
        self.shares = (loss, double, reorder)
        self.retry_until_accepted = retry_until_accepted
        self.results: list[Sent] = []
        self._api_urls = {
            "github": "https://api.github.com",
            "gitlab": "https://gitlab.com",
            **(api_urls or {}),
        }
        self._paths = paths
        self._hooks = hooks or {}
        self._http = urllib3.PoolManager(num_pools=2, maxsize=lanes, retries=False)
        self._lanes: list[list[tuple[float, int, Push]]] = [[] for _ in range(lanes)]
        self._planned = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self.add(world.builds)

    def add(self, builds: Iterable[Build]) -> None:
        """Push for these builds too (those that `World.extend` returned)."""
        for push in plan_pushes(builds, self.world.seed, *self.shares):
            self._enqueue(push)

    def _enqueue(self, push: Push) -> None:
        lane = self._lanes[zlib.crc32(push.build.build_id.encode()) % len(self._lanes)]
        with self._lock:
            heapq.heappush(lane, (push.at, self._planned, push))
            self._planned += 1

    def start(self) -> None:
        """Send in the background, each push when it is due."""
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name="simulated-sender", daemon=True)
            for lane in self._lanes
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop; what has not been sent stays unsent."""
        self._closing.set()
        for thread in self._threads:
            thread.join(15)
        self._http.clear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Sending ------------------------------------------------------------------------------------

    def send_due(self) -> int:
        """Send, in the caller's thread, all that is due; returns how many pushes that were."""
        before = len(self.results)
        for lane in self._lanes:
            while push := self._next_due(lane):
                self._process(push)
        return len(self.results) - before

    def _run(self, lane: list[tuple[float, int, Push]]) -> None:
        while not self._closing.is_set():
            push = self._next_due(lane)
            if push:
                self._process(push)
            else:
                self._closing.wait(self._pause(lane))

    def _next_due(self, lane: list[tuple[float, int, Push]]) -> Push | None:
        with self._lock:
            if lane and lane[0][0] <= self.world.now():
                return heapq.heappop(lane)[2]
        return None

    def _pause(self, lane: list[tuple[float, int, Push]]) -> float:
        """Until the next push, but short enough to notice a stepped clock or new builds."""
        with self._lock:
            until = lane[0][0] - self.world.now() if lane else 0.1
        return min(max(until, 0.001), 0.1)

    def _process(self, push: Push, target: Target | None = None) -> Sent:
        begun, target = time.monotonic(), target or self._target(push)
        told = Answer(None, b"", 0.0) if push.lost or target is None else self._deliver(push, target)
        sent = Sent(push, told.status, self.world.now(), time.monotonic() - begun, target, told.body)
        with self._lock:
            self.results.append(sent)
        return sent

    def _target(self, push: Push) -> Target | None:
        platform = push.build.platform
        if platform in self._hooks:
            return self._hooks[platform].target(push.build.repository, push.event.name)
        url = self.base_url + self._paths[platform]
        return Target(url, str(getattr(self.secrets, platform)), github_bodies.HOOK_ID)

    def _deliver(self, push: Push, target: Target) -> Answer:
        """The answer; with `retry_until_accepted` only the last counts."""
        pause = 0.05
        while True:
            answer = self._post(push, target)
            accepted = answer.status is not None and 200 <= answer.status < 300
            if accepted or not self.retry_until_accepted or self._closing.wait(pause):
                return answer
            pause = min(pause * 2, 1.0)

    def _post(self, push: Push, target: Target) -> Answer:
        platform = push.build.platform
        headers, body = self._encoded(push, target)
        answer = post(self._http, target.url, headers, body, TIMEOUTS_SECONDS[platform])
        if platform in self._hooks:
            self._hooks[platform].settle(target, answer.status)
        return answer

    def _encoded(self, push: Push, target: Target) -> tuple[dict[str, str], bytes]:
        base = self._api_urls.get(push.build.platform, "https://ci.example.com")
        return encode(push, base, self.secrets, int(self.world.now()), target)

    def ping(self) -> list[int | None]:
        """Send the `ping` of a new webhook for each GitHub repository; returns the statuses."""
        statuses = []
        for repository in self.world.places.get("github", ()):
            content = github_bodies.ping(
                repository, self._api_urls["github"], self.base_url + self._paths["github"]
            )
            body, delivery_id = _json(content), str(uuid.uuid5(uuid.NAMESPACE_OID, repository.full_name))
            headers = github_headers("ping", delivery_id, repository, self.secrets.github, body)
            url = self.base_url + self._paths["github"]
            statuses.append(post(self._http, url, headers, body, TIMEOUTS_SECONDS["github"]).status)
        return statuses

    # What tests ask -----------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Has every planned push been sent or lost?"""
        with self._lock:
            return len(self.results) == self._planned

    def accepted(self) -> list[Sent]:
        """The pushes that BuildRelay answered with a 2xx: none of them may be lost."""
        with self._lock:
            return [sent for sent in self.results if sent.accepted]

    def report(self) -> dict[str, int]:
        """Counts: planned, accepted, refused (an answer that is no 2xx), unanswered, lost, doubled, late.

        And unsent: those that no hook wanted.
        """
        with self._lock:
            counts = Counter({"planned": self._planned})
            for sent in self.results:
                counts[_fate(sent)] += 1
                counts["doubled"] += sent.push.copy
                counts["late"] += sent.push.late and not sent.push.copy
        names = ("planned", "accepted", "refused", "unanswered", "lost", "doubled", "late", "unsent")
        return {name: counts[name] for name in names}

    # What the platforms' APIs tell of it --------------------------------------------------------

    def record(self, repository: Repository, url: str = "") -> list[tuple[int, Sent]]:
        """What was sent for a repository, newest first, under its number; `url`: only what went there."""
        with self._lock:
            listed = list(enumerate(self.results, start=1))
        return [
            (number, sent)
            for number, sent in reversed(listed)
            if sent.push.build.repository == repository
            and sent.target
            and url in ("", sent.target.url)
            and not (sent.push.lost and _untold(sent.push))
        ]

    def deliveries(self, repository: Repository, url: str = "") -> list[dict[str, Any]]:
        """As GitHub lists them.  Every second lost push shows as failed; of the others nothing is known."""
        return [_delivery(number, sent) for number, sent in self.record(repository, url)]

    def delivery(self, number: int) -> dict[str, Any] | None:
        """One delivery as GitHub shows it, with its request and response."""
        sent = self._sent(number)
        if sent is None or sent.target is None:
            return None
        headers, _ = self._encoded(sent.push, sent.target)
        base = self._api_urls["github"]
        payload = github_bodies.webhook(sent.push.build, sent.push.moment, sent.push.event, base)
        return _delivery(number, sent) | {
            "url": sent.target.url,
            "request": {"headers": headers, "payload": payload},
            "response": {"headers": {}, "payload": sent.answer.decode(errors="replace")},
        }

    def request_of(self, sent: Sent) -> tuple[dict[str, str], bytes]:
        """Headers and body of a push that was sent to a hook, under a new timestamp."""
        assert sent.target
        return self._encoded(sent.push, sent.target)

    def _sent(self, number: int) -> Sent | None:
        with self._lock:
            return self.results[number - 1] if 1 <= number <= len(self.results) else None

    def redeliver(self, delivery: int) -> bool:
        """Send a delivery again, when its turn comes, under its old GUID; False for an unknown id."""
        sent = self._sent(delivery)
        if sent is None:
            return False
        self._enqueue(_again(sent.push, self.world.now()))
        return True

    def resend(self, number: int) -> Sent | None:
        """Send again at once, to the same hook under the same key; None for an unknown number."""
        sent = self._sent(number)
        if sent is None or sent.target is None:
            return None
        with self._lock:
            self._planned += 1
        return self._process(_again(sent.push, self.world.now()), sent.target)


def _again(push: Push, now: float) -> Push:
    return replace(push, at=now, lost=False, late=False, redelivery=True)


def _fate(sent: Sent) -> str:
    if sent.push.lost:
        return "lost"
    if sent.target is None:
        return "unsent"
    if sent.status is None:
        return "unanswered"
    return "accepted" if sent.accepted else "refused"


def _untold(push: Push) -> bool:
    return int(push.delivery_id[0], 16) % 2 == 0


def _delivery(number: int, sent: Sent) -> dict[str, Any]:
    push, status = sent.push, 502 if sent.push.lost else sent.status
    event = (push.event.name, push.event.action)
    return github_bodies.delivery(
        number, push.delivery_id, sent.at, status, sent.seconds, event, push.build.repository.id,
        push.redelivery,
    )  # fmt: skip
