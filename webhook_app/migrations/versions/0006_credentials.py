"""Tokens that platforms lend for a time: GitHub App installations, GitLab OAuth."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "credentials",
        sa.Column("identity", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.Text()),
        sa.Column("expires_at", MOMENT),
        sa.Column("refreshed_at", MOMENT),
        sa.Column("refused_at", MOMENT),
        sa.Column("retry_at", MOMENT),
        sa.Column("failure", sa.JSON()),
        sa.Column("lease", sa.Text()),
        sa.Column("leased_until", MOMENT),
        sa.PrimaryKeyConstraint("identity", name="pk_credentials"),
        comment="Tokens that platforms lent us.  `tokens` is sealed JSON; `identity` digests what gets them.",
    )


def downgrade() -> None:
    op.drop_table("credentials")
