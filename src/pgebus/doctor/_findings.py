"""What an examination returns, and from when on something counts as wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from math import isfinite
from typing import Final

from pgebus.errors import ConfigurationError

__all__ = ["Finding", "Limits", "Report", "Severity", "notice", "problem", "warning"]


class Severity(StrEnum):
    """How bad it is.

    Attributes:
        OK: Nothing is wrong here.
        NOTICE: Worth knowing; nothing has to be done.
        WARNING: It costs something now, or will fail later.
        PROBLEM: Events are not handled, or may be lost.
    """

    OK = "ok"
    NOTICE = "notice"
    WARNING = "warning"
    PROBLEM = "problem"

    @property
    def rank(self) -> int:
        """0 for ok, 3 for a problem."""
        return list(Severity).index(self)


@dataclass(frozen=True)
class Finding:
    """One thing that was seen.

    Attributes:
        code: What it is, for programs; the guide lists them all. Where nothing was found, the name of the check.
        severity: How bad it is.
        seen: What was seen, in sentences.
        remedy: What to do: a command, SQL or a sentence; None where nothing has to be done.
        subject: Which table, group, worker or session it is about; None for the whole.
    """

    code: str
    severity: Severity
    seen: str
    remedy: str | None = None
    subject: str | None = None


@dataclass(frozen=True)
class Report:
    """What an examination has found.

    Attributes:
        schema: The schema that was examined.
        findings: The worst first; one `ok` for each check that found nothing.
    """

    schema: str
    findings: tuple[Finding, ...]

    @property
    def worst(self) -> Severity:
        """The worst severity of all."""
        return max((finding.severity for finding in self.findings), key=lambda each: each.rank, default=Severity.OK)


@dataclass(frozen=True)
class Limits:
    """From when on something counts as wrong, and how long it may take to find out.

    Attributes:
        check_seconds: How long one statement of the examination may take on the server.
        look_again_seconds: After which what a running system repairs by itself is looked at once more.
        waiting_seconds: How long a delivery may be due, a key be held, or a group be full.
        running_seconds: How long a handler may run.
        transaction_seconds: How long a transaction may be open.
        transaction_ids: How many transactions may have begun since, where the time is not known.
        vacuum_seconds: How long a table may be due for a VACUUM or an ANALYZE.
        clock_seconds: How far the clock of this machine may be from the database's.
        notify_share: How much of the queue of NOTIFY may be used, from 0 to 1.
        connection_share: How much of `max_connections` may be used, from 0 to 1.
        statement_seconds: How long a statement on our tables may take on average.

    Raises:
        ConfigurationError: If one is not a finite number from zero.
    """

    check_seconds: float = 3.0
    look_again_seconds: float = 4.0
    waiting_seconds: float = 60.0
    running_seconds: float = 3600.0
    transaction_seconds: float = 300.0
    transaction_ids: float = 1_000_000
    vacuum_seconds: float = 600.0
    clock_seconds: float = 2.0
    notify_share: float = 0.1
    connection_share: float = 0.8
    statement_seconds: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or value < 0:
                raise ConfigurationError(f"{field.name} must be a finite number from zero, not {value!r:.80}.")


Make = Callable[..., Finding]


def _maker(severity: Severity) -> Make:
    def make(code: str, seen: str, remedy: str | None = None, subject: str | None = None) -> Finding:
        return Finding(code, severity, seen, remedy, subject)

    return make


notice: Final = _maker(Severity.NOTICE)
warning: Final = _maker(Severity.WARNING)
problem: Final = _maker(Severity.PROBLEM)
