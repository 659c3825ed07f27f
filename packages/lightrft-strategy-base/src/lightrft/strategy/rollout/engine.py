"""What a rollout engine is: prompts in, completions out, weights in between.

`RolloutEngine` is what a strategy asks of an engine. `EngineBase` owns what all engines promise alike
(asleep or awake, stale or not, the version of the weights), once; an adapter fills in a few hooks.
"""

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, ParamSpec, Protocol, Self, TypeVar, final, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn

from lightrft.config import ArgumentError, EngineError, LightRFTError, StaleWeightsError, StrategyConfig
from lightrft.strategy.rollout.sampling import Sampling
from lightrft.strategy.rollout.weights import Bucket

Part = Literal["weights", "kv_cache"]
PARTS: frozenset[Part] = frozenset({"weights", "kv_cache"})
"""What sleep may give back, and wake_up brings back, each for itself."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: token ids, or text, or both, with the images and videos that belong to it.

    Where both are given, engines take the ids; none at all, beside a text, are as good as None. With images or videos,
    ``token_ids`` are those before placeholders are expanded.
    """

    token_ids: tuple[int, ...] | None = None
    text: str | None = None
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.token_ids is None and self.text is None:
            raise ArgumentError("a Prompt needs token_ids or text, and got neither")
        if not self.token_ids and self.text is not None:
            object.__setattr__(self, "token_ids", None)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion of one prompt."""

    prompt_token_ids: tuple[int, ...]
    """As given, or of the text as given: placeholders of images and videos are not expanded."""
    output_token_ids: tuple[int, ...]
    """The new tokens, the end-of-sequence token included where it was made."""
    logprobs: tuple[float, ...] | None
    """Log-probability of each new token under the model itself, before temperature and filters."""
    finish_reason: Literal["stop", "length"]
    weight_version: int
    """`RolloutEngine.weight_version` when this was made."""
    text: str | None = None
    """The new tokens as text, where the engine has a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class EngineCapabilities:
    """What an engine can do beyond plain generation; what it cannot, it refuses."""

    multimodal: bool = False
    """Takes images and videos."""
    stop_strings: bool = False
    """Takes ``Sampling.stop``."""
    seeds_by_prompt: bool = False
    """With a seed, the draw depends on seed, prompt and sample alone, not on the batch."""
    sleep_levels: frozenset[int] = frozenset({1})
    """1 keeps the weights in host memory, 2 drops them."""


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """What an engine is built from."""

    config: StrategyConfig
    device: torch.device
    rank: int
    group: dist.ProcessGroup | None
    """The ranks that share the engine; None where each has its own."""
    model_path: str | None
    """A Hugging Face directory with the weights to begin with."""
    skeleton: nn.Module | None
    """The actor on the meta device: its architecture, for engines that run in this process."""


