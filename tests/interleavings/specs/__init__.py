"""The races, one function each, by what is fought over; importing the package registers all of them."""

from __future__ import annotations

from tests.interleavings.races import RACES, Race, race_named
from tests.interleavings.specs import forgetting, groups, keys, leases, publishing, removal, verbs

__all__ = ["RACES", "Race", "forgetting", "groups", "keys", "leases", "publishing", "race_named", "removal", "verbs"]
