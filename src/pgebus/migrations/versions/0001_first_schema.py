"""Events, deliveries, consumer groups, subscriptions, workers, and the functions that tie them together.

Plain SQL, so that it reads as what PostgreSQL runs; `{schema}` stands for the quoted name of the schema. Each
constraint is named here, so that no naming convention of a host's metadata renames one. Function bodies hold
neither a per cent sign nor a colon followed by a word: on the way through Alembic the first is doubled for
some drivers, and the second becomes a bind parameter, silently NULL in offline mode.
"""

from __future__ import annotations

from typing import Final

from alembic import op

from pgebus.migrations.place import create_schema, drop_schema_if_empty, execute, refuse_tables_of_others

revision = "pgebus_0001"
down_revision: str | None = None
branch_labels: tuple[str, ...] | None = None
depends_on: str | None = None

TABLES: Final = (
    """
CREATE TABLE {schema}.events (
  id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_events PRIMARY KEY,
  run_at timestamptz NOT NULL DEFAULT now(),
  created_at timestamptz NOT NULL DEFAULT now(),
  priority smallint NOT NULL DEFAULT 0 CONSTRAINT ck_events_priority CHECK (priority BETWEEN 0 AND 9),
  type text COLLATE "C" NOT NULL CONSTRAINT ck_events_type
    CHECK (octet_length(type) <= 255 AND type ~ '^[A-Za-z0-9_-]+(\\.[A-Za-z0-9_-]+)*$'),
  channel text COLLATE "C" NOT NULL DEFAULT 'events' CONSTRAINT ck_events_channel
    CHECK (octet_length(channel) BETWEEN 1 AND 63),
  key text COLLATE "C" CONSTRAINT ck_events_key CHECK (octet_length(key) BETWEEN 1 AND 255),
  dedup_key text COLLATE "C" CONSTRAINT ck_events_dedup_key CHECK (octet_length(dedup_key) BETWEEN 1 AND 255),
  headers jsonb NOT NULL DEFAULT '{}' CONSTRAINT ck_events_headers CHECK (jsonb_typeof(headers) = 'object'),
  payload jsonb NOT NULL DEFAULT '{}' CONSTRAINT ck_events_payload CHECK (jsonb_typeof(payload) = 'object'),
  CONSTRAINT ck_events_run_at CHECK (isfinite(run_at))
)
""",
    "CREATE UNIQUE INDEX uq_events_dedup_key ON {schema}.events (channel, dedup_key) WHERE dedup_key IS NOT NULL",
    """
CREATE TABLE {schema}.consumer_groups (
  channel text COLLATE "C" NOT NULL,
  consumer_group text COLLATE "C" NOT NULL,
  paused_at timestamptz,
  max_running integer CONSTRAINT ck_consumer_groups_max_running CHECK (max_running > 0),
  dead_holds_key boolean NOT NULL DEFAULT false,
  created_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT pk_consumer_groups PRIMARY KEY (channel, consumer_group)
)
""",
    # A pattern is matched by equality, else by its literal prefix, else by the regex for what is left. An
    # event type is ASCII words, so nothing in it needs escaping; the trailing dot lets # match zero words.
    """
CREATE TABLE {schema}.subscriptions (
  channel text COLLATE "C" NOT NULL,
  consumer_group text COLLATE "C" NOT NULL,
  pattern text COLLATE "C" NOT NULL,
  prefix text COLLATE "C" GENERATED ALWAYS AS (substring(pattern, '^((?:[^.*#]+\\.)*)[*#]')) STORED,
  regex text COLLATE "C" GENERATED ALWAYS AS (
    CASE WHEN pattern ~ '[*#]' AND pattern !~ '^[^*#]*#$' THEN
      '^' || replace(replace(replace(pattern || '.', '.', '\\.'), '*\\.', '[^.]+\\.'),
        '#\\.', '([^.]+\\.)*') || '$'
    END) STORED,
  since_event_id bigint NOT NULL DEFAULT 0,
  start_at timestamptz,
  backfilled_at timestamptz,
  created_at timestamptz NOT NULL DEFAULT now(),
  declared_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT ck_subscriptions_pattern CHECK (octet_length(pattern) <= 255
    AND pattern ~ '^([A-Za-z0-9_-]+|[*]|#)(\\.([A-Za-z0-9_-]+|[*]|#))*$'),
  CONSTRAINT pk_subscriptions PRIMARY KEY (channel, consumer_group, pattern),
  CONSTRAINT fk_subscriptions_group FOREIGN KEY (channel, consumer_group)
    REFERENCES {schema}.consumer_groups ON DELETE CASCADE
)
""",
    # Patterns that reach back and have not got their earlier events yet: nothing with a key may overtake those.
    "CREATE INDEX ix_subscriptions_catching_up ON {schema}.subscriptions (channel, consumer_group)"
    " WHERE backfilled_at IS NULL AND start_at IS NOT NULL",
    # The id is random, made by the worker, and also the key of its advisory lock: a sequence may hand out a
    # number again after a fail-over.
    """
CREATE TABLE {schema}.workers (
  id bigint CONSTRAINT pk_workers PRIMARY KEY,
  channel text COLLATE "C" NOT NULL,
  groups text[] NOT NULL DEFAULT '{}',
  idle boolean NOT NULL DEFAULT false,
  backend_pid integer,
  started_at timestamptz NOT NULL DEFAULT now(),
  beat_at timestamptz,
  ended_at timestamptz,
  host text,
  pid integer,
  version text
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0)
""",
    # No foreign key to events: checked row by row, it would cost half of bulk publishing. The triggers below
    # write and delete deliveries by the set.
    """
CREATE TABLE {schema}.deliveries (
  event_id bigint NOT NULL,
  due_at timestamptz NOT NULL,
  worker_id bigint,
  claimed_at timestamptz,
  finished_at timestamptz,
  claim_seq integer NOT NULL DEFAULT 0,
  attempt integer NOT NULL DEFAULT 0,
  lost smallint NOT NULL DEFAULT 0,
  round smallint NOT NULL DEFAULT 1,
  priority smallint NOT NULL DEFAULT 0,
  holds_key boolean NOT NULL DEFAULT false,
  status text COLLATE "C" NOT NULL DEFAULT 'pending',
  channel text COLLATE "C" NOT NULL,
  consumer_group text COLLATE "C" NOT NULL,
  type text COLLATE "C" NOT NULL,
  key text COLLATE "C",
  handled text[],
  errors jsonb,
  CONSTRAINT pk_deliveries PRIMARY KEY (event_id, consumer_group),
  CONSTRAINT ck_deliveries_status
    CHECK (status IN ('pending','blocked','running','unhandled','completed','dead','cancelled')),
  CONSTRAINT ck_deliveries_running
    CHECK ((status = 'running') = (worker_id IS NOT NULL)
      AND (status = 'running') = (claimed_at IS NOT NULL)),
  CONSTRAINT ck_deliveries_finished
    CHECK ((status IN ('completed','dead','cancelled')) = (finished_at IS NOT NULL)),
  CONSTRAINT ck_deliveries_key CHECK ((status <> 'blocked' OR key IS NOT NULL)
    AND (NOT holds_key OR (status IN ('dead','unhandled') AND key IS NOT NULL))),
  CONSTRAINT ck_deliveries_attempt CHECK (attempt BETWEEN 0 AND claim_seq AND lost >= 0)
) WITH (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 2000,
        autovacuum_vacuum_cost_delay = 0,
        autovacuum_analyze_scale_factor = 0.02, autovacuum_analyze_threshold = 2000)
""",
    "CREATE INDEX ix_deliveries_due ON {schema}.deliveries"
    " (channel, consumer_group, priority, due_at, event_id) WHERE status = 'pending'",
    # Deliveries that a worker died with are few, and are claimed apart from the others.
    "CREATE INDEX ix_deliveries_suspect ON {schema}.deliveries"
    " (channel, consumer_group, priority, due_at, event_id) WHERE status = 'pending' AND lost > 0",
    "CREATE INDEX ix_deliveries_running ON {schema}.deliveries (worker_id, event_id) WHERE status = 'running'",
    "CREATE INDEX ix_deliveries_unhandled ON {schema}.deliveries (channel, consumer_group, type, event_id)"
    " WHERE status = 'unhandled'",
    # Those that hold their key until a worker that knows their type takes them: few, and looked at every second.
    "CREATE INDEX ix_deliveries_unhandled_head ON {schema}.deliveries (channel, consumer_group, type)"
    " WHERE status = 'unhandled' AND holds_key",
    "CREATE INDEX ix_deliveries_dead ON {schema}.deliveries (channel, consumer_group, finished_at)"
    " WHERE status = 'dead'",
    "CREATE INDEX ix_deliveries_prunable ON {schema}.deliveries (finished_at)"
    " WHERE status IN ('completed','cancelled')",
    "CREATE INDEX ix_deliveries_key_head ON {schema}.deliveries (channel, consumer_group, key, event_id)"
    " WHERE key IS NOT NULL AND (status IN ('pending','running') OR holds_key)",
    "CREATE INDEX ix_deliveries_blocked ON {schema}.deliveries (channel, consumer_group, key, event_id)"
    " WHERE status = 'blocked'",
    "CREATE UNIQUE INDEX uq_deliveries_running_key ON {schema}.deliveries (channel, consumer_group, key)"
    " WHERE key IS NOT NULL AND status = 'running'",
)

