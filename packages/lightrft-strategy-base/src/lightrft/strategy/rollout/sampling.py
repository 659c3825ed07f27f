"""Sampling settings, read from what a trainer passes, and drawing tokens.

`sample_tokens` draws by inverse CDF at a number in [0, 1) that is a hash. With a seed, the hash depends only on the seed,
the prompt and the index of the sample, so a prompt gets the same completion in any batch, order and rank.

Shapes in names: B is the batch, V the vocabulary.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self

import torch

from lightrft.config import ArgumentError, nearest

_ALIASES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
"""SGLang's names, and vLLM's for the same settings."""
_NEUTRAL = {
    "logprobs": (None, True, False, 0), "detokenize": (True, False), "no_stop_trim": (None, True, False),
    "spaces_between_special_tokens": (True, False),
}  # fmt: skip
"""Settings of engines that change what is returned, not what is drawn, with the values that change nothing here."""
_OF_GENERATION_CONFIG = {
    "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "num_return_sequences": "n", "stop_strings": "stop",
    "eos_token_id": "stop_token_ids", "repetition_penalty": "repetition_penalty",
}  # fmt: skip
"""transformers' names, and ours."""
_OF_DRAWING = ("temperature", "top_k", "top_p", "min_p")
"""Fields of a ``GenerationConfig`` that act with ``do_sample`` only."""
WITHOUT_EFFECT = (
    "use_cache", "cache_", "max_cache_len", "output_", "return_dict_in_generate", "pad_token_id", "bos_token_id",
    "decoder_start_token_id", "transformers_version", "compile_config", "disable_compile", "low_memory",
    "prefill_chunk_size", "continuous_batching_config", "renormalize_logits", "remove_invalid_values", "length_penalty",
    "early_stopping", "is_assistant", "num_assistant_", "assistant_", "target_lookbehind", "speculation_type", "_",
)  # fmt: skip
"""Beginnings of the names of fields that change no token without beams and assistants."""
_NEUTRAL_AT_1 = ("num_beams", "num_beam_groups", "typical_p", "encoder_repetition_penalty", "guidance_scale")
_INTEGER, _REAL, _FLAG = (Integral, "an integer"), (Real, "a number"), (bool, "True or False")
_TYPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("n", "top_k", "max_tokens", "min_tokens"), _INTEGER),
    **dict.fromkeys(("temperature", "top_p", "min_p"), _REAL),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _REAL),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"), _FLAG),
    **dict.fromkeys(("seed", "truncate_prompt_tokens"), ((Integral, type(None)), "an integer or None")),
}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn.

    Names, defaults and meanings are those of vLLM, except the default of ``max_tokens``. Ranges are those that every
    engine accepts.

    Raises:
        ArgumentError: A value has the wrong type or is out of range.
    """

    n: int = 1
    """Completions of each prompt."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    """Draw from the smallest set of most likely tokens whose probabilities add up to at least this."""
    top_k: int = -1
    """Draw from this many of the most likely tokens; -1 or 0 means all."""
    min_p: float = 0.0
    """Draw from tokens whose probability is at least this fraction of the largest one."""
    max_tokens: int = 128
    """Maximum number of new tokens."""
    min_tokens: int = 0
    """Number of new tokens before which no end-of-sequence or stop token is drawn."""
    truncate_prompt_tokens: int | None = None
    """Keep at most this many tokens of each prompt, the last ones; None keeps all."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name, (expected, words) in _TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                raise ArgumentError(
                    f"Sampling: expected {name} to be {words}, got {value!r} ({type(value).__name__}). Pass {words}"
                )
        ranges = [
            ("n", self.n >= 1, ">= 1"),
            ("temperature", 0 <= self.temperature <= 2, ">= 0 and <= 2"),
            ("top_p", 0 < self.top_p <= 1, "> 0 and <= 1"),
            ("top_k", self.top_k >= -1, ">= -1"),
            ("min_p", 0 <= self.min_p <= 1, ">= 0 and <= 1"),
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, ">= 0 and <= max_tokens"),
            (
                "truncate_prompt_tokens",
                self.truncate_prompt_tokens is None or self.truncate_prompt_tokens >= 1,
                ">= 1, or None",
            ),
            ("repetition_penalty", 0 < self.repetition_penalty <= 2, "> 0 and <= 2"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, ">= -2 and <= 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, ">= -2 and <= 2"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "strings that are not empty"),
            (
                "stop_token_ids",
                all(type(token) is int and token >= 0 for token in self.stop_token_ids),
                "token ids, from 0",
            ),
        ]
        for name, holds, allowed in ranges:
            if not holds:
                raise ArgumentError(
                    f"Sampling: expected {name} to be {allowed}, got {getattr(self, name)!r}. Pass a value in this range"
                )

    @classmethod
    def of(cls, source: object) -> Self:
        """Read sampling settings.

        Args:
            source: A `Sampling`, a dict with vLLM's or SGLang's names, vLLM's ``SamplingParams``, transformers'
                ``GenerationConfig``, or None.

        Raises:
            ArgumentError: A setting is unknown and not at its default, or ``source`` cannot be read.
        """
        if isinstance(source, cls):
            return source
        if source is None:
            return cls()
        if _is_generation_config(source):
            given = _from_generation_config(source)
        else:
            given = _from_mapping(source) if isinstance(source, Mapping) else _from_object(source)
        known = {field.name for field in dataclasses.fields(cls)}
        for name, value in given.items():
            if name not in known and value not in _NEUTRAL.get(name, ()):
                likely = nearest(name, known)
                hint = f"; did you mean {likely!r}?" if likely else ". Remove it"
                raise ArgumentError(f"Sampling: {name}={value!r} is not supported{hint}")
        return cls(**{name: _plain(name, value) for name, value in given.items() if name in known})

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def _from_mapping(source: Mapping[Any, Any]) -> dict[str, Any]:
    return {_ALIASES.get(str(name), str(name)): value for name, value in source.items()}


