"""A small torture: the whole of `make torture`, with a fault of each kind, in half a minute."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

EVENTS = 1_200
WITHIN = 300.0


async def test_under_faults_of_every_kind_nothing_is_lost_doubled_or_stuck(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    arguments = ["--events", str(EVENTS), "--minutes", "0.1", "--seed", "1", "--json", str(result)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "torture",
        *arguments,
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(WITHIN):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)  # it takes its processes and its server along
            await process.wait()
    assert process.returncode == 0, said.decode()
    seen = json.loads(result.read_text())
    assert set(seen["violations"].values()) == {0}
    assert seen["events"] == EVENTS
    assert seen["marks"]["kills"] >= 1
    assert seen["marks"]["restarts"] >= 1
    assert seen["counts"]["effects"] > 0
