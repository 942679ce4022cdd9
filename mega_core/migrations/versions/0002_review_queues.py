"""Review queues: which runs are in them, and what each reviewer says of each."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "review_queues",
        sa.Column("token", sa.String(64), primary_key=True),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("review_queues_owner", "review_queues", ["owner", "created"])
    op.create_table(
        "review_items",
        sa.Column("queue", sa.String(64), sa.ForeignKey("review_queues.token", ondelete="CASCADE"), primary_key=True),
        sa.Column("digest", sa.String(64), sa.ForeignKey("runs.digest", ondelete="CASCADE"), primary_key=True),
        sa.Column("place", sa.Integer, nullable=False),
    )
    op.create_index("review_items_digest", "review_items", ["digest"])
    op.create_table(
        "review_labels",
        sa.Column("queue", sa.String(64), primary_key=True),
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("reviewer", sa.Text, primary_key=True),
        sa.Column("verdict", sa.Text, nullable=False),
        sa.Column("failure", sa.Text, nullable=False),
        sa.Column("severity", sa.Integer, nullable=False),
        sa.Column("tags", sa.Text, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("updated", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["queue", "digest"], ["review_items.queue", "review_items.digest"], ondelete="CASCADE"),
    )


def downgrade() -> None:
    for table in ("review_labels", "review_items", "review_queues"):
        op.drop_table(table)
