"""Subscribers get a circuit breaker and a sealed URL; claims belong to workers that show they live."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column(
        "subscribers", sa.Column("failures_in_row", sa.Integer(), nullable=False, server_default="0")
    )
    op.add_column("subscribers", sa.Column("probe_at", MOMENT))
    op.add_column("subscribers", sa.Column("probe_wait_seconds", sa.Float()))
    op.add_column("subscribers", sa.Column("concurrency_limit", sa.Integer()))
    op.add_column("subscribers", sa.Column("sealed_url", sa.Text()))
    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("alive_at", MOMENT, nullable=False),
        sa.Column("claimed", sa.JSON(), nullable=False),
        comment="Workers with messages under way: when each last showed life, and the ids it claimed.",
    )


def downgrade() -> None:
    op.drop_table("workers")
    for name in ("sealed_url", "concurrency_limit", "probe_wait_seconds", "probe_at", "failures_in_row"):
        op.drop_column("subscribers", name)
