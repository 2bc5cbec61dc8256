"""Memory of every process after 10 000 pushes taken in and relayed, and of a worker over 100 000 messages."""

import tempfile
from pathlib import Path

from sqlalchemy import select

from bench import load, machine, pushes, recording, servers
from bench.table import Row
from tests.facts import PACE
from webhook_app import db, models, queues

PART = "memory"
PUSHES = 10_000
CHUNK = 1_000
CONNECTIONS = 16
MOST_MIB = 150.0
MESSAGES, SUBSCRIBERS, STEP = 100_000, 50, 10_000
MOST_GROWTH_MIB = 5.0
_NAMES = {
    "web": "gunicorn", "deliver worker": "jobs.worker deliver", "poll worker": "jobs.worker poll",
    "scheduler": "jobs.schedule", "Redis": "valkey-server redis-server", "supervisor": "webhook_app up",
}  # fmt: skip


def run() -> list[Row]:
    """Push, wait until everything is delivered, look."""
    with tempfile.TemporaryDirectory(prefix="buildrelay-bench-") as name:
        directory = Path(name)
        with servers.receiver(0.0, directory) as callback, servers.up(directory / "data", directory) as up:
            up.post("/api/subscribers", {"url": f"{callback}/callback"})
            before = _resident(up.pid)
            requests = pushes.stream(up.port, 1, secret=up.secrets["GITHUB_WEBHOOK_SECRET"])
            for _ in range(PUSHES // CHUNK):
                load.drive(up.port, pushes.some(requests, CHUNK), CONNECTIONS, b'"accepted"')
            _wait_for_delivery(directory / "data" / "buildrelay.db")
            after = _resident(up.pid)
    return _rows(before, after) + _worker()


def _rows(before: dict[str, float], after: dict[str, float]) -> list[Row]:
    return [
        Row(PART, f"{name} after {PUSHES} pushes", f"{after[name]:.0f} MiB",
            f"{before[name]:.0f} MiB at the start", *_goal(name, after[name]))
        for name in after
    ]  # fmt: skip


def _worker() -> list[Row]:
    """A worker that delivers all messages, ten thousand after ten thousand: what it takes after each."""
    with tempfile.TemporaryDirectory(prefix="buildrelay-bench-") as name:
        directory = Path(name)
        path = directory / "worker.db"
        servers.prepare(f"sqlite:///{path}")
        engine = db.connect(f"sqlite:///{path}")
        with servers.receiver(0.0, directory) as url, servers.redis(directory) as redis_url:
            recording.subscribe(engine, [f"{url}/{number}" for number in range(SUBSCRIBERS)])
            redis = queues.connect(redis_url)
            env = servers.worker_environment(f"sqlite:///{path}", redis_url, directory)
            with servers.worker(env, directory, queues.DELIVER) as pid:
                sizes = [_after_step(engine, redis, path, pid) for _ in range(MESSAGES // STEP)]
        engine.dispose()
    growth, goal = sizes[-1] - sizes[0], f"grows ≤ {MOST_GROWTH_MIB:.0f} MiB"
    return [
        Row(PART, f"a worker after {MESSAGES} messages", f"{sizes[-1]:.0f} MiB",
            f"{sizes[0]:.0f} MiB after {STEP}", goal, growth <= MOST_GROWTH_MIB)
    ]  # fmt: skip


def _after_step(engine, redis, path: Path, pid: int) -> float:
    recording.record(engine, STEP // SUBSCRIBERS, PACE)
    queues.enqueue_once(redis, queues.DELIVER)
    _wait_for_delivery(path)
    return machine.resident_mib(pid)


def _goal(name: str, mib: float) -> tuple[str, bool | None]:
    if name in ("Redis", "supervisor"):
        return "", None
    return f"≤ {MOST_MIB:.0f} MiB", mib <= MOST_MIB


def _resident(pid: int) -> dict[str, float]:
    """MiB by name; of several processes of a name (gunicorn's arbiter and worker) the largest."""
    lines = [(machine.command_line(member), machine.resident_mib(member)) for member in machine.family(pid)]
    return {
        name: max(mib for line, mib in lines if _is_named(line, words))
        for name, words in _NAMES.items()
    }  # fmt: skip


def _is_named(line: str, words: str) -> bool:
    return words in line or any(line.split(maxsplit=1)[0].endswith(word) for word in words.split())


def _wait_for_delivery(path: Path) -> None:
    engine = db.connect(f"sqlite:///{path}")
    pending = select(models.messages.c.id).where(models.messages.c.state == "pending").limit(1)

    def all_delivered() -> bool:
        with db.reading(engine) as connection:
            return connection.execute(pending).first() is None

    machine.wait_until(all_delivered, "the last delivery", pause_seconds=0.25)
    engine.dispose()
