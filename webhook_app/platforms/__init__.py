"""One file per CI platform, each PURE: headers and bytes in, dataclasses out; nothing is opened or stored.

A platform is a module of this package whose name does not begin with `_`; `find()` lists the folder.
It offers (see `Platform`; scripts stop before the polling part, see `Polled`):

* `NAME`: the platform's word, also the name of its default source
* `CONTENT_TYPES`: media types its webhooks use
* `SIGNATURE_HEADERS`: headers of which `verify` needs at least one; without, no large body is read
* `verify(headers, body, secrets, now)`: returns, or raises `BadSignature`
* `envelope(headers, body)`: what makes this delivery unique
* `parse_webhook(source, headers, body)`: `Webhook`, or raises `NotJson` / `Unreadable` / `Invalid`
* `MANNERS`: what its API asks of those who read it
* `poll_request(source, target)`: the `Request` that reads one build, or None if it can't be polled
* `parse_poll(source, target, answer)`: the `Observation`, or raises `PollError`
* `follow_up(source, seen)`: the `Request` that says more about a poll that left something open, or None
* `parse_follow_up(seen, answer)`: the observation with that added
* `jobs_request(source, target)`: the `Request` for the jobs of a running build, or None if they add nothing
* `parse_jobs(source, seen, answer)`: the poll `seen` with all jobs of that moment, or raises `PollError`;
  as it was if the build is over, if some jobs are missing, or if they may be those of a later run
* `together(repository)`: repositories with the same value can be listed by one request
* `list_request(source, repositories, since, most)`: the `Request` for their newest builds, or None
* `parse_list(source, repositories, answer)`: the `Listing`, or raises `PollError`
* `repository_request(source, target)`: the `Request` that shows whether we may see its repository, or None
* `parse_repository(answer)`: raises `PollError` unless it was shown
* `named(source, build_id)`: an `Observation` that says no more than which build an id means, or None
* `limits(answer)`: the `Limits` that an answer tells, or None

And for what a build leaves behind (see `FileApi` and `pollers.endings`):

* `ended_jobs_request(source, target)`: the `Request` for the jobs of the target's attempt; None: it has none
* `parse_ended_jobs(answer)`: an `EndedJob` for each, or raises `PollError`
* `log_files(source, target, jobs, everything)`: the logs worth reading, those of failed jobs first
* `log_tail(file, headers, after, most_bytes)`: for a log whose first `after` bytes were read, the `Request`
  for its end and the place of its first byte, or None
* `log_grows(headers)`: does the answer say that the log is not complete?
* `annotations_request(source, target, job)`, `parse_annotations(answer)`: its words on a failed job
* `artifacts_request(source, target)`, `parse_artifacts(answer)`: an `Artifact` for each
* `artifact_request(source, target, ref)`: the `Request` that downloads one

A platform whose webhooks can be managed over its API also offers what `HookApi` names: see `hook_api()`.

Header names are lower case.  Times are aware UTC.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from typing import Protocol, cast

from webhook_app.lifecycle import Observation

Headers = Mapping[str, str]


class BadSignature(Exception):
    """Missing, malformed, wrong or too old: one answer for all, so that nothing is told to a guesser.

    `age_seconds`: the signature is right, but was made so long ago by our clock (below 0: in the future).
    """

    def __init__(self, age_seconds: float | None = None) -> None:
        super().__init__()
        self.age_seconds = age_seconds


class NotJson(Exception):
    """The body is not what its content type says."""


class Unreadable(Exception):
    """Verified, but without the fields or values we can read; `str()` is the reason shown to admins."""


class Invalid(Unreadable):
    """Unreadable, and its author is there to correct it: refused with 422 instead of taken for later.

    `field` is what is wrong, `allowed` what it may be.  A platform that mutes those who refuse its deliveries
    never gets this.
    """

    def __init__(self, field: str, message: str, allowed: Sequence[str] = ()) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.allowed = tuple(allowed)


@dataclass(frozen=True, slots=True)
class Source:
    """One configured CI instance, as far as a platform module needs it.

    `api_url` has no trailing slash; `token` and `username` are plain text, in memory only.
    `lent`: the token is an access token lent for a time (GitHub App, OAuth), not one that a person made.
    """

    name: str
    platform: str
    api_url: str = ""
    token: str = field(default="", repr=False)
    username: str = ""
    lent: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """An access token that a platform lent us until `expires_at`.

    `refresh_token`: what gets the next one, if this platform gives such; with the old ones both end.
    """

    access_token: str = field(repr=False)
    expires_at: datetime
    refresh_token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What makes a delivery unique together with its source: one GitHub GUID serves several hooks."""

    event: str
    hook_id: str
    delivery_id: str


