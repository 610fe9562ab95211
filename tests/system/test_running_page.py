"""What docs/guides/running.md shows is what the commands say. With WRITE_DOCS=1 the page is written anew."""

from __future__ import annotations

import os
import re
import shlex
import signal
from pathlib import Path

from pgebus import DatabaseSettings
from tests.postgres.plain_sql import subscribe
from tests.system.bus import Sql
from tests.system.commands import Running
from tests.system.conftest import Command
from tests.system.test_operations_page import CONSOLE, same

PAGE = Path(__file__).parent.parent.parent / "docs" / "guides" / "running.md"
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LOG = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)

DATA = """
INSERT INTO pgebus.events (type, headers, created_at) VALUES ('order.placed', '{}', now()),
  ('mail.wanted', '{"correlation_id": "1", "causation_id": "1"}', now() + interval '30 milliseconds'),
  ('mail.failed', '{"correlation_id": "1", "causation_id": "2"}', now() + interval '12 seconds');
UPDATE pgebus.deliveries SET status = 'completed', attempt = 1, claim_seq = 1, finished_at = due_at + CASE event_id
  WHEN 3 THEN 8 ELSE CASE consumer_group WHEN 'mail' THEN 41 ELSE 35 END END * interval '1 millisecond';
UPDATE pgebus.deliveries SET status = 'dead', attempt = 3, claim_seq = 3, finished_at = due_at + interval '12 seconds',
  errors = '[{"type": "ConnectionRefusedError", "message": "[Errno 111] Connection refused"}]' WHERE event_id = 2;
INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, key, status)
SELECT n, now() + CASE n WHEN 12 THEN interval '1 hour' ELSE interval '-2 hours -30 minutes' END, 'events', 'billing',
  'invoice.due', 'customer-7', CASE n WHEN 13 THEN 'blocked' ELSE 'pending' END FROM generate_series(10, 13) n;
INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, status, finished_at)
SELECT n, now(), 'events', 'mail', 'order.placed', 'completed', now() FROM generate_series(20, 48) n;
INSERT INTO pgebus.workers (id, channel, groups, beat_at) VALUES (1, 'events', '{billing,mail}', now());
UPDATE pgebus.consumer_groups SET paused_at = now() WHERE consumer_group = 'billing';
"""


def compare(page: str, shown: str) -> None:
    if os.environ.get("WRITE_DOCS"):
        PAGE.write_text(shown, encoding="utf-8")
    assert page == shown


async def test_the_page_shows_what_status_and_trace_say(sql: Sql, command: Command) -> None:
    await subscribe(sql, "mail", "order.*", "mail.wanted")
    await subscribe(sql, "billing", "order.*", "mail.failed")
    await sql.execute(DATA)
    page = PAGE.read_text(encoding="utf-8")
    written = []
    for block in CONSOLE.finditer(page):
        line = block[1].partition("\n")[0]
        status, out, err = await command(*shlex.split(line)[2:])
        assert (status, err) == (0, "")
        written.append(f"{line}\n{same(out)}")
    assert len(written) == 2
    anew = iter(written)
    compare(page, CONSOLE.sub(lambda _: f"```console\n{next(anew)}```", page))


async def test_the_page_shows_what_the_worker_logs(database: DatabaseSettings, tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    program = PROGRAM.search(page)
    assert program is not None
    (tmp_path / "shop.py").write_text(program[1], encoding="utf-8")
    url = database.sqlalchemy_url().render_as_string(hide_password=False)
    worker = Running(tmp_path, ["worker", "shop:system"], PGEBUS_DATABASE__URL=url)
    try:
        await worker.says("Handling channel")
        worker.signal(signal.SIGTERM)
        assert await worker.ends() == 0
    finally:
        worker.bury()
    said = [line for line in worker.said.splitlines(keepends=True) if "is up to date" not in line]
    log = re.sub(r"\[\d+\]", "[4711]", re.sub(r"as worker \d+", "as worker 1234567890", same("".join(said))))
    log = re.sub(r"(\d\d:\d\d:\d\d),\d{3}", r"\1,000", log)
    compare(page, LOG.sub(lambda _: f"```text\n{log}```", page))
