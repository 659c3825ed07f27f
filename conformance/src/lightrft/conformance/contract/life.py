"""LIFE and LOG: lifecycle, process group, and voice."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, is_error, same, show
from lightrft.conformance.contract.drawing import FP32, geometry, micro_batch, trained, updates

SUM: Operation = {"do": "all_reduce", "data": {"per_rank": [1.0, 1.0]}, "op": "sum"}


@CONTRACT.add
class Ready(Clause):
    """A strategy from get_strategy is ready for use; setup_distributed may be called again any number of times and
    changes nothing."""

    id = "LIFE-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        again = {"do": "setup_again"}
        operations = (
            SUM,
            again,
            SUM,
            {"do": "draw"},
            {"do": "random_state"},
            {"do": "resources", "remember": "once"},
            again,
            again,
            {"do": "resources", "compare": "once"},
            {"do": "random_state"},
            SUM,
        )
        return [Program(operations=operations)]

    @override
    def check(self, trial: Trial) -> None:
        total = float(sum(1 + rank for rank in range(trial.place.world)))
        for index, _, seen in trial.each("all_reduce"):
            self.require(
                all(it["result"] == total for it in seen),
                f"all_reduce (operation {index}): {show(seen)}, wanted {total}",
            )
        for rank, grown in enumerate(trial.last("resources")):
            self.require(
                not (grown["threads"] > 0 or grown["files"] > 0 or grown["environment"]),
                f"rank {rank}: setup_distributed left {show(grown)}",
            )
        before, after = [seen for _, _, seen in trial.each("random_state")]
        self.require(before == after, "setup_distributed moved the random streams")


@CONTRACT.add
class WhereAmI(Clause):
    """world_size, get_rank() and is_rank_0() agree with the process group; with none they are 1, 0, True, with no
    environment variables set and no process group made. Started without torchrun, a distributed strategy is a world of
    one by itself."""

    id = "LIFE-2"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        plain = Program(operations=({"do": "place"},), settings=geometry(place, 3))
        if not place.grouped or place.device != "cpu":
            return [plain]
        # every rank the first of its host, and then an environment that says otherwise than the group
        first, changed = ({"do": "environ", name: "0"} for name in ("LOCAL_RANK", "RANK"))
        hosts = (first, {"do": "place"}, changed, {"do": "place"})
        return [plain, Program(operations=hosts, settings=geometry(place, 3))]

    @override
    def check(self, trial: Trial) -> None:
        for _, _, places in trial.each("place"):
            self._check(trial, places)

    def _check(self, trial: Trial, places: list[Any]) -> None:
        for rank, seen in enumerate(places):
            wanted = (trial.place.world, rank, rank == 0)
            found = (seen["world_size"], seen["rank"], seen["is_rank_0"])
            self.require(found == wanted, f"rank {rank}: (world_size, rank, is_rank_0) is {found}, wanted {wanted}")
            self.require(seen["window"] == 3, f"rank {rank}: accumulated_gradient is {seen['window']}, wanted 3")
            if trial.place.grouped:
                self.require(
                    seen["group"] == [trial.place.world, rank], f"rank {rank}: the process group is {seen['group']}"
                )
            else:
                self.require(
                    seen["group"] is None and not seen["environment"],
                    f"it made a process group or set {seen['environment']}",
                )


TRAIN, SYNC = micro_batch(5), {"do": "sync", "model": "a"}
TIMEOUT, CONFIGURED = 2.0, 5.0
"""Seconds to wait for a rank that stays away: as `setup_distributed` is told, and as the setting says."""
NAMES = {
    "all_reduce": ("all_reduce",),
    "sync": ("update_engine_weights", "full_parameters"),
    "backward": ("forward", "backward"),
    "step": ("optimizer_step", "backward"),
}
"""What the message must name, one of these, by what was called."""


@CONTRACT.add
class LostPeers(Clause):
    """If a rank does not reach a collective (explicit, or inside forward, backward, step, sync), or dies, the others
    raise within the configured timeout, and the message names the operation in which they waited. Nothing waits for
    ever."""

    id = "LIFE-3"
    smallest_world = 2
    ends_workers = True

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        last = [place.world - 1]
        stays_away: Operation = {"do": "idle", "until": list(range(place.world - 1)), "ranks": last}
        late = {**stays_away, "seconds": 8 * TIMEOUT}
        configured = {**stays_away, "seconds": 4 * CONFIGURED}
        # building and preparing is slow where many processes share a core, and the timeout comes after it
        soon: Operation = {"do": "setup_again", "timeout": TIMEOUT}
        before = [*trained(kind="language"), *updates(1), {"do": "engine", "actor": "a"}, SUM, soon, SUM]
        return [
            self._program(place, [SUM], configured, [SUM], timeout=CONFIGURED),
            self._program(place, before, late, TRAIN),
            self._program(place, before, late, [SYNC]),
            self._program(place, before, {"do": "end", "ranks": last}, [SUM, *TRAIN, SYNC]),
        ]

    def _program(
        self, place: Place, before: list[Operation], absent: Operation, calls: list[Operation], **settings: Any
    ) -> Program:
        """What the last rank does while the others make ``calls``."""
        others = list(range(place.world - 1))
        waiting = [{**operation, "ranks": others, "may_fail": True} for operation in calls]
        operations = (*before, absent, *waiting, {"do": "through", "ranks": others})
        return Program(operations=operations, settings={**FP32, **settings, **geometry(place)})

    @override
    def check(self, trial: Trial) -> None:
        """The driver notices a rank that never returns; here, what those that did return said."""
        for rank in range(trial.place.world - 1):
            waited = [(index, it) for index, it in enumerate(trial.program.operations) if it.get("may_fail")]
            for index, operation in waited:
                called, seen = operation["do"], trial.at(rank, index)
                if called == "backward" and not is_error(seen):
                    continue  # a strategy may exchange nothing before the step
                where = f"rank {rank}, {called} without the others"
                self.require_error(seen, "StrategyError", where=where)
                self.require(
                    any(name in seen["message"] for name in NAMES[called]),
                    f"rank {rank}: the message names none of {', '.join(NAMES[called])}: {seen['message']}",
                )


@CONTRACT.add
class Seeds(Clause):
    """set_seed(s) makes Python's, NumPy's and torch's streams repeat."""

    id = "LIFE-4"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(0), self._program(2**32 - 1)]

    def _program(self, seed: int) -> Program:
        again: list[Operation] = [{"do": "seed", "value": seed}, {"do": "draw"}]
        return Program(
            operations=(*again, {"do": "draw"}, *again, {"do": "seed", "value": (seed + 1) % 2**32}, {"do": "draw"})
        )

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.integers(0, 2**32 - 1).map(self._program)

    @override
    def check(self, trial: Trial) -> None:
        draws = [seen for _, _, seen in trial.each("draw")]
        for rank in range(trial.place.world):
            first, second, again, other = [draw[rank] for draw in draws]
            self.require(same(first, again), f"rank {rank}: the same seed gave {show(first)} and then {show(again)}")
            for stream, (left, right, third) in enumerate(zip(first, second, other, strict=True)):
                name = ("Python's", "NumPy's", "torch's")[stream]
                self.require(
                    not same(left, right) and not same(left, third),
                    f"rank {rank}: {name} stream does not move, or not with the seed",
                )


