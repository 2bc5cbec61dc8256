"""GitHub Actions.

Webhooks: https://docs.github.com/en/webhooks/webhook-events-and-payloads
REST: https://docs.github.com/en/rest/actions/workflow-runs

* Only `workflow_run` and the REST run tell a state, and they tell it in `status`, not in `action`:
  GitHub itself publishes an `action: completed` whose status is `queued`.
* `workflow_job` says that a run has begun, and how far it is.  It never ends one (re-running the
  failed jobs sends `completed` again for the others), it is never ordered by its times (a gated
  job's three events carry the same ones), and a job that has not begun says nothing: the run is
  `queued` at least by being known.  It names a branch but not the repository that has it, which may
  be a fork: so a job says nothing about the branch.
* `check_run` shows foreign checks and doubles of jobs.  It says only that something happened.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import jwt

from webhook_app import signing
from webhook_app.lifecycle import Conclusion, JobFact, JobStatus, Observation, ObservedBy, State
from webhook_app.platforms import (
    Answer,
    Artifact,
    BadSignature,
    Call,
    EndedJob,
    Envelope,
    Grant,
    Headers,
    Hook,
    HookDelivery,
    Limits,
    Listing,
    LogFile,
    Manners,
    PollError,
    PollFault,
    PollTarget,
    Request,
    Source,
    TokenFacts,
    Unreadable,
    Webhook,
    _read,
    newest,
)

NAME = "github"
CONTENT_TYPES = ("application/json", "application/x-www-form-urlencoded")
SIGNATURE_HEADERS = ("x-hub-signature-256",)

MANNERS = Manners(at_once=1, per_minute=600, free_unchanged=True, lists_changes=False)
"""Requests one after the other; 900 points a minute, of which other users of the token need some.
https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api"""

API_VERSION = "2022-11-28"
"""Sent explicitly: the default may move. https://docs.github.com/en/rest/about-the-rest-api/api-versions"""

_WAITING = {"waiting"}
_NOT_BEGUN = {"requested", "queued", "pending"} | _WAITING

_ENDS = {
    "success": (State.COMPLETED, Conclusion.SUCCESS),
    "neutral": (State.COMPLETED, Conclusion.NEUTRAL),
    "skipped": (State.COMPLETED, Conclusion.SKIPPED),
    "failure": (State.FAILED, Conclusion.FAILURE),
    "startup_failure": (State.FAILED, Conclusion.FAILURE),
    "timed_out": (State.TIMEOUT, Conclusion.TIMED_OUT),
    "stale": (State.TIMEOUT, Conclusion.STALE),
    "cancelled": (State.CANCELLED, Conclusion.CANCELLED),
}
_UNKNOWN_END = (State.FAILED, Conclusion.FAILURE)
"""A word we do not know never means success."""


_FULL_NAME = re.compile(r"([A-Za-z0-9_-]{1,100})/([A-Za-z0-9_.-]{1,100})")
_RUN_URL = re.compile(r"https?://[^/]+/([^/]+/[^/]+)/actions/runs/([0-9]{1,18})(?=[/?#]|$)")


# ---- webhooks ------------------------------------------------------------------------------------


def verify(headers: Headers, body: bytes, secrets: tuple[str, ...], now: float) -> None:
    """Check `X-Hub-Signature-256` over the raw body, form-encoded or not; or raise `BadSignature`."""
    if not signing.verify_github(headers.get("x-hub-signature-256"), body, secrets):
        raise BadSignature


def envelope(headers: Headers, body: bytes) -> Envelope:
    """Event, hook and GUID: one GUID serves several hooks, and stays through redeliveries."""
    return Envelope(
        event=headers.get("x-github-event", ""),
        hook_id=headers.get("x-github-hook-id", ""),
        delivery_id=headers.get("x-github-delivery") or _read.digest(body),
    )


