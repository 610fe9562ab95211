"""`pgebus demo`: a small shop on a PostgreSQL server of its own, and six things that happen to it.

To read as an example, begin with `shop.py` (tables, handlers) and `worker.py` (a worker process); `story.py`
publishes. Only the public API is used.
"""
