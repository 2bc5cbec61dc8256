"""Bodies of GitLab's webhooks and REST answers, in their full shape.  Pure.

Fields: "Webhook events", "Pipelines API" and "Jobs API" in GitLab's documentation (19.x).
"""

from datetime import UTC, datetime
from typing import Any

from webhook_app.simulated.facts import Build, Event, Job, Moment, Repository

_LABELS = {
    "success": "passed", "manual": "waiting for manual action", "scheduled": "waiting for delayed action",
    "waiting_for_resource": "waiting for resource",
}  # fmt: skip
_ENDS = ("success", "failed", "canceled", "skipped")


def iso(at: float | None) -> str | None:
    """A time as REST writes it: milliseconds, `Z`."""
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{int(at * 1000) % 1000:03d}Z"


def utc(at: float | None) -> str | None:
    """A time as webhooks write it: `2026-08-12 15:23:28 UTC`."""
    return None if at is None else datetime.fromtimestamp(int(at), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _user(base: str) -> dict[str, Any]:
    return {
        "id": 11, "name": "Mona Demo", "username": "mona-demo", "avatar_url": f"{base}/uploads/avatar/11.png",
        "email": "[REDACTED]",
    }  # fmt: skip


def project(repository: Repository, base: str) -> dict[str, Any]:
    """`project` of a webhook."""
    page = f"{base}/{repository.full_name}"
    return {
        "id": repository.id, "name": repository.name.replace("-", " ").title(),
        "description": "A simulated project",
        "web_url": page, "avatar_url": None, "git_ssh_url": f"git@127.0.0.1:{repository.full_name}.git",
        "git_http_url": f"{page}.git", "namespace": repository.owner.title(), "visibility_level": 0,
        "path_with_namespace": repository.full_name, "default_branch": "main", "ci_config_path": None,
    }  # fmt: skip


def webhook(build: Build, moment: Moment, event: Event, base: str) -> dict[str, Any]:
    """The body of a Pipeline Hook or a Job Hook."""
    if event.name == "Job Hook":
        one = next(one for one in moment.jobs if one.id == event.job_id)
        return _job_hook(build, moment, one, base)
    return {
        "object_kind": "pipeline", "object_attributes": _attributes(build, moment, base),
        "merge_request": None,
        "user": _user(base), "project": project(build.repository, base), "commit": _commit(build, base),
        "builds": [_hook_build(one, base) for one in sorted(moment.jobs, key=lambda one: -one.id)],
    }  # fmt: skip


def _attributes(build: Build, moment: Moment, base: str) -> dict[str, Any]:
    return {
        "id": build.run_id, "iid": build.number, "name": build.title, "ref": build.branch, "tag": False,
        "sha": build.commit, "before_sha": build.commit[::-1], "source": "push", "status": moment.status,
        "detailed_status": _label(moment), "stages": ["build", "test", "deploy"],
        "created_at": utc(build.begins_at), "finished_at": utc(_finished_at(moment)),
        "duration": int(_duration(moment)), "queued_duration": 1, "protected_ref": build.branch == "main",
        "variables": [{"key": "DEPLOY_REGION", "value": "eu-central-1"}],
        "url": f"{base}/{build.repository.full_name}/-/pipelines/{build.run_id}",
    }  # fmt: skip


def _label(moment: Moment) -> str:
    if moment.status == "success" and any(one.status == "failed" for one in moment.jobs):
        return "passed with warnings"
    return _LABELS.get(moment.status, moment.status)


def _finished_at(moment: Moment) -> float | None:
    return moment.at if moment.status in _ENDS else None


def _started_at(moment: Moment) -> float | None:
    begun = [one.started_at for one in (*moment.jobs, *moment.retired) if one.started_at is not None]
    return min(begun, default=None)


def _duration(moment: Moment) -> float:
    return sum(
        (one.finished_at or moment.at) - one.started_at for one in moment.jobs if one.started_at is not None
    )


def _commit(build: Build, base: str) -> dict[str, Any]:
    return {
        "id": build.commit, "message": f"{build.title}\n", "title": build.title,
        "timestamp": datetime.fromtimestamp(int(build.begins_at - 40), UTC).isoformat(),
        "url": f"{base}/{build.repository.full_name}/-/commit/{build.commit}",
        "author": {"name": "Mona Demo", "email": "[REDACTED]"},
    }  # fmt: skip


def _runner(one: Job) -> dict[str, Any] | None:
    if one.started_at is None:
        return None
    return {
        "id": 380987, "description": "simulated-runner-6", "runner_type": "instance_type", "active": True,
        "is_shared": True, "tags": ["linux", "docker"],
    }  # fmt: skip


def _seconds(begin: float | None, end: float | None, now: float) -> float | None:
    return None if begin is None else round((end or now) - begin, 3)


def _hook_build(one: Job, base: str) -> dict[str, Any]:
    environment = {"name": "staging", "action": "start", "deployment_tier": "staging"}
    return {
        "id": one.id, "stage": one.stage, "name": one.name, "status": one.status,
        "created_at": utc(one.created_at),
        "started_at": utc(one.started_at), "finished_at": utc(one.finished_at),
        "duration": _seconds(one.started_at, one.finished_at, one.started_at or 0.0),
        "queued_duration": _seconds(one.created_at, one.started_at, one.created_at),
        "failure_reason": one.failure_reason, "when": "manual" if one.manual else "on_success",
        "manual": one.manual,
        "allow_failure": one.allow_failure, "user": _user(base), "runner": _runner(one),
        "artifacts_file": {"filename": None, "size": None},
        "environment": environment if one.stage == "deploy" else None,
    }  # fmt: skip


def _job_hook(build: Build, moment: Moment, one: Job, base: str) -> dict[str, Any]:
    place = project(build.repository, base)
    return {
        "object_kind": "build", "ref": build.branch, "tag": False, "before_sha": build.commit[::-1],
        "sha": build.commit, "retries_count": sum(old.name == one.name for old in moment.retired),
        "build_id": one.id, "build_name": one.name, "build_stage": one.stage, "build_status": one.status,
        "build_created_at": utc(one.created_at), "build_started_at": utc(one.started_at),
        "build_finished_at": utc(one.finished_at), "build_created_at_iso": iso(one.created_at),
        "build_started_at_iso": iso(one.started_at), "build_finished_at_iso": iso(one.finished_at),
        "build_duration": _seconds(one.started_at, one.finished_at, moment.at),
        "build_queued_duration": _seconds(one.created_at, one.started_at, moment.at),
        "build_allow_failure": one.allow_failure,
        "build_failure_reason": one.failure_reason or "unknown_failure",
        "pipeline_id": build.run_id, "runner": _runner(one), "project_id": build.repository.id,
        "project_name": build.repository.full_name.title().replace("/", " / "), "user": _user(base),
        "commit": _job_commit(build, moment), "project": place, "environment": None,
        "repository": {
            key: place[key] for key in ("name", "description", "git_ssh_url", "git_http_url",
            "visibility_level")
        } | {"url": place["git_ssh_url"], "homepage": place["web_url"]},
    }  # fmt: skip


def _job_commit(build: Build, moment: Moment) -> dict[str, Any]:
    """Here `id` is the pipeline's id, not the commit's."""
    return {
        "id": build.run_id, "name": build.title, "sha": build.commit, "message": f"{build.title}\n",
        "author_name": "Mona Demo", "author_email": "[REDACTED]", "author_url": "mailto:mona@example.com",
        "status": moment.status, "duration": None, "started_at": utc(_started_at(moment)),
        "finished_at": utc(_finished_at(moment)), "started_at_iso": iso(_started_at(moment)),
        "finished_at_iso": iso(_finished_at(moment)),
    }  # fmt: skip


# REST --------------------------------------------------------------------------------------------


def listed(build: Build, moment: Moment, base: str) -> dict[str, Any]:
    """A pipeline as `GET …/pipelines` lists it."""
    return {
        "id": build.run_id, "iid": build.number, "project_id": build.repository.id, "sha": build.commit,
        "ref": build.branch, "status": moment.status, "source": "push", "created_at": iso(build.begins_at),
        "updated_at": iso(moment.at), "name": build.title,
        "web_url": f"{base}/{build.repository.full_name}/-/pipelines/{build.run_id}",
    }  # fmt: skip


def pipeline(build: Build, moment: Moment, base: str) -> dict[str, Any]:
    """A pipeline as `GET …/pipelines/:id` shows it."""
    text = _label(moment)
    return listed(build, moment, base) | {
        "before_sha": build.commit[::-1], "tag": False,
        "yaml_errors": "jobs config should contain a visible job" if build.kind == "bad_yaml" else None,
        "user": rest_user(base), "started_at": iso(_started_at(moment)),
        "finished_at": iso(_finished_at(moment)),
        "committed_at": None, "duration": int(_duration(moment)) or None, "queued_duration": 1,
        "coverage": None,
        "detailed_status": {
            "icon": f"status_{moment.status}", "text": text, "label": text, "group": text.replace(" ", "-"),
            "tooltip": text, "has_details": True, "illustration": None,
            "details_path": f"/{build.repository.full_name}/-/pipelines/{build.run_id}",
            "favicon": f"/assets/ci_favicons/favicon_status_{moment.status}.png",
        },
    }  # fmt: skip


def rest_project(repository: Repository, base: str, access_level: int) -> dict[str, Any]:
    """A project as `GET /projects/:id` shows it; `access_level` as GitLab numbers roles (40: Maintainer)."""
    hooked = project(repository, base)
    same = {key: value for key, value in hooked.items() if key not in ("namespace", "visibility_level")}
    return same | {
        "path": repository.name, "visibility": "private", "archived": False, "ssh_url_to_repo":
        hooked["git_ssh_url"], "http_url_to_repo": hooked["git_http_url"], "builds_access_level": "enabled",
        "namespace": {"id": 7, "name": hooked["namespace"], "path": repository.owner, "kind": "group"},
        "permissions": {"project_access": {"access_level": access_level}, "group_access": None},
        "created_at": "2024-03-01T08:00:00.000Z", "last_activity_at": "2026-10-30T08:00:00.000Z",
    }  # fmt: skip


def rest_user(base: str) -> dict[str, Any]:
    """A user as REST embeds it."""
    return {
        "id": 11, "username": "mona-demo", "name": "Mona Demo", "state": "active", "locked": False,
        "avatar_url": f"{base}/uploads/avatar/11.png", "web_url": f"{base}/mona-demo",
    }  # fmt: skip


def job(
    build: Build, moment: Moment, one: Job, base: str,
    *, archive_bytes: int = 0, expire_at: float | None = None, erased_at: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A job as `GET …/pipelines/:id/jobs` lists it; its `pipeline` carries the pipeline's status.

    `archive_bytes`: the size of its artifacts' ZIP, 0 if it has none (any more).
    """
    trace = {"file_type": "trace", "size": 1500, "filename": "job.log", "file_format": "raw"}
    archive = {
        "file_type": "archive", "size": archive_bytes, "filename": "artifacts.zip", "file_format": "zip",
    }  # fmt: skip
    files = [*([archive] if archive_bytes else []), *([trace] if one.finished_at and not erased_at else [])]
    whole = {"artifacts_file": {"filename": "artifacts.zip", "size": archive_bytes}} if archive_bytes else {}
    return {
        "id": one.id, "status": one.status, "stage": one.stage, "name": one.name, "ref": build.branch,
        "tag": False,
        "coverage": None, "allow_failure": one.allow_failure, "created_at": iso(one.created_at),
        "started_at": iso(one.started_at), "finished_at": iso(one.finished_at), "erased_at": iso(erased_at),
        "duration": _seconds(one.started_at, one.finished_at, moment.at),
        "queued_duration": _seconds(one.created_at, one.started_at, moment.at), "user": rest_user(base),
        "commit": {
            "id": build.commit, "short_id": build.commit[:8], "title": build.title,
            "message": f"{build.title}\n",
            "created_at": iso(build.begins_at - 40), "author_name": "Mona Demo",
            "author_email": "mona@example.com",
        },
        "pipeline": {
            "id": build.run_id, "iid": build.number, "project_id": build.repository.id, "sha": build.commit,
            "ref": build.branch, "status": moment.status, "source": "push",
            "created_at": iso(build.begins_at),
            "updated_at": iso(moment.at),
            "web_url": f"{base}/{build.repository.full_name}/-/pipelines/{build.run_id}",
        },
        "failure_reason": one.failure_reason, "source": "push", "archived": False, "runner": _runner(one),
        "web_url": f"{base}/{build.repository.full_name}/-/jobs/{one.id}", "runner_manager": None,
        "project": {"ci_job_token_scope_enabled": False}, "artifacts": files,
        "artifacts_expire_at": iso(expire_at), "tag_list": ["docker"], **whole,
    }  # fmt: skip


def log_text(lines: list[str], at: float, over: bool = True) -> bytes:
    """A job's trace, with the marks of a section and colours; the section is open while the job runs."""
    stamp = int(at)
    body = "".join(f"{line}\r\n" for line in lines).replace("FAIL", "\x1b[31;1mFAIL\x1b[0;m")
    end = f"section_end:{stamp + 9}:script\r\x1b[0K\n" if over else ""
    return f"section_start:{stamp}:script\r\x1b[0K{body}{end}".encode()
