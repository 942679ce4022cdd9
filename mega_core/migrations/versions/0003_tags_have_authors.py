"""Tags belong to whoever wrote them; those there were go to the session that asked the run last."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def _of_run() -> sa.Column[str]:
    return sa.Column("digest", sa.String(64), sa.ForeignKey("runs.digest", ondelete="CASCADE"), primary_key=True)


def upgrade() -> None:
    rows = op.get_bind().execute(
        sa.text("SELECT tags.digest, runs.session, tags.tag FROM tags JOIN runs ON runs.digest = tags.digest")
    )
    held = [{"digest": digest, "author": author, "tag": tag} for digest, author, tag in rows]
    op.drop_table("tags")
    made = op.create_table(
        "tags",
        _of_run(),
        sa.Column("author", sa.Text, primary_key=True),
        sa.Column("tag", sa.Text, primary_key=True),
    )
    op.create_index("tags_tag", "tags", ["tag"])
    op.bulk_insert(made, held)


def downgrade() -> None:
    held = [
        {"digest": digest, "tag": tag}
        for digest, tag in op.get_bind().execute(sa.text("SELECT DISTINCT digest, tag FROM tags"))
    ]
    op.drop_table("tags")
    made = op.create_table("tags", _of_run(), sa.Column("tag", sa.Text, primary_key=True))
    op.create_index("tags_tag", "tags", ["tag"])
    op.bulk_insert(made, held)
