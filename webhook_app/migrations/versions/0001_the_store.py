"""The store: builds, events, inbound bodies, subscribers, messages."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "builds",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("build_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("lookup", sa.Text(), nullable=False),
        sa.Column("group_key", sa.Text(), nullable=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("platform", sa.Text(), nullable=False),
        sa.Column("repository", sa.Text(), nullable=True),
        sa.Column("workflow", sa.Text(), nullable=True),
        sa.Column("branch", sa.Text(), nullable=True),
        sa.Column("commit", sa.Text(), nullable=True),
        sa.Column("number", ID, nullable=True),
        sa.Column("url", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("told_state", sa.Text(), nullable=False),
        sa.Column("conclusion", sa.Text(), nullable=True),
        sa.Column("raw_status", sa.Text(), nullable=True),
        sa.Column("raw_conclusion", sa.Text(), nullable=True),
        sa.Column("waiting", sa.Boolean(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("started_at", MOMENT, nullable=True),
        sa.Column("ended_at", MOMENT, nullable=True),
        sa.Column("platform_at", MOMENT, nullable=True),
        sa.Column("jobs", sa.JSON(), nullable=False),
        sa.Column("jobs_complete", sa.Boolean(), nullable=False),
        sa.Column("progress", sa.Integer(), nullable=False),
        sa.Column("progress_basis", sa.Text(), nullable=False),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.Column("preview_url", sa.Text(), nullable=True),
        sa.Column("observed_by", sa.Text(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("last_push_at", MOMENT, nullable=True),
        sa.Column("last_poll_at", MOMENT, nullable=True),
        sa.Column("polling", sa.Text(), nullable=False),
        sa.Column("poll_count", sa.Integer(), nullable=False),
        sa.Column("poll_deadline_at", MOMENT, nullable=True),
        sa.Column("next_poll_at", MOMENT, nullable=True),
        sa.Column("consecutive_errors", sa.Integer(), nullable=False),
        sa.Column("poll_error", sa.Text(), nullable=True),
        sa.Column("doubtful", sa.Boolean(), nullable=False),
        sa.Column("requested", sa.Boolean(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_builds")),
        sa.UniqueConstraint("key", name=op.f("uq_builds_key")),
        sa.UniqueConstraint("lookup", name=op.f("uq_builds_lookup")),
    )
    with op.batch_alter_table("builds", schema=None) as batch_op:
        batch_op.create_index(
            "ix_builds_due",
            ["next_poll_at"],
            unique=False,
            postgresql_where=sa.text("next_poll_at IS NOT NULL"),
            sqlite_where=sa.text("next_poll_at IS NOT NULL"),
        )
        batch_op.create_index(
            "ix_builds_group_key",
            ["group_key"],
            unique=False,
            postgresql_where=sa.text("group_key IS NOT NULL"),
            sqlite_where=sa.text("group_key IS NOT NULL"),
        )
        batch_op.create_index("ix_builds_repository", ["source", "repository", "id"], unique=False)

    op.create_table(
        "counters",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("builds", ID, nullable=False),
        sa.Column("events", ID, nullable=False),
        sa.Column("messages", ID, nullable=False),
        sa.Column("inbound", ID, nullable=False),
        sa.Column("subscribers_revision", ID, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_counters")),
        comment="One row: the last id given out per table.  Whoever holds its lock is the writer.",
    )
    op.create_table(
        "subscribers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("events", sa.JSON(), nullable=False),
        sa.Column("sources", sa.JSON(), nullable=False),
        sa.Column("repositories", sa.JSON(), nullable=False),
        sa.Column("branches", sa.JSON(), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("rate_limit_per_second", sa.Integer(), nullable=True),
        sa.Column("ordered", sa.Boolean(), nullable=False),
        sa.Column("headers", sa.Text(), nullable=True),
        sa.Column("signing", sa.Text(), nullable=False),
        sa.Column("secrets", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("disabled_reason", sa.Text(), nullable=True),
        sa.Column("failing_since", MOMENT, nullable=True),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_subscribers")),
        comment="`headers` and `secrets` are sealed JSON.",
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("digest", name=op.f("uq_tokens_digest")),
        comment="API tokens; only a SHA-256 digest is kept.",
    )
    op.create_table(
        "attempts",
        sa.Column("build", ID, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("conclusion", sa.Text(), nullable=True),
        sa.Column("started_at", MOMENT, nullable=True),
        sa.Column("ended_at", MOMENT, nullable=True),
        sa.Column("progress", sa.Integer(), nullable=False),
        sa.Column("observed_by", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["build"], ["builds.id"], name=op.f("fk_attempts_build"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("build", "attempt", name=op.f("pk_attempts")),
        comment="Attempts that a later one has superseded, as they stood then.",
    )
    op.create_table(
        "events",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("build", ID, nullable=True),
        sa.Column("sequence", sa.Integer(), nullable=True),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("observed_by", sa.Text(), nullable=False),
        sa.Column("timestamp", MOMENT, nullable=False),
        sa.ForeignKeyConstraint(["build"], ["builds.id"], name=op.f("fk_events_build"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        sa.UniqueConstraint("build", "sequence", name=op.f("uq_events_build_sequence")),
        comment="Append-only.  `data` is the body subscribers get, less event_id and sequence.",
    )
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.create_index("ix_events_timestamp", ["timestamp"], unique=False)

    op.create_table(
        "inbound",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("delivery_key", sa.Text(), nullable=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("hook_id", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("delivery_id", sa.Text(), nullable=False),
        sa.Column("headers", sa.JSON(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("build", ID, nullable=True),
        sa.Column("received_at", MOMENT, nullable=False),
        sa.ForeignKeyConstraint(["build"], ["builds.id"], name=op.f("fk_inbound_build"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_inbound")),
        sa.UniqueConstraint("delivery_key", name=op.f("uq_inbound_delivery_key")),
        comment="Every verified delivery as it came; `body` is zlib compressed.",
    )
    with op.batch_alter_table("inbound", schema=None) as batch_op:
        batch_op.create_index("ix_inbound_build", ["build"], unique=False)
        batch_op.create_index("ix_inbound_received_at", ["received_at"], unique=False)

    op.create_table(
        "messages",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("message_id", sa.Text(), nullable=False),
        sa.Column("subscriber", sa.Text(), nullable=False),
        sa.Column("event", ID, nullable=False),
        sa.Column("build", ID, nullable=True),
        sa.Column("sequence", sa.Integer(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", MOMENT, nullable=True),
        sa.Column("claim", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("settled_at", MOMENT, nullable=True),
        sa.ForeignKeyConstraint(["build"], ["builds.id"], name=op.f("fk_messages_build"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["event"], ["events.id"], name=op.f("fk_messages_event"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["subscriber"], ["subscribers.id"], name=op.f("fk_messages_subscriber"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_messages")),
        sa.UniqueConstraint("message_id", name=op.f("uq_messages_message_id")),
        sa.UniqueConstraint("subscriber", "event", name=op.f("uq_messages_subscriber_event")),
        comment="The outbox: one event for one subscriber.  state: pending, delivered, dead.",
    )
    with op.batch_alter_table("messages", schema=None) as batch_op:
        batch_op.create_index(
            "ix_messages_due",
            ["due_at", "id"],
            unique=False,
            postgresql_where=sa.text("state = 'pending'"),
            sqlite_where=sa.text("state = 'pending'"),
        )
        batch_op.create_index("ix_messages_event", ["event"], unique=False)
        batch_op.create_index(
            "ix_messages_lane",
            ["subscriber", "build", "sequence"],
            unique=False,
            postgresql_where=sa.text("state = 'pending'"),
            sqlite_where=sa.text("state = 'pending'"),
        )

    op.create_table(
        "delivery_attempts",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("message", ID, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("duration_ms", sa.Integer(), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("response", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["message"], ["messages.id"], name=op.f("fk_delivery_attempts_message"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_delivery_attempts")),
        comment="One HTTP try of a message.",
    )
    with op.batch_alter_table("delivery_attempts", schema=None) as batch_op:
        batch_op.create_index("ix_delivery_attempts_message", ["message"], unique=False)
    op.execute(
        "INSERT INTO counters (id, builds, events, messages, inbound, subscribers_revision) "
        "VALUES (1, 0, 0, 0, 0, 0)"
    )


def downgrade() -> None:
    for table in (
        "delivery_attempts",
        "messages",
        "inbound",
        "events",
        "attempts",
        "tokens",
        "subscribers",
        "counters",
        "builds",
    ):
        op.drop_table(table)
