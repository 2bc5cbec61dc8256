"""The delivery job: a wake-up that drains what is due, never one message.

The job's thread owns the database: it settles what came back and claims what is due in one
transaction, while threads send over connections that stay open between messages and jobs.
While it waits for slow answers it listens for the bell, so a subscriber that hangs delays nobody.
"""

import logging
import queue
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import chain, repeat
from typing import Any
from urllib.parse import urlsplit

from redis.exceptions import RedisError
from sqlalchemy import Connection, Engine

from jobs.resources import Desk, Resources, resources
from jobs.schedule import ring_at
from webhook_app import (
    VERSION,
    answers,
    db,
    deliveries,
    endpoints,
    loglines,
    outbound,
    queues,
    settings,
    subscribers,
    workers,
)
from webhook_app.deliveries import Claim, Claimed, Tried
from webhook_app.destinations import OutboundError
from webhook_app.endpoints import Sentence
from webhook_app.redaction import SHORTEST_SECRET, Redactor, redactor
from webhook_app.retries import RetryPolicy
from webhook_app.sealing import SealError
from webhook_app.times import utc_now

log = logging.getLogger(__name__)

USER_AGENT = f"BuildRelay/{VERSION}"
LONGEST_DRAIN_SECONDS = 60.0
LISTEN_SECONDS = 0.02
"""While answers are awaited, the bell is looked at so often."""
MOST_TRIES = 64
"""Tries that are settled in one transaction: the other processes' pushes wait for its end."""
LOOK_SECONDS = 0.25
"""And what is due without a bell: retries, and messages held back by a rate limit."""
SOON = timedelta(hours=1)
HIDDEN_LENGTH = 16
"""Characters of a part of a callback URL that may be a secret; shorter ones are words such as `webhook`."""


def deliver(held: Resources | None = None) -> None:
    """Send every due message, then ask to be woken when the next one is due.  Any number may run at once.

    `held`: what to work with; None (as a worker calls it) takes this process's own.
    """
    held = held or resources()
    queues.answer(held.redis, queues.DELIVER)
    with held.desk.one_job:
        count = _Drain(held).run()
    if count:
        log.info("delivered tries=%d", count)
    if not held.desk.closing:  # else Redis may be about to end too, and there is no time to wait for it
        _come_back(held)


def leave_desk(held: Resources) -> None:
    """Have tries under way noted whatever the job waits for, such as a Redis that hangs."""
    try:
        _Drain(held).leave()
    except db.StoreUnavailable as error:
        log.warning("tries are not noted, their messages will be sent again after an end: %s", error)


def attend(held: Resources, over: threading.Event) -> None:
    """Until `over`, show that this worker lives while it has messages, and free those of dead workers.

    For a thread of its own, with a connection of its own: a job may wait for the store or for Redis.
    """
    engine = db.spare(held.engine)
    try:
        _attend(held, engine, over)
    finally:
        if engine is not held.engine:
            engine.dispose()


def _attend(held: Resources, engine: Engine, over: threading.Event) -> None:
    watch = workers.Watch(held.desk.worker)
    while not over.wait(workers.LOOK_SECONDS):
        try:
            _show_life(held, engine)
            freed = sum([workers.free(engine, late, utc_now()) for late in watch.late(engine)])
        except db.StoreUnavailable as error:
            log.debug("the store is away: %s", error)
            continue
        except Exception:  # without this thread the others would take this worker for dead
            log.exception("looking after the workers failed")
            continue
        if freed:
            log.warning("a worker is gone: %d messages of it are due again", freed)
            queues.Bell(held.redis).ring(queues.DELIVER)


def _show_life(held: Resources, engine: Engine) -> None:
    desk = held.desk
    if desk.under_way and time.monotonic() - desk.shown_at >= workers.BEAT_SECONDS:
        workers.renew(engine, desk.worker, utc_now())
        desk.shown_at = time.monotonic()


def _come_back(held: Resources) -> None:
    with db.reading(held.engine) as connection:
        due = deliveries.next_due(connection)
    if due is not None and due < utc_now() + SOON:
        ring_at(held.redis, queues.DELIVER, due)


