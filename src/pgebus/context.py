"""What a handler is given besides the payload.

Holds no connection of its own and does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from pgebus.models import Event
from pgebus.session import GuardedSession

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class EventContext:
    """One execution of one event's handlers.

    The same context goes to every handler of the delivery, one after the other; it is of no use afterwards.

    Attributes:
        session: The session of the handlers' transaction; None unless a handler of this event is `transactional`.
            Never commit it: returning commits, raising rolls back.
        event_id: The id of the event.
        group: The consumer group that the handlers belong to.
        attempt: This execution of the delivery, counted from 1, whichever of its handlers failed the others. Executions
            whose process died are counted.
        claim_seq: Grows with every claim of this delivery: a fencing token for systems outside this database. In a
            group that keeps no history, a delivery that is replayed is another one, and begins with any number.
    """

    __slots__ = ("_event", "_make_event", "_publish", "attempt", "claim_seq", "event_id", "group", "session")

    def __init__(
        self,
        *,
        event: Callable[[], Event],
        event_id: int,
        group: str,
        attempt: int,
        claim_seq: int,
        publish: Callable[..., Coroutine[Any, Any, Event]],
        session: GuardedSession | None = None,
    ) -> None:
        self._make_event = event
        self._publish = publish
        self._event: Event | None = None
        self.event_id = event_id
        self.group = group
        self.attempt = attempt
        self.claim_seq = claim_seq
        self.session = session

    @property
    def event(self) -> Event:
        """The event that is handled, made from the claimed row when it is first asked for.

        Attached to `session` where there is one, else detached.
        """
        if self._event is None:
            self._event = self._make_event()
        return self._event

    def publish(
        self,
        event_type: str,
        payload: dict[str, Any] | BaseModel | DataclassInstance,
        channel: str | None = None,
        run_at: datetime | None = None,
        **options: Any,
    ) -> Coroutine[Any, Any, Event]:
        """Publish an event that this one has caused; its headers say so. Await it.

        In the handlers' transaction where there is one: it is published if, and only if, the delivery is completed.
        Else in a transaction of its own, committed when this returns: after a failure or a crash, the next attempt may
        publish it again, which a *dedup_key* prevents.

        Args:
            event_type: As for `publish_event()`; so the payload, *run_at* and the options, which are `headers`, `key`,
                `dedup_key`, `priority`, `event_class` and columns.
            payload: A JSON object.
            channel: By default that of the event that is handled.
            run_at: Not handled before this moment.
            options: More of what `publish_event()` takes.

        Raises:
            PgebusError: As `publish_event()` does.
            StateError: At once, from a plain function: it runs in a thread, and cannot await anything.
        """
        return self._publish(event_type, payload, channel, run_at, **options)

    def __repr__(self) -> str:
        return f"<EventContext event_id={self.event_id} group={self.group!r} attempt={self.attempt}>"
