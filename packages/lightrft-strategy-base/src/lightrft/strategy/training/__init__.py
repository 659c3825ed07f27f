"""Models in training: preparing them, their updates, their data."""
