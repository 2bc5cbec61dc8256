"""GitLab CI.

Webhooks: https://docs.gitlab.com/user/project/integrations/webhook_events/
REST: https://docs.gitlab.com/api/pipelines/

GitLab numbers no attempts: a retry or a played manual job runs the same pipeline again.  What
tells them from late deliveries are job ids and GitLab's own clock, so both are passed on with care:

* A pipeline's clock is the latest time in it.  REST has `updated_at`.
* A job that runs shows that its pipeline runs, at the time the job began: late, that is older than
  the pipeline's end and changes nothing; after a retry it is newer, and the job is new.
* A job that has ended says nothing about its pipeline (its event and the pipeline's last one are
  sent side by side and overtake each other): it only counts for progress.
* A job names a branch, but not of which project: of a merge request's it may be a fork's.  So it says
  nothing about the branch.
* A job that has not begun says nothing at all.  Its event may be old (a manual job was `created`
  once), and keeping its id would hide a retry from the pipeline event that proves it.
* A child pipeline is in no list of its project: its source is `parent_pipeline`.
* The jobs that REST lists are read a moment after their pipeline.  They count only if they show it
  running exactly as it was read: else their ids may be those of a retry.
"""

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode, urlsplit

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
    NotJson,
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

NAME = "gitlab"
CONTENT_TYPES = ("application/json",)
SIGNATURE_HEADERS = ("webhook-signature", "x-gitlab-token")

MANNERS = Manners(at_once=4, per_minute=1000, free_unchanged=False, lists_changes=True)
"""A 304 counts like any other request.  GitLab.com allows 2 000 a minute and user."""

_NOT_BEGUN = {"created", "waiting_for_resource", "preparing", "waiting_for_callback", "pending"}
_WAITING = {"manual", "scheduled"}
_RUNNING = {"running", "canceling"}
_ENDS = {
    "success": (State.COMPLETED, Conclusion.SUCCESS),
    "skipped": (State.COMPLETED, Conclusion.SKIPPED),
    "canceled": (State.CANCELLED, Conclusion.CANCELLED),
    "failed": (State.FAILED, Conclusion.FAILURE),
}
"""All statuses: https://docs.gitlab.com/api/pipelines/#list-project-pipelines"""

_JOB_STATUS = (
    dict.fromkeys(_WAITING, JobStatus.MANUAL)
    | dict.fromkeys(_RUNNING, JobStatus.IN_PROGRESS)
    | dict.fromkeys(_ENDS, JobStatus.COMPLETED)
)

_CHILD = "parent_pipeline"
"""https://docs.gitlab.com/api/pipelines/#list-project-pipelines"""

_RETRY_GAP = timedelta(minutes=1)

_TIME_OUTS = {"job_execution_timeout", "stuck_or_timeout_failure"}

_JOBS_PAGE = 100

_PIPELINE_PATH = re.compile(r"(.+?)(?:/-)?/pipelines/[0-9]+/?")
_SSH_ADDRESS = re.compile(r"(?:ssh://[^/]+/|[^/:@\s]+@[^/:\s]+:/?)(.+?)(?:\.git)?/?")

_MERGE_REQUEST = "merge_request_event"


# ---- webhooks ------------------------------------------------------------------------------------


def verify(headers: Headers, body: bytes, secrets: tuple[str, ...], now: float) -> None:
    """Check the signature if there is one, else the plain token; or raise `BadSignature`.

    `secrets` that begin with `whsec_` are signing tokens, the others are compared with
    `X-Gitlab-Token`.  A wrong signature never falls back to the token, and with nothing but
    signing tokens set an unsigned request is refused.  (`webhook-id` alone does not mean "signed":
    GitLab sends it with every hook.)
    """
    if "webhook-signature" in headers:
        signing_tokens = tuple(secret for secret in secrets if secret.startswith(signing.HMAC_PREFIX))
        age_seconds = signing.v1_age_seconds(headers, body, signing_tokens, now)
        if not signing.is_recent(age_seconds):
            raise BadSignature(age_seconds)
    else:
        plain = tuple(secret for secret in secrets if not secret.startswith(signing.HMAC_PREFIX))
        if not signing.verify_token(headers.get("x-gitlab-token"), plain):
            raise BadSignature


