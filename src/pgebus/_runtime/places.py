"""Where the claims of a backlog go on.

A claim that begins at the beginning walks over the index entries of whatever was claimed before it, until a vacuum has
removed them; and it can remove none of them while some transaction, anywhere in the database, is older. So while there
is a backlog, a claim begins where the one before it ended.

No database and no event loop: it is told what was claimed, and the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from pgebus._runtime.leases import Lane, Lease, Place

# What comes in behind such a place is found after so many seconds, or when the backlog has an end ...
FROM_THE_BEGINNING_SECONDS: Final = 1.0
# ... and where a look from the beginning takes long, it may take this part of the time.
PART_OF_THE_TIME: Final = 0.1


class Places:
    """How far the claims of one backlog have come, by lane."""

    def __init__(self) -> None:
        self._reached: dict[Lane, Place] = {}
        self._look_at = 0.0
        self._began = 0.0

    def begin(self, now: float) -> Mapping[Lane, Place]:
        """Return where a claim should begin; lanes that are not named, at their beginning."""
        self._began = now
        return {} if now >= self._look_at else dict(self._reached)

    def ended(self, began_at: Mapping[Lane, Place], leases: Iterable[Lease], *, full: bool, now: float) -> None:
        """Take notice of a claim.

        Args:
            began_at: What `begin()` returned.
            leases: What was claimed, in order.
            full: Whether it was as much as was asked for: else the backlog has an end, and the next claim begins at
                the beginning.
            now: Seconds of the monotonic clock.
        """
        claimed = list(leases)
        if not full or any(lease.keyed for lease in claimed):  # the next of a key is due where the one before it was
            self._reached.clear()
            return
        if not began_at:
            self._look_at = now + max(FROM_THE_BEGINNING_SECONDS, (now - self._began) / PART_OF_THE_TIME)
        last = {lease.lane: lease for lease in claimed}
        self._reached.update((lane, lease.place) for lane, lease in last.items())
