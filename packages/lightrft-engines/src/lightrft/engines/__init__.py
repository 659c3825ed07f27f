"""Rollout engines, one adapter per module. Importing this package does not import them."""
