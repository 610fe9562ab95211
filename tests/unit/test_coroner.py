from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pgebus._runtime.maintenance import Coroner

GRACE = 2.0
FRESH = 10.0

Owner = tuple[int, bool, bool, bool]


def owner(worker_id: int = 1, *, alive: bool = False, owns: bool = True, fresh: bool = False) -> Owner:
    return (worker_id, alive, owns, fresh)


def coroner() -> Coroner:
    return Coroner(GRACE, FRESH)


def test_a_worker_is_dead_after_the_grace_and_not_before() -> None:
    looks = coroner()
    assert looks.look([owner()], 100.0) == []
    assert looks.look([owner()], 101.9) == []
    assert looks.look([owner()], 102.0) == [1]


def test_it_stays_dead_until_it_is_gone() -> None:
    """A recovery that failed, or was too large for one statement, is tried again."""
    looks = coroner()
    looks.look([owner()], 100.0)
    assert looks.look([owner()], 102.0) == [1]
    assert looks.look([owner()], 103.0) == [1]
    assert looks.look([], 104.0) == []


def test_there_is_no_hurry_with_a_worker_that_owns_nothing() -> None:
    """It is ended all the same: its idle flag would make every publisher notify."""
    looks = coroner()
    looks.look([owner(owns=False)], 100.0)
    assert looks.look([owner(owns=False)], 109.9) == []
    assert looks.look([owner(owns=False)], 110.0) == [1]


def test_absence_counts_from_its_beginning_when_deliveries_turn_up() -> None:
    looks = coroner()
    looks.look([owner(owns=False)], 100.0)
    assert looks.look([owner(owns=True)], 102.0) == [1]


def test_a_worker_that_comes_back_starts_anew() -> None:
    looks = coroner()
    looks.look([owner()], 100.0)
    assert looks.look([owner(alive=True)], 101.0) == []
    assert looks.look([owner()], 102.0) == []
    assert looks.look([owner()], 103.9) == []
    assert looks.look([owner()], 104.0) == [1]


def test_a_worker_that_had_vanished_from_the_list_starts_anew() -> None:
    looks = coroner()
    looks.look([owner()], 100.0)
    looks.look([], 101.0)
    assert looks.look([owner()], 102.0) == []
    assert looks.look([owner()], 104.0) == [1]


def test_each_worker_has_its_own_time() -> None:
    looks = coroner()
    looks.look([owner(1), owner(2, alive=True)], 100.0)
    looks.look([owner(1), owner(2)], 101.0)
    assert looks.look([owner(1), owner(2)], 102.0) == [1]
    assert looks.look([owner(1), owner(2)], 103.0) == [1, 2]


def test_after_a_server_start_the_grace_is_longer() -> None:
    """All locks vanish at once while the workers live."""
    looks = coroner()
    looks.look([owner(fresh=True)], 100.0)
    assert looks.look([owner(fresh=True)], 109.9) == []
    assert looks.look([owner(fresh=True)], 110.0) == [1]


def test_a_worker_seen_alive_since_the_server_start_gets_the_short_grace() -> None:
    """It has come back already; its lock is gone for a reason of its own."""
    looks = coroner()
    looks.look([owner(1, alive=True, fresh=True), owner(2, fresh=True)], 100.0)
    looks.look([owner(1, fresh=True), owner(2, fresh=True)], 101.0)
    assert looks.look([owner(1, fresh=True), owner(2, fresh=True)], 103.0) == [1]


def test_a_witness_is_forgotten_with_the_worker() -> None:
    looks = coroner()
    looks.look([owner(alive=True, fresh=True)], 100.0)
    looks.look([], 101.0)
    looks.look([owner(fresh=True)], 102.0)
    assert looks.look([owner(fresh=True)], 111.0) == []


def test_who_was_blind_counts_anew() -> None:
    """Absence has to be seen, on one connection; a server may have been restarted in between."""
    looks = coroner()
    looks.look([owner(1, fresh=True), owner(2, alive=True, fresh=True)], 100.0)
    looks.blinded()
    assert looks.look([owner(1, fresh=True), owner(2, fresh=True)], 111.0) == []
    assert looks.look([owner(1, fresh=True), owner(2, fresh=True)], 120.9) == []
    assert looks.look([owner(1, fresh=True), owner(2, fresh=True)], 121.0) == [1, 2]


def test_the_grace_after_a_server_start_is_never_the_shorter_one() -> None:
    looks = Coroner(60.0, FRESH)
    looks.look([owner(fresh=True)], 0.0)
    assert looks.look([owner(fresh=True)], 59.0) == []
    assert looks.look([owner(fresh=True)], 60.0) == [1]


# What a look may find of one worker; None when it is not in the list.
sights = st.none() | st.builds(owner, st.integers(1, 3), alive=st.booleans(), owns=st.booleans(), fresh=st.booleans())
rounds = st.tuples(
    st.floats(min_value=0.0, max_value=4.0),  # seconds since the last look
    st.booleans() | st.just(False),  # blinded before this look
    st.lists(sights, max_size=3, unique_by=lambda sight: sight and sight[0]),
)


@given(st.lists(rounds, max_size=30))
def test_nobody_is_dead_before_the_grace_of_uninterrupted_absence(
    history: list[tuple[float, bool, list[Owner | None]]],
) -> None:
    looks = coroner()
    now = 0.0
    absent_since: dict[int, float] = {}
    seen_alive: set[int] = set()
    for passed, blinded, sight in history:
        now += passed
        if blinded:
            looks.blinded()
            absent_since, seen_alive = {}, set()
        owners = [one for one in sight if one is not None]
        dead = looks.look(owners, now)
        seen_alive |= {worker_id for worker_id, alive, *_ in owners if alive}
        absent_since = {worker_id: absent_since.get(worker_id, now) for worker_id, alive, *_ in owners if not alive}
        for worker_id, alive, owns, fresh in owners:
            long = not owns or (fresh and worker_id not in seen_alive)
            if worker_id in dead:
                assert not alive
                assert now - absent_since[worker_id] >= (FRESH if long else GRACE)
            elif not alive:  # and after the longest grace it is not forgotten
                assert now - absent_since[worker_id] < FRESH
        assert set(dead) <= {worker_id for worker_id, *_ in owners}
