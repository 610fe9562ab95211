"""Runs the handlers of one delivery, in at most one transaction, and says what becomes of it.

Writes nothing about the delivery itself, with one exception: the completion that belongs into the handlers' own
transaction.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from random import Random
from typing import Any, Final, TypeAlias, cast, get_args

from pydantic import ValidationError
from pydantic_core.core_schema import ErrorType
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus._causes import caused_by, inherit
from pgebus._guard import Guard, dispatch_session, flush
from pgebus._runtime import faults
from pgebus._runtime.events import event_from_row
from pgebus._runtime.leases import Lease
from pgebus._runtime.outcome import (
    Committed,
    Complete,
    DeadLetter,
    Failure,
    Lost,
    Outcome,
    Redact,
    Reschedule,
    Unhandle,
    decide,
    describe,
)
from pgebus._runtime.supervision import DATABASE_ERRORS, is_dismissed
from pgebus._runtime.threads import Abandoned, Call, Threads
from pgebus._runtime.transacting import LostAheadError, NotBegunError, Transaction, Transactions
from pgebus.context import EventContext
from pgebus.errors import LeaseLostError, PayloadValidationError, StateError, TransactionEndedError
from pgebus.handlers import Handler
from pgebus.middleware import Around
from pgebus.models import Event
from pgebus.payloads import check_headers
from pgebus.publishing import publish_event
from pgebus.retry import RetryPolicy, Signal
from pgebus.routing import EventRouter
from pgebus.session import GuardedSession

logger = logging.getLogger(__name__)

# How often a transaction is simply run again after a serialization failure or a deadlock, in one attempt.
REPLAYS: Final = 5
_REPLAY_PAUSE_SECONDS: Final = 0.005
_LOGGED_CHARS: Final = 300
# Whose text is not pydantic's own, or names a value.
_QUOTING: Final = frozenset(
    {"value_error", "assertion_error", "union_tag_invalid", "get_attribute_error", "iteration_error", "mapping_type"}
)
_OWN_TYPES: Final = frozenset(get_args(ErrorType))


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
            flaws = "; ".join(
                f"{'.'.join(map(str, each['loc'])) or 'payload'}: {each['type' if _may_quote(each['type']) else 'msg']}"
                for each in found[:10]
            )
            raise PayloadValidationError(f"The payload does not fit {handler.name}: {flaws}") from None


def _may_quote(error_type: str) -> bool:
    """Return whether the text of such an error may hold parts of the payload: whatever a validator has written may."""
    return error_type in _QUOTING or error_type not in _OWN_TYPES


class Dispatcher:
    """Runs deliveries.

    Args:
        router: Where the handlers are.
        transactions: Where the transactions of handlers come from.
        policy: How often, and when, a failed delivery is tried again.
        rng: Spreads the retries.
        threads: Where plain functions run.
        own: Makes a session on an engine without the guard, for what handlers without a transaction publish.
        redact: Takes secrets out of what is stored and logged of an error.
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
        redact: Redact | None = None,
    ) -> None:
        self._threads = threads
        # The last call of each delivery that has made one in a thread.
        self._calls: dict[Lease, Call] = {}
        self._own = own
        self._redact = redact
        self._router = router
        self._transactions = transactions
        self._policy = policy
        self._rng = rng

    async def dispatch(self, lease: Lease, following: Following | None = None) -> Outcome:
        """Run the handlers of *lease* and return what becomes of it, when none of them runs any more.

        Args:
            lease: The delivery.
            following: Asked for the delivery that this task runs next, once that is certain; it may be begun already.

        Raises:
            asyncio.CancelledError: When the task was cancelled from outside; nothing of a transaction stays.
        """
        handlers: Sequence[Handler] = ()
        try:
            handlers = self._router.handlers_for(lease.type, lease.fence.group)
            try:
                return await self._dispatch(lease, handlers, following)
            finally:
                if self._transactions.begun:
                    await self._transactions.forgo(lease)  # where its handlers were not even asked
                # A thread may outlast its time limit, and the transaction. Somebody else who had the delivery, or the
                # next one of its key, would run beside it.
                if self._calls and (call := self._calls.pop(lease, None)) is not None:
                    await call.wait()
        except Abandoned:
            # It stays as it is, claimed, until others see that this worker is gone.
            return Lost()
        except Exception as error:  # noqa: BLE001 - not even a bug of ours may run one delivery for ever, uncounted
            logger.critical("Event %d could not be dispatched: this is a bug in pgebus.", lease.fence.event_id)
            return self._failed(lease, error, None, self._strictest(handlers), lease.handled)

    async def _dispatch(self, lease: Lease, handlers: Sequence[Handler], following: Following | None) -> Outcome:
        if not handlers:
            return Unhandle()
        # The strictest of those that may have killed it. Attempts belong to the delivery, and nobody knows any more
        # which of them began: a handler that may run once must not do so again after a crash.
        left = [handler for handler in handlers if handler.name not in lease.handled] or handlers
        if lease.lost and lease.attempt > self._strictest(left).max_attempts:
            # Nobody could say so when it happened: the process that ran the last attempt died in it. Where attempts
            # are over for another reason, such as a setting that was lowered, the handlers run once more.
            times = "once" if lease.lost == 1 else f"{lease.lost} times"
            return self._bury(lease, "WorkerLost", f"The process died {times} while it handled this event.")
        try:
            decoded = _Decoded(lease)
        except (ValueError, TypeError, RecursionError) as error:
            return self._bury(lease, "UndecodableEvent", describe(error, None, self._redact).message)
        if any(handler.transactional for handler in handlers):
            return await self._in_transaction(lease, decoded, handlers, following)
        return await self._without(lease, decoded, handlers)

    async def _without(self, lease: Lease, decoded: _Decoded, handlers: Sequence[Handler]) -> Outcome:
        """Run handlers that need no transaction; the ones that succeeded are remembered."""
        context = self._context(lease, decoded, None)
        handled = list(lease.handled)
        stopped = False
        for handler in handlers:
            if handler.name in handled:
                continue
            if stopped:
                return Reschedule(timedelta(0), counted=False, handled=tuple(handled))
            try:
                await self._call(handler, context, lease, decoded)
            except _HandlerFailed as failed:
                return self._failed(lease, failed.error, failed.handler, self._policy_of(handler), tuple(handled))
            handled.append(handler.name)
            # A thread goes on when it is told to stop, and what it did is done.
            stopped = handler.threaded and is_dismissed(asyncio.current_task())
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
            except LostAheadError:
                continue  # at most once: the next one is begun now
            except NotBegunError as failed:
                return Reschedule(self._policy.first, counted=False, failure=describe(failed.error, None, self._redact))
            except Exception as raised:  # noqa: BLE001 - not even a bug of ours may run one delivery for ever, uncounted
                error, handler = raised, None
            else:
                return Committed()
            if not faults.is_replayable(error) or isinstance(error, Signal) or replay == REPLAYS:
                return self._after(lease, error, handler, handlers)
            if logger.isEnabledFor(logging.DEBUG):
                what = _first_line(describe(error, None, self._redact))
                logger.debug("Event %d: %s; the transaction runs again.", lease.fence.event_id, what)
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
                inherited = caused_by(fence.event_id, decoded.headers)
                context = self._context(lease, decoded, GuardedSession(session, inherited))
                try:
                    for handler in handlers:
                        # The flush after each, so that what fails in it is the failure of the handler that caused it.
                        await self._call(handler, context, lease, decoded, partial(flush, session))
                except _HandlerFailed as failed:
                    if _lost_ahead(transaction, session.sync_session.guard, failed.error):
                        raise LostAheadError from failed
                    raise
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

    def _policy_of(self, handler: Handler) -> RetryPolicy:
        return self._policy if handler.retry is None else handler.retry

    def _strictest(self, handlers: Sequence[Handler]) -> RetryPolicy:
        """Return the policy that decides when it cannot be said which of *handlers* has failed."""
        return min(map(self._policy_of, handlers), key=lambda policy: policy.max_attempts, default=self._policy)

    async def _call(
        self,
        handler: Handler,
        context: EventContext,
        lease: Lease,
        decoded: _Decoded,
        flush: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Run one handler; whatever it raises is its failure, except a cancellation that was meant for the task.

        Args:
            handler: Which one.
            context: Its first argument, where it runs in this task.
            lease: The delivery.
            decoded: Makes its second argument.
            flush: Sends what it has left in the session of the transaction; None where there is none.
        """
        try:
            argument = decoded.argument(handler)
            if handler.timeout is not None and not handler.threaded:
                await _call_in_time(handler, context, argument, flush)
                return
            if handler.threaded and handler.around is not None:
                await self._call_around_thread(handler.around, handler, context, lease, decoded, argument, flush)
            elif handler.threaded:
                await self._call_in_thread(handler, lease, decoded, argument, in_transaction=flush is not None)
            else:
                await cast("Awaitable[object]", handler.function(context, argument))
            if flush is not None:
                await flush()
        except (KeyboardInterrupt, _HandlerFailed, Abandoned):
            raise
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError):
                if is_dismissed(task):
                    raise
                while task is not None and task.cancelling():  # its own code did it, and the task goes on
                    task.uncancel()
            raise _HandlerFailed(handler, error) from error

    async def _call_around_thread(
        self,
        around: Around,
        handler: Handler,
        context: EventContext,
        lease: Lease,
        decoded: _Decoded,
        argument: object,
        flush: Callable[[], Awaitable[None]] | None,
    ) -> None:
        """Call a plain function through what stands around it, which runs in this task."""
        late: _HandlerFailed | None = None

        async def innermost(given: Mapping[str, Any]) -> None:
            call = replace(handler, function=partial(handler.function, **given))
            try:
                await self._call_in_thread(call, lease, decoded, argument, in_transaction=flush is not None)
            except _HandlerFailed as failed:
                nonlocal late
                if self._calls[lease].error is not failed.error:
                    late = failed
                if isinstance(failed.error, Exception):
                    raise failed.error from None
                raise

        await around.run(context, argument, innermost)
        if late is not None:  # and nobody has said so: the function may still be running
            raise late

    async def _call_in_thread(
        self, handler: Handler, lease: Lease, decoded: _Decoded, argument: object, *, in_transaction: bool
    ) -> None:
        """Call a plain function; where its time is up, or the task is cancelled, `dispatch()` waits for its end.

        Raises:
            _HandlerFailed: What it raised, or that its time was up.
            asyncio.CancelledError: When a transaction should not wait for its end.
        """
        context = self._context(lease, decoded, None, threaded=True)
        call = self._calls[lease] = self._threads.call(handler.function, context, argument)
        try:
            in_time = await call.is_over(_seconds(handler))
        except asyncio.CancelledError:
            if in_transaction:
                raise
            # It does not notice, and nothing waits for it but its delivery: what it comes to is worth knowing.
            await call.wait()
            in_time = True
        if not in_time:
            logger.warning(
                "%s still runs in its thread, and its time for event %d is up: the attempt has failed, and the "
                "delivery waits for the function to return.",
                handler.name,
                lease.fence.event_id,
                extra={"pgebus_event_id": lease.fence.event_id, "pgebus_group": lease.fence.group},
            )
            raise _HandlerFailed(handler, _too_late(handler))
        if call.error is not None:
            raise _HandlerFailed(handler, call.error)

    def _after(
        self, lease: Lease, error: BaseException, handler: Handler | None, handlers: Sequence[Handler]
    ) -> Outcome:
        """Decide after a transaction that failed: in *handler*, or after all of *handlers*."""
        policy = self._strictest(handlers) if handler is None else self._policy_of(handler)
        extra = {"pgebus_event_id": lease.fence.event_id, "pgebus_group": lease.fence.group}
        if handler is None and isinstance(error, LeaseLostError):
            logger.warning("%s What its handlers did was rolled back.", error, extra=extra)
            # Where it is lost indeed, the fence keeps this from being written. Where a handler removed its own
            # delivery, the rollback has brought it back.
            return decide(error, handler=None, attempt=lease.attempt, policy=policy, rng=self._rng, redact=self._redact)
        if handler is None and isinstance(error, TransactionEndedError):
            logger.critical(
                "Event %d is dead for group %r and will not run again by itself: %s",
                lease.fence.event_id,
                lease.fence.group,
                error,
                extra=extra,
            )
            return DeadLetter(describe(error, None, self._redact))
        if handler is None and faults.sqlstate(error) == faults.IN_FAILED_TRANSACTION:
            text = "A handler caught a database error and went on; PostgreSQL had aborted the transaction by then."
            return self._failed(lease, error, None, policy, (), Failure(None, "TransactionAborted", text))
        # A connection that was lost during COMMIT leaves it open whether the commit happened. The outcome that is
        # written next carries the fence: it is tried again during a commit still in progress, and finds no row after
        # one.
        return self._failed(lease, error, handler, policy, ())

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
        policy: RetryPolicy,
        handled: tuple[str, ...],
        failure: Failure | None = None,
    ) -> Reschedule | DeadLetter:
        decision = decide(
            error,
            handler=None if handler is None else handler.name,
            attempt=lease.attempt,
            policy=policy,
            handled=handled,
            rng=self._rng,
            redact=self._redact,
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

        def publish(
            event_type: str, payload: Any, channel: str | None, run_at: datetime | None, **options: Any
        ) -> Coroutine[Any, Any, Event]:
            channel = lease.row["channel"] if channel is None else channel
            if threaded:  # now: what it returned would be awaited by nobody
                raise StateError(
                    "ctx.publish() is for 'async def' handlers: this one is a plain function, which cannot await it. "
                    "Make it 'async def', or add an Event to a session of your own and commit that."
                )
            if session is not None:
                return publish_event(session, event_type, payload, channel, run_at, **options)
            return publish_alone(event_type, payload, channel, run_at, **options)

        async def publish_alone(
            event_type: str, payload: Any, channel: str, run_at: datetime | None, headers: Any = None, **options: Any
        ) -> Event:
            inherited = caused_by(lease.fence.event_id, decoded.headers)
            headers = inherited if headers is None else inherit(inherited, check_headers(headers))
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


async def _call_in_time(
    handler: Handler, context: EventContext, argument: object, flush: Callable[[], Awaitable[None]] | None
) -> None:
    """Call a coroutine function, and send what it has left in the session, within its time.

    Raises:
        TimeoutError: If the time was up, whatever the handler made of its cancellation: what it raised then, such as
            the error of a query that broke off, only follows from that. A signal is what it wants all the same.
    """
    late = _too_late(handler)
    limit = asyncio.timeout(_seconds(handler))
    try:
        async with limit:
            await cast("Awaitable[object]", handler.function(context, argument))
            if flush is not None:
                await flush()
    except Exception as error:
        if limit.expired() and not isinstance(error, Signal):
            raise late  # noqa: B904 - the cause of an error decides whether its transaction is simply run again
        raise
    if limit.expired():
        raise late


def _lost_ahead(transaction: Transaction, guard: Guard, error: BaseException) -> bool:
    """Return whether *error* tells of a connection that was lost before the delivery's turn came.

    Only its first statement finds out, because no round trip begins such a transaction. That statement may as well be
    what has ended the connection: so the handlers run once more in a transaction that is begun then, in the same
    attempt, and what happens there is theirs.
    """
    unanswered = transaction.ahead and guard.statements <= 1 and not guard.unsafe
    return unanswered and transaction.raw.is_closed() and not isinstance(error, (Signal, TimeoutError))


def _seconds(handler: Handler) -> float | None:
    return None if handler.timeout is None else handler.timeout.total_seconds()


def _too_late(handler: Handler) -> TimeoutError:
    return TimeoutError(f"The handler did not return within its timeout of {_seconds(handler)} s.")


def _first_line(failure: Failure) -> str:
    return f"{failure.type}: {failure.message}".partition("\n")[0][:_LOGGED_CHARS]


def _log_failure(lease: Lease, decision: Reschedule | DeadLetter) -> None:
    failure = decision.failure
    if failure is None:
        return
    where = f" in {failure.handler}" if failure.handler else ""
    # One line of it; the rest, with the traceback, is kept in the delivery's `errors`.
    what = _first_line(failure)
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
