"""Single requests have their turn among rounds, what a person asked for and what no list shows is known."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("budgets", sa.Column("wanted_by", sa.Text()))
    op.add_column("budgets", sa.Column("wanted_until", sa.DateTime(timezone=True)))
    op.add_column("collections", sa.Column("asked", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index(
        "ix_collections_asked",
        "collections",
        ["source", "due_at"],
        postgresql_where=sa.text("asked AND due_at IS NOT NULL"),
        sqlite_where=sa.text("asked = 1 AND due_at IS NOT NULL"),
    )
    op.add_column("builds", sa.Column("unlisted", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    op.drop_column("builds", "unlisted")
    op.drop_index("ix_collections_asked", "collections")
    op.drop_column("collections", "asked")
    op.drop_column("budgets", "wanted_until")
    op.drop_column("budgets", "wanted_by")
