"""DATA: which rank sees which sample, in which order."""

from collections.abc import Iterator, Sequence

import torch
from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Record, Target
from lightrft.conformance.contract.program_parts import FP32, trained


def interleaved(seen: Sequence[Record]) -> list[int]:
    """The samples of all ranks in the order of distribution: one to each rank per round."""
    flat = [[sample for batch in observed["batches"] for sample in batch] for observed in seen]
    rounds = max(map(len, flat), default=0)
    return [samples[index] for index in range(rounds) for samples in flat if index < len(samples)]


@CONTRACT.add
class EverySample(Clause):
    """In an epoch, the ranks together see every sample once. With drop_last=False, the last round is padded by
    repeating fewer samples than there are ranks. With drop_last=True, samples that do not fill a round or a batch are
    dropped. This holds for every epoch. For whole updates, see DATA-4."""

    id = "DATA-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            self._program(samples, size, shuffle, drop)
            for samples, size, shuffle, drop in [
                (17, 3, True, False),
                (12, 2, False, False),
                (13, 2, True, True),
                (1, 4, True, False),
            ]
        ]

    def _program(self, samples: int, size: int, shuffle: bool, drop: bool) -> Program:
        loader = {
            "do": "loader",
            "name": "l",
            "samples": samples,
            "batch_size": size,
            "shuffle": shuffle,
            "drop_last": drop,
        }
        later: list[Operation] = [{"do": "batches", "name": "l", "epoch": epoch} for epoch in (1, 6)]
        return Program(operations=(loader, {"do": "batches", "name": "l"}, *later))

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(self._program, st.integers(1, 40), st.integers(1, 6), st.booleans(), st.booleans())

    @override
    def check(self, execution: Execution) -> None:
        for _, operation, seen in execution.each("batches"):
            self._check(execution, seen, f"epoch {operation.get('epoch', 0)}")

    def _check(self, execution: Execution, seen: Sequence[Record], epoch: str) -> None:
        loader, world = execution.program.operations[0], execution.target.world
        counts = [sum(map(len, observed["batches"])) for observed in seen]
        distributed = interleaved(seen)
        self.require(len(set(counts)) == 1, f"{epoch}: expected the same number of samples on every rank, got {counts}")
        if loader["drop_last"]:
            share = loader["samples"] // world // loader["batch_size"] * loader["batch_size"]
            self.require(counts[0] == share, f"{epoch}: expected {share} samples per rank, got {counts[0]}")
            self.require(len(set(distributed)) == len(distributed), f"{epoch}: drop_last=True repeated a sample")
            full = all(len(batch) == loader["batch_size"] for observed in seen for batch in observed["batches"])
            self.require(full, f"{epoch}: drop_last=True gave a partial batch")
        else:
            self.require(
                set(distributed) == set(range(loader["samples"])),
                f"{epoch}: samples never seen: {sorted(set(range(loader['samples'])) - set(distributed))}",
            )
            repeated = len(distributed) - loader["samples"]
            self.require(
                repeated == -loader["samples"] % world,
                f"{epoch}: expected {-loader['samples'] % world} repeated samples, got {repeated}",
            )
        if not loader["shuffle"]:
            first = distributed[: min(len(distributed), loader["samples"])]
            self.require(first == sorted(first), f"{epoch}: shuffle=False changed the order")


@CONTRACT.add
class Resuming(Clause):
    """Resuming at consumed_samples gives exactly the remaining samples, in the same order. The epochs after it are
    complete. For whole updates, see DATA-4."""

    id = "DATA-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            self._program(target, 24, 2, 2, True),
            self._program(target, 17, 1, 5, False),
            self._program(target, 20, 1, 4, True, epoch=5),
            *(self._program(target, 12 * target.world, 2, first, False, epoch=0) for first in (2, 6)),
        ]

    def _program(self, target: Target, samples: int, size: int, first: int, drop: bool, epoch: int = 1) -> Program:
        common = {"do": "loader", "samples": samples, "batch_size": size, "drop_last": drop}
        rounds = samples // target.world // size if drop else -(-samples // target.world // size)
        first = min(first, rounds)
        consumed = min(samples, first * size * target.world)
        where = {"epoch": epoch} if epoch else {}  # in the first epoch, the loader itself is given consumed_samples
        return Program(
            operations=(
                {**common, "name": "whole"}, {"do": "batches", "name": "whole", "epoch": epoch},
                {**common, "name": "part"}, {"do": "batches", "name": "part", "epoch": epoch, "first": first},
                {**common, "name": "rest", "consumed": consumed}, {"do": "resume", "name": "rest", **where, "consumed": consumed},
                *({"do": "batches", "name": name, "epoch": epoch + later} for later in (1, 3) for name in ("whole", "rest")),
            )
        )  # fmt: skip

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda samples, size, first, drop, epoch: self._program(target, samples, size, first, drop, epoch),
            st.integers(1, 40), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 3),
        )  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        epoch_samples = interleaved(execution.last_of("batches", 0))
        part_seen = execution.last_of("batches", 1)
        part, rest = interleaved(part_seen), interleaved(execution.last("resume"))
        consumed = next(operation["consumed"] for _, operation, _ in execution.each("resume"))
        for rank, observed in enumerate(part_seen):
            self.require(
                observed["consumed"] == consumed,
                f"rank {rank}: expected consumed_samples={consumed} after {len(part)} samples, got {observed['consumed']}",
            )
        self.require(part == epoch_samples[: len(part)], f"expected the first part of {epoch_samples}, got {part}")
        left = epoch_samples[len(part) :] if consumed < execution.program.operations[0]["samples"] else []
        more = len(rest) - len(left)  # repeated samples fill the last round
        self.require(
            rest[: len(left)] == left and 0 <= more < execution.target.world,
            f"after {consumed} samples, expected {left}, got {rest}",
        )
        for number in (2, 4):
            expected, samples = (interleaved(execution.last_of("batches", at)) for at in (number, number + 1))
            self.require(samples == expected, f"an epoch after the resumed one: expected {expected}, got {samples}")


