"""The embedded engine: generates with transformers in this process. It needs no server and runs on any device.

Each rank has a copy of the actor and completes its own prompts, in batches; a prompt with several samples is read once.
With a seed, a completion depends only on the seed, its prompt and its sample number, not on the batch or the rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from typing_extensions import override

from lightrft.config import ConfigError, EngineError
from lightrft.engines.model_source import max_model_len_of, opening, tokenizer_at, vocab_size_of
from lightrft.engines.settings import EngineSettings
from lightrft.engines.transformers.batch import Batch, Row
from lightrft.strategy.engine import (
    Completion,
    EmbeddedEngine,
    EngineCapabilities,
    EngineRequest,
    Prompt,
    Sampling,
    check_decoder_only,
    eos_token_ids_of,
    random_key,
)

MAX_SEQUENCES = 256
"""Sequences that are decoded together, unless ``engine_max_sequences`` says otherwise."""


class TransformersEngine(EmbeddedEngine):
    """Generates with transformers from a copy of the actor, or from the model at ``pretrain``."""

    capabilities = EngineCapabilities(stop_strings=False, seeds_by_prompt=True, sleep_levels=frozenset({1, 2}))

    def __init__(self, request: EngineRequest) -> None:
        settings = EngineSettings.of(request.config)
        directory = None if request.model_path is None else Path(request.model_path)
        if settings.arguments:
            raise ConfigError(
                f"engine_arguments: expected none for engine 'transformers', got {sorted(settings.arguments)}. Leave them out"
            )
        has_weights = request.meta_model is None
        super().__init__(_with_model(request) if has_weights else request, "transformers", has_weights=has_weights)
        if not isinstance(self._model.module, PreTrainedModel):
            raise EngineError(
                f"setup_inference_engine: engine 'transformers' expected a transformers model as actor, got a "
                f"{type(self._model.module).__name__}. Use engine 'fake', which takes any module"
            )
        _report_no_routers(self._model.module.config)
        self._tokenizer = None if directory is None else tokenizer_at(directory, trusted=settings.trust_remote_code)
        self.vocab_size = vocab_size_of(self._model.module.config)
        self.max_model_len = max_model_len_of(self._model.module.config, settings, directory)
        self._limit = settings.max_sequences or MAX_SEQUENCES

    @classmethod
    @override
    def build(cls, request: EngineRequest) -> Self:
        if request.group is not None:
            raise EngineError(
                f"engine_tp_size: expected 1 for engine 'transformers', which has no tensor parallelism, got "
                f"{request.config.engine_tp_size}. Use engine_tp_size=1"
            )
        return cls(request)

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        seed = self._call_seed(sampling)
        tokens = [self._tokens(prompt) for prompt in prompts]
        self._check_room(tokens)
        eos = frozenset() if sampling.ignore_eos else self.eos_token_ids | eos_token_ids_of(self._tokenizer)
        ends = eos | frozenset(sampling.stop_token_ids)
        batch = Batch(self._model.module, sampling, ends, self._device, max_model_len=self.max_model_len)
        rows: dict[int, list[Row]] = {}
        for group in self._groups(tokens, sampling.n):
            keys = [[random_key(seed, tokens[index], sample) for sample in range(sampling.n)] for index in group]
            done = batch.complete([tokens[index] for index in group], keys)
            for position, index in enumerate(group):
                rows[index] = done[position * sampling.n : (position + 1) * sampling.n]
        return [self._completion(row, sampling) for index in range(len(tokens)) for row in rows[index]]

    def _groups(self, tokens: Sequence[Sequence[int]], samples: int) -> Iterator[list[int]]:
        """Indices of the prompts, sorted by length, in groups that are decoded together."""
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        size = max(1, self._limit // samples)
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.token_ids:
            return prompt.token_ids
        if prompt.text and self._tokenizer is not None:
            return tuple(self._tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
        raise EngineError(
            "generate: engine 'transformers' expected token ids, got text and has no tokenizer for it. Pass token ids, or "
            "a model directory with a tokenizer as `pretrain`"
        )

    def _completion(self, row: Row, sampling: Sampling) -> Completion:
        text = None
        if self._tokenizer is not None:
            text = self._tokenizer.decode(row.output, skip_special_tokens=sampling.skip_special_tokens)
        return Completion(
            prompt_token_ids=tuple(row.prompt),
            output_token_ids=tuple(row.output),
            logprobs=tuple(row.logprobs),
            finish_reason="stop" if row.stopped else "length",
            weight_version=self.weight_version,
            text=text,
        )


def _report_no_routers(config: PretrainedConfig) -> None:
    """Turn off ``output_router_logits`` in the engine's copy: its loss does not work with a cache, and is not needed."""
    for part in (config, config.get_text_config()):
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False


def _with_model(request: EngineRequest) -> EngineRequest:
    """``request`` with the model at its path, weights included, in place of the actor on the meta device."""
    if request.model_path is None:
        raise EngineError(
            "setup_inference_engine: engine 'transformers' expected a model or an actor, got neither. Pass a model "
            "directory as `pretrain`, or setup_inference_engine(..., actor=actor)"
        )
    dtype = torch.bfloat16 if request.config.bf16 else torch.float32
    trusted = EngineSettings.of(request.config).trust_remote_code
    with opening(request.model_path):
        config = AutoConfig.from_pretrained(request.model_path, local_files_only=True, trust_remote_code=trusted)
        check_decoder_only(config, "transformers")
        model = AutoModelForCausalLM.from_pretrained(
            request.model_path, config=config, dtype=dtype, local_files_only=True, trust_remote_code=trusted
        )
    return replace(request, group=None, meta_model=model.to(request.device))
