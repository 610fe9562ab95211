"""The worker, `python -m shop.worker`: handles events until it is told to stop. Run as many as you like."""

from __future__ import annotations

import asyncio
import logging
import signal

from pgebus import EventSystem, Settings
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
    await system.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    asyncio.run(main())