EPOCHS = (0, 1, 2, 3, 8)


@CONTRACT.add
class Order(Clause):
    """The order depends only on the seed and the epoch, not on the number of ranks: it is that of FakeStrategy, which
    is one process."""

    id = "DATA-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, 31, 2)]

    def _program(self, target: Target, samples: int, size: int) -> Program:
        loader = {"do": "loader", "samples": samples, "batch_size": size, "drop_last": False}
        disturb: list[Operation] = [{"do": "seed", "value": 5}, {"do": "draw"}]
        looks = [{"do": "batches", "name": "l", "epoch": epoch} for epoch in (*EPOCHS, 0)]
        again = {"do": "batches", "name": "m", "epoch": 1}
        other = {**loader, "name": "n", "batch_size": size + 1}
        alone: Operation = {"do": "order_on_fake_strategy", "samples": samples, "epochs": list(EPOCHS)}
        return Program(
            operations=(
                {**loader, "name": "l"}, *looks[:-1], *disturb, looks[-1], {**loader, "name": "m"}, again,
                other, {**again, "name": "n"}, alone,
            )
        )  # fmt: skip

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda samples, size: self._program(target, samples, size), st.integers(12, 50), st.integers(1, 4)
        )

    @override
    def check(self, execution: Execution) -> None:
        *epochs, again, other, larger = [interleaved(seen) for _, _, seen in execution.each("batches")]
        self.require(epochs[0] == again, "the same epoch has another order the second time")
        self.require(epochs[1] == other, "another loader of the same epoch has another order")
        self.require(epochs[1] == larger, "larger batches of the same epoch have another order")
        samples = execution.program.operations[0]["samples"]
        orders = [epoch[:samples] for epoch in epochs]
        self.require(all(orders.count(order) == 1 for order in orders), "two epochs have the same order")
        self.require(orders[0] != sorted(orders[0]), "shuffle=True left the samples in order")
        for epoch, order, alone in zip(EPOCHS, orders, execution.last("order_on_fake_strategy")[0], strict=True):
            self.require(
                order == alone,
                f"epoch {epoch}: expected the order of one process with the same seed, {alone}, got {order}",
            )


