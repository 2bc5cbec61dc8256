"""What polling learned about a source, what admins are told, and a list of unreadable bodies."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "notices",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("read_at", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notices")),
        comment="What admins are told.",
    )
    op.create_table(
        "sources",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("paused_until", MOMENT, nullable=True),
        sa.Column("pause_reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_sources")),
        comment="What we learned about a source while polling it.",
    )
    op.create_index("ix_builds_source", "builds", ["source", "id"])
    op.create_index("ix_builds_created_at", "builds", ["created_at"])
    op.create_index(
        "ix_inbound_unreadable",
        "inbound",
        ["id"],
        postgresql_where=sa.text("status = 'unreadable'"),
        sqlite_where=sa.text("status = 'unreadable'"),
    )


def downgrade() -> None:
    op.drop_index("ix_inbound_unreadable", "inbound")
    op.drop_index("ix_builds_created_at", "builds")
    op.drop_index("ix_builds_source", "builds")
    op.drop_table("sources")
    op.drop_table("notices")
