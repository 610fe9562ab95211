"""Who keeps VACUUM from removing dead rows: the oldest snapshots, and what holds them.

What is busy is updated several times for each delivery; rows that cannot be removed make every claim slower.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from pgebus.doctor._asking import Ask, age
from pgebus.doctor._findings import Finding, notice, warning
from pgebus.names import quote_identifier, quote_literal

# The times and the state of other roles' sessions are NULL for whoever has not pg_read_all_stats.
_SESSIONS: Final = """
SELECT a.pid, a.usename AS role, a.application_name AS name, a.state, a.backend_type IS NULL AS hidden,
  extract(epoch FROM clock_timestamp() - a.xact_start)::double precision AS seconds,
  greatest(age(a.backend_xmin), age(a.backend_xid)) AS behind
FROM pg_catalog.pg_stat_activity a
WHERE (a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL) AND a.pid <> pg_backend_pid()
  AND a.datname = current_database()
  AND coalesce(a.backend_type, 'client backend') NOT IN ('walsender', 'autovacuum worker')
ORDER BY behind DESC LIMIT 100"""


async def transactions(ask: Ask) -> AsyncIterator[Finding]:
    """Sessions and prepared transactions whose snapshot is old."""
    rows = await ask.rows(_SESSIONS)
    limits = ask.limits
    for row in rows:
        if row["hidden"]:
            if row["behind"] < limits.transaction_ids:
                continue
        elif row["seconds"] is None or row["seconds"] < limits.transaction_seconds:
            continue
        since = "its state and age are hidden from this role" if row["hidden"] else f"{row['state']}"
        length = "" if row["hidden"] else f"for {age(row['seconds'])}"
        yield warning(
            "old-transaction",
            f"Session {row['pid']} of role {row['role']!r} ({row['name'] or 'without a name'}; {since}) is in a "
            f"transaction {length}{' and ' if length else ', and '}{row['behind']:,} transactions have begun since: "
            "rows that died meanwhile cannot be removed.",
            f"End it in its program, or: SELECT pg_terminate_backend({row['pid']});",
            str(row["pid"]),
        )
    if hidden := sum(row["hidden"] for row in rows):
        yield notice(
            "not-visible",
            f"Since when {hidden} {'transaction' if hidden == 1 else 'transactions'} of other roles are open is hidden "
            "from this role.",
            "GRANT pg_read_all_stats TO … for the role that examines.",
            "transactions",
        )
    for row in await ask.rows(
        "SELECT gid, owner, extract(epoch FROM clock_timestamp() - prepared)::double precision AS seconds"
        " FROM pg_catalog.pg_prepared_xacts WHERE database = current_database()"
        " AND prepared < clock_timestamp() - make_interval(secs => $1::double precision) ORDER BY prepared LIMIT 100",
        limits.transaction_seconds,
    ):
        gid = quote_literal(row["gid"])
        yield warning(
            "prepared-transaction",
            f"Transaction {gid} of role {row['owner']!r} was prepared {age(row['seconds'])} ago and never ended. It "
            "keeps dead rows and locks, also over a restart.",
            f"COMMIT PREPARED {gid}; or ROLLBACK PREPARED {gid};",
            row["gid"],
        )


async def replication(ask: Ask) -> AsyncIterator[Finding]:
    """Slots and standbys whose snapshot is old."""
    for row in await ask.rows(
        "SELECT slot_name::text AS name, slot_type AS kind, active, age(xmin) AS behind"
        " FROM pg_catalog.pg_replication_slots ORDER BY slot_name LIMIT 100"
    ):
        drop = f"SELECT pg_drop_replication_slot({quote_literal(row['name'])});"
        if not row["active"]:
            yield warning(
                "replication-slot-inactive",
                f"Nobody reads replication slot {quote_identifier(row['name'])} ({row['kind']}): it keeps write-ahead "
                "log until the disk is full, and may keep dead rows.",
                f"Start what reads it, or, where nobody does: {drop}",
                row["name"],
            )
        elif row["behind"] is not None and row["behind"] >= ask.limits.transaction_ids:
            yield warning(
                "replication-slot-behind",
                f"Replication slot {quote_identifier(row['name'])} ({row['kind']}) keeps dead rows of the last "
                f"{row['behind']:,} transactions.",
                "End the long transaction on the standby, or set hot_standby_feedback = off there.",
                row["name"],
            )
    for row in await ask.rows(
        "SELECT pid, application_name AS name, age(backend_xmin) AS behind FROM pg_catalog.pg_stat_replication"
        " WHERE age(backend_xmin) >= $1::double precision ORDER BY 3 DESC LIMIT 100",
        ask.limits.transaction_ids,
    ):
        yield warning(
            "standby-feedback",
            f"Standby {row['name']!r} has hot_standby_feedback, and a query there keeps dead rows of the last "
            f"{row['behind']:,} transactions here.",
            "End the long query on the standby, or set hot_standby_feedback = off there.",
            row["name"],
        )
