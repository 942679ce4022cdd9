"""First tables: runs, visits, notes, tags, verdicts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _of_run() -> sa.Column[str]:
    return sa.Column("digest", sa.String(64), sa.ForeignKey("runs.digest", ondelete="CASCADE"), primary_key=True)


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("session", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("method", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("template", sa.Text, nullable=False),
        sa.Column("target_new", sa.Text, nullable=False),
        sa.Column("target_true", sa.Text),
        sa.Column("edits", sa.Integer, nullable=False),
        sa.Column("verdict", sa.Text, nullable=False),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("search", sa.Text, nullable=False),
    )
    op.create_index("runs_created", "runs", ["created"])
    op.create_index("runs_method", "runs", ["method", "model"])
    op.create_table(
        "visits",
        _of_run(),
        sa.Column("session", sa.Text, primary_key=True),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("visits_session", "visits", ["session", "created"])
    op.create_table(
        "notes",
        _of_run(),
        sa.Column("author", sa.Text, primary_key=True),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table("tags", _of_run(), sa.Column("tag", sa.Text, primary_key=True))
    op.create_index("tags_tag", "tags", ["tag"])
    op.create_table(
        "verdicts",
        _of_run(),
        sa.Column("author", sa.Text, primary_key=True),
        sa.Column("verdict", sa.Text, nullable=False),
        sa.Column("failure", sa.Text, nullable=False),
        sa.Column("severity", sa.Integer, nullable=False),
        sa.Column("updated", sa.DateTime(timezone=True), nullable=False),
    )


def downgrade() -> None:
    for table in ("verdicts", "tags", "notes", "visits", "runs"):
        op.drop_table(table)
