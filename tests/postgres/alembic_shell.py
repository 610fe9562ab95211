"""Runs `alembic` commands one after another in one process: a line with JSON arguments in, a line with the result out.

Starting Python for each command would cost most of the time of the tests that walk a host through its life.
"""

from __future__ import annotations

import io
import json
import sys
import traceback

REPLIES = sys.stdout
# Before Alembic is imported: its Config takes sys.stdout as a default.
output, messages = io.StringIO(), io.StringIO()
sys.stdout, sys.stderr = output, messages


def serve() -> None:
    from alembic.config import CommandLine

    for line in sys.stdin:
        code: object = 0
        try:
            CommandLine("alembic").main(json.loads(line))
        except SystemExit as error:
            code = error.code
        except Exception:  # noqa: BLE001 - whatever it is, the test wants to read it
            code = 1
            traceback.print_exc()
        reply = {"code": code, "output": output.getvalue(), "messages": messages.getvalue()}
        REPLIES.write(json.dumps(reply) + "\n")
        REPLIES.flush()
        for stream in (output, messages):
            stream.seek(0)
            stream.truncate()


if __name__ == "__main__":
    serve()
