"""The index of lanes holds messages of builds alone, so no plan can take it for a subscriber's queue."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

PENDING = "state = 'pending'"


def upgrade() -> None:
    _index_lanes(f"{PENDING} AND build IS NOT NULL")


def downgrade() -> None:
    _index_lanes(PENDING)


def _index_lanes(which: str) -> None:
    where = sa.text(which)
    op.drop_index("ix_messages_lane", "messages")
    op.create_index(
        "ix_messages_lane",
        "messages",
        ["subscriber", "build", "sequence"],
        postgresql_where=where,
        sqlite_where=where,
    )
