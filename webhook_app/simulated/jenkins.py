"""The simulated remote API of Jenkins, as far as a poller, a collector and `doctor` read it.

Basic authentication with user and API token: none is 403, a wrong one 401; what the account may not see is
404.  No limits, no ETags.
"""

import base64
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from webhook_app.simulated import jenkins_bodies as bodies
from webhook_app.simulated.archive import zipped
from webhook_app.simulated.ci import ApiServer
from webhook_app.simulated.facts import Build, Moment, Repository
from webhook_app.simulated.httpd import Request, Response, json_response
from webhook_app.simulated.jenkins_bodies import Each
from webhook_app.simulated.world import World

_HEADERS = {"X-Jenkins": "2.541.1", "X-Content-Type-Options": "nosniff"}
_JSON = {**_HEADERS, "Content-Type": "application/json;charset=utf-8"}
_LISTED = 100
_ITEM_KEPT_SECONDS = 300.0
_JOB_TREE = "name,fullName,url,buildable,color,inQueue,queueItem,builds[number,url],lastBuild[number,url]"
"""What a job shows of itself without `tree=`: its builds by number and address only."""
_FOLDER_TREE = "name,fullName,url,jobs[name,url,color]"
_ROOT_TREE = "mode,url,jobs[name,url,color]"


