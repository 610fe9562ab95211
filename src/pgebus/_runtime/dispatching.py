"""Runs the handlers of one delivery, in at most one transaction, and says what becomes of it.

Writes nothing about the delivery itself, with one exception: the completion that belongs into the handlers' own
transaction.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from random import Random
from typing import Any, Final, TypeAlias, cast

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus._guard import dispatch_session, flush
from pgebus._runtime import faults
from pgebus._runtime.events import event_from_row
from pgebus._runtime.leases import Lease
from pgebus._runtime.outcome import (
    Committed,
    Complete,
    DeadLetter,
    Failure,
    Outcome,
    Reschedule,
    Unhandle,
    decide,
    describe,
)
from pgebus._runtime.supervision import DATABASE_ERRORS, is_dismissed
from pgebus._runtime.threads import Threads
from pgebus._runtime.transacting import NotBegunError, Transactions
from pgebus.context import EventContext
from pgebus.errors import LeaseLostError, PayloadValidationError, StateError, TransactionEndedError
from pgebus.handlers import Handler
from pgebus.models import Event
from pgebus.publishing import publish_event
from pgebus.retry import RetryPolicy, Signal
from pgebus.routing import EventRouter
from pgebus.session import GuardedSession

logger = logging.getLogger(__name__)

# How often a transaction is simply run again after a serialization failure or a deadlock, in one attempt.
REPLAYS: Final = 5
_REPLAY_PAUSE_SECONDS: Final = 0.005
_LOGGED_CHARS: Final = 300


# Returns the next delivery, if there is one that the given function accepts: from then on it belongs to this task.
Following: TypeAlias = Callable[[Callable[[Lease], bool]], Lease | None]


class _HandlerFailed(Exception):  # noqa: N818 - it carries an error, it is none
    """Carries what a handler raised, and which one it was, out of the transaction."""

    def __init__(self, handler: Handler, error: BaseException) -> None:
        super().__init__(handler.name)
        self.handler = handler
        self.error = error


class _Decoded:
    """A claimed row that could be read.

    Raises:
        ValueError, TypeError, RecursionError: If it could not.
    """

    __slots__ = ("_decoded", "headers", "payload")

    def __init__(self, lease: Lease) -> None:
        row = lease.row
        if row["id"] is None:
            raise ValueError("the event is gone: its row was removed and its delivery was left")
        self.payload: str = row["payload"]
        headers = row["headers"]
        self._decoded: dict[str, Any] | None = json.loads(self.payload)
        self.headers: dict[str, Any] = {} if headers == "{}" else json.loads(headers)
        if not isinstance(self._decoded, dict) or not isinstance(self.headers, dict):
            raise TypeError("payload and headers must be JSON objects")

    def argument(self, handler: Handler) -> Any:
        """Return what *handler* is called with, of its own: what it changes in it is nobody else's business.

        Raises:
            PayloadValidationError: If the payload does not fit what it takes.
        """
        if handler.payload is None:
            first, self._decoded = self._decoded, None
            return json.loads(self.payload) if first is None else first
        try:
            return handler.payload.validate_json(self.payload)
        except ValidationError as error:
            # Without the values: they are the payload, and what is raised here is stored and logged.
            found = error.errors(include_url=False, include_context=False, include_input=False)
            places = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'payload'}: {each['msg']}" for each in found[:10])
            raise PayloadValidationError(f"The payload does not fit {handler.name}: {places}") from None


class Dispatcher:
    """Runs deliveries.

    Args:
        router: Where the handlers are.
        transactions: Where the transactions of handlers come from.
        policy: How often, and when, a failed delivery is tried again.
        rng: Spreads the retries.
        threads: Where plain functions run.
        own: Makes a session on an engine without the guard, for what handlers without a transaction publish.
    """

    def __init__(
        self,
        router: EventRouter,
        transactions: Transactions,
        *,
        policy: RetryPolicy,
        rng: Random,
        threads: Threads,
        own: Callable[[], AsyncSession],
    ) -> None:
        self._threads = threads
        self._own = own
        self._router = router
        self._transactions = transactions
        self._policy = policy
        self._rng = rng

    async def dispatch(self, lease: Lease, following: Following | None = None) -> Outcome:
        """Run the handlers of *lease* and return what becomes of it.

        Args:
            lease: The delivery.
            following: Asked for the delivery that this task runs next, once that is certain; it may be begun already.

        Raises:
            asyncio.CancelledError: When the task was cancelled from outside; nothing of a transaction stays.
        """
        try:
            outcome = await self._dispatch(lease, following)
            await self._transactions.forgo(lease)  # where its handlers were not even asked
            return outcome
        except Exception as error:  # noqa: BLE001 - not even a bug of ours may run one delivery for ever, uncounted
            logger.critical("Event %d could not be dispatched: this is a bug in pgebus.", lease.fence.event_id)
            return self._failed(lease, error, None, lease.handled)

    async def _dispatch(self, lease: Lease, following: Following | None) -> Outcome:
        handlers = self._router.handlers_for(lease.type, lease.fence.group)
        if not handlers:
            return Unhandle()
        # The strictest of those that may have killed it: one that is to be tried once must not be tried twice.
        left = [handler for handler in handlers if handler.name not in lease.handled] or handlers
        if lease.lost and lease.attempt > min(self._policy_of(handler).max_attempts for handler in left):
            # Nobody could say so when it happened: the process that ran the last attempt died in it. Where attempts
            # are over for another reason, such as a setting that was lowered, the handlers run once more.
            times = "once" if lease.lost == 1 else f"{lease.lost} times"
            return self._bury(lease, "WorkerLost", f"The process died {times} while it handled this event.")
        try:
            decoded = _Decoded(lease)
        except (ValueError, TypeError, RecursionError) as error:
            return self._bury(lease, "UndecodableEvent", describe(error, None).message)
        if any(handler.transactional for handler in handlers):
            return await self._in_transaction(lease, decoded, handlers, following)
        return await self._without(lease, decoded, handlers)

    async def _without(self, lease: Lease, decoded: _Decoded, handlers: Sequence[Handler]) -> Outcome:
        """Run handlers that need no transaction; the ones that succeeded are remembered."""
        context = self._context(lease, decoded, None)
        handled = list(lease.handled)
        for handler in handlers:
            if handler.name in handled:
                continue
            try:
                await self._call(handler, context, lease, decoded)
            except _HandlerFailed as failed:
                return self._failed(lease, failed.error, failed.handler, tuple(handled))
            handled.append(handler.name)
        return Complete()

    async def _in_transaction(
        self, lease: Lease, decoded: _Decoded, handlers: Sequence[Handler], following: Following | None
    ) -> Outcome:
        """Run all handlers and the completion in one transaction, again when it could not be serialized."""
        error: BaseException
        handler: Handler | None
        for replay in range(REPLAYS + 1):
            try:
                await self._transaction(lease, decoded, handlers, following)
            except _HandlerFailed as failed:
                error, handler = failed.error, failed.handler
            except NotBegunError as failed:
                return Reschedule(self._policy.first, counted=False, failure=describe(failed.error, None))
            except Exception as raised:  # noqa: BLE001 - not even a bug of ours may run one delivery for ever, uncounted
                error, handler = raised, None
            else:
                return Committed()
            if not faults.is_replayable(error) or isinstance(error, Signal) or replay == REPLAYS:
                return self._after(lease, error, handler)
            logger.debug("Event %d: %s; the transaction runs again.", lease.fence.event_id, error)
            await asyncio.sleep(_REPLAY_PAUSE_SECONDS * 2**replay * self._rng.random())
        raise AssertionError("the last replay returns")

    async def forgo(self, lease: Lease) -> None:
        """Do not run *lease*, which this task was to run next."""
        await self._transactions.forgo(lease)

    def _following(self, following: Following | None) -> Lease | None:
        """Return the delivery that the same task runs next, if that needs a transaction as well."""
        return None if following is None else following(self._needs_transaction)

    def _needs_transaction(self, lease: Lease) -> bool:
        handlers = self._router.handlers_for(lease.type, lease.fence.group)
        return not lease.lost and any(handler.transactional for handler in handlers)

    async def _transaction(
        self, lease: Lease, decoded: _Decoded, handlers: Sequence[Handler], following: Following | None
    ) -> None:
        fence = lease.fence
        async with self._transactions.open(lease) as transaction:
            async with dispatch_session(transaction.connection, begin=transaction.begin) as session:
                context = self._context(lease, decoded, GuardedSession(session, _caused_by(lease, decoded)))
                try:
                    for handler in handlers:
                        await self._call(handler, context, lease, decoded)
                        try:
                            # After each, so that what fails here is the failure of the handler that caused it.
                            await flush(session)
                        except Exception as error:
                            raise _HandlerFailed(handler, error) from error
                finally:
                    transaction.spoilt = session.sync_session.guard.unsafe
            # The fenced completion is the last thing that the transaction does. A COMMIT that PostgreSQL answered with
            # ROLLBACK raises nothing; only its tag says so.
            try:
                await self._transactions.complete(lease, transaction, self._following(following))
            except DATABASE_ERRORS as error:
                state = faults.sqlstate(error)  # the driver has no classes for ours
                if state == faults.LEASE_LOST:
                    raise LeaseLostError(
                        event_id=fence.event_id, group=fence.group, claim_seq=fence.claim_seq
                    ) from error
                if state == faults.TRANSACTION_ENDED:
                    raise TransactionEndedError(
                        "A handler ended the dispatcher's transaction behind the guard; what it committed stands."
                    ) from error
                raise

    def _policy_of(self, handler: Handler | None) -> RetryPolicy:
        return self._policy if handler is None or handler.retry is None else handler.retry

    async def _call(self, handler: Handler, context: EventContext, lease: Lease, decoded: _Decoded) -> None:
        """Run one handler; whatever it raises is its failure, except a cancellation that was meant for the task."""
        try:
            argument = decoded.argument(handler)
            if handler.timeout is None and not handler.threaded:
                await cast("Awaitable[object]", handler.function(context, argument))
                return
            async with asyncio.timeout(None if handler.timeout is None else handler.timeout.total_seconds()):
                if handler.threaded:
                    await self._threads.run(
                        handler.function, self._context(lease, decoded, None, threaded=True), argument
                    )
                else:
                    await cast("Awaitable[object]", handler.function(context, argument))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError):
                if is_dismissed(task):
                    raise
                while task is not None and task.cancelling():  # its own code did it, and the task goes on
                    task.uncancel()
            raise _HandlerFailed(handler, error) from error

    def _after(self, lease: Lease, error: BaseException, handler: Handler | None) -> Outcome:
        """Decide after a transaction that failed."""
        extra = {"pgebus_event_id": lease.fence.event_id, "pgebus_group": lease.fence.group}
        if handler is None and isinstance(error, LeaseLostError):
            logger.warning("%s What its handlers did was rolled back.", error, extra=extra)
            # Where it is lost indeed, the fence keeps this from being written. Where a handler removed its own
            # delivery, the rollback has brought it back.
            return decide(error, handler=None, attempt=lease.attempt, policy=self._policy, rng=self._rng)
        if handler is None and isinstance(error, TransactionEndedError):
            logger.critical(
                "Event %d is dead for group %r and will not run again by itself: %s",
                lease.fence.event_id,
                lease.fence.group,
                error,
                extra=extra,
            )
            return DeadLetter(describe(error, None))
        if handler is None and faults.sqlstate(error) == faults.IN_FAILED_TRANSACTION:
            text = "A handler caught a database error and went on; PostgreSQL had aborted the transaction by then."
            return self._failed(lease, error, None, (), Failure(None, "TransactionAborted", text))
        # A connection that was lost during COMMIT leaves it open whether the commit happened. The outcome that is
        # written next carries the fence: it is tried again during a commit still in progress, and finds no row after
        # one.
        return self._failed(lease, error, handler, ())

    def _bury(self, lease: Lease, kind: str, message: str) -> DeadLetter:
        """Return the end of a delivery whose handlers are not even asked."""
        decision = DeadLetter(Failure(None, kind, message))
        _log_failure(lease, decision)
        return decision

    def _failed(
        self,
        lease: Lease,
        error: BaseException,
        handler: Handler | None,
        handled: tuple[str, ...],
        failure: Failure | None = None,
    ) -> Reschedule | DeadLetter:
        decision = decide(
            error,
            handler=None if handler is None else handler.name,
            attempt=lease.attempt,
            policy=self._policy_of(handler),
            handled=handled,
            rng=self._rng,
        )
        if failure is not None:
            decision = (
                DeadLetter(failure, decision.handled)
                if isinstance(decision, DeadLetter)
                else Reschedule(decision.delay, decision.counted, failure, decision.handled)
            )
        _log_failure(lease, decision)
        return decision

    def _context(
        self, lease: Lease, decoded: _Decoded, session: GuardedSession | None, *, threaded: bool = False
    ) -> EventContext:
        def make() -> Event:
            columns = {
                **dict(lease.row.items()),
                "payload": json.loads(decoded.payload),
                "headers": decoded.headers,
            }
            made = event_from_row(columns)
            return made if session is None else session.attach(made)

        async def publish(
            event_type: str, payload: Any, channel: str | None, run_at: datetime | None, **options: Any
        ) -> Event:
            channel = lease.row["channel"] if channel is None else channel
            if session is not None:
                return await publish_event(session, event_type, payload, channel, run_at, **options)
            if threaded:
                raise StateError("ctx.publish() is for coroutines. Make the handler 'async def', or open a session.")
            headers = {**_caused_by(lease, decoded), **(options.pop("headers", None) or {})}
            await self._transactions.make_room()
            async with self._own() as own:
                event: Event = await publish_event(
                    own, event_type, payload, channel, run_at, headers=headers, **options
                )
                await own.commit()
            return event

        return EventContext(
            event=make,
            event_id=lease.fence.event_id,
            group=lease.fence.group,
            attempt=lease.attempt,
            claim_seq=lease.fence.claim_seq,
            publish=publish,
            session=session,
        )


def _caused_by(lease: Lease, decoded: _Decoded) -> dict[str, Any]:
    """Return the headers of whatever the handlers publish: which event caused it, and which one started it all.

    The trace goes on as well, by the names of W3C Trace Context.
    """
    event_id = str(lease.fence.event_id)
    trace: dict[str, Any] = {
        name: decoded.headers[name] for name in ("traceparent", "tracestate") if name in decoded.headers
    }
    return {"correlation_id": decoded.headers.get("correlation_id", event_id), "causation_id": event_id, **trace}


def _log_failure(lease: Lease, decision: Reschedule | DeadLetter) -> None:
    failure = decision.failure
    if failure is None:
        return
    where = f" in {failure.handler}" if failure.handler else ""
    # One line of it; the rest, with the traceback, is kept in the delivery's `errors`.
    what = f"{failure.type}: {failure.message}".partition("\n")[0][:_LOGGED_CHARS]
    extra = {"pgebus_event_id": lease.fence.event_id, "pgebus_group": lease.fence.group, "pgebus_type": lease.type}
    if isinstance(decision, DeadLetter):
        logger.error(
            "Event %d (%s) is dead for group %r after attempt %d%s: %s",
            lease.fence.event_id,
            lease.type,
            lease.fence.group,
            lease.attempt,
            where,
            what,
            extra=extra,
        )
    else:
        logger.warning(
            "Event %d (%s) failed in attempt %d%s, and is tried again in %.1f s: %s",
            lease.fence.event_id,
            lease.type,
            lease.attempt,
            where,
            decision.delay / timedelta(seconds=1),
            what,
            extra=extra,
        )