@dataclass(slots=True)
class _Drain:
    """One run: it attends the desk, and leaves what hangs to the next one."""

    held: Resources
    desk: Desk = field(init=False)
    policy: RetryPolicy = field(init=False)
    unfinished: bool = False

    def __post_init__(self) -> None:
        self.desk = self.held.desk
        self.policy = RetryPolicy(self.held.settings.delivery_retry_schedule, random.random)

    def run(self) -> int:
        """Until nothing is due and all is back, or the time is up; how many tries came back."""
        with self.desk.lock:
            self.desk.attended = True
        try:
            return self._drain(time.monotonic() + LONGEST_DRAIN_SECONDS)
        finally:
            self.leave()
            if self.unfinished:
                self._ring(queues.DELIVER)

    def leave(self) -> None:
        """Settle what lies on the desk; from now on each sending thread settles its own try."""
        with self.desk.lock:
            self.desk.attended = False
            while (tried := self._take()) or self.desk.unsettled:
                self._turn(tried, claims=False)

    def _drain(self, until: float) -> int:
        count = 0
        tried: list[Tried] = []
        while time.monotonic() < until and not self.desk.closing:
            claim = self._turn(tried)
            for message in claim.messages:
                self._send(message, claim.subscribers[message.subscriber])
            if not self.desk.room.subscribers:
                return count
            tried = self._collect()
            count += len(tried)
        self._turn(tried, claims=False)
        self.unfinished = True
        return count

    def _turn(self, tried: Sequence[Tried], claims: bool = True) -> Claim:
        """Settle and claim in one transaction; then do to subscribers what follows from the tries.

        Tries that can't be settled because the store is away are settled with the next ones.
        """
        tried = [*self.desk.take_unsettled(MOST_TRIES), *tried]
        if not tried and not claims:
            return Claim()
        uncertain = chain([self.desk.is_uncertain], repeat(True))  # one that is repeated may be stored
        room, timeout = self.desk.room, self.held.settings.delivery_timeout_seconds

        def unit(connection: Connection) -> tuple[Claim, list[Sentence], frozenset[int] | None]:
            now, fresh = utc_now(), tried
            if next(uncertain):
                fresh = deliveries.unnoted(connection, tried)
                workers.disown(connection, self.desk.worker, self.desk.under_way, now)
            deliveries.settle(connection, fresh, now, self.policy)
            sentences = endpoints.note(connection, fresh, now)
            claim = Claim()
            if claims:
                claim = deliveries.claim(connection, now, room, timeout, self.desk.worker)
            return claim, sentences, self._show(connection, tried, claim, now)

        try:
            claim, sentences, under_way = db.in_transaction(self.held.engine, unit)
        except db.StoreUnavailable:
            self.desk.put_back(tried)
            raise
        self.desk.is_uncertain = False
        if under_way is not None:
            self.desk.under_way, self.desk.shown_at = under_way, time.monotonic()
        for sentence in sentences:
            self._carry_out(sentence)
        return claim

    def _show(
        self, connection: Connection, tried: Sequence[Tried], claim: Claim, now: datetime
    ) -> frozenset[int] | None:
        """Note what this worker has under way now; the ids of the messages, None if nothing has changed."""
        if not tried and not claim.messages:
            return None
        over = {one.message.id for one in tried}
        under_way = (self.desk.under_way - over) | {message.id for message in claim.messages}
        workers.show(connection, self.desk.worker, under_way, now)
        return under_way

    def _collect(self) -> list[Tried]:
        """What came back; empty when the bell rang first, or it is time to look what is due."""
        until = time.monotonic() + LOOK_SECONDS
        while time.monotonic() < until and not self.desk.closing:
            try:
                return self._take(self.desk.results.get(timeout=LISTEN_SECONDS))
            except queue.Empty:
                if self._is_called():
                    break
        return []

    def _take(self, *first: tuple[Tried, Mapping[str, Any]]) -> list[Tried]:
        """Note these as over, and what else lies on the desk, up to `MOST_TRIES`."""
        back = list(first)
        while len(back) < MOST_TRIES and not self.desk.results.empty():
            back.append(self.desk.results.get())
        for tried, subscriber in back:
            self.desk.room.ended(subscriber, tried.reason is None)
        return [tried for tried, _ in back]

    def _is_called(self) -> bool:
        try:
            return queues.answer(self.held.redis, queues.DELIVER)
        except RedisError:
            return False  # what is due is found without it

    def _send(self, message: Claimed, subscriber: Mapping[str, Any]) -> None:
        self.desk.room.began(subscriber)
        self.held.threads.submit(self._try_and_report, message, subscriber)

    def _try_and_report(self, message: Claimed, subscriber: Mapping[str, Any]) -> None:
        started_at, started = utc_now(), time.monotonic()
        try:
            tried = attempt(self.held, message, subscriber)
        except SealError as error:
            log.warning("nothing can be sent to %s: %s", message.subscriber, error)
            tried = Tried(message, started_at, 0.0, reason=deliveries.NO_KEY)
        except Exception as error:  # a fault of ours must not leave the drain waiting for this result
            log.exception("sending failed", extra={"message_id": message.message_id})
            tried = Tried(
                message, started_at, time.monotonic() - started, reason=f"internal_{type(error).__name__}"
            )
        if tried.reason != deliveries.NO_KEY:
            _log_attempt(tried)
        self._hand_in(tried, subscriber)

    def _hand_in(self, tried: Tried, subscriber: Mapping[str, Any]) -> None:
        with self.desk.lock:
            if self.desk.attended:
                self.desk.results.put((tried, subscriber))
                return
            self.desk.room.ended(subscriber, tried.reason is None)
            try:
                self._turn([tried], claims=False)
            except db.StoreUnavailable as error:
                log.warning("a try is not noted yet: %s", error)
        self._ring(queues.DELIVER)

    def _ring(self, job: str) -> None:
        """Call the next job; when we are to end, a tick does that, since Redis may be ending as well."""
        if not self.desk.closing:
            queues.Bell(self.held.redis).ring(job)

    def _carry_out(self, sentence: Sentence) -> None:
        try:
            db.as_writer(self.held.engine, lambda write: endpoints.carry_out(write, sentence, utc_now()))
        except db.StoreUnavailable as error:  # what was claimed must be sent all the same
            log.warning("to %s %s has to wait for a failure: %s", sentence.act, sentence.subscriber, error)
            return
        if sentence.act == "disable":
            self._ring(queues.REPLAY)  # which gives up the rest of its messages


