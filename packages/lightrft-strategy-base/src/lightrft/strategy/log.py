"""Speaking once: what a run of many ranks prints and logs comes from rank 0."""

import logging
from datetime import datetime

logger = logging.getLogger("lightrft")


class RankFilter(logging.Filter):
    """Lets records pass on rank 0 and drops them on the others."""

    rank = 0

    def filter(self, record: logging.LogRecord) -> bool:
        return self.rank == 0


_filter = RankFilter()
logger.addFilter(_filter)


def speak_as(rank: int) -> None:
    """From now on this process is ``rank``: `logger` and `say` are silent on all but 0."""
    _filter.rank = rank


def say(*message: object) -> None:
    """Print with the time, on rank 0 only."""
    if _filter.rank == 0:
        print(f"[{datetime.now():%m-%d %H:%M:%S}]", *message, flush=True)
