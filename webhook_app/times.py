"""The clock, and how times are written in JSON."""

from datetime import UTC, datetime


def utc_now() -> datetime:
    """Now, aware UTC."""
    return datetime.now(UTC)


def iso(moment: datetime | None) -> str | None:
    """ISO 8601 in UTC with `Z`: `2026-11-01T10:00:00Z`; None stays None."""
    if moment is None:
        return None
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
