"""Large replays and redrives are rows that say how far they have come."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True)
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "recoveries",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("subscriber", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("since", MOMENT),
        sa.Column("until", MOMENT),
        sa.Column("only_missing", sa.Boolean(), nullable=False),
        sa.Column("after", ID, nullable=False),
        sa.Column("last", ID, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_recoveries")),
        sa.ForeignKeyConstraint(
            ["subscriber"], ["subscribers.id"], name=op.f("fk_recoveries_subscriber"), ondelete="CASCADE"
        ),
        comment="Replays of events and redrives of messages: done up to id `after`, to do up to `last`.",
    )


def downgrade() -> None:
    op.drop_table("recoveries")
