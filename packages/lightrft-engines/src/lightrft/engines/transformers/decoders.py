"""Forward passes over the sequences of a batch: with a key-value cache, or without.

The cache is used only where transformers' generic one keeps all that a model remembers, separately for each sequence, and
padding on the left does not change what the model computes. Without a cache, each token costs a whole forward pass.

Shapes: B sequences, T positions so far (with a cache, prompts are padded on the left), V vocabulary.
"""

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class Decoder(Protocol):
    """The sequences of a batch, which grow by a token at a time."""

    def start(self, prompts: Sequence[Sequence[int]], samples: int) -> torch.Tensor:
        """Begin ``samples`` sequences with each prompt, those of one prompt adjacent. Returns logits, as `extend`."""

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all sequences but those at ``indices``."""

    def extend(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to each sequence. Returns the logits (B, V), fp32, after the last position of each."""


def decoder_of(model: PreTrainedModel, device: torch.device) -> Decoder:
    """The fastest decoder that computes ``model`` correctly on ``device``."""
    return CachedDecoder(model, device) if caches_all(model) else PlainDecoder(model, device)


def caches_all(model: PreTrainedModel) -> bool:
    """Whether a `DynamicCache` holds all that ``model`` remembers of earlier tokens, and padding on the left is exact.

    It does not for a model with its own state or with linear attention, such as Mamba, RecurrentGemma or Qwen3-Next,
    nor for one whose tokens attend to later ones, such as BERT without ``is_decoder``. Padding is exact if the model takes
    positions, or derives them from the attention mask (ALiBi).
    """
    if getattr(model.config, "is_decoder", None) is False and _looks_ahead(model):
        return False
    parameters = inspect.signature(model.forward).parameters
    placed = "position_ids" in parameters or model.config.model_type in ("bloom", "mpt")
    if "past_key_values" not in parameters or not placed or getattr(model, "_is_stateful", False):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _looks_ahead(model: PreTrainedModel) -> bool:
    return any(getattr(module, "is_causal", True) is False for module in model.modules())


class CachedDecoder:
    """Reads each prompt once, and then one token of each sequence at a time."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model, self._device = model, device
        self._cache = DynamicCache(config=model.config)

    def start(self, prompts: Sequence[Sequence[int]], samples: int) -> torch.Tensor:
        width = max(map(len, prompts))
        tokens_BT = torch.tensor(
            [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=self._device
        )
        self._mask_BT = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self._device
        )
        logits_BV = self._forward(tokens_BT, (self._mask_BT.cumsum(dim=1) - 1).clamp(min=0))
        if samples > 1:
            self._cache.batch_repeat_interleave(samples)
        self._mask_BT = self._mask_BT.repeat_interleave(samples, dim=0)
        return logits_BV.repeat_interleave(samples, dim=0)

    def keep(self, indices: Sequence[int]) -> None:
        indices_B = torch.tensor(indices, device=self._device)
        self._cache.batch_select_indices(indices_B)
        self._mask_BT = self._mask_BT[indices_B]

    def extend(self, tokens: Sequence[int]) -> torch.Tensor:
        self._mask_BT = torch.nn.functional.pad(self._mask_BT, (0, 1), value=1)
        tokens_B1 = torch.tensor(tokens, device=self._device)[:, None]
        return self._forward(tokens_B1, self._mask_BT.sum(dim=1, keepdim=True) - 1)

    def _forward(self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=tokens_BT, attention_mask=self._mask_BT, position_ids=positions_BT,
            past_key_values=self._cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return _last(output)


class PlainDecoder:
    """Reads the whole sequences for each token. Those of one length form a forward pass, so that nothing is padded."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model, self._device = model, device
        self._sequences: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]], samples: int) -> torch.Tensor:
        self._sequences = [list(prompt) for prompt in prompts]
        logits_BV = self._forward()
        self._sequences = [list(prompt) for prompt in prompts for _ in range(samples)]
        return logits_BV.repeat_interleave(samples, dim=0)

    def keep(self, indices: Sequence[int]) -> None:
        self._sequences = [self._sequences[index] for index in indices]

    def extend(self, tokens: Sequence[int]) -> torch.Tensor:
        for sequence, token in zip(self._sequences, tokens, strict=True):
            sequence.append(token)
        return self._forward()

    def _forward(self) -> torch.Tensor:
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, sequence in enumerate(self._sequences):
            by_length[len(sequence)].append(index)
        parts, order = [], []
        for indices in by_length.values():
            tokens_BT = torch.tensor([self._sequences[index] for index in indices], device=self._device)
            parts.append(_last(self._model(input_ids=tokens_BT, use_cache=False)))
            order += indices
        return torch.cat(parts)[torch.tensor(order, device=self._device).argsort()]


def _last(output: Any) -> torch.Tensor:
    return cast(torch.Tensor, output.logits[:, -1].float())
