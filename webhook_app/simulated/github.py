"""The simulated REST API of GitHub, as far as a poller, a collector, `doctor` and `sources connect` use it.

Repositories are private: without a token they don't exist (404), a wrong token is 401.  A 304
costs no budget; ETags belong to one token.  Unfiltered lists are right, newest `created_at` first, so that
a re-run keeps its place; filtered ones lag.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import orjson

from webhook_app.simulated import blobs
from webhook_app.simulated import github_bodies as bodies
from webhook_app.simulated.ci import as_they_were, bearer, matches, page_of, version_tag
from webhook_app.simulated.facts import Build, Moment, Repository
from webhook_app.simulated.github_access import PERMISSIONS, App, Grant, Limits, Tokens
from webhook_app.simulated.github_api import GitHubApi, problem
from webhook_app.simulated.github_files import Files
from webhook_app.simulated.github_hooks import Deliveries, Hooks
from webhook_app.simulated.httpd import Request, Response, json_response, page
from webhook_app.simulated.world import World

_JSON = {"X-GitHub-Media-Type": "github.v3; format=json"}
_NO_USER_AGENT = (
    "Request forbidden by administrative rules. Please make sure your request has a User-Agent header"
)
_FILTERS = ("branch", "event", "status", "head_sha", "actor", "created", "check_suite_id")
_WRITE_POINTS = 5
_SEARCH = {"limit": 30, "used": 0, "remaining": 30, "reset": 0, "resource": "search"}
_LEVELS = {"none": 0, "read": 1, "write": 2, "admin": 3}


def secondary_limit(retry_after_seconds: int | None = None) -> Response:
    """Too many requests at once: a 403 that often carries no `Retry-After`."""
    message = "You have exceeded a secondary rate limit. Please wait a few minutes before you try again."
    headers = {} if retry_after_seconds is None else {"Retry-After": str(retry_after_seconds)}
    return problem(403, message, headers)


def rate_limited(reset_at: float, status: int = 403) -> Response:
    """The budget of the hour is spent; `reset_at` in POSIX seconds."""
    return problem(status, "API rate limit exceeded for user ID 1.", _limit_headers(5000, 5000, reset_at))


def server_error(status: int = 502) -> Response:
    """A fault of the platform, as JSON."""
    return problem(status, "Server Error")


def permission_denied() -> Response:
    """The token lacks a permission, and GitHub says so."""
    return problem(403, "Resource not accessible by personal access token")


def sso_required(organization: str = "octo-demo") -> Response:
    """The organization wants single sign-on, which this token hasn't."""
    message = "Resource protected by organization SAML enforcement. You must grant your token access."
    url = f"https://github.com/orgs/{organization}/sso?authorization_request=AA"
    return problem(403, message, {"X-GitHub-SSO": f"required; url={url}"})


def html(status: int = 200) -> Response:
    """A page of a proxy where JSON was expected."""
    return Response(
        status, b"<!DOCTYPE html><html><title>Unicorn!</title></html>", {"Content-Type": "text/html"}
    )


def _limit_headers(limit: int, used: int, reset_at: float) -> dict[str, str]:
    return {
        "X-RateLimit-Limit": str(limit), "X-RateLimit-Remaining": str(max(limit - used, 0)),
        "X-RateLimit-Used": str(used), "X-RateLimit-Reset": str(int(reset_at)),
        "X-RateLimit-Resource": "core",
    }  # fmt: skip


