"""The transformers engine, in this process."""

from lightrft.engines.transformers.engine import TransformersEngine

__all__ = ["TransformersEngine"]
