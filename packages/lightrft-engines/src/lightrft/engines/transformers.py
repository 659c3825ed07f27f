"""The embedded engine: generation with transformers in this process. No server, runs anywhere.

Each rank has a copy of the actor and completes its own prompts: batched, padded on the left, a prompt read
once for all its samples. With a seed, a completion depends on the seed, its prompt and its number alone, so
that it is the same in whatever batch and on whatever rank it is drawn.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from typing_extensions import override

from lightrft.config import ConfigError, EngineError
from lightrft.engines.batch import Batch, Row
from lightrft.engines.settings import EngineSettings
from lightrft.engines.source import longest_sequence, opening, tokenizer_at, vocabulary_of
from lightrft.strategy import Completion, EngineBase, EngineCapabilities, EngineRequest, Prompt, Sampling
from lightrft.strategy.rollout.embedded import EmbeddedModel, end_ids_of
from lightrft.strategy.rollout.engine import Part
from lightrft.strategy.rollout.sampling import stream_key
from lightrft.strategy.rollout.weights import Bucket

MAX_SEQUENCES = 256
"""Sequences that are decoded together, unless ``engine_max_sequences`` among the extra arguments says otherwise."""


class TransformersEngine(EngineBase):
    """Generates with transformers from a copy of the actor, or from the model at ``pretrain``."""

    def __init__(self, request: EngineRequest) -> None:
        settings, directory = (
            EngineSettings.of(request.config),
            None if request.model_path is None else Path(request.model_path),
        )
        if settings.arguments:
            raise ConfigError("engine_arguments: engine 'transformers' has no arguments of its own; leave them out")
        super().__init__(has_weights=request.skeleton is None)
        self._device = request.device
        self._model = EmbeddedModel(request if request.skeleton is not None else _with_model(request), "transformers")
        if not isinstance(self._model.module, PreTrainedModel):
            raise EngineError(
                f"engine 'transformers' generates with transformers models, and the actor is a "
                f"{type(self._model.module).__name__}; use engine 'fake', which takes any module"
            )
        trusted = settings.trust_remote_code
        self._tokenizer: Any = None if directory is None else tokenizer_at(directory, trusted=trusted)
        self.vocabulary = vocabulary_of(self._model.module.config)
        self.longest = longest_sequence(self._model.module.config, settings, directory)
        self._limit = settings.max_sequences or MAX_SEQUENCES
        self._stream = (request.config.seed, request.rank)
        self._calls = 0
        self.capabilities = EngineCapabilities(stop_strings=False, seeds_by_prompt=True, sleep_levels=frozenset({1, 2}))

    @classmethod
    @override
    def build(cls, request: EngineRequest) -> Self:
        if request.group is not None:
            raise EngineError("engine 'transformers' has no tensor parallelism; use engine_tp_size=1")
        return cls(request)

    @property
    @override
    def expected_weights(self) -> Mapping[str, torch.Size]:
        return self._model.expected

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        self._model.load(buckets)

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        self._calls += 1
        # Without a seed every call and rank draws something else, and a run repeats.
        seed = sampling.seed if sampling.seed is not None else hash((*self._stream, self._calls))
        tokens = [self._tokens(prompt) for prompt in prompts]
        self._check_room(tokens)
        own = frozenset() if sampling.ignore_eos else self._model.end_ids | end_ids_of(self._tokenizer)
        ends = own | frozenset(sampling.stop_token_ids)
        batch = Batch(self._model.module, sampling, ends, self._device, longest=self.longest)
        rows: dict[int, list[Row]] = {}
        for group in self._groups(tokens, sampling.n):
            keys = [[stream_key(seed, tokens[index], sample) for sample in range(sampling.n)] for index in group]
            done = batch.complete([tokens[index] for index in group], keys)
            for position, index in enumerate(group):
                rows[index] = done[position * sampling.n : (position + 1) * sampling.n]
        return [self._completion(row, sampling) for index in range(len(tokens)) for row in rows[index]]

    def _groups(self, tokens: Sequence[Sequence[int]], samples: int) -> Iterator[list[int]]:
        """Indices of the prompts, those of like length together, as many as may be decoded at once."""
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
            "engine 'transformers': a prompt has no token ids, and there is no tokenizer for its text; pass token ids, or "
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


def _with_model(request: EngineRequest) -> EngineRequest:
    """``request`` with the model at its path, weights and all, in place of the actor's skeleton."""
    if request.model_path is None:
        raise EngineError(
            "engine 'transformers' was given neither an actor nor a model; pass setup_inference_engine(..., actor=actor), "
            "or a model directory as `pretrain`"
        )
    dtype = torch.bfloat16 if request.config.bf16 else torch.float32
    with opening(request.model_path):
        model = AutoModelForCausalLM.from_pretrained(
            request.model_path, dtype=dtype, local_files_only=True,
            trust_remote_code=EngineSettings.of(request.config).trust_remote_code,
        )  # fmt: skip
    return EngineRequest(
        config=request.config, device=request.device, rank=request.rank, group=None, model_path=request.model_path,
        skeleton=model.to(request.device),
    )  # fmt: skip