def parse_webhook(source: Source, headers: Headers, body: bytes) -> Webhook:
    """What a delivery says; raises `NotJson` or `Unreadable`."""
    payload = _read.loads(_read.form_payload(body) if _read.is_form(headers) else body)
    event = headers.get("x-github-event", "")
    if event == "workflow_run":
        run = _read.need_mapping(payload, "workflow_run")
        return Webhook((_run(source, run, _repository(payload, run), ObservedBy.PUSH),))
    if event == "workflow_job":
        return Webhook((_job(source, payload),))
    if event == "check_run":
        return _check_run(source, payload)
    if event == "ping":
        return Webhook(pong=True)
    if not event:
        raise Unreadable("X-GitHub-Event: the header is missing")
    return Webhook(ignored=f"the event {_read.clean(event, 100)} carries no build state")


# ---- polls ---------------------------------------------------------------------------------------


def poll_request(source: Source, target: PollTarget) -> Request | None:
    """`GET /repos/OWNER/REPO/actions/runs/ID`: the newest attempt.  None without a readable repository."""
    run_id = target.key.rpartition(":")[2]
    if not source.api_url or not _is_repository(target.repository) or not re.fullmatch("[0-9]{1,19}", run_id):
        return None
    return Request(f"{source.api_url}/repos/{target.repository}/actions/runs/{run_id}", _headers(source))


def _headers(source: Source) -> dict[str, str]:
    headers = {
        "Accept": "application/vnd.github+json",
        "User-Agent": _read.USER_AGENT,
        "X-GitHub-Api-Version": API_VERSION,
    }
    return headers | ({"Authorization": f"Bearer {source.token}"} if source.token else {})


def parse_poll(source: Source, target: PollTarget, answer: Answer) -> Observation:
    """The run that was read, in the same words as its webhook; or raises `PollError`."""
    run = _read.fetched(answer)
    told = _read.text(_read.mapping(run.get("repository")).get("full_name"))
    try:
        seen = _run(source, run, told if _is_repository(told) else target.repository, ObservedBy.POLL)
    except Unreadable as error:
        raise PollError(PollFault.UNREADABLE, str(error)) from error
    if seen.key != target.key:
        raise PollError(PollFault.UNREADABLE, f"the answer is about {seen.key}, not {target.key}")
    return seen


def follow_up(source: Source, seen: Observation) -> Request | None:
    """None: a run says all about its state."""
    return None


def parse_follow_up(seen: Observation, answer: Answer) -> Observation:
    """Nothing to add."""
    return seen


def jobs_request(source: Source, target: PollTarget) -> Request | None:
    """`GET …/runs/ID/jobs?filter=latest`: the jobs of the newest attempt, with their steps."""
    run = poll_request(source, target)
    return replace(run, url=f"{run.url}/jobs?filter=latest&per_page=100") if run else None


def parse_jobs(source: Source, seen: Observation, answer: Answer) -> Observation:
    """The run with its jobs; or raises `PollError`.

    They count if all are on the page and none is of a later attempt (a re-run of the failed jobs keeps
    the others).
    """
    told = _read.fetched(answer)
    jobs = [_read.mapping(job) for job in _read.items(told.get("jobs"))]
    try:
        facts = tuple(map(_job_fact, jobs))
        attempts = [_attempt(job, "jobs.run_attempt") for job in jobs]
    except Unreadable as error:
        raise PollError(PollFault.UNREADABLE, str(error)) from error
    complete = bool(facts) and len(facts) == _read.count(told.get("total_count"))
    known = all(attempt is not None and attempt <= (seen.attempt or 0) for attempt in attempts)
    over = seen.state is not None and seen.state.terminal
    return replace(seen, jobs=facts, jobs_complete=True) if complete and known and not over else seen


def together(repository: str) -> str:
    """Each repository has a list of its own."""
    return repository


