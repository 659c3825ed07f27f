"""OFF: moving optimizers and models out of the way, and back."""

from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial
from lightrft.conformance.contract.drawing import BF16, FP32, SEEDS, geometry, micro_batch, trained, updates
from lightrft.conformance.contract.near import LOOK, STATE, near

OUT: list[Operation] = [{"do": "offload_optimizer", "model": "a"}, {"do": "offload_model", "model": "a"}]
BACK: list[Operation] = [{"do": "reload_model", "model": "a"}, {"do": "load_optimizer", "model": "a"}]


def settings(place: Place, precision: object = FP32) -> dict[str, object]:
    """Settings with which the optimizer may be offloaded."""
    fsdp_offload = place.settings.get("fsdp_cpu_offload", False)
    chosen = BF16 if precision is BF16 else FP32
    return {**chosen, **({} if fsdp_offload else {"adam_offload": True}), **geometry(place)}


@CONTRACT.add
class EveryBit(Clause):
    """Offload and reload of optimizer or model leave every bit as it was; twice is the same as once."""

    id = "OFF-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, FP32), self._program(place, BF16)]

    def _program(self, place: Place, precision: object, seed: int = 2, count: int = 2) -> Program:
        cycle = [*OUT, *OUT, *BACK, *BACK]
        operations = (*trained(seed=seed), *updates(count), STATE, *cycle, STATE, *cycle, STATE)
        return Program(operations=operations, settings=settings(place, precision))

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(lambda seed, count: self._program(place, FP32, seed, count), SEEDS, st.integers(0, 3))

    @override
    def check(self, trial: Trial) -> None:
        first, *others = [seen for _, _, seen in trial.each("state")]
        for other in others:
            for rank in range(trial.place.world):
                for part in ("parameters", "optimizer"):
                    self.require(
                        other[rank][part] == first[rank][part],
                        f"rank {rank}: {part} changed by offloading and reloading",
                    )


@CONTRACT.add
class TrainingOn(Clause):
    """Training with offload cycles in between, also within the micro-batches of an update, equals training without."""

    id = "OFF-2"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, [0, 1, 2]), self._program(place, [3]), self._inside(place)]

    def _inside(self, place: Place) -> Program:
        """With a gradient pending."""
        first, second = micro_batch(1), micro_batch(2)
        operations = (*trained(seed=3), *updates(1, 2), *first, *OUT, *BACK, *second, *updates(1, 2, first=9), LOOK)
        return Program(operations=operations, settings={**settings(place), **geometry(place, 2)})

    def _program(self, place: Place, turns: Sequence[int], seed: int = 3) -> Program:
        operations = trained(seed=seed)
        for number, turn in enumerate(turns):
            cycle = [[*OUT, *BACK], OUT[:1], [OUT[1], BACK[0]], [*OUT, *BACK, *OUT, *BACK]][turn]
            operations += [*updates(1, first=10 * number), *cycle]
        return Program(operations=(*operations, *updates(2, first=90), LOOK), settings=settings(place))

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda turns, seed: self._program(place, turns, seed),
            st.lists(st.integers(0, 3), min_size=1, max_size=4),
            SEEDS,
        )

    @override
    def check(self, trial: Trial) -> None:
        near(self, trial)


@CONTRACT.add
class MemoryBack(Clause):
    """Offloading gives back at least 95 % of the bytes that the object held on the device."""

    id = "OFF-3"
    needs_cuda = True

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        look: Operation = {"do": "device_bytes"}
        operations = (look, *trained(kind="wide"), look, *updates(1), look, OUT[0], look, OUT[1], look)
        return [Program(operations=operations, settings=settings(place))]

    @override
    def check(self, trial: Trial) -> None:
        empty, model, trained_, without_optimizer, without_both = [seen for _, _, seen in trial.each("device_bytes")]
        for rank in range(trial.place.world):
            held = trained_[rank] - model[rank]
            self.require(
                trained_[rank] - without_optimizer[rank] >= 0.95 * held,
                f"rank {rank}: the optimizer held {held} bytes, and {trained_[rank] - without_optimizer[rank]} came back",
            )
            held = model[rank] - empty[rank]
            back = without_optimizer[rank] - without_both[rank]
            self.require(back >= 0.95 * held, f"rank {rank}: the model held {held} bytes, and {back} came back")
