"""Relay: messages per second of the delivery job, against loops that sign and post without any store."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import orjson

from bench import machine, servers
from bench.table import Row, measured

PART = "relay"
SLOW_SECONDS = 0.05
FAST_GOAL, MANY_GOAL, SLOW_GOAL = 1.2, 1.0, 2.0


def run() -> list[Row]:
    """The sending side on one core in a process of its own, subscribers and Redis on the other."""
    send_core, other_core = machine.cores()
    with tempfile.TemporaryDirectory(prefix="buildrelay-bench-") as name:
        directory = Path(name)
        with (
            machine.on_core(other_core),
            servers.redis(directory) as redis_url,
            servers.receiver(0.0, directory) as fast,
            servers.receiver(SLOW_SECONDS, directory) as slow,
        ):
            env = machine.environment(
                DATABASE_URL=f"sqlite:///{directory}/relay.db", REDIS_URL=redis_url,
                ENCRYPTION_KEYS=servers.KEY, ALLOW_PRIVATE_CALLBACKS="true",
                BUILDRELAY_DATA_DIR=str(directory),
            )  # fmt: skip
            with machine.on_core(send_core):
                found = _send(directory, env, fast, slow)
    return _rows(found)


def _send(directory: Path, env: dict[str, str], fast: str, slow: str) -> dict[str, list[float]]:
    argv = (servers.PYTHON, "-m", "bench.sending", fast, slow)
    with machine.process(argv, env, directory / "sending.log", stdout=subprocess.PIPE) as child:
        text, _ = child.communicate()
        if child.returncode:
            raise RuntimeError("bench.sending failed")
    return orjson.loads(text)


def _rows(found: dict[str, list[float]]) -> list[Row]:
    def rate(what: str, name: str) -> Row:
        return measured(PART, f"{what}, messages/s", found[name], "{:.0f}")

    def ratio(what: str, ours: str, theirs: str, goal: float) -> Row:
        return measured(PART, what, _ratios(found, ours, theirs), "{:.2f}", least=goal)

    return [
        rate("1 fast subscriber: `jobs.deliver`", "fast"),
        rate("1 fast subscriber: 16 threads, `requests.Session`", "session"),
        ratio("1 fast subscriber: ratio", "fast", "session", FAST_GOAL),
        rate("the same with `trust_env=False`", "session_no_env"),
        rate("the same with a urllib3 pool", "urllib3"),
        rate("100 subscribers × 100 messages: `jobs.deliver`", "many"),
        ratio("100 × 100: ratio to `requests.Session`", "many", "session", MANY_GOAL),
        rate("subscribers that answer after 50 ms: `jobs.deliver`", "slow"),
        rate("the same: 32 threads, `requests.Session`", "slow_session"),
        ratio("50 ms: ratio", "slow", "slow_session", SLOW_GOAL),
    ]


def _ratios(found: dict[str, list[float]], ours: str, theirs: str) -> Sequence[float]:
    return [mine / other for mine, other in zip(found[ours], found[theirs], strict=True)]