def list_request(
    source: Source, repositories: Sequence[str], since: datetime | None, most: int
) -> Request | None:
    """`GET /repos/OWNER/REPO/actions/runs`, unfiltered: filtered lists come late from a search index.

    Newest `created_at` first, so a re-run stays where its first attempt was.
    """
    (repository,) = repositories
    if not source.api_url or not _is_repository(repository):
        return None
    query = f"per_page={min(most, 100)}&exclude_pull_requests=true"
    return Request(f"{source.api_url}/repos/{repository}/actions/runs?{query}", _headers(source))


def parse_list(source: Source, repositories: Sequence[str], answer: Answer) -> Listing:
    """The runs that can be read; or raises `PollError`."""
    found = []
    for run in _read.listed(_read.fetched(answer).get("workflow_runs")):
        with suppress(Unreadable):
            found.append(_run(source, run, _repository({}, run) or repositories[0], ObservedBy.POLL))
    more = _read.next_page(source, answer)
    return Listing(tuple(found), Request(more, _headers(source)) if more else None)


def repository_request(source: Source, target: PollTarget) -> Request | None:
    """`GET /repos/OWNER/REPO`."""
    if not source.api_url or not _is_repository(target.repository):
        return None
    return Request(f"{source.api_url}/repos/{target.repository}", _headers(source))


def parse_repository(answer: Answer) -> None:
    """Raises `PollError` unless the repository was shown."""
    _read.fetched(answer)


def limits(answer: Answer) -> Limits | None:
    """The budget of the hour; those of `search` and others are not ours."""
    resource = answer.headers.get("x-ratelimit-resource", "core")
    return _read.limits(answer) if resource == "core" else None


def named(source: Source, build_id: str) -> Observation | None:
    """The run that `SOURCE:OWNER:REPO:RUN_ID` means."""
    parts = re.fullmatch(r"[^:]+:([^:]+):([^:]+):([1-9][0-9]{0,17})", build_id)
    if parts is None or not _is_repository(f"{parts[1]}/{parts[2]}"):
        return None
    return _about(source, int(parts[3]), f"{parts[1]}/{parts[2]}", ObservedBy.POLL)


# ---- the credentials of a GitHub App -------------------------------------------------------------

# https://docs.github.com/en/apps/creating-github-apps/authenticating-with-a-github-app

_BACKDATED_SECONDS = 60
_JWT_SECONDS = 540
"""GitHub takes at most 600 from its own clock on: ours may be a minute fast, and a minute slow."""

_TOKEN_HOURS = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class App:
    """A GitHub App: `private_key` is RSA in PEM; without `installation_id` the installation is looked up."""

    app_id: str
    private_key: str = field(repr=False)
    installation_id: str = ""


def app_jwt(app: App, now: datetime) -> str:
    """The App's own proof of identity (RS256), good for nine minutes; `now` as GitHub's clock has it."""
    at = int(now.timestamp())
    claims = {"iat": at - _BACKDATED_SECONDS, "exp": at + _JWT_SECONDS, "iss": app.app_id}
    return jwt.encode(claims, app.private_key, algorithm="RS256")


def clock(answer: Answer) -> datetime | None:
    """GitHub's own time when it answered; whole seconds."""
    return _read.answered_at(answer)


def installation_request(source: Source, proof: str, repository: str) -> Call:
    """`GET /repos/OWNER/REPO/installation`: where the App with the JWT `proof` is installed."""
    return _call(replace(source, token=proof), "GET", f"repos/{repository}/installation")


def parse_installation(answer: Answer) -> str:
    """The installation's id; or raises `PollError`."""
    return _installation_id(_read.fetched(answer))


def installations_request(source: Source, proof: str) -> Call:
    """`GET /app/installations`: all of the App's."""
    return _call(replace(source, token=proof), "GET", "app/installations?per_page=100")


def parse_installations(answer: Answer) -> tuple[str, ...]:
    """The ids of the installations, at most 100; or raises `PollError`."""
    return tuple(_installation_id(one) for one in _read.fetched_items(answer))


