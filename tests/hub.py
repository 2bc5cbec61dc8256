"""A whole BuildRelay, started and spoken to as its users do: a command line, HTTP, signals.

* `running(…)`      `python -m webhook_app up` in a directory of its own, ready, and gone at the end
* `Platforms`       simulated GitHub, GitLab and Jenkins whose clock the test moves
* `Callback`        a subscriber's endpoint; every message is verified by the `standardwebhooks` package
* `own_redis`, `own_postgres`   servers that a test may stop, kill and start again

Signatures are made here with the standard library and `standardwebhooks`, not with the program's own code.
"""

import hashlib
import hmac
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import requests
from standardwebhooks import Webhook

from tests import postgres
from webhook_app import embedded, settings, supervisor
from webhook_app.simulated.facts import Build
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.gitlab import GitLabServer
from webhook_app.simulated.httpd import Request, Response, Server
from webhook_app.simulated.jenkins import JenkinsServer
from webhook_app.simulated.sender import Push, Secrets, encode, plan_pushes
from webhook_app.simulated.world import PLATFORMS, StepClock, World

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 60.0
"""For what must come: enough for the slowest and busiest machine, and it costs nothing when all is well."""

STOP_SECONDS = 10.0
"""What the program promises for Ctrl-C and SIGTERM."""

PATHS = {name: f"/webhooks/{name}" for name in PLATFORMS} | {"script": "/api/internal/build-events"}


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll `condition` until it is true; its value.  Fails after `seconds`, naming `what` was awaited."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)
    return value


# ---- processes -------------------------------------------------------------------------------

_MARKS = {
    "web": ("gunicorn",),
    "deliver": ("jobs.worker deliver",),
    "poll": ("jobs.worker poll",),
    "collect": ("jobs.worker collect",),
    "scheduler": ("jobs.schedule",),
    "redis": ("webhook_app.embedded", "valkey-server", "redis-server"),
    "up": ("webhook_app up",),
    "worker": ("webhook_app worker",),
}
"""What the command line of each process holds."""


