"""The sending process of the relay part: `python -m bench.sending FAST_URL SLOW_URL`; prints JSON.

Repeats, one after the other: the delivery job over a store with recorded messages, and plain loops
that sign and post the same bodies.
"""

import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import orjson
import requests
import urllib3
from sqlalchemy import Engine, func, select

from bench import recording, servers
from jobs import deliver
from jobs.resources import resources
from webhook_app import VERSION, db, deliveries, models
from webhook_app.signing import sign_v1

TIMES = 3
MESSAGES = 3000
SLOW_MESSAGES = 1500
MANY_SUBSCRIBERS, MANY_EVENTS = 100, 100
BATCH = 500
PLAIN_THREADS, SLOW_THREADS = 16, 32

Post = Callable[[str, bytes, dict[str, str]], int]


def main() -> None:
    """All measurements, in turn, `TIMES` times."""
    fast, slow = sys.argv[1:]
    engine = resources().engine
    servers.prepare(resources().settings.database_url)
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(TIMES):
        bodies = _measure_job(engine, found["fast"], [f"{fast}/callback"], MESSAGES)
        found["session"].append(_plain(_session, PLAIN_THREADS, fast, bodies))
        found["session_no_env"].append(_plain(_session_no_env, PLAIN_THREADS, fast, bodies))
        found["urllib3"].append(_plain(_pool, PLAIN_THREADS, fast, bodies))
        many = [f"{fast}/callback/{number}" for number in range(MANY_SUBSCRIBERS)]
        _measure_job(engine, found["many"], many, MANY_EVENTS)
        slow_bodies = _measure_job(engine, found["slow"], [f"{slow}/callback"], SLOW_MESSAGES)
        found["slow_session"].append(_plain(_session, SLOW_THREADS, slow, slow_bodies))
    sys.stdout.write(orjson.dumps(found).decode())


# ---- our job -------------------------------------------------------------------------------------


def _measure_job(engine: Engine, rates: list[float], urls: Sequence[str], events: int) -> list[bytes]:
    """Record one message per URL and event, and let the job send them; the bodies of the messages."""
    made = recording.subscribe(engine, urls)
    for at in range(0, events, BATCH):
        recording.record(engine, min(BATCH, events - at), resources().pace)
    bodies = _bodies(engine)
    began = time.perf_counter()
    deliver.deliver()
    rates.append(len(bodies) / (time.perf_counter() - began))
    _check_all_delivered(engine)
    recording.remove(engine, made)
    return bodies


def _bodies(engine: Engine) -> list[bytes]:
    """What the job is about to send."""
    pending = (
        select(models.events)
        .join(models.messages, models.messages.c.event == models.events.c.id)
        .where(models.messages.c.state == "pending")
    )
    with db.reading(engine) as connection:
        rows = connection.execute(pending).all()
    return [
        deliveries.body(deliveries.Claimed(0, "", "", None, 1, "", row.type, row.timestamp, row.data))[1]
        for row in rows
    ]


def _check_all_delivered(engine: Engine) -> None:
    undelivered = (
        select(func.count()).select_from(models.messages).where(models.messages.c.state != "delivered")
    )
    with db.reading(engine) as connection:
        left = connection.execute(undelivered).scalar_one()
    if left:
        raise RuntimeError(f"{left} messages were not delivered")


# ---- plain loops ---------------------------------------------------------------------------------


def _session() -> Post:
    session = requests.Session()
    return lambda url, body, headers: session.post(url, data=body, headers=headers, timeout=15).status_code


def _session_no_env() -> Post:
    session = requests.Session()
    session.trust_env = False
    return lambda url, body, headers: session.post(url, data=body, headers=headers, timeout=15).status_code


def _pool() -> Post:
    pool = urllib3.PoolManager(maxsize=1)
    return lambda url, body, headers: pool.request("POST", url, body=body, headers=headers, timeout=15).status


def _plain(client: Callable[[], Post], threads: int, url: str, bodies: Sequence[bytes]) -> float:
    """Messages per second of threads that sign and post, each with a client of its own."""
    secret = "whsec_" + "c2VjcmV0" * 4
    waiting: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
    statuses: list[int] = []

    def work() -> None:
        post = client()
        while (item := waiting.get()) is not None:
            statuses.append(post(f"{url}/callback", item[1], _headers(secret, *item)))

    for item in enumerate(bodies):
        waiting.put(item)
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for _ in workers:
        waiting.put(None)
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - began
    if statuses != [200] * len(bodies):
        raise RuntimeError("a plain loop lost messages")
    return len(bodies) / seconds


def _headers(secret: str, number: int, body: bytes) -> dict[str, str]:
    message_id, now = f"msg_{number:024x}", int(time.time())
    return {
        "content-type": "application/json",
        "user-agent": f"BuildRelay/{VERSION}",
        "webhook-id": message_id,
        "webhook-timestamp": str(now),
        "webhook-signature": sign_v1(secret, message_id, now, body),
        "webhook-attempt": "1",
    }


if __name__ == "__main__":
    main()