def _installation_id(told: dict[str, Any]) -> str:
    try:
        return str(_read.need_id(told, "installation.id"))
    except Unreadable as error:
        raise PollError(PollFault.UNREADABLE, str(error)) from error


def installation_token_request(source: Source, proof: str, installation_id: str) -> Call:
    """`POST /app/installations/ID/access_tokens`: a token for all that the installation may see."""
    path = f"app/installations/{_read.path_part(installation_id)}/access_tokens"
    return _call(replace(source, token=proof), "POST", path)


def parse_installation_token(answer: Answer, now: datetime) -> Grant:
    """The token of an hour; or raises `PollError`.  `now` is our clock, and `expires_at` is told by it.

    Tokens are some 40 characters long, or several hundred (`ghs_APPID_JWT`).
    """
    told = _read.fetched(answer, 201)
    token = _read.bearer(told.get("token"), "token")
    expires_at, answered_at = _read.moment(told.get("expires_at")), _read.answered_at(answer)
    lifetime = expires_at - (answered_at or now) if expires_at else _TOKEN_HOURS
    return Grant(token, now + min(max(lifetime, timedelta(0)), _TOKEN_HOURS))


# ---- runs ----------------------------------------------------------------------------------------


def _run(source: Source, run: dict[str, Any], repository: str | None, observed_by: ObservedBy) -> Observation:
    """A run object, which webhooks and REST share."""
    status = _read.need_text(run, "workflow_run.status")
    conclusion = _read.text(run.get("conclusion"))
    state, ended_as, waiting = _state(status, conclusion)
    updated_at = _read.moment(run.get("updated_at"))
    head = _head(run, repository)
    return _about(
        source,
        _read.need_id(run, "workflow_run.id"),
        repository,
        observed_by,
        group=_suite(source, run.get("check_suite_id")),
        attempt=_attempt(run, "workflow_run.run_attempt"),
        state=state,
        conclusion=ended_as,
        raw_status=status,
        raw_conclusion=conclusion,
        waiting=waiting,
        workflow=_read.text(run.get("name")) or _workflow_file(run.get("path")),
        trigger=head.trigger,
        branch=head.branch,
        head_repository=head.repository,
        is_fork=head.is_fork,
        commit=_read.text(run.get("head_sha")),
        number=_read.whole(run.get("run_number")),
        url=_read.web_url(run.get("html_url")),
        started_at=_read.moment(run.get("run_started_at")),
        ended_at=updated_at if state is not None and state.terminal else None,
        platform_at=updated_at,
        created_at=_read.moment(run.get("created_at")),
        doubtful=status == "completed" and conclusion is None,
    )


@dataclass(frozen=True, slots=True)
class _Head:
    """What a run is of: the trigger, the branch as it is shown, and the fork that has it."""

    trigger: str | None
    branch: str | None
    repository: str | None
    is_fork: bool | None


def _head(run: dict[str, Any], repository: str | None) -> _Head:
    """Tell whose branch `head_branch` is: with a pull request of a fork it is a branch of the fork.

    `head_repository` is null when the fork is gone, and missing where an old server does not tell it.
    """
    trigger, name = _read.text(run.get("event")), _read.text(run.get("head_branch"))
    if trigger == "release" or "@refs/tags/" in (_read.text(run.get("path")) or ""):
        return _Head("tag" if trigger == "push" else trigger, name and f"refs/tags/{name}", None, False)
    head = _read.mapping(run.get("head_repository"))
    head_name = _read.text(head.get("full_name"))
    gone = (trigger or "").startswith("pull_request") and "head_repository" in run and not head
    is_fork = gone or _is_other(head, _read.mapping(run.get("repository")), head_name, repository)
    owner = (head_name or "unknown").partition("/")[0]
    shown = f"{owner}:{name}" if is_fork and name else name
    return _Head(trigger, shown, head_name if is_fork else None, is_fork if head or gone else None)


