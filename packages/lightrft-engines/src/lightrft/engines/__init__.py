"""Rollout engines, one adapter a module. Importing this package imports none of them."""
