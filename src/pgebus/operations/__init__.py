"""What a person does to events, deliveries, groups and keys: functions that take a session, and commit nothing.

So each commits together with whatever else the caller does: a redrive with the correction of the data that made it
necessary. They are safe while workers run, and may be done again. None runs a handler.
"""

from pgebus.operations.backlog import GroupStatus, status
from pgebus.operations.cancelling import cancel
from pgebus.operations.deliveries import DeliveryState, EventState, count_deliveries, list_deliveries, show_event
from pgebus.operations.groups import (
    GroupState,
    limit_group,
    list_groups,
    pause_group,
    remove_group,
    remove_pattern,
    resume_group,
)
from pgebus.operations.keys import BlockedKey, blocked_keys, release_key
from pgebus.operations.pruning import prune
from pgebus.operations.purging import Purged, purge_payload
from pgebus.operations.redriving import redrive, replay
from pgebus.operations.selection import Changed, EventFilters, Filters
from pgebus.operations.tracing import Trace, TracedDelivery, TracedEvent, trace

__all__ = [
    "BlockedKey",
    "Changed",
    "DeliveryState",
    "EventFilters",
    "EventState",
    "Filters",
    "GroupState",
    "GroupStatus",
    "Purged",
    "Trace",
    "TracedDelivery",
    "TracedEvent",
    "blocked_keys",
    "cancel",
    "count_deliveries",
    "limit_group",
    "list_deliveries",
    "list_groups",
    "pause_group",
    "prune",
    "purge_payload",
    "redrive",
    "release_key",
    "remove_group",
    "remove_pattern",
    "replay",
    "resume_group",
    "show_event",
    "status",
    "trace",
]
