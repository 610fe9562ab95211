"""The running machine behind `EventSystem`. Nothing in here is public."""
