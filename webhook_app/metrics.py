"""What `GET /metrics` tells, in Prometheus' terms: read from the store and Redis at each scrape.

No process counts for itself: workers fork and web servers are several, so each would know a part.
Labels name sources, states, bells and reasons; never a repository, a subscriber or a secret.
Every statement walks one small index and looks at no more than `MOST` rows, or at one row per source,
token or subscriber.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import Connection, Select, column, func, literal_column, select, table

from webhook_app import VERSION, api_health, deliveries, health, histograms, models, queries, queues
from webhook_app.histograms import Stored
from webhook_app.lifecycle import State
from webhook_app.platforms import PollFault
from webhook_app.queries import Row
from webhook_app.settings import SourceSettings

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
PREFIX = "buildrelay_"

MOST = 100_000
"""Rows of builds, messages and deliveries that a scrape counts at most; the gauge then stays there."""


@dataclass(frozen=True, slots=True)
class About:
    """What a metric means, and the names of its labels."""

    meaning: str
    labels: tuple[str, ...] = ()
    is_histogram: bool = False


_SOURCE = ("source",)

METRICS: Mapping[str, About] = {
    "build_info": About("1; the version that answers, and the schema of the store.", ("version", "schema")),
    "source_info": About("1; the configured sources and their platforms.", ("source", "platform")),
    "pushes_total": About("Facts that pushes and reports told.", _SOURCE),
    "polls_total": About("Facts that polls told, news or not.", _SOURCE),
    "changes_pushed_total": About("Changes of state that a push was first to tell.", _SOURCE),
    "missed_pushes_total": About(
        "Changes of state that a poll was first to tell though a push should have.", _SOURCE
    ),
    "late_pushes_total": About("Those of them whose push came within a minute after the poll.", _SOURCE),
    "push_share_ratio": About("The share of the last 200 changes that pushes told first.", _SOURCE),
    "detection_latency_seconds": About(
        "From a change, by the platform's own time, to its record here, by who told it first.",
        ("source", "origin"),
        is_histogram=True,
    ),
    "newest_fact_age_seconds": About("Since the newest push or poll.", _SOURCE),
    "source_deaf": About("1 while pushes are believed not to come at all.", _SOURCE),
    "source_failing": About("1 after several rounds of polling in a row that read nothing of it.", _SOURCE),
    "source_paused": About("1 while the source is not polled: a limit, or a refused token.", _SOURCE),
    "budget_limit": About("Requests that the token may make until each reset.", _SOURCE),
    "budget_remaining": About("Requests that are left of them, as the platform told last.", _SOURCE),
    "budget_reset_seconds": About("Until the reset.", _SOURCE),
    "budget_forecast_remaining": About("What will be left at the reset at the present pace.", _SOURCE),
    "budget_pace_per_second": About("Requests spent, over the last ten minutes.", _SOURCE),
    "requests_total": About("Requests made with its token, to poll or for people.", _SOURCE),
    "requests_counted_total": About("Those of them that cost budget.", _SOURCE),
    "api_errors_total": About("Requests to its API that failed.", ("source", "kind")),
    "api_request_duration_seconds": About(
        "How long its API took to answer the polling, or to fail.", _SOURCE, is_histogram=True
    ),
    "polling_behind_seconds": About("How long the stalest build has been due for its poll.", _SOURCE),
    "builds_open": About("Builds that go on and are watched.", ("source", "state")),
    "builds_unwatched": About("Builds that go on, and that polling gave up on after errors.", _SOURCE),
    "messages_pending": About("Messages that are to be sent, now or later."),
    "messages_overdue_seconds": About("How long the oldest message that may be sent has been due."),
    "messages_dead": About("Messages that were given up.", ("reason",)),
    "subscribers": About("Subscribers.", ("state",)),
    "circuits_open": About("Active subscribers that get one message at a time, after failures in a row."),
    "inbound_unreadable": About("Verified deliveries that could not be read."),
    "redis_up": About("1 if Redis answers; if not, the next three are absent."),
    "scheduler_beat_age_seconds": About("Since the last pass of the scheduler; absent: none is running."),
    "wrong_tokens_total": About("API requests with a token that nobody has."),
    "workers": About("Living workers that serve this bell.", ("bell",)),
}
"""Every metric less `buildrelay_`, in the order told.  Names in `_total` are counters, others gauges, unless
they are histograms."""

Sample = tuple[str, tuple[str, ...], float | Stored | None]
"""Name of a metric, the values of its labels, and its value; None: there is none now."""


# ---- the store -------------------------------------------------------------------------------


def of_store(connection: Connection, sources: Mapping[str, SourceSettings], now: datetime) -> list[Sample]:
    """What the store tells of the configured sources, builds and messages."""
    return [
        ("build_info", (VERSION, str(connection.execute(_SCHEMA).scalar())), 1),
        *_of_sources(connection, sources, now),
        *_of_durations(connection, sources),
        *_of_errors(connection, sources),
        *_of_budgets(connection, sources, now),
        *_of_builds(connection, sources),
        *_of_messages(connection, now),
        *_of_subscribers(connection),
        ("inbound_unreadable", (), connection.execute(UNREADABLE).scalar()),
    ]


_b, _i, _m, _s = models.builds.c, models.inbound.c, models.messages.c, models.subscribers.c
_OPEN = tuple(state.value for state in State if not state.terminal)
_SCHEMA: Select[Any] = select(column("version_num")).select_from(table("alembic_version"))


def _some(statement: Select[Any]) -> Any:
    """The first rows of a statement whose order an index has: with it no planner reads the whole table.

    Values are written into the statements: only so can every planner see that a partial index fits.
    """
    return statement.limit(literal_column(str(MOST))).subquery()


_WATCHED = _some(
    select(_b.source, _b.state, (_b.polling == literal_column("'error'")).label("stopped"))
    .where(_b.next_poll_at.is_not(None))
    .order_by(_b.next_poll_at, _b.source, _b.repository)
)
_PENDING = _some(
    select(_m.id)
    .where(_m.state == literal_column("'pending'"))
    .order_by(_m.subscriber, _m.due_at, _m.id)
)  # fmt: skip
_DEAD = _some(
    select(_m.reason).where(_m.state == literal_column("'dead'")).order_by(_m.subscriber, _m.id)
)  # fmt: skip
_UNREADABLE = _some(select(_i.id).where(_i.status == literal_column("'unreadable'")).order_by(_i.id))

OPEN = (
    select(_WATCHED.c.source, _WATCHED.c.state, _WATCHED.c.stopped, func.count().label("count"))
    .where(_WATCHED.c.state.in_(_OPEN))
    .group_by(_WATCHED.c.source, _WATCHED.c.state, _WATCHED.c.stopped)
)
PENDING = select(func.count()).select_from(_PENDING)
DEAD = select(_DEAD.c.reason, func.count().label("count")).group_by(_DEAD.c.reason)
UNREADABLE = select(func.count()).select_from(_UNREADABLE)
BY_STATE = select(
    _s.state, func.count().label("count"), func.count(_s.probe_at).label("circuits_open")
).group_by(_s.state)


def _of_sources(
    connection: Connection, sources: Mapping[str, SourceSettings], now: datetime
) -> Iterator[Sample]:
    told = health.snapshot(connection)
    for name, one in sources.items():
        yield "source_info", (name, one.source.platform), 1
        yield from _each(name, _push_health(told.get(name, {}), now))


def _push_health(row: Row, now: datetime) -> dict[str, float | None]:
    newest, paused_until = row.get("newest_fact_at"), row.get("paused_until")
    return {
        "pushes_total": row.get("pushes", 0),
        "polls_total": row.get("polls", 0),
        "changes_pushed_total": row.get("changes_pushed", 0),
        "missed_pushes_total": row.get("changes_polled", 0),
        "late_pushes_total": row.get("late_pushes", 0),
        "push_share_ratio": row.get("push_share"),
        "newest_fact_age_seconds": _past(newest, now) if newest else None,
        "source_deaf": row.get("deaf_since") is not None,
        "source_failing": api_health.is_failing(row),
        "source_paused": paused_until is not None and paused_until > now,
    }


def _of_durations(connection: Connection, sources: Mapping[str, SourceSettings]) -> Iterator[Sample]:
    """What was measured of the configured sources."""
    for one in histograms.stored(connection):
        if one.source in sources and one.metric == histograms.DETECTION:
            yield "detection_latency_seconds", (one.source, one.origin), one
        if one.source in sources and one.metric == histograms.API:
            yield "api_request_duration_seconds", (one.source,), one


def _of_errors(connection: Connection, sources: Mapping[str, SourceSettings]) -> Iterator[Sample]:
    """Errors of each polled source by kind; those that never were are told as well, so that rates begin."""
    counts = {
        (name, kind.value): 0 for name, one in sources.items() if one.can_poll for kind in PollFault
    } | dict(api_health.errors(connection))
    for (source, kind), count in counts.items():
        if source in sources:
            yield "api_errors_total", (source, kind), count


def _of_budgets(
    connection: Connection, sources: Mapping[str, SourceSettings], now: datetime
) -> Iterator[Sample]:
    polled = [name for name in sources if sources[name].can_poll]
    behind = queries.behind(connection, polled)
    for name in polled:
        yield "polling_behind_seconds", (name,), _past(behind.get(name), now)
    for name, row in queries.budgets(connection).items():
        if name in sources:
            yield from _each(name, _budget(row, now))


def _budget(row: Row, now: datetime) -> dict[str, float | None]:
    reset_at = row["reset_at"]
    ahead = reset_at is not None and reset_at > now
    return {
        "budget_limit": row["limit"],
        "budget_remaining": row["remaining"],
        "budget_reset_seconds": (reset_at - now).total_seconds() if ahead else None,
        "budget_forecast_remaining": queries.forecast(row, now),
        "budget_pace_per_second": row["per_hour"] / 3600,
        "requests_total": row["requests"],
        "requests_counted_total": row["counted"],
    }


def _of_builds(connection: Connection, sources: Mapping[str, SourceSettings]) -> Iterator[Sample]:
    counts = dict.fromkeys(((source, state) for source in sources for state in _OPEN), 0)
    stopped = dict.fromkeys(sources, 0)
    for row in connection.execute(OPEN).mappings():
        if row["stopped"]:
            stopped[row["source"]] = stopped.get(row["source"], 0) + row["count"]
        else:
            counts[row["source"], row["state"]] = row["count"]
    for labels, count in counts.items():
        yield "builds_open", labels, count
    for source, count in stopped.items():
        yield "builds_unwatched", (source,), count


def _of_messages(connection: Connection, now: datetime) -> Iterator[Sample]:
    yield "messages_pending", (), connection.execute(PENDING).scalar()
    yield "messages_overdue_seconds", (), _past(deliveries.next_due(connection), now)
    yield from _counted(connection, "messages_dead", DEAD)


def _of_subscribers(connection: Connection) -> Iterator[Sample]:
    found = {row["state"]: row for row in connection.execute(BY_STATE).mappings()}
    for state in ("active", "disabled"):
        yield "subscribers", (state,), found[state]["count"] if state in found else 0
    yield "circuits_open", (), found["active"]["circuits_open"] if "active" in found else 0


def _counted(connection: Connection, metric: str, statement: Select[Any]) -> Iterator[Sample]:
    """Rows of a label and a count."""
    for label, count in connection.execute(statement):
        yield metric, (label or "unknown",), count


def _past(moment: datetime | None, now: datetime) -> float:
    """Seconds since then; 0 if it is to come, or never."""
    return max((now - moment).total_seconds(), 0.0) if moment else 0.0


def _each(source: str, values: Mapping[str, float | None]) -> Iterator[Sample]:
    for metric, value in values.items():
        yield metric, (source,), value


# ---- Redis -----------------------------------------------------------------------------------


def of_redis(redis: Redis, now: datetime) -> list[Sample]:
    """What Redis tells of scheduler and workers; that it is away is no error."""
    try:
        beat, workers = queues.beat(redis), queues.workers(redis)
        wrong = float(queues.wrong_tokens(redis))
    except RedisError:
        return [("redis_up", (), 0)]
    age = max(now.timestamp() - beat, 0.0) if beat else None
    served = [("workers", (bell,), float(workers[bell])) for bell in queues.JOBS]
    told: list[Sample] = [("redis_up", (), 1), ("wrong_tokens_total", (), wrong)]
    return [*told, ("scheduler_beat_age_seconds", (), age), *served]


# ---- telling ---------------------------------------------------------------------------------


def exposition(samples: Iterable[Sample]) -> bytes:
    """Samples in Prometheus' text format, as `CONTENT_TYPE` says."""
    registry = CollectorRegistry()
    registry.register(_Told(samples))
    return generate_latest(registry)


class _Told(Collector):
    """What one scrape found.  Its registry lives as long as the request."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._families = {name: _family(name, about) for name, about in METRICS.items()}
        for name, labels, value in samples:
            if value is not None:
                _add(self._families[name], labels, value)

    def collect(self) -> Iterable[Metric]:
        return self._families.values()


Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


def _family(name: str, about: About) -> Family:
    if about.is_histogram:
        return HistogramMetricFamily(PREFIX + name, about.meaning, labels=about.labels)
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(PREFIX + name, about.meaning, labels=about.labels)


def _add(family: Family, labels: tuple[str, ...], value: float | Stored) -> None:
    if isinstance(value, Stored):
        assert isinstance(family, HistogramMetricFamily)
        family.add_metric(labels, value.buckets, value.seconds)
    else:
        assert not isinstance(family, HistogramMetricFamily)
        family.add_metric(labels, float(value))
