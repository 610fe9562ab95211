"""How a worker process is asked to end: once, gracefully; twice, at once; three times, without further ado.

By signals, and by the end of its supervisor. In a thread of its own, so that it is heard, and in the end obeyed, also
while a handler blocks the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from types import FrameType
from typing import Final

__all__ = ["AT_ONCE_SECONDS", "Asked"]

logger = logging.getLogger(__name__)

# After a graceful end was asked for: what the cancelled handlers and the last writes may take, beyond the patience with
# handlers. After an end at once: all of it.
BEYOND_SECONDS: Final = 30.0
AT_ONCE_SECONDS: Final = 10.0


class Asked:
    """Who has asked this process to end, and how often.

    Attributes:
        times: How often.
        number: The last signal; None before one.
    """

    def __init__(self) -> None:
        self.times = 0
        self.number: int | None = None
        self._patience = 0.0
        self._tell: Callable[[], None] = lambda: None
        # Sockets, not a pipe: Windows can select nothing else.
        self._inlet, self._outlet = socket.socketpair()
        self._inlet.setblocking(False)

    def listen(self, tell: Callable[[], None], patience: float, life: int | None) -> None:
        """Begin to listen, from the main thread; the defaults of the signals hold until then.

        Args:
            tell: Called in the event loop that runs now, each time.
            patience: Seconds that a graceful end may wait for handlers.
            life: A descriptor whose end says that the supervisor is gone.
        """
        loop = asyncio.get_running_loop()

        def tell_in_loop() -> None:
            with suppress(RuntimeError):  # the loop is closed: the process is about to end
                loop.call_soon_threadsafe(tell)

        self._tell, self._patience = tell_in_loop, patience
        threading.Thread(target=self._watch, args=(life,), name="pgebus-asked", daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            # Not by the loop, which may be blocked: only a socket is written to here, which a signal may interrupt
            # anywhere.
            signal.signal(number, self._signalled)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        with suppress(BlockingIOError):
            self._inlet.send(bytes([number]))

    def _watch(self, life: int | None) -> None:
        watched: list[socket.socket | int] = [self._outlet] if life is None else [self._outlet, life]
        deadline: float | None = None
        while True:
            left = None if deadline is None else max(0.0, deadline - monotonic())
            readable, _, _ = select.select(watched, [], [], left)
            if not readable:
                logger.error("The worker has not ended in time, and is ended now.")
                self._exit()
            if self._outlet in readable:
                for number in self._outlet.recv(16):
                    self.number = number
                    self._again()
            if life in readable:
                watched = [self._outlet]
                logger.error("The supervisor of this worker is gone: it ends at once.")
                self.times = max(self.times, 1)
                self._again()
            patience = self._patience + BEYOND_SECONDS if self.times == 1 else AT_ONCE_SECONDS
            deadline = min(deadline or float("inf"), monotonic() + patience)

    def _again(self) -> None:
        self.times += 1
        if self.times > 2:
            self._exit()
        logger.info(
            "The worker stops: it claims nothing more, and waits up to %g s for its handlers. A second signal ends it "
            "at once."
            if self.times == 1
            else "The worker ends at once: its handlers are cancelled.",
            *([self._patience] if self.times == 1 else []),
        )
        self._tell()

    @property
    def status(self) -> int:
        """What the process exits with: 0 when it could end in its own time."""
        return 0 if self.times < 2 else 1 if self.number is None else 128 + self.number

    def _exit(self) -> None:
        logging.shutdown()
        os._exit(self.status or 1)
