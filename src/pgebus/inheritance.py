"""How a subclass of `Event` finds its rows: single-table inheritance in which the event type itself tells the class.

It maps nothing itself and knows no event type: SQLAlchemy's declarative system maps the classes, when they are defined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import ARRAY, Column, Dialect, Table, Text, bindparam, func, type_coerce
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.orm import Mapper, class_mapper
from sqlalchemy.sql import operators
from sqlalchemy.types import TypeDecorator

from pgebus.errors import ConfigurationError
from pgebus.names import check_event_type

# Begins the identity of a class that stands for every type without a class of its own; no event type has a star.
ANY: Final = "*"


class Family:
    """`Event` and all its subclasses."""

    def __init__(self) -> None:
        self._root: Mapper[Any] | None = None
        self._general: str | None = None
        self.own_columns: frozenset[str] = frozenset()

    def found(self, root: type[Any]) -> None:
        """Take *root*, which has just been mapped, as the class that all others come from."""
        self._root = class_mapper(root, configure=False)
        self.own_columns = frozenset(self.table.columns.keys())

    @property
    def root(self) -> Mapper[Any]:
        """The mapper of `Event`."""
        assert self._root is not None  # noqa: S101 - set when the module that defines Event is imported
        return self._root

    @property
    def table(self) -> Table:
        """The one table, with the columns of all classes."""
        table = self.root.local_table
        assert isinstance(table, Table)  # noqa: S101 - for the type checker: Event is mapped to a table
        return table

    @property
    def classes(self) -> Mapping[str, Mapper[Any]]:
        """The mappers of all classes by their identity."""
        return self.root.polymorphic_map

    def class_of(self, event_type: str) -> type[Any]:
        """Return the class that a row of *event_type* is loaded as."""
        found: type[Any] = self.classes[self.identity_of(event_type)].class_
        return found

    def identity_of(self, event_type: str) -> str:
        """Return the identity of the class that a row of *event_type* is loaded as."""
        if self._general is None:
            # A class newer than a cached statement is not configured yet.
            self.root.registry.configure(cascade=True)
            self._general = _identity(self.general_class())
        return event_type if event_type in self.classes else self._general

    def general_class(self) -> type[Any]:
        """Return the class of every type without a class of its own: general classes form one line, this is its end."""
        found: type[Any] = max(
            (mapper.class_ for identity, mapper in self.classes.items() if identity.startswith(ANY)),
            key=lambda each: len(each.__mro__),
        )
        return found

    def foreign_types(self, wanted: frozenset[str]) -> list[str]:
        """Return the types that are none of the classes whose identities are *wanted*."""
        mine = {
            each.polymorphic_identity
            for identity, mapper in self.classes.items()
            if identity in wanted and identity.startswith(ANY)
            for each in mapper.self_and_descendants
        }
        return sorted(each for each in self.classes if each not in mine and not each.startswith(ANY))

    @contextmanager
    def declaring(self, cls: type[Any], event_type: str | None) -> Iterator[None]:
        """Prepare *cls* for being mapped inside the block; when that fails, leave nothing behind.

        Raises:
            ConfigurationError: If *cls* cannot be a class of this family; the message says why.
        """
        if vars(cls).get("__abstract__"):
            if event_type is not None:
                raise ConfigurationError(f"{cls.__qualname__} is abstract, so it can stand for no event type.")
            cls.__event_type__ = None
            yield
            return
        arguments = self._arguments(cls, event_type)
        with self._all_or_nothing(arguments["polymorphic_identity"]):
            cls.__event_type__ = event_type
            cls.__mapper_args__ = arguments
            yield

    def _arguments(self, cls: type[Any], event_type: str | None) -> dict[str, Any]:
        """Return the mapper's arguments for *cls*, or refuse it."""
        name = cls.__qualname__
        given = vars(cls).get("__mapper_args__", {})
        if not isinstance(given, Mapping) or {"polymorphic_on", "polymorphic_identity", "concrete"} & given.keys():
            raise ConfigurationError(
                f"{name}: the event type tells the class. Write 'class {name}(Event, event_type=\"order.placed\")', "
                "and leave the polymorphic options out of __mapper_args__, which is a plain dict here."
            )
        between = cls.__mro__[: cls.__mro__.index(self.root.class_)]
        if any("__tablename__" in vars(each) or isinstance(vars(each).get("__table__"), Table) for each in between):
            raise ConfigurationError(
                f"{name}: subclasses of Event share its table, so that an event is one row. Remove __tablename__."
            )
        if event_type is None:
            self._check_general(cls)
            identity = f"{ANY}{cls.__module__}.{name}"
        else:
            identity = check_event_type(event_type, what=f"Event type of {name}:")
        taken = self.classes.get(identity)
        if taken is not None:
            raise ConfigurationError(
                f"{name}: {identity.removeprefix(ANY)!r} is declared already, by {_full_name(taken.class_)}. "
                "One class can stand for a type."
            )
        return {**given, "with_polymorphic": "*", "polymorphic_identity": identity}

    def _check_general(self, cls: type[Any]) -> None:
        general = self.general_class()
        if not issubclass(cls, general):
            raise ConfigurationError(
                f"{cls.__qualname__} has no event type, so it would stand for every type without a class, as "
                f"{_full_name(general)} does. Give it an event_type, or derive it from {general.__qualname__}."
            )
        for parent in cls.__mro__[1:]:
            declared = vars(parent).get("__event_type__")
            if declared is not None:
                raise ConfigurationError(
                    f"{cls.__qualname__} comes from {parent.__qualname__}, which stands for {declared!r} alone. Give "
                    "it an event_type of its own, or make it abstract."
                )

    @contextmanager
    def _all_or_nothing(self, identity: str) -> Iterator[None]:
        """Take back what a failed definition has added to the one table that all classes share."""
        table = self.table
        before = set(table.columns)
        lists: tuple[set[Any], ...] = (table.indexes, table.constraints, table.foreign_keys)
        kept = [set(each) for each in lists]
        try:
            yield
        except BaseException:
            self.root.polymorphic_map.pop(identity, None)
            for current, old in zip(lists, kept, strict=True):
                current.intersection_update(old)
            for column in set(table.columns) - before:
                # There is no public way; without it, the corrected class could not be defined in this process.
                table._columns.remove(column)
            raise
        finally:
            self._general = None


