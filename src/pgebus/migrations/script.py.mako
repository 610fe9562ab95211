"""${message}"""

from __future__ import annotations

from typing import Final

from alembic import op
${imports if imports else ""}
from pgebus.migrations.place import execute

# Ours begin with `pgebus_`: alembic revision --rev-id pgebus_0002 …
revision = ${repr(up_revision)}
down_revision: str | None = ${repr(down_revision)}
# The newest revision alone carries the label: take it away from the one before.
branch_labels: tuple[str, ...] | None = ("pgebus",)
depends_on: str | None = ${repr(depends_on)}

STATEMENTS: Final[tuple[str, ...]] = ()


def upgrade() -> None:
    """Do it."""
    execute(op.get_context(), *STATEMENTS)
    ${upgrades if upgrades else ""}


def downgrade() -> None:
    """Undo it."""
    ${downgrades if downgrades else "pass"}
