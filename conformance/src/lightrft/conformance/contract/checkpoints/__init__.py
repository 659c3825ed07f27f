"""CKPT: checkpoints."""

from lightrft.conformance.contract.checkpoints import (  # noqa: F401 - each module registers its clauses
    faults,
    loading,
    resuming,
    saving,
    store,
)
