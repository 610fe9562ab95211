"""Events of orders."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "shop_0002"
down_revision = "shop_0001"
branch_labels = None
# The table that is changed here is made by pgebus: its revision comes first.
depends_on = "pgebus_0002"


def upgrade() -> None:
    """Add the column of OrderPlaced to the table of events, as autogenerate finds it."""
    op.add_column("events", sa.Column("order_id", sa.Integer(), nullable=True), schema="pgebus")
    op.create_index(op.f("ix_events_order_id"), "events", ["order_id"], schema="pgebus")
    op.create_foreign_key(op.f("fk_events_order_id"), "events", "orders", ["order_id"], ["id"], source_schema="pgebus")


def downgrade() -> None:
    """Drop the column."""
    op.drop_constraint(op.f("fk_events_order_id"), "events", schema="pgebus", type_="foreignkey")
    op.drop_index(op.f("ix_events_order_id"), table_name="events", schema="pgebus")
    op.drop_column("events", "order_id", schema="pgebus")