@dataclass(frozen=True, slots=True)
class Webhook:
    """A verified, readable webhook: what it says, or why it says nothing.

    `observations` empty and `ignored` set: an event that carries no build state.  `pong`: answer a ping.
    `dropped`: optional fields that were not taken as they were given.
    """

    observations: tuple[Observation, ...] = ()
    ignored: str | None = None
    pong: bool = False
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PollTarget:
    """One build to read, as recorded.

    `attempt_base`: attempts of earlier uses of its identity, which the platform does not count.
    """

    build_id: str
    key: str
    repository: str | None
    number: int | None
    attempt: int
    url: str | None
    attempt_base: int = 0

    @property
    def platform_attempt(self) -> int:
        """The number of the attempt as the platform counts."""
        return self.attempt - self.attempt_base


@dataclass(frozen=True, slots=True)
class Request:
    """One outgoing GET, to be sent by `webhook_app.outbound`."""

    url: str
    headers: dict[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Call:
    """One outgoing request of any method, to be sent by `webhook_app.outbound`."""

    method: str
    url: str
    headers: dict[str, str] = field(repr=False)
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Hook:
    """A webhook as it is registered at the platform.

    `has_secret` None: the platform doesn't tell.  `alert`: why the platform sends nothing, or None.
    `last_status`: HTTP status of the newest delivery, if it is told; 0 if there was no answer.
    """

    id: str
    url: str
    active: bool
    events: frozenset[str]
    has_secret: bool | None = None
    alert: str | None = None
    last_status: int | None = None


@dataclass(frozen=True, slots=True)
class HookDelivery:
    """One try of one delivery, as the platform lists it; `envelope` is what our reception would see."""

    id: str
    envelope: Envelope
    ok: bool
    at: datetime | None = None


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """What the platform tells of our token; None or empty where it doesn't."""

    scopes: tuple[str, ...] | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: status, headers (lower case), body."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class Listing:
    """What a list shows.  `more`: the request for the next page, if there is one."""

    observations: tuple[Observation, ...]
    more: Request | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """The budget of a token as an answer tells it: `remaining` of `limit` requests, renewed in that time."""

    limit: int
    remaining: int
    reset_seconds: float


@dataclass(frozen=True, slots=True)
class Manners:
    """What an API asks of those who read it.

    `at_once`: requests of one token under way at the same time.  `per_minute`: requests, whatever they cost.
    `free_unchanged`: an answer 304 costs no budget, so an ETag is worth keeping.
    `lists_changes`: a list since a time shows every build that changed since; else only the newest builds.
    """

    at_once: int
    per_minute: int
    free_unchanged: bool
    lists_changes: bool


class PollFault(StrEnum):
    """Why a poll gave no observation; also the metric label."""

    RATE_LIMITED = "rate_limited"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    UNAVAILABLE = "unavailable"  # network, time-out, 5xx
    UNREADABLE = "unreadable"  # HTML, broken or foreign JSON


class PollError(Exception):
    """A poll that told nothing.  `retry_after_seconds`: how long to wait, if the platform says so."""

    def __init__(self, fault: PollFault, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.fault = fault
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job of a build that is over.  One that never `ran` has no log, and never will."""

    id: int
    name: str
    failed: bool
    ran: bool


@dataclass(frozen=True, slots=True)
class LogFile:
    """A log to read.  `zipped`: a ZIP that holds a text file for each job.

    `tailed`: its end can be asked for alone (`log_tail`).
    """

    title: str
    request: Request
    zipped: bool = False
    tailed: bool = False


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file that a build left.

    `ref` finds it again on its platform; `digest` is `sha256:HEX` of what a download brings, where the
    platform tells it.
    """

    name: str
    ref: str
    size_bytes: int | None = None
    digest: str | None = None
    created_at: datetime | None = None
    expires_at: datetime | None = None
    expired: bool = False


class Platform(Protocol):
    """What a platform module offers."""

    NAME: str
    CONTENT_TYPES: tuple[str, ...]
    SIGNATURE_HEADERS: tuple[str, ...]

    def verify(self, headers: Headers, body: bytes, secrets: tuple[str, ...], now: float) -> None: ...

    def envelope(self, headers: Headers, body: bytes) -> Envelope: ...

    def parse_webhook(self, source: Source, headers: Headers, body: bytes) -> Webhook: ...


class Polled(Platform, Protocol):
    """A platform with an API that can be read."""

    MANNERS: Manners

    def poll_request(self, source: Source, target: PollTarget) -> Request | None: ...

    def parse_poll(self, source: Source, target: PollTarget, answer: Answer) -> Observation: ...

    def follow_up(self, source: Source, seen: Observation) -> Request | None: ...

    def parse_follow_up(self, seen: Observation, answer: Answer) -> Observation: ...

    def jobs_request(self, source: Source, target: PollTarget) -> Request | None: ...

    def parse_jobs(self, source: Source, seen: Observation, answer: Answer) -> Observation: ...

    def together(self, repository: str) -> str: ...

    def list_request(
        self, source: Source, repositories: Sequence[str], since: datetime | None, most: int
    ) -> Request | None: ...

    def parse_list(self, source: Source, repositories: Sequence[str], answer: Answer) -> Listing: ...

    def repository_request(self, source: Source, target: PollTarget) -> Request | None: ...

    def parse_repository(self, answer: Answer) -> None: ...

    def named(self, source: Source, build_id: str) -> Observation | None: ...

    def limits(self, answer: Answer) -> Limits | None: ...


class FileApi(Polled, Protocol):
    """A platform whose logs and artifacts can be read."""

    def ended_jobs_request(self, source: Source, target: PollTarget) -> Request | None: ...

    def parse_ended_jobs(self, answer: Answer) -> tuple[EndedJob, ...]: ...

    def log_files(
        self, source: Source, target: PollTarget, jobs: tuple[EndedJob, ...], everything: bool
    ) -> tuple[LogFile, ...]: ...

    def log_tail(
        self, file: LogFile, headers: Headers, after: int, most_bytes: int
    ) -> tuple[Request, int] | None: ...

    def log_grows(self, headers: Headers) -> bool: ...

    def annotations_request(self, source: Source, target: PollTarget, job: EndedJob) -> Request | None: ...

    def parse_annotations(self, answer: Answer) -> tuple[str, ...]: ...

    def artifacts_request(self, source: Source, target: PollTarget) -> Request | None: ...

    def parse_artifacts(self, answer: Answer) -> tuple[Artifact, ...]: ...

    def artifact_request(self, source: Source, target: PollTarget, ref: str) -> Request | None: ...


class HookApi(Protocol):
    """What a platform module offers that can manage webhooks.  `parse_…` raise `PollError`.

    `HOOK_EVENTS`: what our webhook has to ask for.  `DELIVERED_EVENTS`: deliveries that tell of builds, as
    `Envelope.event` names them.  `HOOK_PERMISSION`: what a token needs for it, for people.
    `next_deliveries`: the call for the page after this answer, or None.
    """

    HOOK_EVENTS: frozenset[str]
    DELIVERED_EVENTS: frozenset[str]
    HOOK_PERMISSION: str

    def list_hooks(self, source: Source, repository: str) -> Call | None: ...

    def parse_hooks(self, answer: Answer) -> tuple[Hook, ...]: ...

    def create_hook(self, source: Source, repository: str, url: str, secret: str) -> Call: ...

    def update_hook(self, source: Source, repository: str, hook_id: str, url: str, secret: str) -> Call: ...

    def delete_hook(self, source: Source, repository: str, hook_id: str) -> Call: ...

    def parse_hook(self, answer: Answer) -> Hook: ...

    def list_deliveries(self, source: Source, repository: str, hook_id: str) -> Call: ...

    def parse_deliveries(self, hook_id: str, answer: Answer) -> tuple[HookDelivery, ...]: ...

    def next_deliveries(self, source: Source, answer: Answer) -> Call | None: ...

    def redeliver(self, source: Source, repository: str, hook_id: str, delivery_id: str) -> Call: ...


class TokenApi(Protocol):
    """How a platform module asks what our token may do; `parse_token` raises `PollError`."""

    def token_call(self, source: Source) -> Call: ...

    def parse_token(self, answer: Answer) -> TokenFacts: ...


def hook_api(name: str) -> HookApi | None:
    """How the webhooks of a platform are managed; None if they can't be."""
    module = find().get(name)
    return cast(HookApi, module) if hasattr(module, "list_hooks") else None


def file_api(name: str) -> FileApi | None:
    """How logs and artifacts of a platform are read; None if it has none."""
    module = find().get(name)
    return cast(FileApi, module) if hasattr(module, "artifact_request") else None


def token_api(name: str) -> TokenApi | None:
    """How a platform's token is looked at; None if it has none."""
    module = find().get(name)
    return cast(TokenApi, module) if hasattr(module, "token_call") else None


@cache
def find() -> dict[str, Platform]:
    """The platforms by name, found by listing this folder."""
    modules = (
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
        if not info.name.startswith("_")
    )
    return {module.NAME: cast(Platform, module) for module in modules}


@cache
def polled() -> dict[str, Polled]:
    """Those of them that can be polled."""
    return {name: cast(Polled, module) for name, module in find().items() if hasattr(module, "MANNERS")}


def newest(artifacts: Iterable[Artifact]) -> tuple[Artifact, ...]:
    """One for each name, by name: after a re-run a list names them again."""
    long_ago = datetime(1970, 1, 1, tzinfo=UTC)
    by_name = {
        one.name: one for one in sorted(artifacts, key=lambda artifact: artifact.created_at or long_ago)
    }
    return tuple(by_name[name] for name in sorted(by_name))
