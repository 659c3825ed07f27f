"""What LightRFT's scripts expect beyond the API of `StrategyBase`: attributes, the type of a sampler, the shape of results.

New code needs none of this.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

from torch.utils.data import Sampler
from typing_extensions import override

from lightrft.config import StrategyConfig
from lightrft.config.settings import GradientDtype


class LightRFTMembers:
    """The attributes and methods of LightRFT's strategies that return settings or DeepSpeed configurations."""

    config: StrategyConfig

    @property
    def seed(self) -> int:
        """The setting ``seed``."""
        return self.config.seed

    @property
    def max_norm(self) -> float | None:
        """The setting ``max_norm``."""
        return self.config.max_norm

    @property
    def micro_train_batch_size(self) -> int:
        """The setting ``micro_train_batch_size``."""
        return self.config.micro_train_batch_size

    @property
    def train_batch_size(self) -> int:
        """The setting ``train_batch_size``."""
        return self.config.train_batch_size

    @property
    def bf16(self) -> bool:
        """The setting ``bf16``."""
        return self.config.bf16

    @property
    def adam_offload(self) -> bool:
        """The setting ``adam_offload``."""
        return self.config.adam_offload

    @property
    def zpg(self) -> int:
        """The setting ``zpg``."""
        return self.config.zpg

    @property
    def grad_accum_dtype(self) -> GradientDtype | None:
        """The setting ``grad_accum_dtype``."""
        return self.config.grad_accum_dtype

    @property
    def overlap_comm(self) -> bool:
        """The setting ``overlap_comm``."""
        return self.config.overlap_comm

    @property
    def engine_type(self) -> str:
        """The setting ``engine_type``."""
        return self.config.engine_type

    def get_ds_train_config(self, is_actor: bool = False) -> dict[str, Any] | None:
        """Return DeepSpeed's configuration of a model in training; None on strategies without DeepSpeed.

        Args:
            is_actor: Has no effect; accepted because LightRFT's scripts pass it.
        """
        return None

    def get_ds_eval_config(self, offload: bool = False) -> dict[str, Any] | None:
        """Return DeepSpeed's configuration of a model for inference; None on strategies without DeepSpeed.

        Args:
            offload: Keep the model's shards in host memory.
        """
        return None


class TokenIds(tuple[int, ...]):
    """Token ids to which a list can be added, as to vLLM's; the sum is a list."""

    @overload  # type: ignore[override]
    def __add__(self, other: list[int]) -> list[int]: ...
    @overload
    def __add__(self, other: tuple[int, ...]) -> tuple[int, ...]: ...
    @override
    def __add__(self, other: Sequence[int]) -> Sequence[int]:
        return [*self, *other] if isinstance(other, list) else super().__add__(tuple(other))

    def __radd__(self, other: list[int]) -> list[int]:
        return [*other, *self]


class ModelConfig(NamedTuple):
    """The part of vLLM's ``ModelConfig`` that LightRFT's trainers read."""

    max_model_len: int


class LLMEngine(NamedTuple):
    """The part of vLLM's ``LLMEngine`` that LightRFT's trainers read, for any engine."""

    model_config: ModelConfig

    @classmethod
    def of(cls, max_model_len: int | None) -> "LLMEngine":
        """Return the ``LLMEngine`` of an engine whose sequences have at most ``max_model_len`` tokens; None: no limit."""
        return cls(ModelConfig(sys.maxsize if max_model_len is None else max_model_len))


def recognised_by_lightrft(sampler: Sampler[int]) -> None:
    """Make ``sampler`` an instance of LightRFT's ``DistributedSampler`` too, if a script has imported that.

    LightRFT's trainers call ``loader.sampler.set_epoch(epoch, consumed_samples)`` only then.
    """
    theirs = getattr(sys.modules.get("lightrft.utils"), "DistributedSampler", None)
    if isinstance(theirs, type) and not isinstance(sampler, theirs):
        ours = type(sampler)
        sampler.__class__ = type(ours.__name__, (ours, theirs), {"__module__": ours.__module__})
