"""The suite on every PostgreSQL and on the oldest and the newest libraries that we promise: `make test-matrix`.

`python -m tests.matrix --help` says how to run some of it. docs/testing.md says what is needed.
"""