def _is_other(
    head: dict[str, Any], base: dict[str, Any], head_name: str | None, base_name: str | None
) -> bool:
    """Whether these are two repositories; ids decide, for a name may be an old one."""
    ids = _read.whole(head.get("id")), _read.whole(base.get("id"))
    if None not in ids:
        return ids[0] != ids[1]
    return head_name is not None and head_name.casefold() != (base_name or head_name).casefold()


def _state(status: str, conclusion: str | None) -> tuple[State | None, Conclusion | None, bool]:
    """(state, conclusion, waiting for a person) of a run."""
    if status == "completed":
        if conclusion is None:  # over, but how?  A poll will tell.
            return State.IN_PROGRESS, None, False
        if conclusion == "action_required":  # waits for approval; then the same run runs
            return State.QUEUED, Conclusion.ACTION_REQUIRED, True
        return *_ENDS.get(conclusion, _UNKNOWN_END), False
    if status == "in_progress":
        return State.IN_PROGRESS, None, False
    return (State.QUEUED if status in _NOT_BEGUN else None), None, status in _WAITING


def _about(
    source: Source, run_id: int, repository: str | None, observed_by: ObservedBy, **more: Any
) -> Observation:
    """An observation that names its run, and says what `more` says."""
    if not _is_repository(repository):
        raise Unreadable("repository.full_name: OWNER/REPO is needed")
    return Observation(
        source=source.name,
        platform=NAME,
        observed_by=observed_by,
        key=f"{source.name}:{run_id}",
        build_id=f"{source.name}:{(repository or '').replace('/', ':')}:{run_id}",
        repository=repository,
        **more,
    )


def _repository(payload: dict[str, Any], inner: dict[str, Any]) -> str | None:
    """`OWNER/REPO` as GitHub spells it."""
    for holder in (payload, inner):
        name = _read.text(_read.mapping(holder.get("repository")).get("full_name"))
        if name is not None:
            return name
    return None


def _is_repository(name: str | None) -> bool:
    """Two parts that are safe in a URL path; `.` and `..` would climb out of it."""
    parts = _FULL_NAME.fullmatch(name or "")
    return parts is not None and parts[2] not in (".", "..")


def _suite(source: Source, suite_id: object) -> str | None:
    """What a run shares with its check runs, which do not know it."""
    number = _read.whole(suite_id)
    return None if number is None else f"{source.name}:suite:{number}"


def _attempt(data: dict[str, Any], name: str) -> int | None:
    """The attempt, from 1; None where an old server does not tell it."""
    told = data.get("run_attempt")
    if told is None:
        return None
    attempt = _read.count(told)
    if not attempt:
        raise Unreadable(f"{name}: a whole number above 0 is needed")
    return attempt


def _workflow_file(path: object) -> str | None:
    """A run may have no name; its file always has: `.github/workflows/build.yml@main`."""
    name = _read.text(path)
    return name.partition("@")[0].rpartition("/")[2] or None if name else None


# ---- jobs and checks -----------------------------------------------------------------------------


def _job(source: Source, payload: dict[str, Any]) -> Observation:
    """One job: while it runs it shows that its run runs, and never that its run is over.

    A job that has ended says nothing about its run: re-running the failed jobs tells again of those
    that were done before.

    Without `run_attempt` (servers before 2021) nobody knows which attempt it belongs to: then it
    only shows that the run exists.
    """
    job = _read.need_mapping(payload, "workflow_job")
    run_id = _read.need_id(job, "workflow_job.run_id")
    fact = _job_fact(job)
    attempt = _attempt(job, "workflow_job.run_attempt")
    url = _read.web_url(job.get("html_url"))
    run_url = _RUN_URL.match(url) if url else None
    return _about(
        source,
        run_id,
        _repository(payload, job),
        ObservedBy.PUSH,
        attempt=attempt,
        state=State.IN_PROGRESS if attempt and job.get("status") == "in_progress" else None,
        workflow=_read.text(job.get("workflow_name")),
        commit=_read.text(job.get("head_sha")),
        url=run_url[0] if run_url and int(run_url[2]) == run_id else None,
        job_created_at=_read.moment(job.get("created_at")),
        jobs=(fact,) if attempt else (),
    )


