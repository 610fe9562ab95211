"""The database of the API: one pool for the process, one session for each request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus import DatabaseSessionManager, Settings


@asynccontextmanager
async def connected(_app: FastAPI) -> AsyncIterator[dict[str, DatabaseSessionManager]]:
    """Keep the pool as long as the application runs; requests find it in their state."""
    async with DatabaseSessionManager(Settings().database) as database:
        yield {"database": database}


async def _session(request: Request) -> AsyncIterator[AsyncSession]:
    database: DatabaseSessionManager = request.state.database
    async with database.session() as session:
        yield session


# It never commits. A handler of a request does so itself, before it returns: what comes after the `yield` above may
# run when the response has been sent, too late to tell the client that the commit has failed.
Session = Annotated[AsyncSession, Depends(_session)]
