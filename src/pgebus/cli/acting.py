"""A command that changes many deliveries or events: it counts, asks, acts batch by batch, and counts again.

What is changed is the business of its caller.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final

import typer
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus.cli.messages import FAILED, MISUSED, fail
from pgebus.cli.showing import run, write

__all__ = ["BATCH", "Act"]

# In a transaction: some tens of milliseconds.
BATCH: Final = 1_000


class Act:
    """One command: how many there are, whether it is meant, and how many it were.

    Args:
        name: The command.
        one: What is counted, in the singular.
        many: The same in the plural.
        done: What becomes of them.
        dry_run: Whether to count only.
        yes: Whether to ask nobody.
        as_json: Whether to write JSON.
    """

    def __init__(self, name: str, one: str, many: str, done: str, *, dry_run: bool, yes: bool, as_json: bool) -> None:
        self._name = name
        self._one = one
        self._many = many
        self._done = done
        self._dry_run = dry_run
        self._yes = yes
        self._as_json = as_json
        self._found = 0

    def ask(self, found: int) -> None:
        """Say how many there are, and ask whether it is meant; ends the command where it is not."""
        self._found = found
        if self._dry_run:
            self._say(0, f"{self._counted(found)} would be {self._done}.")
            raise typer.Exit(0)
        if self._yes or not found:
            return
        if self._as_json or not sys.stdin.isatty():
            fail(f"{self._counted(found)} would be {self._done}. Nothing was changed: say --yes.", MISUSED)
        if not typer.confirm(f"{self._counted(found)} will be {self._done}. Go on?"):
            typer.echo("Nothing was changed.")
            raise typer.Exit(FAILED)

    def do(
        self,
        batch: Callable[[AsyncSession, list[Any], int], Awaitable[list[Any]]],
        *,
        once: bool = False,
        short: str = "had changed meanwhile, or are locked",
    ) -> None:
        """Do it, for as many as there were, batch by batch, or *once* in any case; say how many it were.

        Args:
            batch: Does some, for up to so many; gets what it did last.
            once: Whether to call it once, whatever the count was.
            short: Why it may be fewer than there were.
        """

        async def work(session: AsyncSession) -> int:
            count, last = 0, list[Any]()
            while count < self._found or once:
                last = await batch(session, last, min(BATCH, self._found - count))
                await session.commit()
                count += len(last)
                if once or not last:
                    break
            return count

        changed = run(work) if self._found or once else 0
        rest = "" if changed >= self._found else f" {self._found - changed:,} {short}."
        self._say(changed, f"{self._counted(changed)} {self._done}.{rest}")

    def _counted(self, count: int) -> str:
        return f"{count:,} {self._one if count == 1 else self._many}" if count else f"No {self._many}"

    def _say(self, changed: int, text: str) -> None:
        if self._as_json:
            write({"command": self._name, "found": self._found, "changed": changed, "dry_run": self._dry_run})
        else:
            typer.echo(text)
