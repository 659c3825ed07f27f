"""Parts of programs, fixed or drawn by Hypothesis."""

from typing import Any

from hypothesis import strategies as st

from lightrft.conformance.clause import Operation, Program, Settings, Target

FP32: Settings = {"bf16": False, "max_norm": None}
BF16: Settings = {"bf16": True, "max_norm": None}
SUM: Operation = {"do": "all_reduce", "data": {"per_rank": [1.0, 1.0]}, "op": "sum"}
"""A collective that all ranks must reach."""


def geometry(target: Target, accumulation_steps: int = 1, rows: int = 2) -> dict[str, int]:
    """Batch sizes for updates of ``accumulation_steps`` micro-batches with ``rows`` rows each."""
    return {"micro_train_batch_size": rows, "train_batch_size": rows * accumulation_steps * target.world}


def program(
    target: Target, *operations: Operation, precision: Settings = FP32, accumulation_steps: int = 1, seconds: float = 30.0,
    **settings: object,
) -> Program:  # fmt: skip
    """A program of ``operations``, with batch sizes for updates of ``accumulation_steps`` micro-batches."""
    return Program(
        operations=operations,
        settings={**precision, **geometry(target, accumulation_steps), **settings},
        seconds=seconds,
    )


def trained(
    model: str = "a", kind: str = "regressor", seed: int = 1, *, lr: float = 1e-3, weight_decay: float = 0.01,
    schedule: bool = False, wrap_first: bool = False, **more: object,
) -> list[Operation]:  # fmt: skip
    """Build and prepare a model for training, in one of the two orders that work everywhere."""
    build: Operation = {"do": "build", "model": model, "kind": kind, "seed": seed, **more}
    optimizer: Operation = {"do": "optimizer", "model": model, "lr": lr, "weight_decay": weight_decay}
    scheduling: list[Operation] = [{"do": "schedule", "model": model}] if schedule else []
    if wrap_first:
        return [build, {"do": "prepare_model", "model": model}, optimizer, *scheduling]
    return [build, optimizer, *scheduling, {"do": "prepare", "model": model}]


def micro_batch(
    batch: int, model: str = "a", *, backwards: int = 1, scheduled: bool = False, **more: object
) -> list[Operation]:
    """The backwards and the step of one micro-batch."""
    losses: list[Operation] = [
        {"do": "backward", "model": model, "batch": batch + 1000 * index, "weight": 1.0 if index == 0 else 0.5, **more}
        for index in range(backwards)
    ]
    return [*losses, {"do": "step", "model": model, "scheduled": scheduled}]


def updates(count: int, accumulation_steps: int = 1, model: str = "a", first: int = 0, **more: Any) -> list[Operation]:
    """``count`` updates of ``accumulation_steps`` micro-batches each."""
    return [
        operation
        for index in range(count * accumulation_steps)
        for operation in micro_batch(first + index, model, **more)
    ]


SEEDS = st.integers(1, 10_000)
KINDS = st.sampled_from(["regressor", "language", "frozen", "unused", "checkpointed"])
TRAINED_KINDS = st.sampled_from(["regressor", "language", "frozen", "unused", "checkpointed", "running statistics"])
"""Kinds of models in training, with one whose buffers change in forward."""
RATES = st.sampled_from([1e-3, 3e-4, 1e-4])


@st.composite
def training(
    draw: st.DrawFn,
    target: Target,
    *,
    precision: Settings = FP32,
    max_updates: int = 4,
    accumulation: st.SearchStrategy[int] | None = None,
    max_norms: st.SearchStrategy[float | None] | None = None,
    kinds: st.SearchStrategy[str] = TRAINED_KINDS,
) -> Program:
    """Train a model of any kind for a few updates, and look at its weights at the end."""
    accumulation_steps = draw(st.integers(1, 3) if accumulation is None else accumulation)
    max_norm = precision["max_norm"] if max_norms is None else draw(max_norms)
    scheduled = draw(st.booleans())
    operations = trained(
        kind=draw(kinds),
        seed=draw(SEEDS),
        lr=draw(RATES),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        schedule=scheduled,
        wrap_first=draw(st.booleans()),
    )
    count = draw(st.integers(1, max_updates))
    operations += updates(
        count,
        accumulation_steps,
        first=draw(st.integers(0, 500)),
        backwards=draw(st.sampled_from([1, 1, 2])),
        scheduled=scheduled,
    )
    return program(
        target,
        *operations,
        {"do": "weights", "model": "a"},
        precision=precision,
        accumulation_steps=accumulation_steps,
        max_norm=max_norm,
    )
