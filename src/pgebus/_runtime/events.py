"""Makes the `Event` of a claimed row, without asking the database again.

Only for rows that a claim has just returned: nothing is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import class_mapper, make_transient_to_detached
from sqlalchemy.orm.attributes import set_committed_value

from pgebus.models import Event


def event_from_row(row: Mapping[str, Any]) -> Event:
    """Return a detached, unmodified event with the columns of *row*, as a query would have loaded it."""
    mapper = class_mapper(Event)
    made: Event = mapper.class_manager.new_instance()  # no __init__: that would be a new event
    for attribute in mapper.column_attrs:
        set_committed_value(made, attribute.key, row[attribute.columns[0].name])
    make_transient_to_detached(made)
    return made