@runtime_checkable
class RolloutEngine(Protocol):
    """What a strategy asks of an engine."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """What it can do beyond plain generation."""
        ...

    @property
    def weight_version(self) -> int:
        """Committed weight syncs so far."""
        ...

    @property
    def awake(self) -> frozenset[Part]:
        """The parts that are in place."""
        ...

    @property
    def expected_weights(self) -> Mapping[str, torch.Size] | None:
        """Names and shapes of the checkpoint that it was built from, or None where it cannot know them."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Complete each prompt ``sampling.n`` times, those of a prompt in a row."""
        ...

    def update_weights(self, buckets: Iterable[Bucket]) -> None:
        """Take a whole weight stream, as one session."""
        ...

    def revoke_weights(self, why: str) -> None:
        """Take the last committed sync back, and be stale until the next one."""
        ...

    def sleep(self, level: int = 1) -> None:
        """Give memory back; see `EngineCapabilities.sleep_levels`."""
        ...

    def wake_up(self, parts: Collection[Part] | None = None) -> None:
        """Take memory again, for ``parts`` or for all."""
        ...

    def shutdown(self) -> None:
        """End it, with whatever it started. May be called twice."""
        ...


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _in_turn(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """One call at a time, of whatever threads."""

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with args[0]._turn:  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return call


class EngineBase(ABC):
    """The promises that all engines keep alike, over a few hooks. Calls of several threads take turns."""

    honours: ClassVar[frozenset[str]] = frozenset()
    """The settings of some engines alone with which this one does something; see `lightrft.strategy.settings_check`."""
    leader_only: ClassVar[bool] = False
    """Of the ranks that share an engine, only the first holds it; else all call it alike."""
    capabilities: EngineCapabilities = EngineCapabilities()
    vocabulary: int | None = None
    """Token ids of prompts are below it; None: the engine finds out itself."""
    longest: int | None = None
    """Tokens of the longest sequence, prompt and all, at which a completion ends with "length"; None: no limit."""

    def __init__(self, *, has_weights: bool) -> None:
        """``has_weights``: whether there are weights to generate from before the first sync."""
        self._turn = threading.RLock()
        self._version = 0
        self._awake: frozenset[Part] = PARTS
        self._stale: str | None = None if has_weights else "it has had no weights yet"
        self._closed = False

    @classmethod
    @abstractmethod
    def build(cls, request: EngineRequest) -> Self:
        """Make the engine. Raises `EngineError` where what is needed is not there."""

    # Hooks

    @property
    @abstractmethod
    def expected_weights(self) -> Mapping[str, torch.Size] | None:
        """See `RolloutEngine`."""

    @abstractmethod
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Complete at least one prompt; awake and not stale."""

    @abstractmethod
    def _load(self, buckets: Iterator[Bucket]) -> None:
        """Take all of ``buckets``, and forget caches that older weights filled. A bucket's tensors live until the next."""

    @abstractmethod
    def _sleep(self, level: int) -> None:
        """Give memory back."""

    @abstractmethod
    def _wake(self, parts: frozenset[Part]) -> None:
        """Take memory for ``parts``, which are asleep."""

    @abstractmethod
    def _shutdown(self) -> None:
        """End it."""

    # The promises

    @property
    def weight_version(self) -> int:
        return self._version

    @property
    def awake(self) -> frozenset[Part]:
        return self._awake

    @property
    def stale(self) -> str | None:
        """Why the engine must not generate until a sync is committed, or None where it may."""
        return self._stale

    @final
    @_in_turn
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Complete each prompt ``sampling.n`` times, those of a prompt in a row.

        Raises `StaleWeightsError` where the weights are not those of a committed sync, `EngineError` where
        the engine is asleep or shut down.
        """
        self._require_open("generate")
        if self._stale is not None:
            raise StaleWeightsError(
                f"{self._name}: generate refused, since {self._stale}; sync first: strategy.update_engine_weights(actor)"
            )
        if self._awake != PARTS:
            raise EngineError(
                f"{self._name}: generate refused, since {', '.join(PARTS - self._awake)} are asleep; wake_up first"
            )
        self._check(prompts, sampling)
        try:
            return self._generate(prompts, sampling) if prompts else []
        except LightRFTError:
            raise
        except Exception as error:
            raise EngineError(f"{self._name}: generate failed: {type(error).__name__}: {error}") from error

    @final
    @_in_turn
    def update_weights(self, buckets: Iterable[Bucket]) -> None:
        """Take a whole weight stream. Unless it ends well, the engine is stale until one does.

        Raises `EngineError` where names are unknown, missing or come twice, and whatever loading raises.
        """
        self._require_open("update_weights")
        if "weights" not in self._awake:
            raise EngineError(
                f"{self._name}: update_weights refused, since the weights are asleep; wake_up(['weights']) first"
            )
        self._stale = "the last weight sync did not end well"
        self._load(checked(buckets, self.expected_weights, self._name))
        self._version += 1
        self._stale = None

    @final
    @_in_turn
    def revoke_weights(self, why: str) -> None:
        """Take the last committed sync back: the engine is stale, ``why`` says it, until the next one is committed.

        For syncs that count only where they ended well on every rank.
        """
        self._version -= 1
        self._stale = why

    @final
    @_in_turn
    def sleep(self, level: int = 1) -> None:
        """Give memory back. Again is the same as once, but a deeper level goes deeper."""
        self._require_open("sleep")
        if level not in self.capabilities.sleep_levels:
            able = sorted(self.capabilities.sleep_levels)
            raise EngineError(f"{self._name}: sleep(level={level}) is not among the levels {able} that it has")
        if not self._awake and not (level == 2 and self._stale is None):
            return
        kept = self._stale
        self._stale = "sleep(level=2) dropped the weights" if level == 2 else f"sleep(level={level}) did not end well"
        self._awake = frozenset()
        self._sleep(level)
        if level != 2:
            self._stale = kept

    @final
    @_in_turn
    def wake_up(self, parts: Collection[Part] | None = None) -> None:
        """Take memory again for ``parts`` ("weights", "kv_cache"), or for all. What is awake stays awake."""
        self._require_open("wake_up")
        wanted = PARTS if parts is None else frozenset(parts)
        if not wanted <= PARTS:
            raise ArgumentError(f"{self._name}: wake_up got {sorted(wanted - PARTS)}; allowed are {sorted(PARTS)}")
        missing = wanted - self._awake
        if missing:
            self._wake(missing)
            self._awake |= missing

    @final
    @_in_turn
    def shutdown(self) -> None:
        """End it, with whatever it started. May be called twice."""
        if not self._closed:
            self._closed, self._awake = True, frozenset()
            self._shutdown()

    # Guards

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _require_open(self, call: str) -> None:
        if self._closed:
            raise EngineError(f"{self._name}: {call} refused, since the engine was shut down; set up another one")

    def _check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        for index, prompt in enumerate(prompts):
            if not prompt.token_ids and not prompt.text:
                raise EngineError(f"{self._name}: prompt {index} is empty; give one token at least")
        if not self.capabilities.multimodal and any(prompt.images or prompt.videos for prompt in prompts):
            raise EngineError(f"{self._name} takes no images and no videos; use an engine that does")
        if sampling.stop and not self.capabilities.stop_strings:
            raise EngineError(f"{self._name} takes no stop strings here; use stop_token_ids")
        self._check_room([prompt.token_ids or () for prompt in prompts])
        if self.vocabulary is not None:
            largest = max(sampling.stop_token_ids, default=0)
            if largest >= self.vocabulary:
                raise EngineError(
                    f"{self._name}: {largest} is among stop_token_ids, and the model's vocabulary has {self.vocabulary}, from 0"
                )
            for index, prompt in enumerate(prompts):
                largest = max(prompt.token_ids or (0,))
                if largest >= self.vocabulary:
                    raise EngineError(
                        f"{self._name}: prompt {index} has token {largest}, and the model's vocabulary has "
                        f"{self.vocabulary}, from 0; make prompts with the model's own tokenizer"
                    )

    def _check_room(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise `EngineError` unless each of the prompts leaves room for a token."""
        for index, tokens in enumerate(prompts):
            if self.longest is not None and len(tokens) >= self.longest:
                raise EngineError(f"{self._name}: {too_long(f'prompt {index}', len(tokens), self.longest)}")


def too_long(prompt: str, tokens: int, longest: int) -> str:
    """What is wrong with a prompt that leaves no room."""
    return (
        f"{prompt} has {tokens} tokens, and a sequence may have {longest}, prompt and all; shorten it, so that there "
        f"is room for a token"
    )


def is_engine(candidate: object) -> bool:
    """Whether ``candidate`` is a rollout engine rather than a model."""
    return isinstance(candidate, RolloutEngine)


def checked(buckets: Iterable[Bucket], expected: Mapping[str, torch.Size] | None, name: str) -> Iterator[Bucket]:
    """``buckets`` as they are; raises `EngineError` on what is unknown, misshapen or twice, and, at the end, missing."""
    seen: set[str] = set()
    for bucket in buckets:
        _check_bucket(bucket, seen, expected, name)
        yield bucket
    missing = [weight for weight in expected or () if weight not in seen]
    if missing:
        raise EngineError(
            f"{name}: the weight stream lacks {len(missing)} weights of the checkpoint, {missing[0]} first"
        )


def _check_bucket(bucket: Bucket, seen: set[str], expected: Mapping[str, torch.Size] | None, name: str) -> None:
    for weight, tensor in bucket:
        if weight in seen:
            raise EngineError(f"{name}: the weight stream has {weight} twice")
        if expected is not None and weight not in expected:
            raise EngineError(f"{name}: the weight stream has {weight}, which its checkpoint has not")
        if expected is not None and tensor.shape != expected[weight]:
            wanted, got = tuple(expected[weight]), tuple(tensor.shape)
            raise EngineError(f"{name}: {weight} came with shape {got} where the checkpoint has {wanted}")
        seen.add(weight)
