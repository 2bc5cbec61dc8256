"""`buildrelay demo`: `up`, CI platforms that lose, double and reorder pushes, and a strict subscriber.

With `--builds N` it ends when the builds have ended, prints what was counted, and fails if any
build is not in its true state or the subscriber missed, doubled or disordered anything.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests

from webhook_app import up
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.gitlab import GitLabServer
from webhook_app.simulated.jenkins import JenkinsServer
from webhook_app.simulated.judge import Verdict, judge
from webhook_app.simulated.sender import Secrets, Sender
from webhook_app.simulated.subscriber import Subscriber
from webhook_app.simulated.world import World
from webhook_app.supervisor import DIES_WITH

LIVE_BUILDS = 30
SPEED = 4.0
READY_SECONDS = 60.0
SETTLE_SECONDS = 150.0
PACE = {
    "BUILD_POLL_INTERVAL": "2000",
    "BUILD_PUSH_FRESHNESS": "5000",
    "DISCOVERY_INTERVAL": "5",
    "DISCOVERY_JITTER": "1",
}
"""A demo is watched for a minute or two, so the safety net looks more often than in earnest."""


def run(port: int, builds: int | None, loss: float, seed: int, data_dir: Path | None) -> int:
    """Run the demo; exit code 0 when all that was counted is right (or it was stopped)."""
    if builds is not None and builds < 1:
        print("buildrelay: --builds: a number from 1 is needed", file=sys.stderr)
        return 2
    if not 0 <= loss <= 1:
        print("buildrelay: --loss: a share from 0 to 1 is needed", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        directory = data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="buildrelay-")))
        world = World(seed, 0, speed=SPEED)
        servers = {
            "github": stack.enter_context(GitHubServer(world, limit=100_000, points=100_000)),
            "gitlab": stack.enter_context(GitLabServer(world)),
            "jenkins": stack.enter_context(JenkinsServer(world)),
        }
        up.make_data_dir(directory)
        kept = up.ensure_secrets(directory, {})  # all of them: whoever looks on finds them there
        shared = Secrets(*(kept[f"{name}_WEBHOOK_SECRET"] for name in ("GITHUB", "GITLAB", "JENKINS")))
        token = kept["ADMIN_TOKEN"]
        env = _environment(world, servers, shared, token)
        base = stack.enter_context(_running(port, directory, env))
        api = _Api(base, token)
        subscriber = stack.enter_context(Subscriber())
        subscriber.add_secret(api.subscribe(subscriber.url))
        urls = {name: server.url for name, server in servers.items()}
        sender = stack.enter_context(Sender(world, base, shared, urls, loss=loss, double=loss, reorder=loss))
        count = builds or LIVE_BUILDS
        sender.add(world.extend(count, spread_seconds=count * 0.8, every_kind=True))
        try:
            if builds is None:
                return _live(world, sender)
            return _to_the_end(world, sender, subscriber, api)
        except KeyboardInterrupt:
            return 0


def _environment(world: World, servers: Mapping[str, Any], shared: Secrets, token: str) -> dict[str, str]:
    return {
        **os.environ,
        **PACE,
        "ADMIN_TOKEN": token,
        "GITHUB_WEBHOOK_SECRET": shared.github,
        "GITLAB_WEBHOOK_SECRET": shared.gitlab,
        "JENKINS_WEBHOOK_SECRET": shared.jenkins,
        "GITHUB_API_URL": servers["github"].url,
        "GITHUB_TOKEN": servers["github"].tokens[0],
        "GITHUB_REPOS": ",".join(world.repositories("github")),
        "GITLAB_URL": servers["gitlab"].url,
        "GITLAB_TOKEN": servers["gitlab"].tokens[0],
        "GITLAB_PROJECTS": ",".join(world.repositories("gitlab")),
        "JENKINS_URL": servers["jenkins"].url,
        "JENKINS_USERNAME": servers["jenkins"].username,
        "JENKINS_API_TOKEN": servers["jenkins"].api_token,
        "JENKINS_JOBS": ",".join(world.repositories("jenkins")),
    }


@contextmanager
def _running(port: int, directory: Path, env: Mapping[str, str]) -> Iterator[str]:
    """`buildrelay up` as a child, stopped at the end; its base URL."""
    command = [sys.executable, "-m", "webhook_app", "up", "--port", str(port), "--data-dir", str(directory)]
    with subprocess.Popen(command, env={**env, DIES_WITH: str(os.getpid())}) as process:
        try:
            base = f"http://127.0.0.1:{port}"
            _wait_until_ready(base, process)
            yield base
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # one was enough
            process.terminate()
            process.wait()


def _wait_until_ready(base: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + READY_SECONDS
    with _direct() as http:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if http.get(f"{base}/readyz", timeout=2).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.1)
    raise SystemExit("buildrelay: it did not become ready")


def _direct() -> requests.Session:
    """No proxy of the environment stands between us and our own machine."""
    http = requests.Session()
    http.trust_env = False
    return http


class _Api:
    """What the demo asks of BuildRelay, as any user would."""

    def __init__(self, base: str, token: str) -> None:
        self.base = base
        self.http = _direct()
        self.http.headers["Authorization"] = f"Bearer {token}"

    def subscribe(self, url: str) -> str:
        reply = self.http.post(
            f"{self.base}/api/subscribers", json={"url": url, "events": ["build.*"]}, timeout=10
        )
        reply.raise_for_status()
        return str(reply.json()["secret"])

    def build(self, build_id: str) -> dict[str, Any] | None:
        reply = self.http.get(f"{self.base}/api/builds/{build_id}", timeout=10)
        return reply.json() if reply.status_code == 200 else None


def _live(world: World, sender: Sender) -> int:
    """Go on with new builds until Ctrl-C."""
    print("The demo goes on until Ctrl-C.", flush=True)
    while True:
        time.sleep(0.5)  # a signal that another thread is given interrupts no sleep of ours
        if world.ends_at < world.now() + 20:
            sender.add(world.extend(LIVE_BUILDS, spread_seconds=LIVE_BUILDS * 0.8))


def _to_the_end(world: World, sender: Sender, subscriber: Subscriber, api: _Api) -> int:
    """Wait until all is as it should be, or too late; print the counts."""
    began = time.monotonic()
    last_word = time.monotonic() + max(world.ends_at - world.now(), 0) + SETTLE_SECONDS
    verdict: Verdict | None = None
    while time.monotonic() < last_word:
        time.sleep(1)
        if not (world.settled() and sender.finished):
            continue
        verdict = judge(world, api.build, subscriber)
        if verdict.ok:
            break
    _print_counts(verdict, sender, subscriber, time.monotonic() - began)
    if verdict is not None and verdict.ok:
        print(f"  all true    {world.now() - world.ends_at:.0f} s after the last build ended", flush=True)
    return 0 if verdict is not None and verdict.ok else 1


def _print_counts(verdict: Verdict | None, sender: Sender, subscriber: Subscriber, seconds: float) -> None:
    print(f"\nAfter {seconds:.0f} s")
    print("  pushes      " + ", ".join(f"{count} {name}" for name, count in sender.report().items()))
    print("  subscriber  " + ", ".join(f"{count} {name}" for name, count in subscriber.report().items()))
    print(f"  builds      {verdict if verdict is not None else 'did not end in time'}", flush=True)
