"""Log lines, memory reports, and metrics with their trackers."""
