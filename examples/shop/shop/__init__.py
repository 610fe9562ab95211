"""A shop that takes orders over HTTP and reserves stock in a worker, with pgebus in between."""
