"""Prompts and sampling in SGLang's terms, and SGLang's answers in ours. Pure.

A prompt with n samples is n requests, each with a seed of its own where there is a seed: SGLang's own ``n`` would
draw all of them from one.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lightrft.config import EngineError
from lightrft.engines.media import frames, picture
from lightrft.engines.seeds import seed_of
from lightrft.strategy import Completion, Prompt, Sampling


def request(prompt: Prompt) -> dict[str, Any]:
    """A prompt as the server takes it: token ids where there are any, else text; both beside media."""
    has_media = bool(prompt.images or prompt.videos)
    return {
        "text": prompt.text if prompt.token_ids is None or has_media else None,
        "tokens": prompt.token_ids,
        "images": [picture(image) for image in prompt.images],
        "videos": [frames(video) for video in prompt.videos],
    }


def check_placeholders(request: Mapping[str, Any], patterns: Mapping[str, re.Pattern[str] | None]) -> None:
    """Raise `EngineError` unless the text has one placeholder for each of the ``images`` and ``videos``.

    ``patterns`` find them, where the model's are known. SGLang would drop the media that have none.
    """
    for kind, pattern in patterns.items():
        given = len(request[kind])
        if pattern is not None and (found := len(pattern.findall(request["text"]))) != given:
            raise EngineError(
                f"a prompt has {found} placeholders for {given} {kind}, expected {given}; "
                f"one of them looks like {pattern.pattern!r}"
            )


def sampling_arguments(sampling: Sampling, end_ids: Collection[int], *, tokenizer: bool) -> dict[str, Any]:
    """SGLang's sampling parameters. ``end_ids`` end a sequence also where SGLang has no tokenizer to know it."""
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(end_ids))
    if sampling.min_tokens and ends and not tokenizer:
        raise EngineError(
            "engine 'sglang' takes min_tokens where the model has a tokenizer; give a `pretrain` with one"
        )
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "max_new_tokens": sampling.max_tokens,
        "min_new_tokens": sampling.min_tokens if ends else 0,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted(ends),
        "ignore_eos": sampling.ignore_eos,
        "skip_special_tokens": sampling.skip_special_tokens,
        "no_stop_trim": sampling.include_stop_str_in_output,
    }


def seeds(prompts: Sequence[Prompt], sampling: Sampling) -> list[int | None]:
    """The seed of each completion."""
    return [seed_of(prompt, sampling, sample) for prompt in prompts for sample in range(sampling.n)]


def alters_logits(sampling: Sampling) -> bool:
    """Whether SGLang's log-probabilities are of altered logits: it applies penalties before it takes them."""
    neutral = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.0, 0.0, 0.0)
    return not neutral or sampling.min_tokens > 0


def scored_tokens(drawn: Sequence[int], scored: Sequence[tuple[float, int]], last: int) -> list[tuple[float, int]]:
    """Log-probabilities of a prompt's tokens with their ids, of which SGLang gives the vocabulary's ``last`` as 0.

    It takes that for a placeholder; the log-probability is the token's own.
    """
    return [
        (logprob, last if (token, drawn_token) == (0, last) else token)
        for drawn_token, (logprob, token) in zip(drawn, scored, strict=True)
    ]


def completions(
    prompts: Sequence[Prompt], answers: Sequence[Mapping[str, Any]], sampling: Sampling, *, version: int
) -> list[Completion]:
    """The completions in the server's answers. Raises `EngineError` on any that is not whole, or of other weights."""
    if len(answers) != len(prompts) * sampling.n:
        raise EngineError(f"SGLang answered {len(prompts)} prompts, {sampling.n} samples each, with {len(answers)}")
    asked = [prompt for prompt in prompts for _ in range(sampling.n)]
    return [_completion(prompt, answer, version) for prompt, answer in zip(asked, answers, strict=True)]


def _completion(prompt: Prompt, answer: Mapping[str, Any], version: int) -> Completion:
    reason = answer["finish_reason"]
    if reason not in ("stop", "length"):
        raise EngineError(f"SGLang ended a completion with {reason!r}: {answer['message']}")
    if version and answer["weight_version"] != str(version):
        raise EngineError(f"SGLang answered with the weights {answer['weight_version']!r} instead of {version}")
    tokens, logprobs = tuple(answer["tokens"]), answer["logprobs"]
    return Completion(
        prompt_token_ids=prompt.token_ids if prompt.token_ids is not None else tuple(answer["prompt_tokens"]),
        output_token_ids=tokens,
        logprobs=None if logprobs is None else tuple(_matched(tokens, logprobs)),
        finish_reason=reason,
        weight_version=version,
        text=answer["text"],
    )


def _matched(tokens: Sequence[int], logprobs: Sequence[tuple[float, int]]) -> Iterator[float]:
    """Log-probabilities, each held against the token that it is of."""
    if [token for _, token in logprobs] != list(tokens):
        raise EngineError(f"SGLang gave log-probabilities of other tokens than the {len(tokens)} that it drew")
    for logprob, _ in logprobs:
        yield float(logprob)