# Every way to insert publishes, because the trigger does it. DISTINCT: two patterns of one group that match one type
# would otherwise break the primary key, and with it the publisher. The look-ups are ORDER BY … LIMIT 1 and never
# EXISTS, which a hot key in the statistics turns into a sequential scan per row. An event that has deliveries already
# comes from a restore of the data alone, and gets no more; ON CONFLICT would know less, and cost bulk publishing a
# third. NOTIFY only when somebody sleeps: it makes all publishers queue at their commits.
#
# PL/pgSQL keeps the plan of the first execution, which was made for as many rows as that one had. Joined row by row, as
# is best for one, ten thousand events would take a hundred million steps: so `wanted` is computed once, and no nested
# loop is planned where there is another way. For the same reason nothing is scanned that has an index: the table of
# deliveries may have been empty then.
FAN_OUT: Final = """
CREATE FUNCTION {schema}.fan_out() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_nestloop = off SET enable_seqscan = off AS $pgebus$
BEGIN
  WITH wanted AS MATERIALIZED (
    SELECT DISTINCT t.channel, t.type, coalesce(s.consumer_group, 'default') AS consumer_group,
           CASE WHEN s.consumer_group IS NULL THEN 'unhandled' ELSE 'pending' END AS status
    FROM (SELECT DISTINCT channel, type FROM new_events WHERE key IS NULL) t
    LEFT JOIN {schema}.subscriptions s ON s.channel = t.channel AND (s.pattern = t.type OR
      (starts_with(t.type || '.', s.prefix) AND (s.regex IS NULL OR t.type || '.' ~ s.regex)))
  )
  INSERT INTO {schema}.deliveries (event_id, due_at, priority, channel, consumer_group, type, status)
  SELECT e.id, e.run_at, e.priority, e.channel, m.consumer_group, e.type, m.status
  FROM new_events e JOIN wanted m ON m.channel = e.channel AND m.type = e.type
  WHERE e.key IS NULL
    AND (SELECT d.event_id FROM {schema}.deliveries d WHERE d.event_id = e.id ORDER BY d.event_id LIMIT 1) IS NULL;
  IF EXISTS (SELECT FROM new_events WHERE key IS NOT NULL) THEN
    WITH wanted AS MATERIALIZED (
      SELECT DISTINCT t.channel, t.type, coalesce(s.consumer_group, 'default') AS consumer_group,
             CASE WHEN s.consumer_group IS NULL THEN 'unhandled' ELSE 'pending' END AS status
      FROM (SELECT DISTINCT channel, type FROM new_events WHERE key IS NOT NULL) t
      LEFT JOIN {schema}.subscriptions s ON s.channel = t.channel AND (s.pattern = t.type OR
        (starts_with(t.type || '.', s.prefix) AND (s.regex IS NULL OR t.type || '.' ~ s.regex)))
    )
    INSERT INTO {schema}.deliveries (event_id, due_at, priority, channel, consumer_group, type, key, status)
    SELECT q.id, q.run_at, q.priority, q.channel, q.consumer_group, q.type, q.key,
      CASE WHEN q.status = 'unhandled' THEN 'unhandled'
        WHEN row_number() OVER (PARTITION BY q.channel, q.consumer_group, q.key ORDER BY q.id) > 1
          OR (SELECT p.event_id FROM {schema}.deliveries p
              WHERE p.channel = q.channel AND p.consumer_group = q.consumer_group AND p.key = q.key
                AND (p.status IN ('pending','running') OR p.holds_key)
              ORDER BY p.event_id LIMIT 1) IS NOT NULL
          OR (SELECT p.event_id FROM {schema}.deliveries p
              WHERE p.channel = q.channel AND p.consumer_group = q.consumer_group AND p.key = q.key
                AND p.status = 'blocked'
              ORDER BY p.event_id LIMIT 1) IS NOT NULL
        THEN 'blocked' ELSE 'pending' END
    FROM (
      SELECT e.id, e.run_at, e.priority, e.channel, e.type, e.key, m.consumer_group, m.status
      FROM new_events e JOIN wanted m ON m.channel = e.channel AND m.type = e.type
      WHERE e.key IS NOT NULL
        AND (SELECT d.event_id FROM {schema}.deliveries d WHERE d.event_id = e.id ORDER BY d.event_id LIMIT 1) IS NULL
    ) q;
  END IF;
  PERFORM pg_notify(q.channel, q.due) FROM (
    SELECT channel,
           CASE WHEN min(run_at) > now() THEN extract(epoch FROM min(run_at))::text ELSE '' END AS due
    FROM new_events GROUP BY channel
  ) q WHERE EXISTS (SELECT FROM {schema}.workers w WHERE w.idle AND w.channel = q.channel);
  RETURN NULL;
END $pgebus$
"""

