"""What PostgreSQL's catalog says about a schema, as facts that can be compared with those of another one.

It judges nothing and knows no table of ours; `pgebus.drift` does both.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final, TypeAlias

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from pgebus.names import quote_identifier

__all__ = ["Facts", "Thing", "read_facts"]


@dataclass(frozen=True)
class Thing:
    """One object of a schema.

    Attributes:
        table: The table that it is part of; None for tables and functions.
        aspects: What there is to say about it. `definition` says all of it once more, as one statement.
    """

    table: str | None
    aspects: dict[str, str]


# By kind and name, in the order in which they are to be read.
Facts: TypeAlias = dict[tuple[str, str], Thing]

_FACTS: Final = sa.text("""
SELECT 1 AS place, 'table' AS kind, c.relname::text AS name, NULL::text AS table_name, json_build_object(
    'kind', CASE c.relkind WHEN 'r' THEN 'ordinary' WHEN 'p' THEN 'partitioned' WHEN 'f' THEN 'foreign'
        WHEN 'v' THEN 'a view' ELSE 'a materialized view' END,
    -- A copy in the session's temporary schema stands for an ordinary one.
    'persistence', CASE c.relpersistence WHEN 'u' THEN 'unlogged' ELSE 'logged' END,
    'storage parameters', coalesce((SELECT string_agg(o, ', ' ORDER BY o) FROM unnest(c.reloptions) o), 'none'),
    'owner', pg_get_userbyid(c.relowner),
    -- Of these alone: the list of all rights grows from one release of PostgreSQL to the next.
    'rights of its owner', coalesce((SELECT string_agg(DISTINCT a.privilege_type, ', ' ORDER BY a.privilege_type)
        FROM aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a
        WHERE a.grantee = c.relowner
          AND a.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')), 'none')
  )::text AS aspects
  FROM pg_class c WHERE c.relnamespace = :schema AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
UNION ALL
SELECT 2, 'column', c.relname || '.' || a.attname, c.relname, json_build_object(
    'type', format_type(a.atttypid, a.atttypmod),
    'collation', coalesce((SELECT l.collname::text FROM pg_collation l WHERE l.oid = a.attcollation), 'none'),
    'NULL', CASE WHEN a.attnotnull THEN 'refused' ELSE 'allowed' END,
    'default', CASE a.attgenerated WHEN '' THEN coalesce(pg_get_expr(d.adbin, d.adrelid), 'none') ELSE 'none' END,
    'generated as', CASE a.attgenerated WHEN '' THEN 'nothing'
        ELSE pg_get_expr(d.adbin, d.adrelid) || CASE a.attgenerated WHEN 's' THEN ' STORED' ELSE ' VIRTUAL' END END,
    'identity', CASE a.attidentity WHEN 'a' THEN 'ALWAYS' WHEN 'd' THEN 'BY DEFAULT' ELSE 'none' END
  )::text
  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
  LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
  WHERE c.relnamespace = :schema AND c.relkind IN ('r', 'p')
UNION ALL
SELECT 3, CASE k.contype WHEN 'p' THEN 'primary key' WHEN 'u' THEN 'unique constraint' WHEN 'f' THEN 'foreign key'
    WHEN 'c' THEN 'check' ELSE 'exclusion constraint' END, k.conname || ' on ' || c.relname, c.relname,
  json_build_object(
    'rule', pg_get_constraintdef(k.oid),
    -- Those of a foreign key: without them nothing looks at it any more.
    'triggers', CASE WHEN EXISTS (SELECT FROM pg_trigger t WHERE t.tgconstraint = k.oid AND t.tgenabled = 'D')
        THEN 'disabled' ELSE 'enabled' END
  )::text
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
  WHERE c.relnamespace = :schema AND k.contype IN ('p', 'u', 'f', 'c', 'x')
UNION ALL
SELECT 4, 'index', c.relname, t.relname, json_build_object(
    'columns', (SELECT string_agg(pg_get_indexdef(i.indexrelid, n, true), ', ' ORDER BY n)
        FROM generate_series(1, i.indnkeyatts) n),
    'included columns', coalesce((SELECT string_agg(pg_get_indexdef(i.indexrelid, n, true), ', ' ORDER BY n)
        FROM generate_series(i.indnkeyatts + 1, i.indnatts) n), 'none'),
    'condition', coalesce(pg_get_expr(i.indpred, i.indrelid), 'none'),
    'kind', CASE WHEN i.indisunique THEN 'unique' ELSE 'not unique' END,
    'state', CASE WHEN i.indisvalid AND i.indisready AND i.indislive THEN 'valid' ELSE 'invalid' END,
    'storage parameters', coalesce((SELECT string_agg(o, ', ' ORDER BY o) FROM unnest(c.reloptions) o), 'none'),
    'definition', pg_get_indexdef(i.indexrelid)
  )::text
  FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid
  WHERE t.relnamespace = :schema
    AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x'))
UNION ALL
SELECT 5, 'trigger', t.tgname || ' on ' || c.relname, c.relname, json_build_object(
    'state', CASE t.tgenabled WHEN 'O' THEN 'enabled' WHEN 'D' THEN 'disabled'
        WHEN 'R' THEN 'enabled on replicas alone' ELSE 'enabled always' END,
    'definition', pg_get_triggerdef(t.oid)
  )::text
  FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid WHERE c.relnamespace = :schema AND NOT t.tgisinternal
UNION ALL
SELECT 6, 'function', p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')', NULL, json_build_object(
    'result', coalesce(pg_get_function_result(p.oid), 'none'),
    'language', (SELECT l.lanname::text FROM pg_language l WHERE l.oid = p.prolang),
    'volatility', CASE p.provolatile WHEN 'i' THEN 'IMMUTABLE' WHEN 's' THEN 'STABLE' ELSE 'VOLATILE' END,
    'security', CASE WHEN p.prosecdef THEN 'DEFINER' ELSE 'INVOKER' END,
    'settings', coalesce((SELECT string_agg(o, '; ' ORDER BY o) FROM unnest(p.proconfig) o), 'none'),
    'body', p.prosrc,
    'owner', pg_get_userbyid(p.proowner),
    'may be run by', (SELECT CASE WHEN bool_or(a.grantee = 0) THEN 'everybody'
            WHEN bool_or(a.grantee <> p.proowner) THEN 'some roles' ELSE 'its owner alone' END
        FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE a.privilege_type = 'EXECUTE'),
    'definition', pg_get_functiondef(p.oid)
  )::text
  FROM pg_proc p WHERE p.pronamespace = :schema AND p.prokind IN ('f', 'p')
ORDER BY place, name
""").bindparams(sa.bindparam("schema", type_=sa.BigInteger))


async def read_facts(connection: AsyncConnection, schema: int, *, schemas: tuple[str, ...]) -> Facts:
    """Return what the catalog says about a schema, with its name taken out.

    Reads in one statement, so what it says was true at one moment.

    Args:
        connection: Any role may read the catalog.
        schema: The oid of the schema.
        schemas: Names to take out where they qualify another: of this schema, and of those it will be compared
            with. A name that is taken out of one text only would make two texts differ.
    """
    qualifier = _qualifier(schemas)
    rows = await connection.execute(_FACTS, {"schema": schema})
    return {
        (kind, name): Thing(
            table, {aspect: qualifier.sub("", text or "none") for aspect, text in json.loads(aspects).items()}
        )
        for _, kind, name, table, aspects in rows
    }


def _qualifier(schemas: tuple[str, ...]) -> re.Pattern[str]:
    # Always quoted in the bodies of our functions, and only where it has to be in what PostgreSQL deparses.
    written = [form for name in schemas for form in (quote_identifier(name), name)]
    names = "|".join(re.escape(form) for form in sorted(written, key=len, reverse=True))
    return re.compile(rf'(?<![\w"$.])(?:{names})\.')
