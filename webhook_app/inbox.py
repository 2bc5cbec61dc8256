"""`take()`: a verified delivery is kept, refused if it came before, and recorded; one transaction.

A delivery counts as seen only once it was applied: one that was unreadable stays open, so that a
redelivery, or `reprocess()` with a newer program, can still make it count.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from isal import isal_zlib
from sqlalchemy import Engine, RowMapping, bindparam, select, update

from webhook_app import builds, bulk, models, platforms, redaction
from webhook_app.db import Write, as_writer
from webhook_app.lifecycle import Observation, ObservedBy
from webhook_app.platforms import Headers, Invalid, Source, Unreadable, Webhook
from webhook_app.polling import Pace
from webhook_app.redaction import SHAPES, Redactor

COMPRESSION = 1
"""ISA-L's: smaller than zlib's own 1, in a third of the time; `zlib` reads it."""
LONGEST_KEY = 1000
"""Characters of a delivery key; a longer one is known by its digest, since no index takes it as it is."""
KEPT_HEADERS = frozenset({
    "content-type", "user-agent", "x-github-event", "x-github-delivery", "x-github-hook-id",
    "x-gitlab-event", "x-gitlab-instance", "x-gitlab-event-uuid", "idempotency-key", "webhook-id",
    "webhook-timestamp", "x-delivery-id",
})  # fmt: skip
"""Headers worth keeping; none of them is a secret."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A verified delivery, parsed.  `webhook` None: unreadable, for this `reason`.  `packed`: its body.

    `invalid`: its sender is told what to correct.
    """

    source: str
    envelope: platforms.Envelope
    headers: Headers
    packed: bytes
    webhook: Webhook | None
    reason: str | None = None
    invalid: Invalid | None = None

    @property
    def delivery_key(self) -> str | None:
        """What makes it unique; None if the sender gives nothing that could."""
        if not self.envelope.delivery_id:
            return None
        envelope = self.envelope
        key = f"{self.source}|{envelope.hook_id}|{envelope.event}|{envelope.delivery_id}"
        return key if len(key) <= LONGEST_KEY else f"{self.source}|{hashlib.sha256(key.encode()).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a delivery.  `status`: accepted, duplicate, ignored, unreadable."""

    status: str
    delivery_id: int
    build_id: str | None = None
    reason: str | None = None
    ask: bool = False
    events: int = 0


def read(source: Source, headers: Headers, body: bytes, redact: Redactor = SHAPES) -> Arrival:
    """Parse a verified delivery.  Raises `NotJson`; what is merely unreadable is an Arrival with a reason.

    What it says is masked here, where it enters; its body stays as it was signed, for `reprocess`.
    """
    platform = platforms.find()[source.platform]
    envelope = platform.envelope(headers, body)
    webhook, reason, invalid = None, None, None
    try:
        webhook = platform.parse_webhook(source, headers, body)
    except Unreadable as error:
        reason, invalid = str(error), error if isinstance(error, Invalid) else None
    packed = isal_zlib.compress(body, COMPRESSION)
    return _masked(Arrival(source.name, envelope, headers, packed, webhook, reason, invalid), redact)


def _masked(arrival: Arrival, redact: Redactor) -> Arrival:
    """An arrival without secrets in what is stored of it beside its body; one search where it holds none."""
    envelope, webhook = arrival.envelope, arrival.webhook
    seen = webhook.observations if webhook else ()
    names = [envelope.event, envelope.hook_id, envelope.delivery_id, *(webhook.dropped if webhook else ())]
    names += [name for one in seen for name in redaction.names_of(one)]
    joined = "\n".join(names)
    has_texts = (
        arrival.reason or (webhook and webhook.ignored) or any(one.error or one.detail for one in seen)
    )
    if not has_texts and redact.name(joined) == joined:
        return arrival
    invalid = arrival.invalid
    return replace(
        arrival,
        envelope=platforms.Envelope(
            redact.name(envelope.event),
            redact.identity(envelope.hook_id),
            redact.identity(envelope.delivery_id),
        ),
        webhook=webhook and _masked_webhook(webhook, redact),
        reason=arrival.reason and redact(arrival.reason),
        invalid=invalid and Invalid(invalid.field, redact(invalid.message), invalid.allowed),
    )


