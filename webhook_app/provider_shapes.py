"""Events in the shape of their platform's own webhooks, for dashboards that read those.  Pure.

A dashboard that was fed by GitHub, GitLab and Jenkins, or by a worker that polls them, reads their bodies at
an address for each.  Made of the stored event alone, so every try of a message sends the same bytes.

When a build was created is not in the events, so `created_at` is null: a time that stands in for it would be
another in each message, and builds whose time of creation changes are taken for two.

https://docs.github.com/en/webhooks/webhook-events-and-payloads#workflow_run
https://docs.gitlab.com/user/project/integrations/webhook_events/#pipeline-events
https://plugins.jenkins.io/notification/
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlsplit

from webhook_app.lifecycle import Conclusion, State
from webhook_app.times import iso

Data = Mapping[str, Any]

_STATES = tuple(f"build.{state.value}" for state in State)
_CONCLUSIONS = {
    State.COMPLETED: Conclusion.SUCCESS,
    State.FAILED: Conclusion.FAILURE,
    State.CANCELLED: Conclusion.CANCELLED,
    State.TIMEOUT: Conclusion.TIMED_OUT,
}
"""What an end without a conclusion means."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How the webhooks of a platform look: where they go, their headers, and what makes the body."""

    path: str
    headers: Mapping[str, str]
    body: Callable[[Data, datetime], dict[str, Any]]


def has_shape(type_: str, data: Data) -> bool:
    """Whether a platform sends such an event; none sends progress, polling, or what a script reports."""
    return type_ in _STATES and data.get("platform") in _SHAPES


def shape(type_: str, data: Data) -> Shape:
    """The shape of an event; what no platform sends, such as a test, is GitHub's `ping`."""
    return _SHAPES[str(data["platform"])] if has_shape(type_, data) else _PING


def _end(data: Data) -> Conclusion | None:
    state = State(data["state"])
    if not state.terminal:
        return None
    return Conclusion(data["conclusion"]) if data.get("conclusion") else _CONCLUSIONS[state]


_TAG = "refs/tags/"


def _ref(data: Data) -> tuple[str | None, bool]:
    """The branch or tag by its own name, and whether it is a tag.

    Platforms say beside it what `OWNER:main` and `refs/tags/v1` say in it.
    """
    shown: str | None = data.get("branch")
    if not shown:
        return None, False
    if shown.startswith(_TAG):
        return shown.removeprefix(_TAG), True
    return shown.partition(":")[2] if data.get("is_fork") else shown, False


def _ping(data: Data, at: datetime) -> dict[str, Any]:
    return {
        "zen": str(data.get("message") or "This is a test."),
        "hook_id": 0,
        "hook": {"type": "Repository"},
    }


# ---- GitHub ----------------------------------------------------------------------------------

_ACTIONS = {State.QUEUED: "requested", State.IN_PROGRESS: "in_progress"}


def _github(data: Data, at: datetime) -> dict[str, Any]:
    """A `workflow_run` delivery."""
    state, end = State(data["state"]), _end(data)
    repository = _github_repository(data.get("repository") or "")
    (ref, is_tag), trigger = _ref(data), data.get("trigger")
    run = {
        "id": _number(data["build_id"].rpartition(":")[2]),
        "name": data.get("workflow"),
        "display_title": data.get("workflow"),
        "path": f"{data.get('workflow') or ''}@{_TAG}{ref}" if is_tag else None,
        "head_branch": ref,
        "head_sha": data.get("commit"),
        "run_number": data.get("number"),
        "run_attempt": data.get("attempt"),
        "event": "push" if trigger == "tag" else trigger,
        "status": "completed" if end else state.value,
        "conclusion": end.value if end else data.get("conclusion"),
        "html_url": data.get("url"),
        "created_at": None,
        "run_started_at": data.get("started_at"),
        "updated_at": (data.get("ended_at") if end else None) or iso(at),
        "repository": repository,
        "head_repository": _github_head(data) if data.get("is_fork") else repository,
    }
    return {
        "action": _ACTIONS.get(state, "completed"),
        "workflow_run": run,
        "workflow": {"name": data.get("workflow")},
        "repository": repository,
    }


def _github_head(data: Data) -> dict[str, Any] | None:
    """The fork; None: it is gone."""
    fork = data.get("head_repository")
    return _github_repository(fork) if fork else None


def _github_repository(full_name: str) -> dict[str, Any]:
    owner, _, name = full_name.partition("/")
    return {"full_name": full_name, "name": name, "owner": {"login": owner}}


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


# ---- GitLab ----------------------------------------------------------------------------------

_GITLAB_ENDS = {
    Conclusion.SUCCESS: "success",
    Conclusion.NEUTRAL: "success",
    Conclusion.SKIPPED: "skipped",
    Conclusion.CANCELLED: "canceled",
}