@dataclass(frozen=True, slots=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    command: str

    @property
    def name(self) -> str:
        """What the process is to BuildRelay; empty for anything else."""
        return next((name for name, marks in _MARKS.items() if any(m in self.command for m in marks)), "")


def processes() -> list[Process]:
    """The process table, without what has ended; from /proc, or `ps` where there is none."""
    if Path("/proc/self/stat").exists():
        found = (_from_proc(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit())
        return [process for process in found if process is not None]
    asked = subprocess.run(["ps", "-axo", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
    rows = (line.split(None, 2) for line in asked.stdout.splitlines())
    return [Process(int(row[0]), int(row[1]), row[2]) for row in rows if len(row) == 3]


def _from_proc(pid: int) -> Process | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    state, parent, *_ = stat.rpartition(")")[2].split()
    return None if state in "ZX" else Process(pid, int(parent), b" ".join(words).decode(errors="replace"))


def children(parent: int) -> list[Process]:
    """The processes that `parent` started and that still run."""
    return [process for process in processes() if process.parent == parent]


def family(parent: int) -> list[Process]:
    """`parent`'s children, their children, and so on."""
    table, found, ask = processes(), [], {parent}
    while ask:
        more = [process for process in table if process.parent in ask]
        found, ask = found + more, {process.pid for process in more}
    return found


def living(family: list[tuple[int, str]]) -> list[int]:
    """Those of these identified processes that still run."""
    return [pid for pid, known in family if known and supervisor.identity(pid) == known]


def identified(family: list[Process]) -> list[tuple[int, str]]:
    """Each process with what tells it from a later one of the same number."""
    return [(process.pid, supervisor.identity(process.pid)) for process in family]


# ---- BuildRelay ------------------------------------------------------------------------------


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that no outgoing connection is given meanwhile."""
    while True:
        port = _RANDOM.randrange(10_000, 32_768)  # Linux and macOS give those above
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


_RANDOM = random.SystemRandom()


def clean_environment(more: Mapping[str, str]) -> dict[str, str]:
    """Our environment without any setting of BuildRelay, and `more`."""
    names = {name for variable in settings.VARIABLES for name in (variable.name, *variable.aliases)}
    ours = names | {f"{name}_FILE" for name in names} | {"BUILDRELAY_CONFIG"}
    return {name: value for name, value in os.environ.items() if name not in ours} | dict(more)


@dataclass
class Hub:
    """A running BuildRelay: its address, its secrets, its processes."""

    base: str
    data_dir: Path
    log: Path
    secrets: dict[str, str]
    process: "subprocess.Popen[bytes] | None" = None
    http: requests.Session = field(default_factory=requests.Session)

    def __post_init__(self) -> None:
        self.http.trust_env = False
        self.http.headers["Authorization"] = f"Bearer {self.secrets['ADMIN_TOKEN']}"

    # What a user reads and writes -----------------------------------------------------------------

    def ask(self, method: str, path: str, **more: Any) -> requests.Response:
        """One request, on a connection that may have died with a process: then once more."""
        try:
            return self.http.request(method, self.base + path, timeout=PATIENCE_SECONDS, **more)
        except requests.ConnectionError:
            return self.http.request(method, self.base + path, timeout=PATIENCE_SECONDS, **more)

    def get(self, path: str) -> Any:
        """The JSON of a GET that must succeed."""
        reply = self.ask("GET", path)
        assert reply.status_code == 200, f"GET {path}: {reply.status_code} {reply.text[:500]}"
        return reply.json()

    def build(self, build_id: str) -> dict[str, Any] | None:
        """A build, or None while nobody has spoken of it."""
        reply = self.ask("GET", f"/api/builds/{build_id}")
        assert reply.status_code in (200, 404), f"{build_id}: {reply.status_code} {reply.text[:500]}"
        return reply.json() if reply.status_code == 200 else None

    def state(self, build_id: str) -> str | None:
        """The state of a build, or None."""
        build = self.build(build_id)
        return build["state"] if build else None

    def events(self, build_id: str) -> list[dict[str, Any]]:
        """The events of a build in order."""
        return self.get(f"/api/builds/{build_id}/events")["events"]

    def subscribe(self, url: str, **wanted: Any) -> dict[str, Any]:
        """Register a callback; the answer with its secret."""
        reply = self.ask("POST", "/api/subscribers", json={"url": url, "events": ["build.*"], **wanted})
        assert reply.status_code == 201, reply.text
        return reply.json()

    def unsubscribe(self, subscriber: Mapping[str, Any]) -> None:
        """Remove it, so that it gets nothing of later tests."""
        assert self.ask("DELETE", f"/api/subscribers/{subscriber['id']}").status_code == 204

    # What platforms and scripts send --------------------------------------------------------------

    def post(self, platform: str, headers: Mapping[str, str], body: bytes) -> requests.Response:
        """Post a webhook, once."""
        return requests.post(
            self.base + PATHS[platform], data=body, headers=dict(headers), timeout=PATIENCE_SECONDS
        )

    def push(self, push: Push, base: str) -> requests.Response:
        """Post a platform's webhook, signed; `base` is the platform's own address."""
        headers, body = signed(push, base, self.secrets)
        return self.post(push.build.platform, headers, body)

    def push_until_taken(self, push: Push, base: str, seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """Post it again and again under the same delivery id until a 2xx comes back; the answer."""

        def taken() -> dict[str, Any] | None:
            try:
                reply = self.push(push, base)
            except requests.RequestException:
                return None
            return reply.json() if reply.ok else None

        return until(taken, seconds, "a 2xx")

    def report(self, run_id: str, event: str, **fields: Any) -> requests.Response:
        """Post a report of a build script."""
        body = json.dumps({"runId": run_id, "event": event, **fields}).encode()
        headers = {"Content-Type": "application/json", "X-Build-Token": self.secrets["BUILD_EVENT_TOKEN"]}
        return self.post("script", headers, body)

    # Its processes --------------------------------------------------------------------------------

    def pid(self, name: str) -> int | None:
        """The pid of a child by its name (`web`, `deliver`, `poll`, `scheduler`, `redis`) while it runs."""
        assert self.process is not None
        return next((each.pid for each in children(self.process.pid) if each.name == name), None)

    def kill(self, name: str) -> int:
        """`kill -9` a child; the pid it had."""
        pid = until(lambda: self.pid(name), PATIENCE_SECONDS, f"a living {name}")
        os.kill(pid, signal.SIGKILL)
        return pid

    def is_ready(self) -> bool:
        """Does /readyz say so?"""
        try:
            return requests.get(f"{self.base}/readyz", timeout=PATIENCE_SECONDS).status_code == 200
        except requests.RequestException:
            return False

    def wait_ready(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Until /readyz says so; fails at once when the process has ended."""
        until(lambda: self.is_ready() or self.has_ended(), seconds, "/readyz")
        assert not self.has_ended(), f"it ended:\n{self.output()}"

    def has_ended(self) -> bool:
        """Has the process that was started ended?"""
        return self.process is not None and self.process.poll() is not None

    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def directory() -> Iterator[Path]:
    """A directory with a path short enough for a socket in it; pytest's own are often too long."""
    with tempfile.TemporaryDirectory(prefix="buildrelay-") as name:
        yield Path(name)


_TIE = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def tied(command: Sequence[str]) -> list[str]:
    """The command, killed by the kernel when the tests are killed (on Linux).

    It hears Ctrl-C even if the tests run in the background or under `nohup`, where they are deaf to it.
    The tests have threads, so that no Python may run between fork and exec.
    """
    return [sys.executable, "-c", _TIE, *command]


@contextmanager
def started(command: list[str], log: Path, env: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command with its output in `log`; killed at the end if it still runs."""
    with (
        log.open("ab") as output,
        subprocess.Popen(tied(command), cwd=ROOT, env=dict(env), stdout=output, stderr=output) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def running(environ: Mapping[str, str] | None = None, data_dir: Path | None = None) -> Iterator[Hub]:
    """`buildrelay up` with these settings, ready; stopped at the end, within the time it promises.

    `data_dir`: default a new one.  On a failure of the test its output is printed.
    """
    with directory() as home:
        port, log, data_dir = free_port(), home / "log", data_dir or home / "data"
        env = clean_environment(environ or {})
        command = [sys.executable, "-m", "webhook_app", "up", "--port", str(port)]
        with started([*command, "--data-dir", str(data_dir)], log, env) as process:
            try:
                until(
                    lambda: _can_be_read(data_dir) or process.poll() is not None,
                    PATIENCE_SECONDS,
                    "secrets.env",
                )
                hub = Hub(f"http://127.0.0.1:{port}", data_dir, log, _secrets(data_dir, env), process)
                with hub.http:
                    hub.wait_ready()
                    yield hub
                if process.poll() is None:
                    stop(process)
            except BaseException:
                print(log.read_text(encoding="utf-8", errors="replace")[-20_000:])
                raise


def _can_be_read(data_dir: Path) -> bool:
    path = data_dir / "secrets.env"
    return path.exists() and "BUILD_EVENT_TOKEN=" in path.read_text(encoding="utf-8")


def _secrets(data_dir: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The secrets as a user finds them: in the file, unless the environment has them."""
    text = (data_dir / "secrets.env").read_text(encoding="utf-8")
    made = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return made | {name: env[name] for name in (*made, "ADMIN_TOKEN") if env.get(name)}


def stop(process: "subprocess.Popen[bytes]", number: signal.Signals = signal.SIGTERM) -> float:
    """Send a stop signal and see the process and all it started gone in time; the seconds it took."""
    everyone = identified(family(process.pid))
    began = time.monotonic()
    process.send_signal(number)
    code = process.wait(STOP_SECONDS)
    took = time.monotonic() - began
    assert code == 0, f"exit code {code}"
    until(lambda: not living(everyone), STOP_SECONDS - took, "the end of all it started")
    return took


# ---- senders ---------------------------------------------------------------------------------


def signed(push: Push, base: str, secrets: Mapping[str, str]) -> tuple[dict[str, str], bytes]:
    """Headers and body of a platform's webhook, signed as that platform's documentation says."""
    platform = push.build.platform
    secret = secrets[f"{platform.upper()}_WEBHOOK_SECRET"]
    now = datetime.now(UTC)
    headers, body = encode(push, base, Secrets("-", "-", "-"), int(now.timestamp()))
    if platform == "gitlab":
        del headers["X-Gitlab-Token"]
        headers["webhook-signature"] = Webhook(secret).sign(push.delivery_id, now, body.decode())
    else:
        digest = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
        headers["X-Hub-Signature-256"] = f"sha256={digest}"
    return headers, body


class Platforms:
    """GitHub, GitLab and Jenkins with their REST APIs; time stands still there until the test moves it.

    Every build goes as the scripts of this `kind` do.  A context manager.
    """

    def __init__(self, kind: str = "success") -> None:
        self.clock = StepClock(time.time())
        self.worlds = {
            name: World(7, 0, platforms=(name,), kinds={name: (kind,)}, now=self.clock) for name in PLATFORMS
        }
        self._stack = ExitStack()
        made = {"github": GitHubServer, "gitlab": GitLabServer, "jenkins": JenkinsServer}
        self.servers: dict[str, Any] = {
            name: self._stack.enter_context(made[name](self.worlds[name])) for name in PLATFORMS
        }

    def __enter__(self) -> "Platforms":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def environment(self, *, discovery: bool = False) -> dict[str, str]:
        """The settings with which BuildRelay reads these platforms."""
        github, gitlab, jenkins = (self.servers[name] for name in PLATFORMS)
        made = {
            "GITHUB_API_URL": github.url,
            "GITHUB_TOKEN": github.tokens[0],
            "GITLAB_URL": gitlab.url,
            "GITLAB_TOKEN": gitlab.tokens[0],
            "JENKINS_URL": jenkins.url,
            "JENKINS_USERNAME": jenkins.username,
            "JENKINS_API_TOKEN": jenkins.api_token,
        }
        if discovery:
            made["GITHUB_REPOS"] = ",".join(self.worlds["github"].repositories("github"))
        return made

    def begin(self, platform: str) -> Build:
        """A new build that has just begun."""
        return self.worlds[platform].extend(1, spread_seconds=0)[0]

    def pushes(self, build: Build) -> list[Push]:
        """All webhooks the platform will send for a build, in order."""
        return plan_pushes([build], 7)

    def go_to(self, at: float) -> None:
        """Move the clock on, never back."""
        self.clock.at = max(self.clock.at, at)

    def push(self, hub: Hub, push: Push) -> dict[str, Any]:
        """Let a push happen: its time comes, and it is accepted; the answer."""
        self.go_to(push.at)
        reply = hub.push(push, self.servers[push.build.platform].url)
        assert reply.status_code == 202, reply.text
        return reply.json()

    def polls(self, build: Build) -> int:
        """How often this build was read."""
        return int(self.servers[build.platform].polls(build.build_id))


# ---- receivers -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """One request that came to a callback: verified, with its headers (lower case) and body."""

    headers: Mapping[str, str]
    body: bytes
    content: dict[str, Any]
    answered: int
    at: float

    @property
    def id(self) -> str:
        """The `webhook-id`."""
        return self.headers["webhook-id"]


class Callback:
    """A subscriber's endpoint that keeps what it gets; a context manager.

    A signature that the `standardwebhooks` package does not accept is answered 401 and kept in `refused`.
    `fail_next`: so many requests get a 500.  `hang`: no answer at all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._got: list[Message] = []
        self._secret = ""
        self.refused: list[str] = []
        self.fail_next = 0
        self.hang = False
        self.open_requests = 0
        self._server = Server(self._handle)
        self.url = f"{self._server.url}/hook"

    def __enter__(self) -> "Callback":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def trust(self, secret: str) -> None:
        """The secret that registering brought."""
        self._secret = secret

    def _handle(self, request: Request) -> Response:
        if self.hang:
            with self._lock:
                self.open_requests += 1
            return Response(delay_seconds=3600, drop=True)
        try:
            content = Webhook(self._secret).verify(request.body, dict(request.headers))
        except Exception as error:  # noqa: BLE001  the package raises several kinds
            self.refused.append(repr(error))
            return Response(401)
        with self._lock:
            failing = self.fail_next > 0
            self.fail_next -= failing
            answer = 500 if failing else 204
            self._got.append(Message(request.headers, request.body, content, answer, time.monotonic()))
        return Response(answer)

    def tries(self, build_id: str) -> list[Message]:
        """Every request about a build in the order of arrival."""
        with self._lock:
            return [one for one in self._got if one.content["data"].get("build_id") == build_id]

    def messages(self, build_id: str) -> list[dict[str, Any]]:
        """The messages about a build that were answered with a 2xx, each once, in the order of arrival."""
        kept = {one.id: one.content for one in self.tries(build_id) if one.answered < 300}
        return list(kept.values())

    def sequences(self, build_id: str) -> list[int]:
        """The sequences of a build as they came."""
        return [message["data"]["sequence"] for message in self.messages(build_id)]

    def wait_for(self, hub: Hub, build_id: str, seconds: float = PATIENCE_SECONDS) -> list[dict[str, Any]]:
        """Until every event of a build has come, in order and once; the messages."""

        def told() -> bool:
            events = [event["sequence"] for event in hub.events(build_id)]
            return bool(events) and len(self.sequences(build_id)) >= len(events)

        until(told, seconds, f"all messages of {build_id}")
        assert self.sequences(build_id) == [event["sequence"] for event in hub.events(build_id)]
        assert self.refused == []
        return self.messages(build_id)


@contextmanager
def subscribed(hub: Hub, **wanted: Any) -> Iterator[Callback]:
    """A callback that is registered, and removed at the end."""
    with Callback() as callback:
        subscriber = hub.subscribe(callback.url, **wanted)
        callback.trust(subscriber["secret"])
        yield callback
        hub.unsubscribe(subscriber)


# ---- servers that may go away ----------------------------------------------------------------


class Stoppable:
    """A server that can be started, killed and started again on the same data."""

    def __init__(self, start: Callable[[], "subprocess.Popen[bytes]"], answers: Callable[[], bool]) -> None:
        self._start = start
        self._answers = answers
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert self._process is None
        self._process = self._start()
        until(self._answers, PATIENCE_SECONDS, "the server")

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it with a signal, and see it gone."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE_SECONDS)
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, such as SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(number)


@contextmanager
def own_redis() -> Iterator[tuple[str, Stoppable]]:
    """A Redis of the test's own: its URL, and the server, started."""
    with directory() as home:

        def start() -> "subprocess.Popen[bytes]":
            return subprocess.Popen(tied(embedded.command(home)))

        server = Stoppable(start, lambda: embedded.answers(home))
        server.start()
        try:
            yield embedded.redis_url(home), server
        finally:
            server.stop()


@contextmanager
def own_postgres() -> Iterator[tuple[str, Stoppable]]:
    """A PostgreSQL of the test's own: its URL, and the server, started."""
    with postgres.server() as url:
        home = Path(parse_qs(urlsplit(url).query)["host"][0])
        (first,) = (each for each in processes() if each.pid == _postmaster(home))
        command = first.command.split()

        def start() -> "subprocess.Popen[bytes]":
            prefix, identity = postgres._unprivileged(Path(command[0]).parent / "initdb", home)
            return subprocess.Popen([*prefix, *command], cwd=home, stderr=subprocess.DEVNULL, **identity)

        def answers() -> bool:
            try:
                postgres.connect(url).close()
            except psycopg.OperationalError:
                return False
            return True

        known = [(first.pid, supervisor.identity(first.pid))]
        os.kill(first.pid, signal.SIGINT)
        until(lambda: not living(known), PATIENCE_SECONDS, "the end of the first server")
        server = Stoppable(start, answers)
        server.start()
        try:
            yield url, server
        finally:
            server.stop(signal.SIGINT)


def _postmaster(home: Path) -> int:
    return int((home / "data" / "postmaster.pid").read_text(encoding="ascii").split()[0])
