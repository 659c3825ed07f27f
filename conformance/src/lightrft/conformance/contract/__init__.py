"""The clauses, a module for each concern. Importing this package registers them."""

from lightrft.conformance.clause import CONTRACT
from lightrft.conformance.contract import (  # noqa: F401 - they register clauses
    collectives,
    data,
    life,
    offloading,
    preparing,
    rollouts,
    updates,
)

__all__ = ["CONTRACT"]
