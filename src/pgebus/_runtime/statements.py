"""Every statement that the running machine sends to PostgreSQL.

Text, because the schema's name is the only thing in it that varies; each is prepared once per connection. What a
statement means is said above it. The fence of a write is `(event_id, consumer_group, claim_seq, worker_id)` and
`status = 'running'`.
"""

# ruff: noqa: S608 - the only thing ever filled in is a quoted identifier and text of this module

from __future__ import annotations

from typing import Final

from pgebus.models import BEAT_ABSENT_SECONDS
from pgebus.names import quote_identifier, quote_literal
from pgebus.operations._statements import KEPT_ERRORS, NOT_PURGED, UNUSED_CLAIM_SEQ
from pgebus.operations.pruning import NUMBERED, delete_ripe, lock_ripe

# How long after its last declaration a pattern counts as handled by somebody; running processes renew it each minute.
DECLARED_MINUTES: Final = 3

# Columns of the event. A payload that can't be decoded, or a year that Python doesn't have, must cost its own
# delivery only and never the batch: so JSON comes as text, and a time outside Python's range as NULL.
_EVENT = """d.type AS delivery_type, d.key AS delivery_key, e.id, e.type, e.channel, e.payload::text AS payload,
    e.headers::text AS headers, e.key, e.dedup_key, e.priority,
    CASE WHEN e.run_at > '0001-01-03' AND e.run_at < '9999-12-29' THEN e.run_at END AS run_at,
    CASE WHEN e.created_at > '0001-01-03' AND e.created_at < '9999-12-29' THEN e.created_at END AS created_at"""

_LEASE = """d.event_id, d.consumer_group, d.status, d.claim_seq, d.attempt, d.lost, d.handled, d.priority AS lane,
    (extract(epoch FROM least(d.due_at, now())) * 1000000)::bigint AS due"""

# $5 is the entry as JSON, or NULL. "[last - 4 to last]" of a shorter array is all of it.
_ERRORS = f"""CASE WHEN $5::jsonb IS NULL THEN d.errors ELSE jsonb_path_query_array(
      coalesce(d.errors, '[]') || jsonb_build_array(jsonb_build_object('at', clock_timestamp()) || $5::jsonb),
      '$[last - {KEPT_ERRORS - 1} to last]') END"""


