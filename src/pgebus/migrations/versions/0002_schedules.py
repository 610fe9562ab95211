"""Schedules: up to which time each was published, so that a cluster publishes each time once. And what workers keep.

Nothing that the release before uses is changed: its processes go on while this revision is there.
"""

from __future__ import annotations

from alembic import op

from pgebus.migrations.place import execute

revision = "pgebus_0002"
down_revision: str | None = "pgebus_0001"
# The label belongs to the newest revision alone: left on an older one, `upgrade pgebus@head` has several
# heads to choose from as soon as a host has merged our branch into its own.
branch_labels: tuple[str, ...] | None = ("pgebus",)
depends_on: str | None = None


def upgrade() -> None:
    """Create the table and the column."""
    execute(
        op.get_context(),
        """
CREATE TABLE {schema}.schedules (
  channel text COLLATE "C" NOT NULL CONSTRAINT ck_schedules_channel CHECK (octet_length(channel) BETWEEN 1 AND 63),
  type text COLLATE "C" NOT NULL CONSTRAINT ck_schedules_type
    CHECK (octet_length(type) <= 255 AND type ~ '^[A-Za-z0-9_-]+(\\.[A-Za-z0-9_-]+)*$'),
  cron text COLLATE "C" NOT NULL CONSTRAINT ck_schedules_cron CHECK (octet_length(cron) BETWEEN 1 AND 255),
  timezone text COLLATE "C" NOT NULL CONSTRAINT ck_schedules_timezone
    CHECK (octet_length(timezone) BETWEEN 1 AND 255),
  last_at timestamptz NOT NULL DEFAULT now(),
  declared_at timestamptz NOT NULL DEFAULT now(),
  created_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT pk_schedules PRIMARY KEY (channel, type, cron, timezone)
)
""",
        # What each worker's settings say, so that none deletes what another one would still keep.
        "ALTER TABLE {schema}.workers ADD COLUMN retention jsonb",
        "CREATE OR REPLACE FUNCTION {schema}.schema_version() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 2'",
    )


def downgrade() -> None:
    """Drop the table and the column; what the clock has published stays."""
    execute(
        op.get_context(),
        "DROP TABLE {schema}.schedules",
        "ALTER TABLE {schema}.workers DROP COLUMN retention",
        "CREATE OR REPLACE FUNCTION {schema}.schema_version() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 1'",
    )
