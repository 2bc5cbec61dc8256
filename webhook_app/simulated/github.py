"""The simulated REST API of GitHub, as far as a poller, a collector and `doctor` read it.

Repositories are private: without a token they don't exist (404), a wrong token is 401.  A 304
costs no budget; ETags belong to one token.  Unfiltered lists are right; filtered ones lag.
"""

import io
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from webhook_app.simulated import github_bodies as bodies
from webhook_app.simulated.ci import ApiServer, log_lines, matches, page_of, version_tag
from webhook_app.simulated.facts import Build, Moment, Repository
from webhook_app.simulated.httpd import Request, Response, json_response, page
from webhook_app.simulated.world import World

_JSON = {"X-GitHub-Media-Type": "github.v3; format=json"}
_NO_USER_AGENT = (
    "Request forbidden by administrative rules. Please make sure your request has a User-Agent header"
)
_FILTERS = ("branch", "event", "status", "head_sha", "actor", "created", "check_suite_id")


class Deliveries(Protocol):
    """What the API knows of the hook's deliveries; the sender keeps it."""

    def deliveries(self, repository: Repository) -> list[dict[str, Any]]:
        """Newest first, as `GET …/hooks/{id}/deliveries` lists them."""

    def redeliver(self, delivery: int) -> bool:
        """Send one again; False for an unknown id."""


def secondary_limit(retry_after_seconds: int | None = None) -> Response:
    """Too many requests at once: a 403 that often carries no `Retry-After`."""
    message = "You have exceeded a secondary rate limit. Please wait a few minutes before you try again."
    headers = {} if retry_after_seconds is None else {"Retry-After": str(retry_after_seconds)}
    return _problem(403, message, headers)


def rate_limited(reset_at: float, status: int = 403) -> Response:
    """The budget of the hour is spent; `reset_at` in POSIX seconds."""
    return _problem(status, "API rate limit exceeded for user ID 1.", _limit_headers(5000, 5000, reset_at))


def server_error(status: int = 502) -> Response:
    """A fault of the platform, as JSON."""
    return _problem(status, "Server Error")


def html(status: int = 200) -> Response:
    """A page of a proxy where JSON was expected."""
    return Response(
        status, b"<!DOCTYPE html><html><title>Unicorn!</title></html>", {"Content-Type": "text/html"}
    )


def _problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    body = {"message": message, "documentation_url": "https://docs.github.com/rest", "status": str(status)}
    return json_response(body, status, headers)


def _limit_headers(limit: int, used: int, reset_at: float) -> dict[str, str]:
    return {
        "X-RateLimit-Limit": str(limit), "X-RateLimit-Remaining": str(max(limit - used, 0)),
        "X-RateLimit-Used": str(used), "X-RateLimit-Reset": str(int(reset_at)),
        "X-RateLimit-Resource": "core",
    }  # fmt: skip


