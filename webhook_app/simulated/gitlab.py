"""The simulated REST API of GitLab (`/api/v4`), as far as a poller, a collector and `doctor` read it.

Projects are private: without a token they don't exist (404), a wrong token is 401.  A 304 saves
bytes but counts as a request.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import formatdate
from urllib.parse import unquote

from webhook_app.simulated import gitlab_bodies as bodies
from webhook_app.simulated.ci import ApiServer, matches, page_of, version_tag
from webhook_app.simulated.facts import Build, Job, Moment, Repository
from webhook_app.simulated.httpd import Request, Response, json_response, page
from webhook_app.simulated.world import World

WINDOW_SECONDS = 60


def rate_limited(retry_after_seconds: int = 30, reset_at: float = 0.0) -> Response:
    """Too many requests in this minute."""
    headers = {
        **_limit_headers(2000, 2000, reset_at), "Retry-After": str(retry_after_seconds),
        "RateLimit-ResetTime": formatdate(reset_at, usegmt=True), "Content-Type": "text/plain",
    }  # fmt: skip
    return Response(429, b"Retry later\n", headers)


def _limit_headers(limit: int, used: int, reset_at: float) -> dict[str, str]:
    return {
        "RateLimit-Limit": str(limit), "RateLimit-Observed": str(used),
        "RateLimit-Remaining": str(max(limit - used, 0)),
        "RateLimit-Reset": str(int(reset_at)), "RateLimit-Name": "throttle_authenticated_api",
    }  # fmt: skip


def _not_found(what: str) -> Response:
    return json_response({"message": f"404 {what} Not Found"}, 404)


class GitLabServer(ApiServer):
    """`tokens`: those accepted, as `PRIVATE-TOKEN` or bearer.  `limit`: requests per minute and token.

    `limit_headers` False: a self-managed instance that tells no limits.
    """

    platform = "gitlab"

    def __init__(
        self,
        world: World,
        tokens: tuple[str, ...] = ("simulated-gitlab-token",),
        *,
        limit: int = 2000,
        limit_headers: bool = True,
        list_lag_seconds: float = 0.0,
        port: int = 0,
    ) -> None:
        self.tokens = tokens
        self.limit = limit
        self.limit_headers = limit_headers
        self._used: dict[str, tuple[int, int]] = {}  # token -> (minute, requests)
        super().__init__(world, list_lag_seconds=list_lag_seconds, port=port)

    def path_of(self, build: Build) -> str:
        """`/api/v4/projects/{id}/pipelines/{id}`; a project asked for by its path isn't counted."""
        return f"/api/v4/projects/{build.repository.id}/pipelines/{build.run_id}"

    def _answer(self, request: Request) -> Response:
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        token = request.headers.get("private-token", "") or bearer
        if token and token not in self.tokens:
            return json_response({"message": "401 Unauthorized"}, 401)
        minute = int(self.world.now() // WINDOW_SECONDS)
        used, reset_at = self._spend(token, minute), (minute + 1) * WINDOW_SECONDS
        if used > self.limit:
            return rate_limited(max(int(reset_at - self.world.now()), 1), reset_at)
        response = self._route(request, token)
        limits = _limit_headers(self.limit, used, reset_at) if self.limit_headers else {}
        return replace(response, headers={**response.headers, **limits})

    def _spend(self, token: str, minute: int) -> int:
        with self._lock:
            begun, used = self._used.get(token, (minute, 0))
            used = used + 1 if begun == minute else 1
            self._used[token] = (minute, used)
        return used

    def _route(self, request: Request, token: str) -> Response:
        if not token:
            return self._web_page(request.path) or _not_found("Project")
        if request.path == "/api/v4/version":
            return json_response({"version": "19.6.1-ee", "revision": "0a1b2c3d4e5", "enterprise": True})
        if request.path == "/api/v4/user":
            return json_response(bodies.rest_user(self.url))
        found = re.fullmatch(r"/api/v4/projects/([^/]+)(/.*)?", request.path)
        repository = self._repository(unquote(found[1])) if found else None
        if found is None or repository is None:
            return self._web_page(request.path) or _not_found("Project")
        rest = (found[2] or "").rstrip("/")
        for pattern, answer in self._routes().items():
            if match := re.fullmatch(pattern, rest):
                return answer(request, repository, *match.groups())
        return json_response({"error": "404 Not Found"}, 404)

    def _routes(self) -> Mapping[str, Callable[..., Response]]:
        return {
            "": lambda _, repository: json_response(bodies.project(repository, self.url)),
            "/pipelines": self._pipelines,
            r"/pipelines/(\d+)": self._pipeline,
            r"/pipelines/(\d+)/jobs": self._jobs,
            r"/pipelines/(\d+)/bridges": lambda *_: json_response([]),
            r"/jobs/(\d+)": self._job,
            r"/jobs/(\d+)/trace": self._trace,
        }

    def _repository(self, name: str) -> Repository | None:
        """By id or by path, whose case doesn't matter."""
        for place in self._repositories():
            if name == str(place.id) or name.casefold() == place.full_name.casefold():
                return place
        return None

    def _tagged(self, request: Request, content: object, shown: list[tuple[Build, Moment]]) -> Response:
        tag = version_tag("", f"{request.path}?{request.query}", shown)
        if matches(request, tag):
            return Response(304, headers={"ETag": tag})
        return json_response(
            content, 200, {"ETag": tag, "Cache-Control": "max-age=0, private, must-revalidate"}
        )

    def _pipelines(self, request: Request, repository: Repository) -> Response:
        shown = self._sorted(request, [pair for pair in self._visible(repository) if _passes(pair, request)])
        shown_now, number, size, last = page_of(request, shown, 20)
        content = [bodies.listed(build, moment, self.url) for build, moment in shown_now]
        response = self._tagged(request, content, list(shown_now))
        following = str(number + 1) if number < last else ""
        pages = {
            "X-Page": str(number), "X-Per-Page": str(size), "X-Total": str(len(shown)),
            "X-Total-Pages": str(last),
            "X-Next-Page": following, "X-Prev-Page": str(number - 1) if number > 1 else "",
        }  # fmt: skip
        if following:
            query = re.sub(r"(^|&)page=\d+", "", request.query).lstrip("&")
            pages["Link"] = f'<{self.url}{request.path}?{query}&page={following}>; rel="next"'
        return replace(response, headers={**response.headers, **pages})

    def _sorted(self, request: Request, shown: list[tuple[Build, Moment]]) -> list[tuple[Build, Moment]]:
        keys: dict[str, Callable[[tuple[Build, Moment]], object]] = {
            "id": lambda pair: pair[0].run_id,
            "updated_at": lambda pair: pair[1].at,
            "status": lambda pair: pair[1].status,
            "ref": lambda pair: pair[0].branch,
        }
        key = keys.get(request.parameter("order_by", "id"), keys["id"])
        return sorted(shown, key=key, reverse=request.parameter("sort", "desc") == "desc")  # type: ignore[arg-type]

    def _pipeline(self, request: Request, repository: Repository, pipeline_id: str) -> Response:
        found = self._find(repository, pipeline_id)
        if found is None:
            return _not_found("Pipeline")
        return self._tagged(request, bodies.pipeline(*found, self.url), [found])

    def _jobs(self, request: Request, repository: Repository, pipeline_id: str) -> Response:
        found = self._find(repository, pipeline_id)
        if found is None:
            return _not_found("Pipeline")
        build, moment = found
        retired = moment.retired if request.parameter("include_retried") == "true" else ()
        jobs = sorted((*moment.jobs, *retired), key=lambda one: -one.id)
        some, *_ = page_of(request, jobs, 20)
        return self._tagged(request, [bodies.job(build, moment, one, self.url) for one in some], [found])

    def _job_of(self, repository: Repository, job_id: str) -> tuple[Build, Moment, Job] | None:
        for build, moment in self._visible(repository):
            for one in (*moment.jobs, *moment.retired):
                if str(one.id) == job_id:
                    return build, moment, one
        return None

    def _job(self, request: Request, repository: Repository, job_id: str) -> Response:
        found = self._job_of(repository, job_id)
        return json_response(bodies.job(*found, self.url)) if found else _not_found("Job")

    def _trace(self, request: Request, repository: Repository, job_id: str) -> Response:
        found = self._job_of(repository, job_id)
        if found is None:
            return _not_found("Job")
        build, _, one = found
        if one.started_at is None:
            return Response(200, b"", {"Content-Type": "text/plain"})
        lines = self._log(build, one.name, one.status == "failed")
        return Response(200, bodies.log_text(lines, one.started_at), {"Content-Type": "text/plain"})

    def _web_page(self, path: str) -> Response | None:
        """A page for a person who follows a link of the dashboard."""
        found = re.fullmatch(r"/([^/]+/[^/]+)/-/pipelines/(\d+)", path)
        repository = self._repository(found[1]) if found else None
        pipeline = self._find(repository, found[2]) if found and repository else None
        if pipeline is None:
            return None
        return page(pipeline[0].title, pipeline[1].status)


def _passes(pair: tuple[Build, Moment], request: Request) -> bool:
    """The filters of the list."""
    build, moment = pair
    exact = {"status": moment.status, "ref": build.branch, "sha": build.commit, "source": "push"}
    if any(request.parameter(name, value) != value for name, value in exact.items()):
        return False
    after, before = request.parameter("updated_after"), request.parameter("updated_before")
    created = request.parameter("created_after")
    return (
        (not after or moment.at > _posix(after))
        and (not before or moment.at < _posix(before))
        and (not created or build.begins_at > _posix(created))
    )


def _posix(text: str) -> float:
    """A time of the query in POSIX seconds; an unencoded `+` of its offset arrives as a blank."""
    at = datetime.fromisoformat(text.replace(" ", "+"))
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
