"""Compares what was promised with what happened: pure, over plain data.

Nothing is assumed of the order of rows, and no constraint has helped: a second effect is stored, and found here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from torture.history import UNFINISHED, DeliveryRow, EventRow, History, Outcome, Promise, Rules, Run


class Violation(NamedTuple):
    """One broken promise."""

    rule: str
    detail: str


RULES: Final = {
    "lost": "what was committed is there, and what is completed was done",
    "doubled": "nothing is there twice",
    "ghost": "nothing is there that was rolled back, or that nobody published",
    "half": "all of a transaction, or none: events and business rows, effects and balances, all handlers",
    "stuck": "nothing waits or runs any more",
    "dead": "only what its handler has rejected is dead",
    "fence": "the effect is that of the last claim",
    "early": "nothing runs before it is due",
    "order": "events of one key are handled in the order of their ids",
    "bounded": "no more attempts than allowed",
    "leak": "no backend, lock or process is left",
}


def check(history: History, rules: Rules) -> list[Violation]:
    """Return every violation of *rules* in *history*, in the order of `RULES`."""
    book = _Book(history, rules)
    found = [
        violation
        for look in (_published, _delivered, _handled, _balanced, _followed, _in_order, _in_time, _clean)
        for violation in look(book)
    ]
    return sorted(found, key=lambda violation: list(RULES).index(violation.rule))


class _Book:
    """The history, sorted by what is asked of it."""

    def __init__(self, history: History, rules: Rules) -> None:
        self.history = history
        self.rules = rules
        self.events = {event.id: event for event in history.events}
        self.deliveries = {(row.event_id, row.group): row for row in history.deliveries}
        self.effects = _by_delivery(history.effects)
        self.starts = _by_delivery(history.starts)

    def promises(self, event: EventRow) -> Sequence[Promise]:
        return self.rules.promises.get(event.type, ())


def _by_delivery(runs: Iterable[Run]) -> dict[tuple[int, str], list[Run]]:
    found: dict[tuple[int, str], list[Run]] = defaultdict(list)
    for run in runs:
        found[run.event_id, run.group].append(run)
    return found


def _published(book: _Book) -> Iterator[Violation]:
    """Publishers' ledgers, events and business rows agree."""
    events = Counter(event.number for event in book.history.events if event.number > 0)
    business = Counter(book.history.business)
    for unit in book.history.units:
        numbers = range(unit.first, unit.last + 1)
        kinds = [("event", [events.pop(number, 0) for number in numbers])]
        if unit.business:
            kinds.append(("business row", [business.pop(number, 0) for number in numbers]))
        there = {name: sum(1 for count in counts if count) for name, counts in kinds}
        what = f"numbers {unit.first} to {unit.last} ({unit.outcome}): {there} of {len(numbers)}"
        for name, counts in kinds:
            if max(counts) > 1:
                yield Violation("doubled", f"{name}s, {what}")
            if 0 < there[name] < len(numbers):
                yield Violation("half", f"{name}s, {what}")
            elif unit.outcome is Outcome.OK and not there[name]:
                yield Violation("lost", f"{name}s, {what}")
            elif unit.outcome is Outcome.FAILED and there[name]:
                yield Violation("ghost", f"{name}s, {what}")
        if len({bool(count) for count in there.values()}) > 1:
            yield Violation("half", f"event without business row, or the reverse: {what}")
    for name, rest in (("event", events), ("business row", business)):
        for number in rest:
            yield Violation("ghost", f"{name} of number {number}, which no publisher has written down")


def _delivered(book: _Book) -> Iterator[Violation]:
    """Every event has the deliveries that it is owed, each in its final state, and no others."""
    for event in book.history.events:
        for promise in book.promises(event):
            row = book.deliveries.get((event.id, promise.group))
            if row is None:
                yield Violation("lost", f"event {event.id} has no delivery for {promise.group}")
            elif row.status in UNFINISHED:
                yield Violation("stuck", f"{row}")
            elif row.status != promise.status:
                yield Violation("dead", f"{row}, and it should be {promise.status}")
    if len(book.deliveries) < len(book.history.deliveries):
        yield Violation("doubled", "deliveries: two of one event and group")
    for row in book.history.deliveries:
        owner = book.events.get(row.event_id)
        if owner is None:
            yield Violation("ghost", f"{row} has no event")
        elif row.group not in {promise.group for promise in book.promises(owner)}:
            yield Violation("ghost", f"{row}: nobody wants {owner.type} there")
        if row.attempt > book.rules.max_attempts:
            yield Violation("bounded", f"{row}")


