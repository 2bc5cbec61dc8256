"""The tables.  State is rows; nothing here has behaviour.

Two kinds of database run the same code: SQLite (one box) and PostgreSQL.  Times are aware UTC,
JSON is stored as text in the order it was written (a message's body must not change between
attempts), ids that order things come from `counters` (see `db.Write`), not from the database.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.engine import Dialect


class Moment(TypeDecorator[datetime]):
    """An aware UTC datetime on both databases; SQLite has no time zones, so it stores UTC without one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        """Refuse naive times: they would be somebody's local time."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone can't be stored")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """UTC again."""
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


Id = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

counters = Table(
    "counters",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("builds", Id, nullable=False),
    Column("events", Id, nullable=False),
    Column("messages", Id, nullable=False),
    Column("inbound", Id, nullable=False),
    Column("subscribers_revision", Id, nullable=False),
    comment="One row: the last id given out per table.  Whoever holds its lock is the writer.",
)

builds = Table(
    "builds",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("build_id", Text, nullable=False),
    Column("key", Text, nullable=False, unique=True),
    Column("lookup", Text, nullable=False, unique=True),
    Column("group_key", Text),
    Column("source", Text, nullable=False),
    Column("platform", Text, nullable=False),
    Column("repository", Text),
    Column("workflow", Text),
    Column("branch", Text),
    Column("commit", Text),
    Column("number", Id),
    Column("url", Text),
    Column("attempt", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("told_state", Text, nullable=False),
    Column("conclusion", Text),
    Column("raw_status", Text),
    Column("raw_conclusion", Text),
    Column("waiting", Boolean, nullable=False),
    Column("error", Text),
    Column("started_at", Moment),
    Column("ended_at", Moment),
    Column("platform_at", Moment),
    Column("jobs", JSON, nullable=False),
    Column("jobs_complete", Boolean, nullable=False),
    Column("progress", Integer, nullable=False),
    Column("progress_basis", Text, nullable=False),
    Column("report", JSON, nullable=False),
    Column("preview_url", Text),
    Column("observed_by", Text, nullable=False),
    Column("sequence", Integer, nullable=False),
    Column("last_push_at", Moment),
    Column("last_poll_at", Moment),
    Column("polling", Text, nullable=False),
    Column("poll_count", Integer, nullable=False),
    Column("poll_deadline_at", Moment),
    Column("next_poll_at", Moment),
    Column("consecutive_errors", Integer, nullable=False),
    Column("poll_error", Text),
    Column("poll_fault", Text),
    Column("doubtful", Boolean, nullable=False),
    Column("requested", Boolean, nullable=False),
    Column("watched_at", Moment),
    Column("unlisted", Boolean, nullable=False, server_default=text("false")),
    Column("trigger", Text),
    Column("head_repository", Text),
    Column("is_fork", Boolean, nullable=False, server_default=text("false")),
    Column("queue_id", Text),
    Column("platform_created_at", Moment),
    Column("attempt_base", Integer, nullable=False, server_default="0"),
    Column("started_synthetic", Boolean, nullable=False, server_default=text("false")),
    Column("ended_synthetic", Boolean, nullable=False, server_default=text("false")),
    Column("missing_since", Moment),
    Column("reads_after_end", Integer, nullable=False, server_default="0"),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
    Index("ix_builds_due", "next_poll_at", "source", "repository",
          postgresql_where=text("next_poll_at IS NOT NULL"), sqlite_where=text("next_poll_at IS NOT NULL")),
    Index("ix_builds_open", "source", "repository",
          postgresql_where=text("next_poll_at IS NOT NULL"), sqlite_where=text("next_poll_at IS NOT NULL")),
    Index("ix_builds_group_key", "group_key", postgresql_where=text("group_key IS NOT NULL"),
          sqlite_where=text("group_key IS NOT NULL")),
    Index("ix_builds_repository", "source", "repository", "id"),
    Index("ix_builds_source", "source", "id"),
    Index("ix_builds_created_at", "created_at"),
    Index("ix_builds_line", "source", "repository", "workflow", "branch", "id"),
)  # fmt: skip

attempts = Table(
    "attempts",
    metadata,
    Column("build", Id, ForeignKey("builds.id", ondelete="CASCADE"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("state", Text, nullable=False),
    Column("conclusion", Text),
    Column("started_at", Moment),
    Column("ended_at", Moment),
    Column("progress", Integer, nullable=False),
    Column("observed_by", Text, nullable=False),
    Column("error", Text),
    Column("started_synthetic", Boolean, nullable=False, server_default=text("false")),
    Column("ended_synthetic", Boolean, nullable=False, server_default=text("false")),
    comment="Attempts that a later one has superseded, as they stood then.",
)

events = Table(
    "events",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("build", Id, ForeignKey("builds.id", ondelete="CASCADE")),
    Column("sequence", Integer),
    Column("type", Text, nullable=False),
    Column("data", JSON, nullable=False),
    Column("change", Text),
    Column("observed_by", Text, nullable=False),
    Column("timestamp", Moment, nullable=False),
    UniqueConstraint("build", "sequence"),
    Index("ix_events_timestamp", "timestamp"),
    comment="Append-only.  `data` is the body subscribers get, less event_id and sequence.",
)

inbound = Table(
    "inbound",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("delivery_key", Text, unique=True),
    Column("source", Text, nullable=False),
    Column("hook_id", Text, nullable=False),
    Column("event", Text, nullable=False),
    Column("delivery_id", Text, nullable=False),
    Column("headers", JSON, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("status", Text, nullable=False),
    Column("reason", Text),
    Column("build", Id, ForeignKey("builds.id", ondelete="SET NULL")),
    Column("received_at", Moment, nullable=False),
    Index("ix_inbound_received_at", "received_at"),
    Index("ix_inbound_build", "build"),
    Index("ix_inbound_unreadable", "id", postgresql_where=text("status = 'unreadable'"),
          sqlite_where=text("status = 'unreadable'")),
    comment="Every verified delivery as it came; `body` is zlib compressed.",
)  # fmt: skip

subscribers = Table(
    "subscribers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("url", Text, nullable=False),
    Column("events", JSON, nullable=False),
    Column("sources", JSON, nullable=False),
    Column("repositories", JSON, nullable=False),
    Column("branches", JSON, nullable=False),
    Column("forks", Boolean, nullable=False, server_default=text("false")),
    Column("description", Text),
    Column("rate_limit_per_second", Integer),
    Column("ordered", Boolean, nullable=False),
    Column("headers", Text),
    Column("signing", Text, nullable=False),
    Column("secrets", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("disabled_reason", Text),
    Column("failing_since", Moment),
    Column("format", Text, nullable=False, server_default="standard"),
    Column("states", JSON, nullable=False, server_default="[]"),
    Column("conclusions", JSON, nullable=False, server_default="[]"),
    Column("changes", JSON, nullable=False, server_default="[]"),
    Column("origin", Text, nullable=False, server_default="api"),
    Column("paced_until", Moment),
    Column("slow_until", Moment),
    Column("on_probation", Boolean, nullable=False, server_default=text("false")),
    Column("warned_percent", Integer, nullable=False, server_default="0"),
    Column("failures", Integer, nullable=False),
    Column("failures_in_row", Integer, nullable=False, server_default="0"),
    Column("probe_at", Moment),
    Column("probe_wait_seconds", Float),
    Column("concurrency_limit", Integer),
    Column("sealed_url", Text),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
    comment="`headers` and `secrets` are sealed JSON.",
)

messages = Table(
    "messages",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("message_id", Text, nullable=False, unique=True),
    Column("subscriber", Text, ForeignKey("subscribers.id", ondelete="CASCADE"), nullable=False),
    Column("event", Id, ForeignKey("events.id", ondelete="CASCADE"), nullable=False),
    Column("build", Id, ForeignKey("builds.id", ondelete="CASCADE")),
    Column("sequence", Integer),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("due_at", Moment),
    Column("claim", Text),
    Column("reason", Text),
    Column("created_at", Moment, nullable=False),
    Column("settled_at", Moment),
    UniqueConstraint("subscriber", "event"),
    Index("ix_messages_due", "subscriber", "due_at", "id", postgresql_where=text("state = 'pending'"),
          sqlite_where=text("state = 'pending'")),
    Index("ix_messages_lane", "subscriber", "build", "sequence",
          postgresql_where=text("state = 'pending' AND build IS NOT NULL"),
          sqlite_where=text("state = 'pending' AND build IS NOT NULL")),
    Index("ix_messages_dead", "subscriber", "id", postgresql_where=text("state = 'dead'"),
          sqlite_where=text("state = 'dead'")),
    Index("ix_messages_event", "event"),
    comment="The outbox: one event for one subscriber.  state: pending, delivered, dead.",
)  # fmt: skip

delivery_attempts = Table(
    "delivery_attempts",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("message", Id, ForeignKey("messages.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("started_at", Moment, nullable=False),
    Column("duration_ms", Integer, nullable=False),
    Column("status_code", Integer),
    Column("reason", Text),
    Column("response", Text),
    Column("note", Text),
    Column("subscriber", Text),
    Index("ix_delivery_attempts_message", "message"),
    Index("ix_delivery_attempts_subscriber", "subscriber", "id"),
    comment="One HTTP try of a message.",
)

recoveries = Table(
    "recoveries",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("kind", Text, nullable=False),
    Column("subscriber", Text, ForeignKey("subscribers.id", ondelete="CASCADE")),
    Column("reason", Text),
    Column("since", Moment),
    Column("until", Moment),
    Column("only_missing", Boolean, nullable=False),
    Column("after", Id, nullable=False),
    Column("last", Id, nullable=False),
    Column("created_at", Moment, nullable=False),
    comment="Replays of events and redrives of messages: done up to id `after`, to do up to `last`.",
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("digest", Text, nullable=False, unique=True),
    Column("created_at", Moment, nullable=False),
    comment="API tokens; only a SHA-256 digest is kept.",
)

sources = Table(
    "sources",
    metadata,
    Column("name", Text, primary_key=True),
    Column("paused_until", Moment),
    Column("pause_reason", Text),
    Column("pushes", Id, nullable=False, server_default="0"),
    Column("polls", Id, nullable=False, server_default="0"),
    Column("changes_pushed", Id, nullable=False, server_default="0"),
    Column("changes_polled", Id, nullable=False, server_default="0"),
    Column("missed_in_row", Integer, nullable=False, server_default="0"),
    Column("refused_in_row", Integer, nullable=False, server_default="0"),
    Column("push_share", Float),
    Column("since", Moment),
    Column("last_push_at", Moment),
    Column("last_poll_at", Moment),
    Column("last_missed_at", Moment),
    Column("deaf_since", Moment),
    Column("push_notice_at", Moment),
    Column("pushed_in_row", Integer, nullable=False, server_default="0"),
    Column("late_pushes", Id, nullable=False, server_default="0"),
    Column("api_failures", Integer, nullable=False, server_default="0"),
    Column("api_failing_since", Moment),
    Column("api_error", Text),
    Column("api_error_kind", Text),
    Column("api_error_at", Moment),
    Column("api_worked_at", Moment),
    Column("api_notified_at", Moment),
    Column("resume_from", Moment),
    Column("resume_before", Moment),
    comment="What we learned about a source while polling it.",
)

missed_changes = Table(
    "missed_changes",
    metadata,
    Column("key", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("state", Text, primary_key=True),
    Column("source", Text, nullable=False),
    Column("repository", Text),
    Column("missed_at", Moment, nullable=False),
    Column("pushed_late", Boolean, nullable=False),
    Index("ix_missed_changes_missed_at", "missed_at"),
    Index("ix_missed_changes_repository", "source", "repository", "missed_at"),
    comment="Changes that a poll was first to tell, lately.  `pushed_late`: their push came after all.",
)

api_errors = Table(
    "api_errors",
    metadata,
    Column("source", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("count", Id, nullable=False),
    comment="Failed requests to the API of a source, by `PollFault` word, ever.",
)

HISTOGRAM_BUCKETS = tuple(f"n{place}" for place in range(8))

histograms = Table(
    "histograms",
    metadata,
    Column("metric", Text, primary_key=True),
    Column("source", Text, primary_key=True),
    Column("origin", Text, primary_key=True),
    Column("seconds", Float, nullable=False),
    *(Column(name, Id, nullable=False) for name in HISTOGRAM_BUCKETS),
    comment="Durations counted by bucket (not cumulative), and their sum.",
)

places = Table(
    "places",
    metadata,
    Column("source", Text, primary_key=True),
    Column("repository", Text, primary_key=True),
    Column("same_as", Text),
    Column("next_list_at", Moment),
    Column("listed_at", Moment),
    Column("list_clock", Moment),
    Column("wide", Boolean, nullable=False, server_default=text("false")),
    Column("errors", Integer, nullable=False),
    Column("error", Text),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("failing_since", Moment),
    Column("notified_at", Moment),
    Index("ix_places_due", "next_list_at"),
    comment="Repositories whose newest builds are listed.  `list_clock`: the platform's own time of the "
    "last list.  `same_as`: another name of that repository, listed there.",
)

budgets = Table(
    "budgets",
    metadata,
    Column("lane", Text, primary_key=True),
    Column("limit", Integer),
    Column("remaining", Integer),
    Column("reset_at", Moment),
    Column("credit", Float, nullable=False),
    Column("turns", Float, nullable=False),
    Column("reckoned_at", Moment, nullable=False),
    Column("price", Float, nullable=False),
    Column("per_hour", Float, nullable=False),
    Column("strikes", Integer, nullable=False),
    Column("requests", Id, nullable=False),
    Column("counted", Id, nullable=False),
    Column("sources", JSON, nullable=False),
    Column("owner", Text),
    Column("owned_until", Moment),
    Column("wanted_by", Text),
    Column("wanted_until", Moment),
    comment="What a token may still ask, and who reads with it now.",
)

unchanged = Table(
    "unchanged",
    metadata,
    Column("lane", Text, primary_key=True),
    Column("url", Text, primary_key=True),
    Column("token", Text, nullable=False),
    Column("etag", Text, nullable=False),
    Column("shown", JSON, nullable=False),
    Column("read_at", Moment, nullable=False),
    Index("ix_unchanged_read_at", "read_at"),
    comment="ETags, each good for one token, and the keys of the builds that the answer showed.",
)

repositories = Table(
    "repositories",
    metadata,
    Column("source", Text, primary_key=True),
    Column("repository", Text, primary_key=True),
    Column("missed_at", Moment),
    Column("seen_at", Moment),
    comment="Repositories of which a push was missed, and when last.",
)

hooks = Table(
    "hooks",
    metadata,
    Column("source", Text, primary_key=True),
    Column("repository", Text, primary_key=True),
    Column("looked_at", Moment),
    Column("next_look_at", Moment),
    Column("refused", Boolean, nullable=False, server_default=text("false")),
    Column("alert", Text),
    comment="Our webhooks at the platforms, as far as we looked.",
)

redeliveries = Table(
    "redeliveries",
    metadata,
    Column("source", Text, primary_key=True),
    Column("hook_id", Text, primary_key=True),
    Column("guid", Text, primary_key=True),
    Column("asked_at", Moment, nullable=False),
    comment="Deliveries that the platform was asked to send again; once each.",
)

relay = Table(
    "relay",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("alive_at", Moment, nullable=False),
    Column("down_from", Moment),
    Column("down_until", Moment),
    comment="One row: when we last lived, and our last absence.",
)

workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("alive_at", Moment, nullable=False),
    Column("claimed", JSON, nullable=False),
    comment="Workers with messages under way: when each last showed life, and the ids it claimed.",
)

credentials = Table(
    "credentials",
    metadata,
    Column("identity", Text, primary_key=True),
    Column("source", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("tokens", Text),
    Column("expires_at", Moment),
    Column("refreshed_at", Moment),
    Column("refused_at", Moment),
    Column("retry_at", Moment),
    Column("failure", JSON),
    Column("lease", Text),
    Column("leased_until", Moment),
    comment="Tokens that platforms lent us.  `tokens` is sealed JSON; `identity` digests what gets them.",
)

notices = Table(
    "notices",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("read_at", Moment),
    Index("ix_notices_kind", "kind", "subject", "created_at"),
    comment="What admins are told.",
)

collections = Table(
    "collections",
    metadata,
    Column("build", Id, ForeignKey("builds.id", ondelete="CASCADE"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("source", Text, nullable=False),
    Column("wants_log", Boolean, nullable=False),
    Column("due_at", Moment),
    Column("tries", Integer, nullable=False),
    Column("claim", Text),
    Column("log_state", Text),
    Column("log_reason", Text),
    Column("log", LargeBinary),
    Column("log_truncated", Boolean, nullable=False),
    Column("artifacts_state", Text),
    Column("artifacts_reason", Text),
    Column("noted_at", Moment, nullable=False),
    Column("asked", Boolean, nullable=False, server_default=text("false")),
    Index("ix_collections_due", "source", "wants_log", "due_at",
          postgresql_where=text("due_at IS NOT NULL"), sqlite_where=text("due_at IS NOT NULL")),
    Index("ix_collections_asked", "source", "due_at",
          postgresql_where=text("asked AND due_at IS NOT NULL"),
          sqlite_where=text("asked = 1 AND due_at IS NOT NULL")),
    Index("ix_collections_noted_at", "noted_at"),
    comment="What ended attempts left: `log` is zlib compressed; states are null, stored or unavailable.",
)  # fmt: skip

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("build", Id, ForeignKey("builds.id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False),
    Column("ref", Text, nullable=False),
    Column("size_bytes", Id),
    Column("digest", Text),
    Column("digest_by", Text),
    Column("created_at", Moment),
    Column("expires_at", Moment),
    Column("expired", Boolean, nullable=False),
    Column("listed_at", Moment, nullable=False),
    UniqueConstraint("build", "name"),
    Index("ix_artifacts_listed_at", "listed_at"),
    comment="The files of a build, as its platform lists them.  digest_by: platform, or relay (ours).",
)