class Statements:
    """The statements for one schema.

    Args:
        schema: Its name, not quoted.
        selected: What a claim returns besides our own columns of the event: text that begins with a comma, or nothing.
    """

    def __init__(self, schema: str, selected: str = "") -> None:
        self.schema: Final = schema
        s = quote_identifier(schema)

        # What has left the head of its key lets the next one in. The caller's CTE `done` has (channel, consumer_group,
        # key, promotes). Other workers are told only when one of them sleeps; this one looks again by itself. A row
        # that somebody has locked must not hold up this one: it is left to the sweep, and not passed over.
        promoted = f"""heir AS MATERIALIZED (
  SELECT f.place FROM done CROSS JOIN LATERAL (
    SELECT b.event_id, b.consumer_group FROM {s}.deliveries b
    WHERE done.promotes AND b.status = 'blocked' AND b.channel = done.channel
      AND b.consumer_group = done.consumer_group AND b.key = done.key
    ORDER BY b.event_id LIMIT 1) nx
  CROSS JOIN LATERAL (
    SELECT n.ctid AS place FROM {s}.deliveries n
    WHERE n.event_id = nx.event_id AND n.consumer_group = nx.consumer_group AND n.status = 'blocked'
    ORDER BY n.event_id LIMIT 1 FOR UPDATE SKIP LOCKED) f
), promoted AS (
  UPDATE {s}.deliveries n SET status = 'pending' FROM heir WHERE n.ctid = heir.place RETURNING n.channel
), told AS MATERIALIZED (
  SELECT pg_notify(p.channel, '') FROM (SELECT DISTINCT channel FROM promoted) p
  WHERE EXISTS (SELECT FROM {s}.workers w WHERE w.idle AND w.channel = p.channel)
)"""

        # Rows of several leases, locked in one order so that two batches can't deadlock. A row that somebody has locked
        # by hand must not hold up the others.
        # $1 event ids, $2 groups, $3 claim_seqs, sorted by (event, group); $4 worker.
        def hold(more: str = "") -> str:
            return f"""held AS MATERIALIZED (
  SELECT h.* FROM unnest($1::bigint[], $2::text[], $3::integer[]) u(event_id, consumer_group, claim_seq)
  CROSS JOIN LATERAL (
    SELECT d.ctid AS place{more} FROM {s}.deliveries d
    WHERE d.event_id = u.event_id AND d.consumer_group = u.consumer_group AND d.claim_seq = u.claim_seq
      AND d.worker_id = $4::bigint AND d.status = 'running'
    ORDER BY d.event_id LIMIT 1 FOR UPDATE SKIP LOCKED) h
)"""

        held = hold()

        # Whether pattern `of` matches a type.
        def matches(of: str, event_type: str) -> str:
            return f"""({of}.pattern = {event_type} OR (starts_with({event_type} || '.', {of}.prefix)
      AND ({of}.regex IS NULL OR {event_type} || '.' ~ {of}.regex)))"""

        # A group that keeps no history has its completed deliveries deleted: those that no backfill can make again.
        #
        # R1, here: nothing of the group is still to be backfilled, and a backfilled pattern covers the event, which
        # means that it gets it whether or not it was there when the event was published. Anything else is kept.
        # R2, in the backfill of a pattern: what another pattern covers is left out. Its delivery was made through that
        # one, by the trigger or by a backfill; where there is a row, it would have been in the way just as well.
        #
        # So a backfill that could repeat what was deleted is one of a pattern that the completion did not see, or that
        # it saw backfilled. Of the first its subscription was committed after the snapshot of the completion, and each
        # statement of its backfill has a newer one: that sees the pattern by which the event was covered, and leaves
        # the event out. The second has nothing more to do; a worker that does not know that yet finds out, because
        # the backfill locks the subscription, and nobody says that it is backfilled before that lock is gone.
        # What breaks it is a person who removes the pattern that covered the event, and so what was known of it.
        #
        # What the patterns say is asked once for each type of a batch: `settled`, and above which id they cover what.
        judged = f"""known AS MATERIALIZED (
  SELECT t.channel, t.consumer_group, t.type, (
    SELECT k.pattern FROM {s}.subscriptions k
    WHERE k.channel = t.channel AND k.consumer_group = t.consumer_group AND k.backfilled_at IS NULL
    LIMIT 1) IS NULL AS settled, (
    SELECT min(k.since_event_id) FROM {s}.subscriptions k
    WHERE k.channel = t.channel AND k.consumer_group = t.consumer_group AND {matches("k", "t.type")}
      AND (k.start_at IS NULL OR k.start_at = '-infinity')) AS since
  FROM (SELECT DISTINCT channel, consumer_group, type FROM held) t
), judged AS MATERIALIZED (
  SELECT h.place, (
    SELECT n.settled AND (n.since < h.event_id OR (
      SELECT k.pattern FROM {s}.subscriptions k
      WHERE k.channel = h.channel AND k.consumer_group = h.consumer_group AND k.since_event_id < h.event_id
        AND {matches("k", "h.type")} AND k.start_at <= (
          SELECT e.created_at FROM {s}.events e WHERE e.id = h.event_id ORDER BY e.id LIMIT 1)
      LIMIT 1) IS NOT NULL)
    FROM known n WHERE n.channel = h.channel AND n.consumer_group = h.consumer_group AND n.type = h.type
  ) IS TRUE AS forgettable
  FROM held h
)"""

        # The same for one lease: $1 to $4 its fence.
        fence = f"""d.ctid = (
    SELECT f.ctid FROM {s}.deliveries f
    WHERE f.event_id = $1::bigint AND f.consumer_group = $2::text AND f.claim_seq = $3::integer
      AND f.worker_id = $4::bigint AND f.status = 'running' FOR UPDATE SKIP LOCKED)"""

        # Whether a group, `g`, is below its limit: else nobody needs to look.
        may_run_more = f"""(g.max_running IS NULL OR g.max_running > (
      SELECT count(*) FROM {s}.deliveries r
      WHERE r.status = 'running' AND r.channel = g.channel AND r.consumer_group = g.consumer_group))"""

        # One by one: joined in any other way, a plan that was made when the tables were empty would read all of them.
        event = f"""LEFT JOIN LATERAL (
  SELECT e.* FROM {s}.events e WHERE e.id = due.event_id ORDER BY e.id LIMIT 1) e ON true"""

        # Whether nothing of its key is before a delivery, and none runs.
        def first(of: str) -> str:
            return f"""(
            SELECT p.event_id FROM {s}.deliveries p
            WHERE p.channel = {of}.channel AND p.consumer_group = {of}.consumer_group AND p.key = {of}.key
              AND (p.status IN ('pending', 'running') OR p.holds_key)
              AND (p.event_id < {of}.event_id OR p.status = 'running')
            ORDER BY p.event_id LIMIT 1) IS NULL AND (
            SELECT b.event_id FROM {s}.deliveries b
            WHERE b.status = 'blocked' AND b.channel = {of}.channel AND b.consumer_group = {of}.consumer_group
              AND b.key = {of}.key AND b.event_id < {of}.event_id
            ORDER BY b.event_id LIMIT 1) IS NULL"""

        # Whether a running process, or one that has just ended, has a handler for the type of a delivery.
        def declared(of: str) -> str:
            return f"""EXISTS (SELECT FROM {s}.subscriptions k
      WHERE k.channel = {of}.channel AND k.consumer_group = {of}.consumer_group
        AND k.declared_at > now() - interval '{DECLARED_MINUTES} minutes'
        AND (k.pattern = {of}.type OR (starts_with({of}.type || '.', k.prefix)
          AND (k.regex IS NULL OR {of}.type || '.' ~ k.regex))))"""

        # Claim what is due: $1 worker, $2 channel, $3 groups in the order of their turn, $4 limit. One lane for each
        # group and priority: a lane ends at its first row that is not due yet, so rows for tomorrow are never walked.
        # The rows are locked, so the update may find them by place; by primary key a planner without statistics
        # would join the whole table. LEFT JOIN: a delivery whose event is gone must be seen, or it would fill its
        # lane for ever. What has a key waits for what is before it in its key, which may be still to come where a
        # group gets its earlier events.
        def claim(lost: str, among: str = "", *, going_on: bool = False) -> str:
            places = """
  LEFT JOIN LATERAL (SELECT timestamptz 'epoch' + interval '1 microsecond' * u.due AS due_at, u.event_id
    FROM unnest($5::text[], $6::integer[], $7::bigint[], $8::bigint[]) u(consumer_group, level, due, event_id)
    WHERE u.consumer_group = served.consumer_group AND u.level = p.level LIMIT 1) r ON true"""
            begin = "coalesce(r.due_at, '-infinity') AS due_at, coalesce(r.event_id, 0) AS event_id"
            beyond = "(d.due_at, d.event_id) >= (lane.due_at, lane.event_id)"
            return f"""
WITH served AS MATERIALIZED (
  SELECT g.consumer_group, u.ord, (
    SELECT true FROM {s}.subscriptions k WHERE k.channel = g.channel AND k.consumer_group = g.consumer_group
      AND k.backfilled_at IS NULL AND k.start_at IS NOT NULL LIMIT 1) IS NOT NULL AS catching_up
  FROM unnest($3::text[]) WITH ORDINALITY AS u(name, ord)
  JOIN {s}.consumer_groups g ON g.channel = $2::text AND g.consumer_group = u.name AND g.paused_at IS NULL{among}
), lane AS MATERIALIZED (
  SELECT served.consumer_group, served.catching_up, p.level{f", {begin}" if going_on else ""}
  FROM served CROSS JOIN generate_series(0, 9) AS p(level){places if going_on else ""}
  ORDER BY p.level, served.ord
), due AS MATERIALIZED (
  SELECT d.place, d.event_id
  FROM lane CROSS JOIN LATERAL (
    SELECT d.ctid AS place, d.event_id
    FROM {s}.deliveries d
    WHERE d.status = 'pending' AND d.channel = $2 AND d.consumer_group = lane.consumer_group
      AND d.priority = lane.level AND d.due_at <= now() AND d.lost {lost}{f" AND {beyond}" if going_on else ""}
      AND (d.key IS NULL OR NOT lane.catching_up AND {first("d")})
    ORDER BY d.due_at, d.event_id
    LIMIT $4::integer FOR UPDATE SKIP LOCKED
  ) d LIMIT $4
)
UPDATE {s}.deliveries d
SET status = 'running', worker_id = $1::bigint, claimed_at = clock_timestamp(), attempt = d.attempt + 1,
    claim_seq = d.claim_seq + 1
FROM due {event}
WHERE d.ctid = due.place
RETURNING {_LEASE}, {_EVENT}{selected}"""

        unlimited = " AND g.max_running IS NULL"
        self.claim: Final = claim("= 0", unlimited)
        # The same from places in the middle of lanes: $5 groups, $6 priorities, $7 due times in microseconds since the
        # epoch, $8 event ids. Lanes that are not named begin at their beginning.
        self.claim_on: Final = claim("= 0", unlimited, going_on=True)
        # Deliveries in whose hands a worker died are taken by a worker that runs nothing else beside them: several at
        # once where it was one worker, and else one at a time.
        self.claim_suspect: Final = claim("> 0", unlimited)
        self.claim_lost_once: Final = claim("= 1", unlimited)
        # The same for one group that is limited, in one transaction with the two that come before them: the lock makes
        # workers take turns, and the count is a statement of its own, so that it sees what the last one has claimed.
        self.claim_limited: Final = claim("= 0")
        self.claim_limited_suspect: Final = claim("> 0")
        # $1 channel, $2 group.
        self.lock_group: Final = f"""
SELECT g.max_running FROM {s}.consumer_groups g
WHERE g.channel = $1::text AND g.consumer_group = $2::text AND g.paused_at IS NULL FOR NO KEY UPDATE SKIP LOCKED"""
        self.count_running: Final = f"""
SELECT count(*) FROM {s}.deliveries d
WHERE d.status = 'running' AND d.channel = $1::text AND d.consumer_group = $2::text"""
        # Those of the groups that are limited, and not paused: $1 channel, $2 groups.
        self.limited_groups: Final = f"""
SELECT g.consumer_group FROM {s}.consumer_groups g
WHERE g.channel = $1::text AND g.consumer_group = ANY ($2::text[]) AND g.max_running IS NOT NULL
  AND g.paused_at IS NULL"""
        # Whether such a delivery is due: $1 channel, $2 groups. It has an index of its own. Also where its group is
        # full: it has waited all the time when a place comes free.
        self.suspects: Final = f"""
SELECT EXISTS (SELECT FROM {s}.deliveries d JOIN {s}.consumer_groups g USING (channel, consumer_group)
  WHERE d.status = 'pending' AND d.lost > 0 AND d.channel = $1::text AND d.consumer_group = ANY ($2::text[])
    AND d.due_at <= now() AND g.paused_at IS NULL)"""

        # Which of the leases still have their fence: $1 to $4 as in `held`. What `held` skipped is theirs, and locked.
        self.still_held: Final = f"""
SELECT d.event_id, d.consumer_group FROM {s}.deliveries d
JOIN unnest($1::bigint[], $2::text[], $3::integer[]) u(event_id, consumer_group, claim_seq)
  ON d.event_id = u.event_id AND d.consumer_group = u.consumer_group AND d.claim_seq = u.claim_seq
WHERE d.worker_id = $4::bigint AND d.status = 'running'"""

        # Complete any number: $1 to $4 as in `held`. Returns the leases whose fence held.
        self.complete: Final = f"""
WITH {held}
UPDATE {s}.deliveries d
SET status = 'completed', worker_id = NULL, claimed_at = NULL, finished_at = clock_timestamp()
FROM held WHERE d.ctid = held.place
RETURNING d.event_id, d.consumer_group"""

        # The same where a row of the batch has a key; asking for it costs a batch without keys a third of its rate.
        self.complete_keyed: Final = f"""
WITH {held}, done AS (
  UPDATE {s}.deliveries d
  SET status = 'completed', worker_id = NULL, claimed_at = NULL, finished_at = clock_timestamp()
  FROM held WHERE d.ctid = held.place
  RETURNING d.event_id, d.channel, d.consumer_group, d.key, d.key IS NOT NULL AS promotes
), {promoted}
SELECT done.event_id, done.consumer_group FROM done, (SELECT count(*) FROM told) told_count"""

        # The two for groups that keep no history. A batch may hold what can be deleted and what has to be kept.
        def forget(returned: str, rest: str) -> str:
            return f"""
WITH {hold(", d.event_id, d.channel, d.consumer_group, d.type")}, {judged}, gone AS (
  DELETE FROM {s}.deliveries d USING judged WHERE d.ctid = judged.place AND judged.forgettable
  RETURNING {returned}
), kept AS (
  UPDATE {s}.deliveries d
  SET status = 'completed', worker_id = NULL, claimed_at = NULL, finished_at = clock_timestamp()
  FROM judged WHERE d.ctid = judged.place AND NOT judged.forgettable
  RETURNING {returned}
), done AS (SELECT * FROM gone UNION ALL SELECT * FROM kept){rest}"""

        self.forget: Final = forget(
            "d.event_id, d.consumer_group", "\nSELECT done.event_id, done.consumer_group FROM done"
        )
        self.forget_keyed: Final = forget(
            "d.event_id, d.channel, d.consumer_group, d.key, d.key IS NOT NULL AS promotes",
            f""", {promoted}
SELECT done.event_id, done.consumer_group FROM done, (SELECT count(*) FROM told) told_count""",
        )

        # Pending again: $1 to $4 fence, $5 error or NULL, $6 delay in seconds, $7 attempts to give back, $8 handled.
        # The key stays with it. Sleepers are told the time, as the trigger tells them.
        self.reschedule: Final = f"""
WITH done AS (
  UPDATE {s}.deliveries d
  SET status = 'pending', due_at = clock_timestamp() + make_interval(secs => $6::double precision), worker_id = NULL,
      claimed_at = NULL, attempt = greatest(d.attempt - $7::integer, 0), handled = $8::text[], errors = {_ERRORS}
  WHERE {fence}
  RETURNING d.channel, d.due_at
), told AS MATERIALIZED (
  SELECT pg_notify(done.channel, extract(epoch FROM done.due_at)::text) FROM done
  WHERE EXISTS (SELECT FROM {s}.workers w WHERE w.idle AND w.channel = done.channel)
)
SELECT (SELECT count(*) FROM done) AS rows, (SELECT count(*) FROM told) AS told"""

        # Dead: $1 to $4 fence, $5 error, $6 handled.
        self.bury: Final = f"""
WITH done AS (
  UPDATE {s}.deliveries d
  SET status = 'dead', worker_id = NULL, claimed_at = NULL, finished_at = clock_timestamp(), handled = $6::text[],
      errors = {_ERRORS}, holds_key = d.key IS NOT NULL AND coalesce((
        SELECT g.dead_holds_key FROM {s}.consumer_groups g
        WHERE g.channel = d.channel AND g.consumer_group = d.consumer_group), false)
  WHERE {fence}
  RETURNING d.channel, d.consumer_group, d.key, d.key IS NOT NULL AND NOT d.holds_key AS promotes
), {promoted}
SELECT (SELECT count(*) FROM done) AS rows, (SELECT count(*) FROM told) AS told"""

        # No handler here knows the type: $1 to $4 fence. As long as another process does, as in a rolling deploy, it
        # keeps its place in its key.
        self.unhandle: Final = f"""
WITH done AS (
  UPDATE {s}.deliveries d
  SET status = 'unhandled', worker_id = NULL, claimed_at = NULL, attempt = greatest(d.attempt - 1, 0),
      holds_key = d.key IS NOT NULL AND {declared("d")}
  WHERE {fence}
  RETURNING d.channel, d.consumer_group, d.key, d.key IS NOT NULL AND NOT d.holds_key AS promotes
), {promoted}
SELECT (SELECT count(*) FROM done) AS rows, (SELECT count(*) FROM told) AS told"""

        # Give leases back uncounted, in their old place in the line: $1 to $4 as in `held`.
        self.release: Final = f"""
WITH {held}, done AS (
  UPDATE {s}.deliveries d
  SET status = 'pending', worker_id = NULL, claimed_at = NULL, attempt = greatest(d.attempt - 1, 0)
  FROM held WHERE d.ctid = held.place
  RETURNING d.event_id, d.consumer_group, d.channel
), told AS MATERIALIZED (SELECT pg_notify(c.channel, '') FROM (SELECT DISTINCT channel FROM done) c)
SELECT done.event_id, done.consumer_group FROM done, (SELECT count(*) FROM told) told_count"""

        # All that runs in the name of worker $1: a claim whose answer was lost leaves leases that nobody knows of.
        self.leases_of: Final = f"""
SELECT d.event_id, d.consumer_group, d.claim_seq FROM {s}.deliveries d
WHERE d.worker_id = $1::bigint AND d.status = 'running'"""

        # Types with unhandled deliveries: $1 channel, $2 groups. A skip scan: one index probe for each type.
        self.unhandled_types: Final = f"""
WITH RECURSIVE t AS (
  SELECT g.name, (
    SELECT d.type FROM {s}.deliveries d
    WHERE d.status = 'unhandled' AND d.channel = $1::text AND d.consumer_group = g.name
    ORDER BY d.type LIMIT 1) AS type
  FROM unnest($2::text[]) g(name)
  UNION ALL
  SELECT t.name, (
    SELECT d.type FROM {s}.deliveries d
    WHERE d.status = 'unhandled' AND d.channel = $1 AND d.consumer_group = t.name AND d.type > t.type
    ORDER BY d.type LIMIT 1)
  FROM t WHERE t.type IS NOT NULL
)
SELECT name AS consumer_group, type FROM t WHERE type IS NOT NULL LIMIT 10000"""

        # Those that hold their key for a process that is not there any more let it go.
        self.let_go: Final = f"""
WITH stale AS MATERIALIZED (
  SELECT d.ctid AS place FROM {s}.deliveries d
  WHERE d.status = 'unhandled' AND d.holds_key AND NOT {declared("d")}
  ORDER BY d.channel, d.consumer_group, d.type LIMIT 1000 FOR UPDATE OF d SKIP LOCKED
)
UPDATE {s}.deliveries d SET holds_key = false FROM stale WHERE d.ctid = stale.place"""

        # Adopt one type: $1 worker, $2 channel, $3 group, $4 type, $5 limit. What is due goes straight to running, or
        # an old worker of a rolling deploy would take it back again and again; the rest waits as it would have. What
        # has a key waits for its turn, unless it held it.
        self.adopt: Final = f"""
WITH due AS MATERIALIZED (
  SELECT d.ctid AS place, d.event_id,
         CASE WHEN d.key IS NOT NULL AND NOT (d.holds_key AND {first("d")}) THEN 'blocked'
              WHEN d.due_at > now() OR d.lost > 0 OR g.waits THEN 'pending' ELSE 'running' END AS status
  FROM {s}.deliveries d, (
    SELECT coalesce(bool_or(g.max_running IS NOT NULL OR g.paused_at IS NOT NULL), false) AS waits
    FROM {s}.consumer_groups g WHERE g.channel = $2::text AND g.consumer_group = $3::text) g
  WHERE d.status = 'unhandled' AND d.channel = $2::text AND d.consumer_group = $3::text AND d.type = $4::text
  ORDER BY d.event_id LIMIT $5::integer FOR UPDATE OF d SKIP LOCKED
)
UPDATE {s}.deliveries d
SET status = due.status, holds_key = false,
    worker_id = CASE WHEN due.status = 'running' THEN $1::bigint END,
    claimed_at = CASE WHEN due.status = 'running' THEN clock_timestamp() END,
    attempt = d.attempt + CASE WHEN due.status = 'running' THEN 1 ELSE 0 END,
    claim_seq = d.claim_seq + CASE WHEN due.status = 'running' THEN 1 ELSE 0 END
FROM due {event}
WHERE d.ctid = due.place
RETURNING {_LEASE}, {_EVENT}{selected}"""

        # Seconds until something is due, NULL when nothing waits, and the database's clock: $1 channel, $2 groups.
        self.next_due: Final = f"""
SELECT extract(epoch FROM clock_timestamp())::double precision AS clock, extract(epoch FROM (
  SELECT min(n.due_at) FROM {s}.consumer_groups g CROSS JOIN generate_series(0, 9) AS p(level) CROSS JOIN LATERAL (
    SELECT d.due_at FROM {s}.deliveries d
    WHERE d.status = 'pending' AND d.channel = g.channel AND d.consumer_group = g.consumer_group
      AND d.priority = p.level
    ORDER BY d.due_at LIMIT 1) n
  WHERE g.channel = $1::text AND g.consumer_group = ANY ($2::text[]) AND g.paused_at IS NULL
    AND {may_run_more}
))::double precision AS due"""

        # Keys whose head finished unseen by the transaction that inserted the next one, or got an earlier event. A skip
        # scan over the waiting: behind $1 channel, $2 group, $3 key, at most $4 keys. Returns where it ended, NULL when
        # it has come to the end.
        self.sweep: Final = f"""
WITH RECURSIVE k AS (
  (SELECT d.channel, d.consumer_group, d.key, 1 AS n FROM {s}.deliveries d
   WHERE d.status = 'blocked' AND (d.channel, d.consumer_group, d.key) > ($1::text, $2::text, $3::text)
   ORDER BY d.channel, d.consumer_group, d.key LIMIT 1)
  UNION ALL
  SELECT n.channel, n.consumer_group, n.key, k.n + 1 FROM k CROSS JOIN LATERAL (
    SELECT d.channel, d.consumer_group, d.key FROM {s}.deliveries d
    WHERE d.status = 'blocked' AND (d.channel, d.consumer_group, d.key) > (k.channel, k.consumer_group, k.key)
    ORDER BY d.channel, d.consumer_group, d.key LIMIT 1) n
  WHERE k.n < $4::integer
), heads AS MATERIALIZED (
  SELECT b.event_id, b.consumer_group FROM k CROSS JOIN LATERAL (
    SELECT b.event_id, b.consumer_group FROM {s}.deliveries b
    WHERE b.status = 'blocked' AND b.channel = k.channel AND b.consumer_group = k.consumer_group AND b.key = k.key
    ORDER BY b.event_id LIMIT 1) b
  WHERE (SELECT p.event_id FROM {s}.deliveries p
         WHERE p.channel = k.channel AND p.consumer_group = k.consumer_group AND p.key = k.key
           AND (p.status IN ('pending', 'running') OR p.holds_key)
           AND (p.event_id < b.event_id OR p.status = 'running')
         ORDER BY p.event_id LIMIT 1) IS NULL
), free AS MATERIALIZED (
  -- the first of a key or none: passing over it to the second would be another order
  SELECT f.place FROM (SELECT * FROM heads ORDER BY event_id, consumer_group) h CROSS JOIN LATERAL (
    SELECT d.ctid AS place FROM {s}.deliveries d
    WHERE d.event_id = h.event_id AND d.consumer_group = h.consumer_group AND d.status = 'blocked'
    ORDER BY d.event_id LIMIT 1 FOR UPDATE SKIP LOCKED) f
), done AS (
  UPDATE {s}.deliveries n SET status = 'pending' FROM free WHERE n.ctid = free.place RETURNING n.channel
), told AS MATERIALIZED (SELECT pg_notify(c.channel, '') FROM (SELECT DISTINCT channel FROM done) c)
SELECT (SELECT count(*) FROM done) AS promoted, (SELECT count(*) FROM told) AS told, l.channel, l.consumer_group, l.key
FROM (SELECT 1) one LEFT JOIN k AS l ON l.n = $4"""

        # Whether a worker, `k`, shows that it lives by a beat: it holds no lock, and so its row has no backend.
        beating = f"""(k.ended_at IS NULL AND k.backend_pid IS NULL
    AND k.beat_at > clock_timestamp() - interval '{BEAT_ABSENT_SECONDS} seconds')"""

        # Workers that own running deliveries or have not ended, and whether their advisory lock is held or their beat
        # is there. `fresh` says that the server has just started: all locks vanished at once while the workers lived.
        self.owners: Final = f"""
SELECT w.worker_id,
  EXISTS (SELECT FROM pg_catalog.pg_locks l
    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
      AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
      AND l.classid = (w.worker_id >> 32)::oid AND l.objid = (w.worker_id & 4294967295)::oid)
    OR EXISTS (SELECT FROM {s}.workers k WHERE k.id = w.worker_id AND {beating}) AS alive,
  EXISTS (SELECT FROM {s}.deliveries d WHERE d.worker_id = w.worker_id AND d.status = 'running') AS owns,
  clock_timestamp() - pg_postmaster_start_time() < interval '60 seconds' AS fresh
FROM (SELECT worker_id FROM {s}.deliveries WHERE status = 'running'
      UNION SELECT id FROM {s}.workers WHERE ended_at IS NULL) w"""

        # Take the leases of dead workers back: $1 worker ids. Whoever gets their lock recovers them, so nobody does
        # it twice, and none of them can come back meanwhile. One that beats has no lock that it could be kept from:
        # there the row decides, whose condition is looked at again where a beat has come first. The attempt stays
        # counted.
        self.recover: Final = f"""
WITH absent AS MATERIALIZED (
  SELECT w FROM unnest($1::bigint[]) w WHERE pg_try_advisory_xact_lock(w)
), ended AS (
  UPDATE {s}.workers k SET ended_at = coalesce(k.ended_at, clock_timestamp()), idle = false
  FROM absent WHERE k.id = absent.w AND NOT coalesce({beating}, false) RETURNING k.id
), gone AS MATERIALIZED (
  SELECT id AS w FROM ended
  UNION ALL SELECT w FROM absent WHERE NOT EXISTS (SELECT FROM {s}.workers k WHERE k.id = absent.w)
), leases AS MATERIALIZED (
  SELECT d.ctid AS place FROM {s}.deliveries d JOIN gone ON d.worker_id = gone.w
  WHERE d.status = 'running' ORDER BY d.event_id, d.consumer_group LIMIT 1000 FOR UPDATE OF d SKIP LOCKED
), done AS (
  UPDATE {s}.deliveries d SET status = 'pending', worker_id = NULL, claimed_at = NULL, lost = least(d.lost + 1, 32767)
  FROM leases WHERE d.ctid = leases.place
  RETURNING d.event_id, d.consumer_group, d.channel
), told AS MATERIALIZED (SELECT pg_notify(c.channel, '') FROM (SELECT DISTINCT channel FROM done) c)
SELECT done.event_id, done.consumer_group FROM done, (SELECT count(*) FROM told) told_count"""

        self.register: Final = f"""
INSERT INTO {s}.workers (id, channel, groups, backend_pid, host, pid, version)
VALUES ($1::bigint, $2::text, $3::text[], pg_backend_pid(), $4::text, $5::integer, $6::text)"""
        self.lock: Final = "SELECT pg_try_advisory_lock($1::bigint)"
        self.unlock: Final = "SELECT pg_advisory_unlock($1::bigint)"
        # After the lock, in a statement of its own: only a fresh snapshot sees who ended us while we were away.
        self.return_to_duty: Final = f"""
UPDATE {s}.workers SET backend_pid = pg_backend_pid() WHERE id = $1::bigint AND ended_at IS NULL RETURNING id"""
        # The same for a worker that beats: without a backend, and with a beat.
        self.register_beating: Final = f"""
INSERT INTO {s}.workers (id, channel, groups, beat_at, host, pid, version)
VALUES ($1::bigint, $2::text, $3::text[], clock_timestamp(), $4::text, $5::integer, $6::text)"""
        # No row: others have ended it.
        self.beat: Final = f"""
UPDATE {s}.workers SET beat_at = clock_timestamp() WHERE id = $1::bigint AND ended_at IS NULL RETURNING id"""
        # Our own half-open connection may still hold our lock; its start time tells it from a stranger's new backend.
        self.end_ghost: Final = """
SELECT pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a
WHERE a.pid = $1::integer AND a.backend_start = $2::timestamptz"""
        self.backend: Final = """
SELECT pid, backend_start FROM pg_catalog.pg_stat_activity WHERE pid = pg_backend_pid()"""
        self.listens: Final = "SELECT $1::text IN (SELECT pg_listening_channels())"
        self.holds_lock: Final = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
    AND l.classid = ($1::bigint >> 32)::oid AND l.objid = ($1::bigint & 4294967295)::oid AND l.pid = $2::integer)"""
        self.notify: Final = "SELECT pg_notify($1::text, $2::text)"
        self.serve: Final = f"UPDATE {s}.workers SET groups = $2::text[] WHERE id = $1::bigint AND groups <> $2"
        self.set_idle: Final = (
            f"UPDATE {s}.workers SET idle = $2::boolean WHERE id = $1::bigint AND idle <> $2 AND ended_at IS NULL"
        )
        self.sign_off: Final = f"""
