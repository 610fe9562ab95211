"""The errors that pgebus raises, in one tree.

The errors of PostgreSQL and of SQLAlchemy are not wrapped: what only the server can judge surfaces unchanged.

::

    PgebusError
    ├── ConfigurationError (ValueError)         raised where the mistake is written: definition, construction, start()
    │   ├── InvalidEventTypeError               not dotted words of A-Z a-z 0-9 _ -
    │   ├── InvalidChannelError                 empty, longer than 63 bytes, not text
    │   ├── InvalidSchemaError                  no usable schema name
    │   ├── InvalidHandlerError (TypeError)     no function, of the wrong arity, or with a payload of no usable type
    │   ├── DuplicateHandlerError               the same handler twice for one path
    │   └── SessionlessConnectionError          a transaction pooler between us and PostgreSQL
    ├── PublishError (ValueError)               raised before any SQL; the caller's transaction stays usable
    │   ├── InvalidPayloadError                 not a JSON object that PostgreSQL can store
    │   │   └── PayloadTooLargeError
    │   ├── InvalidRunAtError                   naive, or no datetime
    │   ├── InvalidKeyError                     a key or dedup_key that is no text of 1 to 255 bytes
    │   └── InvalidPriorityError                no whole number from 0 to 9
    ├── PayloadValidationError (ValueError)     a stored payload does not fit the type that its handler takes
    ├── RetryTransactionError (RuntimeError)    a duplicate is there, and this transaction cannot see it
    ├── SessionStateError (RuntimeError)        a session that cannot publish: two-phase, autocommit, read-only, …
    │   └── SessionTypeError (TypeError)        no session at all
    ├── MiddlewareError (RuntimeError)          a middleware that called the next one twice, or never
    ├── StateError (RuntimeError)               start() after stop(), session after close()
    ├── SchemaMismatchError                     the tables are missing, too old or too new
    ├── SessionControlError (RuntimeError)      commit(), rollback(), close() … on ctx.session
    │   └── TransactionEndedError               the handlers' transaction was ended behind the guard
    └── LeaseLostError                          another worker owns the delivery now
"""

from __future__ import annotations

from typing import Final

from sqlalchemy.exc import DontWrapMixin

__all__ = [
    "ConfigurationError",
    "DuplicateHandlerError",
    "InvalidChannelError",
    "InvalidEventTypeError",
    "InvalidHandlerError",
    "InvalidKeyError",
    "InvalidPayloadError",
    "InvalidPriorityError",
    "InvalidRunAtError",
    "InvalidSchemaError",
    "LeaseLostError",
    "MiddlewareError",
    "PayloadTooLargeError",
    "PayloadValidationError",
    "PgebusError",
    "PublishError",
    "RetryTransactionError",
    "SchemaMismatchError",
    "SessionControlError",
    "SessionStateError",
    "SessionTypeError",
    "SessionlessConnectionError",
    "StateError",
    "TransactionEndedError",
    "UnsafeSessionWarning",
]


TWO_PHASE: Final = (
    "Events cannot be published in a two-phase transaction: PostgreSQL cannot prepare a NOTIFY. "
    "Publish in a transaction of one phase: in a session without twophase=True, or on a connection without "
    "begin_twophase()."
)


class PgebusError(Exception):
    """The root: `except PgebusError` catches whatever pgebus itself raises."""


class ConfigurationError(PgebusError, ValueError):
    """A setting, a name or a registration is wrong; the message says which value, and what to do."""


class InvalidEventTypeError(ConfigurationError):
    """An event type, path or prefix that is not made of dotted words.

    Attributes:
        value: What was given.
    """

    def __init__(self, message: str, *, value: object) -> None:
        super().__init__(message)
        self.value = value


class InvalidChannelError(ConfigurationError):
    """A channel that PostgreSQL could not LISTEN on as it is written.

    Attributes:
        value: What was given.
    """

    def __init__(self, message: str, *, value: object) -> None:
        super().__init__(message)
        self.value = value


class InvalidSchemaError(ConfigurationError):
    """A schema name that PostgreSQL would cut, reserve or refuse.

    Attributes:
        value: What was given.
    """

    def __init__(self, message: str, *, value: object) -> None:
        super().__init__(message)
        self.value = value


class InvalidHandlerError(ConfigurationError, TypeError):
    """A handler that cannot be called as `handler(ctx, payload)`, or takes a payload that none can be made for."""


