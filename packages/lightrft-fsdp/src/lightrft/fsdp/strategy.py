"""`FSDPV2Strategy`: PyTorch FSDP2 behind the contract of `StrategyBase`."""

from lightrft.fsdp.backend import FSDPBackend
from lightrft.strategy import StrategyBase


class FSDPV2Strategy(StrategyBase):
    """FSDP2 and HSDP, on CPU and CUDA; see `FSDPBackend`."""

    name = "fsdp"
    backend_class = FSDPBackend
    supported_settings = frozenset({"fsdp_shard_size", "fsdp_cpu_offload", "mixed_mm_data", "grad_accum_dtype"})
