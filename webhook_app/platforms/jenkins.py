"""Jenkins, through the Notification plugin and the JSON API.

Webhook: https://github.com/jenkinsci/notification-plugin (README and source)
API: https://www.jenkins.io/doc/book/using/remote-access-api/

* A build is known by its path (`job/team/job/web/12/`): the `name` in the body lacks the folders.
* In `build_id` every character of a name that is not a letter, a digit, `.`, `_` or `-` is written
  `~HH` (hex of its UTF-8 bytes): the id stays what it is in a URL, encoded there or not.  The
  branch job `feature%2Fpay` is `feature~252Fpay`.
* Jenkins ignores the case of names, so the key is folded.
* A rebuild or replay is a new number: there are no attempts.  There is no clock but that of the
  phase, and phases are ordered by rank, so no time orders anything.
* A job that is made again numbers its builds from 1: `queue_id` and the start tell these apart.
* A multibranch project has a job for each branch, whose name is the branch, `/` written as `%2F`.
  Its pushes tell no branch, so it comes from the path.
* A configuration of a matrix project (`job/web/LABEL=linux,JDK=17/4/`) and a module of a Maven one
  (`job/mvn/com.acme$core/4/`) stand below their job, without `job/`: written as a last name that
  begins with `/`.
* COMPLETED and FINALIZED both end a build, whichever is configured; before 1.6 it was FINISHED.
"""

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from webhook_app import signing
from webhook_app.lifecycle import Conclusion, Observation, ObservedBy, State
from webhook_app.platforms import (
    Answer,
    Artifact,
    BadSignature,
    Call,
    EndedJob,
    Envelope,
    Headers,
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

NAME = "jenkins"
CONTENT_TYPES = ("application/json",)
SIGNATURE_HEADERS = ("x-hub-signature-256", "x-build-token", "x-om-build-token")

MANNERS = Manners(at_once=4, per_minute=600, free_unchanged=False, lists_changes=False)
"""Jenkins has no limits and no ETags; it is a single machine that builds meanwhile."""

_TREE = quote(
    "number,url,building,inProgress,result,duration,estimatedDuration,timestamp,queueId,displayName,"
    "executor[progress]",
    safe=",",
)
"""`tree` asks for these fields only; the full answer can be megabytes."""

_BUILDS = f"builds[{unquote(_TREE)}]"

_BEGUN = {"QUEUED": State.QUEUED, "STARTED": State.IN_PROGRESS}
_OVER = {"COMPLETED", "FINALIZED", "FINISHED"}
_RESULTS = {
    "SUCCESS": (State.COMPLETED, Conclusion.SUCCESS),
    "UNSTABLE": (State.FAILED, Conclusion.FAILURE),
    "FAILURE": (State.FAILED, Conclusion.FAILURE),
    "NOT_BUILT": (State.COMPLETED, Conclusion.SKIPPED),
    "ABORTED": (State.CANCELLED, Conclusion.CANCELLED),
}
"""https://javadoc.jenkins.io/hudson/model/Result.html.  UNSTABLE fails, as Jenkins tells GitHub;
NOT_BUILT was skipped."""
_UNKNOWN_RESULT = (State.FAILED, Conclusion.FAILURE)
"""A word we do not know never means success."""

_BUILD_PATH = re.compile(
    r"(?:^|/)((?:job/[^/]+/)+)(?:([^/]*(?:=|\$|%24|%3D)[^/]*)/)?([0-9]{1,10})/?$", re.IGNORECASE
)
_BELOW_A_JOB = re.compile(r"/?[^/]*[=$][^/]*")
"""A matrix configuration (`AXIS=value,…`) or a Maven module (`group$artifact`)."""
_USUAL_BRANCHES = {"main", "master", "develop", "trunk"}
_CHANGE_REQUEST = re.compile(r"(?:PR|MR)-[0-9]+(?:-(?:head|merge))?")
_LONGEST_ID = 1000


@dataclass(frozen=True, slots=True)
class _Path:
    """Where a build lives: the decoded names of its folders and its job, and its number.

    A last name that begins with `/` is a configuration or module below that job.
    """

    names: tuple[str, ...]
    number: int


# ---- webhooks ------------------------------------------------------------------------------------


def verify(headers: Headers, body: bytes, secrets: tuple[str, ...], now: float) -> None:
    """Check `X-Hub-Signature-256` if there is one, else `X-Build-Token`; or raise `BadSignature`.

    The plugin itself can do neither: a pipeline step signs, or a proxy adds the token.
    """
    signature = headers.get("x-hub-signature-256")
    if signature is not None:
        genuine = signing.verify_github(signature, body, secrets)
    else:
        genuine = signing.verify_token(headers.get("x-build-token", headers.get("x-om-build-token")), secrets)
    if not genuine:
        raise BadSignature


def envelope(headers: Headers, body: bytes) -> Envelope:
    """The plugin sends no ids, but its repeats are equal to the byte: the body's digest is the id."""
    try:
        phase = _read.text(_read.mapping(_read.loads(body).get("build")).get("phase"))
    except (NotJson, Unreadable):
        phase = None
    return Envelope(event=phase or "", hook_id="", delivery_id=_read.digest(body))


def parse_webhook(source: Source, headers: Headers, body: bytes) -> Webhook:
    """What a notification says; raises `NotJson` or `Unreadable`."""
    build = _read.need_mapping(_read.loads(body), "build")
    phase = _read.need_text(build, "build.phase").upper()
    status = _read.text(build.get("status"))
    state, conclusion = _state(phase, status)
    scm = _read.mapping(build.get("scm"))
    started_at, ended_at = _times(phase, build)
    about = _about(source, _path(build), ObservedBy.PUSH)
    seen = replace(
        about,
        state=state,
        conclusion=conclusion,
        raw_status=phase,
        raw_conclusion=status,
        branch=_branch(scm.get("branch")) or about.branch or _branch_below(about),
        commit=_read.text(scm.get("commit")),
        url=_read.web_url(build.get("full_url")),
        started_at=started_at,
        ended_at=ended_at,
        queue_id=_queue_id(build.get("queue_id")),
        created_at=None if phase == "FINALIZED" else started_at,
        doubtful=phase in _OVER and status is None,
    )
    return Webhook((seen,))


def _path(build: dict[str, Any]) -> _Path:
    """From `url`, which is relative to Jenkins itself, or from `full_url`."""
    for name in ("url", "full_url"):
        path = _parsed_path(build.get(name))
        if path is not None:
            return path
    raise Unreadable("build.url, build.full_url: a path like job/FOLDER/job/NAME/12/ is needed")


def _state(phase: str, status: str | None) -> tuple[State | None, Conclusion | None]:
    """State and conclusion; a result counts only at the end, a running pipeline may carry one early.

    A phase we do not know (manual steps choose their own) says nothing about the state.
    """
    if phase not in _OVER:
        return _BEGUN.get(phase), None
    if status is None:  # over, but how?  A poll will tell.
        return State.IN_PROGRESS, None
    return _RESULTS.get(status.upper(), _UNKNOWN_RESULT)


def _times(phase: str, build: dict[str, Any]) -> tuple[datetime | None, datetime | None]:
    """Start and end.  `timestamp` is the time of the PHASE: the start in STARTED, the end in COMPLETED.

    In FINALIZED it is a little later than the end; that only shows where COMPLETED is not sent.
    """
    at = _read.moment(build.get("timestamp"))
    if phase == "STARTED":
        return at, None
    if phase not in _OVER or at is None:
        return None, None
    duration = _duration(build.get("duration"))
    return (at - duration if duration else None), at


# ---- polls ---------------------------------------------------------------------------------------


def poll_request(source: Source, target: PollTarget) -> Request | None:
    """`GET /job/FOLDER/job/NAME/12/api/json`; None if the build's id is no path."""
    path = _path_of_id(target.build_id)
    if not source.api_url or path is None:
        return None
    return Request(
        f"{source.api_url}/{_job_path(path.names)}/{path.number}/api/json?tree={_TREE}", _headers(source)
    )


def _job_path(names: Iterable[str]) -> str:
    return "/".join(
        _read.path_part(name[1:]) if name.startswith("/") else f"job/{_read.path_part(name)}"
        for name in names
    )


def _headers(source: Source) -> dict[str, str]:
    headers = {"Accept": "application/json", "User-Agent": _read.USER_AGENT}
    if source.token:
        login = f"{source.username}:{source.token}".encode()
        headers["Authorization"] = f"Basic {b64encode(login).decode()}"
    return headers


def parse_poll(source: Source, target: PollTarget, answer: Answer) -> Observation:
    """The build that was read; or raises `PollError`."""
    build = _read.fetched(answer)
    path = _path_of_id(target.build_id)
    if (
        not isinstance(build.get("building"), bool)
        or path is None
        or _read.whole(build.get("number")) != path.number
    ):
        raise PollError(PollFault.UNREADABLE, f"the answer is not about build {target.number}")
    return _built(source, path, build)


def _built(source: Source, path: _Path, build: dict[str, Any]) -> Observation:
    """A build object of REST.

    It is over when it no longer builds and has a result: a running pipeline may have one already.
    """
    building = build.get("building") is True
    result = _read.text(build.get("result"))
    over = not building and result is not None
    state, conclusion = _RESULTS.get(result or "", _UNKNOWN_RESULT) if over else (State.IN_PROGRESS, None)
    started_at = _read.moment(build.get("timestamp"))
    duration = _duration(build.get("duration"))
    expected = _duration(build.get("estimatedDuration")) if building else None
    return replace(
        _about(source, path, ObservedBy.POLL),
        state=state,
        conclusion=conclusion,
        raw_status="building" if building else "built",
        raw_conclusion=result,
        url=_read.web_url(build.get("url")),
        started_at=started_at,
        ended_at=started_at + duration if over and started_at and duration is not None else None,
        queue_id=_queue_id(build.get("queueId")),
        created_at=started_at,
        progress=_read.percent(_read.mapping(build.get("executor")).get("progress")) if building else None,
        expected_seconds=expected.total_seconds() if expected else None,
        doubtful=not building and result is None,
    )


def follow_up(source: Source, seen: Observation) -> Request | None:
    """None: a build says all about its state."""
    return None


def parse_follow_up(seen: Observation, answer: Answer) -> Observation:
    """Nothing to add."""
    return seen


def jobs_request(source: Source, target: PollTarget) -> Request | None:
    """None: the build itself tells its percent and how long it will take.

    The stages (`wfapi/describe`) would cost a request more and say less: those to come are not listed.
    """
    return None


def parse_jobs(source: Source, seen: Observation, answer: Answer) -> Observation:
    """Nothing to add."""
    return seen


def together(repository: str) -> str:
    """The jobs of a folder: `FOLDER/NAME` is in `FOLDER`, a job outside of folders in the empty one.

    What stands below a job is listed by itself: a matrix project lists no jobs.
    """
    below = _names_of(repository)[-1].startswith("/")
    return repository if below else repository.rpartition("/")[0]


def list_request(
    source: Source, repositories: Sequence[str], since: datetime | None, most: int
) -> Request | None:
    """The newest builds of a job, or of several jobs of a folder; a repository is `FOLDER/NAME`.

    `GET /job/FOLDER/job/NAME/api/json?tree=builds[…]{0,50}`,
    `GET /job/FOLDER/api/json?tree=jobs[name,builds[…]{0,50}]`.
    """
    paths = [_names_of(repository) for repository in repositories]
    if not source.api_url or not all(map(_are_names, paths)):
        return None
    tree = f"{_BUILDS}{{0,{most}}}"
    names = paths[0]
    if len(paths) > 1:
        tree, names = f"jobs[name,{tree}]", names[:-1]
    place = f"{source.api_url}/{_job_path(names)}".rstrip("/")
    return Request(f"{place}/api/json?tree={quote(tree, safe=',')}", _headers(source))


def parse_list(source: Source, repositories: Sequence[str], answer: Answer) -> Listing:
    """The builds that can be read; or raises `PollError`."""
    shown = _read.fetched(answer)
    if len(repositories) == 1:
        _read.listed(shown.get("builds"))
        return Listing(tuple(_builds_of(source, repositories[0], shown)))
    by_name = {repository.rpartition("/")[2]: repository for repository in repositories}
    jobs = _read.listed(shown.get("jobs"))
    wanted = ((by_name.get(_read.text(job.get("name")) or ""), job) for job in jobs)
    return Listing(tuple(seen for name, job in wanted if name for seen in _builds_of(source, name, job)))


def _builds_of(source: Source, repository: str, job: dict[str, Any]) -> Iterator[Observation]:
    for build in map(_read.mapping, _read.items(job.get("builds"))):
        number = _read.count(build.get("number"))
        if number and isinstance(build.get("building"), bool):
            with suppress(Unreadable):
                yield _built(source, _Path(_names_of(repository), number), build)


def repository_request(source: Source, target: PollTarget) -> Request | None:
    """`GET /job/FOLDER/job/NAME/api/json?tree=name`."""
    path = _path_of_id(target.build_id)
    if not source.api_url or path is None:
        return None
    return Request(f"{source.api_url}/{_job_path(path.names)}/api/json?tree=name", _headers(source))


def parse_repository(answer: Answer) -> None:
    """Raises `PollError` unless the repository was shown."""
    _read.fetched(answer)


def limits(answer: Answer) -> Limits | None:
    """None: Jenkins tells none."""
    return None


def named(source: Source, build_id: str) -> Observation | None:
    """The build that `SOURCE:FOLDER:JOB:NUMBER` means."""
    path = _path_of_id(build_id)
    if path is None:
        return None
    try:
        return _about(source, path, ObservedBy.POLL)
    except Unreadable:
        return None


# ---- names ---------------------------------------------------------------------------------------


def _about(source: Source, path: _Path, observed_by: ObservedBy) -> Observation:
    """An observation that only names its build."""
    build_id = ":".join((source.name, *map(_escaped, path.names), str(path.number)))
    if len(build_id) > _LONGEST_ID:
        raise Unreadable("build.url: too long")
    return Observation(
        source=source.name,
        platform=NAME,
        observed_by=observed_by,
        key=build_id.casefold(),
        build_id=build_id,
        repository="/".join((*path.names[:-1], path.names[-1].removeprefix("/"))),
        workflow=_workflow(path.names),
        trigger="pull_request" if _CHANGE_REQUEST.fullmatch(path.names[-1]) else None,
        branch=_branch_of_job(path.names),
        number=path.number,
    )


def _branch_of_job(names: tuple[str, ...]) -> str | None:
    """The branch that a job of a multibranch project builds; None for any other job.

    Nothing says of a job that it is one, but its name does: `feature%2Fpay`, `PR-7`, `main` below a project.
    """
    name = names[-1]
    usual = len(names) > 1 and (name in _USUAL_BRANCHES or _CHANGE_REQUEST.fullmatch(name))
    return _read.text(unquote(name)) if usual or "%2F" in name.upper() else None


def _workflow(names: tuple[str, ...]) -> str:
    """The job, or the project of a multibranch job: all its branches are one workflow."""
    of_branch = len(names) > 1 and _branch_of_job(names) is not None
    return names[-2 if of_branch else -1].removeprefix("/")


def _names_of(repository: str) -> tuple[str, ...]:
    """The names out of `FOLDER/JOB`, or of `JOB/AXIS=value`, which stands below its job."""
    *folders, last = repository.split("/")
    below = bool(folders) and _BELOW_A_JOB.fullmatch(last)
    return (*folders, f"/{last}" if below else last)


def _queue_id(value: object) -> str | None:
    """The id of the queue item that became the build; Jenkins says -1 where it does not know it."""
    number = _read.whole(value)
    return str(number) if number is not None and number > 0 else None


def _parsed_path(url: object) -> _Path | None:
    """The build at `job/FOLDER/job/NAME/12/`, alone or at the end of an address."""
    address = _read.text(url, _read.URL_CHARS)
    try:
        found = _BUILD_PATH.search(urlsplit(address).path) if address else None
    except ValueError:
        return None
    if found is None:
        return None
    names = [_name_in(part) for part in found[1].split("/")[1::2]]
    if found[2]:
        names.append("/" + _name_in(found[2])[: _read.NAME_CHARS - 1])
    return _Path(tuple(names), int(found[3])) if _are_names(names) else None


def _name_in(part: str) -> str:
    """The name in a part of a path.  No name holds `/`: a proxy has decoded the `%2F` of a branch's job."""
    return _read.clean(unquote(part).replace("/", "%2F"), _read.NAME_CHARS)


def _are_names(names: Sequence[str]) -> bool:
    """Folders and a job, perhaps with a configuration or module below it."""
    *above, last = names
    below = bool(above) and last.startswith("/") and _BELOW_A_JOB.fullmatch(last) is not None
    return all(map(_is_name, above)) and _is_name(last.removeprefix("/") if below else last)


def _is_name(name: str) -> bool:
    """`.` and `..` would climb in the path of a poll."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()


def _escaped(name: str) -> str:
    """A name as part of an id: what is not plainly safe becomes `~HH` per byte."""
    return re.sub(rb"[^A-Za-z0-9._-]", lambda found: b"~%02X" % found[0][0], name.encode()).decode()


def _path_of_id(build_id: str) -> _Path | None:
    """The path back from a build's id."""
    _source, *parts, number = build_id.split(":")
    if not parts or not re.fullmatch("[0-9]{1,10}", number):
        return None
    names = tuple(map(_unescaped, parts))
    return _Path(names, int(number)) if _are_names(names) else None


def _unescaped(part: str) -> str:
    raw = re.sub(rb"~([0-9A-Fa-f]{2})", lambda found: bytes([int(found[1], 16)]), part.encode())
    return raw.decode("utf-8", "replace")


def _branch(value: object) -> str | None:
    """The branch as Git knows it: Jenkins names the remote as well (`origin/main`)."""
    branch = _read.text(value)
    for prefix in ("refs/remotes/", "refs/heads/", "origin/"):
        branch = branch.removeprefix(prefix) if branch else None
    return unquote(branch) if branch and "%2F" in branch.upper() else branch or None


def _branch_below(about: Observation) -> str | None:
    """The branch of a job below another whose push tells none, as those of multibranch projects do."""
    folder, _, name = (about.repository or "").rpartition("/")
    return _read.text(name) if folder and not _BELOW_A_JOB.fullmatch(name) else None


def _duration(value: object) -> timedelta | None:
    """Milliseconds from 0; None for anything else, and for more than a year."""
    milliseconds = _read.whole(value)
    fits = milliseconds is not None and 0 <= milliseconds <= 366 * 86_400_000
    return timedelta(milliseconds=milliseconds) if fits and milliseconds is not None else None


# ---- our token -----------------------------------------------------------------------------------


def token_call(source: Source) -> Call:
    """The front page, which an API token opens."""
    return Call("GET", f"{source.api_url}/api/json?tree=mode", _headers(source))


def parse_token(answer: Answer) -> TokenFacts:
    """Jenkins tells nothing of a token but whether it is good."""
    _read.fetched(answer)
    return TokenFacts()


# ---- logs and artifacts --------------------------------------------------------------------------

_ARTIFACTS_TREE = quote("inProgress,artifacts[fileName,relativePath]", safe=",")


def ended_jobs_request(source: Source, target: PollTarget) -> Request | None:
    """None: a build has one log."""
    return None


def parse_ended_jobs(answer: Answer) -> tuple[EndedJob, ...]:
    """Nothing."""
    return ()


def _below(source: Source, target: PollTarget, path: str) -> Request | None:
    found = _path_of_id(target.build_id)
    if not source.api_url or found is None:
        return None
    return Request(f"{source.api_url}/{_job_path(found.names)}/{found.number}/{path}", _headers(source))


def log_files(
    source: Source, target: PollTarget, jobs: tuple[EndedJob, ...], everything: bool
) -> tuple[LogFile, ...]:
    """`GET …/12/logText/progressiveText?start=0`: the console."""
    request = _below(source, target, "logText/progressiveText?start=0")
    return (LogFile("console", request, tailed=True),) if request else ()


def log_tail(file: LogFile, headers: Headers, after: int, most_bytes: int) -> tuple[Request, int] | None:
    """From `X-Text-Size` less `most_bytes` on: a `start` counts bytes of the raw log, as that header does."""
    size = headers.get("x-text-size", "")
    if not re.fullmatch("[0-9]{1,18}", size):
        return None
    start = max(int(size) - most_bytes, after)
    return replace(file.request, url=f"{file.request.url.rpartition('=')[0]}={start}"), start


def log_grows(headers: Headers) -> bool:
    """Yes, as long as post-build steps run."""
    return headers.get("x-more-data", "").casefold() == "true"


def annotations_request(source: Source, target: PollTarget, job: EndedJob) -> Request | None:
    """None: Jenkins has none."""
    return None


def parse_annotations(answer: Answer) -> tuple[str, ...]:
    """Nothing."""
    return ()


def artifacts_request(source: Source, target: PollTarget) -> Request | None:
    """`GET …/12/api/json?tree=artifacts[…]`."""
    return _below(source, target, f"api/json?tree={_ARTIFACTS_TREE}")


def parse_artifacts(answer: Answer) -> tuple[Artifact, ...]:
    """The archived files by their path; or raises `PollError`, also while post-build steps may add some."""
    build = _read.fetched(answer)
    if build.get("inProgress") is True:
        raise PollError(PollFault.UNAVAILABLE, "post-build steps are still running")
    paths = [
        _read.text(_read.mapping(file).get("relativePath"), 1000)
        for file in _read.items(build.get("artifacts"))
    ]
    return newest(Artifact(name=path, ref=path) for path in paths if path and _is_inside(path))


def _is_inside(path: str) -> bool:
    """No part of it climbs."""
    return all(part not in ("", ".", "..") for part in path.split("/"))


def artifact_request(source: Source, target: PollTarget, ref: str) -> Request | None:
    """`GET …/12/artifact/PATH`."""
    return _below(source, target, f"artifact/{quote(ref)}") if _is_inside(ref) else None
