"""Planted bugs: each is put into a copy of the source, and the suite has to go red.

`python -m tests.planted --help` says how to run them; docs/reliability.md has the table of what catches which.
"""
