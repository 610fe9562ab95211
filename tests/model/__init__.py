"""A model-based test of deliveries: random steps on a real PostgreSQL, compared with a dict after each of them."""
