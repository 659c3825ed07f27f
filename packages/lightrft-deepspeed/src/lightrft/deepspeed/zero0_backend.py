"""`Zero0Backend`: every rank holds everything, and DeepSpeed averages the gradients once per update."""

from typing_extensions import override

from lightrft.deepspeed.zero_backend import ZeroBackend
from lightrft.strategy.backend import TrainedModel


class Zero0Backend(ZeroBackend):
    """ZeRO stage 0. DeepSpeed reduces the gradients; the separate steps of the update do the rest.

    DeepSpeed's own step, in fp32, applies gradients that are not finite and returns no norm:
    https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/engine.py#L3567
    """

    @override
    def reduce(self, trained: TrainedModel) -> None:
        self.engines[trained.model].buffered_allreduce_fallback()
