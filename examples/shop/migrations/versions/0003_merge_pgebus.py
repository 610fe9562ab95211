"""Merge pgebus.

Made by `alembic merge shop_0002 pgebus@head`: one head for our history and that of pgebus. Not `merge heads`, which
leaves out a head that another revision depends on.
"""

from __future__ import annotations

revision = "shop_0003"
down_revision = ("shop_0002", "pgebus_0002")
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change nothing."""


def downgrade() -> None:
    """Change nothing."""
