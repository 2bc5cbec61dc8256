"""Builds keep what started them, whose branch it is, which use of an identity they are, and whose times."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("builds", sa.Column("trigger", sa.Text()))
    op.add_column("builds", sa.Column("head_repository", sa.Text()))
    op.add_column("builds", _flag("is_fork"))
    op.add_column("builds", sa.Column("queue_id", sa.Text()))
    op.add_column("builds", sa.Column("platform_created_at", MOMENT))
    op.add_column("builds", _count("attempt_base"))
    op.add_column("builds", _flag("started_synthetic"))
    op.add_column("builds", _flag("ended_synthetic"))
    op.add_column("builds", sa.Column("missing_since", MOMENT))
    op.add_column("builds", _count("reads_after_end"))
    op.add_column("attempts", _flag("started_synthetic"))
    op.add_column("attempts", _flag("ended_synthetic"))
    op.add_column("subscribers", _flag("forks"))
    op.add_column("delivery_attempts", sa.Column("note", sa.Text()))


def _flag(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean(), nullable=False, server_default=sa.false())


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=False, server_default="0")


def downgrade() -> None:
    op.drop_column("delivery_attempts", "note")
    op.drop_column("subscribers", "forks")
    for name in ("ended_synthetic", "started_synthetic"):
        op.drop_column("attempts", name)
    for name in (
        "reads_after_end", "missing_since", "ended_synthetic", "started_synthetic", "attempt_base",
        "platform_created_at", "queue_id", "is_fork", "head_repository", "trigger",
    ):  # fmt: skip
        op.drop_column("builds", name)
