"""Operations on checkpoints, and the base class of their clauses."""

from typing import Any

from lightrft.conformance.clause import (
    Clause,
    Execution,
    Operation,
    Program,
    Record,
    Target,
    is_error,
    show,
)
from lightrft.conformance.contract.program_parts import program

EMPTY_DISK: Operation = {"do": "empty_disk"}
REMOVE_DISK: Operation = {"do": "empty_disk", "keep": False}
RESTART: Operation = {"do": "restart"}
FINGERPRINT: Operation = {"do": "fingerprint"}


def saved(tag: str | None = "t", **more: object) -> Operation:
    """save_ckpt of model a."""
    return {"do": "save", "model": "a", "tag": tag, **more}


def loaded(tag: str | None = "t", **more: object) -> Operation:
    """load_ckpt of model a."""
    return {"do": "load", "model": "a", "tag": tag, **more}


class OnDisk(Clause):
    """A clause whose programs start and end with an empty disk."""

    def program(self, target: Target, *operations: Operation, accumulation_steps: int = 1, **settings: Any) -> Program:
        """A program of ``operations``, with updates of ``accumulation_steps`` micro-batches."""
        return program(target, EMPTY_DISK, *operations, REMOVE_DISK, accumulation_steps=accumulation_steps, **settings)

    def errors(self, execution: Execution, index: int) -> list[Record]:
        """The errors of all ranks in an operation that must fail on every rank."""
        seen = [execution.at(rank, index) for rank in range(execution.target.world)]
        for rank, observed in enumerate(seen):
            self.require(is_error(observed), f"rank {rank}, operation {index}: expected an error, got {show(observed)}")
        return seen
