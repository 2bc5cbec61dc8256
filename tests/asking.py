"""Asks a simulated platform in process, as a client with its token would."""

import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode, urlsplit

from webhook_app.simulated.facts import Build
from webhook_app.simulated.httpd import Request, Response, Server
from webhook_app.simulated.world import StepClock, World


def world_of(clock: StepClock, platform: str, *kinds: str, builds: int = 1, **options: Any) -> World:
    """A world with builds of these kinds (any without) on one platform."""
    chosen = {platform: kinds} if kinds else None
    return World(5, builds, platforms=[platform], kinds=chosen, now=clock, **options)


def one_build(clock: StepClock, platform: str, kind: str) -> tuple[World, Build]:
    """A world with one build."""
    world = world_of(clock, platform, kind)
    return world, world.builds[0]


def ask(
    server: Any, url: str, method: str = "GET", *, headers: dict[str, str], body: Any = None, **query: Any
) -> Response:
    """One request; `url` may be absolute, as a `Location` or a `Link` is.  `body`: sent as JSON."""
    parts = urlsplit(url)
    asked = "&".join(filter(None, (parts.query, urlencode(query))))
    lower = {name.lower(): value for name, value in headers.items()}
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    return server.answer(Request(method, parts.path, asked, lower, content))


def iso(at: float) -> str:
    """POSIX seconds as ISO 8601."""
    return datetime.fromtimestamp(at, UTC).isoformat()


def told(response: Response) -> Any:
    """The JSON of an answer that must be a success."""
    assert 200 <= response.status < 300, (response.status, response.body[:200])
    return json.loads(response.body)


def message(response: Response) -> str:
    """GitHub's word for what went wrong."""
    return json.loads(response.body)["message"]


def next_page(response: Response) -> str | None:
    """The address of the next page, as the `Link` header tells it."""
    for entry in response.headers.get("Link", "").split(","):
        if 'rel="next"' in entry:
            return entry.strip().partition(">")[0].lstrip("<")
    return None


class Inbox:
    """Keeps what is posted, and answers with `status`."""

    def __init__(self, path: str, status: int) -> None:
        self.requests: list[Request] = []
        self.status = status
        self.server = Server(self._handle)
        self.url = self.server.url + path

    def _handle(self, request: Request) -> Response:
        self.requests.append(request)
        return Response(self.status, b"noted")
