"""A worker process of the shop: `python -m pgebus.cli.demo.worker`.

Its settings are in the environment, except for the database, which is told on standard input once there is one:
meanwhile Python has imported everything. It publishes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from pgebus import EventSystem, Settings
from pgebus.cli.demo.shop import router


async def work(settings: Settings) -> None:
    """Handle events until told to stop."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, told.set)  # process managers ask like this
    loop.add_reader(sys.stdin.fileno(), told.set)  # the demo is gone, whatever has ended it
    async with EventSystem(router, settings):
        await told.wait()
        loop.remove_reader(sys.stdin.fileno())


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if url := sys.stdin.readline().strip():
        asyncio.run(work(Settings(database={"url": url})))
