"""A copy of the actor inside this process, for engines that have no server: filled by the weight stream."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightrft.config import EngineError
from lightrft.strategy.rollout import saved_form
from lightrft.strategy.rollout.engine import EngineRequest
from lightrft.strategy.rollout.weights import Bucket
from lightrft.strategy.training.modules import replace_tensors


def end_ids_of(*holders: Any) -> frozenset[int]:
    """End-of-sequence token ids of configurations and tokenizers, None among them too."""
    found = [getattr(holder, "eos_token_id", None) for holder in holders]
    return frozenset(token for it in found if it is not None for token in ([it] if isinstance(it, int) else it))


class EmbeddedModel:
    """The actor's architecture with weights of its own, in the type in which the actor computes."""

    def __init__(self, request: EngineRequest, engine: str) -> None:
        if request.skeleton is None:
            raise EngineError(
                f"engine {engine!r} runs the actor's own architecture in this process, and was given no actor; pass a "
                f"prepared one: setup_inference_engine(args, {engine!r}, actor=actor)"
            )
        self.module = request.skeleton.eval().requires_grad_(False)
        self._device = request.device
        self._dtype = torch.bfloat16 if request.config.bf16 else torch.float32
        tensors = saved_form.saved_tensors(self.module)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.expected: Mapping[str, torch.Size] = saved_form.saved_shapes(self.module, shapes)

    @property
    def end_ids(self) -> frozenset[int]:
        """End-of-sequence token ids, by the model's own configuration."""
        return end_ids_of(getattr(self.module, "generation_config", None), getattr(self.module, "config", None))

    def load(self, buckets: Iterable[Bucket]) -> None:
        """Copy the stream in place, taking memory first where there is none."""
        self._allocate()
        own = saved_form.saved_tensors(self.module)
        for bucket in buckets:
            for name, tensor in saved_form.restore(self.module, dict(bucket)).items():
                own[name].data.copy_(tensor)

    def drop(self) -> None:
        """Give the weights' memory back; buffers stay."""
        replace_tensors(self.module, lambda tensor: torch.empty_like(tensor, device="meta"), nn.Parameter)

    def move(self, device: torch.device) -> None:
        """Move what is not dropped."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)

    def logits(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits of a forward, whether the model returns them or an output that has them."""
        output = self.module(*args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output.logits

    def _allocate(self) -> None:
        replace_tensors(self.module, self._filled, torch.Tensor)

    def _filled(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for a tensor that has none; one that has some, on the device."""
        if not tensor.is_meta:
            return tensor.to(self._device)
        dtype = self._dtype if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, dtype=dtype, device=self._device)
