"""The server: its release, its settings, its connections, its queue of notifications."""

# ruff: noqa: S608 - what is filled in are quoted identifiers and text of this package

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from typing import Final

from pgebus._runtime.requirements import CLAIM_DEFAULTS, TRIGGERS_FIRE
from pgebus.doctor._asking import Ask, age
from pgebus.doctor._findings import Finding, notice, problem, warning
from pgebus.models import BEAT_ABSENT_SECONDS
from pgebus.names import quote_identifier

_OLDEST: Final = 13
# The last day of support by the PostgreSQL project, from https://www.postgresql.org/support/versioning/
_END_OF_LIFE: Final = {
    13: date(2025, 11, 13),
    14: date(2026, 11, 12),
    15: date(2027, 11, 11),
    16: date(2028, 11, 9),
    17: date(2029, 11, 8),
    18: date(2030, 11, 14),
}
# Connections of a worker's own, besides those of its handlers: four for statements, one that listens.
_OWN_CONNECTIONS: Final = 5
_MANY_SECONDS: Final = 300


async def release(ask: Ask) -> AsyncIterator[Finding]:
    """Which PostgreSQL it is, and whether it takes writes."""
    row = await ask.row(
        "SELECT current_setting('server_version_num')::integer / 10000 AS major, current_setting('server_version')"
        " AS version, pg_is_in_recovery() AS standby, clock_timestamp() AS clock"
    )
    if row["standby"]:
        yield problem(
            "standby", "The server is a standby: workers and publishers cannot write on it.", "Name the primary."
        )
    ends = _END_OF_LIFE.get(row["major"])
    if row["major"] < _OLDEST:
        yield problem(
            "postgres-too-old",
            f"The server is PostgreSQL {row['version']}; pgebus needs {_OLDEST} or newer.",
            "Upgrade PostgreSQL.",
        )
    elif ends is not None and row["clock"].date() > ends:
        yield notice(
            "postgres-end-of-life",
            f"PostgreSQL {row['version']} has had no corrections since {ends}.",
            "Upgrade PostgreSQL to a newer major version.",
        )


async def settings(ask: Ask) -> AsyncIterator[Finding]:
    """Settings under which commits are lost, or nobody notices what is stuck."""
    row = await ask.row(
        "SELECT current_setting('fsync') AS fsync, current_setting('full_page_writes') AS pages, current_user AS role,"
        " current_setting('idle_in_transaction_session_timeout') AS idle,"
        " inet_server_addr() IS NOT NULL AS tcp, (SELECT setting::integer FROM pg_catalog.pg_settings"
        " WHERE name = 'tcp_keepalives_idle') AS keepalive"
    )
    if row["fsync"] == "off":
        yield problem(
            "fsync-off",
            "fsync is off: when the machine crashes, events are lost or the whole cluster is.",
            "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf();",
        )
    if row["pages"] == "off":
        yield problem(
            "full-page-writes-off",
            "full_page_writes is off: when the machine crashes, pages may be torn and rows damaged.",
            "ALTER SYSTEM SET full_page_writes = on; SELECT pg_reload_conf();",
        )
    if row["idle"] in ("0", "0ms"):
        yield notice(
            "idle-in-transaction-unlimited",
            f"idle_in_transaction_session_timeout is 0 for role {row['role']!r}: a program that hangs in a transaction "
            "keeps dead rows and locks for ever.",
            "ALTER ROLE … SET idle_in_transaction_session_timeout = '5min', for the roles of your programs.",
        )
    if row["tcp"] and (row["keepalive"] == 0 or row["keepalive"] > _MANY_SECONDS):
        yield notice(
            "keepalives-late",
            f"tcp_keepalives_idle is {row['keepalive']} s: the server keeps the session of a client that has vanished, "
            "with its transaction and locks, for longer than that. Workers set 2 s for the connection that listens.",
            "ALTER SYSTEM SET tcp_keepalives_idle = 60; SELECT pg_reload_conf();",
        )
    async for finding in _defaults(ask):
        yield finding


# What the roles that may publish or work here, and the database, have set for themselves.
_ROLES: Final = """
SELECT coalesce(r.rolname, '') AS role, split_part(c.text, '=', 1) AS name,
  substr(c.text, strpos(c.text, '=') + 1) AS value
FROM pg_catalog.pg_db_role_setting o CROSS JOIN unnest(o.setconfig) c(text)
LEFT JOIN pg_catalog.pg_roles r ON r.oid = o.setrole
WHERE o.setdatabase IN (0, (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()))
  AND split_part(c.text, '=', 1) = ANY ($2::text[])
  AND (o.setrole = 0 OR has_table_privilege(o.setrole, (SELECT t.oid FROM pg_catalog.pg_class t
    JOIN pg_catalog.pg_namespace n ON n.oid = t.relnamespace WHERE n.nspname = $1::text AND t.relname = 'events'),
    'INSERT'))
UNION SELECT '', s.name, s.reset_val FROM pg_catalog.pg_settings s
WHERE s.name = ANY ($2::text[]) AND s.source IN ('configuration file', 'command line')
ORDER BY 1, 2"""


