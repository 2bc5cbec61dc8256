"""From sending a webhook until the subscriber has it, on an idle system: one push at a time through `up`."""

import http.client
import queue
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from statistics import median

from bench import pushes, servers
from bench.table import Row
from webhook_app.simulated.httpd import Request, Response, Server

PART = "latency"
PUSHES = 200
WARM_UP = 5
PAUSE_SECONDS = (0.03, 0.13)
MEDIAN_GOAL_MS, WORST_GOAL_MS = 25.0, 150.0


def run() -> list[Row]:
    """Median and worst of all pushes."""
    received: queue.SimpleQueue[float] = queue.SimpleQueue()

    def receive(_request: Request) -> Response:
        received.put(time.perf_counter())
        return Response(200)

    with tempfile.TemporaryDirectory(prefix="buildrelay-bench-") as name, Server(receive) as subscriber:
        directory = Path(name)
        with servers.up(directory / "data", directory) as up:
            up.post("/api/subscribers", {"url": f"{subscriber.url}/callback"})
            requests = pushes.stream(up.port, 1, secret=up.secrets["GITHUB_WEBHOOK_SECRET"])
            rng = Random(1)
            for _ in range(WARM_UP):
                _push(up.port, requests, received)
            times = [_push(up.port, requests, received, rng.uniform(*PAUSE_SECONDS)) for _ in range(PUSHES)]
    answered = sorted(answer * 1000 for answer, _ in times)
    arrived = sorted(arrival * 1000 for _, arrival in times)
    return _rows(answered, arrived)


def _push(
    port: int, requests: Iterator[bytes], received: "queue.SimpleQueue[float]", pause_seconds: float = 0.05
) -> tuple[float, float]:
    """One push over a connection of its own, as GitHub does; seconds until the answer, until the arrival."""
    time.sleep(pause_seconds)  # the pause is part of the measurement: the workers are to be idle again
    [request] = islice(requests, 1)
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.connect()
    connection.sock.sendall(request)
    answer = http.client.HTTPResponse(connection.sock, method="POST")
    answer.begin()
    content = answer.read()
    answered = time.perf_counter()
    connection.close()
    if b'"accepted"' not in content:
        raise RuntimeError(f"not accepted: {content!r}")
    return answered - began, received.get(timeout=30) - began


def _rows(answered: list[float], arrived: list[float]) -> list[Row]:
    middle, worst, late = median(arrived), arrived[-1], arrived[int(len(arrived) * 0.99)]
    spread = f"{arrived[0]:.1f} – {worst:.1f} ms"
    return [
        Row(PART, "webhook until its 202, median", f"{median(answered):.1f} ms",
            f"{answered[0]:.1f} – {answered[-1]:.1f} ms"),
        Row(PART, f"push to subscriber, median of {len(arrived)}", f"{middle:.1f} ms", spread,
            f"≤ {MEDIAN_GOAL_MS:.0f} ms", middle <= MEDIAN_GOAL_MS),
        Row(PART, "push to subscriber, 99th percentile", f"{late:.1f} ms"),
        Row(PART, "push to subscriber, worst", f"{worst:.1f} ms", "", f"≤ {WORST_GOAL_MS:.0f} ms",
            worst <= WORST_GOAL_MS),
    ]  # fmt: skip