@CONTRACT.add
class Lifetimes(Clause):
    """close() (and leaving a with block, also by an exception) is idempotent and gives back what the strategy made:
    process groups, child processes, environment variables. A second lifetime in the same process works, and adds no
    thread, file or variable to what the first left."""

    id = "LIFE-5"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        life = [*trained(kind="language"), *updates(1), {"do": "engine", "actor": "a"}, SUM]
        again: list[Operation] = []
        for remember in ("first", "second", "third"):
            again += [
                *life,
                {"do": "close"},
                {"do": "close"},
                {"do": "resources", "remember": remember},
                {"do": "begin_again"},
            ]
        looks: list[Operation] = [*life, {"do": "close"}, {"do": "resources", "compare": "second"}]
        begin: list[Operation] = [{"do": "resources", "remember": "nothing"}]
        left: Operation = {"do": "resources", "compare": "nothing"}
        return [
            Program(operations=(*begin, *again, *looks), settings={**FP32, **geometry(place)}),
            Program(operations=(*begin, SUM, {"do": "leave"}, left)),
            Program(operations=(*begin, *life, {"do": "leave", "raising": True}), settings={**FP32, **geometry(place)}),
        ]

    @override
    def check(self, trial: Trial) -> None:
        for index, operation, seen in trial.each("resources"):
            if "compare" not in operation:
                continue
            for rank, grown in enumerate(seen):
                self.require(not grown["initialized"], f"rank {rank}: a process group is left after close")
                self.require(
                    not grown["environment"], f"rank {rank}: close left {grown['environment']} in the environment"
                )
                self.require(
                    grown["children"] <= 0, f"rank {rank}: {grown['children']} child processes are left after close"
                )
                if operation["compare"] == "second":
                    self.require(grown["threads"] <= 0, f"rank {rank}: each lifetime adds {grown['threads']} threads")
                    self.require(grown["files"] <= 0, f"rank {rank}: each lifetime adds {grown['files']} open files")
            self.require(index > 0, "")
        for _, _, seen in trial.each("leave"):
            self.require(all(seen), "leaving the with block left a process group or an engine")