def _handled(book: _Book) -> Iterator[Violation]:
    """A completed delivery has one effect of each transactional handler, and a start of each other one."""
    for event in book.history.events:
        for promise in book.promises(event):
            place = event.id, promise.group
            row = book.deliveries.get(place)
            if row is not None:
                yield from _effects(row, promise, book.effects.get(place, []))
                yield from _starts(row, promise, book.starts.get(place, []))
    for name, runs in (("effect", book.effects), ("start", book.starts)):
        for place in runs.keys() - book.deliveries.keys():
            yield Violation("ghost", f"{name} of event {place[0]} for {place[1]}, of which there is no delivery")


def _effects(row: DeliveryRow, promise: Promise, runs: list[Run]) -> Iterator[Violation]:
    counts = Counter(run.handler for run in runs)
    expected = promise.effects if row.status == "completed" else ()
    for handler, count in counts.items():
        if handler not in expected:
            yield Violation("ghost", f"effect of {handler} on {row}")
        elif count > 1:
            yield Violation("doubled", f"{count} effects of {handler} on {row}")
    missing = [handler for handler in expected if handler not in counts]
    if missing and len(missing) < len(expected):
        yield Violation("half", f"no effect of {missing} on {row}")
    elif missing:
        yield Violation("lost", f"no effect on {row}")
    for run in runs:
        if run.claim_seq != row.claim_seq:
            yield Violation("fence", f"effect by claim {run.claim_seq} on {row}")


def _starts(row: DeliveryRow, promise: Promise, runs: list[Run]) -> Iterator[Violation]:
    seen = {run.handler for run in runs}
    for handler in promise.starts:
        if row.status == "completed" and handler not in seen:
            yield Violation("lost", f"{handler} never started on {row}")
    for handler in seen - set(promise.starts):
        yield Violation("ghost", f"start of {handler} on {row}")
    for run in runs:
        if run.claim_seq > row.claim_seq:
            yield Violation("fence", f"start by claim {run.claim_seq} on {row}")


def _balanced(book: _Book) -> Iterator[Violation]:
    """Each balance was bumped once for each effect that bumps it."""
    due = Counter(
        book.events[effect.event_id].number % book.rules.accounts
        for effect in book.history.effects
        if effect.handler in book.rules.bumping and effect.event_id in book.events
    )
    for account in sorted(due.keys() | book.history.balances.keys()):
        amount = book.history.balances.get(account, 0)
        if amount != due[account]:
            yield Violation("half", f"account {account} was bumped {amount} times, by {due[account]} effects")


def _followed(book: _Book) -> Iterator[Violation]:
    """What a transactional handler has published is there once if its delivery is completed, else not at all."""
    if book.rules.follow_up is None:
        return
    follow_up, of, group = book.rules.follow_up
    seen = Counter(-event.number for event in book.history.events if event.type == follow_up)
    for event in book.history.events:
        if event.type != of or event.number % book.rules.every:
            continue
        row = book.deliveries.get((event.id, group))
        count = seen.pop(event.number, 0)
        if count > 1:
            yield Violation("doubled", f"{count} events {follow_up} after {row}")
        elif row is not None and row.status == "completed" and not count:
            yield Violation("half", f"no event {follow_up} after {row}")
        elif row is not None and row.status != "completed" and count:
            yield Violation("ghost", f"event {follow_up} after {row}")
    for number in seen:
        yield Violation("ghost", f"event {follow_up} after number {number}, which owes none")


def _in_order(book: _Book) -> Iterator[Violation]:
    """Of each key, a handler begins with an event only when it has begun with all earlier ones.

    The first time counts: what is at least once may be done again later.
    """
    for runs in (book.history.effects, book.history.starts):
        first: dict[tuple[str, str, str, int], int] = {}
        for run in runs:
            event = book.events.get(run.event_id)
            if event is not None and event.key is not None:
                place = run.group, run.handler, event.key, event.id
                first[place] = min(first.get(place, run.position), run.position)
        latest: dict[tuple[str, str, str], tuple[int, int]] = {}
        for (group, handler, key, event_id), position in sorted(first.items()):
            before, there = latest.get((group, handler, key), (0, -1))
            if position < there:
                yield Violation("order", f"{handler} of {group}, key {key}: event {event_id} before {before}")
            else:
                latest[group, handler, key] = event_id, position


def _in_time(book: _Book) -> Iterator[Violation]:
    """Nothing runs before its event is due."""
    for run in (*book.history.effects, *book.history.starts):
        event = book.events.get(run.event_id)
        if event is not None and run.at < event.run_at:
            yield Violation("early", f"{run}, due at {event.run_at}")


def _clean(book: _Book) -> Iterator[Violation]:
    """Nothing is left over."""
    for name, count in book.history.left.items():
        if count:
            yield Violation("leak", f"{name}: {count}")
