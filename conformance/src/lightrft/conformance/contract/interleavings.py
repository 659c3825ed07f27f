"""ALL: all operations in any order."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, show
from lightrft.conformance.contract.program_parts import micro_batch, program, trained
from lightrft.conformance.contract.reference_checks import assert_flags, first_mismatch
from lightrft.conformance.contract.rollout_checks import generate, sleeps

MOVES = [
    "update", "update", "bad update", "half update", "offload", "reload", "offload model", "sync", "generate", "sleep",
    "wake", "average", "rate", "forward", "reduce", "look",
]  # fmt: skip
Turn = tuple[str, str, int]


@CONTRACT.add
class AnyOrder(Clause):
    """Two models can train, skip updates, average, offload, sync, generate, sleep and wake in any order. Each operation
    has the same effect as on its own."""

    id = "ALL-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        turns = [(move, "ab"[number % 2], number) for number, move in enumerate(MOVES * 2)]
        return [self._program(target, turns, False), self._program(target, list(reversed(turns)), sleeps(target))]

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        turn = st.tuples(st.sampled_from(MOVES), st.sampled_from("ab"), st.integers(0, 50))
        return st.builds(
            lambda turns, sleeping: self._program(target, turns, sleeping),
            st.lists(turn, max_size=14),
            st.booleans() if sleeps(target) else st.just(False),
        )

    def _program(self, target: Target, turns: Sequence[Turn], sleeping: bool) -> Program:
        operations = [
            *trained("a", target.language_model, 1, lr=0.01),
            *trained("b", target.language_model, 2, lr=0.003),
        ]
        average: list[Operation] = [
            {"do": "build", "model": "ema", "kind": target.language_model, "seed": 1},
            {"do": "prepare_inference", "model": "ema"},
        ]
        operations += [*average, {"do": "engine", "kind": target.engine, "actor": "a"}]
        for turn in turns:
            operations += self._operations(*turn)
        looks: list[Operation] = [{"do": "weights", "model": model} for model in ("a", "b", "ema")]
        return program(
            target, *operations, {"do": "status"}, *looks, accumulation_steps=2, seconds=90, max_norm=1.0,
            enable_engine_sleep=sleeping, adam_offload=True, max_skipped_updates=0,
        )  # fmt: skip

    def _operations(self, move: str, model: str, batch: int) -> list[Operation]:
        moves: dict[str, list[Operation]] = {
            "update": [*micro_batch(batch, model), *_closed(micro_batch(batch + 1, model))],
            "bad update": _closed(micro_batch(batch, model, poison="nan")),
            "half update": [*micro_batch(batch, model)[:1], {"do": "step", "model": model, "boundary": False}],
            "offload": [{"do": "offload_optimizer", "model": model}],
            "reload": [{"do": "load_optimizer", "model": model}],
            "offload model": [{"do": "offload_model", "model": model}, {"do": "reload_model", "model": model}],
            "sync": [{"do": "sync", "model": model}],
            "generate": [generate()],
            "sleep": [{"do": "sleep"}],
            "wake": [{"do": "wake"}],
            "average": [{"do": "average", "model": "a", "into": "ema", "beta": 0.9}],
            "rate": [{"do": "set_rate", "model": model, "lr": 0.001 * (1 + batch % 5)}],
            "forward": [{"do": "forward", "model": model, "batch": batch}],
            "reduce": [{"do": "all_reduce", "data": {"per_rank": [float(batch), 1.0]}, "op": "mean"}],
            "look": [{"do": "status"}],
        }
        return moves[move]

    @override
    def check(self, execution: Execution) -> None:
        assert_flags(self, execution, "applied", "skipped")
        for index, operation in enumerate(execution.program.operations):
            seen = [execution.at(rank, index) for rank in range(execution.target.world)]
            where = f"{operation['do']} (operation {index})"
            predicted = execution.predicted()[index]
            if operation["do"] in ("status", "sleep", "wake", "sync"):
                self.require(
                    seen == [predicted] * len(seen), f"{where}: expected {predicted!r} on every rank, got {show(seen)}"
                )
            elif operation["do"] == "generate":
                self._check_completions(operation, seen, predicted, where)
            elif operation["do"] == "weights":
                mismatch = first_mismatch(execution, index, seen[0], 1e-5)
                self.require(mismatch is None, f"model {operation['model']}: {mismatch}")

    def _check_completions(self, operation: Operation, seen: Sequence[Any], model: nn.Module, where: str) -> None:
        """Require the tokens to be the most likely ones with the last synced weights, within rounding."""
        for rank, completions in enumerate(seen):
            prompts = operation["prompts"][rank % len(operation["prompts"])]
            self.require(
                [completion["prompt"] for completion in completions] == prompts,
                f"rank {rank}: {where} completed the prompts of another rank",
            )
            for completion in completions:
                tokens = torch.tensor([[*completion["prompt"], *completion["tokens"]]])
                with torch.no_grad():
                    scores = (
                        models.logits_of(model, tokens)[0]
                        .float()
                        .log_softmax(dim=-1)[len(completion["prompt"]) - 1 : -1]
                    )
                chosen = scores.gather(1, tokens[0, len(completion["prompt"]) :, None]).squeeze(1)
                shortfall = (scores.max(dim=1).values - chosen).max().item()
                self.require(
                    shortfall <= 1e-3,
                    f"rank {rank}: {where}: {completion['tokens']} are not the most likely tokens with the synced weights",
                )
                apart = (chosen.double() - completion["logprobs"]).abs().max().item()
                self.require(
                    apart <= 1e-3,
                    f"rank {rank}: {where}: log-probabilities differ by {apart:.3g}, expected at most 1e-3",
                )


def _closed(operations: list[Operation]) -> list[Operation]:
    """A micro-batch that ends an update."""
    return [*operations[:-1], {**operations[-1], "boundary": True}]
