"""`pgebus doctor`: what is wrong with a live system, and what to do.

The work is that of `pgebus.doctor`; here it is shown.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated

import typer

from pgebus import Settings
from pgebus.cli.messages import FAILED, place_of
from pgebus.cli.options import AsJson
from pgebus.cli.showing import plain, write
from pgebus.doctor import Report, Severity, examine

__all__ = ["doctor"]

_WRONG = (Severity.PROBLEM, Severity.WARNING)


def doctor(
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Leave the notices out.")] = False,
) -> None:
    """Say what is wrong with a live system, and what to do about it.

    Changes nothing, and takes a few seconds. Exit status: 0 nothing is
    wrong, at most notices; 1 a warning or a problem, also where the
    database cannot be reached; 2 the command line or the settings are
    wrong. Where to look: as for `pgebus migrate`.
    """
    settings = Settings()
    report = asyncio.run(examine(settings))
    if as_json:
        write(
            {
                "schema": report.schema,
                "worst": report.worst,
                "findings": [asdict(each) for each in report.findings],
            }
        )
    else:
        for line in _lines(report, quiet=quiet):
            typer.echo(line)
        counts = ", ".join(_count(report, severity) for severity in (*_WRONG, Severity.NOTICE))
        place = place_of(settings.database.sqlalchemy_url())
        typer.echo(f"{place}: schema {report.schema!r}: {counts}.")
    raise typer.Exit(FAILED if report.worst in _WRONG else 0)


def _lines(report: Report, *, quiet: bool) -> list[str]:
    lines = []
    for each in report.findings:
        if each.severity is Severity.OK or (quiet and each.severity is Severity.NOTICE):
            continue
        lines.append(f"{each.severity}  {each.code}: {plain(each.seen)}")
        if each.remedy is not None:
            lines.append(f"  -> {plain(each.remedy)}")
    good = [each.code for each in report.findings if each.severity is Severity.OK]
    return [*lines, *([f"ok: {', '.join(good)}"] if good else [])]


def _count(report: Report, severity: Severity) -> str:
    count = sum(each.severity is severity for each in report.findings)
    return f"{count or 'no'} {severity}{'' if count == 1 else 's'}"
