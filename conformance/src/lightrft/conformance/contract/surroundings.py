"""LIFE: what belongs to the whole process."""

from collections.abc import Sequence

from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial
from lightrft.conformance.contract.drawing import FP32, geometry, micro_batch, trained, updates

LOOK: Operation = {"do": "surroundings"}


@CONTRACT.add
class Surroundings(Clause):
    """A strategy leaves alone what belongs to the whole process: torch's default dtype and device, whether autograd is on,
    torch's threads, the working directory. Training, skipping, averaging, offloading and collectives draw nothing from
    the random streams."""

    id = "LIFE-9"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        average: list[Operation] = [
            {"do": "build", "model": "ema", "seed": 1},
            {"do": "prepare_inference", "model": "ema"},
        ]
        away: list[Operation] = [{"do": do, "model": "a"} for do in ("offload_model", "reload_model", "weights")]
        return [
            Program(
                operations=(
                    {"do": "place"}, LOOK, *trained(schedule=True), *average, *updates(2, scheduled=True),
                    *micro_batch(7, poison="nan"), {"do": "average", "model": "a", "into": "ema", "beta": 0.5}, *away,
                    {"do": "all_reduce", "data": 1.0}, {"do": "all_gather", "data": 1.0}, LOOK, {"do": "close"}, LOOK,
                ),
                settings={**FP32, "bf16": bf16, **geometry(place)},
            )
            for bf16 in (False, True)
        ]  # fmt: skip

    @override
    def check(self, trial: Trial) -> None:
        before, used, closed = [seen for _, _, seen in trial.each("surroundings")]
        for rank in range(trial.place.world):
            for after, when in ((used, "training"), (closed, "close")):
                for name, was in before[rank].items():
                    now = after[rank][name]
                    what = "moved" if name.endswith("stream") else f"is {now}, and was {was}"
                    self.require(now == was, f"rank {rank}: after {when}, {name} {what}")
