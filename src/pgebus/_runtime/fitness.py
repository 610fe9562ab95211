"""Whether the database lets this worker work: rights, row-level security, a standby.

Asked at the start and every few seconds since: what is refused only at the next claim, or gives no error at all, would
look like an empty queue until then.
"""

from __future__ import annotations

import logging
from typing import Final

from pgebus._runtime.statements import Statements
from pgebus._runtime.store import Line
from pgebus.errors import ConfigurationError
from pgebus.names import quote_identifier

logger = logging.getLogger(__name__)

# How often that is asked. Together with the pause of the loop that asks, it bounds how long health is wrong.
ASK_SECONDS: Final = 5.0


async def require_visible(line: Line, statements: Statements) -> None:
    """Refuse a role from which row-level security hides everything; warn where it may hide something.

    Raises:
        ConfigurationError: If no policy lets the role read and change the rows.
    """
    rows = await line.fetch(statements.row_security, statements.schema)
    if blind := [row["name"] for row in rows if not row["seen"]]:
        raise ConfigurationError(_hidden(statements.schema, blind))
    if rows:
        logger.warning(
            "Row-level security is active for this role on %s of schema %r. What its policies hide is never handled, "
            "and looks like an empty queue; an event that is hidden while its delivery is not becomes a dead letter.",
            ", ".join(row["name"] for row in rows),
            statements.schema,
        )


async def complaints(line: Line, statements: Statements) -> tuple[str, ...]:
    """Return why nothing can be claimed now, in plain words; nothing if it can.

    Raises:
        asyncpg.PostgresError, OSError, TimeoutError: If the database does not answer.
    """
    (row,) = await line.fetch(statements.fitness, statements.schema)
    found = []
    if row["standby"]:
        found.append("The server is a standby, and refuses every write.")
    if row["missing"]:
        found.append(f"The role has lost rights, or tables are gone: {', '.join(row['missing'])}.")
    hiding = await line.fetch(statements.row_security, statements.schema)
    if blind := [each["name"] for each in hiding if not each["seen"]]:
        found.append(_hidden(statements.schema, blind))
    return tuple(found)


def _hidden(schema: str, tables: list[str]) -> str:
    table = f"{quote_identifier(schema)}.{tables[0]}"
    return (
        f"Row-level security hides every row of {', '.join(tables)} in schema {schema!r} from this role: nothing would "
        f"ever be claimed, and the queue would look empty. Give the role BYPASSRLS, or a policy on each of them, such "
        f"as CREATE POLICY worker ON {table} TO … USING (true)."
    )