def envelope(headers: Headers, body: bytes) -> Envelope:
    """Event and message id; GitLab's two other ids name a chain of requests and a random number."""
    return Envelope(
        event=headers.get("x-gitlab-event", ""),
        hook_id="",
        delivery_id=headers.get("webhook-id") or headers.get("idempotency-key") or _read.digest(body),
    )


def parse_webhook(source: Source, headers: Headers, body: bytes) -> Webhook:
    """What a delivery says, by its `object_kind`; raises `NotJson` or `Unreadable`."""
    payload = _read.loads(body)
    kind = _read.need_text(payload, "object_kind")
    if kind == "pipeline":
        return Webhook((_pipeline_hook(source, payload),))
    if kind == "build":
        return Webhook((_job_hook(source, payload),))
    return Webhook(ignored=f"the event {kind} carries no build state")


# ---- polls ---------------------------------------------------------------------------------------


def poll_request(source: Source, target: PollTarget) -> Request | None:
    """`GET /api/v4/projects/ID/pipelines/ID`; None without both ids in the key."""
    ids = re.fullmatch(r"[^:]+:([0-9]{1,19}):([0-9]{1,19})", target.key)
    if not source.api_url or ids is None:
        return None
    return Request(f"{source.api_url}/api/v4/projects/{ids[1]}/pipelines/{ids[2]}", _headers(source))


def _headers(source: Source) -> dict[str, str]:
    headers = {"Accept": "application/json", "User-Agent": _read.USER_AGENT}
    if source.lent:
        return headers | {"Authorization": f"Bearer {source.token}"}
    return headers | ({"PRIVATE-TOKEN": source.token} if source.token else {})


def parse_poll(source: Source, target: PollTarget, answer: Answer) -> Observation:
    """The pipeline that was read; or raises `PollError`.

    Its jobs are not in it, so a failure by time-out reads `failed` here: `follow_up` asks for them.
    """
    pipeline = _read.fetched(answer)
    try:
        seen = _rest_pipeline(source, target.repository, pipeline)
    except Unreadable as error:
        raise PollError(PollFault.UNREADABLE, str(error)) from error
    if seen.key != target.key:
        raise PollError(PollFault.UNREADABLE, f"the answer is about {seen.key}, not {target.key}")
    return seen


def follow_up(source: Source, seen: Observation) -> Request | None:
    """`GET …/pipelines/ID/jobs?scope[]=failed` of a failed pipeline: did it run out of time?

    And `GET …/pipelines/ID` of one that waits for a person: a list does not tell whether it has begun.
    """
    _name, project, pipeline = seen.key.rsplit(":", 2)
    path = f"{source.api_url}/api/v4/projects/{project}/pipelines/{pipeline}"
    if seen.state is State.FAILED:
        return Request(f"{path}/jobs?scope[]=failed&per_page=100", _headers(source))
    if seen.waiting and seen.started_at is None:
        return Request(path, _headers(source))
    return None


def parse_follow_up(seen: Observation, answer: Answer) -> Observation:
    """The failed pipeline, as a time-out if that is why its jobs failed; or when a waiting one began."""
    if seen.state is not State.FAILED:
        pipeline = _read.fetched(answer)
        started_at = _read.moment(pipeline.get("started_at"))
        same = pipeline.get("status") == seen.raw_status
        return replace(seen, state=State.IN_PROGRESS, started_at=started_at) if same and started_at else seen
    if not _timed_out(_read.fetched_items(answer)):
        return seen
    return replace(seen, state=State.TIMEOUT, conclusion=Conclusion.TIMED_OUT)


def jobs_request(source: Source, target: PollTarget) -> Request | None:
    """`GET …/pipelines/ID/jobs`: the newest job of each name, without those that were retried."""
    pipeline = poll_request(source, target)
    return replace(pipeline, url=f"{pipeline.url}/jobs?per_page={_JOBS_PAGE}") if pipeline else None


def parse_jobs(source: Source, seen: Observation, answer: Answer) -> Observation:
    """The pipeline with its jobs, if all are on the page and of the same moment; or raises `PollError`."""
    jobs = _read.fetched_items(answer)
    facts = tuple(fact for fact in map(_rest_job_fact, jobs) if fact is not None)
    complete = bool(facts) and len(facts) == len(jobs) < _JOBS_PAGE
    same = all(_is_of(seen, _read.mapping(job.get("pipeline"))) for job in jobs)
    over = seen.state is not None and seen.state.terminal
    return replace(seen, jobs=facts, jobs_complete=True) if complete and same and not over else seen


