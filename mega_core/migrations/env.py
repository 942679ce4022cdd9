"""What alembic runs for every migration: the notebook hands its open connection in, so no address is configured."""

from __future__ import annotations

from alembic import context


def migrate() -> None:
    """Run the migrations in the transaction of the connection that the notebook gave."""
    context.configure(connection=context.config.attributes["connection"], render_as_batch=True, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()


migrate()
