"""A walk through the README of an example: what a reader would type, and what it says comes back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """Something to do, and what comes of it.

    Attributes:
        language: `console` for a command, `sql` for a statement, `text` for what a running process prints.
        command: The command without its prompt, or the statement.
        output: What the README says it prints; empty when it says nothing.
    """

    language: str
    command: str
    output: str


def steps(readme: Path) -> list[Step]:
    """Return all steps of a README, in their order; the text behind a statement is its output."""
    found: list[Step] = []
    for language, code in _FENCE.findall(readme.read_text(encoding="utf-8")):
        match language:
            case "console":
                before, *commands = re.split(r"^\$ ", code, flags=re.MULTILINE)
                assert not before, before
                for each in commands:
                    command, _, output = each.partition("\n")
                    found.append(Step("console", command, output.strip()))
            case "sql":
                found.append(Step("sql", code.strip(), ""))
            case "text" if found[-1].language == "sql":
                found.append(Step("sql", found.pop().command, code.strip()))
            case "text":
                found.append(Step("text", "", code.strip()))
            case _:
                raise AssertionError(f"no reader knows what to do with {language!r}:\n{code}")
    return found
