"""Hooks for where SGLang would give other tokens than the other engines do, by the same settings and weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch


def with_whole_context(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Take prompts up to the end of the context: SGLang refuses those that leave less than five new tokens.

    A sequence may have one token less than ``max_req_len``; as a prompt it may be scored. The engine is told so.
    """
    scheduler.max_req_input_len = scheduler.max_req_len


def refuse_other_models(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Raise `ValueError` for a model that SGLang computes otherwise than its configuration says, and does not tell."""
    runner = scheduler.tp_worker.model_runner
    lacking = otherwise(vars(scheduler.model_config.hf_text_config), runner.model.modules(), scheduler.max_req_len - 1)
    if lacking:
        raise ValueError(f"SGLang's {type(runner.model).__name__} {lacking}; use another engine")


def otherwise(config: Mapping[str, Any], layers: Iterator[Any], longest: int) -> str | None:
    """What a model of this configuration is not in SGLang, in words, or None."""
    window = config.get("sliding_window")
    slides = config.get("use_sliding_window", True) and "sliding_attention" in (
        config.get("layer_types") or ["sliding_attention"]
    )
    if window and slides and window < longest and not any(_slides(layer) for layer in layers):
        return f"attends to all tokens, and the model to the last {window} (so engine_max_model_len={window} is alike)"
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "dynamic" in (rotary.get("rope_type"), rotary.get("type")):
        return "scales rotary positions alike at all lengths, and the model's scaling is dynamic"
    return None


def _slides(layer: Any) -> bool:
    return getattr(layer, "sliding_window_size", None) not in (None, -1)


def stops_at_ids(original: Callable[..., bool], request: Any, tokens: Sequence[int]) -> bool:
    """Let ``ignore_eos`` be about the end-of-sequence token alone: SGLang would not see stop tokens either."""
    sampling = request.sampling_params
    if not sampling.ignore_eos or not sampling.stop_token_ids:
        return original(request, tokens)
    ends, tokenizer = request.eos_token_ids, request.tokenizer
    sampling.ignore_eos, request.eos_token_ids, request.tokenizer = False, None, None
    try:
        return original(request, tokens)
    finally:
        sampling.ignore_eos, request.eos_token_ids, request.tokenizer = True, ends, tokenizer


def with_prompts(result: None, penalizer: Any, *args: Any, **kwargs: Any) -> None:
    """Let the repetition penalty be about prompts too, as it is in vLLM and in the paper (Keskar et al., "CTRL", 2019)."""
    orchestrator = penalizer.orchestrator
    for row, request in enumerate(orchestrator.reqs()):
        seen = {*request.origin_input_ids, *request.output_ids}
        known = torch.tensor([it for it in seen if it < orchestrator.vocab_size], dtype=torch.int64)  # not of media
        penalizer.cumulated_repetition_penalties[row, known.to(orchestrator.device)] = (
            request.sampling_params.repetition_penalty
        )


def repetition_first(result: None, orchestrator: Any, *args: Any, **kwargs: Any) -> None:
    """Have the repetition penalty applied before what is added, as in vLLM: SGLang's order is that of a set of classes."""
    found = orchestrator.penalizers.items()
    orchestrator.penalizers = dict(sorted(found, key=lambda it: not it[0].is_multiplicative))


def repetition_first_of_accumulated(original: Callable[..., Any], info: Any, logits_BV: torch.Tensor) -> Any:
    """The same where scheduling overlaps, and penalties were accumulated before."""
    scaling_BV = info.acc_scaling_penalties
    if scaling_BV is None:
        return original(info, logits_BV)
    logits_BV.copy_(torch.where(logits_BV < 0, logits_BV * scaling_BV, logits_BV / scaling_BV))
    info.acc_scaling_penalties = None
    try:
        return original(info, logits_BV)
    finally:
        info.acc_scaling_penalties = scaling_BV