@CONTRACT.add
class WholeUpdates(Clause):
    """With a training loader, every epoch ends with a whole update: each update has the same samples at any number of
    ranks, and the losses are those of plain PyTorch. An epoch that resumes in the middle, also within an update, starts
    a new update there. A loader is for training if it shuffles, drops samples at the end, and has batches of
    micro_train_batch_size; others drop no more than DATA-1 allows. whole_updates=True makes any other loader end its
    epochs in this way, with batches of micro_train_batch_size samples, or of another size if the script ends updates
    with an explicit boundary; without drop_last it repeats samples to fill the last update. It raises if no whole
    update can be made from the dataset or the batch size."""

    id = "DATA-4"
    rate = 0.01
    training: Operation = {"do": "train_on", "model": "a", "loader": "l"}

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        rows, total = _batch_sizes(target)
        resumed, within = (
            [{**self.training, "epoch": 1, "consumed": consumed}, {**self.training, "epoch": 2}]
            for consumed in (2 * total, total // 2 + 1)
        )
        share = total // target.world
        others = max(1, share // 3)  # samples of a batch that is not a micro-batch
        ended = [{**self.training, "epoch": epoch, "update_batches": share // others} for epoch in (0, 1)]
        refused = [
            {"samples": total - 1, "batch_size": rows, "whole_updates": True},
            {"samples": 30, "batch_size": share + 1, "whole_updates": True},
        ]
        uncut = [
            {"samples": 30, "batch_size": rows, "shuffle": False},
            {"samples": 30, "batch_size": rows + 1},
            {"samples": 30, "batch_size": rows, "whole_updates": False},
            {"samples": total - 1, "batch_size": rows},
        ]
        return [
            self._program(target, 30),
            self._program(target, 30, drop_last=False, whole_updates=True),
            self._program(target, 5, drop_last=False, whole_updates=True),
            self._program(target, 30, calls=resumed),
            self._program(target, 30, calls=resumed, drop_last=False, whole_updates=True),
            self._program(target, 30, calls=within),
            self._program(target, 30, calls=within, drop_last=False, whole_updates=True),
            self._program(target, 30, calls=ended, batch_size=others, whole_updates=True),
            self._with_batch_sizes(
                target,
                *({"do": "loader", "name": "r", **loader, "may_fail": True} for loader in refused),
                *(
                    operation
                    for loader in uncut
                    for operation in ({"do": "loader", "name": "u", **loader}, {"do": "batches", "name": "u"})
                ),
            ),
        ]

    def _program(self, target: Target, samples: int, calls: Sequence[Operation] = (), **options: object) -> Program:
        loader: Operation = {"do": "loader", "name": "l", "samples": samples, "batch_size": _batch_sizes(target)[0]}
        calls = calls or [{**self.training, "epoch": epoch} for epoch in (0, 1)]
        epochs = [call["epoch"] for call in calls]
        alone: Operation = {"do": "order_on_fake_strategy", "samples": samples, "epochs": epochs}
        parts = trained(lr=self.rate, weight_decay=0.0)
        return self._with_batch_sizes(target, *parts, {**loader, **options}, *calls, alone)

    @staticmethod
    def _with_batch_sizes(target: Target, *operations: Operation) -> Program:
        rows, total = _batch_sizes(target)
        return Program(
            operations=operations, settings={**FP32, "micro_train_batch_size": rows, "train_batch_size": total}
        )

    @override
    def check(self, execution: Execution) -> None:
        if any(operation["do"] == "train_on" for operation in execution.program.operations):
            self._check_updates(execution)
        else:
            self._check_others(execution)

    def _check_updates(self, execution: Execution) -> None:
        calls, world = list(execution.each("train_on")), execution.target.world
        orders = execution.last("order_on_fake_strategy")[0]
        loader = next(operation for operation in execution.program.operations if operation["do"] == "loader")
        total = execution.program.settings["train_batch_size"]
        plain = _PlainTraining(execution.program.operations[0], self.rate)
        for (_, operation, seen), order in zip(calls, orders, strict=True):
            expected = list(_updates_of(order, operation.get("consumed", 0), total, loader.get("drop_last", True)))
            losses = [plain.update(samples) for samples in expected]
            for rank, updates in enumerate(seen):
                where = f"rank {rank}, epoch {operation['epoch']}"
                got, shares = [each["samples"] for each in updates], [samples[rank::world] for samples in expected]
                self.require(got == shares, f"{where}: expected updates of the samples {shares}, got {got}")
                for number, (loss, update) in enumerate(zip(losses, updates, strict=True)):
                    self.require(
                        abs(update["loss"] - loss) < 1e-4,
                        f"{where}, update {number}: expected the loss {loss} of plain PyTorch, got {update['loss']}",
                    )

    def _check_others(self, execution: Execution) -> None:
        world, operations = execution.target.world, execution.program.operations
        total = execution.program.settings["train_batch_size"]
        for index, operation, seen in execution.each("loader"):
            if operation.get("may_fail"):
                uneven = total // world % operation["batch_size"]
                word = "batch_size to divide" if uneven else "at least train_batch_size"
                for rank, observed in enumerate(seen):
                    self.require_error(
                        observed, "ArgumentError", word, where=f"rank {rank}, loader (operation {index})"
                    )
        for index, _, seen in execution.each("batches"):
            loader = operations[index - 1]
            share = loader["samples"] // world // loader["batch_size"] * loader["batch_size"]
            for rank, observed in enumerate(seen):
                got = sum(map(len, observed["batches"]))
                self.require(got == share, f"rank {rank}, {loader}: expected {share} samples per rank, got {got}")


def _batch_sizes(target: Target) -> tuple[int, int]:
    """Samples of a micro-batch and of an update; updates have the same size at 1, 2 and 4 ranks."""
    rows = 3 if target.world <= 4 else 1
    return rows, rows * target.world * max(1, 4 // target.world)


def _updates_of(order: Sequence[int], consumed: int, total: int, drop_last: bool) -> Iterator[list[int]]:
    """The samples of each update of an epoch in this ``order``, from ``consumed`` on."""
    for start in range(consumed, len(order), total):
        samples = list(order[start : start + total])
        if len(samples) == total or not drop_last:
            repeats = -(-total // len(order)) + 1
            yield (samples + list(order) * repeats)[:total]


class _PlainTraining:
    """The same model in one process, with AdamW."""

    def __init__(self, build: Operation, rate: float) -> None:
        self._model = models.build(build["kind"], build["seed"])
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=rate, weight_decay=0.0)

    def update(self, samples: Sequence[int]) -> float:
        """One update over ``samples``; the loss before it."""
        loss = models.loss_over_samples(self._model, samples, torch.device("cpu"))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item()