def _is_of(seen: Observation, pipeline: dict[str, Any]) -> bool:
    """Does a job show the pipeline as it was read?  Old servers don't tell the time of its last change."""
    id_, status = _read.whole(pipeline.get("id")), _read.text(pipeline.get("status"))
    changed_at = _read.moment(pipeline.get("updated_at"))
    return (
        seen.key.endswith(f":{id_}")
        and status is not None
        and status == seen.raw_status
        and changed_at in (None, seen.platform_at)
    )


def _rest_job_fact(job: dict[str, Any]) -> JobFact | None:
    """REST does not tell which jobs are manual; a `created` one counts as such, for the same reason."""
    return _job_fact({**job, "manual": True})


def together(repository: str) -> str:
    """Each project has a list of its own."""
    return repository


_OVERLAP = timedelta(seconds=60)


def list_request(
    source: Source, repositories: Sequence[str], since: datetime | None, most: int
) -> Request | None:
    """`GET /api/v4/projects/ID/pipelines`, newest change first; a repository is an id or a path.

    `since` is GitLab's own clock (an `updated_at`); the minute before it is looked at again.
    """
    (repository,) = repositories
    if not source.api_url or not repository:
        return None
    query = f"order_by=updated_at&sort=desc&per_page={min(most, 100)}"
    if since is not None:
        query += f"&updated_after={(since - _OVERLAP).astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
    path = f"/api/v4/projects/{_read.path_part(repository)}/pipelines?{query}"
    return Request(source.api_url + path, _headers(source))


def parse_list(source: Source, repositories: Sequence[str], answer: Answer) -> Listing:
    """The pipelines that can be read; or raises `PollError`."""
    (repository,) = repositories
    found = []
    for pipeline in _read.fetched_items(answer):
        with suppress(Unreadable):
            found.append(_rest_pipeline(source, None if repository.isdigit() else repository, pipeline))
    more = _read.next_page(source, answer)
    return Listing(tuple(found), Request(more, _headers(source)) if more else None)


def repository_request(source: Source, target: PollTarget) -> Request | None:
    """`GET /api/v4/projects/ID`."""
    pipeline = poll_request(source, target)
    return Request(pipeline.url.partition("/pipelines/")[0], pipeline.headers) if pipeline else None


def parse_repository(answer: Answer) -> None:
    """Raises `PollError` unless the repository was shown."""
    _read.fetched(answer)


def limits(answer: Answer) -> Limits | None:
    """The budget of the minute; GitLab's own servers tell it, others often don't."""
    return _read.limits(answer)


def named(source: Source, build_id: str) -> Observation | None:
    """The pipeline that `SOURCE:PROJECT_ID:PIPELINE_ID` means."""
    parts = re.fullmatch(r"[^:]+:([1-9][0-9]{0,17}):([1-9][0-9]{0,17})", build_id)
    return _about(source, int(parts[1]), int(parts[2]), ObservedBy.POLL) if parts else None


def _rest_pipeline(source: Source, repository: str | None, pipeline: dict[str, Any]) -> Observation:
    status = _read.need_text(pipeline, "pipeline.status")
    state, conclusion = _state(status, begun=_read.moment(pipeline.get("started_at")) is not None)
    url = _read.web_url(pipeline.get("web_url"))
    return replace(
        _about(
            source,
            _read.need_id(pipeline, "pipeline.project_id"),
            _read.need_id(pipeline, "pipeline.id"),
            ObservedBy.POLL,
        ),
        state=state,
        conclusion=conclusion,
        raw_status=status,
        waiting=status in _WAITING,
        repository=repository or _project_path(source, page=url),
        workflow=_read.text(pipeline.get("name")) or _read.text(pipeline.get("source")),
        unlisted=pipeline.get("source") == _CHILD,
        trigger=_trigger(pipeline),
        branch=_ref(pipeline),
        commit=_read.text(pipeline.get("sha")),
        number=_read.whole(pipeline.get("iid")),
        url=url,
        started_at=_read.moment(pipeline.get("started_at")),
        ended_at=_end(state, pipeline),
        platform_at=_read.moment(pipeline.get("updated_at")),
        created_at=_read.moment(pipeline.get("created_at")),
    )