family: Final = Family()


class _Comparator(TypeDecorator.Comparator[str]):
    """Answers "which rows are of these classes" when the statement runs."""

    def operate(self, op: operators.OperatorType, *other: Any, **kwargs: Any) -> Any:
        if op is operators.in_op and any(str(each).startswith(ANY) for each in other[0]):
            wanted = frozenset(other[0])
            # SQLAlchemy keeps this criterion for the life of the mapper, so a list of types written into it would miss
            # the classes that are defined later. One array: the text of the statement stays the same.
            types = bindparam(
                "event_types", callable_=lambda: family.foreign_types(wanted), type_=ARRAY(Text), unique=True
            )
            return type_coerce(self.expr, Text) != func.all(types)
        return super().operate(op, *other, **kwargs)


class EventClass(TypeDecorator[str]):
    """Reads an event type as the identity of the class that it is loaded as."""

    impl = Text
    cache_ok = True
    comparator_factory = _Comparator

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002 - the interface
        """Return the identity; none for the empty side of an outer join."""
        return None if value is None else family.identity_of(value)


def type_of_entity(context: DefaultExecutionContext) -> str | None:
    """Return the event type for `insert(OrderPlaced)`, which makes no instance: the default of the column `type`."""
    statement: Any = context.invoked_statement
    described: dict[str, Any] | None = getattr(statement, "entity_description", None)
    if described is None:
        described = next(iter(getattr(statement, "column_descriptions", ())), None)
    return getattr(described.get("entity"), "__event_type__", None) if described else None


def fill_type(target: Any, _args: object, _kwargs: object) -> None:
    """Set the type of a new instance. Not in `__init__`: a subclass may write its own, or be a dataclass."""
    event_type = type(target).__event_type__
    if event_type is not None:
        class_mapper(type(target))  # configures a class that is used for the first time; only then can it be set
        target.type = event_type


def loaded_columns(mapper: Mapper[Any]) -> Iterator[tuple[str, Column[Any]]]:
    """Yield the attributes of a class that are columns of the table, by name."""
    for attribute in mapper.column_attrs:
        column = attribute.columns[0]
        if isinstance(column, Column):  # else an expression: a column_property, or the discriminator
            yield attribute.key, column


def _identity(cls: type[Any]) -> str:
    identity: Any = class_mapper(cls, configure=False).polymorphic_identity
    return str(identity)


def _full_name(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
