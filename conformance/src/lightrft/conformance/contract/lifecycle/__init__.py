"""LIFE: creating and closing a strategy, lost ranks, signals."""

from lightrft.conformance.contract.lifecycle import (  # noqa: F401 - each module registers its clauses
    closing,
    interruptions,
    starting,
)
