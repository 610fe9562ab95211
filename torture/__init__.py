"""`python -m torture`: publishers and workers on a PostgreSQL of their own, and a nemesis; then the books are checked.

A program of the repository, no part of the package.
"""
