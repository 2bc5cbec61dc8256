"""The simulated remote API of Jenkins, as far as a poller, a collector and `doctor` read it.

Basic authentication with user and API token: none is 403, a wrong one 401.  No limits, no ETags.
"""

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any

from webhook_app.simulated import jenkins_bodies as bodies
from webhook_app.simulated.ci import ApiServer, log_lines
from webhook_app.simulated.facts import Build, Moment, Repository
from webhook_app.simulated.httpd import Request, Response, json_response
from webhook_app.simulated.world import World

_HEADERS = {"X-Jenkins": "2.541.1", "X-Content-Type-Options": "nosniff"}
_JSON = {**_HEADERS, "Content-Type": "application/json;charset=utf-8"}
_LISTED = 100
_JOB_TREE = "name,fullName,url,buildable,color,inQueue,queueItem,builds[number,url],lastBuild[number,url]"
"""What a job shows of itself without `tree=`: its builds by number and address only."""


class JenkinsServer(ApiServer):
    """`username` and `api_token`: the account that may read.  `honour_tree`: False answers whole objects."""

    platform = "jenkins"

    def __init__(
        self,
        world: World,
        username: str = "buildrelay",
        api_token: str = "simulated-jenkins-token",  # noqa: S107 - of the simulation
        *,
        honour_tree: bool = True,
        list_lag_seconds: float = 0.0,
        port: int = 0,
    ) -> None:
        self.username = username
        self.api_token = api_token
        self.honour_tree = honour_tree
        super().__init__(world, list_lag_seconds=list_lag_seconds, port=port)

    def path_of(self, build: Build) -> str:
        """`/job/FOLDER/job/NAME/NUMBER`."""
        return "/" + bodies.build_path(build).rstrip("/")

    def _answer(self, request: Request) -> Response:
        given = request.headers.get("authorization", "")
        expected = base64.b64encode(f"{self.username}:{self.api_token}".encode()).decode()
        if not given and request.path.endswith("/api/json"):
            return _refused(403, "Authentication required")
        if given and given != f"Basic {expected}":
            return _refused(401, "Invalid password/token for user")
        return self._route(request)

    def _route(self, request: Request) -> Response:
        if request.path == "/api/json":
            return self._json(
                request, {"_class": "hudson.model.Hudson", "mode": "NORMAL", "jobs": self._jobs()}
            )
        found = re.fullmatch(r"/job/([^/]+)/job/([^/]+)(/.*)?", request.path)
        repository = self._repository(found[1], found[2]) if found else None
        if found is None or repository is None:
            return _not_found()
        rest = found[3] or "/"
        if rest.rstrip("/") == "/api/json":
            return self._json(request, self._job(repository), _JOB_TREE)
        build = re.fullmatch(r"/(\d+|last\w*Build)(/.*)?", rest)
        pair = self._build(repository, build[1]) if build else None
        if build is None or pair is None:
            return _not_found()
        return self._build_route(request, *pair, (build[2] or "/").rstrip("/"))

    def _build_route(self, request: Request, build: Build, moment: Moment, rest: str) -> Response:
        answers: Mapping[str, Callable[[], Response]] = {
            "/api/json": lambda: self._json(
                request, bodies.api_build(build, moment, self.url, self.world.now())
            ),
            "/wfapi/describe": lambda: self._json(request, bodies.stages(build, moment)),
            "/consoleText": lambda: _text(_console(build, moment)),
            "/logText/progressiveText": lambda: _progressive(request, build, moment),
            "": lambda: _text(f"{build.title}: {moment.status} {moment.conclusion or ''}\n".encode()),
        }
        if rest.startswith("/artifact/") and rest[10:] in bodies.artifacts(build, moment, self.url):
            return _text(f"{build.repository.full_name} {build.commit}\n".encode())
        return answers[rest]() if rest in answers else _not_found()

    def _json(self, request: Request, content: Mapping[str, Any], default_tree: str = "") -> Response:
        tree = request.parameter("tree", default_tree) if self.honour_tree else ""
        return json_response(bodies.prune(content, tree), 200, _JSON)

    def _repository(self, folder: str, name: str) -> Repository | None:
        return next(
            (place for place in self._repositories() if (place.owner, place.name) == (folder, name)), None
        )

    def _jobs(self) -> list[dict[str, Any]]:
        return [
            {"name": place.owner, "url": f"{self.url}/job/{place.owner}/"} for place in self._repositories()
        ]

    def _job(self, repository: Repository) -> dict[str, Any]:
        """The job with its newest 100 builds; `allBuilds` has them all."""
        now = self.world.now()
        builds = [bodies.api_build(*pair, self.url, now) for pair in self._visible(repository)]
        return {
            "_class": "org.jenkinsci.plugins.workflow.job.WorkflowJob", "name": repository.name,
            "fullName": repository.full_name,
            "url": f"{self.url}/job/{repository.owner}/job/{repository.name}/",
            "buildable": True, "color": "blue", "inQueue": False, "queueItem": None,
            "builds": builds[:_LISTED], "allBuilds": builds, "lastBuild": builds[0] if builds else None,
        }  # fmt: skip

    def _build(self, repository: Repository, number: str) -> tuple[Build, Moment] | None:
        if number.isdigit():
            return self.find(repository, number, "number")
        permalinks: dict[str, Callable[[Moment], bool]] = {
            "lastBuild": lambda moment: True,
            "lastCompletedBuild": lambda moment: moment.status != "building",
            "lastSuccessfulBuild": lambda moment: (
                moment.conclusion == "SUCCESS" and moment.status != "building"
            ),
        }
        wanted = permalinks.get(number)
        return next((pair for pair in self._visible(repository) if wanted and wanted(pair[1])), None)


def _refused(status: int, message: str) -> Response:
    return Response(
        status, f"<html><body>{message}</body></html>".encode(), {**_HEADERS, "Content-Type": "text/html"}
    )


def _not_found() -> Response:
    return _refused(404, "Not Found")


def _text(content: bytes, headers: Mapping[str, str] | None = None) -> Response:
    return Response(200, content, {**_HEADERS, "Content-Type": "text/plain;charset=utf-8", **(headers or {})})


def _console(build: Build, moment: Moment) -> bytes:
    lines = ["Started by an SCM change", f"[Pipeline] stage ({len(moment.jobs)})"]
    lines += log_lines(build, build.repository.name, moment.conclusion == "FAILURE")
    if moment.status != "building":
        lines.append(f"Finished: {moment.conclusion}")
    return "".join(f"{line}\n" for line in lines).encode()


def _progressive(request: Request, build: Build, moment: Moment) -> Response:
    """The log from byte `start` on; `X-Text-Size` is the next start, `X-More-Data` while it grows."""
    content = _console(build, moment)
    start = request.parameter("start", "0")
    more = {"X-More-Data": "true"} if moment.status == "building" else {}
    headers = {"X-Text-Size": str(len(content)), **more}
    return _text(content[int(start) if start.isdigit() else 0 :], headers)
