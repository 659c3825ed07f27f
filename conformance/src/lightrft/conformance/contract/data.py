"""DATA: who sees which sample, in which order."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial


def interleaved(seen: Sequence[dict[str, Any]]) -> list[int]:
    """The samples of all ranks in the order in which they are dealt out: one to each rank, round by round."""
    flat = [[sample for batch in it["batches"] for sample in batch] for it in seen]
    rounds = max(map(len, flat), default=0)
    return [samples[index] for index in range(rounds) for samples in flat if index < len(samples)]


@CONTRACT.add
class EverySample(Clause):
    """Over an epoch, the ranks together see every sample once. With drop_last=False the last round is filled up by
    repeating samples, at most one fewer than there are ranks; with drop_last=True what fills no round or batch is left
    out."""

    id = "DATA-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
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
        return Program(operations=(loader, {"do": "batches", "name": "l"}))

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(self._program, st.integers(1, 40), st.integers(1, 6), st.booleans(), st.booleans())

    @override
    def check(self, trial: Trial) -> None:
        asked, world = trial.program.operations[0], trial.place.world
        seen = trial.last("batches")
        counts = [sum(map(len, it["batches"])) for it in seen]
        dealt = interleaved(seen)
        self.require(len(set(counts)) == 1, f"the ranks see {counts} samples: they must see as many")
        if asked["drop_last"]:
            share = asked["samples"] // world // asked["batch_size"] * asked["batch_size"]
            self.require(counts[0] == share, f"each rank sees {counts[0]} samples, wanted {share}")
            self.require(len(set(dealt)) == len(dealt), "a sample was seen twice")
            full = all(len(batch) == asked["batch_size"] for it in seen for batch in it["batches"])
            self.require(full, "drop_last=True left a batch that is not full")
        else:
            self.require(
                set(dealt) == set(range(asked["samples"])),
                f"never seen: {sorted(set(range(asked['samples'])) - set(dealt))}",
            )
            repeated = len(dealt) - asked["samples"]
            self.require(
                repeated == -asked["samples"] % world,
                f"{repeated} samples were repeated, wanted {-asked['samples'] % world}",
            )
        if not asked["shuffle"]:
            first = dealt[: min(len(dealt), asked["samples"])]
            self.require(first == sorted(first), "shuffle=False changed the order")


@CONTRACT.add
class Resuming(Clause):
    """Resuming at consumed_samples gives exactly the samples that were left, in the same order; the next epoch is whole."""

    id = "DATA-2"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, 24, 2, 2, True), self._program(place, 17, 1, 5, False)]

    def _program(self, place: Place, samples: int, size: int, first: int, drop: bool, epoch: int = 1) -> Program:
        common = {"do": "loader", "samples": samples, "batch_size": size, "drop_last": drop}
        rounds = samples // place.world // size if drop else -(-samples // place.world // size)
        first = min(first, rounds)
        consumed = min(samples, first * size * place.world)
        return Program(
            operations=(
                {**common, "name": "whole"}, {"do": "batches", "name": "whole", "epoch": epoch},
                {**common, "name": "part"}, {"do": "batches", "name": "part", "epoch": epoch, "first": first},
                {**common, "name": "rest", "consumed": consumed}, {"do": "resume", "name": "rest", "epoch": epoch, "consumed": consumed},
                {"do": "batches", "name": "whole", "epoch": epoch + 1}, {"do": "batches", "name": "rest", "epoch": epoch + 1},
            )
        )  # fmt: skip

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda samples, size, first, drop, epoch: self._program(place, samples, size, first, drop, epoch),
            st.integers(1, 40), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 3),
        )  # fmt: skip

    @override
    def check(self, trial: Trial) -> None:
        whole = interleaved(trial.last_of("batches", 0))
        part_seen = trial.last_of("batches", 1)
        part, rest = interleaved(part_seen), interleaved(trial.last("resume"))
        consumed = next(operation["consumed"] for _, operation, _ in trial.each("resume"))
        for rank, it in enumerate(part_seen):
            self.require(
                it["consumed"] == consumed,
                f"rank {rank}: the position after {len(part)} samples is {it['consumed']}, wanted {consumed}",
            )
        self.require(part == whole[: len(part)], f"the first part is {part}, of {whole}")
        left = whole[len(part) :] if consumed < trial.program.operations[0]["samples"] else []
        same = rest[: len(left)] == left if trial.program.operations[0]["drop_last"] else set(rest) >= set(left)
        self.require(same and rest[: len(left)] == left, f"after {consumed} samples {rest} were left, wanted {left}")
        wanted, found = (interleaved(trial.last_of("batches", number)) for number in (2, 3))
        self.require(found == wanted, f"the epoch after the one that was resumed is {found}, wanted {wanted}")


@CONTRACT.add
class Order(Clause):
    """The order depends on seed and epoch alone."""

    id = "DATA-3"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, 31, 2)]

    def _program(self, place: Place, samples: int, size: int) -> Program:
        loader = {"do": "loader", "samples": samples, "batch_size": size, "drop_last": False}
        disturb: list[Operation] = [{"do": "seed", "value": 5}, {"do": "draw"}]
        looks = [{"do": "batches", "name": "l", "epoch": epoch} for epoch in (0, 1, 2, 0)]
        again = {"do": "batches", "name": "m", "epoch": 1}
        return Program(
            operations=({**loader, "name": "l"}, *looks[:3], *disturb, looks[3], {**loader, "name": "m"}, again)
        )

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda samples, size: self._program(place, samples, size), st.integers(12, 50), st.integers(1, 4)
        )

    @override
    def check(self, trial: Trial) -> None:
        first, second, third, again, other = [interleaved(seen) for _, _, seen in trial.each("batches")]
        self.require(first == again, "the same epoch came in another order")
        self.require(second == other, "another loader of the same epoch has another order")
        samples = trial.program.operations[0]["samples"]
        orders = [it[:samples] for it in (first, second, third)]
        self.require(all(orders.count(it) == 1 for it in orders), "two epochs came in the same order")
        self.require(first[:samples] != sorted(first[:samples]), "shuffling left the samples in order")