def _project_path(
    source: Source, *, path: object = None, ssh: object = None, page: object = None, name: object = None
) -> str | None:
    """`group/project`, from the best that a payload has: the one reading of it for hooks and REST.

    `path`: the path itself.  `ssh`: the address for `git clone`, where nothing stands before it.  `page`: a
    page of the project or of a pipeline, less the path that GitLab lives under by our settings; where those
    don't know it, the display `name` (`Group / Project`) tells how many parts are the project's.
    """
    known = _read.text(path)
    found = _SSH_ADDRESS.fullmatch(_read.text(ssh, _read.URL_CHARS) or "")
    if known or found:
        return known or (_read.text(found[1]) if found else None)
    parts = urlsplit(_read.web_url(page) or "").path.removeprefix(urlsplit(source.api_url).path).strip("/")
    of_pipeline = _PIPELINE_PATH.fullmatch(parts)
    names = (of_pipeline[1] if of_pipeline else parts).split("/")
    depth = (_read.text(name) or "").count(" / ")
    return _read.text("/".join(names[-depth - 1 :] if depth else names))


# ---- OAuth ---------------------------------------------------------------------------------------

# https://docs.gitlab.com/api/oauth2/

_OAUTH_SECONDS = 7200


@dataclass(frozen=True, slots=True)
class OAuth:
    """An OAuth application and the first refresh token a person got for it."""

    client_id: str
    client_secret: str = field(repr=False)
    refresh_token: str = field(repr=False)


def refresh_request(source: Source, oauth: OAuth, refresh_token: str) -> Call:
    """`POST /oauth/token`: from GitLab's answer on, both old tokens are void."""
    asked = {
        "grant_type": "refresh_token",
        "refresh_token": refresh_token,
        "client_id": oauth.client_id,
        "client_secret": oauth.client_secret,
    }
    headers = _headers(replace(source, token="", lent=False))
    headers["Content-Type"] = "application/x-www-form-urlencoded"
    body = urlencode({name: value for name, value in asked.items() if value}).encode()
    return Call("POST", f"{source.api_url}/oauth/token", headers, body)


def parse_refresh(answer: Answer, now: datetime) -> Grant:
    """Both new tokens; or raises `PollError`: a refused refresh token or application is UNAUTHORIZED.

    Where no new refresh token is told, the old one stays (RFC 6749 section 6).
    """
    if answer.status in (400, 401, 403):
        raise PollError(PollFault.UNAUTHORIZED, f"HTTP {answer.status}{_oauth_reason(answer)}")
    told = _read.fetched(answer)
    return Grant(
        _read.bearer(told.get("access_token"), "access_token"),
        now + timedelta(seconds=_read.count(told.get("expires_in")) or _OAUTH_SECONDS),
        _read.bearer(told["refresh_token"], "refresh_token") if "refresh_token" in told else "",
    )


def _oauth_reason(answer: Answer) -> str:
    """`: invalid_grant: The provided …` (RFC 6749 section 5.2)."""
    try:
        told = _read.loads(answer.body)
    except (NotJson, Unreadable):
        return ""
    words = (_read.text(told.get("error"), 100), _read.text(told.get("error_description"), 300))
    return "".join(f": {word}" for word in words if word)


# ---- pipelines -----------------------------------------------------------------------------------


