"""Many events as plain rows: checked without making an `Event` of each, and sent by COPY where that is possible.

It commits nothing. Where COPY is not possible it says so, and the events go the ordinary way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import asyncpg
from sqlalchemy import ClauseElement, Column, Connection, Dialect, inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.types import TypeEngine

from pgebus._causes import inherit
from pgebus._writing import table_of
from pgebus.errors import InvalidEventTypeError, PgebusError, PublishError
from pgebus.inheritance import family, loaded_columns
from pgebus.models import Event
from pgebus.names import check_channel, check_event_type, check_key, check_priority
from pgebus.payloads import check_headers, check_payload_text, check_run_at

Row = dict[str, Any]

# From how many rows on: it takes one round trip more, for the ids.
COPY_FROM: Final = 100

# What a row may give of ours, and how it is checked; the payload has a limit of its own for each class.
_CHECKS: Final[dict[str, Callable[[Any], Any]]] = {
    "channel": check_channel,
    "key": lambda value: check_key(value, what="key"),
    "dedup_key": lambda value: check_key(value, what="dedup_key"),
    "priority": check_priority,
    "headers": check_headers,
    "run_at": check_run_at,
}

# The ids are taken first, because COPY returns nothing. A role that may not do so gets no row. It need not be able to
# read the table: the driver asks for the types of the columns by a statement that it prepares and never executes.
_RESERVE: Final = text("""
SELECT ARRAY(SELECT nextval(q.sequence) FROM generate_series(1, :count)) AS ids, now() AS now FROM (
  SELECT pg_get_serial_sequence(:table, 'id')::regclass AS sequence) q
WHERE has_sequence_privilege(q.sequence, 'USAGE')
""")


def checked_rows(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return *rows* as they can be sent, the payload as JSON text.

    Raises:
        InvalidEventTypeError, InvalidChannelError, PublishError: If one is invalid; the note of the error names its
            index.
    """
    types: dict[str, _Kind] = {}
    checked: list[Row] = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise PublishError(
                f"events[{index}] is no row but {type(row).__name__[:80]}. Give rows only, or events only."
            )
        try:
            checked.append(_checked(row, types))
        except PgebusError as error:
            error.add_note(f"That is events[{index}].")
            raise
    return checked


class _Kind:
    """What is known of the events of one type."""

    def __init__(self, event_type: str) -> None:
        self.event_class = family.class_of(check_event_type(event_type))
        self.columns = {key for key, _ in loaded_columns(self.event_class.__mapper__)}
        self.limit: int = self.event_class.max_payload_bytes


def _checked(row: Mapping[str, Any], types: dict[str, _Kind]) -> Row:
    event_type = row.get("type")
    kind = types.get(event_type) if isinstance(event_type, str) else None
    if kind is None:
        if event_type is None:
            raise InvalidEventTypeError("An event without a type: write {'type': 'order.placed', …}.", value=None)
        kind = types[check_event_type(event_type)] = _Kind(event_type)
    made: Row = {}
    for name, value in row.items():
        if name == "payload":
            made[name] = check_payload_text(value, limit=kind.limit)
        elif value is not None and (check := _CHECKS.get(name)) is not None:
            made[name] = check(value)
        elif name not in kind.columns or name in ("id", "created_at"):
            raise PublishError(f"{kind.event_class.__qualname__} takes no {str(name)[:80]!r}.")
        elif value is not None:
            made[name] = value
    return made


def checked_row(row: Mapping[str, Any]) -> Row:
    """Return *row* as it can be sent, the payload as JSON text.

    Raises:
        InvalidEventTypeError, InvalidChannelError, PublishError: If it is invalid.
    """
    return _checked(row, {})


def is_complete(row: Row) -> bool:
    """Return whether an INSERT of *row*, by the names of the columns, makes the event that it stands for.

    Not where SQLAlchemy would fill in a default, or knows how to write a value.
    """
    columns = family.table.columns
    mine = {column.key for _, column in loaded_columns(family.class_of(row["type"]).__mapper__)}
    return row.keys() <= set(columns.keys()) and not any(
        (column.default is not None and name not in row)
        if name not in row
        else isinstance(row[name], ClauseElement) or type(column.type).bind_expression is not TypeEngine.bind_expression
        for name, column in columns.items()
        if name in mine and name not in family.own_columns
    )


def as_events(rows: Sequence[Row]) -> list[Event]:
    """Make the events of checked *rows*, for the ordinary way."""
    events = []
    for row in rows:
        given = dict(row)
        if "payload" in given:
            given["payload"] = json.loads(given["payload"])
        events.append(family.class_of(given["type"])(**given))
    return events


