"""Translates prompts and sampling for vLLM, and vLLM's outputs back. The caller imports vLLM."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightrft.config import EngineError
from lightrft.engines.media import to_frames, to_rgb
from lightrft.strategy.engine import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import CompletionOutput, RequestOutput


def request(prompt: Prompt) -> dict[str, Any]:
    """A prompt in vLLM's form: its token ids if it has any, else its text."""
    base: dict[str, Any] = (
        {"prompt_token_ids": list(prompt.token_ids)} if prompt.token_ids is not None else {"prompt": prompt.text}
    )
    media: dict[str, Any] = {}
    if prompt.images:
        media["image"] = [to_rgb(image) for image in prompt.images]
    if prompt.videos:
        media["video"] = [to_frames(video) for video in prompt.videos]
    if prompt.audios:
        media["audio"] = list(prompt.audios)
    return {**base, "multi_modal_data": media} if media else base


def sampling_arguments(sampling: Sampling, eos_token_ids: Collection[int], *, tokenizer: bool) -> dict[str, Any]:
    """Arguments of vLLM's ``SamplingParams``, without the seed, which differs by prompt.

    Args:
        sampling: How tokens are drawn.
        eos_token_ids: Token ids that end a sequence, unless ``ignore_eos`` is set.
        tokenizer: Whether vLLM has a tokenizer.
    """
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(eos_token_ids))
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
        "ignore_eos": True,  # of what vLLM reads from the model's files, which a sync may have changed
        "skip_special_tokens": sampling.skip_special_tokens,
        "include_stop_str_in_output": sampling.include_stop_str_in_output,
        "logprobs": 0,  # of the drawn token only
        "detokenize": tokenizer,
    }


def completions(
    prompts: Sequence[Prompt],
    answers: "Sequence[RequestOutput]",
    sampling: Sampling,
    *,
    version: int,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> list[Completion]:
    """The completions in vLLM's outputs.

    Args:
        prompts: What was asked.
        answers: vLLM's outputs, one for each prompt.
        sampling: How tokens were drawn.
        version: The version of the weights.
        tokenizer: The model's, or None.

    Raises:
        EngineError: An output is missing or incomplete.
    """
    drawn = _drawn(sampling)
    counts = [len(answer.outputs) for answer in answers]
    if counts != [drawn] * len(prompts):
        raise EngineError(
            f"generate: expected {drawn} completions of each of {len(prompts)} prompts, got {counts} from vLLM. Generate again;"
            f" if it recurs, set up a new engine"
        )
    return [
        _completion(tokens, output, version, None if tokenizer is None else output.text)
        for tokens, answer in zip(map(partial(_given_tokens, tokenizer), prompts, answers), answers, strict=True)
        for output in sorted(answer.outputs, key=lambda output: int(output.index)) * (sampling.n // drawn)
    ]


def _drawn(sampling: Sampling) -> int:
    """Samples to draw of each prompt. Greedy samples are all the same, so vLLM draws one."""
    return 1 if sampling.greedy else sampling.n


def _given_tokens(
    tokenizer: "PreTrainedTokenizerBase | None", prompt: Prompt, answer: "RequestOutput"
) -> tuple[int, ...]:
    """The prompt's token ids, without the placeholders that vLLM expanded."""
    if prompt.token_ids is not None:
        return prompt.token_ids
    if tokenizer is not None and prompt.has_media:
        return tuple(map(int, tokenizer(prompt.text, add_special_tokens=False)["input_ids"]))
    return tuple(map(int, answer.prompt_token_ids))


def _completion(prompt: tuple[int, ...], output: "CompletionOutput", version: int, text: str | None) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise EngineError(
            f"generate: expected finish_reason 'stop' or 'length', got {output.finish_reason!r} ({output.stop_reason!r}) from vLLM"
        )
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
        raise EngineError(
            f"generate: expected log-probabilities of {len(tokens)} tokens, got {len(positions or ())} from vLLM. Generate again; if "
            f"it recurs, set up a new engine"
        )
    for token, position in zip(tokens, positions, strict=True):
        yield float(position[token].logprob)
