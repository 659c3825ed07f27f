"""What the clauses about peak memory share."""

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from lightrft.conformance.clause import Clause, Execution, Operation, Program, Target
from lightrft.conformance.contract.program_parts import program, trained

BUCKET = 16 << 20
"""Bytes of a bucket, and of each of the eight tensors of the model."""
SLACK = 12 << 20
"""Bytes that an allocator, a process group and Python may keep for themselves."""


class BoundedMemory(Clause):
    """A clause about the peak memory of one operation on a model."""

    measured: ClassVar[str]
    """The operation, which returns the bytes that it added at its peak."""
    before: ClassVar[Sequence[Operation]] = ()
    after: ClassVar[Sequence[Operation]] = ()

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        measure: Operation = {"do": self.measured, "model": "a"}
        return [
            program(
                target,
                *trained(kind="deep"),
                *self.before,
                measure,
                *self.after,
                weight_sync_bucket_bytes=BUCKET,
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        bound = 2 * BUCKET + SLACK
        for rank, added in enumerate(execution.last(self.measured)):
            self.require(
                added <= bound,
                f"rank {rank}: {self.measured} added {added / 2**20:.0f} MiB, expected at most {bound / 2**20:.0f} MiB "
                f"(bucket: {BUCKET >> 20} MiB, model: {8 * BUCKET >> 20} MiB)",
            )