def _pipeline_hook(source: Source, payload: dict[str, Any]) -> Observation:
    pipeline = _read.need_mapping(payload, "object_attributes")
    project = _read.need_mapping(payload, "project")
    pipeline_id = _read.need_id(pipeline, "object_attributes.id")
    status = _read.need_text(pipeline, "object_attributes.status")
    builds = [_read.mapping(build) for build in _read.items(payload.get("builds"))]
    jobs = tuple(fact for fact in map(_job_fact, builds) if fact is not None)
    state, conclusion = _state(status, begun=any(map(_has_begun, builds)))
    if status == "failed" and _timed_out(builds):
        state, conclusion = State.TIMEOUT, Conclusion.TIMED_OUT
    project_id = _read.need_id(project, "project.id")
    fork, ref = _fork(payload, project_id), _ref(pipeline)
    return replace(
        _about(source, project_id, pipeline_id, ObservedBy.PUSH),
        state=state,
        conclusion=conclusion,
        raw_status=status,
        waiting=status in _WAITING,
        repository=_project_path(
            source,
            path=project.get("path_with_namespace"),
            ssh=project.get("git_ssh_url"),
            page=project.get("web_url"),
        ),
        workflow=_read.text(pipeline.get("name")) or _read.text(pipeline.get("source")),
        unlisted=pipeline.get("source") == _CHILD,
        trigger=_trigger(pipeline),
        branch=f"{fork.rpartition('/')[0] or fork}:{ref}" if fork and ref else ref,
        head_repository=fork,
        is_fork=fork is not None,
        commit=_read.text(pipeline.get("sha")),
        number=_read.whole(pipeline.get("iid")),
        url=_read.web_url(pipeline.get("url")) or _pipeline_page(project.get("web_url"), pipeline_id),
        started_at=_start(builds),
        ended_at=_end(state, pipeline),
        platform_at=_latest(
            *_times([pipeline], "created_at", "finished_at"), *_times(builds, "started_at", "finished_at")
        ),
        created_at=_read.moment(pipeline.get("created_at")),
        jobs=jobs,
        jobs_complete=bool(jobs) and len(jobs) == len(builds),
    )


def _state(status: str, *, begun: bool) -> tuple[State | None, Conclusion | None]:
    """State and conclusion of a pipeline; `begun`: a job of it has ever started."""
    if status in _NOT_BEGUN or status in _WAITING:
        return (State.IN_PROGRESS if begun else State.QUEUED), None
    if status in _RUNNING:
        return State.IN_PROGRESS, None
    return _ENDS.get(status, (None, None))


def _timed_out(builds: Iterable[dict[str, Any]]) -> bool:
    """Did every job that made the pipeline fail run out of time?  (None at all: the YAML is broken.)"""
    reasons = [
        _read.text(build.get("failure_reason"))
        for build in builds
        if build.get("status") == "failed" and build.get("allow_failure") is not True
    ]
    return bool(reasons) and all(reason in _TIME_OUTS for reason in reasons)


def _has_begun(build: dict[str, Any]) -> bool:
    return _read.moment(build.get("started_at")) is not None


def _job_fact(build: dict[str, Any]) -> JobFact | None:
    """One entry of `builds`; None if it has no id.

    A manual job is `created` until its turn comes.  It counts as manual from the beginning, so
    that an old event can't look as if somebody had played it.
    """
    job_id, status = _read.whole(build.get("id")), _read.text(build.get("status")) or ""
    if job_id is None:
        return None
    known = _JOB_STATUS.get(status, JobStatus.QUEUED)
    if status == "created" and (build.get("manual") is True or build.get("when") == "manual"):
        known = JobStatus.MANUAL
    return JobFact(id=job_id, name=_read.text(build.get("name")) or "", status=known)


def _start(builds: list[dict[str, Any]]) -> datetime | None:
    """When the first job of the newest run began.

    A pipeline's jobs are created together; a retry adds new ones long after, and those from before
    belong to an earlier run.
    """
    newest = max(_times(builds, "created_at"), default=None)
    if newest is None:
        return None
    run = [build for build in builds if any(at > newest - _RETRY_GAP for at in _times([build], "created_at"))]
    return min(_times(run, "started_at"), default=None)


def _end(state: State | None, pipeline: dict[str, Any]) -> datetime | None:
    """`finished_at` of a pipeline that is over: while a retry runs, it may still show the old one."""
    return _read.moment(pipeline.get("finished_at")) if state is not None and state.terminal else None


def _ref(holder: dict[str, Any]) -> str | None:
    """The branch as it is shown: `refs/tags/NAME` for a tag, which is no branch of the same name.

    REST shows merge request pipelines as `refs/merge-requests/1/head`, which is no branch.
    """
    name = _read.text(holder.get("ref"))
    if name is None or name.startswith("refs/merge-requests/"):
        return None
    return f"refs/tags/{name}" if holder.get("tag") is True else name


def _trigger(pipeline: dict[str, Any]) -> str | None:
    """What started it: GitLab's `source`, but `tag` for a push of a tag and `pull_request` as elsewhere."""
    told = _read.text(pipeline.get("source"))
    if pipeline.get("tag") is True and told in (None, "push"):
        return "tag"
    return "pull_request" if told == _MERGE_REQUEST else told


