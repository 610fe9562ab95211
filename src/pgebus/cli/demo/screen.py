"""What the demo looks like: numbered steps, sentences, facts, one table.

Plain text where there is no terminal or no colour is wanted; never wider than the terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDEST: Final = 88
_INDENT: Final = 4


class Screen:
    """Writes to standard output, and counts the steps and the seconds."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False)
        self._width = min(self._console.width, _WIDEST)
        self._began = monotonic()
        self._steps = 0

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return monotonic() - self._began

    def title(self, text: str) -> None:
        """Write the headline of all."""
        self._console.print(Text(text + "\n", style="bold"), soft_wrap=True)

    def step(self, text: str) -> None:
        """Begin the next numbered step."""
        self._steps += 1
        heading = Text(f"\n{self._steps}. {text}", style="bold cyan")
        heading.append(f"  [{self.seconds:.1f} s]", style="dim")
        self._console.print(heading, soft_wrap=True)

    def say(self, text: str) -> None:
        """Write what happens and why it matters."""
        self._write(text, " " * _INDENT)

    def fact(self, text: str) -> None:
        """Write what was seen in the database or measured."""
        self._write(text, " " * _INDENT + "> ", style="green")

    def code(self, *lines: str) -> None:
        """Write lines as they stand."""
        for line in lines:
            self._console.print(Text(" " * (_INDENT + 2) + line, style="dim"), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Write a table."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def verdict(self, text: str, *, good: bool) -> None:
        """Write how it ended."""
        self._console.print(Text(text, style="bold green" if good else "bold red"), width=self._width)

    def _write(self, text: str, first: str, style: str = "") -> None:
        wrapped = textwrap.fill(text, self._width, initial_indent=first, subsequent_indent=" " * len(first))
        self._console.print(Text(wrapped, style=style), soft_wrap=True)