def _job_fact(job: dict[str, Any]) -> JobFact:
    status = _read.need_text(job, "workflow_job.status")
    known = {"in_progress": JobStatus.IN_PROGRESS, "completed": JobStatus.COMPLETED}
    steps = [_read.mapping(step) for step in _read.items(job.get("steps"))]
    return JobFact(
        id=_read.need_id(job, "workflow_job.id"),
        name=_read.text(job.get("name")) or "",
        status=known.get(status, JobStatus.QUEUED),
        steps_done=sum(step.get("status") == "completed" for step in steps),
        steps_total=len(steps),
    )


def _check_run(source: Source, payload: dict[str, Any]) -> Webhook:
    """A check names its suite and, if Actions made it, its run's page; about the state it says nothing."""
    check = _read.need_mapping(payload, "check_run")
    repository = _repository(payload, check)
    group = _suite(source, _read.mapping(check.get("check_suite")).get("id"))
    run_id = _run_of(check, repository)
    if run_id is not None:
        return Webhook((_about(source, run_id, repository, ObservedBy.PUSH, group=group),))
    if group is None:
        return Webhook(ignored="the check names neither a run nor a suite")
    nameless = Observation(
        source=source.name, platform=NAME, observed_by=ObservedBy.PUSH, key="", build_id="", group=group
    )
    return Webhook((nameless,))


def _run_of(check: dict[str, Any], repository: str | None) -> int | None:
    """The run a check's page belongs to, if it is a run of this very repository."""
    for name in ("details_url", "html_url"):
        found = _RUN_URL.match(_read.web_url(check.get(name)) or "")
        if found and found[1].casefold() == (repository or "").casefold():
            return int(found[2]) or None
    return None


# ---- our webhook at GitHub -----------------------------------------------------------------------
# https://docs.github.com/en/rest/repos/webhooks

HOOK_EVENTS = frozenset({"workflow_run", "workflow_job"})
DELIVERED_EVENTS = HOOK_EVENTS | {"check_run"}
HOOK_PERMISSION = "repository permission Webhooks (read and write), or scope admin:repo_hook"


def list_hooks(source: Source, repository: str) -> Call | None:
    """`GET /repos/OWNER/REPO/hooks`; None if it is no repository."""
    if not source.api_url or not _is_repository(repository):
        return None
    return _call(source, "GET", f"repos/{repository}/hooks?per_page=100")


def _call(source: Source, method: str, path: str, content: object = None) -> Call:
    body = b"" if content is None else json.dumps(content).encode()
    headers = _headers(source) | ({"Content-Type": "application/json"} if body else {})
    return Call(method, f"{source.api_url}/{path}", headers, body)


def parse_hooks(answer: Answer) -> tuple[Hook, ...]:
    """The webhooks of a repository, those of its organization not included."""
    return tuple(map(_hook, _read.fetched_items(answer)))


def parse_hook(answer: Answer) -> Hook:
    """The webhook that was made or changed."""
    return _hook(_read.done(answer))


def _hook(data: dict[str, Any]) -> Hook:
    config = _read.mapping(data.get("config"))
    return Hook(
        id=str(_read.whole(data.get("id")) or ""),
        url=_read.text(config.get("url"), _read.URL_CHARS) or "",
        active=data.get("active") is True,
        events=frozenset(event for event in _read.items(data.get("events")) if isinstance(event, str)),
        has_secret=bool(config.get("secret")),
        alert=None if data.get("active") is True else "it is switched off",
        last_status=_read.whole(_read.mapping(data.get("last_response")).get("code")),
    )


