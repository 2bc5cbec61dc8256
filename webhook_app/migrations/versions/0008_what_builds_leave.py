"""What an ended attempt leaves behind: its log, and the list of its artifacts."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True)
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
DUE = sa.text("due_at IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "collections",
        sa.Column("build", ID, sa.ForeignKey("builds.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("attempt", sa.Integer(), primary_key=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("wants_log", sa.Boolean(), nullable=False),
        sa.Column("due_at", MOMENT),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("claim", sa.Text()),
        sa.Column("log_state", sa.Text()),
        sa.Column("log_reason", sa.Text()),
        sa.Column("log", sa.LargeBinary()),
        sa.Column("log_truncated", sa.Boolean(), nullable=False),
        sa.Column("artifacts_state", sa.Text()),
        sa.Column("artifacts_reason", sa.Text()),
        sa.Column("noted_at", MOMENT, nullable=False),
        comment="What ended attempts left: `log` is zlib compressed; states are null, stored or unavailable.",
    )
    op.create_index(
        "ix_collections_due",
        "collections",
        ["source", "wants_log", "due_at"],
        postgresql_where=DUE,
        sqlite_where=DUE,
    )
    op.create_index("ix_collections_noted_at", "collections", ["noted_at"])
    op.create_table(
        "artifacts",
        sa.Column("id", ID, primary_key=True, autoincrement=True),
        sa.Column("build", ID, sa.ForeignKey("builds.id", ondelete="CASCADE"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("ref", sa.Text(), nullable=False),
        sa.Column("size_bytes", ID),
        sa.Column("digest", sa.Text()),
        sa.Column("digest_by", sa.Text()),
        sa.Column("created_at", MOMENT),
        sa.Column("expires_at", MOMENT),
        sa.Column("expired", sa.Boolean(), nullable=False),
        sa.Column("listed_at", MOMENT, nullable=False),
        sa.UniqueConstraint("build", "name"),
        comment="The files of a build, as its platform lists them.  digest_by: platform, or relay (ours).",
    )
    op.create_index("ix_artifacts_listed_at", "artifacts", ["listed_at"])


def downgrade() -> None:
    op.drop_table("artifacts")
    op.drop_table("collections")