def _masked_webhook(webhook: Webhook, redact: Redactor) -> Webhook:
    return replace(
        webhook,
        observations=tuple(redaction.masked(seen, redact) for seen in webhook.observations),
        ignored=webhook.ignored and redact(webhook.ignored),
        dropped=tuple(map(redact.name, webhook.dropped)),
    )


def take(engine: Engine, arrivals: Sequence[Arrival], now: datetime, pace: Pace) -> list[Receipt]:
    """Keep and apply deliveries in one committed transaction; one receipt each, in order."""
    return as_writer(engine, lambda write: _take(write, arrivals, now, pace), first=True)


def _take(write: Write, arrivals: Sequence[Arrival], now: datetime, pace: Pace) -> list[Receipt]:
    known = _known(write, arrivals)
    receipts: dict[int, Receipt] = {}
    fresh: list[tuple[int, Arrival, int]] = []  # place, arrival, row id
    again: set[int] = set()  # row ids that exist: they were unreadable, this is their second chance
    for place, arrival in enumerate(arrivals):
        key = arrival.delivery_key
        seen = known.get(key) if key else None
        if seen is not None and seen[1] != "unreadable":
            receipts[place] = Receipt("duplicate", seen[0], seen[2])
            continue
        row_id = write.new_id("inbound") if seen is None else seen[0]
        if seen is not None:
            again.add(row_id)
        if key:
            known[key] = (row_id, "applied", None)
        fresh.append((place, arrival, row_id))
    taken, results = _apply(write, fresh, now, pace)
    kept = [
        _row(row_id, arrival, now) | results[row_id] for _, arrival, row_id in fresh if row_id not in again
    ]
    bulk.insert(write.connection, models.inbound, kept)
    _settle(write, {row_id: result for row_id, result in results.items() if row_id in again})
    receipts |= taken
    return [receipts[place] for place in range(len(arrivals))]


_KNOWN = """
    SELECT i.delivery_key, i.id, i.status, b.build_id
    FROM inbound i LEFT JOIN builds b ON b.id = i.build WHERE i.delivery_key
"""


def _known(write: Write, arrivals: Sequence[Arrival]) -> dict[str, tuple[int, str, str | None]]:
    """Row id, status and build of the deliveries that came before, by key."""
    keys = [arrival.delivery_key for arrival in arrivals if arrival.delivery_key]
    return {
        key: (id_, status, build) for key, id_, status, build in bulk.look_up(write.connection, _KNOWN, keys)
    }


def _row(row_id: int, arrival: Arrival, now: datetime) -> dict[str, Any]:
    return {
        "id": row_id,
        "delivery_key": arrival.delivery_key,
        "source": arrival.source,
        "hook_id": arrival.envelope.hook_id,
        "event": arrival.envelope.event,
        "delivery_id": arrival.envelope.delivery_id,
        "headers": {name: value for name, value in arrival.headers.items() if name in KEPT_HEADERS},
        "body": arrival.packed,
        "received_at": now,
    }


def _apply(
    write: Write, fresh: Sequence[tuple[int, Arrival, int]], now: datetime, pace: Pace
) -> tuple[dict[int, Receipt], dict[int, dict[str, Any]]]:
    """Record what deliveries say: receipts by place, and by row id what their rows are to say of it."""
    facts = [fact for _, arrival, _ in fresh if arrival.webhook for fact in arrival.webhook.observations]
    outcomes = iter(builds.record(write, facts, now, pace))
    receipts: dict[int, Receipt] = {}
    results: dict[int, dict[str, Any]] = {}
    for place, arrival, row_id in fresh:
        mine = [next(outcomes) for _ in arrival.webhook.observations] if arrival.webhook else []
        receipt = _receipt(arrival, row_id, mine)
        receipts[place] = receipt
        build = next((outcome.build for outcome in mine if outcome.build is not None), None)
        status = "applied" if receipt.status == "accepted" else receipt.status
        results[row_id] = {"status": status, "reason": receipt.reason, "build": build}
    return receipts, results


