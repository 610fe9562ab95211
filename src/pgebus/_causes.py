"""What an event inherits from the one that caused it: which one that was, which one began it all, and the trace.

Pure. Headers come from anywhere: what is not what it should be is not handed on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

MAX_CORRELATION_ID_CHARS: Final = 255
# What everybody has to hand on, at least.
MAX_TRACESTATE_CHARS: Final = 512

_TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def caused_by(event_id: int, headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers of what is published while event *event_id*, with *headers*, is handled.

    The trace goes on by the names of W3C Trace Context, Level 1: `tracestate` only together with the `traceparent` that
    it belongs to.
    """
    correlation_id = headers.get("correlation_id")
    if not isinstance(correlation_id, str) or not 1 <= len(correlation_id) <= MAX_CORRELATION_ID_CHARS:
        correlation_id = str(event_id)
    handed_on = {"correlation_id": correlation_id, "causation_id": str(event_id)}
    traceparent, tracestate = headers.get("traceparent"), headers.get("tracestate")
    if isinstance(traceparent, str) and _TRACEPARENT.fullmatch(traceparent):
        handed_on["traceparent"] = traceparent
        if isinstance(tracestate, str) and 1 <= len(tracestate) <= MAX_TRACESTATE_CHARS:
            handed_on["tracestate"] = tracestate
    return handed_on


def inherit(inherited: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return *own* headers, with what they do not say themselves from the *inherited* ones.

    A `traceparent` of its own is another span, perhaps of another trace: an inherited `tracestate` is not for it.
    """
    merged = {**inherited, **own}
    if "traceparent" in own and "tracestate" not in own:
        merged.pop("tracestate", None)
    return merged
