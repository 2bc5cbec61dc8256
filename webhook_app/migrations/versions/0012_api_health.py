"""Sources keep how their API answers and how reliably pushes come; builds given up on are read again."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True)
COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
BUCKETS = 8

SOURCE_MOMENTS = (
    "push_notice_at", "api_error_at", "api_failing_since", "api_notified_at", "api_worked_at", "resume_from",
    "resume_before",
)  # fmt: skip
PLACE_MOMENTS = ("failing_since", "notified_at")


def upgrade() -> None:
    for name in SOURCE_MOMENTS:
        op.add_column("sources", sa.Column(name, MOMENT))
    op.add_column("sources", sa.Column("api_error", sa.Text()))
    op.add_column("sources", sa.Column("api_error_kind", sa.Text()))
    op.add_column("sources", _count("api_failures", sa.Integer()))
    op.add_column("sources", _count("late_pushes", COUNT))
    op.add_column("sources", _count("pushed_in_row", sa.Integer()))
    op.add_column("places", _count("failures", sa.Integer()))
    for name in PLACE_MOMENTS:
        op.add_column("places", sa.Column(name, MOMENT))
    op.create_table(
        "missed_changes",
        sa.Column("key", sa.Text(), primary_key=True),
        sa.Column("attempt", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("state", sa.Text(), primary_key=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("repository", sa.Text()),
        sa.Column("missed_at", MOMENT, nullable=False),
        sa.Column("pushed_late", sa.Boolean(), nullable=False),
        comment="Changes that a poll was first to tell, lately.  `pushed_late`: their push came after all.",
    )
    op.create_index("ix_missed_changes_missed_at", "missed_changes", ["missed_at"])
    op.create_index("ix_missed_changes_repository", "missed_changes", ["source", "repository", "missed_at"])
    op.create_table(
        "api_errors",
        sa.Column("source", sa.Text(), primary_key=True),
        sa.Column("kind", sa.Text(), primary_key=True),
        sa.Column("count", COUNT, nullable=False),
        comment="Failed requests to the API of a source, by `PollFault` word, ever.",
    )
    op.create_table(
        "histograms",
        sa.Column("metric", sa.Text(), primary_key=True),
        sa.Column("source", sa.Text(), primary_key=True),
        sa.Column("origin", sa.Text(), primary_key=True),
        sa.Column("seconds", sa.Float(), nullable=False),
        *(sa.Column(f"n{place}", COUNT, nullable=False) for place in range(BUCKETS)),
        comment="Durations counted by bucket (not cumulative), and their sum.",
    )
    op.create_index("ix_notices_kind", "notices", ["kind", "subject", "created_at"])
    _read_again()


def _count(name: str, kind: sa.types.TypeEngine[int]) -> sa.Column[int]:
    return sa.Column(name, kind, nullable=False, server_default="0")


def _read_again() -> None:
    """Builds that polling gave up on, or that we ended ourselves, had no next poll: they have one now."""
    names = ("polling", "state", "told_state", "platform", "next_poll_at", "poll_deadline_at", "updated_at")
    builds = sa.table("builds", *map(sa.column, names))
    goes_on = ("queued", "in_progress")
    stopped = sa.and_(builds.c.polling == "error", builds.c.state.in_(goes_on))
    ended_by_us = sa.and_(
        builds.c.state.not_in(goes_on),
        builds.c.told_state.in_(goes_on),
        builds.c.platform != "script",
        builds.c.polling != "stopped",
    )
    op.execute(
        sa.update(builds)
        .where(builds.c.next_poll_at.is_(None), sa.or_(stopped, ended_by_us))
        .values(next_poll_at=builds.c.updated_at, poll_deadline_at=None)
    )


def downgrade() -> None:
    op.drop_index("ix_notices_kind", "notices")
    for table in ("histograms", "api_errors", "missed_changes"):
        op.drop_table(table)
    for name in ("notified_at", "failing_since", "failures"):
        op.drop_column("places", name)
    for name in (
        "pushed_in_row", "late_pushes", "api_failures", "api_error_kind", "api_error",
        *SOURCE_MOMENTS,
    ):  # fmt: skip
        op.drop_column("sources", name)
