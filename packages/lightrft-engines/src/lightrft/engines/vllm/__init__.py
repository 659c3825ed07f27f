"""The vLLM engine, in this process."""

from lightrft.engines.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine"]
