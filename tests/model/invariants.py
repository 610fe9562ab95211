"""What must hold after every step, whatever the steps were, and then: that the tables hold what the oracle says.

Two looks at the tables, one before and one after the step. What an error begins with: I1 no loss, I2 no ghost, I4
effects once, I6 the fence, I7 liveness, I8 bounded attempts, I9 never early, I11 one valid claim at a time.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from tests.model.database import Look
from tests.model.oracle import Oracle
from tests.model.things import KEPT_ERRORS, UNSEEN, Delivery

# What a step may make of a delivery. What is not here is not over, and never comes back.
LEGAL: Final = {
    "pending": {"running", "cancelled"},
    "blocked": {"pending", "cancelled"},
    "running": {"pending", "completed", "dead", "unhandled", "cancelled"},
    "unhandled": {"pending", "blocked", "running", "cancelled"},
    "completed": {"pending", "blocked"},
    "dead": {"pending", "blocked", "cancelled"},
    "cancelled": {"pending", "blocked"},
}
COMPARED_NAMES: Final = (
    *("status", "worker", "claim_seq", "attempt", "lost", "round"),
    *("holds_key", "handled", "errors", "key", "type", "priority"),
)
OVER: Final = ("completed", "dead", "cancelled")


def check(before: Look, after: Look, oracle: Oracle) -> None:
    """Check a step. The rows alone, then the step, then everything that is known.

    Raises:
        AssertionError: Beginning with the name of what does not hold.
    """
    _rows(after)
    _steps(before, after, oracle)
    _nothing_lost_and_no_ghosts(after, oracle)
    _effects(after, oracle)
    for place, row in after.rows.items():
        _as_expected(oracle.deliveries[place], tuple(row.values())[2:14], oracle)
        _times(oracle.deliveries[place], row["due"], row["finished"], after, oracle)


def _rows(look: Look) -> None:
    """What each row, and each key, must satisfy by itself."""
    running: Counter[tuple[str, str]] = Counter()
    for place, row in look.rows.items():
        status = row["status"]
        assert status in LEGAL, f"I1 legal status: {place} is {status!r}"
        assert (status == "running") == (row["worker_id"] is not None) == (row["claimed"] is not None), (
            f"I6 fence: {place} is {status}, of worker {row['worker_id']}"
        )
        assert (status in OVER) == (row["finished"] is not None), f"I1 legal status: {place} is {status}, not finished"
        assert 0 <= row["attempt"] <= row["claim_seq"], f"I8 bounded: {place} has more attempts than claims"
        if status == "running":
            assert row["attempt"] >= 1, f"I8 bounded: {place} runs, and its attempt is not charged"
            assert row["due"] <= row["claimed"], f"I9 never early: {place} was claimed before it was due"
            if row["key"] is not None:
                running[place[1], row["key"]] += 1
    twice = [key for key, count in running.items() if count > 1]
    assert not twice, f"I11 one at a time: two deliveries run of {twice}"


def _steps(before: Look, after: Look, oracle: Oracle) -> None:
    """What may have become of each row in one step."""
    for place, new in after.rows.items():
        old = before.rows.get(place)
        if old is None:
            assert new["status"] in ("pending", "blocked", "unhandled"), f"{place} was born {new['status']}"
            continue
        was, is_now = old["status"], new["status"]
        assert was == is_now or is_now in LEGAL[was], f"I1 legal steps: {place} went from {was} to {is_now}"
        assert new["claim_seq"] >= old["claim_seq"], f"I11 one claim: the claim_seq of {place} went back"
        claimed = new["claim_seq"] - old["claim_seq"]
        assert claimed == (was != "running" and is_now == "running"), f"I11 one claim: {place} counts {claimed} claims"
        if was == "running" and is_now != "running":
            assert place in oracle.departed, f"I6 fence: {place} went to {is_now}, and its worker had not said so"
        if was == "running" == is_now:
            assert new["worker_id"] == old["worker_id"], f"I6 fence: {place} has changed hands"
        if is_now == "running" != was and new["key"] is not None:
            _first_of_its_key(place, new["key"], before)


def _first_of_its_key(place: tuple[int, str], key: str, before: Look) -> None:
    """Check that nothing that could be seen stood before a delivery that has just begun."""
    for (event_id, group), row in before.rows.items():
        if group == place[1] and row["key"] == key and event_id < place[0]:
            ahead = row["holds_key"] or row["status"] in ("pending", "running", "blocked")
            assert not ahead, f"order of a key: {place} runs before #{event_id}, which is {row['status']}"


def _nothing_lost_and_no_ghosts(after: Look, oracle: Oracle) -> None:
    lost = oracle.events.keys() - after.events
    assert not lost, f"I1 no loss: events {sorted(lost)} are gone"
    ghosts = after.events - oracle.events.keys()
    assert not ghosts, f"I2 no ghost: events {sorted(ghosts)} were never committed, or were pruned"
    missing = oracle.deliveries.keys() - after.rows.keys()
    assert not missing, f"I1 no loss: deliveries {sorted(missing)} are gone"
    more = after.rows.keys() - oracle.deliveries.keys()
    assert not more, f"I2 no ghost: deliveries {sorted(more)}"


def _effects(after: Look, oracle: Oracle) -> None:
    counts = Counter(after.effects)
    if counts == oracle.effects:
        return
    for claim in sorted(counts.keys() | oracle.effects.keys()):
        there, due = counts[claim], oracle.effects[claim]
        assert there == due, f"I4 effects once: event {claim[0]} for {claim[1]}, claim {claim[2]}: {there}, not {due}"


def _as_expected(delivery: Delivery, stored: tuple[object, ...], oracle: Oracle) -> None:
    """Compare a row with the dict; take over what was the database's choice."""
    status = stored[0]
    choice = delivery.status == "pending or blocked" and status in ("pending", "blocked")
    let_in = (delivery.status, status) == ("blocked", "pending") and (
        (delivery.group, delivery.key) in oracle.may_promote and oracle.first(delivery)
    )
    if choice or let_in:
        delivery.status = str(status)
    if delivery.claim_seq == UNSEEN:
        assert isinstance(stored[2], int)
        assert stored[2] >= 1_000_000, f"I6 fence: {delivery.name} has a claim_seq that there may have been before"
        delivery.claim_seq = stored[2]
    stored = (*stored[:7], tuple(stored[7]) if isinstance(stored[7], list) else None, *stored[8:])
    expected = delivery.stored()
    if stored != expected:
        differ = [
            f"{name} is {there!r}, not {should!r}"
            for name, there, should in zip(COMPARED_NAMES, stored, expected, strict=True)
            if there != should
        ]
        raise AssertionError(f"{delivery.name} is not as it should be: {'; '.join(differ)}")
    assert delivery.errors <= KEPT_ERRORS


def _times(delivery: Delivery, due: int, finished: int | None, look: Look, oracle: Oracle) -> None:
    due += look.passed
    if delivery.due is None:
        hi = delivery.due_from.hi if delivery.due_from.hi is not None else look.clock
        assert delivery.due_from.lo <= due - delivery.delay <= hi, f"I9 never early: {delivery.name} is due at {due}"
        delivery.due = due
    assert delivery.due == due, f"I9 never early: {delivery.name} has another due time"
    if finished is None:
        delivery.finished = None
    elif delivery.finished is None:
        assert oracle.now.lo <= finished + look.passed <= look.clock, f"{delivery.name} was not finished in this step"
        delivery.finished = finished + look.passed
    else:
        assert delivery.finished == finished + look.passed, f"{delivery.name} was finished at another time"