class GitHubServer(ApiServer):
    """`tokens`: those accepted.  `limit`: requests per hour and token.  `deliveries`: usually the sender."""

    platform = "github"

    def __init__(
        self,
        world: World,
        tokens: tuple[str, ...] = ("simulated-github-token",),
        *,
        limit: int = 5000,
        list_lag_seconds: float = 0.0,
        filtered_lag_seconds: float = 5.0,
        port: int = 0,
    ) -> None:
        self.tokens = tokens
        self.limit = limit
        self.filtered_lag_seconds = filtered_lag_seconds
        self.deliveries: Deliveries | None = None
        self.hook_url = ""
        self._used: dict[str, tuple[int, int]] = {}  # token -> (hour, requests)
        super().__init__(world, list_lag_seconds=list_lag_seconds, port=port)

    def path_of(self, build: Build) -> str:
        """`/repos/{owner}/{repo}/actions/runs/{id}`."""
        return f"/repos/{build.repository.full_name}/actions/runs/{build.run_id}"

    def used(self, token: str | None = None) -> int:
        """Requests of this hour that cost budget."""
        return self._used.get(token or self.tokens[0], (0, 0))[1]

    def _answer(self, request: Request) -> Response:
        if request.path.startswith("/_blobs/"):
            return self._blob(request.path)
        if not request.headers.get("user-agent"):
            return _problem(403, _NO_USER_AGENT)
        token = request.headers.get("authorization", "").partition(" ")[2].strip()
        if token and token not in self.tokens:
            return _problem(401, "Bad credentials")
        if request.path == "/rate_limit":
            return self._rate_limit(token)
        return self._counted(request, token)

    def _counted(self, request: Request, token: str) -> Response:
        hour = int(self.world.now() // 3600)
        with self._lock:
            begun, used = self._used.get(token, (hour, 0))
            used = used if begun == hour else 0
        if used >= self.limit:
            response = rate_limited((hour + 1) * 3600)
        else:
            response = self._route(request, token)
            used += response.status != 304
            with self._lock:
                self._used[token] = (hour, used)
        limits = _limit_headers(self.limit, used, (hour + 1) * 3600)
        return replace(response, headers={**_JSON, **response.headers, **limits})

    def _rate_limit(self, token: str) -> Response:
        hour = int(self.world.now() // 3600)
        used = self.used(token)
        core = {"limit": self.limit, "used": used, "remaining": self.limit - used, "reset": (hour + 1) * 3600}
        headers = _limit_headers(self.limit, used, (hour + 1) * 3600)
        return json_response(
            {"resources": {"core": {**core, "resource": "core"}}, "rate": core}, 200, headers
        )

    def _route(self, request: Request, token: str) -> Response:
        found = re.fullmatch(r"/repos/([^/]+)/([^/]+)(/.*)?", request.path)
        repository = self._repository(found[1], found[2]) if found and token else None
        if found is None or repository is None:
            return self._web_page(request.path)
        rest = (found[3] or "").rstrip("/")
        for pattern, answer in self._routes().items():
            if match := re.fullmatch(pattern, rest):
                return answer(request, repository, *match.groups())
        return _problem(404, "Not Found")

    def _routes(self) -> dict[str, Callable[..., Response]]:
        return {
            "": lambda _, repository: json_response(bodies.full_repository(self.url, repository)),
            "/actions/runs": self._runs,
            r"/actions/runs/(\d+)": self._run,
            r"/actions/runs/(\d+)/attempts/(\d+)": self._run,
            r"/actions/runs/(\d+)/jobs": self._jobs,
            r"/actions/runs/(\d+)/attempts/(\d+)/jobs": self._jobs,
            r"/actions/runs/(\d+)/artifacts": self._artifacts,
            r"/actions/runs/(\d+)/logs": self._run_logs,
            r"/actions/jobs/(\d+)": self._job,
            r"/actions/jobs/(\d+)/logs": self._job_logs,
            r"/actions/artifacts/(\d+)/zip": self._artifact_zip,
            "/hooks": self._hooks,
            r"/hooks/(\d+)/deliveries": self._delivery_list,
            r"/hooks/(\d+)/deliveries/(\d+)/attempts": self._redeliver,
        }

    def _repository(self, owner: str, name: str) -> Repository | None:
        wanted = f"{owner}/{name}".casefold()
        return next((place for place in self._repositories() if place.full_name.casefold() == wanted), None)

    # Runs and jobs ------------------------------------------------------------------------------

    def _tagged(
        self, request: Request, shown: list[tuple[Build, Moment]], content: Callable[[], Any], extra: str = ""
    ) -> Response:
        """The content with its ETag, or 304 if the client has it; the body is only built when it is sent."""
        token = request.headers.get("authorization", "")
        tag = version_tag(token, f"{request.path}?{request.query}{extra}", shown)
        if matches(request, tag):
            return Response(304, headers={"ETag": tag})
        return json_response(
            content(), 200, {"ETag": tag, "Cache-Control": "private, max-age=60, s-maxage=60"}
        )

    def _runs(self, request: Request, repository: Repository) -> Response:
        shown = self._filtered(request, repository)
        shown_now, number, size, last = page_of(request, shown, 30)
        response = self._tagged(
            request,
            list(shown_now),
            lambda: {
                "total_count": len(shown),
                "workflow_runs": [bodies.run(build, moment, self.url) for build, moment in shown_now],
            },
            f"#{len(shown)}",
        )
        return replace(response, headers={**response.headers, **self._link(request, number, size, last)})

    def _filtered(self, request: Request, repository: Repository) -> list[tuple[Build, Moment]]:
        """All runs, newest first; a filter is served by a search index that lags and stops at 1 000."""
        asked = {name: request.parameter(name) for name in _FILTERS if request.parameter(name)}
        shown = self._visible(repository)
        if not asked:
            return shown
        at = self.world.now() - self.filtered_lag_seconds
        late = [(build, moment) for build, _ in shown if (moment := build.moment_at(at))]
        return [(build, moment) for build, moment in late if _passes(build, moment, asked)][:1000]

    def _link(self, request: Request, page: int, size: int, last: int) -> dict[str, str]:
        backward = {"prev": page - 1, "first": 1} if page > 1 else {}
        forward = {"next": page + 1, "last": last} if page < last else {}
        links = [
            f'<{self.url}{request.path}?per_page={size}&page={number}>; rel="{rel}"'
            for rel, number in {**backward, **forward}.items()
        ]
        return {"Link": ", ".join(links)} if links else {}

    def _at_attempt(
        self, repository: Repository, run_id: str, attempt: str | None
    ) -> tuple[Build, Moment] | None:
        found = self._find(repository, run_id)
        if found is None or attempt is None:
            return found
        build, newest = found
        told = [
            moment for moment in build.moments if moment.attempt == int(attempt) and moment.at <= newest.at
        ]
        return (build, told[-1]) if told else None

    def _run(
        self, request: Request, repository: Repository, run_id: str, attempt: str | None = None
    ) -> Response:
        found = self._at_attempt(repository, run_id, attempt)
        if found is None:
            return _problem(404, "Not Found")
        return self._tagged(request, [found], lambda: bodies.run(*found, self.url))

    def _jobs(
        self, request: Request, repository: Repository, run_id: str, attempt: str | None = None
    ) -> Response:
        found = self._at_attempt(repository, run_id, attempt)
        if found is None:
            return _problem(404, "Not Found")
        build, moment = found
        jobs = list(moment.jobs)

        def content() -> dict[str, Any]:
            return {
                "total_count": len(jobs),
                "jobs": [bodies.job(build, moment, one, self.url) for one in jobs],
            }

        return self._tagged(request, [found], content)

    def _job_of(self, repository: Repository, job_id: str) -> tuple[Build, Moment, int] | None:
        for build, moment in self._visible(repository):
            for index, one in enumerate(moment.jobs):
                if str(one.id) == job_id:
                    return build, moment, index
        return None

    def _job(self, request: Request, repository: Repository, job_id: str) -> Response:
        found = self._job_of(repository, job_id)
        if found is None:
            return _problem(404, "Not Found")
        build, moment, index = found
        return json_response(bodies.job(build, moment, moment.jobs[index], self.url))

    # Logs and artifacts -------------------------------------------------------------------------

    def _job_logs(self, request: Request, repository: Repository, job_id: str) -> Response:
        found = self._job_of(repository, job_id)
        if found is None or found[1].jobs[found[2]].status != "completed":
            return _problem(404, "Not Found")
        return Response(302, headers={"Location": f"{self.url}/_blobs/{repository.full_name}/jobs/{job_id}"})

    def _run_logs(self, request: Request, repository: Repository, run_id: str) -> Response:
        found = self._find(repository, run_id)
        if found is None or found[1].status != "completed" or not found[1].jobs:
            return _problem(404, "Not Found")
        return Response(302, headers={"Location": f"{self.url}/_blobs/{repository.full_name}/logs/{run_id}"})

    def _artifacts(self, request: Request, repository: Repository, run_id: str) -> Response:
        found = self._find(repository, run_id)
        if found is None:
            return _problem(404, "Not Found")
        listed = bodies.artifacts(*found, len(_artifact(found[0])), self.url)
        return json_response({"total_count": len(listed), "artifacts": listed})

    def _artifact_zip(self, request: Request, repository: Repository, artifact_id: str) -> Response:
        found = self._find(repository, artifact_id[:-1])
        if found is None or found[1].conclusion != "success" or not artifact_id.endswith("1"):
            return _problem(404, "Not Found")
        return Response(
            302, headers={"Location": f"{self.url}/_blobs/{repository.full_name}/zip/{artifact_id[:-1]}"}
        )

    def _blob(self, path: str) -> Response:
        """The blob store that the redirects point to; it knows no token."""
        _, _, owner, name, kind, number = path.split("/")
        repository = self._repository(owner, name)
        if repository is None:
            return _problem(404, "Not Found")
        if kind == "jobs" and (found := self._job_of(repository, number)):
            return Response(200, _job_log(*found), {"Content-Type": "text/plain; charset=utf-8"})
        if kind in ("logs", "zip") and (run := self._find(repository, number)):
            content = _artifact(run[0]) if kind == "zip" else _zip(
                {f"{n}_{one.name}.txt": _job_log(*run, n) for n, one in enumerate(run[1].jobs)}
            )  # fmt: skip
            return Response(200, content, {"Content-Type": "application/zip"})
        return _problem(404, "Not Found")

    def _web_page(self, path: str) -> Response:
        """A page for a person who follows a link of the dashboard; else 404."""
        found = re.fullmatch(r"/([^/]+)/([^/]+)/actions/runs/(\d+)(/job/\d+)?", path)
        repository = self._repository(found[1], found[2]) if found else None
        run = self._find(repository, found[3]) if found and repository else None
        if run is None:
            return _problem(404, "Not Found")
        return page(run[0].title, f"{run[1].status} {run[1].conclusion or ''}")

    # Hooks --------------------------------------------------------------------------------------

    def _hooks(self, request: Request, repository: Repository) -> Response:
        return json_response([bodies.hook(repository, self.url, self.hook_url)] if self.hook_url else [])

    def _delivery_list(self, request: Request, repository: Repository, hook_id: str) -> Response:
        if self.deliveries is None or hook_id != str(bodies.HOOK_ID):
            return _problem(404, "Not Found")
        status = request.parameter("status")
        listed = [
            delivery
            for delivery in self.deliveries.deliveries(repository)
            if not status or (delivery["status"] == "OK") == (status == "success")
        ]
        shown_now, number, size, last = page_of(request, listed, 30)
        return json_response(list(shown_now), 200, self._link(request, number, size, last))

    def _redeliver(self, request: Request, repository: Repository, hook_id: str, delivery: str) -> Response:
        if (
            request.method != "POST"
            or self.deliveries is None
            or not self.deliveries.redeliver(int(delivery))
        ):
            return _problem(404, "Not Found")
        return json_response({}, 202)


def _passes(build: Build, moment: Moment, asked: Mapping[str, str]) -> bool:
    created = asked.get("created", "")
    facts = {
        "branch": (build.branch,), "event": ("push",), "status": (moment.status, moment.conclusion),
        "head_sha": (build.commit,), "actor": ("mona-demo",),
        "check_suite_id": (str(build.run_id + 20_000_000_000),),
    }  # fmt: skip
    if created.startswith(">=") and (bodies.iso(build.begins_at) or "") < created[2:]:
        return False
    return all(value in facts[name] for name, value in asked.items() if name in facts)


def _job_log(build: Build, moment: Moment, index: int) -> bytes:
    one = moment.jobs[index]
    return bodies.log_text(
        log_lines(build, one.name, one.conclusion == "failure"), one.finished_at or moment.at
    )


def _artifact(build: Build) -> bytes:
    return _zip({"dist/app.txt": f"{build.repository.full_name} {build.commit}\n".encode()})


def _zip(files: Mapping[str, bytes]) -> bytes:
    """A ZIP that is the same for the same files."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()
