"""LightRFT's training strategy on DeepSpeed ZeRO. Importing it loads no DeepSpeed and asks for no device."""

from lightrft.deepspeed.strategy import DeepspeedStrategy

__all__ = ["DeepspeedStrategy"]
