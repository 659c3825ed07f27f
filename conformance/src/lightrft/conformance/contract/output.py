"""LOG: what print and the logger write."""

from collections.abc import Sequence

from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Program, Target


@CONTRACT.add
class RankZeroOutput(Clause):
    """print and the logger write on rank 0 only."""

    id = "LOG-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [Program(operations=({"do": "print_and_log", "text": "hello there"},))]

    @override
    def check(self, execution: Execution) -> None:
        for rank, seen in enumerate(execution.last("print_and_log")):
            for how, text in seen.items():
                has_text = "hello there" in text
                self.require(
                    has_text == (rank == 0), f"rank {rank}: expected output on rank 0 only, got {text!r} {how}"
                )
