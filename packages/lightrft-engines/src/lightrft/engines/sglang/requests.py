"""Translates prompts and sampling for SGLang, and its answers back. Pure.

A prompt with n samples becomes n requests, so that each has its own seed: SGLang's own ``n`` draws all from one.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypedDict

from lightrft.config import EngineError
from lightrft.engines.media import to_frames, to_rgb
from lightrft.engines.seeds import completion_seed
from lightrft.strategy.engine import Completion, Prompt, Sampling


class Request(TypedDict):
    """One prompt, as it goes to the server."""

    text: str | None
    tokens: Sequence[int] | None
    images: list[Any]
    videos: list[Any]


class TokenizedRequest(TypedDict):
    """A `Request` with token ids."""

    text: str | None
    tokens: list[int]
    images: list[Any]
    videos: list[Any]


class Answer(TypedDict):
    """One completion, as it comes from the server."""

    prompt_tokens: list[int]
    tokens: list[int]
    logprobs: list[tuple[float, int]] | None
    """Each with the token that it belongs to."""
    finish_reason: str
    message: str
    weight_version: str
    text: str | None


def request(prompt: Prompt) -> Request:
    """A prompt for the server: its token ids if it has any, else its text; both if it has media."""
    has_media = bool(prompt.images or prompt.videos)
    return {
        "text": prompt.text if prompt.token_ids is None or has_media else None,
        "tokens": prompt.token_ids,
        "images": [to_rgb(image) for image in prompt.images],
        "videos": [to_frames(video) for video in prompt.videos],
    }


def check_placeholders(
    request: Request, image_pattern: re.Pattern[str] | None, video_pattern: re.Pattern[str] | None
) -> None:
    """Check that the text has one placeholder for each image and video; SGLang drops media that have none.

    Args:
        request: As `request` makes it.
        image_pattern: Matches the model's placeholder of an image; None if it is unknown.
        video_pattern: The same for videos.

    Raises:
        EngineError: The numbers differ.
    """
    text = request["text"] or ""
    media = (("images", request["images"], image_pattern), ("videos", request["videos"], video_pattern))
    for name, items, pattern in media:
        if pattern is not None and (count := len(pattern.findall(text))) != len(items):
            raise EngineError(
                f"generate: expected {len(items)} placeholders for {len(items)} {name} in a prompt, got {count}. "
                f"A placeholder matches {pattern.pattern!r}"
            )


def sampling_arguments(sampling: Sampling, eos_token_ids: Collection[int], *, tokenizer: bool) -> dict[str, Any]:
    """SGLang's sampling parameters.

    Args:
        sampling: How tokens are drawn.
        eos_token_ids: Token ids that end a sequence, unless ``ignore_eos`` is set.
        tokenizer: Whether SGLang has a tokenizer.

    Raises:
        EngineError: ``min_tokens`` needs a tokenizer.
    """
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(eos_token_ids))
    if sampling.min_tokens and ends and not tokenizer:
        raise EngineError(
            "generate: engine 'sglang' expected a model with a tokenizer, because of min_tokens, got one without. Pass a "
            "`pretrain` that has a tokenizer, or leave min_tokens out"
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
        "ignore_eos": True,  # of what SGLang reads from the model's files, which a sync may have changed
        "skip_special_tokens": sampling.skip_special_tokens,
        "no_stop_trim": sampling.include_stop_str_in_output,
    }


def seeds(prompts: Sequence[Prompt], sampling: Sampling) -> list[int | None]:
    """The seed of each completion."""
    return [completion_seed(prompt, sampling, sample) for prompt in prompts for sample in range(sampling.n)]


def alters_logits(sampling: Sampling) -> bool:
    """Whether SGLang's log-probabilities come from changed logits: it applies penalties before it computes them."""
    neutral = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.0, 0.0, 0.0)
    return not neutral or sampling.min_tokens > 0


def scored_tokens(drawn: Sequence[int], scored: Sequence[tuple[float, int]], last: int) -> list[tuple[float, int]]:
    """Correct the ids next to the log-probabilities of a prompt's tokens.

    SGLang treats the ``last`` id of the vocabulary as a placeholder and reports it as 0; the log-probability is right.

    Args:
        drawn: The tokens.
        scored: SGLang's pairs of log-probability and id.
        last: The last id of the vocabulary.
    """
    return [
        (logprob, last if (token, drawn_token) == (0, last) else token)
        for drawn_token, (logprob, token) in zip(drawn, scored, strict=True)
    ]


def completions(
    prompts: Sequence[Prompt], answers: Sequence[Answer], sampling: Sampling, *, version: int
) -> list[Completion]:
    """The completions in the server's answers.

    Args:
        prompts: What was asked.
        answers: The answers of the first prompt, then those of the next.
        sampling: How tokens were drawn.
        version: The version of the weights.

    Raises:
        EngineError: An answer is missing, incomplete, or made with other weights.
    """
    if len(answers) != len(prompts) * sampling.n:
        raise EngineError(
            f"generate: expected {sampling.n} answers to each of {len(prompts)} prompts, got {len(answers)} from "
            f"SGLang. Generate again; if it recurs, set up a new engine"
        )
    repeated = [prompt for prompt in prompts for _ in range(sampling.n)]
    return [_completion(prompt, answer, version) for prompt, answer in zip(repeated, answers, strict=True)]


def _completion(prompt: Prompt, answer: Answer, version: int) -> Completion:
    reason = answer["finish_reason"]
    if reason not in ("stop", "length"):
        raise EngineError(
            f"generate: expected finish_reason 'stop' or 'length', got {reason!r} from SGLang: {answer['message']}. See the "
            f"server's output for the cause"
        )
    if version and answer["weight_version"] != str(version):
        raise EngineError(
            f"generate: expected an answer from weight version {version}, got {answer['weight_version']!r} from SGLang. Sync again"
        )
    tokens, logprobs = tuple(answer["tokens"]), answer["logprobs"]
    return Completion(
        prompt_token_ids=prompt.token_ids if prompt.token_ids is not None else tuple(answer["prompt_tokens"]),
        output_token_ids=tokens,
        logprobs=None if logprobs is None else tuple(_matched(tokens, logprobs)),
        finish_reason="stop" if reason == "stop" else "length",
        weight_version=version,
        text=answer["text"],
    )


def _matched(tokens: Sequence[int], logprobs: Sequence[tuple[float, int]]) -> Iterator[float]:
    """The log-probabilities, after a check that they belong to ``tokens``."""
    if [token for _, token in logprobs] != list(tokens):
        raise EngineError(
            f"generate: expected log-probabilities of the {len(tokens)} drawn tokens, got those of other "
            f"tokens from SGLang. Generate again; if it recurs, set up a new engine"
        )
    for logprob, _ in logprobs:
        yield float(logprob)