def _fork(payload: dict[str, Any], project_id: int) -> str | None:
    """The project that the source branch of a merge request is in, if it is another: its path, or its id.

    GitLab tells null when that project is gone: `unknown` then.
    """
    request = _read.mapping(payload.get("merge_request"))
    told = request.get("source_project_id", project_id)
    source_id = (
        int(told) if isinstance(told, str) and re.fullmatch("[0-9]{1,18}", told) else _read.whole(told)
    )
    source, target = (_read.mapping(request.get(name)) for name in ("source", "target"))
    path = _read.text(source.get("path_with_namespace"))
    if source_id == project_id:
        return None
    if source_id is None and path is not None:  # so tells another BuildRelay, which knows the path alone
        return None if path == _read.text(target.get("path_with_namespace")) else path
    return path or ("unknown" if source_id is None else str(source_id))


# ---- jobs ----------------------------------------------------------------------------------------


def _job_hook(source: Source, payload: dict[str, Any]) -> Observation:
    """One job's event; the module's docstring tells what it may say about its pipeline."""
    project, repository = _read.mapping(payload.get("project")), _read.mapping(payload.get("repository"))
    pipeline_id = _read.need_id(payload, "pipeline_id")
    status = _read.need_text(payload, "build_status")
    fact = JobFact(
        id=_read.need_id(payload, "build_id"),
        name=_read.text(payload.get("build_name")) or "",
        status=_JOB_STATUS.get(status, JobStatus.QUEUED),
    )
    page = _read.web_url(project.get("web_url")) or _read.web_url(repository.get("homepage"))
    runs = fact.status is JobStatus.IN_PROGRESS
    return replace(
        _about(source, _read.need_id(payload, "project_id"), pipeline_id, ObservedBy.PUSH),
        state=State.IN_PROGRESS if runs else None,
        repository=_project_path(
            source,
            path=project.get("path_with_namespace"),
            ssh=repository.get("git_ssh_url") or repository.get("url"),
            page=page,
            name=payload.get("project_name"),
        ),
        commit=_read.text(payload.get("sha")),
        url=_pipeline_page(page, pipeline_id),
        platform_at=_read.moment(payload.get("build_started_at")) if runs else None,
        job_created_at=_read.moment(payload.get("build_created_at")),
        jobs=(fact,) if runs or fact.status is JobStatus.COMPLETED else (),
    )


# ---- both ----------------------------------------------------------------------------------------


def _about(source: Source, project_id: int, pipeline_id: int, observed_by: ObservedBy) -> Observation:
    """An observation that only names its pipeline."""
    build_id = f"{source.name}:{project_id}:{pipeline_id}"
    return Observation(
        source=source.name, platform=NAME, observed_by=observed_by, key=build_id, build_id=build_id
    )


def _pipeline_page(project_url: object, pipeline_id: int) -> str | None:
    page = _read.web_url(project_url)
    return f"{page.rstrip('/')}/-/pipelines/{pipeline_id}" if page else None


def _times(holders: Iterable[dict[str, Any]], *names: str) -> list[datetime]:
    found = (_read.moment(holder.get(name)) for holder in holders for name in names)
    return [at for at in found if at is not None]


def _latest(*times: datetime) -> datetime | None:
    return max(times, default=None)


# ---- our webhook at GitLab -----------------------------------------------------------------------
# https://docs.gitlab.com/api/project_webhooks/

HOOK_EVENTS = frozenset({"pipeline_events", "job_events"})
DELIVERED_EVENTS = frozenset({"Pipeline Hook", "Job Hook"})
HOOK_PERMISSION = "a token with scope api and the role Maintainer"


def list_hooks(source: Source, repository: str) -> Call | None:
    """`GET /projects/ID/hooks`; None without a project."""
    if not source.api_url or not repository:
        return None
    return _call(source, "GET", f"projects/{_read.path_part(repository)}/hooks?per_page=100")


def _call(source: Source, method: str, path: str, content: object = None) -> Call:
    body = b"" if content is None else json.dumps(content).encode()
    headers = _headers(source) | ({"Content-Type": "application/json"} if body else {})
    return Call(method, f"{source.api_url}/api/v4/{path}", headers, body)


