"""Prompts and sampling in vLLM's terms, and vLLM's answers in ours. vLLM is imported by the caller."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

from lightrft.config import EngineError
from lightrft.engines.media import frames, picture
from lightrft.strategy import Completion, Prompt, Sampling


def request(prompt: Prompt) -> dict[str, Any]:
    """A prompt as vLLM takes it: token ids where there are any."""
    base: dict[str, Any] = (
        {"prompt_token_ids": list(prompt.token_ids)} if prompt.token_ids is not None else {"prompt": prompt.text}
    )
    media: dict[str, Any] = {}
    if prompt.images:
        media["image"] = [picture(image) for image in prompt.images]
    if prompt.videos:
        media["video"] = [frames(video) for video in prompt.videos]
    return {**base, "multi_modal_data": media} if media else base


def sampling_arguments(sampling: Sampling, end_ids: Collection[int], *, tokenizer: bool) -> dict[str, Any]:
    """Arguments of vLLM's ``SamplingParams``, but for the seed, which each prompt has of its own.

    ``end_ids`` end a sequence also where vLLM has no tokenizer to know it.
    """
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(end_ids))
    return {
        "n": _drawn(sampling),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(sampling.top_k, 0),
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted(ends),
        "ignore_eos": sampling.ignore_eos,
        "skip_special_tokens": sampling.skip_special_tokens,
        "include_stop_str_in_output": sampling.include_stop_str_in_output,
        "logprobs": 0,  # of the drawn token alone
        "detokenize": tokenizer,
    }


def completions(
    prompts: Sequence[Prompt], answers: Sequence[Any], sampling: Sampling, *, version: int, tokenizer: Any
) -> list[Completion]:
    """The completions in vLLM's answers. Raises `EngineError` on any that is not whole.

    ``tokenizer``: the model's, or None.
    """
    drawn = _drawn(sampling)
    found = [len(answer.outputs) for answer in answers]
    if found != [drawn] * len(prompts):
        raise EngineError(f"vLLM answered {len(prompts)} prompts, {drawn} samples each, with {found} completions")
    return [
        _completion(tokens, output, version, None if tokenizer is None else output.text)
        for tokens, answer in zip(map(partial(_given_tokens, tokenizer), prompts, answers), answers, strict=True)
        for output in sorted(answer.outputs, key=lambda it: int(it.index)) * (sampling.n // drawn)
    ]


def _drawn(sampling: Sampling) -> int:
    """Samples of each prompt to be drawn: greedy ones are all alike, and vLLM draws but one."""
    return 1 if sampling.greedy else sampling.n


def _given_tokens(tokenizer: Any, prompt: Prompt, answer: Any) -> tuple[int, ...]:
    """The prompt's, without those that vLLM put in where media are."""
    if prompt.token_ids is not None:
        return prompt.token_ids
    expanded = bool(prompt.images or prompt.videos)
    found = tokenizer(prompt.text, add_special_tokens=False)["input_ids"] if expanded else answer.prompt_token_ids
    return tuple(map(int, found))


def _completion(prompt: tuple[int, ...], output: Any, version: int, text: str | None) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a completion with {output.finish_reason!r} ({output.stop_reason!r})")
    tokens = tuple(output.token_ids)
    return Completion(
        prompt_token_ids=prompt,
        output_token_ids=tokens,
        logprobs=tuple(_logprobs(tokens, output.logprobs)),
        finish_reason=output.finish_reason,
        weight_version=version,
        text=text,
    )


def _logprobs(tokens: Sequence[int], positions: Any) -> Iterator[float]:
    if positions is None or len(positions) != len(tokens):
        raise EngineError(f"vLLM gave log-probabilities of {len(positions or ())} tokens for {len(tokens)}")
    for token, position in zip(tokens, positions, strict=True):
        yield float(position[token].logprob)
