"""Merge pgebus.

Written by `alembic merge heads -m "merge pgebus"`: one head for our history and that of pgebus.
"""

from __future__ import annotations

revision = "shop_0003"
down_revision = ("shop_0002", "pgebus_0001")
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change nothing."""


def downgrade() -> None:
    """Change nothing."""
