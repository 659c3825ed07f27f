"""The clauses, a module for each concern. Importing this package registers them."""

from lightrft.conformance.clause import CONTRACT
from lightrft.conformance.contract import (  # noqa: F401 - they register clauses, in this order
    anything,
    checkpoints,
    collectives,
    data,
    engine_life,
    exporting,
    generation,
    life,
    media,
    misuse,
    offloading,
    optimizers,
    parity,
    preparing,
    skips,
    surroundings,
    syncing,
    updates,
)

__all__ = ["CONTRACT"]
