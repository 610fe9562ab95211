"""The worker, `python -m shop.worker`: handles events until it is told to stop. Run as many as you like."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn

from pgebus import EventSystem, Settings
from pgebus.health import asgi_app
from shop.handlers import router


async def main() -> None:
    """Run until SIGINT or SIGTERM; handlers that run then may finish."""
    settings = Settings()
    system = EventSystem(router, settings)
    stopping: list[asyncio.Task[None]] = []  # a task that nobody holds may vanish

    def stop() -> None:
        stopping.append(asyncio.create_task(system.stop(timeout=settings.event_system.shutdown_timeout_seconds)))

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    async with answering(system):
        await system.run()


@asynccontextmanager
async def answering(system: EventSystem) -> AsyncIterator[None]:
    """Answer `/live` and `/ready` in the block, where SHOP_HEALTH_PORT names a port."""
    port = os.environ.get("SHOP_HEALTH_PORT")
    if port is None:
        yield
        return
    server = HealthServer(uvicorn.Config(asgi_app(system), port=int(port), log_level="warning"))
    serving = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.should_exit = True
        await serving


class HealthServer(uvicorn.Server):
    """A server that leaves the signals to the worker."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    asyncio.run(main())
