"""Builds of a repository are read together: places, budgets of tokens, ETags."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True)
OPEN = sa.text("next_poll_at IS NOT NULL")


def upgrade() -> None:
    op.add_column("builds", sa.Column("poll_fault", sa.Text()))
    op.add_column("builds", sa.Column("watched_at", MOMENT))
    op.drop_index("ix_builds_due", "builds")
    _index("ix_builds_due", ["next_poll_at", "source", "repository"])
    _index("ix_builds_open", ["source", "repository"])
    op.create_table(
        "places",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("repository", sa.Text(), nullable=False),
        sa.Column("same_as", sa.Text()),
        sa.Column("next_list_at", MOMENT),
        sa.Column("listed_at", MOMENT),
        sa.Column("list_clock", MOMENT),
        sa.Column("wide", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("errors", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("source", "repository", name=op.f("pk_places")),
        comment="Repositories whose newest builds are listed.  `list_clock`: the platform's own time of the "
        "last list.  `same_as`: another name of that repository, listed there.",
    )
    op.create_index("ix_places_due", "places", ["next_list_at"])
    op.create_table(
        "budgets",
        sa.Column("lane", sa.Text(), nullable=False),
        sa.Column("limit", sa.Integer()),
        sa.Column("remaining", sa.Integer()),
        sa.Column("reset_at", MOMENT),
        sa.Column("credit", sa.Float(), nullable=False),
        sa.Column("turns", sa.Float(), nullable=False),
        sa.Column("reckoned_at", MOMENT, nullable=False),
        sa.Column("price", sa.Float(), nullable=False),
        sa.Column("per_hour", sa.Float(), nullable=False),
        sa.Column("strikes", sa.Integer(), nullable=False),
        sa.Column("requests", ID, nullable=False),
        sa.Column("counted", ID, nullable=False),
        sa.Column("sources", sa.JSON(), nullable=False),
        sa.Column("owner", sa.Text()),
        sa.Column("owned_until", MOMENT),
        sa.PrimaryKeyConstraint("lane", name=op.f("pk_budgets")),
        comment="What a token may still ask, and who reads with it now.",
    )
    op.create_table(
        "unchanged",
        sa.Column("lane", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("etag", sa.Text(), nullable=False),
        sa.Column("shown", sa.JSON(), nullable=False),
        sa.Column("read_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("lane", "url", name=op.f("pk_unchanged")),
        comment="ETags, each good for one token, and the keys of the builds that the answer showed.",
    )
    op.create_index("ix_unchanged_read_at", "unchanged", ["read_at"])


def _index(name: str, columns: list[str]) -> None:
    op.create_index(name, "builds", columns, postgresql_where=OPEN, sqlite_where=OPEN)


def downgrade() -> None:
    for table in ("unchanged", "budgets", "places"):
        op.drop_table(table)
    op.drop_index("ix_builds_open", "builds")
    op.drop_index("ix_builds_due", "builds")
    _index("ix_builds_due", ["next_poll_at"])
    op.drop_column("builds", "watched_at")
    op.drop_column("builds", "poll_fault")
