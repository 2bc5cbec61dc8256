"""Subscribers, and builds to tell them of, written straight into the store."""

from collections.abc import Sequence
from itertools import count

from sqlalchemy import Engine

from bench import servers
from webhook_app import builds, db, subscribers
from webhook_app.lifecycle import Observation, ObservedBy, State
from webhook_app.polling import Pace
from webhook_app.times import utc_now

_runs = count(1)


def subscribe(engine: Engine, urls: Sequence[str], **more: object) -> list[str]:
    """A subscriber per URL, with `more` fields as in the API; their ids."""
    wanted = [{"url": url, "signing": "hmac", **more} for url in urls]
    return db.as_writer(
        engine,
        lambda write: [subscribers.create(write, one, (servers.KEY,), utc_now())[0]["id"] for one in wanted],
    )


def remove(engine: Engine, ids: Sequence[str]) -> None:
    """Remove them with their messages."""
    for one in ids:
        subscribers.remove(engine, one, utc_now())


def record(engine: Engine, number: int, pace: Pace) -> None:
    """So many new builds in one transaction: a message for each subscriber."""
    facts = [_queued(next(_runs)) for _ in range(number)]
    db.as_writer(engine, lambda write: builds.record(write, facts, utc_now(), pace))


def _queued(run: int) -> Observation:
    return Observation(
        source="github", platform="github", observed_by=ObservedBy.PUSH, key=f"github:{run}",
        build_id=f"github:octo-org:storefront:{run}", attempt=1, state=State.QUEUED, raw_status="queued",
        repository="octo-org/storefront", workflow="CI", branch="main", commit="0123456789abcdef" * 2,
        number=run, url=f"https://github.com/octo-org/storefront/actions/runs/{run}",
    )  # fmt: skip