def parse_hooks(answer: Answer) -> tuple[Hook, ...]:
    """The webhooks of a project, those of its groups not included."""
    return tuple(map(_hook, _read.fetched_items(answer)))


def parse_hook(answer: Answer) -> Hook:
    """The webhook that was made or changed."""
    return _hook(_read.done(answer))


_MUTED = {"disabled": "GitLab has disabled it", "temporarily_disabled": "GitLab has muted it for a while"}


def _hook(data: dict[str, Any]) -> Hook:
    """Servers before 19.0 know no signing token, those before 17 may not tell of a token at all."""
    told = [data[name] for name in ("signing_token_present", "token_present") if name in data]
    alert = _MUTED.get(_read.text(data.get("alert_status")) or "")
    return Hook(
        id=str(_read.whole(data.get("id")) or ""),
        url=_read.text(data.get("url"), _read.URL_CHARS) or "",
        active=alert is None,
        events=frozenset(event for event in HOOK_EVENTS if data.get(event) is True),
        has_secret=any(present is True for present in told) if told else None,
        alert=alert,
    )


def create_hook(source: Source, repository: str, url: str, secret: str) -> Call:
    """`POST …/hooks`."""
    return _call(source, "POST", f"projects/{_read.path_part(repository)}/hooks", _wanted(url, secret))


def update_hook(source: Source, repository: str, hook_id: str, url: str, secret: str) -> Call:
    """`PUT …/hooks/ID`."""
    path = f"projects/{_read.path_part(repository)}/hooks/{hook_id}"
    return _call(source, "PUT", path, _wanted(url, secret))


def _wanted(url: str, secret: str) -> dict[str, Any]:
    kind = "signing_token" if secret.startswith(signing.HMAC_PREFIX) else "token"
    events = dict.fromkeys(sorted(HOOK_EVENTS), True)
    return {"url": url, "push_events": False, "enable_ssl_verification": True, **events, kind: secret}


def delete_hook(source: Source, repository: str, hook_id: str) -> Call:
    """`DELETE …/hooks/ID`."""
    return _call(source, "DELETE", f"projects/{_read.path_part(repository)}/hooks/{hook_id}")


def list_deliveries(source: Source, repository: str, hook_id: str) -> Call:
    """`GET …/hooks/ID/events`, newest first, of the last seven days.

    Unfiltered: no filter shows those without an answer.  Few per page: each carries its whole body.
    """
    return _call(source, "GET", f"projects/{_read.path_part(repository)}/hooks/{hook_id}/events?per_page=20")


def parse_deliveries(hook_id: str, answer: Answer) -> tuple[HookDelivery, ...]:
    """One page of deliveries; a resent one has its first one's key and an id of its own."""
    return tuple(map(_delivery, _read.fetched_items(answer)))


def _delivery(item: dict[str, Any]) -> HookDelivery:
    sent = {name.lower(): value for name, value in _read.mapping(item.get("request_headers")).items()}
    status = str(item.get("response_status"))
    key = _read.text(sent.get("webhook-id")) or _read.text(sent.get("idempotency-key"))
    return HookDelivery(
        id=str(_read.whole(item.get("id")) or ""),
        envelope=Envelope(_read.text(sent.get("x-gitlab-event")) or "", "", key or ""),
        ok=re.fullmatch("[23][0-9]{2}", status) is not None,
        at=_read.moment(item.get("created_at")),
    )


def next_deliveries(source: Source, answer: Answer) -> Call | None:
    """The page that the `Link` header names."""
    url = _read.next_page(source, answer)
    return Call("GET", url, _headers(source)) if url else None


def redeliver(source: Source, repository: str, hook_id: str, delivery_id: str) -> Call:
    """`POST …/events/ID/resend`: once more, with the same key; five a minute are allowed."""
    path = f"projects/{_read.path_part(repository)}/hooks/{hook_id}/events/{delivery_id}/resend"
    return _call(source, "POST", path)


def token_call(source: Source) -> Call:
    """`GET /personal_access_tokens/self`: personal, project and group tokens alike."""
    return _call(source, "GET", "personal_access_tokens/self")


