"""Printing and logging on rank 0 only."""

import logging
from datetime import datetime

logger = logging.getLogger("lightrft")


class RankFilter(logging.Filter):
    """Passes records on rank 0 and drops them on other ranks."""

    rank = 0

    def filter(self, record: logging.LogRecord) -> bool:
        return self.rank == 0


_filter = RankFilter()
logger.addFilter(_filter)


def set_rank(rank: int) -> None:
    """Set the rank of this process: `logger` and `print_on_rank_0` are silent on every rank but 0."""
    _filter.rank = rank


def is_silent() -> bool:
    """Return whether this process is a rank other than 0."""
    return _filter.rank != 0


def print_on_rank_0(*message: object) -> None:
    """Print with the time, on rank 0 only."""
    if not is_silent():
        print(f"[{datetime.now():%m-%d %H:%M:%S}]", *message, flush=True)
