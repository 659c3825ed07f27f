"""ALL: everything at once, in any order."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, show
from lightrft.conformance.contract.drawing import FP32, geometry, micro_batch, trained
from lightrft.conformance.contract.near import astray
from lightrft.conformance.contract.rollouts import generate

MOVES = [
    "update", "update", "bad update", "half update", "offload", "reload", "offload model", "sync", "generate", "sleep",
    "wake", "average", "rate", "forward", "reduce", "look",
]  # fmt: skip
Turn = tuple[str, str, int]


@CONTRACT.add
class AnyOrder(Clause):
    """Training, skipping, averaging, offloading, syncing, generating, sleeping and waking may come in any order, with two
    models, and each does what it does alone."""

    id = "ALL-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        turns = [(move, "ab"[number % 2], number) for number, move in enumerate(MOVES * 2)]
        return [self._program(place, turns, False), self._program(place, list(reversed(turns)), True)]

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        turn = st.tuples(st.sampled_from(MOVES), st.sampled_from("ab"), st.integers(0, 50))
        return st.builds(
            lambda turns, sleeping: self._program(place, turns, sleeping), st.lists(turn, max_size=14), st.booleans()
        )

    def _program(self, place: Place, turns: Sequence[Turn], sleeping: bool) -> Program:
        operations = [*trained("a", place.language_model, 1, lr=0.01), *trained("b", place.language_model, 2, lr=0.003)]
        average: list[Operation] = [
            {"do": "build", "model": "ema", "kind": place.language_model, "seed": 1},
            {"do": "prepare_inference", "model": "ema"},
        ]
        operations += [*average, {"do": "engine", "kind": place.engine, "actor": "a"}]
        for turn in turns:
            operations += self._operations(*turn)
        looks: list[Operation] = [{"do": "weights", "model": model} for model in ("a", "b", "ema")]
        settings = {
            **FP32, "max_norm": 1.0, "enable_engine_sleep": sleeping, "adam_offload": True, "max_skipped_updates": 0,
            **geometry(place, 2),
        }  # fmt: skip
        return Program(operations=(*operations, {"do": "status"}, *looks), settings=settings, seconds=90)

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
    def check(self, trial: Trial) -> None:
        for index, operation in enumerate(trial.program.operations):
            seen = [trial.at(rank, index) for rank in range(trial.place.world)]
            where = f"{operation['do']} (operation {index})"
            predicted = trial.predicted()[index]
            if operation["do"] == "step":
                for key in ("applied", "skipped"):
                    found = [it[key] for it in seen]
                    self.require(
                        found == [predicted[key]] * len(seen), f"{where}: {key} is {found}, wanted {predicted[key]}"
                    )
            elif operation["do"] in ("status", "sleep", "wake", "sync"):
                self.require(seen == [predicted] * len(seen), f"{where}: {show(seen)}, wanted {predicted!r}")
            elif operation["do"] == "generate":
                self._check_completions(operation, seen, predicted, where)
            elif operation["do"] == "weights":
                fault = astray(trial, index, seen[0], 1e-5)
                self.require(fault is None, f"{operation['model']}: {fault}")

    def _check_completions(self, operation: Operation, seen: Sequence[Any], model: nn.Module, where: str) -> None:
        """The tokens must be the likeliest under the weights of the last sync, or as likely within rounding."""
        for rank, completions in enumerate(seen):
            own = operation["prompts"][rank % len(operation["prompts"])]
            self.require([it["prompt"] for it in completions] == own, f"rank {rank}: {where} completed other prompts")
            for it in completions:
                tokens = torch.tensor([[*it["prompt"], *it["tokens"]]])
                with torch.no_grad():
                    scores = models.logits_of(model, tokens)[0].float().log_softmax(dim=-1)[len(it["prompt"]) - 1 : -1]
                chosen = scores.gather(1, tokens[0, len(it["prompt"]) :, None]).squeeze(1)
                short = (scores.max(dim=1).values - chosen).max().item()
                self.require(short <= 1e-3, f"rank {rank}: {where}: {it['tokens']} is not what the synced weights say")
                apart = (chosen.double() - it["logprobs"]).abs().max().item()
                self.require(apart <= 1e-3, f"rank {rank}: {where}: log-probabilities differ by {apart:.3g}")


def _closed(operations: list[Operation]) -> list[Operation]:
    """A micro-batch that ends its window."""
    return [*operations[:-1], {**operations[-1], "boundary": True}]
