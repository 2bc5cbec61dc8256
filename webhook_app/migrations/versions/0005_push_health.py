"""Push health: what pushes told and what only polls found, when we were away, webhooks at the platforms."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True)
COUNTS = ("pushes", "polls", "changes_pushed", "changes_polled")
RUNS = ("missed_in_row", "refused_in_row")
MOMENTS = ("since", "last_push_at", "last_poll_at", "last_missed_at", "deaf_since")


def upgrade() -> None:
    with op.batch_alter_table("sources") as table:
        for name in COUNTS:
            table.add_column(sa.Column(name, ID, nullable=False, server_default="0"))
        for name in RUNS:
            table.add_column(sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
        table.add_column(sa.Column("push_share", sa.Float()))
        for name in MOMENTS:
            table.add_column(sa.Column(name, MOMENT))
    _take_over()
    op.create_table(
        "repositories",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("repository", sa.Text(), nullable=False),
        sa.Column("missed_at", MOMENT),
        sa.Column("seen_at", MOMENT),
        sa.PrimaryKeyConstraint("source", "repository", name=op.f("pk_repositories")),
        comment="Repositories of which a push was missed, and when last.",
    )
    op.create_table(
        "hooks",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("repository", sa.Text(), nullable=False),
        sa.Column("looked_at", MOMENT),
        sa.Column("next_look_at", MOMENT),
        sa.Column("refused", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("alert", sa.Text()),
        sa.PrimaryKeyConstraint("source", "repository", name=op.f("pk_hooks")),
        comment="Our webhooks at the platforms, as far as we looked.",
    )
    op.create_table(
        "redeliveries",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("hook_id", sa.Text(), nullable=False),
        sa.Column("guid", sa.Text(), nullable=False),
        sa.Column("asked_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("source", "hook_id", "guid", name=op.f("pk_redeliveries")),
        comment="Deliveries that the platform was asked to send again; once each.",
    )
    op.create_table(
        "relay",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("alive_at", MOMENT, nullable=False),
        sa.Column("down_from", MOMENT),
        sa.Column("down_until", MOMENT),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_relay")),
        comment="One row: when we last lived, and our last absence.",
    )


def _take_over() -> None:
    """What the builds know of their sources."""
    op.execute(
        "INSERT INTO sources (name) SELECT DISTINCT source FROM builds "
        "WHERE source NOT IN (SELECT name FROM sources)"
    )
    for name in ("last_push_at", "last_poll_at"):
        latest = f"SELECT max({name}) FROM builds WHERE source = sources.name"  # noqa: S608
        op.execute(f"UPDATE sources SET {name} = ({latest})")  # noqa: S608


def downgrade() -> None:
    for name in ("relay", "redeliveries", "hooks", "repositories"):
        op.drop_table(name)
    with op.batch_alter_table("sources") as table:
        for name in (*COUNTS, *RUNS, "push_share", *MOMENTS):
            table.drop_column(name)
