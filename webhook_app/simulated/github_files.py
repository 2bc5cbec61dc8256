"""Logs, annotations and artifacts of the simulated GitHub, and the blob store that its redirects lead to.

The store has an address of its own.  It knows only the signed links, which are good for a minute; a
foreign `Authorization` header is refused, as Azure's does.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from webhook_app.simulated import github_bodies as bodies
from webhook_app.simulated.archive import zip_of, zipped
from webhook_app.simulated.blobs import Blobs
from webhook_app.simulated.blobs import problem as no_blob
from webhook_app.simulated.ci import page_of
from webhook_app.simulated.facts import Build, Job, Moment, Repository
from webhook_app.simulated.github_api import GitHubApi, problem
from webhook_app.simulated.httpd import Request, Response, json_response

RETENTION_SECONDS = 90 * 86_400.0
_WITHOUT_LOG = ("cancelled", "skipped")


class Artifact(NamedTuple):
    """A ZIP that an attempt uploaded at `at`."""

    id: int
    name: str
    at: float
    attempt: int


class Files:
    """`retention_seconds`: how long logs and artifacts are kept; `blobs`: where they lie.

    `artifact_bytes`: what is in each artifact at least.
    """

    def __init__(self, server: GitHubApi) -> None:
        self.server = server
        self.retention_seconds = RETENTION_SECONDS
        self.artifact_bytes = 0
        self.blobs = Blobs(server.blob_url, server.world.now, 60.0)

    def routes(self) -> Mapping[str, Callable[..., Response]]:
        """Below `/repos/{owner}/{repo}`."""
        return {
            r"/actions/runs/(\d+)/logs": self._run_logs,
            r"/actions/runs/(\d+)/attempts/(\d+)/logs": self._run_logs,
            r"/actions/jobs/(\d+)/logs": self._job_logs,
            r"/check-runs/(\d+)": self._check_run,
            r"/check-runs/(\d+)/annotations": self._annotations,
            r"/actions/runs/(\d+)/artifacts": self._artifacts,
            r"/actions/artifacts/(\d+)": self._artifact,
            r"/actions/artifacts/(\d+)/zip": self._artifact_zip,
        }

    # Logs ---------------------------------------------------------------------------------------

    def _job_logs(self, request: Request, repository: Repository, job_id: str) -> Response:
        """A job that isn't over has a link whose blob doesn't exist yet; one that never ran has none."""
        found = self.server.find_job(repository, job_id)
        if found is None or found[2].conclusion in _WITHOUT_LOG:
            return problem(404, "Not Found")
        if self._gone(found[2].finished_at):
            return problem(410, "Gone")
        return self._link(repository, "jobs", job_id)

    def _run_logs(
        self, request: Request, repository: Repository, run_id: str, attempt: str | None = None
    ) -> Response:
        found = self.server.at_attempt(repository, run_id, attempt)
        if found is None or found[1].status != "completed" or not _logged(found[1]):
            return problem(404, "Not Found")
        if self._gone(found[1].at):
            return problem(410, "Gone")
        return self._link(repository, "logs", f"{run_id}.{found[1].attempt}")

    def _gone(self, at: float | None) -> bool:
        return at is not None and self.server.world.now() >= at + self.retention_seconds

    def _job_log(self, build: Build, one: Job) -> bytes:
        lines = self.server.log(build, one.name, one.conclusion in ("failure", "timed_out"))
        return bodies.log_text(lines, one.finished_at or 0.0)

    def _run_zip(self, build: Build, moment: Moment) -> bytes:
        """A file for each job, and a folder with a file for each of its steps."""
        files: dict[str, bytes] = {}
        for number, one in enumerate(_logged(moment)):
            files[f"{number}_{one.name}.txt"] = self._job_log(build, one)
            for step in one.steps:
                files[f"{one.name}/{step.number}_{step.name.replace('/', '_')}.txt"] = step.name.encode()
        return zip_of(files)

    # Annotations --------------------------------------------------------------------------------

    def _check_run(self, request: Request, repository: Repository, job_id: str) -> Response:
        found = self.server.find_job(repository, job_id)
        if found is None:
            return problem(404, "Not Found")
        return json_response(bodies.check_run(*found, self.server.url))

    def _annotations(self, request: Request, repository: Repository, job_id: str) -> Response:
        found = self.server.find_job(repository, job_id)
        if found is None:
            return problem(404, "Not Found")
        build, _, one = found
        return self.server.paged(request, bodies.annotations(build, one, self.server.url), 30)

    # Artifacts ----------------------------------------------------------------------------------

    def _artifacts(self, request: Request, repository: Repository, run_id: str) -> Response:
        found = self.server.find(repository, run_id)
        if found is None:
            return problem(404, "Not Found")
        build, moment = found
        name = request.parameter("name")
        listed = [one for one in _uploaded(build, moment.at) if name in ("", one.name)]
        shown, number, size, last = page_of(request, listed, 30)
        content = {"total_count": len(listed), "artifacts": [self._body(build, one) for one in shown]}
        return json_response(content, 200, self.server.links(request, number, size, last))

    def _body(self, build: Build, one: Artifact) -> dict[str, Any]:
        content = self._content(build, one)
        expires_at = one.at + self.retention_seconds
        return bodies.artifact(
            self.server.named(build), one.id, one.name, one.at, self.server.url,
            size=len(content), digest=hashlib.sha256(content).hexdigest(),
            expires_at=expires_at, expired=self._gone(one.at),
        )  # fmt: skip

    def _content(self, build: Build, one: Artifact) -> bytes:
        text = f"{build.repository.full_name} {build.commit} attempt {one.attempt}\n"
        return zipped(f"{one.name}/app.txt", text, self.artifact_bytes)

    def _find_artifact(self, repository: Repository, number: str) -> tuple[Build, Artifact] | None:
        found = self.server.find(repository, number[:-2])
        if found is None:
            return None
        build, moment = found
        return next(((build, one) for one in _uploaded(build, moment.at) if str(one.id) == number), None)

    def _artifact(self, request: Request, repository: Repository, number: str) -> Response:
        found = self._find_artifact(repository, number)
        return json_response(self._body(*found)) if found else problem(404, "Not Found")

    def _artifact_zip(self, request: Request, repository: Repository, number: str) -> Response:
        found = self._find_artifact(repository, number)
        if found is None:
            return problem(404, "Not Found")
        if self._gone(found[1].at):
            return problem(410, "Artifact has expired")
        return self._link(repository, "zip", number)

    # The blob store -----------------------------------------------------------------------------

    def _link(self, repository: Repository, kind: str, number: str) -> Response:
        return self.blobs.link(f"{repository.id}/{kind}/{number}")

    def blob(self, request: Request) -> Response:
        """What a signed link leads to."""
        if refusal := self.blobs.refusal(request):
            return refusal
        _, _, place, kind, number = request.path.split("/")
        repository = self.server.repository_with(int(place))
        content = self._blob_content(repository, kind, number) if repository else None
        if content is None:
            return no_blob(404, "BlobNotFound")
        kinds = {"jobs": "text/plain; charset=utf-8"}
        return Response(200, content, {"Content-Type": kinds.get(kind, "application/zip")})

    def _blob_content(self, repository: Repository, kind: str, number: str) -> bytes | None:
        if kind == "jobs":
            job = self.server.find_job(repository, number)
            return self._job_log(job[0], job[2]) if job and job[2].status == "completed" else None
        if kind == "logs":
            run = self.server.at_attempt(repository, *number.split("."))
            return self._run_zip(*run) if run else None
        artifact = self._find_artifact(repository, number)
        return self._content(*artifact) if artifact else None


def _logged(moment: Moment) -> list[Job]:
    return [one for one in moment.jobs if one.status == "completed" and one.conclusion not in _WITHOUT_LOG]


def _uploaded(build: Build, until: float) -> list[Artifact]:
    """What the attempts uploaded by `until`, newest first: a report each, and `dist` if it went well.

    No attempt is told with it, and so a name comes back with every re-run.
    """
    ends = [m for m in build.moments if m.at <= until and m.conclusion in ("success", "failure")]
    uploaded = []
    for moment in ends:
        names = ("test-report", "dist") if moment.conclusion == "success" else ("test-report",)
        for index, name in enumerate(names, start=1):
            number = build.run_id * 100 + moment.attempt * 10 + index
            uploaded.append(Artifact(number, name, moment.at, moment.attempt))
    return uploaded[::-1]
