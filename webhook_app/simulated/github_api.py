"""What all parts of the simulated GitHub need: repositories under their names, problems, pages."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from webhook_app.simulated.ci import ApiServer, page_of
from webhook_app.simulated.facts import Build, Moment, Repository
from webhook_app.simulated.httpd import Request, Response, json_response
from webhook_app.simulated.world import World


def problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as GitHub words it."""
    body = {"message": message, "documentation_url": "https://docs.github.com/rest", "status": str(status)}
    return json_response(body, status, headers)


class GitHubApi(ApiServer):
    """Its blob store is at `blob_url`."""

    platform = "github"

    def __init__(self, world: World, *, list_lag_seconds: float, port: int | None) -> None:
        super().__init__(world, list_lag_seconds=list_lag_seconds, port=port)
        self._named: dict[str, Repository] = {}
        self._moved: dict[str, Repository] = {}
        self._shown: dict[Repository, Repository] = {}
        self._by_id: dict[int, Repository] = {}
        for place in self._repositories():
            self._named[place.full_name.casefold()] = self._by_id[place.id] = place

    def rename(self, repository: Repository, owner: str, name: str) -> None:
        """The repository has moved: its old address answers 301."""
        old = self.shown_as(repository)
        self._moved[old.full_name.casefold()] = repository
        self._named.pop(old.full_name.casefold(), None)
        self._shown[repository] = replace(repository, owner=owner, name=name)
        self._named[f"{owner}/{name}".casefold()] = repository

    # What the parts use -------------------------------------------------------------------------

    def repository_with(self, repository_id: int) -> Repository | None:
        """A repository by its id."""
        return self._by_id.get(repository_id)

    def shown_as(self, repository: Repository) -> Repository:
        """The repository under its present name."""
        return self._shown.get(repository, repository)

    def named(self, build: Build) -> Build:
        """The build in its repository's present name."""
        shown = self._shown.get(build.repository) if self._shown else None
        return replace(build, repository=shown) if shown else build

    def at_attempt(
        self, repository: Repository, run_id: str, attempt: str | None
    ) -> tuple[Build, Moment] | None:
        """A run as it was at the end of an attempt, or is now."""
        found = self.find(repository, run_id)
        if found is None or attempt is None:
            return found
        build, newest = found
        told = [
            moment for moment in build.moments if moment.attempt == int(attempt) and moment.at <= newest.at
        ]
        return (build, told[-1]) if told else None

    # Lists --------------------------------------------------------------------------------------

    def paged(self, request: Request, items: Sequence[Any], default: int) -> Response:
        """The asked page of a list, with its links."""
        shown, number, size, last = page_of(request, items, default)
        return json_response(list(shown), 200, self.links(request, number, size, last))

    def cursored(self, request: Request, items: Sequence[dict[str, Any]]) -> Response:
        """A page of a list that starts after the item whose id is the `cursor`."""
        ids, cursor = [str(item["id"]) for item in items], request.parameter("cursor").removeprefix("v1_")
        begin = ids.index(cursor) + 1 if cursor in ids else 0
        shown, _, size, _ = page_of(request, items[begin:], 30)
        links = {}
        if begin + size < len(items):
            status = request.parameter("status")
            more = f"&status={status}" if status else ""
            url = f"{self.url}{request.path}?per_page={size}{more}&cursor=v1_{shown[-1]['id']}"
            links = {"Link": f'<{url}>; rel="next"'}
        return json_response(list(shown), 200, links)

    def links(self, request: Request, page: int, size: int, last: int) -> dict[str, str]:
        """The `Link` header of a page; other parameters of the query stay."""
        backward = {"prev": page - 1, "first": 1} if page > 1 else {}
        forward = {"next": page + 1, "last": last} if page < last else {}
        kept = _without_page(request.query)
        links = [
            f'<{self.url}{request.path}?{kept}per_page={size}&page={number}>; rel="{rel}"'
            for rel, number in {**backward, **forward}.items()
        ]
        return {"Link": ", ".join(links)} if links else {}

    def invalid(self, resource: str, message: str) -> Response:
        """A 422, as validations fail."""
        errors = [{"resource": resource, "code": "custom", "message": message}]
        body = {"message": "Validation Failed", "errors": errors, "status": "422"}
        return json_response(body | {"documentation_url": "https://docs.github.com/rest"}, 422)


def _without_page(query: str) -> str:
    """The parameters of a query that stay the same from page to page, each with a `&` after it."""
    kept = [part for part in query.split("&") if part and part.partition("=")[0] not in ("page", "per_page")]
    return "".join(f"{part}&" for part in kept)