_MERGE_REQUEST = "merge_request_event"
_GITLAB_SOURCES: Mapping[str | None, str] = {"tag": "push", "pull_request": _MERGE_REQUEST}
"""GitLab's words for the triggers that have the same name on every platform."""


def _gitlab(data: Data, at: datetime) -> dict[str, Any]:
    """A Pipeline Hook, without jobs."""
    state, end = State(data["state"]), _end(data)
    _, project, pipeline = data["build_id"].rsplit(":", 2)
    path = data.get("repository") or ""
    going = "running" if state is State.IN_PROGRESS else "pending"
    (ref, is_tag), source = _ref(data), _GITLAB_SOURCES.get(data.get("trigger"), data.get("trigger"))
    attributes = {
        "id": _number(pipeline),
        "iid": data.get("number"),
        "name": data.get("workflow") if data.get("workflow") != source else None,
        "ref": ref,
        "tag": is_tag,
        "sha": data.get("commit"),
        "source": source,
        "status": _GITLAB_ENDS.get(end, "failed") if end else going,
        "created_at": None,
        "finished_at": (data.get("ended_at") or iso(at)) if end else None,
        "duration": data.get("duration_seconds"),
        "url": data.get("url"),
    }
    return {
        "object_kind": "pipeline",
        "object_attributes": attributes,
        "merge_request": _merge_request(data, ref, project) if source == _MERGE_REQUEST else None,
        "project": {
            "id": _number(project),
            "name": path.rpartition("/")[2],
            "path_with_namespace": path,
            "web_url": _before(data.get("url"), "/-/pipelines/"),
        },
        "commit": {"id": data.get("commit")},
        "builds": [],
    }


def _merge_request(data: Data, ref: str | None, project: str) -> dict[str, Any]:
    """Where its branch is from: of a fork either the path is known, or the id."""
    fork: str = data.get("head_repository") or "" if data.get("is_fork") else project
    number = _number(fork)
    return {
        "source_branch": ref,
        "source_project_id": number if isinstance(number, int) else None,
        "target_project_id": _number(project),
        "source": {"path_with_namespace": fork} if "/" in fork else None,
        "target": {"path_with_namespace": data.get("repository")},
    }


def _before(url: object, mark: str) -> str | None:
    start, found, _ = str(url or "").partition(mark)
    return start if found else None


# ---- Jenkins ---------------------------------------------------------------------------------

_PHASES = {State.QUEUED: "QUEUED", State.IN_PROGRESS: "STARTED"}
_JENKINS_ENDS = {
    Conclusion.SUCCESS: "SUCCESS",
    Conclusion.NEUTRAL: "SUCCESS",
    Conclusion.SKIPPED: "NOT_BUILT",
    Conclusion.CANCELLED: "ABORTED",
}


def _jenkins(data: Data, at: datetime) -> dict[str, Any]:
    """A notification of the Notification plugin; `timestamp` is that of the phase, in milliseconds."""
    state, end = State(data["state"]), _end(data)
    names = (data.get("repository") or "").split("/")
    job = _job_path(data.get("url"), data.get("number")) or "".join(f"job/{quote(name)}/" for name in names)
    moment = data.get("ended_at") if end else data.get("started_at")
    seconds = data.get("duration_seconds")
    build = {
        "full_url": data.get("url"),
        "number": data.get("number"),
        "phase": _PHASES.get(state, "COMPLETED"),
        "status": _JENKINS_ENDS.get(end, "FAILURE") if end else None,
        "url": f"{job}{data.get('number')}/",
        "timestamp": _milliseconds(datetime.fromisoformat(moment) if moment else at),
        "duration": round(seconds * 1000) if end and seconds is not None else 0,
        "scm": {"branch": data.get("branch"), "commit": data.get("commit")},
    }
    return {"name": names[-1], "display_name": names[-1], "url": job, "build": build}


def _job_path(url: object, number: object) -> str | None:
    """`job/FOLDER/job/NAME/` out of a build's page."""
    _, found, rest = urlsplit(str(url or "")).path.partition("/job/")
    end = f"{number}/"
    path = f"job/{rest}".rstrip("/") + "/"
    return path.removesuffix(end) if found and path.endswith(f"/{end}") else None


def _milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


_SHAPES = {
    "github": Shape("/api/webhook/github-actions", {"x-github-event": "workflow_run"}, _github),
    "gitlab": Shape("/api/webhook/gitlab", {"x-gitlab-event": "Pipeline Hook"}, _gitlab),
    "jenkins": Shape("/api/webhook/jenkins", {}, _jenkins),
}
_PING = Shape("/api/webhook/github-actions", {"x-github-event": "ping"}, _ping)