class DuplicateHandlerError(ConfigurationError):
    """A handler, or another one of the same name, is registered for this path already.

    Attributes:
        handler: The stable name of the handler.
        path: The full dotted path.
    """

    def __init__(self, message: str, *, handler: str, path: str) -> None:
        super().__init__(message)
        self.handler = handler
        self.path = path


class SessionlessConnectionError(ConfigurationError):
    """The LISTEN connection keeps no session: LISTEN and advisory locks would be lost between two statements."""


class PublishError(PgebusError, ValueError):
    """An event that cannot be published; nothing was sent, the caller's transaction is as it was."""


class InvalidPayloadError(PublishError):
    """A payload (or headers) that is not a JSON object PostgreSQL can store and give back unchanged.

    Attributes:
        path: Where in the payload, for example `$.items[2].price`.
    """

    def __init__(self, message: str, *, path: str = "$") -> None:
        super().__init__(message)
        self.path = path


class PayloadTooLargeError(InvalidPayloadError):
    """A payload over the limit.

    Attributes:
        size: Bytes of the encoded payload.
        limit: The largest size allowed, in bytes.
    """

    def __init__(self, message: str, *, size: int, limit: int) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class InvalidRunAtError(PublishError):
    """A `run_at` that names no moment: naive, not a datetime, or outside what PostgreSQL stores."""


class InvalidKeyError(PublishError):
    """A `key` or `dedup_key` that is no text of 1 to 255 bytes in UTF-8, without NUL."""


class InvalidPriorityError(PublishError):
    """A priority that is no whole number from 0 to 9."""


class PayloadValidationError(PgebusError, ValueError):
    """A payload that does not fit the type that its handler takes; the message names the places, and no values.

    Raised before the handler is called. Its delivery is dead at once, unless the handler's policy says otherwise.
    """


class RetryTransactionError(PgebusError, RuntimeError):
    """An event with this `dedup_key` was committed after the transaction's snapshot was taken.

    Only at REPEATABLE READ and SERIALIZABLE, where the transaction can't see it. Roll back and do all of it again.

    Attributes:
        dedup_key: The key.
        sqlstate: `40001`, as for PostgreSQL's own serialization failures: what does those again does this again.
    """

    sqlstate = "40001"

    def __init__(self, message: str, *, dedup_key: str) -> None:
        super().__init__(message)
        self.dedup_key = dedup_key


class SessionStateError(PgebusError, RuntimeError, DontWrapMixin):
    """The session cannot publish as it is; the message names the reason."""


class SessionTypeError(SessionStateError, TypeError):
    """What was passed as a session is none."""


class MiddlewareError(DontWrapMixin, PgebusError, RuntimeError):
    """A middleware called the next one twice, never, too late or with another object; or a statement goes around it."""


class StateError(PgebusError, RuntimeError):
    """A method was called at the wrong time: `start()` after `stop()`, a session after `close()`."""


class SchemaMismatchError(PgebusError):
    """The tables in the database are not those of this release.

    Attributes:
        schema: The schema that was looked at.
        found: Its version, or None where pgebus is not installed.
        needed: The version that this release works with.
    """

    def __init__(self, message: str, *, schema: str, found: int | None, needed: int) -> None:
        super().__init__(message)
        self.schema = schema
        self.found = found
        self.needed = needed


class SessionControlError(PgebusError, RuntimeError):
    """A handler tried to move the transaction that belongs to the dispatcher."""


class TransactionEndedError(SessionControlError):
    """The handlers' transaction was ended behind the guard: what it committed stands without its completion."""


class LeaseLostError(PgebusError):
    """The delivery was given to another worker; whatever was done for it in a transaction was rolled back.

    Attributes:
        event_id: The event of the delivery.
        group: Its consumer group.
        claim_seq: The claim whose fence no longer holds.
    """

    def __init__(self, *, event_id: int, group: str, claim_seq: int) -> None:
        super().__init__(
            f"The lease on event {event_id} for group {group!r} (claim {claim_seq}) is lost: "
            "another worker owns the delivery now, or it was finished by hand."
        )
        self.event_id = event_id
        self.group = group
        self.claim_seq = claim_seq


class UnsafeSessionWarning(RuntimeWarning):
    """`ctx.session.unsafe` was used: this delivery is at least once from here on."""