# Always by the index: planned for the thousands of a pruning, one event would cost a scan of all deliveries.
FORGET: Final = """
CREATE FUNCTION {schema}.forget() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off AS $pgebus$
BEGIN
  DELETE FROM {schema}.deliveries d USING old_events o WHERE d.event_id = o.id;
  RETURN NULL;
END $pgebus$
"""

# Without it, deliveries would outlive their events, and stand in the way of events that get the same ids again. DELETE:
# a TRUNCATE would fail where somebody truncates both tables in one command.
FORGET_ALL: Final = """
CREATE FUNCTION {schema}.forget_all() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $pgebus$
BEGIN
  DELETE FROM {schema}.deliveries;
  RETURN NULL;
END $pgebus$
"""

# The last statement of the handlers' transaction. The marker is a SET LOCAL of that transaction: when it is
# gone, what the handlers wrote was committed or rolled back behind the guard. A function, because it must be
# able to fail: a bare UPDATE that finds no row would let the COMMIT behind it, sent in the same message, go
# through. Nothing is scanned, as in fan_out(). With p_forget the delivery is deleted, unless a backfill might make it
# again: as long as a pattern of the group has not got its earlier events, or where none that has them covers the event.
COMPLETE: Final = """
CREATE FUNCTION {schema}.complete(
  p_event_id bigint, p_group text, p_claim_seq integer, p_worker_id bigint, p_marker text,
  p_forget boolean DEFAULT false
) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $pgebus$
DECLARE
  v_channel text COLLATE "C";
  v_key text COLLATE "C";
BEGIN
  IF (nullif(current_setting('pgebus.tx', true), '') = p_marker) IS NOT TRUE THEN
    RAISE EXCEPTION USING ERRCODE = 'PGB02',
      MESSAGE = 'the transaction of the handlers of event ' || p_event_id || ' was ended behind the guard';
  END IF;
  IF p_forget THEN
    DELETE FROM {schema}.deliveries d
    WHERE d.event_id = p_event_id AND d.consumer_group = p_group AND d.claim_seq = p_claim_seq
      AND d.worker_id = p_worker_id AND d.status = 'running'
      AND NOT EXISTS (SELECT FROM {schema}.subscriptions k
        WHERE k.channel = d.channel AND k.consumer_group = d.consumer_group AND k.backfilled_at IS NULL)
      AND EXISTS (SELECT FROM {schema}.subscriptions k
        WHERE k.channel = d.channel AND k.consumer_group = d.consumer_group AND k.since_event_id < d.event_id
          AND (k.pattern = d.type OR (starts_with(d.type || '.', k.prefix)
            AND (k.regex IS NULL OR d.type || '.' ~ k.regex)))
          AND (k.start_at IS NULL OR k.start_at = '-infinity' OR k.start_at <= (
            SELECT e.created_at FROM {schema}.events e WHERE e.id = d.event_id)))
    RETURNING d.channel, d.key INTO v_channel, v_key;
  END IF;
  IF NOT FOUND THEN
    UPDATE {schema}.deliveries d
    SET status = 'completed', worker_id = NULL, claimed_at = NULL, finished_at = clock_timestamp()
    WHERE d.event_id = p_event_id AND d.consumer_group = p_group
      AND d.claim_seq = p_claim_seq AND d.worker_id = p_worker_id AND d.status = 'running'
    RETURNING d.channel, d.key INTO v_channel, v_key;
  END IF;
  IF NOT FOUND THEN
    RAISE EXCEPTION USING ERRCODE = 'PGB01',
      MESSAGE = 'the lease on event ' || p_event_id || ' is lost';
  END IF;
  IF v_key IS NOT NULL THEN
    UPDATE {schema}.deliveries n SET status = 'pending' FROM (
      SELECT b.event_id, b.consumer_group FROM {schema}.deliveries b
      WHERE b.status = 'blocked' AND b.channel = v_channel AND b.consumer_group = p_group AND b.key = v_key
      ORDER BY b.event_id LIMIT 1
    ) nx
    WHERE n.event_id = nx.event_id AND n.consumer_group = nx.consumer_group AND n.status = 'blocked';
    IF FOUND AND EXISTS (SELECT FROM {schema}.workers w WHERE w.idle AND w.channel = v_channel) THEN
      PERFORM pg_notify(v_channel, '');
    END IF;
  END IF;
END $pgebus$
"""

