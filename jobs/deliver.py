"""The delivery job: a wake-up that drains what is due, never one message.

The job's thread owns the database: it settles what came back and claims what is due in one
transaction, while threads send over connections that stay open between messages and jobs.
"""

import logging
import queue
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection

from jobs.resources import Resources, resources
from jobs.schedule import ring_at
from webhook_app import VERSION, db, deliveries, endpoints, outbound, queues, subscribers
from webhook_app.deliveries import Claim, Claimed, Tried
from webhook_app.destinations import OutboundError
from webhook_app.endpoints import Sentence
from webhook_app.retries import RetryPolicy
from webhook_app.times import utc_now

log = logging.getLogger(__name__)

USER_AGENT = f"BuildRelay/{VERSION}"
IN_FLIGHT = 128
LONGEST_DRAIN_SECONDS = 60.0
SOON = timedelta(hours=1)


def deliver(held: Resources | None = None) -> None:
    """Send every due message, then ask to be woken when the next one is due.  Any number may run at once.

    `held`: what to work with; None (as a worker calls it) takes this process's own.
    """
    held = held or resources()
    queues.answer(held.redis, queues.DELIVER)
    count = _Drain(held).run()
    if count:
        log.info("delivered tries=%d", count)
    _come_back(held)


def _come_back(held: Resources) -> None:
    with db.reading(held.engine) as connection:
        due = deliveries.next_due(connection)
    if due is not None and due < utc_now() + SOON:
        ring_at(held.redis, queues.DELIVER, due)


@dataclass(slots=True)
class _Drain:
    """One run: how many messages of each subscriber are with the threads, and what they brought back."""

    held: Resources
    busy: Counter[str] = field(default_factory=Counter)
    results: "queue.SimpleQueue[Tried]" = field(default_factory=queue.SimpleQueue)
    policy: RetryPolicy = field(init=False)

    def __post_init__(self) -> None:
        self.policy = RetryPolicy(self.held.settings.delivery_retry_schedule, random.random)

    def run(self) -> int:
        """Until nothing is due or the time is up; how many tries were made."""
        until = time.monotonic() + LONGEST_DRAIN_SECONDS
        count = 0
        tried: list[Tried] = []
        while True:
            room = IN_FLIGHT - self.busy.total() if time.monotonic() < until else 0
            claim, sentences = self._turn(tried, room)
            for sentence in sentences:
                self._carry_out(sentence)
            for message in claim.messages:
                self._send(message, claim.subscribers[message.subscriber])
            if not self.busy.total():
                return count
            tried = self._collect()
            count += len(tried)

    def _turn(self, tried: Sequence[Tried], room: int) -> tuple[Claim, list[Sentence]]:
        """Settle and claim in one transaction."""
        timeout = self.held.settings.delivery_timeout_seconds

        def unit(connection: Connection) -> tuple[Claim, list[Sentence]]:
            now = utc_now()
            deliveries.settle(connection, tried, now, self.policy)
            sentences = endpoints.note(connection, tried, now)
            claim = deliveries.claim(connection, now, room, self.busy, timeout) if room else Claim()
            return claim, sentences

        return db.in_transaction(self.held.engine, unit)

    def _collect(self) -> list[Tried]:
        """Wait for one result, and take along what else is there."""
        tried = [self.results.get()]
        while not self.results.empty():
            tried.append(self.results.get())
        for one in tried:
            self.busy[one.message.subscriber] -= 1
        return tried

    def _send(self, message: Claimed, subscriber: Mapping[str, Any]) -> None:
        self.busy[message.subscriber] += 1
        self.held.threads.submit(self._try_and_report, message, subscriber)

    def _try_and_report(self, message: Claimed, subscriber: Mapping[str, Any]) -> None:
        started_at, started = utc_now(), time.monotonic()
        try:
            tried = attempt(self.held, message, subscriber)
        except Exception as error:  # a fault of ours must not leave the drain waiting for this result
            log.exception("sending failed", extra={"message_id": message.message_id})
            tried = Tried(
                message, started_at, time.monotonic() - started, reason=f"internal_{type(error).__name__}"
            )
        self.results.put(tried)

    def _carry_out(self, sentence: Sentence) -> None:
        db.as_writer(self.held.engine, lambda write: endpoints.carry_out(write, sentence, utc_now()))


def attempt(held: Resources, message: Claimed, subscriber: Mapping[str, Any]) -> Tried:
    """One HTTP try: sign, send, and say how it went.  Errors of the way are results, not exceptions."""
    now, started = utc_now(), time.monotonic()
    keys = held.settings.encryption_keys
    content_type, content = deliveries.body(message, subscriber["format"])
    secrets = subscribers.live_secrets(subscriber, keys, now)
    sent = subscribers.custom_headers(subscriber, keys) | deliveries.headers(
        message, content_type, content, secrets, int(now.timestamp()), USER_AGENT
    )
    try:
        reply = outbound.send(
            "POST",
            subscriber["url"],
            sent,
            content,
            timeout_seconds=held.settings.delivery_timeout_seconds,
            byte_cap=deliveries.RESPONSE_CAP_BYTES,
            guard=not held.settings.allow_private_callbacks and subscriber["origin"] != "settings",
        )
    except OutboundError as error:
        return Tried(message, now, time.monotonic() - started, reason=error.reason, response=str(error))
    return Tried(
        message,
        now,
        time.monotonic() - started,
        reply.status,
        None if 200 <= reply.status < 300 else f"http_{reply.status}",
        reply.body.decode("utf-8", "replace").replace("\0", ""),
        reply.headers.get("retry-after"),
    )
