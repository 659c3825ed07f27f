"""The contract of rollout engines: prompts in, completions out, weights by stream.

`RolloutEngine` is the interface that a strategy uses. `EngineBase` implements the state that all engines share (awake or
asleep, stale or not, the version of the weights) over a few hooks, which an adapter overrides.
"""

import functools
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, ParamSpec, Protocol, Self, TypeVar, final, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn

from lightrft.config import ArgumentError, EngineError, LightRFTError, StaleWeightsError, StrategyConfig
from lightrft.strategy.compat import LLMEngine, TokenIds
from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.registry import ENGINES, load
from lightrft.strategy.rollout.sampling import Sampling

Part = Literal["weights", "kv_cache"]
"""A part of an engine's memory that `wake_up` can allocate separately."""
PARTS: frozenset[Part] = frozenset({"weights", "kv_cache"})
"""All parts."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: token ids, or text, or both, with its images and videos.

    If both are given, engines use the ids; empty ids with a text count as None.

    Raises:
        ArgumentError: Neither token ids nor text is given.
    """

    token_ids: tuple[int, ...] | None = None
    """With images or videos: before placeholders are expanded."""
    text: str | None = None
    images: tuple[Any, ...] = ()
    """In any form that the engine's processor accepts."""
    videos: tuple[Any, ...] = ()
    audios: tuple[Any, ...] = ()
    """Each an array of samples with its sampling rate, in Hz."""

    def __post_init__(self) -> None:
        if self.token_ids is None and self.text is None:
            raise ArgumentError("Prompt: expected token_ids or text, got neither. Pass at least one of them")
        if not self.token_ids and self.text is not None:
            object.__setattr__(self, "token_ids", None)

    @property
    def has_media(self) -> bool:
        """Whether there are images, videos or audio."""
        return bool(self.images or self.videos or self.audios)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion of one prompt."""

    prompt_token_ids: tuple[int, ...]
    """As given, or of the given text; placeholders of images and videos are not expanded. Without tokens that
    ``truncate_prompt_tokens`` removed. ``prompt_token_ids + [...]`` and
    ``output_token_ids + [...]`` are lists, as with vLLM."""
    output_token_ids: tuple[int, ...]
    """The new tokens, with the end-of-sequence token if there is one."""
    logprobs: tuple[float, ...] | None
    """Log-probability (natural logarithm) of each new token under the model, before temperature and filters."""
    finish_reason: Literal["stop", "length"]
    """"stop" after an end-of-sequence or stop token or a stop string; "length" at the limit."""
    weight_version: int
    """`RolloutEngine.weight_version` at generation."""
    text: str | None = None
    """The new tokens as text, if the engine has a tokenizer."""

    def __post_init__(self) -> None:
        for name in ("prompt_token_ids", "output_token_ids"):
            object.__setattr__(self, name, TokenIds(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class EngineCapabilities:
    """What an engine supports beyond plain generation; it refuses the rest."""

    multimodal: bool = False
    """Accepts images and videos."""
    audio: bool = False
    """Accepts audio."""
    stop_strings: bool = False
    """Accepts ``Sampling.stop``."""
    seeds_by_prompt: bool = False
    """With a seed, a draw depends only on seed, prompt and sample, not on the batch."""
    sleep_levels: frozenset[int] = frozenset({1})
    """Level 1 keeps the weights in host memory; level 2 frees them."""


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """What an engine is built from."""

    config: StrategyConfig
    device: torch.device
    rank: int
    group: dist.ProcessGroup | None
    """The ranks that share the engine; None if every rank has its own."""
    model_path: str | None
    """A Hugging Face directory with the initial weights."""
    meta_model: nn.Module | None
    """The actor on the meta device: its architecture, for engines that run in this process."""

    @property
    def skeleton(self) -> nn.Module | None:
        """`meta_model` under its name in version 0.1; deprecated."""
        warnings.warn("EngineRequest.skeleton is called meta_model since version 0.2", DeprecationWarning, stacklevel=2)
        return self.meta_model


@runtime_checkable
class RolloutEngine(Protocol):
    """The interface through which a strategy uses an engine; see `EngineBase` for the details of each method."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """What it supports beyond plain generation."""

    @property
    def weight_version(self) -> int:
        """Number of committed weight syncs."""

    @property
    def awake(self) -> frozenset[Part]:
        """The parts that have memory."""

    @property
    def expected_weights(self) -> Mapping[str, torch.Size] | None:
        """Names and shapes in the checkpoint that it was built from; None if unknown."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Generate ``sampling.n`` completions of each prompt; those of one prompt are consecutive."""

    def update_weights(self, buckets: Iterable[Bucket]) -> None:
        """Load a full weight stream."""

    def invalidate_weights(self, why: str) -> None:
        """Revoke the last committed sync; the engine is stale until the next one."""

    def sleep(self, level: int = 1) -> None:
        """Free memory; see `EngineCapabilities.sleep_levels`."""

    def wake_up(self, parts: Collection[Part] | None = None) -> None:
        """Allocate memory again, for ``parts`` or for all."""

    def shutdown(self) -> None:
        """End the engine and everything it started. Idempotent."""


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _synchronized(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Serialize the calls of several threads with a lock."""

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with args[0]._lock:  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return call


_RENAMED = {"honours": "supported_settings", "vocabulary": "vocab_size", "longest": "max_model_len"}
"""Attributes of engines by their names in version 0.1, which are deprecated."""


def _renamed(old: str) -> property:
    """An attribute of an engine under its name in version 0.1."""
    new = _RENAMED[old]

    def warn(engine: object) -> None:
        words = f"{type(engine).__name__}.{old} is called {new} since version 0.2"
        warnings.warn(words, DeprecationWarning, stacklevel=3)

    def read(engine: object) -> Any:
        warn(engine)
        return getattr(engine, new)

    def write(engine: object, value: object) -> None:
        warn(engine)
        setattr(engine, new, value)

    return property(read, write)


class EngineBase(ABC):
    """The behaviour that all engines share, over a few hooks. It is thread-safe: a lock serializes the calls."""

    supported_settings: ClassVar[frozenset[str]] = frozenset()
    """The optional settings that this engine supports; see `lightrft.strategy.supported_settings`."""
    leader_only: ClassVar[bool] = False
    """Whether only the first of the ranks that share an engine holds it; otherwise all of them make the same calls."""
    capabilities: EngineCapabilities = EngineCapabilities()
    vocab_size: int | None = None
    """Size of the vocabulary; larger token ids are refused. None: the engine checks them itself."""
    max_model_len: int | None = None
    """Maximum tokens of a sequence, prompt included; a completion ends there with "length". None: no limit."""
    eos_token_ids: frozenset[int] = frozenset()
    """Token ids that end a sequence, in addition to those of a tokenizer. A strategy sets them to those of the actor whenever it
    passes one: when the engine is built, and with every sync."""
    vocabulary, longest = _renamed("vocabulary"), _renamed("longest")

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        for old, new in _RENAMED.items():
            if old in vars(cls):
                warnings.warn(f"{cls.__name__}.{old} is called {new} since version 0.2", DeprecationWarning, 2)
                setattr(cls, new, vars(cls)[old])

    def __init__(self, *, has_weights: bool) -> None:
        """Initialise the shared state: awake, and stale unless ``has_weights``.

        Args:
            has_weights: Whether the engine can generate before the first sync.
        """
        self._lock = threading.RLock()
        self._version = 0
        self._awake: frozenset[Part] = PARTS
        self._stale: str | None = None if has_weights else "it has received no weights yet"
        self._closed = False

    @classmethod
    @abstractmethod
    def build(cls, request: EngineRequest) -> Self:
        """Make the engine. All ranks of ``request.group`` call this.

        Raises:
            EngineError: A requirement of the engine is missing.
        """

    # Hooks

    @property
    @abstractmethod
    def expected_weights(self) -> Mapping[str, torch.Size] | None:
        """See `RolloutEngine`."""

    @abstractmethod
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Generate completions of ``prompts``, at least one. The engine is awake and not stale."""

    @abstractmethod
    def _load(self, buckets: Iterator[Bucket]) -> None:
        """Load all ``buckets``, and drop caches of the old weights. A bucket's tensors are valid until the next one."""

    @abstractmethod
    def _sleep(self, level: int) -> None:
        """Free memory."""

    @abstractmethod
    def _wake(self, parts: frozenset[Part]) -> None:
        """Allocate memory for ``parts``, which are asleep."""

    @abstractmethod
    def _shutdown(self) -> None:
        """End the engine and everything it started."""

    # Behaviour of all engines

    @property
    def llm_engine(self) -> LLMEngine:
        """What LightRFT's trainers read of vLLM's engine: ``llm_engine.model_config.max_model_len``."""
        return LLMEngine.of(self.max_model_len)

    @property
    def weight_version(self) -> int:
        return self._version

    @property
    def awake(self) -> frozenset[Part]:
        return self._awake

    @property
    def stale(self) -> str | None:
        """Why the engine must not generate before the next committed sync; None if it may."""
        return self._stale

    @final
    @_synchronized
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Generate ``sampling.n`` completions of each prompt.

        Args:
            prompts: Any number of prompts.
            sampling: The settings of all of them.

        Returns:
            The completions in the order of the prompts; those of one prompt are consecutive.

        Raises:
            StaleWeightsError: The weights are not those of a committed sync.
            EngineError: The engine is asleep or shut down, cannot take a prompt or a setting, or failed.
        """
        self._require_open("generate")
        if self._stale is not None:
            raise StaleWeightsError(
                f"{self._name}.generate: expected committed weights, but {self._stale}. Call "
                f"strategy.update_engine_weights(actor) first"
            )
        if self._awake != PARTS:
            raise EngineError(
                f"{self._name}.generate: expected an engine that is awake, but {', '.join(sorted(PARTS - self._awake))} are "
                f"asleep. Call wake_up first"
            )
        prompts = [self._truncated(prompt, index, sampling) for index, prompt in enumerate(prompts)]
        self._check(prompts, sampling)
        try:
            return self._generate(prompts, sampling) if prompts else []
        except LightRFTError:
            raise
        except Exception as error:
            raise EngineError(
                f"{self._name}.generate failed: {type(error).__name__}: {error}. See the cause above; if the engine has "
                f"ended, call setup_inference_engine again"
            ) from error

    @final
    @_synchronized
    def update_weights(self, buckets: Iterable[Bucket]) -> None:
        """Load a full weight stream. If it fails, the engine is stale until one succeeds.

        Args:
            buckets: Names as in a checkpoint, and full tensors; a bucket's tensors are valid until the next one.

        Raises:
            EngineError: A name is unknown, missing or duplicate, or a shape differs. Errors of loading pass unchanged.
        """
        self._require_open("update_weights")
        if "weights" not in self._awake:
            raise EngineError(
                f"{self._name}.update_weights: expected awake weights, got weights that are asleep. Call "
                f"wake_up(['weights']) first"
            )
        self._stale = "the last weight sync failed"
        self._load(checked_buckets(buckets, self.expected_weights, self._name))
        self._version += 1
        self._stale = None

    @final
    @_synchronized
    def invalidate_weights(self, why: str) -> None:
        """Revoke the last committed sync, which failed on another rank; the engine is stale until the next one.

        Args:
            why: Completes "expected committed weights, but ..." in the message of `generate`.
        """
        self._version -= 1
        self._stale = why

    @final
    @_synchronized
    def sleep(self, level: int = 1) -> None:
        """Free memory. Idempotent; a deeper level frees more.

        Args:
            level: One of ``capabilities.sleep_levels``. Level 2 frees the weights, so the engine is stale afterwards.

        Raises:
            EngineError: The engine does not have this level, or was shut down.
        """
        self._require_open("sleep")
        if level not in self.capabilities.sleep_levels:
            levels = ", ".join(map(str, sorted(self.capabilities.sleep_levels)))
            raise EngineError(
                f"{self._name}.sleep: expected one of the sleep levels that this engine supports ({levels or 'none'}), got "
                f"{level}. Pass a supported level, or use enable_engine_sleep=False"
            )
        if not self._awake and not (level == 2 and self._stale is None):
            return
        before = self._stale
        self._stale = "sleep(level=2) dropped the weights" if level == 2 else f"sleep(level={level}) failed"
        self._awake = frozenset()
        self._sleep(level)
        if level != 2:
            self._stale = before

    @final
    @_synchronized
    def wake_up(self, parts: Collection[Part] | None = None) -> None:
        """Allocate memory again. Idempotent.

        Args:
            parts: "weights", "kv_cache" or both. None: both.

        Raises:
            ArgumentError: Other parts were given.
            EngineError: The engine was shut down.
        """
        self._require_open("wake_up")
        wanted = PARTS if parts is None else frozenset(parts)
        if not wanted <= PARTS:
            raise ArgumentError(
                f"{self._name}.wake_up: expected parts among {sorted(PARTS)}, got {sorted(wanted - PARTS)}. Pass None for all"
            )
        missing = wanted - self._awake
        if missing:
            self._wake(missing)
            self._awake |= missing

    @final
    @_synchronized
    def shutdown(self) -> None:
        """End the engine and everything it started. Idempotent."""
        if not self._closed:
            self._closed, self._awake = True, frozenset()
            self._shutdown()

    # Guards

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _require_open(self, call: str) -> None:
        if self._closed:
            raise EngineError(
                f"{self._name}.{call}: expected a running engine, but it was shut down. Call "
                f"setup_inference_engine again"
            )

    def _truncated(self, prompt: Prompt, index: int, sampling: Sampling) -> Prompt:
        """Return ``prompt`` with its last ``truncate_prompt_tokens`` tokens only."""
        limit = sampling.truncate_prompt_tokens
        size = len(prompt.token_ids if prompt.token_ids is not None else (prompt.text or "").encode())  # tokens at most
        if limit is None or size <= limit:
            return prompt
        if prompt.token_ids is None or prompt.has_media:
            raise EngineError(
                f"{self._name}.generate: expected token ids without media, which truncate_prompt_tokens={limit} can shorten, "
                f"got {'media' if prompt.has_media else 'text'} in prompt {index}. Shorten it, or pass a larger "
                f"truncate_prompt_tokens"
            )
        return replace(prompt, token_ids=prompt.token_ids[-limit:], text=None)

    def _check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        for index, prompt in enumerate(prompts):
            if not prompt.token_ids and not prompt.text:
                raise EngineError(
                    f"{self._name}.generate: expected at least one token in each prompt, got none in prompt {index}. Start it "
                    f"with a beginning-of-sequence token, for example"
                )
        if not self.capabilities.multimodal and any(prompt.images or prompt.videos for prompt in prompts):
            raise EngineError(
                f"{self._name}.generate: expected prompts without images and videos, got some, which this engine does not "
                f"support. Use a multimodal engine"
            )
        if not self.capabilities.audio and any(prompt.audios for prompt in prompts):
            raise EngineError(
                f"{self._name}.generate: expected prompts without audio, got some, which this engine does not support. Use "
                f"engine 'vllm'"
            )
        if sampling.stop and not self.capabilities.stop_strings:
            raise EngineError(
                f"{self._name}.generate: expected no stop strings, which this engine does not support here, got "
                f"{list(sampling.stop)}. Use stop_token_ids"
            )
        self._check_room([prompt.token_ids or () for prompt in prompts])
        if self.vocab_size is not None:
            largest = max(sampling.stop_token_ids, default=0)
            if largest >= self.vocab_size:
                raise EngineError(
                    f"{self._name}.generate: expected stop_token_ids below {self.vocab_size}, the size of the model's vocabulary, "
                    f"got {largest}. Remove it"
                )
            for index, prompt in enumerate(prompts):
                largest = max(prompt.token_ids or (0,))
                if largest >= self.vocab_size:
                    raise EngineError(
                        f"{self._name}.generate: expected token ids below {self.vocab_size}, the size of the model's "
                        f"vocabulary, got {largest} in prompt {index}. Use the model's tokenizer"
                    )

    def _check_room(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise `EngineError` unless every prompt leaves room for a token."""
        for index, tokens in enumerate(prompts):
            if self.max_model_len is not None and len(tokens) >= self.max_model_len:
                raise EngineError(
                    f"{self._name}.generate: {too_long_message(f'prompt {index}', len(tokens), self.max_model_len)}"
                )


def too_long_message(prompt: str, tokens: int, max_model_len: int) -> str:
    """Return the message for a prompt that leaves no room for a token."""
    return f"expected {prompt} to have fewer tokens than max_model_len ({max_model_len}), got {tokens}. Shorten it"


def engine_class(name: str) -> type[EngineBase]:
    """Return the engine registered as ``name``, or found at ``module:attribute``."""
    return load(ENGINES, name, EngineBase)  # type: ignore[type-abstract]


def is_engine(candidate: object) -> bool:
    """Return whether ``candidate`` is a rollout engine rather than a model."""
    return isinstance(candidate, RolloutEngine)


def checked_buckets(
    buckets: Iterable[Bucket], expected: Mapping[str, torch.Size] | None, name: str
) -> Iterator[Bucket]:
    """Yield ``buckets`` unchanged, checked against the checkpoint of the engine ``name``.

    Raises:
        EngineError: A weight is unknown, duplicate or of another shape, or, at the end, missing.
    """
    seen: set[str] = set()
    for bucket in buckets:
        _check_bucket(bucket, seen, expected, name)
        yield bucket
    missing = [weight for weight in expected or () if weight not in seen]
    if missing:
        raise EngineError(
            f"{name}.update_weights: expected all weights of the engine's checkpoint, got a stream without {len(missing)} of "
            f"them ({missing[0]} first). Sync the model that the engine was built for"
        )


def _check_bucket(bucket: Bucket, seen: set[str], expected: Mapping[str, torch.Size] | None, name: str) -> None:
    for weight, tensor in bucket:
        if weight in seen:
            raise EngineError(
                f"{name}.update_weights: expected every weight once, got {weight} twice. Send each weight in one bucket"
            )
        if expected is not None and weight not in expected:
            raise EngineError(
                f"{name}.update_weights: expected weights of the engine's checkpoint, got {weight}, which is not in it. Sync "
                f"the model that the engine was built for"
            )
        if expected is not None and tensor.shape != expected[weight]:
            raise EngineError(
                f"{name}.update_weights: expected {weight} of shape {tuple(expected[weight])}, as in the engine's "
                f"checkpoint, got {tuple(tensor.shape)}. Sync the model that the engine was built for"
            )
        seen.add(weight)