class GitHubServer(GitHubApi):
    """`tokens`: the personal ones.  `app`: an App whose installation has tokens of its own.

    Tests steer `limits` (both kinds), `access` (the tokens' life), `files` (logs, artifacts, links), `hooks`
    with `deliveries` (usually the sender), `permissions` and `scopes`.  `limit`: requests per hour and
    account; `points`: of its minute.
    """

    def __init__(
        self,
        world: World,
        tokens: tuple[str, ...] = ("simulated-github-token",),
        *,
        app: App | None = None,
        limit: int = 5000,
        points: int = 900,
        list_lag_seconds: float = 0.0,
        filtered_lag_seconds: float = 5.0,
        port: int | None = 0,
    ) -> None:
        self.app = app
        self.filtered_lag_seconds = filtered_lag_seconds
        self.access = Tokens(tokens, app, world.now)
        self.limits = Limits(world.now, limit, points=points)
        self.permissions = dict(PERMISSIONS)
        self.scopes = "admin:repo_hook, repo, workflow"
        self._hook_url = ""
        super().__init__(world, list_lag_seconds=list_lag_seconds, port=port)
        self.files, self.hooks = Files(self), Hooks(self)
        self._table = [(re.compile(pattern), answer) for pattern, answer in self._routes().items()]

    # What tests steer ---------------------------------------------------------------------------

    @property
    def tokens(self) -> tuple[str, ...]:
        """The personal tokens that are accepted."""
        return self.access.personal

    @tokens.setter
    def tokens(self, tokens: tuple[str, ...]) -> None:
        self.access.personal = tokens

    @property
    def limit(self) -> int:
        """Requests per hour and account."""
        return self.limits.limit

    @property
    def secondary_hits(self) -> int:
        """How many requests were refused for a secondary limit."""
        return self.limits.secondary_hits

    @property
    def deliveries(self) -> Deliveries | None:
        """What is known of the deliveries of builds."""
        return self.hooks.deliveries

    @deliveries.setter
    def deliveries(self, deliveries: Deliveries | None) -> None:
        self.hooks.deliveries = deliveries

    @property
    def hook_url(self) -> str:
        """Where the webhook points that every repository has from the start; empty: they have none."""
        return self._hook_url

    @hook_url.setter
    def hook_url(self, url: str) -> None:
        self._hook_url = url
        self.hooks.preset(url)

    # What tests ask -----------------------------------------------------------------------------

    def path_of(self, build: Build) -> str:
        """`/repos/{owner}/{repo}/actions/runs/{id}`."""
        return f"/repos/{build.repository.full_name}/actions/runs/{build.run_id}"

    def used(self, token: str | None = None) -> int:
        """Requests of this hour that cost budget."""
        return self.limits.used(self.access.account(token or self.tokens[0]))

    # From the request to its route ------------------------------------------------------------------

    def _account(self, request: Request) -> str:
        return self.access.account(bearer(request))

    def _answer(self, request: Request) -> Response:
        if request.path.startswith(blobs.PREFIX):
            return self.files.blob(request)
        if not request.headers.get("user-agent"):
            return problem(403, _NO_USER_AGENT)
        if answer := self._app_answer(request):
            return answer
        token = bearer(request)
        grant = self.access.grant(token) if token else Grant("")
        if grant is None:
            return problem(401, "Bad credentials")
        if request.path == "/rate_limit":
            return self._rate_limit(grant.account)
        return self._limited(request, grant)

    def _limited(self, request: Request, grant: Grant) -> Response:
        account, limits = grant.account, self.limits
        cost = 1 if request.method in ("GET", "HEAD") else _WRITE_POINTS
        if limits.too_fast(account, cost, self.in_flight[account]):
            response = secondary_limit(limits.retry_after)
        elif limits.exhausted(account):
            response = rate_limited(limits.reset_at(), limits.limit_status)
        else:
            response = self._route(request, grant)
            if response.status != 304:
                limits.spend(account)
        scopes = {} if grant.installation or not account else {"X-OAuth-Scopes": self.scopes}
        shown = _limit_headers(limits.limit, limits.used(account), limits.reset_at())
        return replace(response, headers={**_JSON, **response.headers, **shown, **scopes})

    def _rate_limit(self, account: str) -> Response:
        limit, used, reset_at = self.limit, self.limits.used(account), self.limits.reset_at()
        core = {"limit": limit, "used": used, "remaining": max(limit - used, 0), "reset": reset_at}
        headers = _limit_headers(limit, used, reset_at)
        return json_response(
            {"resources": {"core": {**core, "resource": "core"}, "search": _SEARCH}, "rate": core},
            200,
            headers,
        )

    def _route(self, request: Request, grant: Grant) -> Response:
        if request.path == "/user" and grant.account:
            return self._user(grant)
        found = re.fullmatch(r"/repos/([^/]+/[^/]+)(/.*)?|/repositories/(\d+)(/.*)?", request.path)
        if found is None or not grant.account:
            return self._web_page(request.path)
        name = (found[1] or "").casefold()
        if name in self._moved and name not in self._named:
            return self._redirect(request, self._moved[name], found[2] or "")
        repository = self._named.get(name) if found[1] else self.repository_with(int(found[3]))
        if repository is None or repository in self._hidden or not grant.sees(repository.full_name):
            return problem(404, "Not Found")
        return self._in_repository(request, grant, repository, (found[2] or found[4] or "").rstrip("/"))

    def _in_repository(self, request: Request, grant: Grant, repository: Repository, rest: str) -> Response:
        if refusal := self._forbidden(request, grant, rest):
            return refusal
        for pattern, answer in self._table:
            if match := pattern.fullmatch(rest):
                return answer(request, repository, *match.groups())
        return problem(404, "Not Found")

    def _routes(self) -> dict[str, Callable[..., Response]]:
        return {
            "": lambda _, repository: json_response(
                bodies.full_repository(self.url, self.shown_as(repository)) | self._roles()
            ),
            "/actions/runs": self._runs,
            r"/actions/runs/(\d+)": self._run,
            r"/actions/runs/(\d+)/attempts/(\d+)": self._run,
            r"/actions/runs/(\d+)/jobs": self._jobs,
            r"/actions/runs/(\d+)/attempts/(\d+)/jobs": self._jobs,
            r"/actions/jobs/(\d+)": self._job,
            **self.files.routes(),
            **self.hooks.routes(),
        }

    def _forbidden(self, request: Request, grant: Grant, rest: str) -> Response | None:
        """A permission that is missing: 403, since the repository itself may be seen."""
        areas = {"actions": "actions", "check-runs": "checks", "hooks": "repository_hooks"}
        area = areas.get(rest.strip("/").partition("/")[0], "metadata")
        wanted = "read" if request.method in ("GET", "HEAD") else "write"
        held = [self.permissions, *([grant.permissions] if grant.permissions is not None else [])]
        if all(_LEVELS[each.get(area, "none")] >= _LEVELS[wanted] for each in held):
            return None
        who = "integration" if grant.installation else "personal access token"
        return problem(403, f"Resource not accessible by {who}")

    def _roles(self) -> dict[str, Any]:
        admin = self.permissions.get("repository_hooks") == "write"
        return {
            "permissions": {"admin": admin, "push": True, "pull": True}, "network_count": 0,
            "subscribers_count": 1,
        }  # fmt: skip

    def _user(self, grant: Grant) -> Response:
        if grant.installation:
            return problem(403, "Resource not accessible by integration")
        return json_response(bodies.private_user(self.url, "mona-demo"))

    def _redirect(self, request: Request, repository: Repository, rest: str) -> Response:
        query = f"?{request.query}" if request.query else ""
        location = f"{self.url}/repositories/{repository.id}{rest}{query}"
        body = {"message": "Moved Permanently", "url": location}
        status = 301 if request.method in ("GET", "HEAD") else 307
        return json_response(body, status, {"Location": location})

    # The App ------------------------------------------------------------------------------------

    def _app_answer(self, request: Request) -> Response | None:
        """What is asked with a JWT; None for everything else."""
        found = re.fullmatch(r"/repos/([^/]+/[^/]+)/installation", request.path)
        if not found and not re.match(r"/app(/|$)", request.path):
            return None
        objection = self.app.objection(bearer(request), self.world.now()) if self.app else "Bad credentials"
        if objection or self.app is None:
            return problem(401, objection or "")
        if found:
            repository = self._named.get(found[1].casefold())
            known = repository is not None and repository not in self._hidden
            return json_response(self._installation(self.app)) if known else problem(404, "Not Found")
        return self._app_route(request, self.app)

    def _app_route(self, request: Request, app: App) -> Response:
        if request.path.startswith("/app/hook/"):
            return self.hooks.app_answer(request, request.path.removeprefix("/app/hook"))
        one = f"/app/installations/{app.installation_id}"
        if request.path == f"{one}/access_tokens" and request.method == "POST":
            return self._issue(request)
        answers: Mapping[str, Any] = {
            "/app": bodies.app(self.url, app.app_id, app.client_id, self.permissions),
            "/app/installations": [self._installation(app)],
            one: self._installation(app),
        }
        found = answers.get(request.path)
        return problem(404, "Not Found") if found is None else json_response(found)

    def _installation(self, app: App) -> dict[str, Any]:
        return bodies.installation(self.url, app.installation_id, app.app_id, app.client_id, self.permissions)

    def _issue(self, request: Request) -> Response:
        """A token with all or some of the permissions, for all or some repositories."""
        try:
            asked = orjson.loads(request.body or b"{}")
        except orjson.JSONDecodeError:
            return problem(400, "Problems parsing JSON")
        names = {name.casefold() for name in asked.get("repositories", ())}
        known = {place.name.casefold(): place.name for place in self._repositories()}
        if names - set(known):
            return problem(422, "There is at least one repository that does not exist or is not accessible")
        permissions = asked.get("permissions", self.permissions)
        if any(
            _LEVELS[self.permissions.get(area, "none")] < _LEVELS[level]
            for area, level in permissions.items()
        ):
            return problem(422, "The permissions requested are not granted to this installation.")
        token, expires_at = self.access.issue(permissions, frozenset(known[name] for name in names) or None)
        selection = {"repository_selection": "selected" if names else "all"}
        told = {"token": token, "expires_at": bodies.iso(expires_at), "permissions": permissions}
        return json_response(told | selection, 201)

    # Runs and jobs ------------------------------------------------------------------------------

    def _tagged(
        self, request: Request, shown: list[tuple[Build, Moment]], content: Callable[[], Any], extra: str = ""
    ) -> Response:
        """The content with its ETag, or 304 if the client has it; the body is only built when it is sent."""
        tag = version_tag(bearer(request), f"{request.path}?{request.query}{extra}", shown)
        if matches(request, tag):
            return Response(304, headers={"ETag": tag})
        return json_response(
            content(), 200, {"ETag": tag, "Cache-Control": "private, max-age=60, s-maxage=60"}
        )

    def _runs(self, request: Request, repository: Repository) -> Response:
        """Only the asked page is looked at; a list as long as an hour costs what its page costs."""
        filtered = any(f"{name}=" in request.query for name in _FILTERS)
        at = self.world.now() - self.list_lag_seconds - (self.filtered_lag_seconds if filtered else 0.0)
        builds = self._begun(repository, at)
        if filtered:
            builds = self._filtered(request, builds, at)
        some, number, size, last = page_of(request, builds, 30)
        shown = as_they_were(some, at)
        response = self._tagged(
            request,
            shown,
            lambda: {
                "total_count": len(builds),
                "workflow_runs": [bodies.run(self.named(build), moment, self.url) for build, moment in shown],
            },
            f"#{len(builds)}",
        )
        return replace(response, headers={**response.headers, **self.links(request, number, size, last)})

    def _filtered(self, request: Request, builds: list[Build], at: float) -> list[Build]:
        """A filter is served by a search index that lags and stops at 1 000."""
        asked = {name: request.parameter(name) for name in _FILTERS if request.parameter(name)}
        return [build for build, moment in as_they_were(builds, at) if _passes(build, moment, asked)][:1000]

    def _run(
        self, request: Request, repository: Repository, run_id: str, attempt: str | None = None
    ) -> Response:
        found = self.at_attempt(repository, run_id, attempt)
        if found is None:
            return problem(404, "Not Found")
        build, moment = found
        return self._tagged(request, [found], lambda: bodies.run(self.named(build), moment, self.url))

    def _jobs(
        self, request: Request, repository: Repository, run_id: str, attempt: str | None = None
    ) -> Response:
        found = self.at_attempt(repository, run_id, attempt)
        if found is None:
            return problem(404, "Not Found")
        build, moment = found
        jobs, number, size, last = page_of(request, moment.jobs, 30)

        def content() -> dict[str, Any]:
            return {
                "total_count": len(moment.jobs),
                "jobs": [bodies.job(self.named(build), moment, one, self.url) for one in jobs],
            }

        response = self._tagged(request, [found], content)
        return replace(response, headers={**response.headers, **self.links(request, number, size, last)})

    def _job(self, request: Request, repository: Repository, job_id: str) -> Response:
        found = self.find_job(repository, job_id)
        if found is None:
            return problem(404, "Not Found")
        build, moment, one = found
        return json_response(bodies.job(self.named(build), moment, one, self.url))

    def _web_page(self, path: str) -> Response:
        """A page for a person who follows a link of the dashboard; else 404."""
        found = re.fullmatch(r"/([^/]+/[^/]+)/actions/runs/(\d+)(/job/\d+)?", path)
        repository = self._named.get(found[1].casefold()) if found else None
        run = self.find(repository, found[2]) if found and repository else None
        if run is None:
            return problem(404, "Not Found")
        return page(run[0].title, f"{run[1].status} {run[1].conclusion or ''}")


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