UPDATE {s}.workers SET ended_at = clock_timestamp(), idle = false WHERE id = $1::bigint AND ended_at IS NULL"""

        # New groups, as they are declared: $1 channel, $2 groups, $3 max_running, $4 dead_holds_key.
        self.ensure_groups: Final = f"""
INSERT INTO {s}.consumer_groups (channel, consumer_group, max_running, dead_holds_key)
SELECT $1::text, u.consumer_group, u.max_running, coalesce(u.dead_holds_key, false)
FROM unnest($2::text[], $3::integer[], $4::boolean[]) u(consumer_group, max_running, dead_holds_key)
WHERE NOT EXISTS (SELECT FROM {s}.consumer_groups g
                  WHERE g.channel = $1::text AND g.consumer_group = u.consumer_group)
ORDER BY u.consumer_group ON CONFLICT DO NOTHING"""
        # What was declared of them, where it is another: $1 to $4 as above. Returns how many there are to be changed
        # that somebody has locked. Dead deliveries let go of keys that they are not to hold any more.
        self.configure_groups: Final = f"""
WITH other AS MATERIALIZED (
  SELECT g.channel, g.consumer_group, coalesce(u.max_running, g.max_running) AS max_running,
         coalesce(u.dead_holds_key, g.dead_holds_key) AS dead_holds_key
  FROM {s}.consumer_groups g
  JOIN unnest($2::text[], $3::integer[], $4::boolean[]) u(consumer_group, max_running, dead_holds_key)
    USING (consumer_group)
  WHERE g.channel = $1::text AND (u.max_running IS DISTINCT FROM g.max_running AND u.max_running IS NOT NULL
    OR u.dead_holds_key <> g.dead_holds_key)
), free AS MATERIALIZED (
  SELECT g.ctid AS place, o.* FROM {s}.consumer_groups g JOIN other o USING (channel, consumer_group)
  ORDER BY g.consumer_group FOR NO KEY UPDATE OF g SKIP LOCKED
), done AS (
  UPDATE {s}.consumer_groups g SET max_running = f.max_running, dead_holds_key = f.dead_holds_key
  FROM free f WHERE g.ctid = f.place RETURNING g.channel, g.consumer_group, g.dead_holds_key
), freed AS (
  UPDATE {s}.deliveries d SET holds_key = false FROM done
  WHERE NOT done.dead_holds_key AND d.status = 'dead' AND d.holds_key AND d.channel = done.channel
    AND d.consumer_group = done.consumer_group
)
SELECT (SELECT count(*) FROM other) - (SELECT count(*) FROM done) AS locked"""
        # New patterns: $1 channel, $2 groups, $3 patterns, $4 "now", "beginning" or a moment, $5 our schema. What is
        # inserted from now on has ids above the last that was given out. The trigger serves everybody whose snapshot is
        # newer than this; the others are served by the backfill.
        self.subscribe: Final = f"""
