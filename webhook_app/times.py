"""The clock, and how times are written in JSON."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def utc_now() -> datetime:
    """Now, aware UTC."""
    return datetime.now(UTC)


def http_date(text: str) -> datetime | None:
    """The time that an HTTP header such as `Date` tells, aware UTC; None if it is none."""
    try:
        found = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found


def iso(moment: datetime | None) -> str | None:
    """ISO 8601 in UTC with `Z`: `2026-11-01T10:00:00Z`; None stays None."""
    if moment is None:
        return None
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
