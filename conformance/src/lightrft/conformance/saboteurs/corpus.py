"""All saboteurs and controls."""

from collections.abc import Iterator

from lightrft.conformance.saboteurs import (  # noqa: F401 - they register themselves
    buffers,
    checkpoint_store,
    checkpoints,
    collectives,
    controls,
    data,
    denominators,
    direct_calls,
    engines,
    exporting,
    invalid_usage,
    lifecycle,
    log_probs,
    media,
    micro_batches,
    moving_averages,
    offloading,
    optimizers,
    prepared_models,
    preparing,
    process_state,
    resuming,
    rollouts,
    sampling,
    sequence_parallel,
    skips,
    tracking,
    updates,
    weight_sync,
)
from lightrft.conformance.saboteurs.catalogue import Saboteur, registered


def corpus() -> list[Saboteur]:
    """Return all saboteurs and controls."""
    return list(registered.values())


def saboteurs() -> Iterator[Saboteur]:
    """Yield those with a defect."""
    return (saboteur for saboteur in corpus() if saboteur.clause)