WITH fresh AS MATERIALIZED (
  SELECT u.consumer_group, u.pattern, u.start FROM unnest($2::text[], $3::text[], $4::text[])
    u(consumer_group, pattern, start)
  WHERE NOT EXISTS (SELECT FROM {s}.subscriptions k WHERE k.channel = $1::text
                    AND k.consumer_group = u.consumer_group AND k.pattern = u.pattern)
)
INSERT INTO {s}.subscriptions (channel, consumer_group, pattern, since_event_id, start_at)
SELECT $1::text, f.consumer_group, f.pattern, CASE f.start WHEN 'now' THEN
    coalesce(pg_sequence_last_value(pg_get_serial_sequence(quote_ident($5::text) || '.events', 'id')), 0) ELSE 0 END,
  CASE f.start WHEN 'now' THEN NULL WHEN 'beginning' THEN '-infinity' ELSE f.start::timestamptz END
FROM fresh f ORDER BY f.consumer_group, f.pattern ON CONFLICT DO NOTHING"""
        # That a running process still has them, about once a minute: $1 channel, $2 groups, $3 patterns.
        self.declare: Final = f"""
UPDATE {s}.subscriptions k SET declared_at = now()
FROM unnest($2::text[], $3::text[]) u(consumer_group, pattern)
WHERE k.channel = $1::text AND k.consumer_group = u.consumer_group AND k.pattern = u.pattern
  AND k.declared_at < now() - interval '1 minute'"""
        # Patterns that are still to be backfilled: $1 channel.
        self.backfills: Final = f"""