def create_hook(source: Source, repository: str, url: str, secret: str) -> Call:
    """`POST …/hooks`."""
    wanted = {"name": "web", **_wanted(url, secret)}
    return _call(source, "POST", f"repos/{repository}/hooks", wanted)


def update_hook(source: Source, repository: str, hook_id: str, url: str, secret: str) -> Call:
    """`PATCH …/hooks/ID`; a `config` replaces the whole one, so it is sent whole."""
    return _call(source, "PATCH", f"repos/{repository}/hooks/{hook_id}", _wanted(url, secret))


def _wanted(url: str, secret: str) -> dict[str, Any]:
    config = {"url": url, "content_type": "json", "secret": secret, "insecure_ssl": "0"}
    return {"active": True, "events": sorted(HOOK_EVENTS), "config": config}


def delete_hook(source: Source, repository: str, hook_id: str) -> Call:
    """`DELETE …/hooks/ID`."""
    return _call(source, "DELETE", f"repos/{repository}/hooks/{hook_id}")


def list_deliveries(source: Source, repository: str, hook_id: str) -> Call:
    """`GET …/hooks/ID/deliveries?status=failure`, newest first; GitHub keeps them for three days."""
    return _call(source, "GET", f"repos/{repository}/hooks/{hook_id}/deliveries?status=failure&per_page=100")


def parse_deliveries(hook_id: str, answer: Answer) -> tuple[HookDelivery, ...]:
    """One page of deliveries; a redelivery has its first one's GUID and an id of its own."""
    return tuple(
        HookDelivery(
            id=str(_read.whole(item.get("id")) or ""),
            envelope=Envelope(
                event=_read.text(item.get("event")) or "",
                hook_id=hook_id,
                delivery_id=_read.text(item.get("guid")) or "",
            ),
            ok=item.get("status") == "OK",
            at=_read.moment(item.get("delivered_at")),
        )
        for item in _read.fetched_items(answer)
    )


def next_deliveries(source: Source, answer: Answer) -> Call | None:
    """The page that the `Link` header names; its cursor is told nowhere else."""
    url = _read.next_page(source, answer)
    return Call("GET", url, _headers(source)) if url else None


def redeliver(source: Source, repository: str, hook_id: str, delivery_id: str) -> Call:
    """`POST …/deliveries/ID/attempts`: send it once more, with the same GUID."""
    return _call(source, "POST", f"repos/{repository}/hooks/{hook_id}/deliveries/{delivery_id}/attempts")


def token_call(source: Source) -> Call:
    """`GET /rate_limit`: costs nothing, and any kind of token may ask."""
    return _call(source, "GET", "rate_limit")


def parse_token(answer: Answer) -> TokenFacts:
    """Scopes are told of classic tokens, the expiry of personal ones; a server without limits answers 404."""
    if answer.status != 404 or b"Rate limiting is not enabled" not in answer.body:
        _read.fetched(answer)
    scopes = answer.headers.get("x-oauth-scopes")
    return TokenFacts(
        tuple(scope.strip() for scope in scopes.split(",") if scope.strip()) if scopes else None,
        _read.moment(answer.headers.get("github-authentication-token-expiration")),
    )


# ---- logs and artifacts --------------------------------------------------------------------------

_MOST_LOGS = 5
"""Each log costs a request; with more failed jobs the first ones tell what is wrong."""

_FAILURES = {"failure", "timed_out", "startup_failure"}


def ended_jobs_request(source: Source, target: PollTarget) -> Request | None:
    """`GET …/runs/ID/attempts/N/jobs`."""
    return _below(source, target, f"/attempts/{target.platform_attempt}/jobs?per_page=100")


def _below(source: Source, target: PollTarget, path: str) -> Request | None:
    run = poll_request(source, target)
    return replace(run, url=run.url + path) if run else None


