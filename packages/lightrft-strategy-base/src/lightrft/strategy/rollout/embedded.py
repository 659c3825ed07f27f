"""Engines without a server: a copy of the actor in this process, filled by the weight stream."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from typing_extensions import override

from lightrft.config import EngineError
from lightrft.strategy.backend.modules import replace_tensors
from lightrft.strategy.models import state_dict_adapter
from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.rollout.engine import EngineBase, EngineRequest, Part
from lightrft.strategy.rollout.sampling import WITHOUT_EFFECT, Sampling


def eos_token_ids_of(*sources: object) -> frozenset[int]:
    """The end-of-sequence token ids that configurations and tokenizers name; ``sources`` may contain None."""
    named = [getattr(source, "eos_token_id", None) for source in sources]
    return frozenset(token for ids in named if ids is not None for token in ([ids] if isinstance(ids, int) else ids))


def eos_token_ids_of_model(module: nn.Module) -> frozenset[int]:
    """The end-of-sequence token ids in the generation configuration and the configuration of a model, as they are now."""
    return eos_token_ids_of(getattr(module, "generation_config", None), getattr(module, "config", None))


def changed_settings(module: nn.Module, before: nn.Module) -> str:
    """Return the generation settings of ``module`` that change tokens and differ from those ``before``, but not end tokens."""
    configs = (getattr(model, "generation_config", None) for model in (module, before))
    given, earlier = ({} if config is None else vars(config) for config in configs)
    return ", ".join(
        f"{name}={given.get(name)!r}"
        for name in {**given, **earlier}
        if given.get(name) != earlier.get(name) and name != "eos_token_id" and not name.startswith(WITHOUT_EFFECT)
    )


def check_decoder_only(config: object, engine: str) -> None:
    """Raise `EngineError` if ``config`` is that of an encoder-decoder, which the engine named ``engine`` cannot prompt."""
    if getattr(config, "is_encoder_decoder", False):
        raise EngineError(
            f"setup_inference_engine: engine {engine!r} expected a decoder-only model, got an encoder-decoder "
            f"({getattr(config, 'model_type', type(config).__name__)}). Engines continue a prompt; generate with "
            f"model.generate, or use a causal language model"
        )


def weight_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes, as in a checkpoint, of the weights that a sync of ``module`` delivers."""
    tensors = state_dict_adapter.saved_tensors(module)
    return state_dict_adapter.saved_shapes(module, {name: tensor.shape for name, tensor in tensors.items()})


class EmbeddedModel:
    """The actor's architecture with separate weights, in the dtype in which the actor computes."""

    def __init__(self, request: EngineRequest, engine: str) -> None:
        """Use the actor of ``request``, for the engine named ``engine``. Raises `EngineError` if there is none."""
        if request.meta_model is None:
            raise EngineError(
                f"setup_inference_engine: engine {engine!r} expected an actor, whose architecture it runs in this "
                f"process, got none. Pass a prepared one: setup_inference_engine(args, {engine!r}, actor=actor)"
            )
        check_decoder_only(getattr(request.meta_model, "config", None), engine)
        self.module = request.meta_model.eval().requires_grad_(False)
        self._device = request.device
        self._dtype = torch.bfloat16 if request.config.bf16 else torch.float32
        self.expected: Mapping[str, torch.Size] = weight_shapes(self.module)

    def load(self, buckets: Iterable[Bucket]) -> None:
        """Copy the weight stream in place. Allocates memory first if there is none."""
        self._allocate()
        targets = state_dict_adapter.saved_tensors(self.module)
        for bucket in buckets:
            for name, tensor in state_dict_adapter.restore(self.module, dict(bucket)).items():
                targets[name].data.copy_(tensor)

    def drop(self) -> None:
        """Free the weights' memory; buffers stay."""
        replace_tensors(self.module, lambda tensor: torch.empty_like(tensor, device="meta"), nn.Parameter)

    def move(self, device: torch.device) -> None:
        """Move all tensors that have memory to ``device``."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)

    def logits(self, *args: object, **kwargs: object) -> torch.Tensor:
        """The logits of a forward pass, for models that return a tensor or an output with ``logits``."""
        output = self.module(*args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output.logits

    def _allocate(self) -> None:
        replace_tensors(self.module, self._filled, torch.Tensor)

    def _filled(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; a new, uninitialised one if it was on the meta device."""
        if not tensor.is_meta:
            return tensor.to(self._device)
        dtype = self._dtype if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, dtype=dtype, device=self._device)


class EmbeddedEngine(EngineBase):
    """The hooks that engines with an `EmbeddedModel` share; a subclass adds `build` and `_generate`."""

    def __init__(self, request: EngineRequest, engine: str, *, has_weights: bool) -> None:
        """Use the actor of ``request``, for the engine named ``engine``; ``has_weights``: see `EngineBase`."""
        super().__init__(has_weights=has_weights)
        self._model = EmbeddedModel(request, engine)
        self.eos_token_ids = eos_token_ids_of_model(self._model.module)
        self._device = request.device
        self._stream = (request.config.seed, request.rank)
        self._calls = 0

    def _call_seed(self, sampling: Sampling) -> int:
        """The seed of the next call. Without ``sampling.seed`` it differs by call and rank, and repeats in a new run."""
        self._calls += 1
        return sampling.seed if sampling.seed is not None else hash((*self._stream, self._calls))

    @property
    @override
    def expected_weights(self) -> Mapping[str, torch.Size]:
        return self._model.expected

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        self._model.load(buckets)

    @override
    def _sleep(self, level: int) -> None:
        if level == 2:
            self._model.drop()
        else:
            self._model.move(torch.device("cpu"))

    @override
    def _wake(self, parts: frozenset[Part]) -> None:
        if "weights" in parts:
            self._model.move(self._device)

    @override
    def _shutdown(self) -> None:
        self._model.drop()
