"""The simulated REST API of GitLab (`/api/v4`), as far as polling, collecting and connecting use it.

Projects are private: without a token they don't exist (404), a wrong token is 401.  A 304 saves
bytes but counts as a request.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any
from urllib.parse import parse_qs, unquote

from webhook_app.simulated import blobs
from webhook_app.simulated import gitlab_bodies as bodies
from webhook_app.simulated.ci import bearer, matches, version_tag
from webhook_app.simulated.facts import Build, Moment, Repository
from webhook_app.simulated.gitlab_access import OAuth
from webhook_app.simulated.gitlab_api import GitLabApi, not_found
from webhook_app.simulated.gitlab_files import Files
from webhook_app.simulated.gitlab_hooks import Hooks
from webhook_app.simulated.httpd import Request, Response, json_response, page
from webhook_app.simulated.world import World

WINDOW_SECONDS = 60
MAINTAINER = 40


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


class GitLabServer(GitLabApi):
    """`tokens`: those accepted, as `PRIVATE-TOKEN` or bearer.  `limit`: requests per minute and account.

    `limit` None: a self-managed instance without limits, and so without their headers; `limit_headers`
    False: one that has limits and doesn't tell them.  Tests steer `oauth`, `files` (traces, artifacts),
    `hooks` with `sendings` (usually the sender), `scopes` of the token and `access_level` of its owner.
    """

    def __init__(
        self,
        world: World,
        tokens: tuple[str, ...] = ("simulated-gitlab-token",),
        *,
        limit: int | None = 2000,
        limit_headers: bool = True,
        list_lag_seconds: float = 0.0,
        port: int | None = 0,
    ) -> None:
        self.tokens = tokens
        self.limit = limit
        self.limit_headers = limit_headers
        self.scopes = ["api"]
        self.access_level = MAINTAINER
        self.token_expires_on: str | None = None
        self.oauth = OAuth(world.now)
        self._used: dict[str, tuple[int, int]] = {}  # account -> (minute, requests)
        super().__init__(world, list_lag_seconds=list_lag_seconds, port=port)
        self.files, self.hooks = Files(self), Hooks(self)
        self._table = [(re.compile(pattern), answer) for pattern, answer in self._routes().items()]

    def path_of(self, build: Build) -> str:
        """`/api/v4/projects/{id}/pipelines/{id}`; a project asked for by its path isn't counted."""
        return f"/api/v4/projects/{build.repository.id}/pipelines/{build.run_id}"

    def _account(self, request: Request) -> str:
        """Limits are per user: all OAuth tokens of the application share one."""
        token = super()._account(request)
        return "oauth" if self.oauth.knows(token) else token

    def _answer(self, request: Request) -> Response:
        if request.path.startswith(blobs.PREFIX):
            return self.files.blob(request)
        if request.path == "/oauth/token" and request.method == "POST":
            form = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
            return self.oauth.token(form)
        if refusal := self._unknown_token(request):
            return refusal
        account, minute = self._account(request), int(self.world.now() // WINDOW_SECONDS)
        used, reset_at = self._spend(account, minute), (minute + 1) * WINDOW_SECONDS
        if self.limit is not None and used > self.limit:
            return self._too_many(used, reset_at)
        response = self._route(request, account)
        return replace(response, headers={**response.headers, **self._limits(used, reset_at)})

    def _too_many(self, used: int, reset_at: float) -> Response:
        """A 429; who tells no limits tells only when to come back."""
        refused = rate_limited(max(int(reset_at - self.world.now()), 1), reset_at)
        kept = {name: value for name, value in refused.headers.items() if not name.startswith("RateLimit")}
        limits = self._limits(used, reset_at)
        reset = {"RateLimit-ResetTime": formatdate(reset_at, usegmt=True)} if limits else {}
        return replace(refused, headers={**kept, **limits, **reset})

    def _limits(self, used: int, reset_at: float) -> dict[str, str]:
        told = self.limit is not None and self.limit_headers
        return _limit_headers(self.limit or 0, used, reset_at) if told else {}

    def _unknown_token(self, request: Request) -> Response | None:
        private, given = request.headers.get("private-token", ""), bearer(request)
        if self.oauth.knows(given):
            return self.oauth.objection(given)
        token = private or given
        return (
            json_response({"message": "401 Unauthorized"}, 401)
            if token and token not in self.tokens
            else None
        )

    def _spend(self, account: str, minute: int) -> int:
        with self._lock:
            begun, used = self._used.get(account, (minute, 0))
            used = used + 1 if begun == minute else 1
            self._used[account] = (minute, used)
        return used

    def used(self, token: str | None = None) -> int:
        """Requests of this minute."""
        minute, used = self._used.get(token or self.tokens[0], (0, 0))
        return used if minute == int(self.world.now() // WINDOW_SECONDS) else 0

    def _route(self, request: Request, account: str) -> Response:
        if not account:
            return self._web_page(request.path) or not_found("Project")
        if about := self._about(request.path, account):
            return about
        found = re.fullmatch(r"/api/v4/projects/([^/]+)(/.*)?", request.path)
        repository = self._repository(unquote(found[1])) if found else None
        if found is None or repository is None:
            return self._web_page(request.path) or not_found("Project")
        rest = (found[2] or "").rstrip("/")
        if refusal := self._forbidden(request, rest):
            return refusal
        for pattern, answer in self._table:
            if match := pattern.fullmatch(rest):
                return answer(request, repository, *match.groups())
        return json_response({"error": "404 Not Found"}, 404)

    def _about(self, path: str, account: str) -> Response | None:
        """The instance, the user and the token."""
        if path == "/api/v4/version":
            return json_response({"version": "19.6.1-ee", "revision": "0a1b2c3d4e5", "enterprise": True})
        if path == "/api/v4/user":
            return json_response(bodies.rest_user(self.url))
        if path != "/api/v4/personal_access_tokens/self":
            return None
        if account == "oauth":
            return json_response({"message": "400 Bad request - This endpoint requires token type"}, 400)
        return json_response({
            "id": 4, "name": "buildrelay", "revoked": False, "created_at": "2026-01-05T08:00:00.000Z",
            "description": None, "scopes": self.scopes, "user_id": 11, "active": True,
            "last_used_at": bodies.iso(self.world.now()), "expires_at": self.token_expires_on,
        })  # fmt: skip

    def _forbidden(self, request: Request, rest: str) -> Response | None:
        """A scope that is too small, or a role: hooks are for maintainers."""
        if request.method != "GET" and "api" not in self.scopes:
            text = "The request requires higher privileges than provided by the access token."
            body = {"error": "insufficient_scope", "error_description": text, "scope": "api"}
            return json_response(body, 403)
        if rest.startswith("/hooks") and self.access_level < MAINTAINER:
            return json_response({"message": "403 Forbidden"}, 403)
        return None

    def _routes(self) -> Mapping[str, Callable[..., Response]]:
        return {
            "": lambda _, repository: json_response(
                bodies.rest_project(repository, self.url, self.access_level)
            ),
            "/pipelines": self._pipelines,
            r"/pipelines/(\d+)": self._pipeline,
            r"/pipelines/(\d+)/jobs": self._jobs,
            r"/pipelines/(\d+)/bridges": lambda *_: json_response([]),
            r"/jobs/(\d+)": self._job,
            **self.files.routes(),
            **self.hooks.routes(),
        }

    # Pipelines and jobs -------------------------------------------------------------------------

    def _tagged(
        self, request: Request, content: Callable[[], Any], shown: Sequence[tuple[Build, Moment]]
    ) -> Response:
        tag = version_tag("", f"{request.path}?{request.query}", shown)
        if matches(request, tag):
            return Response(304, headers={"ETag": tag})
        return json_response(
            content(), 200, {"ETag": tag, "Cache-Control": "max-age=0, private, must-revalidate"}
        )

    def _pipelines(self, request: Request, repository: Repository) -> Response:
        asked = {name: values[0] for name, values in parse_qs(request.query).items()}
        try:
            passing = [pair for pair in self._visible(repository) if _passes(pair, asked)]
        except ValueError:
            return json_response({"error": "updated_after is invalid"}, 400)
        some, pages = self.page(request, _sorted(asked, passing))
        response = self._tagged(
            request, lambda: [bodies.listed(build, moment, self.url) for build, moment in some], some
        )
        return replace(response, headers={**response.headers, **pages})

    def _pipeline(self, request: Request, repository: Repository, pipeline_id: str) -> Response:
        found = self.find(repository, pipeline_id)
        if found is None:
            return not_found("Pipeline")
        return self._tagged(request, lambda: bodies.pipeline(*found, self.url), [found])

    def _jobs(self, request: Request, repository: Repository, pipeline_id: str) -> Response:
        """Newest id first, those that were retried only on demand; `scope[]` chooses by status."""
        found = self.find(repository, pipeline_id)
        if found is None:
            return not_found("Pipeline")
        build, moment = found
        asked = parse_qs(request.query)
        retired = moment.retired if request.parameter("include_retried") == "true" else ()
        scope = asked.get("scope[]") or asked.get("scope") or []
        jobs = [one for one in (*moment.jobs, *retired) if not scope or one.status in scope]
        some, pages = self.page(request, sorted(jobs, key=lambda one: -one.id))
        response = self._tagged(
            request, lambda: [self.files.job(build, moment, one) for one in some], [found]
        )
        return replace(response, headers={**response.headers, **pages})

    def _job(self, request: Request, repository: Repository, job_id: str) -> Response:
        found = self.find_job(repository, job_id)
        return json_response(self.files.job(*found)) if found else not_found("Job")

    def _web_page(self, path: str) -> Response | None:
        """A page for a person who follows a link of the dashboard."""
        found = re.fullmatch(r"/([^/]+/[^/]+)/-/pipelines/(\d+)", path)
        repository = self._repository(found[1]) if found else None
        pipeline = self.find(repository, found[2]) if found and repository else None
        if pipeline is None:
            return None
        return page(pipeline[0].title, pipeline[1].status)


_KEYS: Mapping[str, Callable[[tuple[Build, Moment]], Any]] = {
    "id": lambda pair: pair[0].run_id,
    "updated_at": lambda pair: pair[1].at,
    "status": lambda pair: pair[1].status,
    "ref": lambda pair: pair[0].branch,
}


def _sorted(asked: Mapping[str, str], shown: list[tuple[Build, Moment]]) -> list[tuple[Build, Moment]]:
    key = _KEYS.get(asked.get("order_by", "id"), _KEYS["id"])
    return sorted(shown, key=key, reverse=asked.get("sort", "desc") == "desc")


def _passes(pair: tuple[Build, Moment], asked: Mapping[str, str]) -> bool:
    """The filters of the list; raises `ValueError` for a time that is none."""
    build, moment = pair
    exact = {"status": moment.status, "ref": build.branch, "sha": build.commit, "source": "push"}
    if any(asked.get(name, value) != value for name, value in exact.items()):
        return False
    after, before, created = (
        asked.get(name) for name in ("updated_after", "updated_before", "created_after")
    )
    return (
        (not after or moment.at > _posix(after))
        and (not before or moment.at < _posix(before))
        and (not created or build.begins_at > _posix(created))
    )


def _posix(text: str) -> float:
    """A time of the query in POSIX seconds; an unencoded `+` of its offset arrives as a blank."""
    at = datetime.fromisoformat(text.replace(" ", "+"))
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
