"""DATA: which rank sees which sample, in which order."""

from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Record, Target


def interleaved(seen: Sequence[Record]) -> list[int]:
    """The samples of all ranks in the order of distribution: one to each rank per round."""
    flat = [[sample for batch in observed["batches"] for sample in batch] for observed in seen]
    rounds = max(map(len, flat), default=0)
    return [samples[index] for index in range(rounds) for samples in flat if index < len(samples)]


@CONTRACT.add
class EverySample(Clause):
    """In an epoch, the ranks together see every sample once. With drop_last=False, the last round is padded by
    repeating fewer samples than there are ranks. With drop_last=True, samples that do not fill a round or a batch are
    dropped. This holds for every epoch."""

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
    complete."""

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
    """The order depends only on the seed and the epoch, not on the number of ranks: it is that of FakeStrategy, which is one
    process."""

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