class JenkinsServer(ApiServer):
    """`username` and `api_token`: the account that may read.  `honour_tree`: False answers whole objects.

    Tests may set: `freestyle`, the full names of jobs that are no Pipelines and have no stages;
    `overall_read` False, an account that may not even look; `artifact_bytes` of each archived file.
    """

    platform = "jenkins"

    def __init__(
        self,
        world: World,
        username: str = "buildrelay",
        api_token: str = "simulated-jenkins-token",  # noqa: S107 - of the simulation
        *,
        honour_tree: bool = True,
        list_lag_seconds: float = 0.0,
        port: int | None = 0,
    ) -> None:
        self.username = username
        self.api_token = api_token
        self.honour_tree = honour_tree
        self.freestyle: set[str] = set()
        self.overall_read = True
        self.artifact_bytes = 0
        self._cancelled: set[int] = set()
        super().__init__(world, list_lag_seconds=list_lag_seconds, port=port)

    def path_of(self, build: Build) -> str:
        """`/job/FOLDER/job/NAME/NUMBER`."""
        return "/" + bodies.build_path(build).rstrip("/")

    def cancel_queued(self, build_id: str) -> None:
        """A person takes the build out of the queue: it never gets a number."""
        build = self.world.build(build_id)
        assert build
        self._cancelled.add(build.run_id)
        self.delete(build_id)

    # From the request to its route --------------------------------------------------------------

    def _answer(self, request: Request) -> Response:
        given = request.headers.get("authorization", "")
        expected = base64.b64encode(f"{self.username}:{self.api_token}".encode()).decode()
        if not given and not re.fullmatch(r"/job/[^/]+/job/[^/]+/\d+/?", request.path):
            return _refused(403, "Authentication required")
        if given and given != f"Basic {expected}":
            return _refused(401, "Invalid password/token for user")
        if given and not self.overall_read:
            return _refused(403, f"{self.username} is missing the Overall/Read permission")
        return self._route(request)

    def _route(self, request: Request) -> Response:
        path = request.path.rstrip("/")
        if path in ("/api/json", "/whoAmI/api/json", "/queue/api/json"):
            return self._controller(request, path)
        if found := re.fullmatch(r"/queue/item/(\d+)/api/json", path):
            item = self._queue_item(int(found[1]))
            return self._json(request, item) if item else _not_found()
        if found := re.fullmatch(r"/job/([^/]+)/api/json", path):
            places = [place for place in self._repositories() if place.owner == found[1]]
            return (
                self._json(request, self._folder(found[1], places), _FOLDER_TREE) if places else _not_found()
            )
        found = re.fullmatch(r"/job/([^/]+)/job/([^/]+)(/.*)?", request.path)
        repository = self._repository(found[1], found[2]) if found else None
        if found is None or repository is None:
            return _not_found()
        return self._job_route(request, repository, found[3] or "/")

    def _controller(self, request: Request, path: str) -> Response:
        if path == "/whoAmI/api/json":
            about = {"name": self.username, "authenticated": True, "anonymous": False}
            return self._json(request, about | {"authorities": ["authenticated"]})
        if path == "/queue/api/json":
            waiting = [self._queue_item(build.run_id) for build in self._waiting()]
            return self._json(request, {"_class": "hudson.model.Queue", "items": waiting})
        places: dict[str, list[Repository]] = {}
        for place in self._repositories():
            places.setdefault(place.owner, []).append(place)
        folders = Each(list(places), lambda name: self._folder(name, places[name]))
        root = {"_class": "hudson.model.Hudson", "mode": "NORMAL", "url": f"{self.url}/", "jobs": folders}
        return self._json(request, root, _ROOT_TREE)

    def _job_route(self, request: Request, repository: Repository, rest: str) -> Response:
        if rest.rstrip("/") == "/api/json":
            return self._json(request, self._job(repository), _JOB_TREE)
        build = re.fullmatch(r"/(\d+|last\w*Build)(/.*)?", rest)
        pair = self._build(repository, build[1]) if build else None
        if build is None or pair is None:
            return _not_found()
        return self._build_route(request, *pair, (build[2] or "/").rstrip("/"))

    def _build_route(self, request: Request, build: Build, moment: Moment, rest: str) -> Response:
        answers: Mapping[str, Callable[[], Response]] = {
            "/api/json": lambda: self._json(request, self._api_build((build, moment))),
            "/wfapi/describe": lambda: self._stages(request, build, moment),
            "/consoleText": lambda: _text(_shown(self._console(build, moment))),
            "/logText/progressiveText": lambda: self._progressive(request, build, moment),
            "": lambda: _text(f"{build.title}: {moment.status} {moment.conclusion or ''}\n".encode()),
        }
        if rest.startswith("/artifact/"):
            return self._artifact(build, moment, rest[10:])
        return answers[rest]() if rest in answers else _not_found()

    def _json(self, request: Request, content: Mapping[str, Any], default_tree: str = "") -> Response:
        tree = request.parameter("tree", default_tree) if self.honour_tree else ""
        return json_response(bodies.prune(content, tree), 200, _JSON)

    def _repository(self, folder: str, name: str) -> Repository | None:
        return next(
            (place for place in self._repositories() if (place.owner, place.name) == (folder, name)), None
        )

    # Folders, jobs and builds -------------------------------------------------------------------

    def _folder(self, name: str, places: Iterable[Repository]) -> dict[str, Any]:
        """A folder with its jobs, each of which is only looked at if the tree asks for more than its name."""
        return {
            "_class": "com.cloudbees.hudson.plugins.folder.Folder", "name": name, "fullName": name,
            "url": f"{self.url}/job/{name}/", "jobs": Each(list(places), self._job),
        }  # fmt: skip

    def _job(self, repository: Repository) -> dict[str, Any]:
        """The job with its newest 100 builds; `allBuilds` has them all."""
        builds = Each(self._visible(repository), self._api_build)
        kind = "org.jenkinsci.plugins.workflow.job.WorkflowJob"
        freestyle = repository.full_name in self.freestyle
        return {
            "_class": "hudson.model.FreeStyleProject" if freestyle else kind, "name": repository.name,
            "fullName": repository.full_name,
            "url": f"{self.url}/job/{repository.owner}/job/{repository.name}/",
            "buildable": True, "color": "blue", "inQueue": False, "queueItem": None,
            "builds": builds[:_LISTED], "allBuilds": builds, "lastBuild": builds[0] if builds else None,
        }  # fmt: skip

    def _api_build(self, pair: tuple[Build, Moment]) -> dict[str, Any]:
        build, moment = pair
        content = bodies.api_build(build, moment, self.url, self.world.now(), self._estimate(build))
        freestyle = build.repository.full_name in self.freestyle
        return content | ({"_class": "hudson.model.FreeStyleBuild"} if freestyle else {})

    def _estimate(self, build: Build) -> int:
        """The average of the last three that ended well among the six before it, in ms; -1 without one."""
        before = (self.find(build.repository, str(build.number - n), "number") for n in range(1, 7))
        ended = [pair for pair in before if pair and pair[1].status != "building"]
        well = [(older, last) for older, last in ended if last.conclusion in ("SUCCESS", "UNSTABLE")][:3]
        spent = [bodies.milliseconds(last.at - older.begins_at) for older, last in well]
        return sum(spent) // len(spent) if spent else -1

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

    def _stages(self, request: Request, build: Build, moment: Moment) -> Response:
        if build.repository.full_name in self.freestyle:
            return _not_found()
        return self._json(request, bodies.stages(build, moment))

    # The queue ----------------------------------------------------------------------------------

    def _waiting(self) -> list[Build]:
        now = self.world.now()
        soon = [
            build
            for place in self._repositories()
            for build in self.world.begun(place, now + bodies.QUIET_SECONDS)
        ]
        return [b for b in soon if b.begins_at > now and b.build_id not in self._deleted]

    def _queue_item(self, item_id: int) -> dict[str, Any] | None:
        """Known while it waits, and for five minutes after it left."""
        builds = (self.world.run(place, item_id) for place in self._repositories())
        build, now = next(filter(None, builds), None), self.world.now()
        if build is None or not -bodies.QUIET_SECONDS <= now - build.begins_at < _ITEM_KEPT_SECONDS:
            return None
        cancelled = item_id in self._cancelled
        return bodies.queue_item(build, self.url, now, cancelled)

    # Logs and artifacts -------------------------------------------------------------------------

    def _console(self, build: Build, moment: Moment) -> bytes:
        """The raw log: it only ever grows, and has notes in it that are shown nowhere."""
        lines = ["Started by an SCM change"]
        for one in moment.jobs:
            lines.append(f"{bodies.NOTE}[Pipeline] {{ ({one.name})")
            if one.finished_at is not None:
                lines += self.log(build, one.name, one.status == "FAILED")
            if one.finished_at is not None and one.status == "FAILED":
                lines.append("ERROR: script returned exit code 1")
        if moment.status != "building":
            lines.append(f"Finished: {moment.conclusion}")
        return "".join(f"{line}\n" for line in lines).encode()

    def _progressive(self, request: Request, build: Build, moment: Moment) -> Response:
        """The log from raw byte `start` on; `X-Text-Size` is the next start, `X-More-Data` while it grows."""
        raw, start = self._console(build, moment), request.parameter("start", "0")
        begin = int(start) if start.isdigit() and int(start) <= len(raw) else 0
        more = {"X-More-Data": "true"} if moment.status == "building" else {}
        return _text(_shown(raw[begin:]), {"X-Text-Size": str(len(raw)), **more})

    def _artifact(self, build: Build, moment: Moment, path: str) -> Response:
        archived = bodies.artifacts(build, moment, self.url)
        text = f"{build.repository.full_name} {build.commit}\n"
        if path in archived:
            content = text.encode() + bytes(self.artifact_bytes)
            return Response(200, content, {**_HEADERS, "Content-Type": "application/octet-stream"})
        if archived and path == "*zip*/archive.zip":
            content = zipped("archive/dist/app.txt", text, self.artifact_bytes)
            return Response(200, content, {**_HEADERS, "Content-Type": "application/zip"})
        return _not_found()


def _refused(status: int, message: str) -> Response:
    return Response(
        status, f"<html><body>{message}</body></html>".encode(), {**_HEADERS, "Content-Type": "text/html"}
    )


def _not_found() -> Response:
    return _refused(404, "Not Found")


def _text(content: bytes, headers: Mapping[str, str] | None = None) -> Response:
    return Response(200, content, {**_HEADERS, "Content-Type": "text/plain;charset=utf-8", **(headers or {})})


def _shown(raw: bytes) -> bytes:
    return raw.replace(bodies.NOTE.encode(), b"")
