"""What docs/operations.md shows is what the commands say. With WRITE_DOCS=1 the page is written anew."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from tests.postgres.plain_sql import subscribe
from tests.system.bus import Sql
from tests.system.conftest import Command

PAGE = Path(__file__).parent.parent.parent / "docs" / "operations.md"
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMES = (
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "2026-01-31 12:00:00"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+\+\d\d:\d\d"), "2026-01-31T12:00:00+00:00"),
)

DATA = """
INSERT INTO pgebus.events (type, key, payload, headers, created_at) VALUES
  ('order.placed', NULL, '{"order": 7}', '{}', now() - interval '2 hours'),
  ('order.placed', NULL, '{"order": 8, "to": "bob@example.org"}', '{"correlation_id": "8", "tenant": "shop"}', now()),
  ('order.placed', NULL, '{"order": 9}', '{}', now()),
  ('invoice.due', 'customer-7', '{"invoice": 70}', '{}', now()),
  ('invoice.due', 'customer-7', '{"invoice": 71}', '{}', now()),
  ('order.cancelled', NULL, '{"order": 8, "by": "bob@example.org"}', '{"tenant": "shop"}', now());
UPDATE pgebus.deliveries SET status = 'completed', finished_at = now(), attempt = 1, claim_seq = 1 WHERE event_id = 1;
UPDATE pgebus.deliveries SET status = 'dead', finished_at = now(), attempt = 10, claim_seq = 10,
  holds_key = key IS NOT NULL, errors = jsonb_build_array(jsonb_build_object('attempt', 10, 'at', now(), 'worker', '7',
    'handler', CASE consumer_group WHEN 'mail' THEN 'shop.mail.thank' ELSE 'shop.billing.remind' END,
    'type', 'ConnectionRefusedError', 'message', '[Errno 111] Connection refused', 'traceback', NULL))
  WHERE event_id IN (2, 3, 4);
"""


def same(text: str) -> str:
    """Return *text* with the moments of the page."""
    for pattern, moment in TIMES:
        text = pattern.sub(moment, text)
    return text


async def test_the_page_shows_what_the_commands_say(sql: Sql, command: Command) -> None:
    await subscribe(sql, "mail", "order.*")
    await subscribe(sql, "billing", "invoice.*")
    await sql.execute(DATA)
    page = PAGE.read_text(encoding="utf-8")
    written = []
    for block in CONSOLE.finditer(page):
        said = ""
        for line in block[1].splitlines():
            if line.startswith("$ pgebus "):
                status, out, err = await command(*shlex.split(line)[2:])
                assert status == 0, (line, err)
                said += f"{line}\n{same(out + err)}"
        written.append(said)
    anew = iter(written)
    shown = CONSOLE.sub(lambda _: f"```console\n{next(anew)}```", page)
    if os.environ.get("WRITE_DOCS"):
        PAGE.write_text(shown, encoding="utf-8")
    assert written
    assert page == shown
