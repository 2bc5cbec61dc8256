"""A subscriber that checks everything it is told: signature, attempt number, order, repetition, ends.

It keeps what it has answered with a 2xx, as an honest subscriber does: a try that it fails or lets
hang never happened.  It is cheap, since the demo shares two cores with it.
"""

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

from webhook_app.signing import verify_v1
from webhook_app.simulated.facts import TERMINAL
from webhook_app.simulated.httpd import Request, Response, Server, hang

_FAULTS = ("bad_signatures", "bad_attempts", "unreadable", "order_violations", "doubled_events", "gaps")


class End(NamedTuple):
    """An end of a build as a message told it."""

    attempt: int
    state: str
    conclusion: str | None
    sequence: int
    webhook_id: str


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How it answers.  `fail_first`: the first so many tries of each message get `fail_status`.

    `status`: of every other answer.  `delay_seconds`: before each answer.  `hang`: never answer.
    """

    status: int = 200
    fail_first: int = 0
    fail_status: int = 500
    delay_seconds: float = 0.0
    hang: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _BuildRecord:
    sequences: dict[int, str] = field(default_factory=dict)  # sequence -> webhook-id
    last: int = 0
    ends: list[End] = field(default_factory=list)


class Subscriber:
    """Serves `url`, the callback to register, until it is closed; a context manager.

    The secret is known only after registering: pass it to `add_secret`; several are tried (rotation).
    `now` is the clock for the signature's age, POSIX seconds.
    """

    def __init__(self, *secrets: str, now: Callable[[], float] = time.time, port: int = 0) -> None:
        self._secrets = dict.fromkeys(secrets, math.inf)  # secret -> the last second signed with it
        self._now = now
        self.behaviour = Behaviour()
        """How it answers now; `behave` changes it."""
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._tries: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._types: Counter[str] = Counter()
        self._builds: dict[str, _BuildRecord] = {}
        self._server = Server(self._handle, port)
        self.url = f"{self._server.url}/callback"

    def close(self) -> None:
        """Stop serving at once."""
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_secret(self, secret: str) -> None:
        """Accept signatures under this secret too."""
        self._secrets = {**self._secrets, secret: math.inf}

    def remove_secret(self, secret: str, signed_after: float = 0.0) -> None:
        """Accept no signature under this secret that was made in a later second (POSIX); by default none."""
        self._secrets = {**self._secrets, secret: signed_after}

    def behave(self, **changes: Any) -> None:
        """Change how it answers; the names are those of `Behaviour`."""
        self.behaviour = replace(self.behaviour, **changes)

    # Receiving ----------------------------------------------------------------------------------

    def _handle(self, request: Request) -> Response:
        behaviour = self.behaviour
        if behaviour.hang:
            return hang()
        status = self._receive(request, behaviour)
        return Response(status, b"", behaviour.headers, delay_seconds=behaviour.delay_seconds)

    def _receive(self, request: Request, behaviour: Behaviour) -> int:
        """Check and keep a message; returns the status to answer with."""
        timestamp = request.headers.get("webhook-timestamp", "")
        signed_at = int(timestamp) if _is_count(timestamp) else 0
        secrets = tuple(secret for secret, last in self._secrets.items() if signed_at <= last)
        genuine = verify_v1(request.headers, request.body, secrets, self._now())
        webhook_id = request.headers.get("webhook-id", "")
        with self._lock:
            self._counts["received"] += 1
            if not genuine:
                self._counts["bad_signatures"] += 1
                return 401
            if not _is_count(request.headers.get("webhook-attempt", "")):
                self._counts["bad_attempts"] += 1
            self._tries[webhook_id] += 1
            if self._tries[webhook_id] <= behaviour.fail_first:
                self._counts["failed_on_purpose"] += 1
                return behaviour.fail_status
            if 200 <= behaviour.status < 300:
                self._keep(webhook_id, request.body)
        return behaviour.status

    def _keep(self, webhook_id: str, body: bytes) -> None:
        if webhook_id in self._seen:
            self._counts["duplicates"] += 1
            return
        self._seen.add(webhook_id)
        try:
            message = json.loads(body)
            self._types[message["type"]] += 1
            if "sequence" in message["data"]:
                self._keep_event(webhook_id, message["type"], message["data"])
        except (ValueError, KeyError, TypeError):
            self._counts["unreadable"] += 1

    def _keep_event(self, webhook_id: str, kind: str, data: Mapping[str, Any]) -> None:
        """One event of a build, seen for the first time under this id."""
        record = self._builds.setdefault(data["build_id"], _BuildRecord())
        sequence: int = data["sequence"]
        if sequence in record.sequences:
            self._counts["doubled_events"] += 1
        elif sequence < record.last:
            self._counts["order_violations"] += 1
        record.sequences.setdefault(sequence, webhook_id)
        record.last = max(record.last, sequence)
        if data["state"] in TERMINAL and kind == f"build.{data['state']}":
            record.ends.append(End(data["attempt"], data["state"], data["conclusion"], sequence, webhook_id))

    # What tests ask -----------------------------------------------------------------------------

    def sequences(self, build_id: str) -> tuple[int, ...]:
        """The sequences of a build in the order in which they were first seen."""
        with self._lock:
            return tuple(self._builds[build_id].sequences) if build_id in self._builds else ()

    def ends(self, build_id: str) -> tuple[End, ...]:
        """The ends of a build in the order of their first sight, each message id once."""
        with self._lock:
            return tuple(self._builds[build_id].ends) if build_id in self._builds else ()

    def types(self) -> dict[str, int]:
        """How many distinct messages of each type were kept."""
        with self._lock:
            return dict(self._types)

    def report(self) -> dict[str, int]:
        """Counts: tries received, distinct messages and builds, duplicates, failed_on_purpose, and faults.

        Faults: bad_signatures, bad_attempts, unreadable, order_violations (a lower sequence after a
        higher one), doubled_events (one sequence under two message ids), gaps (missing sequences).
        """
        with self._lock:
            counts = {
                name: self._counts[name] for name in ("received", "duplicates", "failed_on_purpose", *_FAULTS)
            }
            gaps = sum(record.last - len(record.sequences) for record in self._builds.values())
            return {**counts, "gaps": gaps, "messages": len(self._seen), "builds": len(self._builds)}

    def faults(self) -> dict[str, int]:
        """Those counts of the report that ought to be zero and are not."""
        report = self.report()
        return {name: report[name] for name in _FAULTS if report[name]}


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) >= 1
