"""Durable files, their checksums, locks, and values as safe JSON."""
