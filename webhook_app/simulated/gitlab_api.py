"""What all parts of the simulated GitLab need: its projects, its problems, its pages."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from webhook_app.simulated.ci import ApiServer, page_of
from webhook_app.simulated.facts import Build, Moment, Repository
from webhook_app.simulated.httpd import Request, Response, json_response
from webhook_app.simulated.world import World

T = TypeVar("T")


def not_found(what: str) -> Response:
    """A 404 as GitLab words it."""
    return json_response({"message": f"404 {what} Not Found"}, 404)


class GitLabApi(ApiServer):
    """Its projects by id and by path, whose case doesn't matter."""

    platform = "gitlab"

    def __init__(self, world: World, *, list_lag_seconds: float, port: int | None) -> None:
        super().__init__(world, list_lag_seconds=list_lag_seconds, port=port)
        self._named = {
            name: place
            for place in self._repositories()
            for name in (str(place.id), place.full_name.casefold())
        }

    def _repository(self, name: str) -> Repository | None:
        found = self._named.get(name.casefold())
        return None if found in self._hidden else found

    def newest(self, repository: Repository) -> tuple[Build, Moment] | None:
        """A project's newest pipeline as it is now."""
        begun = self._begun(repository, self.world.now())
        return self.find(repository, str(begun[0].run_id)) if begun else None

    def paged(self, request: Request, items: Sequence[Any]) -> Response:
        """The asked page of a list."""
        some, pages = self.page(request, items)
        return json_response(list(some), 200, pages)

    def page(self, request: Request, items: Sequence[T]) -> tuple[Sequence[T], dict[str, str]]:
        """The asked page, and the headers that tell of the others."""
        some, number, size, last = page_of(request, items, 20)
        following = str(number + 1) if number < last else ""
        pages = {
            "X-Page": str(number), "X-Per-Page": str(size), "X-Total": str(len(items)),
            "X-Total-Pages": str(last),
            "X-Next-Page": following, "X-Prev-Page": str(number - 1) if number > 1 else "",
        }  # fmt: skip
        if following:
            query = re.sub(r"(^|&)page=\d+", "", request.query).lstrip("&")
            pages["Link"] = f'<{self.url}{request.path}?{query}&page={following}>; rel="next"'
        return some, pages
