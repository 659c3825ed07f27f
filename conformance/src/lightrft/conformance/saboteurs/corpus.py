"""All saboteurs and controls."""

from collections.abc import Iterator

from lightrft.conformance.saboteurs import (  # noqa: F401 - they register themselves
    buffers,
    checkpoints,
    collectives,
    controls,
    data,
    denominators,
    direct_calls,
    edge_cases,
    edge_cases_of_state,
    engines,
    exporting,
    invalid_usage,
    lifecycle,
    log_probs,
    media,
    micro_batches,
    narrow,
    offloading,
    optimizers,
    preparing,
    rare_calls,
    rollouts,
    sequence_parallel,
    skips,
    tracking,
    updates,
)
from lightrft.conformance.saboteurs.catalogue import Saboteur, registered


def corpus() -> list[Saboteur]:
    """Return all saboteurs and controls."""
    return list(registered.values())


def saboteurs() -> Iterator[Saboteur]:
    """Yield those with a defect."""
    return (saboteur for saboteur in corpus() if saboteur.clause)
