"""The application's own tables, what it promises, and how a number decides what becomes of its event.

No unique constraint and no foreign key: a double must be stored to be seen.
"""

from __future__ import annotations

import zlib
from typing import Final

from torture.history import Promise, Rules

ACCOUNTS: Final = 256
KEYS: Final = 200
EVERY: Final = 4
MAX_ATTEMPTS: Final = 200

TABLES: Final = f"""
CREATE TABLE business (number bigint NOT NULL, publisher int NOT NULL);
CREATE TABLE effects (
  position bigint GENERATED ALWAYS AS IDENTITY, event_id bigint NOT NULL, consumer_group text NOT NULL,
  handler text NOT NULL, claim_seq int NOT NULL, attempt int NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE starts (LIKE effects INCLUDING ALL);
CREATE TABLE balances (account int PRIMARY KEY, amount bigint NOT NULL DEFAULT 0);
INSERT INTO balances (account) SELECT generate_series(0, {ACCOUNTS - 1});
CREATE TABLE things (key text PRIMARY KEY);
INSERT INTO things SELECT 'thing:' || g FROM generate_series(0, {KEYS - 1}) g;
"""

_SEND: Final = Promise("mail", starts=("send",))
RULES: Final = Rules(
    promises={
        "order.placed": (
            Promise("billing", effects=("bill", "reserve")),
            _SEND,
            Promise("audit", starts=("note",)),
        ),
        "stock.moved": (Promise("billing", effects=("move",)), Promise("mail", starts=("count",))),
        "note.sent": (_SEND,),
        "order.refused": (Promise("billing", status="dead"), _SEND),
        "order.billed": (_SEND,),
    },
    accounts=ACCOUNTS,
    bumping=frozenset({"reserve", "move"}),
    follow_up=("order.billed", "order.placed", "billing"),
    every=EVERY,
    max_attempts=MAX_ATTEMPTS,
)

# Of a thousand events that have no key.
_SHARES: Final = (("order.placed", 250), ("order.refused", 50), ("note.sent", 700))


def type_of(number: int) -> str:
    """Return of which type the event of *number* is, where it has no key."""
    place = draw("type", number)
    for name, share in _SHARES:
        if place < share:
            return name
        place -= share
    raise AssertionError("the shares add up to a thousand")


def draw(*what: object) -> int:
    """Return a number below a thousand, always the same for the same arguments."""
    return zlib.crc32(":".join(map(str, what)).encode()) % 1000
