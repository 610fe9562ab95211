"""A bug as exact replacements of text in files: what has changed since it was written is an error, and no bug."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class SourceChangedError(Exception):
    """The text that a bug replaces is not there exactly once."""


@dataclass(frozen=True)
class Edit:
    """One replacement.

    Attributes:
        path: The file, below src/pgebus.
        old: Text that is there exactly once.
        new: What stands there instead.
    """

    path: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        """Return *text* with the bug in it.

        Raises:
            SourceChangedError: If the old text is not there exactly once.
        """
        if (times := text.count(self.old)) != 1:
            raise SourceChangedError(f"src/pgebus/{self.path} has this text {times} times, not once:\n{self.old}")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Bug:
    """A planted bug, and the tests that are asked.

    Attributes:
        name: B1 to B20.
        what: What is wrong, as a reader of the table understands it.
        edits: How it is made.
        tests: Arguments of pytest by layer, the fastest layer first.
    """

    name: str
    what: str
    edits: Sequence[Edit]
    tests: Mapping[str, Sequence[str]]

    def plant(self, tree: Path) -> None:
        """Put it into the copy of the repository at *tree*.

        Raises:
            SourceChangedError: If the source has changed.
        """
        for edit in self.edits:
            path = tree / "src" / "pgebus" / edit.path
            path.write_text(edit.applied(path.read_text(encoding="utf-8")), encoding="utf-8")
