"""Where a claim begins: where the one before it ended, while there is a backlog, and at the beginning each second."""

from __future__ import annotations

from typing import Any, cast

from pgebus._runtime.leases import Fence, Lane, Lease, Place
from pgebus._runtime.places import FROM_THE_BEGINNING_SECONDS, Places


def lease(event_id: int, due: int = 0, *, group: str = "default", priority: int = 0, keyed: bool = False) -> Lease:
    row = cast("Any", {"lane": priority, "due": due})
    return Lease(Fence(event_id, group, 1, 1), "order.placed", keyed, 1, 0, (), row)


def test_the_first_claim_begins_at_the_beginning() -> None:
    assert Places().begin(100.0) == {}


def test_the_next_one_goes_on_where_it_ended_in_each_lane() -> None:
    places = Places()
    claimed = [lease(1, 10), lease(4, 12), lease(2, 11, group="billing"), lease(3, 9, priority=5)]
    places.ended(places.begin(100.0), claimed, full=True, now=100.0)
    reached = {Lane("default", 0): Place(12, 4), Lane("billing", 0): Place(11, 2), Lane("default", 5): Place(9, 3)}
    assert places.begin(100.1) == reached
    places.ended(reached, [lease(7, 13)], full=True, now=100.2)
    assert places.begin(100.3) == {**reached, Lane("default", 0): Place(13, 7)}


def test_once_a_second_a_claim_begins_at_the_beginning() -> None:
    places = Places()
    places.ended(places.begin(100.0), [lease(1)], full=True, now=100.0)
    for tenths in range(1, 20):
        reached = places.begin(100.0 + tenths / 10)
        assert bool(reached) == (tenths != 10 * FROM_THE_BEGINNING_SECONDS)
        places.ended(reached, [lease(tenths)], full=True, now=100.0 + tenths / 10)


def test_a_look_that_takes_long_comes_more_rarely() -> None:
    places = Places()
    places.ended(places.begin(100.0), [lease(1)], full=True, now=100.5)
    assert places.begin(105.4)
    assert not places.begin(105.5)


def test_where_the_backlog_ends_the_next_claim_begins_at_the_beginning() -> None:
    places = Places()
    places.ended(places.begin(100.0), [lease(1)], full=True, now=100.0)
    places.ended(places.begin(100.1), [lease(2)], full=False, now=100.1)
    assert places.begin(100.2) == {}


def test_behind_what_has_a_key_its_next_one_may_be_due() -> None:
    places = Places()
    places.ended(places.begin(100.0), [lease(1), lease(2, keyed=True), lease(3)], full=True, now=100.0)
    assert places.begin(100.1) == {}