FUNCTIONS: Final = (
    FAN_OUT,
    "CREATE TRIGGER fan_out AFTER INSERT ON {schema}.events REFERENCING NEW TABLE AS new_events"
    " FOR EACH STATEMENT EXECUTE FUNCTION {schema}.fan_out()",
    FORGET,
    "CREATE TRIGGER forget AFTER DELETE ON {schema}.events REFERENCING OLD TABLE AS old_events"
    " FOR EACH STATEMENT EXECUTE FUNCTION {schema}.forget()",
    FORGET_ALL,
    "CREATE TRIGGER forget_all AFTER TRUNCATE ON {schema}.events"
    " FOR EACH STATEMENT EXECUTE FUNCTION {schema}.forget_all()",
    COMPLETE,
    # Owned by the tables' owner, they would let anybody write deliveries from a table of his own.
    "REVOKE ALL ON FUNCTION {schema}.fan_out(), {schema}.forget(), {schema}.forget_all() FROM PUBLIC",
    "CREATE FUNCTION {schema}.schema_version() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 1'",
)


def upgrade() -> None:
    """Create everything; the schema too, where it is missing."""
    migration = op.get_context()
    refuse_tables_of_others(migration)
    create_schema(migration)
    execute(migration, *TABLES, *FUNCTIONS)


def downgrade() -> None:
    """Drop everything of ours, with all events, and the schema when nothing else is left in it."""
    migration = op.get_context()
    execute(
        migration,
        "DROP TABLE {schema}.deliveries, {schema}.workers, {schema}.subscriptions, {schema}.consumer_groups,"
        " {schema}.events",
        "DROP FUNCTION {schema}.fan_out(), {schema}.forget(), {schema}.forget_all(), {schema}.schema_version(),"
        " {schema}.complete(bigint, text, integer, bigint, text, boolean)",
    )
    drop_schema_if_empty(migration)