def _log_attempt(tried: Tried) -> None:
    message = tried.message
    loglines.event(
        log, "delivery_attempt", message_id=message.message_id, subscriber_id=message.subscriber,
        type=message.type, event_id=message.data.get("event_id"), build_id=message.data.get("build_id"),
        attempt=message.number, status=tried.status_code, reason=tried.reason,
        duration_ms=round(tried.duration_seconds * 1000), note=tried.note,
    )  # fmt: skip


def attempt(held: Resources, message: Claimed, subscriber: Mapping[str, Any]) -> Tried:
    """One HTTP try: sign, send, and say how it went.  Errors of the way are results; raises `SealError`."""
    now, started = utc_now(), time.monotonic()
    keys = held.settings.encryption_keys
    content_type, content = deliveries.body(message, subscriber["format"])
    secrets = subscribers.live_secrets(subscriber, keys, now)
    own = subscribers.custom_headers(subscriber, keys)
    url = deliveries.target(subscribers.callback_url(subscriber, keys), message, subscriber["format"])
    telling = _secrets(own, secrets, url)
    sent = own | deliveries.headers(message, content_type, content, secrets, int(now.timestamp()), USER_AGENT)
    sent |= deliveries.provider_headers(message, subscriber["format"], content, secrets)
    if not any(name.lower() == "accept" for name in own):
        sent["accept"] = "*/*"  # some application firewalls refuse a request without it
    try:
        reply = outbound.send(
            "POST",
            url,
            sent,
            content,
            timeout_seconds=held.settings.delivery_timeout_seconds,
            byte_cap=deliveries.RESPONSE_CAP_BYTES,
            guard=not held.settings.allow_private_callbacks and subscriber["origin"] != "settings",
            rest_seconds=deliveries.REST_SECONDS,
        )
    except OutboundError as error:
        told = _masked(held, str(error), telling)
        return Tried(message, now, time.monotonic() - started, reason=error.reason, response=told)
    return Tried(
        message,
        now,
        time.monotonic() - started,
        reply.status,
        None if 200 <= reply.status < 300 else f"http_{reply.status}",
        _response(held, reply, telling),
        reply.headers.get("retry-after"),
        _note(held, url, reply, telling),
    )


def _secrets(own: Mapping[str, str], secrets: Sequence[str], url: str) -> tuple[str, ...]:
    """What we send that an answer must not show: custom headers, webhook secrets, and what the URL hides.

    Headers and the URL's path and query are looked for whole and by word.
    """
    words = [word for value in own.values() for word in value.split() if word.lower() not in _SCHEMES]
    keys = [secret.removeprefix("whsec_") for secret in secrets]
    parts = urlsplit(url)
    hidden = f"{parts.path}?{parts.query}" if parts.query else parts.path
    words += [word for word in re.split(r"[/?&=]", hidden) if len(word) >= HIDDEN_LENGTH]
    words += [hidden] if len(hidden) >= HIDDEN_LENGTH else []
    return tuple(dict.fromkeys([*own.values(), *words, *secrets, *keys]))


_SCHEMES = ("basic", "bearer", "digest", "token")


@lru_cache(256)
def _knows(secrets: tuple[str, ...]) -> Redactor:
    return redactor(secrets)


def _masked(held: Resources, text: str, secrets: tuple[str, ...]) -> str:
    """A text of the other side without its subscriber's secrets, those of the settings, and what looks so."""
    return held.redact(_knows(secrets).known(text)) if len(text) >= SHORTEST_SECRET else text


def _response(held: Resources, reply: outbound.Reply, secrets: tuple[str, ...]) -> str:
    """The body of an answer as it is kept; of one that was cut the end goes, which may be half a secret."""
    text = reply.body.decode("utf-8", "replace").replace("\0", "")
    if len(reply.body) >= deliveries.RESPONSE_CAP_BYTES:
        text = _knows(secrets).whole(held.redact.whole(text))
    return _masked(held, text, secrets)


def _note(held: Resources, url: str, reply: outbound.Reply, telling: Sequence[str]) -> str | None:
    """What the log says of an answer beside its status: where it redirects to, and what was odd."""
    location = reply.headers.get("location") if 300 <= reply.status < 400 else None
    if location is None:
        return reply.note
    secrets = [*telling, *settings.secret_texts(held.settings)]
    target = f"redirects to {answers.redirect_target(url, location, secrets)}"
    return f"{target}; {reply.note}" if reply.note else target
