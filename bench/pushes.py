"""Signed GitHub `workflow_run` deliveries as the bytes of HTTP requests: three per run, each id once."""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import count, islice
from random import Random

import orjson

from webhook_app.simulated import github_bodies
from webhook_app.simulated.targets import github_headers
from webhook_app.simulated.world import World

SECRET = "bench-webhook-secret"
_RUN, _SUITE = 17_000_000_000, 37_000_000_000
_BLOCK = 256
"""So many runs begin before the first goes on: no two pushes of one run are in flight together."""
_TITLE = "Take the retry budget out of the uploader, and give every caller its own, with a deadline. " * 4


@cache
def _templates() -> tuple[bytes, ...]:
    """The bodies of one run: requested, in_progress, completed."""
    world = World(1, 1, platforms=("github",), kinds={"github": ("success",)})
    build = replace(world.builds[0], run_id=_RUN, title=_TITLE[:280])
    return tuple(
        orjson.dumps(github_bodies.webhook(build, moment, event, "https://api.github.com"))
        for moment in build.moments
        for event in moment.events
        if event.name == "workflow_run"
    )


def body_bytes() -> int:
    """The size of a body."""
    return len(_templates()[-1])


def stream(port: int, seed: int, path: str = "/webhooks/github", secret: str = SECRET) -> Iterator[bytes]:
    """Requests without end; streams of different seeds share neither runs nor delivery ids."""
    rng = Random(seed)
    for first in count(seed * 1_000_000, _BLOCK):
        for template in _templates():
            for run in range(first, first + _BLOCK):
                yield _request(port, path, secret, _of_run(template, run), rng)


def some(requests: Iterator[bytes], number: int) -> Sequence[bytes]:
    """The next `number` requests, made now."""
    return list(islice(requests, number))


def _of_run(template: bytes, run: int) -> bytes:
    body = template.replace(str(_RUN).encode(), str(_RUN + run).encode())
    return body.replace(str(_SUITE).encode(), str(_SUITE + run).encode())


def _request(port: int, path: str, secret: str, body: bytes, rng: Random) -> bytes:
    delivery_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
    headers = github_headers("workflow_run", delivery_id, _repository(), secret, body)
    lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@cache
def _repository():
    return World(1, 1, platforms=("github",)).builds[0].repository
