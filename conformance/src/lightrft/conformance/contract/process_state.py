"""LIFE: process-wide state."""

from collections.abc import Sequence

from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target
from lightrft.conformance.contract.program_parts import micro_batch, program, trained, updates

READ_PROCESS_STATE: Operation = {"do": "process_state"}


@CONTRACT.add
class ProcessState(Clause):
    """A strategy does not change process-wide state, not even at creation: torch's default dtype and device, autograd
    mode and number of threads, the working directory, and signal handlers. Training, skipping, averaging, offloading
    and collectives do not advance the random number generators."""

    id = "LIFE-9"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        average: list[Operation] = [
            {"do": "build", "model": "ema", "seed": 1},
            {"do": "prepare_inference", "model": "ema"},
        ]
        away: list[Operation] = [{"do": do, "model": "a"} for do in ("offload_model", "reload_model", "weights")]
        return [
            program(
                target, READ_PROCESS_STATE, {"do": "world"}, READ_PROCESS_STATE, *trained(schedule=True), *average, *updates(2, scheduled=True),
                *micro_batch(7, poison="nan"), {"do": "average", "model": "a", "into": "ema", "beta": 0.5}, *away,
                {"do": "all_reduce", "data": 1.0}, {"do": "all_gather", "data": 1.0}, READ_PROCESS_STATE, {"do": "close"}, READ_PROCESS_STATE,
                bf16=bf16,
            )
            for bf16 in (False, True)
        ]  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        initial, before, used, closed = [seen for _, _, seen in execution.each("process_state")]
        for rank in range(execution.target.world):
            for name, was in initial[rank].items():
                now = before[rank][name]  # creating a strategy seeds the generators
                holds = now == was or name.endswith("generator")
                self.require(holds, f"rank {rank}: in the constructor, {name} is {now}, expected {was}")
            for after, when in ((used, "training"), (closed, "close")):
                for name, was in before[rank].items():
                    now = after[rank][name]
                    what = "advanced" if name.endswith("generator") else f"is {now}, expected {was}"
                    self.require(now == was, f"rank {rank}: after {when}, {name} {what}")
