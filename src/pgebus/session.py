"""`GuardedSession`: the session of a transactional handler, with what a unit of work may do.

It begins, commits and closes nothing; all of that is the dispatcher's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar, overload

from sqlalchemy import Executable, Result, ScalarResult, inspect
from sqlalchemy.ext.asyncio import AsyncResult, AsyncScalarResult, AsyncSession
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.util import EMPTY_DICT, IdentitySet

from pgebus._guard import DispatchAsyncSession
from pgebus.errors import SessionControlError, UnsafeSessionWarning

if TYPE_CHECKING:
    from typing import Never, TypeVarTuple

    from sqlalchemy.orm.interfaces import ORMOption
    from sqlalchemy.sql.selectable import ForUpdateParameter, TypedReturnsRows

    _Ts = TypeVarTuple("_Ts")
    _AnyColumns = tuple[Any, ...]

__all__ = ["GuardedSession"]

_logger: Final = logging.getLogger(__name__)

_T = TypeVar("_T")
_O = TypeVar("_O")
_P = ParamSpec("_P")

_Params = Mapping[str, Any] | Sequence[Mapping[str, Any]]
_Options = Mapping[str, Any]

_ENDS: Final = "the unit of work commits when all handlers have returned. Raise to roll back."
_BOUND: Final = "it works on the connection of its delivery. Use execute(), or open a session of your own."
_BEGUN: Final = "the dispatcher has begun the transaction, and commits it when all handlers have returned."
_NO_SAVEPOINT: Final = "a part cannot be undone alone. Raise to roll back everything, or use ctx.session.unsafe."
_STATE: Final = "inside a handler its transaction is always open."

# What AsyncSession has and a handler must not: the reason, and what to do instead.
FORBIDDEN: Final[Mapping[str, str]] = {
    "aclose": _ENDS,
    "autoflush": "use `with session.no_autoflush`.",
    "begin": _BEGUN,
    "begin_nested": _NO_SAVEPOINT,
    "bind": _BOUND,
    "bind_mapper": _BOUND,
    "bind_table": _BOUND,
    "binds": _BOUND,
    "close": _ENDS,
    "close_all": "it would close the sessions of other deliveries too.",
    "commit": _ENDS,
    "connection": _BOUND,
    "execution_options": "give them to the statement, or to execute().",
    "get_async_bind": _BOUND,
    "get_bind": _BOUND,
    "get_nested_transaction": _STATE,
    "get_transaction": _STATE,
    "identity_key": "use sqlalchemy.orm.util.identity_key().",
    "identity_map": "use get(), or iterate over the session.",
    "in_nested_transaction": _STATE,
    "in_transaction": _STATE,
    "invalidate": _ENDS,
    "is_active": _STATE,
    "object_session": "use ctx.session itself.",
    "reset": _ENDS,
    "rollback": _ENDS,
    "sync_session": "use run_sync().",
    "sync_session_class": "the dispatcher makes the session.",
}


class GuardedSession:
    """An `AsyncSession` for the unit of work of one delivery, shared by all its transactional handlers.

    Everything done here commits together with the completion of the delivery, when all handlers have returned,
    and rolls back when one raises. It is for the handler's own task, until the handler has returned.

    The methods mean what they mean in `sqlalchemy.ext.asyncio.AsyncSession`. What moves the transaction or the
    session's life is not here; asking for it raises `SessionControlError`, as does the use from another task or
    after the end. What was already read into objects stays readable.
    """

    def __init__(self, session: DispatchAsyncSession, headers: Mapping[str, Any] | None = None) -> None:
        self._session = session
        session.sync_session.guard.headers = dict(headers or {})

    @property
    def unsafe(self) -> AsyncSession:
        """The whole `AsyncSession`, whose `commit()`, `rollback()` and `begin_nested()` do what they say.

        Whoever commits or rolls back here gives up the guarantee of this delivery: it is at least once from here
        on, since what was committed stays when the delivery fails later and is tried again. After each commit and
        rollback the handlers go on in a new transaction, in which the delivery is completed.

        Text such as `execute(text("COMMIT"))` is no longer refused either, but nothing begins the next
        transaction after it: the delivery ends dead. Use `commit()`.

        Warns:
            UnsafeSessionWarning: At the first use in a delivery; it is logged too.

        Raises:
            SessionControlError: From another task, or after the handler has returned.
        """
        guard = self._checked.sync_session.guard
        if not guard.unsafe:
            message = "ctx.session.unsafe is used: this delivery is at least once from here on."
            _logger.warning("%s", message)
            # First the warning, which a filter may turn into an error, then the lock.
            warnings.warn(message, UnsafeSessionWarning, stacklevel=2)
            guard.unsafe = True
        return self._session

    # Reading and changing objects

    def add(self, instance: object) -> None:
        """Put *instance* into the session; it is inserted at the next flush."""
        self._checked.add(instance)

    def add_all(self, instances: Iterable[object]) -> None:
        """Put all *instances* into the session."""
        self._checked.add_all(instances)

    async def delete(self, instance: object) -> None:
        """Mark *instance* as deleted; its row goes at the next flush."""
        await self._checked.delete(instance)

    async def delete_all(self, instances: Iterable[object]) -> None:
        """Mark all *instances* as deleted."""
        for instance in instances:
            await self._checked.delete(instance)

    async def merge(self, instance: _O, *, load: bool = True, options: Sequence[ORMOption] | None = None) -> _O:
        """Copy *instance* into the session's own object of the same identity, and return that."""
        return await self._checked.merge(instance, load=load, options=options)

    async def merge_all(
        self, instances: Iterable[_O], *, load: bool = True, options: Sequence[ORMOption] | None = None
    ) -> Sequence[_O]:
        """Merge all *instances*."""
        return [await self._checked.merge(instance, load=load, options=options) for instance in instances]

    async def refresh(
        self,
        instance: object,
        attribute_names: Iterable[str] | None = None,
        with_for_update: ForUpdateParameter = None,
    ) -> None:
        """Read the attributes of *instance* from the database again."""
        await self._checked.refresh(instance, attribute_names, with_for_update)

    def attach(self, instance: _O) -> _O:
        """Put a detached *instance* into the session, without SQL; return the one of its identity that is there."""
        session = self._checked.sync_session
        there: _O | None = session.identity_map.get(inspect(instance).key)
        if there is not None:
            return there
        session.add(instance)
        return instance

    def expire(self, instance: object, attribute_names: Iterable[str] | None = None) -> None:
        """Forget the attributes of *instance*; read them again with `refresh()`."""
        self._checked.expire(instance, attribute_names)

    def expire_all(self) -> None:
        """Forget the attributes of all objects."""
        self._checked.expire_all()

    def expunge(self, instance: object) -> None:
        """Take *instance* out of the session."""
        self._checked.expunge(instance)

    def expunge_all(self) -> None:
        """Take all objects out of the session; what was not flushed is forgotten."""
        self._checked.expunge_all()

    async def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Write pending changes to the database, inside the transaction."""
        await self._checked.flush(objects)

    async def get(
        self,
        entity: type[_O] | Mapper[_O],
        ident: Any,
        *,
        options: Sequence[ORMOption] | None = None,
        populate_existing: bool = False,
        with_for_update: ForUpdateParameter = None,
        identity_token: Any | None = None,
        execution_options: _Options = EMPTY_DICT,
    ) -> _O | None:
        """Return the object with the primary key *ident*, or None."""
        return await self._checked.get(
            entity,
            ident,
            options=options,
            populate_existing=populate_existing,
            with_for_update=with_for_update,
            identity_token=identity_token,
            execution_options=execution_options,
        )

    async def get_one(
        self,
        entity: type[_O] | Mapper[_O],
        ident: Any,
        *,
        options: Sequence[ORMOption] | None = None,
        populate_existing: bool = False,
        with_for_update: ForUpdateParameter = None,
        identity_token: Any | None = None,
        execution_options: _Options = EMPTY_DICT,
    ) -> _O:
        """Return the object with the primary key *ident*, or raise `sqlalchemy.exc.NoResultFound`."""
        return await self._checked.get_one(
            entity,
            ident,
            options=options,
            populate_existing=populate_existing,
            with_for_update=with_for_update,
            identity_token=identity_token,
            execution_options=execution_options,
        )

    # Statements

    @overload
    async def execute(
        self,
        statement: TypedReturnsRows[*_Ts],
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> Result[*_Ts]: ...

    @overload
    async def execute(
        self,
        statement: Executable,
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> Result[*_AnyColumns]: ...

    async def execute(
        self,
        statement: Executable,
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> Result[*_AnyColumns]:
        """Execute *statement* and return a buffered result."""
        return await self._checked.execute(
            statement, params, execution_options=execution_options, bind_arguments=bind_arguments
        )

    # The first one, as in AsyncSession, is for https://github.com/python/mypy/issues/20651.
    @overload
    async def scalar(
        self,
        statement: TypedReturnsRows[Never],
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> Any | None: ...

    @overload
    async def scalar(
        self,
        statement: TypedReturnsRows[_T],
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> _T | None: ...

    @overload
    async def scalar(
        self,
        statement: Executable,
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> Any: ...

    async def scalar(
        self,
        statement: Executable,
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> Any:
        """Execute *statement* and return the first column of the first row, or None."""
        return await self._checked.scalar(
            statement, params, execution_options=execution_options, bind_arguments=bind_arguments
        )

    @overload
    async def scalars(
        self,
        statement: TypedReturnsRows[_T],
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> ScalarResult[_T]: ...

    @overload
    async def scalars(
        self,
        statement: Executable,
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> ScalarResult[Any]: ...

    async def scalars(
        self,
        statement: Executable,
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> ScalarResult[Any]:
        """Execute *statement* and return the first column of its rows."""
        return await self._checked.scalars(
            statement, params, execution_options=execution_options, bind_arguments=bind_arguments
        )

    @overload
    async def stream(
        self,
        statement: TypedReturnsRows[*_Ts],
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> AsyncResult[*_Ts]: ...

    @overload
    async def stream(
        self,
        statement: Executable,
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> AsyncResult[*_AnyColumns]: ...

    async def stream(
        self,
        statement: Executable,
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> AsyncResult[*_AnyColumns]:
        """Execute *statement* and return its rows as they come from the server."""
        return await self._checked.stream(
            statement, params, execution_options=execution_options, bind_arguments=bind_arguments
        )

    @overload
    async def stream_scalars(
        self,
        statement: TypedReturnsRows[_T],
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> AsyncScalarResult[_T]: ...

    @overload
    async def stream_scalars(
        self,
        statement: Executable,
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> AsyncScalarResult[Any]: ...

    async def stream_scalars(
        self,
        statement: Executable,
        params: _Params | None = None,
        *,
        execution_options: _Options = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> AsyncScalarResult[Any]:
        """Execute *statement* and return the first column of its rows as they come from the server."""
        return await self._checked.stream_scalars(
            statement, params, execution_options=execution_options, bind_arguments=bind_arguments
        )

    async def run_sync(self, fn: Callable[Concatenate[Session, _P], _T], *arg: _P.args, **kw: _P.kwargs) -> _T:
        """Call *fn* with the synchronous session, guarded in the same way, and the given arguments."""
        return await self._checked.run_sync(fn, *arg, **kw)

    # Looking at the session

    @property
    def new(self) -> IdentitySet:
        """The objects to be inserted at the next flush."""
        return self._checked.new

    @property
    def dirty(self) -> IdentitySet:
        """The objects with changes to be written at the next flush."""
        return self._checked.dirty

    @property
    def deleted(self) -> IdentitySet:
        """The objects to be deleted at the next flush."""
        return self._checked.deleted

    @property
    def info(self) -> dict[Any, Any]:
        """A dictionary of the user's own, shared by the handlers of this delivery."""
        return self._checked.info

    @property
    @contextmanager
    def no_autoflush(self) -> Iterator[GuardedSession]:
        """Not to flush before queries, inside the `with` block."""
        with self._checked.no_autoflush:
            yield self

    def is_modified(self, instance: object, include_collections: bool = True) -> bool:
        """Tell whether *instance* has changes that are not written."""
        return self._checked.is_modified(instance, include_collections)

    def __contains__(self, instance: object) -> bool:
        return instance in self._checked

    def __iter__(self) -> Iterator[object]:
        return iter(self._checked)

    if not TYPE_CHECKING:  # for type checkers, what is forbidden does not exist

        def __getattr__(self, name: str) -> Any:
            if reason := FORBIDDEN.get(name):
                raise SessionControlError(f"GuardedSession has no {name}(): {reason}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

        async def __aenter__(self) -> Any:
            raise SessionControlError(
                "ctx.session is open already, and the dispatcher closes it. Use it without `async with`."
            )

        async def __aexit__(self, *_: object) -> None:
            """Never reached; without it, Python complains before `__aenter__` can explain."""

    @property
    def _checked(self) -> DispatchAsyncSession:
        """The session, for the handler's own task and time."""
        self._session.sync_session.guard.check()
        return self._session
