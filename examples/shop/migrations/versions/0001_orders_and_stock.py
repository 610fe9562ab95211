"""Orders and stock."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "shop_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make our tables; they know nothing of events."""
    op.create_table(
        "stock",
        sa.Column("item", sa.String(), nullable=False),
        sa.Column("available", sa.Integer(), nullable=False),
        sa.CheckConstraint("available >= 0", name=op.f("ck_stock_available")),
        sa.PrimaryKeyConstraint("item", name=op.f("pk_stock")),
    )
    op.create_table(
        "orders",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("customer", sa.String(), nullable=False),
        sa.Column("item", sa.String(), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.CheckConstraint("quantity > 0", name=op.f("ck_orders_quantity")),
        sa.ForeignKeyConstraint(["item"], ["stock.item"], name=op.f("fk_orders_item")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_orders")),
    )
    op.create_index(op.f("ix_orders_customer"), "orders", ["customer"])


def downgrade() -> None:
    """Drop our tables."""
    op.drop_index(op.f("ix_orders_customer"), table_name="orders")
    op.drop_table("orders")
    op.drop_table("stock")
