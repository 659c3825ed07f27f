"""Log lines and memory reports."""