SELECT k.consumer_group, k.pattern, k.since_event_id, k.created_at::text AS created FROM {s}.subscriptions k
WHERE k.channel = $1::text AND k.backfilled_at IS NULL ORDER BY k.consumer_group, k.pattern LIMIT 1000"""
        # Who is in a transaction now, prepared ones included: whose snapshot may be older than a subscription. Of other
        # roles' processes the kind is not shown, so what is not known to be a vacuum counts.
        self.in_flight: Final = """
SELECT l.virtualtransaction AS who, false AS prepared
FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid)
WHERE l.locktype = 'virtualxid' AND l.granted AND a.datname = current_database() AND l.pid <> pg_backend_pid()
  AND a.backend_type IS DISTINCT FROM 'autovacuum worker'
UNION ALL SELECT p.gid, true FROM pg_catalog.pg_prepared_xacts p WHERE p.database = current_database()"""
        self.last_event_id: Final = f"SELECT coalesce(max(e.id), 0) FROM {s}.events e"
        # $1 channel, $2 group, $3 pattern, $4 above this id, $5 up to this one, $6 how many events to look at. An event
        # is locked, so that it cannot be pruned meanwhile; one that somebody else has locked is `missed`, and looked at
        # again. What was unhandled, because nobody wanted it, is not any more, now that somebody does. What was emptied
        # is never handled again; and what another pattern of the group covers is there already, or was: see
        # `judged`. The subscription, $7 when it was made, is locked, so that nobody says meanwhile that it is
        # done; one that is done, gone or locked is not `there`.
        self.backfill: Final = f"""
