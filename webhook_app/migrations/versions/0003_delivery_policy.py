"""Delivery policy: formats and finer filters, pace and health of subscribers, one queue per subscriber."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True)
PENDING, DEAD = sa.text("state = 'pending'"), sa.text("state = 'dead'")


def upgrade() -> None:
    with op.batch_alter_table("subscribers") as table:
        table.add_column(sa.Column("format", sa.Text(), nullable=False, server_default="standard"))
        table.add_column(sa.Column("states", sa.JSON(), nullable=False, server_default="[]"))
        table.add_column(sa.Column("conclusions", sa.JSON(), nullable=False, server_default="[]"))
        table.add_column(sa.Column("changes", sa.JSON(), nullable=False, server_default="[]"))
        table.add_column(sa.Column("origin", sa.Text(), nullable=False, server_default="api"))
        table.add_column(sa.Column("paced_until", MOMENT))
        table.add_column(sa.Column("slow_until", MOMENT))
        table.add_column(sa.Column("on_probation", sa.Boolean(), nullable=False, server_default=sa.false()))
        table.add_column(sa.Column("warned_percent", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("events", sa.Column("change", sa.Text()))
    op.add_column("delivery_attempts", sa.Column("subscriber", sa.Text()))
    op.execute(
        "UPDATE delivery_attempts SET subscriber = "
        "(SELECT subscriber FROM messages WHERE messages.id = delivery_attempts.message)"
    )
    op.create_index("ix_delivery_attempts_subscriber", "delivery_attempts", ["subscriber", "id"])
    op.drop_index("ix_messages_due", "messages")
    op.create_index(
        "ix_messages_due",
        "messages",
        ["subscriber", "due_at", "id"],
        postgresql_where=PENDING,
        sqlite_where=PENDING,
    )
    op.create_index(
        "ix_messages_dead", "messages", ["subscriber", "id"], postgresql_where=DEAD, sqlite_where=DEAD
    )
    op.create_index("ix_builds_line", "builds", ["source", "repository", "workflow", "branch", "id"])


def downgrade() -> None:
    op.drop_index("ix_builds_line", "builds")
    op.drop_index("ix_messages_dead", "messages")
    op.drop_index("ix_messages_due", "messages")
    op.create_index(
        "ix_messages_due", "messages", ["due_at", "id"], postgresql_where=PENDING, sqlite_where=PENDING
    )
    op.drop_index("ix_delivery_attempts_subscriber", "delivery_attempts")
    op.drop_column("delivery_attempts", "subscriber")
    op.drop_column("events", "change")
    with op.batch_alter_table("subscribers") as table:
        for column in (
            "format", "states", "conclusions", "changes", "origin", "paced_until", "slow_until",
            "on_probation", "warned_percent",
        ):  # fmt: skip
            table.drop_column(column)