async def _defaults(ask: Ask) -> AsyncIterator[Finding]:
    accepted = {name: (values, right) for name, values, right in CLAIM_DEFAULTS}
    accepted["session_replication_role"] = (TRIGGERS_FIRE, "origin")
    for row in await ask.rows(_ROLES, ask.schema, list(accepted)):
        values, right = accepted[row["name"]]
        if row["value"] in values:
            continue
        whose = f"role {row['role']!r}" if row["role"] else "the database or the server"
        what = f"{row['name']} is {row['value']!r} by default for {whose}"
        change = f"ALTER ROLE {quote_identifier(row['role']) if row['role'] else '…'} SET {row['name']} = '{right}';"
        if row["name"] == "session_replication_role":
            yield problem(
                "triggers-off",
                f"{what}: no trigger fires in its sessions, so what is published there gets no delivery, and is lost. "
                "Workers refuse to start with it.",
                f"{change} Reconnect, and look for events that have no delivery.",
                row["role"] or None,
            )
        elif row["name"] == "synchronous_commit":
            yield warning(
                "synchronous-commit-off",
                f"{what}: what was published in the last second before a crash of the server may be lost.",
                change,
                row["role"] or None,
            )
        else:
            yield notice(
                "transaction-default",
                f"{what}. Workers set it for themselves, except behind a transaction pooler, where they refuse to "
                "start.",
                change,
                row["role"] or None,
            )


async def connections(ask: Ask) -> AsyncIterator[Finding]:
    """Whether connections run out, now or when all workers need theirs."""
    row = await ask.row(
        "SELECT current_setting('max_connections')::integer"
        " - current_setting('superuser_reserved_connections')::integer AS most, (SELECT count(*)"
        " FROM pg_catalog.pg_stat_activity WHERE coalesce(backend_type, 'client backend') = 'client backend') AS used,"
        " (SELECT count(*) FROM {s}.workers WHERE ended_at IS NULL AND (backend_pid IS NOT NULL"
        f" OR beat_at > clock_timestamp() - interval '{BEAT_ABSENT_SECONDS} seconds')) AS workers"
    )
    most, used = row["most"], row["used"]
    if used >= ask.limits.connection_share * most:
        yield warning(
            "connections-near-limit",
            f"{used} of {most} connections are in use. The next worker or publisher may be refused.",
            "Lower pool_size and n_workers, raise max_connections, or put a pooler in between.",
        )
    each = ask.settings.event_system.n_workers + _OWN_CONNECTIONS
    if row["workers"] * each > most:
        yield notice(
            "connections-may-run-out",
            f"{row['workers']} workers with {each} connections each, which is what the settings here say, need "
            f"{row['workers'] * each}; the server has {most}.",
            "Lower n_workers, raise max_connections, or put a pooler in between.",
        )


async def notifications(ask: Ask) -> AsyncIterator[Finding]:
    """Whether the queue of NOTIFY fills up, because a session that listens is in a transaction."""
    row = await ask.row("SELECT pg_notification_queue_usage() AS share")
    if row["share"] > ask.limits.notify_share:
        make = problem if row["share"] > 0.5 else warning
        yield make(
            "notify-queue-fills",
            f"{100 * row['share']:.1f} % of the queue of NOTIFY is used; when it is full, publishers fail. A session "
            "that listens is in a long transaction.",
            "SELECT pid, usename, application_name, xact_start FROM pg_stat_activity ORDER BY xact_start; end the "
            "oldest session that listens.",
        )


def this_clock() -> float:
    """Return the time of this machine, in seconds since 1970."""
    return time.time()


async def clocks(ask: Ask) -> AsyncIterator[Finding]:
    """Whether the clock of this machine is the database's."""
    async with ask.transaction():
        before = this_clock()
        clock: datetime = await ask.driver.fetchval("SELECT clock_timestamp()")
        after = this_clock()
    ahead = (before + after) / 2 - clock.astimezone(UTC).timestamp()
    if abs(ahead) - (after - before) / 2 > ask.limits.clock_seconds:
        yield warning(
            "clock-skew",
            f"The clock of this machine is {age(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} the database's. "
            "pgebus goes by the database's; a run_at that was computed here is off by as much.",
            "Synchronise the clocks (NTP) of this machine and of the server.",
        )
