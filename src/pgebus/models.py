"""The tables as SQLAlchemy models; `Event` is what applications add to their sessions.

It holds no statement and no connection: the triggers and functions, which give the tables their behaviour,
are made by the migrations. The metadata's schema is literally `pgebus`; for another one there is
`schema_translate_map`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Computed,
    Connection,
    DateTime,
    ForeignKeyConstraint,
    Identity,
    Index,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Text,
    TwoPhaseTransaction,
    event,
    text,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper, mapped_column, validates

from pgebus.errors import TWO_PHASE, InvalidEventTypeError, SessionStateError
from pgebus.inheritance import ANY, EventClass, family, fill_type, type_of_entity
from pgebus.names import check_channel, check_event_type, check_key, check_priority
from pgebus.payloads import check_headers, check_payload, check_run_at

__all__ = [
    "SCHEMA_VERSION",
    "Base",
    "ConsumerGroup",
    "Delivery",
    "Event",
    "Schedule",
    "Subscription",
    "Worker",
    "metadata",
]

# What the function schema_version() of the database must return.
SCHEMA_VERSION: Final = 2

# column_0_label would put the schema's name into the index's: another name in every schema.
_NAMING: Final = {
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ix": "ix_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
}

metadata: Final = MetaData(schema="pgebus", naming_convention=_NAMING)

_MOMENT: Final = DateTime(timezone=True)
# Names are compared byte by byte: no index depends on the locale of the server.
_NAME: Final = Text(collation="C")
_EMPTY_OBJECT: Final = text("'{}'::jsonb")
_NOW: Final = text("now()")


class Base(DeclarativeBase):
    """The declarative base of our tables."""

    metadata = metadata


def _index(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    return Index(name, *columns, unique=unique, postgresql_where=text(where))


def _none_in_one_phase(context: DefaultExecutionContext) -> None:
    """Refuse a two-phase transaction: the default of columns that nearly every INSERT leaves out.

    An INSERT without a session, `connection.execute(insert(Event), …)`, passes nothing else of ours. Without this it
    would fail only sometimes, and only at the PREPARE: the trigger sends its NOTIFY only when a worker sleeps.
    """
    if isinstance(context.root_connection.get_transaction(), TwoPhaseTransaction):
        raise SessionStateError(TWO_PHASE)


# Named, because the discriminator is made of it.
_EVENT_TYPE: Final = mapped_column(_NAME, default=type_of_entity)


class Event(Base):
    """A fact that happened: one immutable row, published by the transaction that inserts it.

    `session.add(Event(type="order.placed", payload={"order": 7}))` publishes when the session commits, and
    only then. Whatever is left out is filled in by the database and known after the flush.

    A subclass adds columns to the same table. With an event type it stands for the events of that type; without one
    for all events whose type has no class of its own::

        class OrderPlaced(Event, event_type="order.placed"):
            order_id: Mapped[int | None]

        session.add(OrderPlaced(order_id=7, payload={}))

    Attributes:
        id: Given by the database, rising; a gap is a rolled-back publisher.
        type: Dotted words of `A-Z a-z 0-9 _ -`, at most 255 bytes, like `order.placed`.
        channel: The queue that it is published to, 1 to 63 bytes; `events` unless said otherwise.
        payload: A JSON object.
        headers: A JSON object beside the payload: correlation ids and the like.
        key: Events of one key are handled in order, within each consumer group; 1 to 255 bytes.
        dedup_key: Unique within the channel as long as the event is kept; 1 to 255 bytes.
        priority: 0, handled first, to 9.
        run_at: Not handled before this moment; the publisher's `now()` unless said otherwise.
        created_at: When the publishing transaction began, by the database's clock.
        duplicate: True when `publish_event()` last returned this event because its `dedup_key` was there already, from
            an earlier transaction.
        max_payload_bytes: The largest payload, in bytes of JSON. A subclass may set its own.

    Raises:
        ConfigurationError: When a subclass is defined whose event type has a class already, or that has none and is
            the rival of another class without one; the class is not mapped then, and the table is as it was.
        InvalidEventTypeError: When `type` is set, before anything is sent; so the next three. Also when it is not the
            type that the class stands for.
        InvalidChannelError: When `channel` is set.
        InvalidPayloadError: When `payload` or `headers` is set.
        InvalidRunAtError: When `run_at` is set.
        InvalidKeyError: When `key` or `dedup_key` is set.
        InvalidPriorityError: When `priority` is set.
        SessionStateError: At the flush, in a two-phase transaction.
    """

    __tablename__ = "events"
    __table_args__ = (
        PrimaryKeyConstraint("id", name="pk_events"),
        CheckConstraint("priority BETWEEN 0 AND 9", name="priority"),
        CheckConstraint(r"octet_length(type) <= 255 AND type ~ '^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$'", name="type"),
        CheckConstraint("octet_length(channel) BETWEEN 1 AND 63", name="channel"),
        CheckConstraint("octet_length(key) BETWEEN 1 AND 255", name="key"),
        CheckConstraint("octet_length(dedup_key) BETWEEN 1 AND 255", name="dedup_key"),
        CheckConstraint("jsonb_typeof(headers) = 'object'", name="headers"),
        CheckConstraint("jsonb_typeof(payload) = 'object'", name="payload"),
        CheckConstraint("isfinite(run_at)", name="run_at"),
        _index("uq_events_dedup_key", "channel", "dedup_key", where="dedup_key IS NOT NULL", unique=True),
    )
    # The event type that the class stands for; None for classes that stand for many.
    __event_type__: ClassVar[str | None] = None

    # Whether `publish_event()` has returned it instead of publishing one with the same dedup_key again. Known to this
    # process only: no column.
    duplicate = False

    max_payload_bytes: ClassVar[int] = 1_048_576

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True))
    run_at: Mapped[datetime] = mapped_column(_MOMENT, server_default=_NOW)
    created_at: Mapped[datetime] = mapped_column(_MOMENT, server_default=_NOW)
    priority: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    type: Mapped[str] = _EVENT_TYPE
    channel: Mapped[str] = mapped_column(_NAME, server_default=text("'events'"))
    key: Mapped[str | None] = mapped_column(_NAME, default=_none_in_one_phase)
    dedup_key: Mapped[str | None] = mapped_column(_NAME, default=_none_in_one_phase)
    # none_as_null: None means "left out", not the JSON value null.
    headers: Mapped[dict[str, Any]] = mapped_column(JSONB(none_as_null=True), server_default=_EMPTY_OBJECT)
    payload: Mapped[dict[str, Any]] = mapped_column(JSONB(none_as_null=True), server_default=_EMPTY_OBJECT)

    __mapper_args__ = {  # noqa: RUF012 - the base declares it as no ClassVar
        # Known after the flush, without another round trip: a lazy load is impossible in an AsyncSession.
        "eager_defaults": True,
        "polymorphic_on": type_coerce(_EVENT_TYPE.column, EventClass),
        "polymorphic_identity": ANY,
        # Every query names the columns of all subclasses: what it left out could never be loaded in an AsyncSession.
        "with_polymorphic": "*",
    }

    def __init_subclass__(cls, *, event_type: str | None = None, **options: Any) -> None:
        with family.declaring(cls, event_type):
            super().__init_subclass__(**options)

    @validates("type")
    def _check_type(self, _name: str, value: object) -> str:
        declared = self.__event_type__
        if declared is not None and value != declared:
            raise InvalidEventTypeError(
                f"{type(self).__name__} stands for events of type {declared!r}, not {str(value)[:80]!r}. Leave the "
                "type out, or use another class.",
                value=value,
            )
        return check_event_type(value)

    @validates("channel")
    def _check_channel(self, _name: str, value: object) -> str:
        return check_channel(value)

    @validates("key", "dedup_key")
    def _check_key(self, name: str, value: object) -> str | None:
        return None if value is None else check_key(value, what=name)

    @validates("priority")
    def _check_priority(self, _name: str, value: object) -> int | None:
        return None if value is None else check_priority(value)

    @validates("payload")
    def _check_payload(self, _name: str, value: object) -> dict[str, Any]:
        return check_payload(value, limit=self.max_payload_bytes)

    @validates("headers")
    def _check_headers(self, _name: str, value: object) -> dict[str, Any] | None:
        return None if value is None else check_headers(value)

    @validates("run_at")
    def _check_run_at(self, _name: str, value: object) -> datetime | None:
        return None if value is None else check_run_at(value)

    def __repr__(self) -> str:
        # From the instance's dict: reading an expired attribute would be a lazy load. Never the payload: it
        # may hold what no log should.
        shown = ", ".join(f"{name}={self.__dict__.get(name)!r}" for name in ("id", "type", "channel"))
        return f"{type(self).__name__}({shown})"


family.found(Event)
event.listen(Event, "init", fill_type, propagate=True)


def check_class(target: Event) -> None:
    """Refuse an event whose type belongs to another class: it would be loaded as that one.

    Raises:
        InvalidEventTypeError: If so.
    """
    loaded_as = family.class_of(target.type)
    if type(target) is not loaded_as and loaded_as.__event_type__ is not None:
        raise InvalidEventTypeError(
            f"An event of type {target.type!r} is loaded as {loaded_as.__qualname__}, and this one is "
            f"{type(target).__qualname__}. Make it {loaded_as.__qualname__}(…).",
            value=target.type,
        )


@event.listens_for(Event, "before_insert", propagate=True)
def _refuse_without_type(_mapper: Mapper[Event], _connection: Connection, target: Event) -> None:
    if target.type is None:
        raise InvalidEventTypeError(
            "An event without a type was added. Write Event(type='order.placed', …).", value=None
        )
    check_class(target)


@event.listens_for(Event, "before_insert", propagate=True)
def _refuse_two_phase(_mapper: Mapper[Event], connection: Connection, _target: Event) -> None:
    # Also for events that have both keys, for which no default is asked.
    if isinstance(connection.get_transaction(), TwoPhaseTransaction):
        raise SessionStateError(TWO_PHASE)


class ConsumerGroup(Base):
    """What belongs to all handlers that share one delivery of each event of a channel."""

    __tablename__ = "consumer_groups"
    __table_args__ = (
        PrimaryKeyConstraint("channel", "consumer_group", name="pk_consumer_groups"),
        CheckConstraint("max_running > 0", name="max_running"),
    )

    channel: Mapped[str] = mapped_column(_NAME)
    consumer_group: Mapped[str] = mapped_column(_NAME)
    paused_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    max_running: Mapped[int | None]
    dead_holds_key: Mapped[bool] = mapped_column(server_default=text("false"))
    created_at: Mapped[datetime] = mapped_column(_MOMENT, server_default=_NOW)


# A pattern is matched by equality, else by its literal prefix, else by the regex for what is left. Written
# with the casts that PostgreSQL adds, because autogenerate compares the texts.
_PREFIX: Final = r"substring(pattern, '^((?:[^.*#]+\.)*)[*#]'::text)"
_REGEX: Final = (
    r"CASE WHEN pattern ~ '[*#]'::text AND pattern !~ '^[^*#]*#$'::text THEN"
    r" '^'::text || replace(replace(replace(pattern || '.'::text, '.'::text, '\.'::text),"
    r" '*\.'::text, '[^.]+\.'::text), '#\.'::text, '([^.]+\.)*'::text) || '$'::text ELSE NULL::text END"
)


class Subscription(Base):
    """A pattern of event types that a consumer group wants; the trigger on `events` reads it."""

    __tablename__ = "subscriptions"
    __table_args__ = (
        PrimaryKeyConstraint("channel", "consumer_group", "pattern", name="pk_subscriptions"),
        CheckConstraint(
            r"octet_length(pattern) <= 255"
            r" AND pattern ~ '^([A-Za-z0-9_-]+|[*]|#)(\.([A-Za-z0-9_-]+|[*]|#))*$'",
            name="pattern",
        ),
        ForeignKeyConstraint(
            ["channel", "consumer_group"],
            [ConsumerGroup.channel, ConsumerGroup.consumer_group],
            name="fk_subscriptions_group",
            ondelete="CASCADE",
        ),
        _index(
            "ix_subscriptions_catching_up",
            "channel",
            "consumer_group",
            where="backfilled_at IS NULL AND start_at IS NOT NULL",
        ),
    )

    channel: Mapped[str] = mapped_column(_NAME)
    consumer_group: Mapped[str] = mapped_column(_NAME)
    pattern: Mapped[str] = mapped_column(_NAME)
    prefix: Mapped[str | None] = mapped_column(_NAME, Computed(_PREFIX, persisted=True))
    regex: Mapped[str | None] = mapped_column(_NAME, Computed(_REGEX, persisted=True))
    since_event_id: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    # Its events begin with those created at this moment, -infinity for all; None: with those above since_event_id.
    start_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    backfilled_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    created_at: Mapped[datetime] = mapped_column(_MOMENT, server_default=_NOW)
    # When a running process last said that it has a handler for it; renewed about once a minute.
    declared_at: Mapped[datetime] = mapped_column(_MOMENT, server_default=_NOW)


class Schedule(Base):
    """Up to which time the clock has published the events of a type."""

    __tablename__ = "schedules"
    __table_args__ = (
        PrimaryKeyConstraint("channel", "type", "cron", "timezone", name="pk_schedules"),
        CheckConstraint("octet_length(channel) BETWEEN 1 AND 63", name="channel"),
        CheckConstraint(r"octet_length(type) <= 255 AND type ~ '^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$'", name="type"),
        CheckConstraint("octet_length(cron) BETWEEN 1 AND 255", name="cron"),
        CheckConstraint("octet_length(timezone) BETWEEN 1 AND 255", name="timezone"),
    )

    channel: Mapped[str] = mapped_column(_NAME)
    type: Mapped[str] = mapped_column(_NAME)
    cron: Mapped[str] = mapped_column(_NAME)
    timezone: Mapped[str] = mapped_column(_NAME)
    # Everything up to this moment was published, or passed over.
    last_at: Mapped[datetime] = mapped_column(_MOMENT, server_default=_NOW)
    # When a running process last said that it has this schedule.
    declared_at: Mapped[datetime] = mapped_column(_MOMENT, server_default=_NOW)
    created_at: Mapped[datetime] = mapped_column(_MOMENT, server_default=_NOW)


# How long a worker that beats may be silent, by the database's clock, before its beat counts as absent.
BEAT_ABSENT_SECONDS: Final = 15


class Worker(Base):
    """One run of a process that handles events; its id is also the advisory lock that shows it alive.

    One that holds no lock beats: it has no `backend_pid`, and writes `beat_at` each second.
    """

    __tablename__ = "workers"
    __table_args__ = (PrimaryKeyConstraint("id", name="pk_workers"),)

    id: Mapped[int] = mapped_column(BigInteger, autoincrement=False)
    channel: Mapped[str] = mapped_column(_NAME)
    groups: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default=text("'{}'::text[]"))
    idle: Mapped[bool] = mapped_column(server_default=text("false"))
    backend_pid: Mapped[int | None]
    started_at: Mapped[datetime] = mapped_column(_MOMENT, server_default=_NOW)
    beat_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    ended_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    host: Mapped[str | None] = mapped_column(Text)
    pid: Mapped[int | None]
    version: Mapped[str | None] = mapped_column(Text)
    retention: Mapped[dict[str, Any] | None] = mapped_column(JSONB)


class Delivery(Base):
    """One consumer group's progress on one event; written by the trigger, then by workers alone."""

    __tablename__ = "deliveries"
    __table_args__ = (
        PrimaryKeyConstraint("event_id", "consumer_group", name="pk_deliveries"),
        CheckConstraint(
            "status IN ('pending','blocked','running','unhandled','completed','dead','cancelled')",
            name="status",
        ),
        CheckConstraint(
            "(status = 'running') = (worker_id IS NOT NULL) AND (status = 'running') = (claimed_at IS NOT NULL)",
            name="running",
        ),
        CheckConstraint("(status IN ('completed','dead','cancelled')) = (finished_at IS NOT NULL)", name="finished"),
        CheckConstraint(
            "(status <> 'blocked' OR key IS NOT NULL) "
            "AND (NOT holds_key OR (status IN ('dead','unhandled') AND key IS NOT NULL))",
            name="key",
        ),
        CheckConstraint("attempt BETWEEN 0 AND claim_seq AND lost >= 0", name="attempt"),
        _index(
            "ix_deliveries_due",
            "channel",
            "consumer_group",
            "priority",
            "due_at",
            "event_id",
            where="status = 'pending'",
        ),
        _index(
            "ix_deliveries_suspect",
            "channel",
            "consumer_group",
            "priority",
            "due_at",
            "event_id",
            where="status = 'pending' AND lost > 0",
        ),
        _index("ix_deliveries_running", "worker_id", "event_id", where="status = 'running'"),
        _index(
            "ix_deliveries_unhandled",
            "channel",
            "consumer_group",
            "type",
            "event_id",
            where="status = 'unhandled'",
        ),
        _index(
            "ix_deliveries_unhandled_head",
            "channel",
            "consumer_group",
            "type",
            where="status = 'unhandled' AND holds_key",
        ),
        _index("ix_deliveries_dead", "channel", "consumer_group", "finished_at", where="status = 'dead'"),
        _index("ix_deliveries_prunable", "finished_at", where="status IN ('completed','cancelled')"),
        _index(
            "ix_deliveries_key_head",
            "channel",
            "consumer_group",
            "key",
            "event_id",
            where="key IS NOT NULL AND (status IN ('pending','running') OR holds_key)",
        ),
        _index(
            "ix_deliveries_blocked",
            "channel",
            "consumer_group",
            "key",
            "event_id",
            where="status = 'blocked'",
        ),
        _index(
            "uq_deliveries_running_key",
            "channel",
            "consumer_group",
            "key",
            where="key IS NOT NULL AND status = 'running'",
            unique=True,
        ),
    )

    event_id: Mapped[int] = mapped_column(BigInteger, autoincrement=False)
    due_at: Mapped[datetime] = mapped_column(_MOMENT)
    worker_id: Mapped[int | None] = mapped_column(BigInteger)
    claimed_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    finished_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    claim_seq: Mapped[int] = mapped_column(server_default=text("0"))
    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    lost: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    round: Mapped[int] = mapped_column(SmallInteger, server_default=text("1"))
    priority: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    holds_key: Mapped[bool] = mapped_column(server_default=text("false"))
    status: Mapped[str] = mapped_column(_NAME, server_default=text("'pending'"))
    channel: Mapped[str] = mapped_column(_NAME)
    consumer_group: Mapped[str] = mapped_column(_NAME)
    type: Mapped[str] = mapped_column(_NAME)
    key: Mapped[str | None] = mapped_column(_NAME)
    handled: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(JSONB(none_as_null=True))