def _is_generation_config(source: object) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(source, transformers.GenerationConfig)


def _from_generation_config(config: object) -> dict[str, Any]:
    """Return the settings with which transformers' ``generate`` would draw the same distribution.

    Without ``do_sample``, ``generate`` is greedy; with it, it draws from the 50 most likely tokens by default. End tokens
    in the configuration replace those of the model.
    """
    given = {name: value for name, value in vars(config).items() if value is not None}
    if "max_new_tokens" not in given:
        raise ArgumentError(
            "Sampling: expected a GenerationConfig with max_new_tokens, got one without: max_length counts the prompt too. "
            "Set max_new_tokens"
        )
    given.pop("max_length", None)  # max_new_tokens overrides it
    if "min_new_tokens" in given:
        given.pop("min_length", None)
    settings = {ours: given.pop(theirs) for theirs, ours in _OF_GENERATION_CONFIG.items() if theirs in given}
    if "stop_token_ids" in settings:
        settings["ignore_eos"] = True
    drawing = {name: given.pop(name) for name in _OF_DRAWING if name in given}
    sampled = given.pop("do_sample", False)
    others = {
        name: value
        for name, value in given.items()
        if value and not name.startswith(WITHOUT_EFFECT) and not (name in _NEUTRAL_AT_1 and value == 1)
    }
    return {**others, **settings, **({"top_k": 50, **drawing} if sampled else {"temperature": 0.0})}


def _from_object(source: object) -> dict[str, Any]:
    """Return the public attributes of ``source`` that `Sampling` has too, and the others that are not at their default."""
    names = getattr(type(source), "__struct_fields__", None) or getattr(source, "__dict__", None)
    try:
        if names is None:
            raise TypeError("it has no attributes")
        default = type(source)()
    except TypeError as error:
        raise ArgumentError(
            f"Sampling: cannot read {source!r} ({type(source).__name__}). Pass a Sampling or a dict"
        ) from error
    values = {name: getattr(source, name) for name in names if not name.startswith("_")}
    known = {field.name for field in dataclasses.fields(Sampling)}
    return _from_mapping(
        {name: value for name, value in values.items() if name in known or value != getattr(default, name, None)}
    )


