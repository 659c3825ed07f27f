"""The clauses, one module per concern. Importing this package registers them."""

from lightrft.conformance.clause import CONTRACT
from lightrft.conformance.contract import (  # noqa: F401 - each module registers its clauses
    buffers,
    checkpoints,
    collectives,
    data,
    denominators,
    direct_calls,
    engine_lifecycle,
    exporting,
    generation,
    interleavings,
    invalid_usage,
    lifecycle,
    log_probs,
    media,
    micro_batches,
    offloading,
    optimizers,
    output,
    parity,
    preparing,
    process_state,
    sequence_parallel,
    skips,
    syncing,
    tracking,
    updates,
    weight_stream,
)

__all__ = ["CONTRACT"]
