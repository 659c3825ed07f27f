"""How a prepared model saves itself."""

from collections.abc import Sequence

from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error
from lightrft.conformance.contract.program_parts import program, trained, updates


@CONTRACT.add
class SavePretrained(Clause):
    """save_pretrained of a prepared model, or of a part of it, writes the weights that save_model writes, or raises an
    error that names save_model."""

    id = "PREP-17"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        inference: list[Operation] = [
            {"do": "build", "model": "r", "kind": "llama", "seed": 2},
            {"do": "prepare_inference", "model": "r"},
        ]
        saves: list[Operation] = [
            {"do": "save_pretrained", "model": model, "part": part, "may_fail": True}
            for model, part in (("a", ""), ("a", "model"), ("r", ""))
        ]
        discard: Operation = {"do": "discard_exports"}
        return [
            program(target, discard, *trained(kind="llama", lr=0.05), *inference, *updates(1), *saves, discard),
        ]

    @override
    def check(self, execution: Execution) -> None:
        for index, operation, seen in execution.each("save_pretrained"):
            where = f"save_pretrained (operation {index}) of {operation['part'] or 'the whole'} of model {operation['model']}"
            for rank, differing in enumerate(seen):
                if is_error(differing):
                    self.require_error(differing, "LightRFTError", "save_model", where=f"rank {rank}, {where}")
                else:
                    self.require(
                        not differing, f"rank {rank}, {where}: other tensors than save_model writes: {differing[:3]}"
                    )
