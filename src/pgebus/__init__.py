"""pgebus: a durable event bus for applications that already trust PostgreSQL and SQLAlchemy."""

from __future__ import annotations

from pgebus._outgoing import add_publish_middleware, remove_publish_middleware
from pgebus._version import __version__
from pgebus.context import EventContext
from pgebus.database import DatabaseSessionManager
from pgebus.errors import (
    ConfigurationError,
    DuplicateHandlerError,
    InvalidChannelError,
    InvalidEventTypeError,
    InvalidHandlerError,
    InvalidKeyError,
    InvalidPayloadError,
    InvalidPriorityError,
    InvalidRunAtError,
    InvalidSchemaError,
    LeaseLostError,
    MiddlewareError,
    PayloadTooLargeError,
    PayloadValidationError,
    PgebusError,
    PublishError,
    RetryTransactionError,
    SchemaMismatchError,
    SessionControlError,
    SessionlessConnectionError,
    SessionStateError,
    SessionTypeError,
    StateError,
    TransactionEndedError,
    UnsafeSessionWarning,
)
from pgebus.groups import Group
from pgebus.health import LoopHealth, SystemHealth, SystemState
from pgebus.models import Event, metadata
from pgebus.publisher import EventPublisher, Published
from pgebus.publishing import publish_event, publish_event_sync, publish_events, publish_events_sync
from pgebus.retry import Reject, Retry, RetryPolicy, Snooze
from pgebus.routing import EventRouter
from pgebus.schemas import metadata_for
from pgebus.session import GuardedSession
from pgebus.settings import DatabaseSettings, EventSystemSettings, Settings
from pgebus.system import EventSystem

__all__ = [
    "ConfigurationError",
    "DatabaseSessionManager",
    "DatabaseSettings",
    "DuplicateHandlerError",
    "Event",
    "EventContext",
    "EventPublisher",
    "EventRouter",
    "EventSystem",
    "EventSystemSettings",
    "Group",
    "GuardedSession",
    "InvalidChannelError",
    "InvalidEventTypeError",
    "InvalidHandlerError",
    "InvalidKeyError",
    "InvalidPayloadError",
    "InvalidPriorityError",
    "InvalidRunAtError",
    "InvalidSchemaError",
    "LeaseLostError",
    "LoopHealth",
    "MiddlewareError",
    "PayloadTooLargeError",
    "PayloadValidationError",
    "PgebusError",
    "PublishError",
    "Published",
    "Reject",
    "Retry",
    "RetryPolicy",
    "RetryTransactionError",
    "SchemaMismatchError",
    "SessionControlError",
    "SessionStateError",
    "SessionTypeError",
    "SessionlessConnectionError",
    "Settings",
    "Snooze",
    "StateError",
    "SystemHealth",
    "SystemState",
    "TransactionEndedError",
    "UnsafeSessionWarning",
    "__version__",
    "add_publish_middleware",
    "metadata",
    "metadata_for",
    "publish_event",
    "publish_event_sync",
    "publish_events",
    "publish_events_sync",
    "remove_publish_middleware",
]