def as_rows(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Return what is set of new *events*, as rows that are still to be checked."""
    rows = []
    for event in events:
        values = inspect(event).dict
        names = [key for key, _ in loaded_columns(inspect(event).mapper)]
        rows.append({name: values[name] for name in names if values.get(name) is not None})
    return rows


def copy_rows(connection: Connection, rows: Sequence[Row], inherited: Mapping[str, Any]) -> list[int] | None:
    """Send *rows* by COPY in the transaction of *connection*.

    Args:
        connection: One that can publish.
        rows: Checked ones.
        inherited: Headers that each gets besides its own.

    Returns:
        The ids, in the order of the rows; None where COPY is not possible, and nothing was inserted.

    Raises:
        sqlalchemy.exc.DBAPIError: If it fails.
    """
    if len(rows) < COPY_FROM or connection.dialect.driver != "asyncpg":
        return None
    if inherited:
        rows = [{**row, "headers": check_headers(inherit(inherited, row.get("headers") or {}))} for row in rows]
    columns = _columns(rows)
    if columns is None:
        return None
    schema, table = table_of(connection)
    reserved = connection.execute(_RESERVE, {"count": len(rows), "table": table}).one_or_none()
    if reserved is None:
        return None
    ids: list[int] = sorted(reserved.ids)
    defaults = {"channel": "events", "priority": 0, "headers": {}, "payload": "{}", "run_at": reserved.now}
    makers = makers_of([column.key for column in columns], connection.dialect, defaults)
    records = [(id_, *(make(row) for make in makers)) for id_, row in zip(ids, rows, strict=True)]
    adapted: Any = connection.connection.dbapi_connection
    names = ["id", *(str(column.name) for column in columns)]
    try:
        adapted.run_async(lambda driver: _copy(driver, schema, names, records))
    except (TimeoutError, asyncio.CancelledError) as error:
        # Nobody knows what the next statement would meet there. And SQLAlchemy has to know: it would roll back on it,
        # and that error would take the place of this one.
        connection.invalidate(error)
        raise
    return ids


def _columns(rows: Sequence[Row]) -> list[Column[Any]] | None:
    """Return the columns that any of *rows* gives; None where the others need more than COPY can do."""
    given: set[str] = set().union(*rows)
    columns = family.table.columns
    if "dedup_key" in given or not given <= set(columns.keys()):  # an attribute may have another name than its column
        return None
    for name, column in columns.items():
        if name not in family.own_columns and not _can_copy(column, name, rows, given=name in given):
            return None
    return [column for name, column in columns.items() if name in given]


def _can_copy(column: Column[Any], name: str, rows: Sequence[Row], *, given: bool) -> bool:
    """Return whether COPY can fill a column of the application's: it takes no expressions, and asks for no default."""
    if type(column.type).bind_expression is not TypeEngine.bind_expression and given:
        return False
    if any(isinstance(row.get(name), ClauseElement) for row in rows if given):
        return False
    optional = column.nullable and column.default is None and column.server_default is None
    return optional or all(name in row for row in rows)


def makers_of(
    names: Sequence[str], dialect: Dialect, defaults: Mapping[str, Any] | None = None
) -> list[Callable[[Row], Any]]:
    """Return what takes the values of columns out of a row, as the driver takes them."""
    return [_maker(family.table.columns[name], dialect, (defaults or {}).get(name)) for name in names]


def _maker(column: Column[Any], dialect: Dialect, default: object) -> Callable[[Row], Any]:
    name = column.key
    if name == "payload":
        return lambda row: row.get(name, default)
    processor = column.type.dialect_impl(dialect).bind_processor(dialect)
    if processor is None:
        return lambda row: row.get(name, default)
    return lambda row: processor(row.get(name, default))


async def _copy(
    driver: asyncpg.Connection[asyncpg.Record], schema: str, columns: list[str], records: list[tuple[Any, ...]]
) -> None:
    with driver_error(f"COPY events ({', '.join(columns)})"):
        await driver.copy_records_to_table("events", schema_name=schema, columns=columns, records=records)


@contextlib.contextmanager
def driver_error(sql: str) -> Iterator[None]:
    """Raise the driver's errors as SQLAlchemy's, without parameters: they would hold payloads."""
    try:
        yield
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        kind = IntegrityError if isinstance(error, asyncpg.IntegrityConstraintViolationError) else DBAPIError
        wrapped = kind(sql, None, error, hide_parameters=True)
        # As SQLAlchemy words it; the driver adds PostgreSQL's DETAIL, which may quote the row, with its payload.
        wrapped.args = (f"({type(error).__module__}.{type(error).__name__}) {error.args[0] if error.args else ''}",)
        raise wrapped from error
