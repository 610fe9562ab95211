"""What is wrong with a live system, and what to do about it: in plain words, without changing anything.

It asks with statements that read a bounded number of rows, each in a short transaction of its own, so that it neither
holds back VACUUM nor waits for a lock. What a role may not see is said, and is no error.
"""

from __future__ import annotations

from pgebus.doctor._examining import examine
from pgebus.doctor._findings import Finding, Limits, Report, Severity

__all__ = ["Finding", "Limits", "Report", "Severity", "examine"]
