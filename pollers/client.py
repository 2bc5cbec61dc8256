"""Reading one source with one token: requests within an allowance, ETags, one refresh of a refused token."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any

from sqlalchemy import Engine, bindparam, delete, insert, select, tuple_

from webhook_app import calls, db, models, platforms
from webhook_app.api_health import Measured
from webhook_app.budget import Spent
from webhook_app.db import Write
from webhook_app.platforms import Answer, Call, Polled, PollError, PollFault, Request, Source
from webhook_app.settings import SourceSettings

ANSWER_CAP_BYTES = 8 * 1024 * 1024
PASSING = (500, 502, 503, 504)
RETRY_WAITS_SECONDS = (0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0)
"""Before each try of a read that failed; as many as `retry_attempts` may be."""
LEAST_SECONDS = 0.05
"""A try that has less time is not made."""
Make = Callable[[Source], Request | None]


class OverBudget(Exception):
    """No more may be asked now; what was not read stays due."""


class Purse:
    """The allowance of a round, and what was spent of it; shared by the threads that read in it."""

    def __init__(self, allowance: int, may_go_on: Callable[[], bool] = lambda: True) -> None:
        self.left = allowance
        self.spent = Spent()
        self.measured = Measured()
        self._may_go_on = may_go_on
        self._mutex = threading.Lock()

    def pay(self) -> None:
        """Before a request: raises `OverBudget` when the allowance is used up or the round is over."""
        with self._mutex:
            if self.left <= 0 or not self._may_go_on():
                raise OverBudget
            self.left -= 1

    def has_more(self) -> bool:
        """Whether another request may be made."""
        with self._mutex:
            return self.left > 0 and self._may_go_on()

    def note(self, platform: Polled, answer: Answer | None) -> None:
        """After a request: what it cost, and what its answer told; None: no answer came."""
        free = answer is not None and answer.status == 304 and platform.MANNERS.free_unchanged
        limits = platform.limits(answer) if answer is not None else None
        with self._mutex:
            before = self.spent
            self.spent = Spent(before.requests + 1, before.counted + (not free), limits or before.limits)

    def measure(self, source: str, seconds: float, result: Answer | PollError) -> None:
        """After a request: how long it took, and whether it failed."""
        with self._mutex:
            self.measured.note(source, seconds, result)


@dataclass(frozen=True, slots=True)
class Seen:
    """An answer, or (`shown` set) the news that nothing changed since an answer that showed these builds."""

    answer: Answer
    url: str
    token: str
    shown: tuple[str, ...] | None = None

    @property
    def unchanged(self) -> bool:
        """Did the platform answer 304?"""
        return self.shown is not None


@dataclass(frozen=True, slots=True)
class Tag:
    """An ETag worth keeping (`etag` None: forget the one we had), for the token that got it."""

    url: str
    token: str
    etag: str | None
    shown: tuple[str, ...]


@dataclass(slots=True)
class Client:
    """Reads of one source.  `renew`: a new `Source` after the token of the old one was refused, or None."""

    engine: Engine
    lane: str
    settings: SourceSettings
    source: Source
    purse: Purse
    renew: Callable[[Source], Source | None]
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    @property
    def platform(self) -> Polled:
        """The rules of the platform that is read."""
        return platforms.polled()[self.settings.source.platform]

    def ask(self, make: Make, *, conditional: bool = False) -> Seen:
        """Send what `make` builds for our token; raises `PollError`, or `OverBudget` before it is sent."""
        source = self.source
        seen = self._ask(source, make, conditional)
        if seen.answer.status == 401 and (renewed := self._renewed(source)) is not None:
            seen = self._ask(renewed, make, conditional)
        return seen

    def _renewed(self, refused: Source) -> Source | None:
        """A token other than the refused one; another thread may have got it already."""
        with self._mutex:
            if self.source is refused:
                renewed = self.renew(refused)
                if renewed is None:
                    return None
                self.source = renewed
            return self.source

    def _ask(self, source: Source, make: Make, conditional: bool) -> Seen:
        request = make(source)
        if request is None:
            raise PollError(PollFault.UNREADABLE, "this can't be polled")
        token = _digest(source.token)
        kept = self._kept(request.url, token) if conditional and source.token else None
        headers = request.headers | ({"If-None-Match": kept[0]} if kept else {})
        answer = self._send(Request(request.url, headers))
        if answer.status == 304 and kept is None:
            raise PollError(PollFault.UNREADABLE, "HTTP 304 to a question without an ETag")
        return Seen(answer, request.url, token, tuple(kept[1]) if kept and answer.status == 304 else None)

    def _kept(self, url: str, token: str) -> tuple[str, list[str]] | None:
        with db.reading(self.engine) as connection:
            row = connection.execute(_KEPT, {"lane": self.lane, "url": url, "token": token}).one_or_none()
        return (row.etag, row.shown) if row else None

    def _send(self, request: Request) -> Answer:
        """One read, repeated up to `retry_attempts` times within its time while it fails in passing."""
        until = time.monotonic() + self.settings.timeout_seconds
        for wait in RETRY_WAITS_SECONDS[: self.settings.retry_attempts]:
            try:
                answer = self._send_once(request, until - time.monotonic())
            except PollError as error:
                if error.fault is not PollFault.UNAVAILABLE or not self._may_repeat(until, wait):
                    raise
                continue
            if not _is_passing(answer) or not self._may_repeat(until, wait):
                return answer
        return self._send_once(request, until - time.monotonic())

    def _may_repeat(self, until: float, wait: float) -> bool:
        """Whether there is time and allowance for another try; if so, the wait before it is over."""
        if time.monotonic() + wait + LEAST_SECONDS > until or not self.purse.has_more():
            return False
        time.sleep(wait)
        return True

    def _send_once(self, request: Request, timeout_seconds: float) -> Answer:
        """One try; raises `PollError` when there is no whole answer."""
        self.purse.pay()
        name, begun = self.settings.source.name, time.monotonic()
        try:
            call = Call("GET", request.url, request.headers)
            answer = calls.send(call, timeout_seconds, ANSWER_CAP_BYTES)
        except PollError as fault:
            self.purse.note(self.platform, None)
            self.purse.measure(name, time.monotonic() - begun, fault)
            raise
        self.purse.note(self.platform, answer)
        self.purse.measure(name, time.monotonic() - begun, answer)
        return answer


def _is_passing(answer: Answer) -> bool:
    """A fault of the server that may be over in a moment, unless it names a time to come back."""
    return answer.status in PASSING and "retry-after" not in answer.headers


def _digest(token: str) -> str:
    """What stands for a token where its ETags are kept."""
    return sha256(token.encode()).hexdigest()[:16]


# ---- ETags, stored -------------------------------------------------------------------------------

_u = models.unchanged.c
_KEPT = select(_u.etag, _u.shown).where(
    _u.lane == bindparam("lane"), _u.url == bindparam("url"), _u.token == bindparam("token")
)


def keep(write: Write, lane: str, tags: Sequence[Tag], now: datetime) -> None:
    """Store ETags beside what their answers showed: in the transaction that records those answers."""
    newest: Mapping[str, Tag] = {tag.url: tag for tag in tags}
    if not newest:
        return
    write.connection.execute(delete(models.unchanged).where(_u.lane == lane, _u.url.in_(list(newest))))
    rows: list[dict[str, Any]] = [
        {name: getattr(tag, name) for name in ("url", "token", "etag", "shown")}
        | {"lane": lane, "read_at": now}
        for tag in newest.values()
        if tag.etag
    ]
    if rows:
        write.connection.execute(insert(models.unchanged), rows)


def forget(write: Write, before: datetime, most: int) -> int:
    """Delete up to `most` ETags that nobody was told since then: most are those of builds that have ended.

    How many were deleted.
    """
    old = select(_u.lane, _u.url).where(_u.read_at < before).order_by(_u.read_at).limit(most)
    return write.connection.execute(delete(models.unchanged).where(tuple_(_u.lane, _u.url).in_(old))).rowcount
