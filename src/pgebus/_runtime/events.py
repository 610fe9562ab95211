"""Makes the `Event` of a claimed row, without asking the database again; says which columns the claim has to bring.

Only for rows that a claim has just returned: nothing is checked. A value that its type refuses raises when the event is
asked for, so it costs its own delivery only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from sqlalchemy import ARRAY, JSON, Column, Date, DateTime, Dialect, Float, Interval, Time
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.orm import Mapper, make_transient_to_detached
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.types import TypeDecorator, TypeEngine

from pgebus.inheritance import family, loaded_columns
from pgebus.models import Event
from pgebus.names import quote_identifier

_Processor = Callable[[Any], Any]

# That of our engines. Types remember what they worked out for a dialect, so it has to be one and the same object.
_DIALECT: Final[Dialect] = asyncpg.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
# Numbers of types that PostgreSQL has fixed, in pg_type.dat.
_FLOAT8: Final = 701
_NUMERIC: Final = 1700


class _Attribute(NamedTuple):
    key: str
    in_row: str
    processor: _Processor | None


def event_from_row(row: Mapping[str, Any]) -> Event:
    """Return a detached, unmodified event with the columns of *row*, as a query would have loaded it.

    Of the class that its type stands for. A column that *row* lacks, because its class was defined after the claim,
    stays unloaded.
    """
    mapper = _mapper_of(row["type"])
    made: Event = mapper.class_manager.new_instance()  # no __init__: that would be a new event
    for key, name, processor in _attributes_of(mapper):
        if name in row:
            value = row[name]
            set_committed_value(made, key, value if processor is None else processor(value))
    make_transient_to_detached(made)
    return made


class _Selected:
    """The columns that subclasses have added, as the claim selects them; made anew when there are more."""

    def __init__(self) -> None:
        self._known = -1
        self._sql = ""
        self._plans: dict[Mapper[Any], tuple[_Attribute, ...]] = {}

    def sql(self) -> str:
        """Return what to append to the columns of the claim."""
        self._renew()
        return self._sql

    def plan(self, mapper: Mapper[Any]) -> tuple[_Attribute, ...]:
        """Return how the attributes of a class are read from a row."""
        self._renew()
        plan = self._plans.get(mapper)
        if plan is None:
            plan = self._plans[mapper] = tuple(
                _Attribute(key, str(column.name), None)
                if column.key in family.own_columns
                else _Attribute(key, _alias(column), _processor_of(column))
                for key, column in loaded_columns(mapper)
            )
        return plan

    def _renew(self) -> None:
        columns = family.table.columns
        if len(columns) != self._known:
            self._plans = {}
            self._sql = "".join(
                f",\n    {_expression(column)} AS {quote_identifier(_alias(column))}"
                for column in columns
                if column.key not in family.own_columns
            )
            self._known = len(columns)


_selected: Final = _Selected()
selected_columns: Final = _selected.sql
_attributes_of: Final = _selected.plan


def _mapper_of(event_type: str) -> Mapper[Any]:
    return family.classes[family.identity_of(event_type)]


def _alias(column: Column[Any]) -> str:
    """Return the name in the row. By number: a column may be called like one of the delivery's, or be too long."""
    return f"+{family.table.columns.keys().index(column.key)}"


def _native(column: Column[Any]) -> TypeEngine[Any]:
    """Return the type of a column on PostgreSQL, without the decorators around it."""
    kind: Any = column.type.dialect_impl(_DIALECT)
    while isinstance(kind, TypeDecorator):
        kind = kind.impl_instance
    return kind  # type: ignore[no-any-return]  # the loop leaves a type


def _expression(column: Column[Any]) -> str:
    """Return what the claim selects: what the driver could not decode would fail the batch, not its one delivery."""
    name = f"e.{quote_identifier(str(column.name))}"
    kind = _native(column)
    if isinstance(kind, JSON):
        return f"{name}::text"
    if isinstance(kind, (Date, DateTime)):
        return f"CASE WHEN NOT isfinite({name}) OR {name} > '0001-01-03' AND {name} < '9999-12-29' THEN {name} END"
    if isinstance(kind, Time):
        return f"CASE WHEN {name}::time < '24:00' THEN {name} END"
    if isinstance(kind, (Interval, postgresql.INTERVAL)):
        return f"CASE WHEN {name} BETWEEN '-900000000 days' AND '900000000 days' THEN {name} END"
    return name


def _processor_of(column: Column[Any]) -> _Processor | None:
    """Return what a query would do with the driver's value."""
    native = _native(column)
    # The type's number in PostgreSQL: it tells SQLAlchemy whether the driver returns float or Decimal.
    of = native.item_type if isinstance(native, ARRAY) else native
    number = _FLOAT8 if isinstance(of, Float) else _NUMERIC
    processor = column.type.dialect_impl(_DIALECT).result_processor(_DIALECT, number)
    if not isinstance(native, JSON):
        return processor
    if processor is None:
        return _from_json
    decorated = processor
    return lambda value: decorated(_from_json(value))


def _from_json(text: str | None) -> Any:
    return None if text is None else json.loads(text)
