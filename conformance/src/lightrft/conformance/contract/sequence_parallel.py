"""SP: ranks that share the sequences of a batch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

from lightrft.conformance import sequences
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, same
from lightrft.conformance.contract import tolerances
from lightrft.conformance.contract.data import interleaved
from lightrft.conformance.contract.denominators import assert_denominators
from lightrft.conformance.contract.program_parts import FP32, trained
from lightrft.conformance.contract.reference_checks import (
    READ_WEIGHTS,
    assert_close,
    assert_norms,
    assert_values,
    close,
)

REFUSED = {
    "regressor": ("transformers",),
    "one head": ("at least 2 attention heads", "got 1"),
    "capped": ("soft",),
    "recurrent": ("attention",),
    "pooled": ("every token",),
}
"""Kinds of models that cannot share their attention, and words of the error."""


def _sizes(target: Target) -> list[int]:
    """The numbers of ranks that share a sequence, to test on this many ranks."""
    return [size for size in range(2, target.world + 1) if target.world % size == 0]


def _program(
    target: Target, size: int, *operations: Operation, accumulation_steps: int = 1, **settings: object
) -> Program:
    """A program in which ``size`` ranks share a sequence, with micro-batches of two rows."""
    batch_size = 2 * accumulation_steps * target.world // size
    geometry = {"micro_train_batch_size": 2, "train_batch_size": batch_size, "sp_size": size}
    return Program(operations=operations, settings={**FP32, **geometry, **settings}, seconds=60.0)


def _updates(forms: Sequence[str], accumulation_steps: int = 1, first: int = 0, **more: object) -> list[Operation]:
    """One update for each form of batches, each batch one token longer than the last."""
    operations: list[Operation] = []
    for number, form in enumerate(forms):
        for micro_batch in range(accumulation_steps):
            batch, length = first + 10 * number + micro_batch, 11 + number + micro_batch
            operations.append(
                {"do": "sequence_backward", "model": "a", "batch": batch, "form": form, "length": length, **more}
            )
            operations.append({"do": "step", "model": "a"})
    return operations


@CONTRACT.add
class SharedSequences(Clause):
    """With sp_size > 1, losses, gradient norms and weights over many updates equal those of whole sequences on
    data-parallel ranks: for padded and packed batches, with gradient checkpointing, with fewer key-value heads than
    ranks, with numbers of heads that sp_size does not divide, and with sliding windows."""

    id = "SP-1"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        kinds: list[tuple[str, Sequence[str], int, float | None]] = [
            ("grouped", sequences.FORMS, 1, None),
            ("nine heads", sequences.FORMS, 1, None),
            ("recomputed", ("cut", "left"), 1, 0.5),
            ("windowed", ("packed", "right"), 2, None),
        ]
        return [
            _program(
                target, size, *trained(kind=kind, seed=5), *_updates(forms, steps), READ_WEIGHTS, accumulation_steps=steps,
                max_norm=max_norm,
            )
            for size in _sizes(target) for kind, forms, steps, max_norm in kinds
        ]  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        _assert_losses(self, execution)
        assert_norms(self, execution)
        assert_close(self, execution, bound=tolerances.OTHER_SUMMATION_ORDER)


def _assert_losses(clause: Clause, execution: Execution) -> None:
    """Require the losses and log-probabilities of the reference."""
    size = execution.program.settings["sp_size"]
    for index, operation, seen in execution.each("sequence_backward"):
        for rank, observed in enumerate(seen):
            expected = execution.predicted()[index][rank // size]
            where = f"rank {rank}, {operation['form']} (operation {index})"
            clause.require(
                close(observed["loss"], expected["loss"]),
                f"{where}: expected the loss {expected['loss']}, got {observed['loss']}",
            )
            mismatch = tolerances.absolute({"it": observed["log_probs"]}, {"it": expected["log_probs"]}, 1e-5)
            clause.require(mismatch is None, f"{where}, log-probabilities: {mismatch}")


@CONTRACT.add
class SharedData(Clause):
    """accumulated_gradient, data loaders and batch sizes count data-parallel ranks, the number of ranks divided by
    sp_size. Ranks that share sequences get the same samples, and over the data-parallel ranks every sample occurs
    once."""

    id = "SP-2"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        loader: Operation = {"do": "loader", "name": "l", "samples": 17, "batch_size": 2, "drop_last": False}
        look: Operation = {"do": "batches", "name": "l"}
        return [
            _program(target, size, {"do": "sequence_geometry"}, loader, look, accumulation_steps=3)
            for size in _sizes(target)
        ]

    @override
    def check(self, execution: Execution) -> None:
        world, size = execution.target.world, execution.program.settings["sp_size"]
        for rank, observed in enumerate(execution.last("sequence_geometry")):
            expected = {"accumulation_steps": 3, "size": size, "rank": rank % size}
            self.require_same(expected, observed, f"rank {rank}, the geometry of batches")
        seen = execution.last("batches")
        for rank, observed in enumerate(seen):
            first = rank - rank % size
            self.require_same(seen[first], observed, f"expected rank {rank} to get the samples of rank {first}")
        samples = interleaved(seen[::size])
        self.require(
            set(samples) == set(range(17)) and len(samples) == 17 + -17 % (world // size),
            f"expected {world // size} data-parallel ranks to see each of 17 samples once, got {sorted(samples)}",
        )


@CONTRACT.add
class PaddedSequences(Clause):
    """Sequences whose length is not a multiple of sp_size are padded, and the padding is removed from results.
    Positions, labels and other per-token values of any type come back complete and in order, even after a batch of
    another length with slices of the same length. The same holds for log-probabilities, including those of a model
    prepared for inference. A batch that was not split is computed as without sp_size."""

    id = "SP-3"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        build: list[Operation] = [
            {"do": "build", "model": "r", "kind": "grouped", "seed": 4}, {"do": "prepare_inference", "model": "r"},
        ]  # fmt: skip
        trips: list[Operation] = [
            {"do": "round_trip", "batch": length, "form": form, "length": length}
            for form, length in [("full", 1), ("left", 5), ("right", 6), ("packed", 7), ("cut", 8)]
        ]
        trips += [{**trip, "after_another": True} for trip in trips[1:4]]
        forwards: list[Operation] = [
            {"do": "sequence_forward", "model": "r", "batch": length, "form": form, "length": length, "split": split}
            for split in (True, False) for form, length in [("full", 1), ("left", 5), ("packed", 7), ("right", 12)]
        ]  # fmt: skip
        return [_program(target, size, *build, *trips, *forwards) for size in _sizes(target)]

    @override
    def check(self, execution: Execution) -> None:
        size = execution.program.settings["sp_size"]
        for index, operation, seen in execution.each("round_trip"):
            for rank, observed in enumerate(seen):
                where = f"rank {rank}, {operation['length']} tokens, {operation['form']} (operation {index})"
                self._check_trip(operation, observed, rank // size, where)
        assert_values(self, execution, "sequence_forward", sharing=size)

    def _check_trip(self, operation: Operation, observed: dict[str, Any], data_rank: int, where: str) -> None:
        batch = sequences.batch(operation["batch"], data_rank, operation["form"], operation["length"])
        mask_BS = batch.pop("attention_mask", torch.ones_like(batch["input_ids"]))
        for name, tensor in batch.items():
            self.require(
                same(observed[name], tensor),
                f"{where}: expected {name} {tensor.tolist()}, got {observed[name].tolist()}",
            )
        tokens_BS = batch["input_ids"]
        for name, expected in {"advantages": tokens_BS.double() / 7, "chosen": tokens_BS > 5}.items():
            self.require(same(observed[name], expected), f"{where}: {name} changed")
        features = observed["features"]
        self.require(
            same(features, torch.stack([tokens_BS.float() / 3, -tokens_BS.float()], dim=-1)),
            f"{where}: features changed",
        )
        mask = observed["mask"]
        self.require(
            mask[: operation["length"]] == (mask_BS[0] != 0).tolist() and not any(mask[operation["length"] :]),
            f"{where}: expected the mask {mask_BS[0].tolist()} with padding after it, got {mask}",
        )


@CONTRACT.add
class PortableSequences(Clause):
    """Checkpoints, exports and weight streams do not depend on sp_size: training resumed with another sp_size continues
    as if uninterrupted, and transformers opens an exported model."""

    id = "SP-4"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        size = target.world
        model = trained(kind="grouped", seed=8)
        first: list[Operation] = [
            {"do": "empty_disk"},
            *model,
            *_updates(("full", "packed")),
            {"do": "save", "model": "a"},
        ]
        discard: Operation = {"do": "discard_exports"}
        export: Operation = {"do": "export", "model": "a", "batch": 3}
        rest = _updates(("left", "full"), first=50, data_of=0)
        before = _program(target, size, *first, READ_WEIGHTS, discard, export, discard, *rest, READ_WEIGHTS)
        load: list[Operation] = [*model, {"do": "load", "model": "a"}, READ_WEIGHTS]
        after = _program(target, 1, *load, *rest, READ_WEIGHTS, {"do": "empty_disk", "keep": False})
        return [replace(before, afterwards=after)]

    @override
    def check(self, execution: Execution) -> None:
        assert execution.afterwards is not None
        saved, continued = (execution.last_of("weights", number) for number in (0, 1))
        loaded, others = (execution.afterwards.last_of("weights", number) for number in (0, 1))
        assert_close(self, execution, bound=tolerances.OTHER_SUMMATION_ORDER)
        for rank in range(execution.target.world):
            self.require_same(saved[rank], loaded[rank], f"rank {rank}, weights loaded with sp_size=1")
            mismatch = tolerances.absolute(others[rank], continued[rank], tolerances.OTHER_SUMMATION_ORDER)
            self.require(mismatch is None, f"rank {rank}, two updates after loading with sp_size=1: {mismatch}")
        for rank, observed in enumerate(execution.last("export")):
            mismatch = tolerances.absolute(
                {"logits": observed["logits"]}, {"logits": observed["expected_logits"]}, 1e-5
            )
            self.require(mismatch is None, f"rank {rank}, logits of the exported model: {mismatch}")


@CONTRACT.add
class RefusedSequences(Clause):
    """An sp_size that does not divide the number of ranks is refused. Preparing a model whose attention cannot be
    shared is refused too (fewer heads than ranks, unknown kinds of attention, outputs for whole sequences), with the
    numbers."""

    id = "SP-5"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        too_many = replace(_program(target, target.world, {"do": "sequence_geometry", "may_fail": True}))
        settings = {**too_many.settings, "sp_size": target.world + 1}
        models: list[Operation] = []
        for kind in REFUSED:
            models += [
                {"do": "build", "model": kind, "kind": kind, "seed": 2},
                {"do": "prepare_inference", "model": kind, "may_fail": True},
            ]
        programs = [replace(too_many, settings=settings)]
        return [*programs, *(_program(target, 2, *models) for _ in range(target.world % 2 == 0))]

    @override
    def check(self, execution: Execution) -> None:
        size = execution.program.settings["sp_size"]
        for _, _, seen in execution.each("sequence_geometry"):
            for rank, observed in enumerate(seen):
                words = (f"sp_size={size}", f"{execution.target.world} ranks", "divisor")
                self.require_error(observed, "ConfigError", *words, where=f"rank {rank}, sp_size={size}")
        for _, operation, seen in execution.each("prepare_inference"):
            for rank, observed in enumerate(seen):
                where, named = (
                    f"rank {rank}, prepare of a model of kind {operation['model']}",
                    REFUSED[operation["model"]],
                )
                self.require_error(observed, "UnsupportedOperationError", f"sp_size={size}", *named, where=where)


@CONTRACT.add
class LossOfSequences(Clause):
    """A loss that is computed from gathered per-token values is the same on all ranks of a sequence and counts once. So
    does its denominator. A loss that is computed from a slice without gathering is refused, and the update can
    continue. Denominators that differ on the ranks of a sequence, such as those of slices, are refused on every rank
    where the update ends, and the update is dropped."""

    id = "SP-6"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        refused: Operation = {**_updates(("full",), gathered=False)[0], "may_fail": True}
        model, more = trained(kind="grouped", seed=6), _updates(("right", "left"), 2, first=30, denominator=True)
        of_slice, ending = _updates(("full",), first=60, denominator=True, denominator_of_slice=True)
        wrong = [of_slice, {**ending, "may_fail": True}]
        return [
            program
            for size in _sizes(target)
            for program in [
                _program(
                    target,
                    size,
                    *model,
                    *_updates(("full",)),
                    refused,
                    *_updates(("right",), first=30),
                    READ_WEIGHTS,
                    max_norm=0.5,
                ),
                _program(target, size, *model, *more, READ_WEIGHTS, accumulation_steps=2),
                _program(target, size, *model, *more[:2], *wrong, *more[2:4], READ_WEIGHTS),
            ]
        ]

    @override
    def check(self, execution: Execution) -> None:
        size = execution.program.settings["sp_size"]
        for index, operation, seen in execution.each("sequence_backward"):
            for rank, observed in enumerate(seen):
                where = f"rank {rank}, backward (operation {index})"
                if operation.get("gathered", True):
                    first = seen[rank - rank % size]["loss"]
                    self.require(
                        observed["loss"] == first,
                        f"{where}: expected the loss {first} of its group, got {observed['loss']}",
                    )
                else:
                    self.require_error(observed, "StrategyError", "backward", "gather", where=where)
        for index, operation, seen in execution.each("step"):
            if "may_fail" in operation:
                for rank, observed in enumerate(seen):
                    where = f"rank {rank}, optimizer_step (operation {index}) with denominators of slices"
                    self.require_error(observed, "StrategyError", "optimizer_step", "denominators", where=where)
        assert_denominators(self, execution)
        assert_norms(self, execution)
        assert_close(self, execution, bound=tolerances.OTHER_SUMMATION_ORDER)
