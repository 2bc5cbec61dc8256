"""Traces and artifacts of the simulated GitLab's jobs, and the object storage that redirects lead to."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from webhook_app.simulated import gitlab_bodies as bodies
from webhook_app.simulated.archive import zipped
from webhook_app.simulated.blobs import Blobs
from webhook_app.simulated.blobs import problem as no_blob
from webhook_app.simulated.facts import Build, Job, Moment, Repository
from webhook_app.simulated.gitlab_api import GitLabApi
from webhook_app.simulated.httpd import Request, Response, json_response

_TEXT = {"Content-Type": "text/plain"}
_ZIP = {"Content-Type": "application/zip"}


class Files:
    """`redirect`: traces and artifacts lie in an object storage.  `ranges`: a trace can be read in parts.

    `artifact_seconds`: for how long artifacts are kept.  `leaks`: requests that brought the storage a token.
    """

    def __init__(self, server: GitLabApi) -> None:
        self.server = server
        self.redirect = False
        self.ranges = False
        self.artifact_seconds = 30 * 86_400.0
        self.artifact_bytes = 0
        self.leaks = 0
        self.blobs = Blobs(server.blob_url, server.world.now, 600.0)
        self._erased: dict[str, float] = {}

    def erase(self, job_id: int) -> None:
        """A person erased the job: no trace, no artifacts."""
        self._erased[str(job_id)] = self.server.world.now()

    def routes(self) -> Mapping[str, Callable[..., Response]]:
        """Below `/projects/:id`."""
        return {
            r"/jobs/(\d+)/trace": self._trace,
            r"/jobs/(\d+)/artifacts": self._artifacts,
            r"/jobs/(\d+)/artifacts/(.+)": self._artifacts,
        }

    def job(self, build: Build, moment: Moment, one: Job) -> dict[str, Any]:
        """A job as REST shows it, with what files it has."""
        archive = self._archive(build, one)
        kept_until = (one.finished_at or 0.0) + self.artifact_seconds if _uploads(one) else None
        return bodies.job(
            build, moment, one, self.server.url, archive_bytes=len(archive or b""), expire_at=kept_until,
            erased_at=self._erased.get(str(one.id)),
        )  # fmt: skip

    def _archive(self, build: Build, one: Job) -> bytes | None:
        """The ZIP; None if there never was one, it has expired, or it was erased."""
        if not _uploads(one) or str(one.id) in self._erased:
            return None
        if self.server.world.now() >= (one.finished_at or 0.0) + self.artifact_seconds:
            return None
        text = f"{build.repository.full_name} {build.commit} {one.name}\n"
        return zipped(f"{one.name}/app.txt", text, self.artifact_bytes)

    def trace(self, build: Build, one: Job) -> bytes:
        """What a job wrote so far: half of it while it runs."""
        if one.started_at is None:
            return b""
        lines = self.server.log(build, one.name, one.status == "failed")
        over = one.finished_at is not None
        return bodies.log_text(lines if over else lines[: len(lines) // 2], one.started_at, over)

    def _trace(self, request: Request, repository: Repository, job_id: str) -> Response:
        found = self.server.find_job(repository, job_id)
        if found is None or job_id in self._erased:
            return json_response({"message": "404 Not found"}, 404)
        if self.redirect and found[2].finished_at:
            return self.blobs.link(f"{repository.id}/trace/{job_id}")
        content = self.trace(found[0], found[2])
        return Response(200, self._range(request, content) if self.ranges else content, _TEXT)

    def _range(self, request: Request, content: bytes) -> bytes:
        """`byte_limit` bytes from `byte_offset` on; an old server knows neither and sends all."""
        offset, limit = (request.parameter(name) for name in ("byte_offset", "byte_limit"))
        begin = int(offset) if offset.isdigit() else 0
        return content[begin : begin + int(limit)] if limit.isdigit() else content[begin:]

    def _artifacts(self, request: Request, repository: Repository, job_id: str, path: str = "") -> Response:
        found = self.server.find_job(repository, job_id)
        archive = self._archive(found[0], found[2]) if found else None
        if found is None or archive is None:
            return json_response({"message": "404 Not found"}, 404)
        if path and path != f"{found[2].name}/app.txt":
            return json_response({"message": "404 Not found"}, 404)
        if path:
            return Response(
                200, f"{repository.full_name} {found[0].commit} {found[2].name}\n".encode(), _TEXT
            )
        if self.redirect:
            return self.blobs.link(f"{repository.id}/artifacts/{job_id}")
        return Response(200, archive, _ZIP)

    def blob(self, request: Request) -> Response:
        """What the object storage has; it notes who brings a token of GitLab."""
        self.leaks += "private-token" in request.headers or "authorization" in request.headers
        if refusal := self.blobs.refusal(request):
            return refusal
        found = re.fullmatch(r"/_blobs/(\d+)/(trace|artifacts)/(\d+)", request.path)
        places = self.server.world.places["gitlab"]
        place = next((place for place in places if found and place.id == int(found[1])), None)
        job = self.server.find_job(place, found[3]) if found and place else None
        if job is None or found is None:
            return no_blob(404, "NoSuchKey")
        if found[2] == "trace":
            return Response(200, self.trace(job[0], job[2]), _TEXT)
        archive = self._archive(job[0], job[2])
        return Response(200, archive, _ZIP) if archive else no_blob(404, "NoSuchKey")


def _uploads(one: Job) -> bool:
    """Builds leave artifacts when they succeed, tests in any case."""
    return (one.stage, one.status) in (("build", "success"), ("test", "success"), ("test", "failed"))
