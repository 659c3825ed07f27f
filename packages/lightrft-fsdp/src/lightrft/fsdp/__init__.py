"""PyTorch FSDP2 as a LightRFT strategy."""

from lightrft.fsdp.strategy import FSDPV2Strategy

__all__ = ["FSDPV2Strategy"]
