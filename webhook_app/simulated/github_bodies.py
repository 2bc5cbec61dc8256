"""Bodies of GitHub's webhooks and REST answers, in their full shape and size.  Pure.

Fields: "Webhook events and payloads" and "REST API endpoints for workflow runs" in GitHub's
documentation.  `base` is the address of the simulated server, used for API and web pages alike.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from webhook_app.simulated.facts import Build, Event, Job, Moment, Repository, Step

HOOK_ID = 512_345_678
"""The id of the webhook that the simulated repositories have."""

_REPOSITORY_URLS = {
    "archive_url": "{archive_format}{/ref}", "assignees_url": "assignees{/user}",
    "blobs_url": "git/blobs{/sha}",
    "branches_url": "branches{/branch}", "collaborators_url": "collaborators{/collaborator}",
    "comments_url": "comments{/number}", "commits_url": "commits{/sha}",
    "compare_url": "compare/{base}...{head}",
    "contents_url": "contents/{+path}", "contributors_url": "contributors", "deployments_url": "deployments",
    "downloads_url": "downloads", "events_url": "events", "forks_url": "forks",
    "git_commits_url": "git/commits{/sha}",
    "git_refs_url": "git/refs{/sha}", "git_tags_url": "git/tags{/sha}", "hooks_url": "hooks",
    "issue_comment_url": "issues/comments{/number}", "issue_events_url": "issues/events{/number}",
    "issues_url": "issues{/number}", "keys_url": "keys{/key_id}", "labels_url": "labels{/name}",
    "languages_url": "languages", "merges_url": "merges", "milestones_url": "milestones{/number}",
    "notifications_url": "notifications{?since,all,participating}", "pulls_url": "pulls{/number}",
    "releases_url": "releases{/id}", "stargazers_url": "stargazers", "statuses_url": "statuses/{sha}",
    "subscribers_url": "subscribers", "subscription_url": "subscription", "tags_url": "tags",
    "teams_url": "teams",
    "trees_url": "git/trees{/sha}",
}  # fmt: skip
_USER_URLS = {
    "followers_url": "followers", "following_url": "following{/other_user}", "gists_url": "gists{/gist_id}",
    "starred_url": "starred{/owner}{/repo}", "subscriptions_url": "subscriptions",
    "organizations_url": "orgs",
    "repos_url": "repos", "events_url": "events{/privacy}", "received_events_url": "received_events",
}  # fmt: skip


def iso(at: float | None) -> str | None:
    """GitHub's time: whole seconds, `Z`."""
    return None if at is None else datetime.fromtimestamp(int(at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@lru_cache(1024)
def user(base: str, login: str, kind: str = "User") -> dict[str, Any]:
    """A user or organization as it is embedded everywhere."""
    number = sum(map(ord, login)) * 1009
    urls = {name: f"{base}/users/{login}/{rest}" for name, rest in _USER_URLS.items()}
    return {
        "login": login, "id": number, "node_id": f"MDQ6VXNlcj{number}",
        "avatar_url": f"{base}/avatars/{number}?v=4",
        "gravatar_id": "", "url": f"{base}/users/{login}", "html_url": f"{base}/{login}", **urls,
        "type": kind, "user_view_type": "public", "site_admin": False,
    }  # fmt: skip


def _organization(base: str, login: str) -> dict[str, Any]:
    names = ("repos", "events", "hooks", "issues", "members", "public_members")
    same = {key: value for key, value in user(base, login).items() if key in ("login", "id", "avatar_url")}
    urls = {f"{name}_url": f"{base}/orgs/{login}/{name}" for name in names}
    return {
        **same, "node_id": f"O_kgDO{same['id']}", "url": f"{base}/orgs/{login}", **urls,
        "description": "Simulated",
    }  # fmt: skip


@lru_cache(4096)
def minimal_repository(base: str, repository: Repository) -> dict[str, Any]:
    """The repository as a run embeds it, twice."""
    url = f"{base}/repos/{repository.full_name}"
    return {
        "id": repository.id, "node_id": f"R_kgDO{repository.id}", "name": repository.name,
        "full_name": repository.full_name, "private": True, "owner": user(base, repository.owner,
        "Organization"),
        "html_url": f"{base}/{repository.full_name}", "description": "A simulated repository", "fork": False,
        "url": url, **{name: f"{url}/{rest}" for name, rest in _REPOSITORY_URLS.items()},
    }  # fmt: skip


def full_repository(base: str, repository: Repository) -> dict[str, Any]:
    """The repository as webhooks carry it beside the run."""
    page = f"{base}/{repository.full_name}"
    return minimal_repository(base, repository) | {
        "created_at": "2024-03-01T08:00:00Z", "updated_at": "2026-10-30T08:00:00Z",
        "pushed_at": "2026-11-01T08:00:00Z",
        "git_url": page.replace("http://", "git://") + ".git",
        "ssh_url": f"git@127.0.0.1:{repository.full_name}.git",
        "clone_url": f"{page}.git", "svn_url": page, "homepage": None, "size": 504, "stargazers_count": 1,
        "watchers_count": 1, "language": "Python", "has_issues": True, "has_projects": False,
        "has_downloads": True,
        "has_wiki": True, "has_pages": False, "has_discussions": False, "forks_count": 0, "mirror_url": None,
        "archived": False, "disabled": False, "open_issues_count": 3, "license": None, "allow_forking": False,
        "is_template": False, "web_commit_signoff_required": False, "topics": ["demo"],
        "visibility": "private",
        "forks": 0, "open_issues": 3, "watchers": 1, "default_branch": "main", "custom_properties": {},
    }  # fmt: skip


def private_user(base: str, login: str) -> dict[str, Any]:
    """The account itself, as `GET /user` shows it."""
    return user(base, login) | {
        "name": "Mona Demo", "company": None, "blog": "", "location": None, "email": None, "hireable": None,
        "bio": None, "twitter_username": None, "public_repos": 3, "public_gists": 0, "followers": 1,
        "following": 0, "created_at": "2024-03-01T08:00:00Z", "updated_at": "2026-10-30T08:00:00Z",
        "private_gists": 0, "total_private_repos": 3, "owned_private_repos": 3, "disk_usage": 504,
        "collaborators": 0, "two_factor_authentication": True,
    }  # fmt: skip


def app(base: str, app_id: int, client_id: str, permissions: Mapping[str, str]) -> dict[str, Any]:
    """A GitHub App, as `GET /app` and check runs show it."""
    return {
        "id": app_id, "client_id": client_id, "slug": "buildrelay", "node_id": f"A_kwHO{app_id}",
        "name": "BuildRelay", "owner": user(base, "Octo-Demo", "Organization"), "description": "Simulated",
        "external_url": f"{base}/about", "html_url": f"{base}/apps/buildrelay",
        "created_at": "2026-01-05T08:00:00Z", "updated_at": "2026-01-05T08:00:00Z",
        "permissions": dict(permissions), "events": ["workflow_job", "workflow_run"],
    }  # fmt: skip


def installation(
    base: str, number: int, app_id: int, client_id: str, permissions: Mapping[str, str]
) -> dict[str, Any]:
    """The installation of an App in the organization."""
    account = user(base, "Octo-Demo", "Organization")
    return {
        "id": number, "app_id": app_id, "client_id": client_id, "app_slug": "buildrelay", "account": account,
        "target_id": account["id"], "target_type": "Organization", "repository_selection": "all",
        "access_tokens_url": f"{base}/app/installations/{number}/access_tokens",
        "repositories_url": f"{base}/installation/repositories", "permissions": dict(permissions),
        "html_url": f"{base}/organizations/Octo-Demo/settings/installations/{number}", "single_file_name":
        None, "events": ["workflow_job", "workflow_run"], "suspended_at": None, "suspended_by": None,
        "created_at": "2026-01-05T08:00:00Z", "updated_at": "2026-01-05T08:00:00Z",
    }  # fmt: skip


def run(build: Build, moment: Moment, base: str) -> dict[str, Any]:
    """`workflow_run`, as webhooks and `GET …/actions/runs/{id}` show it."""
    api = f"{base}/repos/{build.repository.full_name}"
    url, suite_id = f"{api}/actions/runs/{build.run_id}", build.run_id + 20_000_000_000
    previous = f"{url}/attempts/{moment.attempt - 1}" if moment.attempt > 1 else None
    return {
        "id": build.run_id, "name": build.workflow, "node_id": f"WFR_kwLO{build.run_id}",
        "head_branch": build.branch, "head_sha": build.commit, "path": workflow_path(build),
        "display_title": build.title, "run_number": build.number, "event": "push", "status": moment.status,
        "conclusion": moment.conclusion, "workflow_id": workflow_id(build), "check_suite_id": suite_id,
        "check_suite_node_id": f"CS_kwDO{suite_id}", "url": url,
        "html_url": f"{base}/{build.repository.full_name}/actions/runs/{build.run_id}", "pull_requests": [],
        "created_at": iso(build.begins_at), "updated_at": iso(moment.at), "actor": user(base, "mona-demo"),
        "run_attempt": moment.attempt, "referenced_workflows": [],
        "run_started_at": iso(moment.attempt_started_at),
        "triggering_actor": user(base, "mona-demo"), "jobs_url": f"{url}/jobs", "logs_url": f"{url}/logs",
        "check_suite_url": f"{api}/check-suites/{suite_id}", "artifacts_url": f"{url}/artifacts",
        "cancel_url": f"{url}/cancel", "rerun_url": f"{url}/rerun", "previous_attempt_url": previous,
        "workflow_url": f"{api}/actions/workflows/{workflow_id(build)}", "head_commit": _commit(build),
        "repository": minimal_repository(base, build.repository),
        "head_repository": minimal_repository(base, build.repository),
    }  # fmt: skip


def workflow_path(build: Build) -> str:
    """The file of the build's workflow."""
    return f".github/workflows/{build.workflow.lower()}.yml"


def workflow_id(build: Build) -> int:
    """One id per repository and workflow."""
    return build.repository.id * 100 + sum(map(ord, build.workflow)) % 100


def _commit(build: Build) -> dict[str, Any]:
    return {
        "id": build.commit, "tree_id": build.commit[::-1], "message": build.title,
        "timestamp": iso(build.begins_at - 40),
        "author": {"name": "Mona Demo", "email": "mona@example.com"},
        "committer": {"name": "GitHub", "email": "noreply@github.com"},
    }  # fmt: skip


def job(build: Build, moment: Moment, one: Job, base: str) -> dict[str, Any]:
    """`workflow_job`, as webhooks and `GET …/actions/runs/{id}/jobs` show it."""
    api = f"{base}/repos/{build.repository.full_name}"
    running = one.started_at is not None and one.conclusion != "skipped"
    return {
        "id": one.id, "run_id": build.run_id, "workflow_name": build.workflow, "head_branch": build.branch,
        "run_url": f"{api}/actions/runs/{build.run_id}", "run_attempt": moment.attempt,
        "node_id": f"CR_kwDO{one.id}",
        "head_sha": build.commit, "url": f"{api}/actions/jobs/{one.id}",
        "html_url": f"{base}/{build.repository.full_name}/actions/runs/{build.run_id}/job/{one.id}",
        "status": one.status, "conclusion": one.conclusion, "created_at": iso(one.created_at),
        "started_at": iso(one.started_at or one.created_at), "completed_at": iso(one.finished_at),
        "name": one.name,
        "steps": [_step(step) for step in one.steps], "check_run_url": f"{api}/check-runs/{one.id}",
        "labels": ["ubuntu-latest"], "runner_id": 5 if running else None,
        "runner_name": "GitHub Actions 5" if running else None, "runner_group_id": 0 if running else None,
        "runner_group_name": "GitHub Actions" if running else None,
    }  # fmt: skip


def _step(step: Step) -> dict[str, Any]:
    return {
        "name": step.name, "status": step.status, "conclusion": step.conclusion, "number": step.number,
        "started_at": iso(step.started_at), "completed_at": iso(step.completed_at),
    }  # fmt: skip


def webhook(build: Build, moment: Moment, event: Event, base: str) -> dict[str, Any]:
    """The body of a `workflow_run` or `workflow_job` webhook."""
    common = {
        "repository": full_repository(base, build.repository), "sender": user(base, "mona-demo"),
        "organization": _organization(base, build.repository.owner),
    }  # fmt: skip
    if event.name == "workflow_job":
        one = next(one for one in moment.jobs if one.id == event.job_id)
        return {"action": event.action, "workflow_job": job(build, moment, one, base), **common}
    return {
        "action": event.action, "workflow_run": run(build, moment, base), "workflow": _workflow(build, base),
        **common,
    }  # fmt: skip


def _workflow(build: Build, base: str) -> dict[str, Any]:
    number = workflow_id(build)
    return {
        "id": number, "node_id": f"W_kwDO{number}", "name": build.workflow, "path": workflow_path(build),
        "state": "active", "created_at": "2024-03-01T08:00:00.000Z", "updated_at": "2026-10-30T08:00:00.000Z",
        "url": f"{base}/repos/{build.repository.full_name}/actions/workflows/{number}",
        "html_url": f"{base}/{build.repository.full_name}/blob/main/{workflow_path(build)}",
        "badge_url": f"{base}/{build.repository.full_name}/workflows/{build.workflow}/badge.svg",
    }  # fmt: skip


def ping(repository: Repository, base: str, url: str, hook_id: int = HOOK_ID) -> dict[str, Any]:
    """The body of the `ping` that follows the making of a webhook; `url` is where it points."""
    return {
        "zen": "Keep it logically awesome.", "hook_id": hook_id, "hook": hook(repository, base, url, hook_id),
        "repository": full_repository(base, repository), "sender": user(base, "mona-demo"),
    }  # fmt: skip


def hook(repository: Repository, base: str, url: str, hook_id: int = HOOK_ID) -> dict[str, Any]:
    """The webhook itself, as `GET …/hooks` shows it."""
    api = f"{base}/repos/{repository.full_name}/hooks/{hook_id}"
    return {
        "type": "Repository", "id": hook_id, "name": "web", "active": True, "events": ["workflow_job",
        "workflow_run"],
        "config": {"content_type": "json", "insecure_ssl": "0", "secret": "********", "url": url},
        "updated_at": "2026-10-30T08:00:00Z", "created_at": "2026-10-30T08:00:00Z", "url": api,
        "test_url": f"{api}/test", "ping_url": f"{api}/pings", "deliveries_url": f"{api}/deliveries",
        "last_response": {"code": 200, "status": "active", "message": "OK"},
    }  # fmt: skip


def delivery(
    number: int, guid: str, at: float, status: int | None, seconds: float, event: tuple[str, str | None],
    repository_id: int, redelivery: bool,
) -> dict[str, Any]:  # fmt: skip
    """A delivery as the list shows it; `status` None: nobody answered."""
    failed = f"Invalid HTTP Response: {status}" if status else "failed to connect to host"
    return {
        "id": number, "guid": guid, "delivered_at": iso(at), "redelivery": redelivery,
        "duration": round(seconds, 3), "status": "OK" if status and 200 <= status < 300 else failed,
        "status_code": status or 0, "event": event[0], "action": event[1], "installation_id": None,
        "repository_id": repository_id, "throttled_at": None,
    }  # fmt: skip


def artifact(
    build: Build, number: int, name: str, at: float, base: str,
    *, size: int, digest: str, expires_at: float, expired: bool,
) -> dict[str, Any]:  # fmt: skip
    """An artifact; `digest`: SHA-256 of its ZIP in hex."""
    url = f"{base}/repos/{build.repository.full_name}/actions/artifacts/{number}"
    return {
        "id": number, "node_id": f"A_{number}", "name": name, "size_in_bytes": size, "url": url,
        "archive_download_url": f"{url}/zip", "expired": expired, "created_at": iso(at),
        "expires_at": iso(expires_at), "updated_at": iso(at), "digest": f"sha256:{digest}",
        "workflow_run": {
            "id": build.run_id, "repository_id": build.repository.id,
            "head_repository_id": build.repository.id,
            "head_branch": build.branch, "head_sha": build.commit,
        },
    }  # fmt: skip


def check_run(build: Build, moment: Moment, one: Job, base: str) -> dict[str, Any]:
    """A job as a check run: the same id."""
    api = f"{base}/repos/{build.repository.full_name}"
    return {
        "id": one.id, "name": one.name, "node_id": f"CR_kwDO{one.id}", "head_sha": build.commit,
        "external_id": str(one.id), "url": f"{api}/check-runs/{one.id}",
        "html_url": f"{base}/{build.repository.full_name}/actions/runs/{build.run_id}/job/{one.id}",
        "details_url": f"{base}/{build.repository.full_name}/actions/runs/{build.run_id}/job/{one.id}",
        "status": one.status, "conclusion": one.conclusion, "started_at": iso(one.started_at),
        "completed_at": iso(one.finished_at), "check_suite": {"id": build.run_id + 20_000_000_000},
        "output": {
            "title": None, "summary": None, "text": None,
            "annotations_count": len(annotations(build, one, base)),
            "annotations_url": f"{api}/check-runs/{one.id}/annotations",
        },
        "app": app(base, 15368, "Iv1.actions", {}) | {"slug": "github-actions"}, "pull_requests": [],
    }  # fmt: skip


def annotations(build: Build, one: Job, base: str) -> list[dict[str, Any]]:
    """What a failed job marked: the test that failed, and how the process ended."""
    if one.conclusion != "failure":
        return []
    marks = (
        ("tests/test_cart.py", 41, "AssertionError: 19.04 != 19.05", "test_tax_is_rounded"),
        (".github", 23, "Process completed with exit code 1.", ""),
    )
    return [
        {
            "path": path, "start_line": line, "end_line": line, "start_column": None, "end_column": None,
            "annotation_level": "failure", "title": title, "message": message, "raw_details": "",
            "blob_href": f"{base}/{build.repository.full_name}/blob/{build.commit}/{path}",
        }
        for path, line, message, title in marks
    ]  # fmt: skip


def log_text(lines: Sequence[str], at: float) -> bytes:
    """A job's log: UTF-8 with BOM, each line with its time, groups, errors and colours marked."""
    stamp = datetime.fromtimestamp(int(at), UTC).strftime("%Y-%m-%dT%H:%M:%S")
    marked = ["##[group]Run make test", *lines, "##[endgroup]"]
    marked = [line.replace("Error: ", "##[error]") for line in marked]
    text = "".join(f"{stamp}.{n:07d}Z {line}\r\n" for n, line in enumerate(marked))
    return ("\ufeff" + text.replace("FAIL", "\x1b[31mFAIL\x1b[0m")).encode()
