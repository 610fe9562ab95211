"""`pgebus worker`: the command line of a worker."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pgebus import ConfigurationError
from pgebus.cli.worker.logs import set_up_logs
from pgebus.cli.worker.orders import Order
from pgebus.cli.worker.process import work
from pgebus.cli.worker.supervising import supervise
from pgebus.groups import check_group_name

__all__ = ["worker"]


class Loop(StrEnum):
    """Which event loop."""

    auto = "auto"
    asyncio = "asyncio"
    uvloop = "uvloop"


class Level(StrEnum):
    """From which level on it logs."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"
    critical = "critical"


def worker(
    target: Annotated[
        str,
        typer.Argument(
            help="Of an EventSystem, or of a function that returns one: package.module:name.", show_default=False
        ),
    ],
    processes: Annotated[
        int | None,
        typer.Option(help="Run so many processes, and start again what ends.", min=1, max=1000, show_default=False),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(help="Serve only these consumer groups, separated by commas.", show_default=False),
    ] = None,
    loop: Annotated[Loop, typer.Option(help="The event loop; auto: uvloop where it is installed.")] = Loop.auto,
    log_level: Annotated[Level, typer.Option(help="Log from this level on.")] = Level.info,
    reload: Annotated[bool, typer.Option("--reload", help="For development: start again when a .py changes.")] = False,
    reload_dir: Annotated[
        list[Path] | None,
        typer.Option(
            help="Watch this directory instead of the current one; may be repeated. Implies --reload.",
            exists=True,
            file_okay=False,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a worker: handle the events of a channel until told to stop.

    The first SIGTERM or Ctrl-C stops it: it claims nothing more, and waits
    for its handlers as long as shutdown_timeout_seconds says. The second one
    ends it at once. What it did not finish, others take, uncounted.

    Exit status: 0 stopped, 1 it failed, 2 the command line, the program or
    the settings are wrong, 130 or 143 ended at once by Ctrl-C or SIGTERM.
    """
    names = () if groups is None else tuple(check_group_name(name.strip()) for name in groups.split(","))
    order = Order(target, names, loop.value, log_level.value)
    directories = tuple(reload_dir or ()) or ((Path.cwd(),) if reload else ())
    if processes is None and not directories:
        raise typer.Exit(work(order))
    if processes is not None and directories:
        raise ConfigurationError("--reload is for development, with one process. Leave out --processes.")
    if os.name != "posix":
        raise ConfigurationError("--processes and --reload need a POSIX system. Start several workers instead.")
    set_up_logs(order.log_level)
    raise typer.Exit(supervise(order, processes or 1, directories))