def parse_ended_jobs(answer: Answer) -> tuple[EndedJob, ...]:
    """The jobs of an attempt; or raises `PollError`.

    A skipped job has no log, nor has one that was cancelled before its first step.
    """
    found = []
    for job in map(_read.mapping, _read.items(_read.fetched(answer).get("jobs"))):
        job_id, ended_as = _read.whole(job.get("id")), _read.text(job.get("conclusion"))
        if job_id:
            failed = ended_as in _FAILURES
            ran = failed or (ended_as != "skipped" and bool(_read.items(job.get("steps"))))
            found.append(EndedJob(job_id, _read.text(job.get("name")) or str(job_id), failed, ran))
    return tuple(found)


def log_files(
    source: Source, target: PollTarget, jobs: tuple[EndedJob, ...], everything: bool
) -> tuple[LogFile, ...]:
    """The log of each failed job; of the whole attempt, as a ZIP, if `everything` is wanted or none failed.

    Both answer with a redirect to a store that must not see our token; the address is good for a minute.
    """
    failed = [job for job in jobs if job.failed][:_MOST_LOGS]
    if everything or not failed:
        archive = _below(source, target, f"/attempts/{target.platform_attempt}/logs")
        return (LogFile("run", archive, zipped=True),) if archive and any(job.ran for job in jobs) else ()
    place = f"{source.api_url}/repos/{target.repository}/actions/jobs"
    return tuple(LogFile(job.name, Request(f"{place}/{job.id}/logs", _headers(source))) for job in failed)


def log_tail(file: LogFile, headers: Headers, after: int, most_bytes: int) -> tuple[Request, int] | None:
    """None: a log comes from its begin."""
    return None


def log_grows(headers: Headers) -> bool:
    """No: there is no log before its job is over."""
    return False


def annotations_request(source: Source, target: PollTarget, job: EndedJob) -> Request | None:
    """`GET /repos/OWNER/REPO/check-runs/JOB/annotations`: a job and its check run share their id."""
    place = f"{source.api_url}/repos/{target.repository}/check-runs"
    return Request(f"{place}/{job.id}/annotations?per_page=50", _headers(source))


def parse_annotations(answer: Answer) -> tuple[str, ...]:
    """`path:line: message` of each failure; or raises `PollError`."""
    found = []
    for note in _read.fetched_items(answer):
        message, path = _read.text(note.get("message"), 1000), _read.text(note.get("path"))
        if note.get("annotation_level") == "failure" and message:
            line = _read.count(note.get("start_line"))
            found.append(f"{path}:{line}: {message}" if path and path != ".github" else message)
    return tuple(found)


def artifacts_request(source: Source, target: PollTarget) -> Request | None:
    """`GET …/runs/ID/artifacts`: of all attempts."""
    return _below(source, target, "/artifacts?per_page=100")


def parse_artifacts(answer: Answer) -> tuple[Artifact, ...]:
    """The newest artifact of each name; or raises `PollError`.  `digest` is that of the ZIP."""
    found = []
    for one in map(_read.mapping, _read.items(_read.fetched(answer).get("artifacts"))):
        artifact_id, name = _read.whole(one.get("id")), _read.text(one.get("name"))
        if artifact_id and name:
            found.append(
                Artifact(
                    name=name,
                    ref=str(artifact_id),
                    size_bytes=_read.size(one.get("size_in_bytes")),
                    digest=_read.sha256(one.get("digest")),
                    created_at=_read.moment(one.get("created_at")),
                    expires_at=_read.moment(one.get("expires_at")),
                    expired=one.get("expired") is True,
                )
            )
    return newest(found)


def artifact_request(source: Source, target: PollTarget, ref: str) -> Request | None:
    """`GET /repos/OWNER/REPO/actions/artifacts/ID/zip`: a redirect to the store."""
    if poll_request(source, target) is None or not re.fullmatch("[0-9]{1,19}", ref):
        return None
    return Request(
        f"{source.api_url}/repos/{target.repository}/actions/artifacts/{ref}/zip", _headers(source)
    )
