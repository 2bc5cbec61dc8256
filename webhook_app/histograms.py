"""Durations counted by bucket and kept in the store: the processes that measure them come and go.

A row holds one metric of one source and origin; its columns `n0`, `n1`, … count what fell into each bucket,
the last one everything above the largest bound.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from sqlalchemy import Connection, select

from webhook_app import bulk, models

API, DETECTION = "api", "detection"

BOUNDS: Mapping[str, tuple[float, ...]] = {
    API: (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    DETECTION: (1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 1800.0),
}
"""Upper bounds of the buckets, in seconds.  Stored counts have no bounds: a change here needs a migration."""

_COLUMNS = ("seconds", *models.HISTOGRAM_BUCKETS)


@dataclass(slots=True)
class Histogram:
    """Durations of one metric, not yet stored."""

    metric: str
    seconds: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * len(models.HISTOGRAM_BUCKETS))

    def add(self, seconds: float) -> None:
        """Count one duration; a negative one (clocks differ) is none at all."""
        seconds = max(seconds, 0.0)
        self.seconds += seconds
        self.counts[sum(seconds > bound for bound in BOUNDS[self.metric])] += 1


def of(metric: str, durations: Iterable[float]) -> Histogram:
    """A histogram of these durations."""
    made = Histogram(metric)
    for seconds in durations:
        made.add(seconds)
    return made


def add(connection: Connection, source: str, origin: str, measured: Histogram) -> None:
    """Add to the stored counts, in one statement past SQLAlchemy: pushes pay for it."""
    values = (measured.metric, source, origin, measured.seconds, *measured.counts)
    bulk.fetch(connection, _addition(connection.dialect.name), values)


@lru_cache
def _addition(dialect: str) -> str:
    place = "%s" if dialect == "postgresql" else "?"
    sums = ", ".join(f"{name} = histograms.{name} + excluded.{name}" for name in _COLUMNS)
    return (
        f"INSERT INTO histograms (metric, source, origin, {', '.join(_COLUMNS)}) "  # noqa: S608  our own names
        f"VALUES ({', '.join([place] * (3 + len(_COLUMNS)))}) "
        f"ON CONFLICT (metric, source, origin) DO UPDATE SET {sums} RETURNING source"
    )


@dataclass(frozen=True, slots=True)
class Stored:
    """What is counted of one metric, source and origin: `counts` by bucket, not cumulative."""

    metric: str
    source: str
    origin: str
    seconds: float
    counts: tuple[int, ...]

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and cumulative counts, as Prometheus wants them."""
        bounds = [*(str(bound) for bound in BOUNDS[self.metric]), "+Inf"]
        return [(bound, float(sum(self.counts[: place + 1]))) for place, bound in enumerate(bounds)]


def stored(connection: Connection) -> list[Stored]:
    """All that is counted: a row for each source and origin."""
    rows = connection.execute(select(models.histograms)).mappings()
    return [
        Stored(
            row["metric"], row["source"], row["origin"], row["seconds"],
            tuple(row[name] for name in models.HISTOGRAM_BUCKETS),
        )
        for row in rows
        if row["metric"] in BOUNDS
    ]  # fmt: skip