def parse_token(answer: Answer) -> TokenFacts:
    """Scopes and the day of the token's end; OAuth tokens (400) and small scopes (403) tell nothing."""
    if answer.status == 400 or (answer.status == 403 and b"insufficient_scope" in answer.body):
        return TokenFacts()
    data = _read.fetched(answer)
    scopes = tuple(scope for scope in _read.items(data.get("scopes")) if isinstance(scope, str))
    day = _read.text(data.get("expires_at"))
    return TokenFacts(scopes, _read.moment(f"{day}T00:00:00+00:00" if day else None))


# ---- logs and artifacts --------------------------------------------------------------------------

_MOST_LOGS = 20


def ended_jobs_request(source: Source, target: PollTarget) -> Request | None:
    """`GET …/pipelines/ID/jobs`: the newest job of each name, with what it left."""
    pipeline = poll_request(source, target)
    return replace(pipeline, url=f"{pipeline.url}/jobs?per_page=100") if pipeline else None


def parse_ended_jobs(answer: Answer) -> tuple[EndedJob, ...]:
    """The jobs; or raises `PollError`.  One that was allowed to fail has not failed the pipeline."""
    found = []
    for job in _read.fetched_items(answer):
        job_id, name = _read.whole(job.get("id")), _read.text(job.get("name"))
        if job_id:
            failed = job.get("status") == "failed" and job.get("allow_failure") is not True
            ran = _has_begun(job) and job.get("erased_at") is None
            found.append(EndedJob(job_id, name or str(job_id), failed, ran))
    return tuple(found)


def log_files(
    source: Source, target: PollTarget, jobs: tuple[EndedJob, ...], everything: bool
) -> tuple[LogFile, ...]:
    """The traces of the failed jobs; of all that ran if `everything` is wanted or none failed."""
    failed = [job for job in jobs if job.failed and job.ran]
    others = [job for job in jobs if job.ran and not job.failed]
    wanted = failed + others if everything or not any(job.failed for job in jobs) else failed
    return tuple(
        LogFile(job.name, request)
        for job in wanted[:_MOST_LOGS]
        if (request := _of_job(source, target, str(job.id), "trace")) is not None
    )


def _of_job(source: Source, target: PollTarget, job_id: str, what: str) -> Request | None:
    project = re.fullmatch(r"[^:]+:([0-9]{1,19}):[0-9]{1,19}", target.key)
    if not source.api_url or project is None or not re.fullmatch("[0-9]{1,19}", job_id):
        return None
    return Request(f"{source.api_url}/api/v4/projects/{project[1]}/jobs/{job_id}/{what}", _headers(source))


def log_tail(file: LogFile, headers: Headers, after: int, most_bytes: int) -> tuple[Request, int] | None:
    """None: only the newest releases know `byte_offset`."""
    return None


def log_grows(headers: Headers) -> bool:
    """No: nothing says so."""
    return False


def annotations_request(source: Source, target: PollTarget, job: EndedJob) -> Request | None:
    """None: GitLab has none."""
    return None


def parse_annotations(answer: Answer) -> tuple[str, ...]:
    """Nothing."""
    return ()


def artifacts_request(source: Source, target: PollTarget) -> Request | None:
    """The same as for the jobs: one request tells both."""
    return ended_jobs_request(source, target)


def parse_artifacts(answer: Answer) -> tuple[Artifact, ...]:
    """The archive of each job, under the job's name; or raises `PollError`.

    Traces and reports (`junit`, `dotenv`, …) are listed beside it and are no archives.
    """
    found = []
    for job in _read.fetched_items(answer):
        job_id, name = _read.whole(job.get("id")), _read.text(job.get("name"))
        files = map(_read.mapping, _read.items(job.get("artifacts")))
        archive = next((file for file in files if file.get("file_type") == "archive"), None)
        if job_id and name and archive:
            found.append(
                Artifact(
                    name=name,
                    ref=str(job_id),
                    size_bytes=_read.size(archive.get("size")),
                    created_at=_read.moment(job.get("finished_at")),
                    expires_at=_read.moment(job.get("artifacts_expire_at")),
                )
            )
    return newest(found)


def artifact_request(source: Source, target: PollTarget, ref: str) -> Request | None:
    """`GET …/jobs/ID/artifacts`: the archive, or a redirect to the object store."""
    return _of_job(source, target, ref, "artifacts")
