"""SYNC: the full parameters that a strategy yields."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Program, Settings, Target
from lightrft.conformance.contract.program_parts import BF16, FP32, KINDS, SEEDS, program, trained


@CONTRACT.add
class Streams(Clause):
    """full_parameters yields the full parameters on every rank, under their checkpoint names, tied parameters once. A
    bucket holds at most the requested number of bytes, or one larger tensor."""

    id = "SYNC-7"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        programs = [
            self._program(target, kind, size)
            for kind, size in [("regressor", 200), ("language", 1), ("language", 1 << 20)]
        ]
        wider = [(FP32, "float64"), (FP32, "bfloat16"), (BF16, "float32")]
        return [
            *programs,
            *(self._program(target, "regressor", 200, precision=each, dtype=name) for each, name in wider),
        ]

    def _program(
        self, target: Target, kind: str, size: int, seed: int = 9, precision: Settings = FP32, **more: object
    ) -> Program:
        return program(
            target,
            *trained(kind=kind, seed=seed),
            {"do": "stream", "model": "a", "bucket_bytes": size, **more},
            {"do": "forward", "model": "a", "batch": 1},
            {"do": "stream", "model": "a", "bucket_bytes": size, **more},
            precision=precision,
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda kind, size, seed: self._program(target, kind, size, seed), KINDS, st.integers(1, 2000), SEEDS
        )

    @override
    def check(self, execution: Execution) -> None:
        first = execution.program.operations[0]
        model = models.build(first["kind"], first["seed"])
        tied = {"head.weight"} if first["kind"] == "language" else set()
        expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        for index, operation, seen in execution.each("stream"):
            for rank, stream in enumerate(seen):
                where = f"rank {rank}, stream (operation {index})"
                self.require(
                    sorted(stream["names"]) == sorted(expected),
                    f"{where}: expected the names {sorted(expected)}, got {sorted(stream['names'])}",
                )
                dtype = getattr(torch, operation.get("dtype", "float32"))
                for name, tensor in expected.items():
                    wanted = tensor.to(dtype).float()
                    self.require_same(wanted, stream["values"][name], f"{where}: {name} differs from the built model")
                for sizes in stream["sizes"]:
                    self.require(
                        len(sizes) == 1 or sum(sizes) <= operation["bucket_bytes"],
                        f"{where}: expected at most {operation['bucket_bytes']} bytes per bucket, got {sum(sizes)} in {len(sizes)} tensors",
                    )
