"""A group of processes, started once."""

from workers import two

__all__ = ["two"]
