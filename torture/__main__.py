"""`python -m torture`: see `--help`."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from torture.plan import SCALE, schedule
from torture.running import Options, run
from torture.server import running

# A disk for each event, generously: it is only as full as it has to be.
_DISK_BYTES, _BYTES_PER_EVENT = 512 * 2**20, 8192
_MINUTES = 6.5


def main() -> int:
    """Return 0 when nothing was wrong and the faults have really hit."""
    parser = argparse.ArgumentParser(prog="python -m torture", description="Torture pgebus, and check its books.")
    parser.add_argument("--events", type=int, default=SCALE, help=f"events to publish ({SCALE:,})")
    parser.add_argument("--seed", type=int, default=1, help="decides the faults and the choices (1)")
    parser.add_argument("--minutes", type=float, help=f"how long to publish ({_MINUTES} for {SCALE:,} events)")
    parser.add_argument("--at-most", type=float, help="minutes after which publishing ends, with fewer events")
    parser.add_argument("--json", type=Path, help="where to write the result as JSON")
    parser.add_argument("--schedule", action="store_true", help="print the planned faults first")
    parser.add_argument("--keep", action="store_true", help="keep ledgers, logs and faults also when all is well")
    given = parser.parse_args()
    minutes = given.minutes or max(0.2, _MINUTES * given.events / SCALE)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running, and nothing mounted
    home = Path(tempfile.mkdtemp(prefix="torture-run-"))
    command = " ".join(["python -m torture", *sys.argv[1:]])
    options = Options(given.events, given.seed, minutes * 60, (given.at_most or math.inf) * 60, command, home)
    print(
        f"{given.events:,} events in {minutes:.1f} minutes, seed {given.seed}; ledgers and logs in {home}", flush=True
    )
    if given.schedule:
        for fault in schedule(given.seed, given.events):
            print(f"  {fault.at:6.1%} {fault.kind} {fault.roll:.3f}")
    with running(_DISK_BYTES + given.events * _BYTES_PER_EVENT) as server:
        report = asyncio.run(run(options, server))
        (home / "postgresql.log").write_text(server.log())
    for line in report.lines():
        print(line)
    if given.json:
        given.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    if report.ok and not given.keep:
        shutil.rmtree(home)
    else:
        print(f"Ledgers, logs and the faults in their order are kept in {home}.")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
