"""`pgebus worker`: runs an EventSystem, alone or in several processes that are watched over."""