WITH mine AS MATERIALIZED (
  SELECT k.pattern, k.prefix, k.regex, coalesce(k.start_at, '-infinity') AS start_at FROM {s}.subscriptions k
  WHERE k.channel = $1::text AND k.consumer_group = $2::text AND k.pattern = $3::text AND k.backfilled_at IS NULL
    AND k.created_at = $7::text::timestamptz FOR SHARE SKIP LOCKED
), looked AS MATERIALIZED (
  SELECT e.id, e.channel, e.type, e.created_at, {NOT_PURGED} AS kept FROM {s}.events e
  WHERE e.id > $4::bigint AND e.id <= $5::bigint ORDER BY e.id LIMIT $6::integer
), wanted AS MATERIALIZED (
  SELECT l.id FROM looked l
  WHERE l.channel = $1 AND l.kept
    AND (SELECT true FROM mine k WHERE l.created_at >= k.start_at AND {matches("k", "l.type")})
    AND (SELECT true FROM {s}.subscriptions o
      WHERE o.channel = $1 AND o.consumer_group = $2 AND o.pattern <> $3 AND o.backfilled_at IS NOT NULL
        AND o.since_event_id < l.id AND l.created_at >= coalesce(o.start_at, '-infinity')
        AND {matches("o", "l.type")} LIMIT 1) IS NULL
), found AS MATERIALIZED (
  -- one by one, as in a claim. Nothing here joins two of these lists, which the planner takes for short
  SELECT f.* FROM wanted w CROSS JOIN LATERAL (
    SELECT e.id, e.id AS event_id, e.run_at, e.priority, e.channel, $2::text AS consumer_group, e.type, e.key
    FROM {s}.events e WHERE e.id = w.id ORDER BY e.id LIMIT 1 FOR KEY SHARE SKIP LOCKED) f
), missed AS MATERIALIZED (
  SELECT min(m.id) AS id FROM (SELECT w.id FROM wanted w EXCEPT SELECT f.id FROM found f) m
), placed AS MATERIALIZED (
  SELECT f.*, CASE WHEN f.key IS NULL OR (row_number() OVER (PARTITION BY f.key ORDER BY f.id) = 1 AND {first("f")})
                   THEN 'pending' ELSE 'blocked' END AS status
  FROM found f
), made AS (
  INSERT INTO {s}.deliveries (event_id, due_at, priority, channel, consumer_group, type, key, status, claim_seq)
  SELECT p.id, p.run_at, p.priority, p.channel, p.consumer_group, p.type, p.key, p.status, {UNUSED_CLAIM_SEQ}
  FROM placed p ON CONFLICT DO NOTHING RETURNING event_id
), revived AS (
  -- what the removal of the group had cancelled before it was declared again, not what was cancelled since
  UPDATE {s}.deliveries d SET status = p.status, due_at = p.run_at, finished_at = NULL, attempt = 0, lost = 0,
    round = least(d.round + 1, 32767)
  FROM (SELECT p.status, p.run_at, c.place FROM placed p CROSS JOIN LATERAL (
    SELECT c.ctid AS place, c.status, c.finished_at FROM {s}.deliveries c
    WHERE c.event_id = p.id AND c.consumer_group = $2 ORDER BY c.event_id LIMIT 1) c
    WHERE c.status = 'cancelled' AND c.finished_at <= (
      SELECT g.created_at FROM {s}.consumer_groups g WHERE g.channel = $1 AND g.consumer_group = $2)) p
  WHERE d.ctid = p.place AND d.status = 'cancelled'
  RETURNING d.event_id
), unwanted AS (
  DELETE FROM {s}.deliveries d USING (
    SELECT u.place FROM made CROSS JOIN LATERAL (
      SELECT u.ctid AS place FROM {s}.deliveries u
      WHERE u.event_id = made.event_id AND $2 <> 'default' AND u.consumer_group = 'default' AND u.status = 'unhandled'
        AND NOT EXISTS (SELECT FROM {s}.subscriptions o WHERE o.channel = u.channel AND o.consumer_group = 'default'
          AND (o.pattern = u.type
               OR (starts_with(u.type || '.', o.prefix) AND (o.regex IS NULL OR u.type || '.' ~ o.regex))))
      ORDER BY u.event_id LIMIT 1) u) x
  WHERE d.ctid = x.place AND d.status = 'unhandled'
), told AS MATERIALIZED (
  SELECT pg_notify($1, '') WHERE EXISTS (SELECT FROM made) OR EXISTS (SELECT FROM revived)
)
SELECT (SELECT count(*) FROM made) + (SELECT count(*) FROM revived) AS made, (SELECT max(id) FROM looked) AS reached,
       (SELECT id FROM missed) AS missed, EXISTS (SELECT FROM mine) AS there, (SELECT count(*) FROM told) AS told"""
        self.backfilled: Final = f"""