@CONTRACT.add
class OthersGroups(Clause):
    """A process group that the strategy did not make it uses, and leaves alone at close."""

    id = "LIFE-8"
    grouped_only = True

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        operations = (
            {"do": "own_group"},
            {"do": "place"},
            *trained(),
            *updates(1),
            SUM,
            {"do": "close"},
            {"do": "group_alive"},
        )
        return [Program(operations=operations, settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        for rank, alive in enumerate(trial.last("group_alive")):
            self.require(alive is True, f"rank {rank}: close ended the process group of the script")


@CONTRACT.add
class LocalRank(Clause):
    """An explicit local_rank wins over the environment."""

    id = "LIFE-6"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        operations = (
            {"do": "environ", "LOCAL_RANK": "63"},
            {"do": "settings", "names": ["local_rank"]},
            SUM,
            {"do": "local_device"},
        )
        return [Program(operations=operations, settings={"local_rank": 0})]

    @override
    def check(self, trial: Trial) -> None:
        for rank in range(trial.place.world):
            used = trial.at(rank, 3)
            said, index = used
            fits = said == 0 and index in (None, 0)
            self.require(fits, f"rank {rank}: local_rank=0 was given, and {said} and the device {index} are used")


@CONTRACT.add
class Geometry(Clause):
    """A batch geometry that does not divide raises ConfigError on every rank, and the message has the numbers and the
    rule."""

    id = "LIFE-7"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, 3, 3 * place.world + 1)] + (
            [self._program(place, 2, 2)] if place.world > 1 else []
        )

    def _program(self, place: Place, micro: int, total: int) -> Program:
        settings = {"micro_train_batch_size": micro, "train_batch_size": total}
        return Program(operations=({"do": "place", "may_fail": True},), settings=settings)

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        # whole micro-batches, and not for every rank as many; on one rank, no whole micro-batches
        micro, count = st.integers(2, 6), st.integers(1, 20)
        if place.world == 1:
            return st.builds(lambda size, n: self._program(place, size, size * n + 1), micro, count)
        return st.builds(lambda size, n: self._program(place, size, size * (n * place.world + 1)), micro, count)

    @override
    def check(self, trial: Trial) -> None:
        micro, total = (str(trial.program.settings[name]) for name in ("micro_train_batch_size", "train_batch_size"))
        for rank in range(trial.place.world):
            self.require_error(trial.at(rank, 0), "ConfigError", "train_batch_size", micro, total, where=f"rank {rank}")


@CONTRACT.add
class Voice(Clause):
    """print and the logger speak on rank 0 only."""

    id = "LOG-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [Program(operations=({"do": "speak", "text": "hello there"},))]

    @override
    def check(self, trial: Trial) -> None:
        for rank, seen in enumerate(trial.last("speak")):
            for how, text in seen.items():
                spoke = "hello there" in text
                self.require(spoke == (rank == 0), f"rank {rank}: {how} {text!r}")
