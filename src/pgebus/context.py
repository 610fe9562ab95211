"""What a handler is given besides the payload.

Holds no connection of its own and does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable

from pgebus.models import Event
from pgebus.session import GuardedSession


class EventContext:
    """One execution of one event's handlers.

    The same context goes to every handler of the delivery, one after the other; it is of no use afterwards.

    Attributes:
        session: The session of the handlers' transaction; None unless a handler of this event is `transactional`.
            Never commit it: returning commits, raising rolls back.
        event_id: The id of the event.
        group: The consumer group that the handlers belong to.
        attempt: This execution, counted from 1. Executions whose process died are counted.
        claim_seq: Grows with every claim of this delivery: a fencing token for systems outside this database.
    """

    def __init__(
        self,
        *,
        event: Callable[[], Event],
        event_id: int,
        group: str,
        attempt: int,
        claim_seq: int,
        session: GuardedSession | None = None,
    ) -> None:
        self._make_event = event
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

    def __repr__(self) -> str:
        return f"<EventContext event_id={self.event_id} group={self.group!r} attempt={self.attempt}>"