def _plain(name: str, value: Any) -> Any:
    if name in ("stop", "stop_token_ids"):
        several = (value,) if isinstance(value, (str, int)) else () if value is None else value
        return tuple(_without_numpy(item) for item in several)
    return _without_numpy(value)


def _without_numpy(value: object) -> Any:
    """Return a number of NumPy as a number of Python; other values unchanged."""
    return value.item() if hasattr(value, "item") else value


# Drawing


def random_key(seed: int, prompt: Sequence[int], sample: int) -> bytes:
    """Return the key of the random stream of one completion.

    Args:
        seed: The seed of the call.
        prompt: Token ids.
        sample: Index of the completion among those of its prompt.
    """
    text = f"{seed}:{sample}:{','.join(map(str, prompt))}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def uniform(key: bytes, position: int) -> float:
    """Return the number in [0, 1) at ``position`` of the stream ``key``."""
    digest = hashlib.blake2b(position.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample_tokens(logits_BV: torch.Tensor, sampling: Sampling, uniforms: Sequence[float]) -> torch.Tensor:
    """Draw one token for each row: the most likely one if greedy, otherwise by inverse CDF.

    Args:
        logits_BV: After penalties.
        sampling: Temperature and filters.
        uniforms: A number in [0, 1) for each row.

    Returns:
        Token ids of shape (B,), int64.
    """
    if sampling.greedy:
        return logits_BV.argmax(dim=-1)
    probabilities_BV = torch.softmax(logits_BV.double() / sampling.temperature, dim=-1)
    probabilities_BV = _filtered(probabilities_BV, sampling)
    cumulative_BV = probabilities_BV.cumsum(dim=-1)
    marks_B1 = torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device)[:, None] * cumulative_BV[:, -1:]
    drawn_B1 = torch.searchsorted(cumulative_BV, marks_B1, right=True)
    return drawn_B1.clamp_(max=logits_BV.shape[-1] - 1).squeeze(1)


def _filtered(probabilities_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Set to 0 what top-k, top-p and min-p exclude, without normalising the rest."""
    top_k = sampling.top_k if 0 < sampling.top_k < probabilities_BV.shape[-1] else 0
    if sampling.min_p:
        floor_B1 = probabilities_BV.amax(dim=-1, keepdim=True) * sampling.min_p
        probabilities_BV = probabilities_BV.where(probabilities_BV >= floor_B1, 0.0)
    if top_k:
        kth_B1 = probabilities_BV.topk(top_k, dim=-1).values[:, -1:]
        probabilities_BV = probabilities_BV.where(probabilities_BV >= kth_B1, 0.0)
    if sampling.top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        kept_BV = before_BV < sampling.top_p * sorted_BV.sum(dim=-1, keepdim=True)
        probabilities_BV = probabilities_BV.where(torch.zeros_like(kept_BV).scatter(-1, order_BV, kept_BV), 0.0)
    return probabilities_BV


def apply_penalties(
    logits_BV: torch.Tensor, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], sampling: Sampling
) -> torch.Tensor:
    """Return the logits with repetition, presence and frequency penalties, as in vLLM.

    Args:
        logits_BV: Of the model.
        prompts: Token ids of each row's prompt.
        outputs: Token ids that each row has drawn so far.
        sampling: The penalties.
    """
    repetition, presence, frequency = (
        sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty,
    )  # fmt: skip
    if (repetition, presence, frequency) == (1, 0, 0):
        return logits_BV
    logits_BV = logits_BV.clone()
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        seen = torch.tensor(sorted({*prompt, *output}), device=logits_BV.device)
        old = logits_BV[row, seen]
        logits_BV[row, seen] = torch.where(old > 0, old / repetition, old * repetition)
        if output:
            drawn, counts = torch.tensor(output, device=logits_BV.device).unique(return_counts=True)
            logits_BV[row, drawn] -= presence + frequency * counts
    return logits_BV