def _settle(write: Write, results: Mapping[int, Mapping[str, Any]]) -> None:
    """Say in rows that exist what became of them."""
    if results:
        write.connection.execute(
            _SETTLE, [{"the_id": row_id, **result} for row_id, result in results.items()]
        )


_SETTLE = (
    update(models.inbound)
    .where(models.inbound.c.id == bindparam("the_id"))
    .values(status=bindparam("status"), reason=bindparam("reason"), build=bindparam("build"))
)


def _receipt(arrival: Arrival, row_id: int, outcomes: Sequence[builds.Outcome]) -> Receipt:
    if arrival.webhook is None:
        return Receipt("unreadable", row_id, reason=arrival.reason)
    found = [outcome for outcome in outcomes if outcome.build is not None]
    if not found:
        reason = arrival.webhook.ignored or "it names no build that is known here"
        return Receipt("ignored", row_id, reason=reason)
    if all(outcome.reason for outcome in found):
        return Receipt("ignored", row_id, found[0].build_id, found[0].reason)
    return Receipt(
        "accepted",
        row_id,
        found[0].build_id,
        ask=any(outcome.ask for outcome in found),
        events=sum(outcome.events for outcome in found),
    )


def reprocess(
    engine: Engine,
    sources: Mapping[str, Source],
    inbound_id: int,
    now: datetime,
    pace: Pace,
    redact: Redactor = SHAPES,
) -> Receipt | None:
    """Take a kept delivery once more, through the same code; None if there is no such row.

    Harmless for one that was applied, which stays so: in a push the state machine finds nothing new.  Reports
    of build scripts have no order but that of their arrival: one that could be read is not taken again.
    """

    def again(write: Write) -> Receipt | None:
        row = (
            write.connection.execute(
                select(models.inbound, models.builds.c.build_id)
                .outerjoin(models.builds, models.builds.c.id == models.inbound.c.build)
                .where(models.inbound.c.id == inbound_id)
            )
            .mappings()
            .one_or_none()
        )
        if row is None:
            return None
        source = sources.get(row["source"])
        if source is None:
            return Receipt(
                "unreadable", inbound_id, reason=f"source {row['source']!r} is no longer configured"
            )
        arrival = _kept(source, row, redact)
        if row["status"] != "unreadable" and _is_report(arrival):
            status = "accepted" if row["status"] == "applied" else row["status"]
            return Receipt(status, inbound_id, row["build_id"], row["reason"])
        receipts, results = _apply(write, [(0, arrival, inbound_id)], now, pace)
        if row["status"] != "applied" or receipts[0].status == "accepted":
            _settle(write, results)
        return receipts[0]

    return as_writer(engine, again)


def _kept(source: Source, row: RowMapping, redact: Redactor) -> Arrival:
    """A kept delivery, parsed.  A report without a time of its own is as old as its arrival."""
    arrival = read(source, row["headers"], zlib.decompress(row["body"]), redact)
    if arrival.webhook is None or not _is_report(arrival):
        return arrival
    dated = tuple(_dated(seen, row["received_at"]) for seen in arrival.webhook.observations)
    return replace(arrival, webhook=replace(arrival.webhook, observations=dated))


def _dated(seen: Observation, received_at: datetime) -> Observation:
    at = seen.reported_at or received_at
    start = seen.started_at or (at if seen.begins else None)
    end = at if seen.state is not None and seen.state.terminal else None
    return replace(seen, reported_at=at, started_at=start, ended_at=end)


def _is_report(arrival: Arrival) -> bool:
    seen = arrival.webhook.observations if arrival.webhook else ()
    return any(one.observed_by is ObservedBy.REPORT for one in seen)