WITH done AS (
  UPDATE {s}.subscriptions k SET backfilled_at = now()
  WHERE k.channel = $1::text AND k.consumer_group = $2::text AND k.pattern = $3::text
    AND k.created_at = $4::text::timestamptz
), told AS MATERIALIZED (SELECT pg_notify($1::text, ''))
SELECT count(*) FROM told"""

        # What was finished in some group: $1 more than so many seconds ago, $2 after a time in microseconds since the
        # epoch, $3 limit, $4 channel. Those of other channels come too, or looking for ours among them would have no
        # end. WITH TIES, because the time is the whole place: what ended at one moment comes at once, and never again.
        self.finished: Final = f"""
SELECT d.event_id, d.type, d.channel = $4::text AS ours, (extract(epoch FROM d.finished_at) * 1000000)::bigint AS place,
       true AS old, false AS young
FROM {s}.deliveries d
WHERE d.status IN ('completed', 'cancelled') AND d.finished_at < now() - make_interval(secs => $1::double precision)
  AND d.finished_at > timestamptz 'epoch' + interval '1 microsecond' * $2::bigint
ORDER BY d.finished_at FETCH FIRST ($3::integer) ROWS WITH TIES"""
        # What died in one group: $1 to $4 as above, $5 group.
        self.died: Final = f"""
SELECT d.event_id, d.type, true AS ours, (extract(epoch FROM d.finished_at) * 1000000)::bigint AS place, true AS old,
       false AS young
FROM {s}.deliveries d
WHERE d.status = 'dead' AND d.channel = $4::text AND d.consumer_group = $5::text
  AND d.finished_at < now() - make_interval(secs => $1::double precision)
  AND d.finished_at > timestamptz 'epoch' + interval '1 microsecond' * $2::bigint
ORDER BY d.finished_at FETCH FIRST ($3::integer) ROWS WITH TIES"""
        # What nobody handles of one type: $1 seconds, $2 after this event id, $3 to $5 as above, $6 type; whether it is
        # old enough, and whether it was published since.
        self.unhandled: Final = f"""
SELECT u.event_id, $6::text AS type, true AS ours, u.event_id AS place,
  greatest(u.due_at, e.created_at) < now() - make_interval(secs => $1::double precision) AS old,
  e.created_at >= now() - make_interval(secs => $1::double precision) AS young
FROM (
  SELECT d.event_id, d.due_at FROM {s}.deliveries d
  WHERE d.status = 'unhandled' AND d.channel = $4::text AND d.consumer_group = $5::text AND d.type = $6::text
    AND d.event_id > $2::bigint ORDER BY d.event_id LIMIT $3::integer) u
LEFT JOIN LATERAL (SELECT e.created_at FROM {s}.events e WHERE e.id = u.event_id ORDER BY e.id LIMIT 1) e ON true
ORDER BY u.event_id"""

        # Events by their ids, and which of them no delivery is left of, because no group keeps its history: $1 seconds,
        # $2 after this event id, $3 how many events to look at, $4 channel.
        self.bare: Final = f"""
SELECT u.id AS event_id, u.type, u.channel = $4::text AS ours, u.id AS place,
  u.channel = $4 AND greatest(u.created_at, u.run_at) < now() - make_interval(secs => $1::double precision) AND (
    SELECT d.event_id FROM {s}.deliveries d WHERE d.event_id = u.id ORDER BY d.event_id LIMIT 1) IS NULL AS old,
  u.created_at >= now() - make_interval(secs => $1::double precision) AS young
FROM (
  SELECT e.id, e.type, e.channel, e.created_at, e.run_at FROM {s}.events e
  WHERE e.id > $2::bigint ORDER BY e.id LIMIT $3::integer) u
ORDER BY u.id"""

        # The groups with deliveries of a status: $1 channel. A skip scan, as below for the types.
        def groups_with(status: str) -> str:
            return f"""
WITH RECURSIVE g AS (
  SELECT (SELECT d.consumer_group FROM {s}.deliveries d WHERE d.status = '{status}' AND d.channel = $1::text
          ORDER BY d.consumer_group LIMIT 1) AS name
  UNION ALL
  SELECT (SELECT d.consumer_group FROM {s}.deliveries d WHERE d.status = '{status}' AND d.channel = $1
            AND d.consumer_group > g.name ORDER BY d.consumer_group LIMIT 1) FROM g WHERE g.name IS NOT NULL
)
SELECT name FROM g WHERE name IS NOT NULL"""

        self.groups_with_dead: Final = groups_with("dead")
        self.groups_with_unhandled: Final = groups_with("unhandled")
        # In one transaction: $1 event ids, $2 for each the seconds for which what is finished is kept, $3 the same for
        # the dead, $4 for the unhandled.
        self.lock_ripe: Final = lock_ripe(s, NUMBERED)
        self.delete_ripe: Final = delete_ripe(s, NUMBERED)
        # What this worker's settings say: $1 worker, $2 JSON.
        self.declare_retention: Final = f"UPDATE {s}.workers SET retention = $2::jsonb WHERE id = $1::bigint"
        # What those of all that run say, and the clock in microseconds: $1 channel.
        self.retentions: Final = f"""
SELECT (extract(epoch FROM now()) * 1000000)::bigint AS now, array(
  SELECT w.retention::text FROM {s}.workers w
  WHERE w.channel = $1::text AND w.ended_at IS NULL AND w.retention IS NOT NULL) AS retentions"""
        self.prune_workers: Final = f"""
DELETE FROM {s}.workers w WHERE w.ended_at < now() - interval '1 day'
  AND NOT EXISTS (SELECT FROM {s}.deliveries d WHERE d.worker_id = w.id AND d.status = 'running')"""

        # Whether the role may know which id was given out last: $1 schema.
        self.may_read_sequence: Final = """
SELECT has_sequence_privilege(q.name, 'SELECT') OR has_sequence_privilege(q.name, 'USAGE')
FROM (SELECT pg_get_serial_sequence(quote_ident($1::text) || '.events', 'id') AS name) q"""
        # The tables whose rows are subject to policies for this role, and whether one lets it read and change some: $1
        # schema. A claim needs both: what it may not change it does not see.
        self.row_security: Final = """
SELECT c.relname AS name, (
  SELECT count(DISTINCT verb) = 2 FROM (VALUES ('r'), ('w')) v(verb) JOIN pg_catalog.pg_policy p
    ON p.polrelid = c.oid AND p.polpermissive AND p.polcmd::text IN ('*', verb)
  WHERE 0 = ANY (p.polroles) OR EXISTS (SELECT FROM unnest(p.polroles) r(role) WHERE pg_has_role(r.role, 'USAGE'))
) AS seen
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1::text AND c.relname IN ('events', 'deliveries', 'consumer_groups', 'subscriptions', 'workers',
    'schedules') AND c.relkind = 'r' AND row_security_active(c.oid) ORDER BY c.relname"""
        # Whether the server takes writes, and what of it the role may not do: $1 schema.
        self.fitness: Final = """
SELECT pg_is_in_recovery() AS standby, array(
  SELECT v.verb || ' on ' || v.name
  FROM (VALUES ('events', 'SELECT'), ('deliveries', 'SELECT'), ('deliveries', 'UPDATE'), ('consumer_groups', 'SELECT'),
    ('workers', 'SELECT'), ('workers', 'INSERT'), ('workers', 'UPDATE')) v(name, verb)
  LEFT JOIN (pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = $1::text)
    ON c.relname = v.name
  WHERE has_table_privilege(c.oid, v.verb) IS NOT TRUE
  UNION ALL SELECT 'USAGE on the schema'
  FROM pg_catalog.pg_namespace n WHERE n.nspname = $1 AND NOT has_schema_privilege(n.oid, 'USAGE')) AS missing"""
        # Defaults under which a statement would not be what it has to be: $1 their names.
        self.defaults: Final = """
SELECT u.name, current_setting(u.name, true) AS value FROM unnest($1::text[]) u(name)"""
        self.has_version: Final = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
  WHERE n.nspname = $1::text AND p.proname = 'schema_version' AND p.pronargs = 0)"""
        self.version: Final = f"SELECT {s}.schema_version()"
        # The columns of the events: $1 schema.
        self.event_columns: Final = """
SELECT a.attname FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1::text AND c.relname = 'events' AND a.attnum > 0 AND NOT a.attisdropped"""

    # What an earlier delivery may have left on the connection: settings, a role, session-level advisory locks. In a
    # transaction of its own, or a later ROLLBACK would bring the settings back.
    CLEAN: Final = (
        "BEGIN; RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; "
        "SELECT pg_catalog.pg_advisory_unlock_all(); COMMIT; "
    )

    @staticmethod
    def begin(isolation_level: str, marker: str) -> str:
        """Return the message that opens the handlers' transaction; *marker* dies with any COMMIT or ROLLBACK."""
        return f"BEGIN ISOLATION LEVEL {isolation_level} READ WRITE; SET LOCAL pgebus.tx = {quote_literal(marker)}"

    def end(
        self, event_id: int, group: str, claim_seq: int, worker_id: int, marker: str, *, forget: bool = False
    ) -> str:
        """Return the message that completes a delivery and commits: all of it, or nothing.

        With *forget* the delivery is deleted, where that cannot repeat it.

        One message, so no second round trip; the simple protocol that allows it knows no parameters.
        """
        return (
            # A handler may have taken another role for its statements; the completion is ours.
            f"RESET ROLE; SELECT {quote_identifier(self.schema)}.complete({event_id:d}, {quote_literal(group)}, "
            f"{claim_seq:d}, {worker_id:d}, {quote_literal(marker)}{', true' if forget else ''}); COMMIT"
        )
