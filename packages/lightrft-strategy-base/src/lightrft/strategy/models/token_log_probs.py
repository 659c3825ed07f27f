"""Per-token log-probabilities of a prepared model, computed where the model computes its logits.

Backends gather the weight of the head for the forward pass of the model, and register hooks on its outputs. So during one
call, the output embedding, a linear layer, returns log-probabilities and entropies (B, T, 1 or 2) instead of logits
(B, T, V), and the model passes them through. Whether a model does that, or changes its logits first, is checked once, with
two tokens. A soft cap or a factor from the model's configuration is applied in the head instead.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lightrft.config import ArgumentError, ArgumentTypeError, UnsupportedOperationError
from lightrft.config.validation import shown
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.log_probs import (
    IGNORED,
    LogProbs,
    check_targets,
    check_temperature,
    linear_log_probs,
    logit_log_probs,
)
from lightrft.strategy.models.compiled import eagerly, not_compiled
from lightrft.strategy.models.heads import Head, find_head
from lightrft.strategy.models.packing import keeps_packed_apart, packed_starts, without_cache
from lightrft.strategy.models.registry import PreparedModel
from lightrft.strategy.parallel.sequence import SequenceParallel

CALL = "token_log_probs"
_REMEDY = "Set fused_linear_logprob=False, which computes from the logits"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of one call."""

    input_ids: torch.Tensor
    """(B, T)."""
    attention_mask: torch.Tensor | None
    targets: torch.Tensor
    """(B, T). The last position of whole sequences is left out."""
    temperature: float
    entropy: bool
    inputs: Mapping[str, Any]
    """Further arguments of the model's forward."""
    packed: bool
    """Whether a row has several sequences."""


def request(
    input_ids: Any, attention_mask: Any, targets: Any, temperature: float, entropy: bool, inputs: Mapping[str, Any]
) -> Request:
    """Check the arguments of `StrategyBase.token_log_probs`.

    The default targets are the next tokens, without padding and without the first token of each sequence: nothing of its
    sequence is before it.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        got = str(input_ids.dtype) if isinstance(input_ids, torch.Tensor) else shown(input_ids)
        raise ArgumentTypeError(f"{CALL}: expected input_ids to be a tensor of token ids (torch.int64), got {got}")
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise ArgumentError(
            f"{CALL}: expected input_ids (B, T) with B of at least 1 and T of at least 2, got {tuple(input_ids.shape)}. Pass a batch of sequences"
        )
    positions = inputs.get("position_ids")
    _check_mask_and_positions(attention_mask, positions, input_ids)
    if "labels" in inputs:
        raise ArgumentError(
            f"{CALL}: expected no argument labels, got one: the model would compute its own loss. Pass them as targets, shifted: "
            f"targets=labels[:, 1:]"
        )
    check_temperature(CALL, temperature)
    starts_BT = packed_starts(positions, attention_mask, input_ids)
    if targets is None and attention_mask is not None and attention_mask.ndim != 2:
        raise ArgumentError(
            f"{CALL}: expected targets with an attention mask of shape {tuple(attention_mask.shape)}, got none: only a mask (B, T) "
            f"says which tokens are padding. Pass targets, -100 where a position is left out"
        )
    if targets is None:
        targets = input_ids[:, 1:].long()
        if attention_mask is not None:
            present_BT = attention_mask != 0
            targets = targets.masked_fill(~(present_BT[:, :-1] & present_BT[:, 1:]), IGNORED)
        elif starts_BT is not None:
            targets = targets.masked_fill(starts_BT, IGNORED)
    check_targets(CALL, targets, (input_ids.shape[0], input_ids.shape[1] - 1))
    padded_BT = nn.functional.pad(targets, (0, 1), value=IGNORED)
    return Request(
        input_ids=input_ids, attention_mask=attention_mask, targets=padded_BT, temperature=temperature, entropy=entropy,
        inputs=inputs, packed=starts_BT is not None and bool(starts_BT.any()),
    )  # fmt: skip


def _check_mask_and_positions(attention_mask: object, positions: object, input_ids: torch.Tensor) -> None:
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise ArgumentTypeError(f"{CALL}: expected attention_mask to be a tensor, or None, got {shown(attention_mask)}")
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape != input_ids.shape:
        raise ArgumentError(
            f"{CALL}: expected attention_mask to have the shape of input_ids {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}"
        )
    if isinstance(positions, torch.Tensor) and (positions.ndim < 2 or positions.shape[-1] != input_ids.shape[1]):
        raise ArgumentError(
            f"{CALL}: expected position_ids (B, T) for input_ids {tuple(input_ids.shape)}, got {tuple(positions.shape)}. "
            f"Number the tokens of each sequence from 0"
        )


def check_packing(prepared: PreparedModel, consensus: RankConsensus, request: Request) -> None:
    """Raise `UnsupportedOperationError` if the model attends across packed sequences. All ranks must call this.

    Raises:
        ArgumentError: The model is to make a cache, with which it would.
    """
    if prepared.keeps_packed_apart is None:

        def logits_of(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return _logits_of(prepared, prepared.wrapped(tokens, position_ids=positions))

        with (
            _evaluation_mode(prepared.module),
            eagerly(prepared.module),
            without_cache(prepared.module),
            torch.no_grad(),
        ):
            prepared.keeps_packed_apart = keeps_packed_apart(logits_of, request.input_ids)
    with consensus.together(CALL, "checking packed sequences"):
        if not request.packed:
            return
        if request.inputs.get("use_cache"):
            raise ArgumentError(
                f"{CALL}: expected no cache with packed sequences, got use_cache={request.inputs['use_cache']}: the model "
                f"would attend across them. Leave it out"
            )
        if not prepared.keeps_packed_apart:
            raise UnsupportedOperationError(
                f"{CALL}: expected a model that keeps packed sequences apart, got position_ids that restart and "
                f"{prepared.class_name}, in which a sequence depends on those before it. Pass one padded sequence per row, with "
                f"its attention_mask"
            )


def of_sequences(ranks: SequenceParallel, request: Request, compute: Callable[[Request], LogProbs]) -> LogProbs:
    """Return what ``compute`` returns for all positions but the last; ranks that share sequences compute slices of them."""
    if ranks.size == 1:
        result = compute(request)
    else:
        mask = {} if request.attention_mask is None else {"attention_mask": request.attention_mask}
        batch = {"input_ids": request.input_ids, **mask, **request.inputs, "labels": request.targets}
        local = ranks.split(batch)
        inputs = {name: local[name] for name in (*request.inputs, "position_ids")}
        slices = compute(
            replace(
                request, input_ids=local["input_ids"], attention_mask=local["attention_mask"], targets=local["labels"],
                inputs=inputs,
            )
        )  # fmt: skip
        result = _changed(slices, ranks.gather)
    return _changed(result, lambda values: values[:, :-1])


def _changed(result: LogProbs, change: Callable[[torch.Tensor], torch.Tensor]) -> LogProbs:
    return LogProbs(change(result.log_probs), None if result.entropy is None else change(result.entropy))


def from_logits(prepared: PreparedModel, consensus: RankConsensus, request: Request) -> LogProbs:
    """Return log-probabilities and entropies computed from the full logits of the model. All ranks must call this."""
    output = _call(prepared, request)
    with consensus.together(CALL, "checking targets"):
        logits_BTV = _logits_of(prepared, output)
        _check_shape(prepared, request, logits_BTV)
        check_targets(CALL, request.targets, tuple(request.targets.shape), vocabulary=logits_BTV.shape[-1])
    return logit_log_probs(logits_BTV, request.targets, temperature=request.temperature, entropy=request.entropy)


def fused(prepared: PreparedModel, consensus: RankConsensus, request: Request) -> LogProbs:
    """Return log-probabilities and entropies computed in the head of the model, chunk by chunk. All ranks must call this."""
    if prepared.head is None:
        with consensus.together(CALL, "finding the head"):
            head = find_head(prepared.module, prepared.class_name, CALL, _REMEDY)
        _try_head(prepared, head, consensus, request)
        prepared.head = head
    head = prepared.head
    targets_BT = request.targets
    with consensus.together(CALL, "checking targets"):  # before the forward pass, which all ranks finish or none
        check_targets(CALL, targets_BT, tuple(targets_BT.shape), vocabulary=head.layers[0].out_features)
    calls: list[torch.Size] = []

    def compute(linear: nn.Linear, hidden_BTH: torch.Tensor) -> torch.Tensor:
        calls.append(hidden_BTH.shape)
        if hidden_BTH.shape[:-1] != targets_BT.shape:
            raise UnsupportedOperationError(
                f"{CALL}: expected the LM head of {prepared.class_name} to get a hidden state for each of the "
                f"{tuple(targets_BT.shape)} tokens, got {tuple(hidden_BTH.shape)}. Leave out logits_to_keep, and what else "
                f"adds or removes positions. {_REMEDY}"
            )
        result = linear_log_probs(
            hidden_BTH, linear.weight, targets_BT, bias=linear.bias, temperature=request.temperature / head.factor,
            soft_cap=head.soft_cap, entropy=request.entropy,
        )  # fmt: skip
        return torch.stack([value for value in result if value is not None], dim=-1)

    with head.without_changes(), replaced_forward(head.layers, not_compiled(compute, prepared.module)):
        values_BT2 = _logits_of(prepared, _call(prepared, request))
    if len(calls) != 1 or values_BT2.shape != (*targets_BT.shape, 1 + request.entropy):
        raise UnsupportedOperationError(
            f"{CALL}: expected {prepared.class_name} to call its output embedding once, and to return what it computes, got "
            f"{len(calls)} calls and {tuple(values_BT2.shape)}. {_REMEDY}"
        )
    log_probs_BT, *entropy_BT = values_BT2.unbind(-1)
    return LogProbs(log_probs_BT, entropy_BT[0] if entropy_BT else None)


@contextmanager
def replaced_forward(
    layers: Sequence[nn.Linear], compute: Callable[[nn.Linear, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Make each of ``layers`` return ``compute(layer, hidden)``, within the body. Its hooks are called as usual."""
    for layer in layers:
        vars(layer)["forward"] = partial(compute, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _call(prepared: PreparedModel, request: Request) -> Any:
    """Call the model, without a cache: transformers takes position ids that restart for packed sequences only then."""
    mask = {} if request.attention_mask is None else {"attention_mask": request.attention_mask}
    if "use_cache" in request.inputs:
        return prepared.wrapped(request.input_ids, **mask, **request.inputs)
    with without_cache(prepared.module):
        return prepared.wrapped(request.input_ids, **mask, **request.inputs)


def _logits_of(prepared: PreparedModel, output: object) -> torch.Tensor:
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise ArgumentError(
            f"{CALL}: expected {prepared.class_name} to return logits, as a tensor or as .logits, got {type(output).__name__}. "
            f"Pass a language model with a head, and leave out return_dict=False"
        )
    return logits


def _check_shape(prepared: PreparedModel, request: Request, logits_BTV: torch.Tensor) -> None:
    if logits_BTV.ndim != 3 or logits_BTV.shape[:2] != request.input_ids.shape:
        raise ArgumentError(
            f"{CALL}: expected {prepared.class_name} to return logits (B, T, V) for each token of input_ids "
            f"{tuple(request.input_ids.shape)}, got {tuple(logits_BTV.shape)}. Leave out logits_to_keep, and what else adds or "
            f"removes positions"
        )


def _try_head(prepared: PreparedModel, head: Head, consensus: RankConsensus, request: Request) -> None:
    """Raise `UnsupportedOperationError` unless the model computes its logits as ``head`` says. All ranks must call this.

    Tried with the last two tokens of the batch, in evaluation mode: no dropout, no change of buffers or random states.
    """
    doing = "checking how the model computes its logits"
    name, tokens = prepared.class_name, request.input_ids[:1, -2:].clone()  # not a slice of a sequence that ranks share
    with _evaluation_mode(prepared.module), torch.no_grad(), eagerly(prepared.module):
        with head.without_changes():
            outputs, output = _head_outputs(prepared, head, tokens)
        with consensus.together(CALL, doing):  # after the forward pass, in which ranks wait for each other
            _check_unchanged(prepared, outputs, _logits_of(prepared, output))
        if head.changes:
            outputs, output = _head_outputs(prepared, head, tokens)
            with consensus.together(CALL, doing):
                logits = _logits_of(prepared, output)
                tolerance = 1e-6 if logits.dtype is outputs[0].dtype is torch.float32 else 2**-6
                _check_equal(name, head.description, head.logits(outputs[0].float()), logits.float(), tolerance)


def _check_unchanged(prepared: PreparedModel, outputs: list[torch.Tensor], logits: torch.Tensor) -> None:
    """Raise `UnsupportedOperationError` unless the model returned what its head computed, once."""
    if len(outputs) != 1 or outputs[0].shape != logits.shape:
        raise UnsupportedOperationError(
            f"{CALL}: expected {prepared.class_name} to call its output embedding once and to return its output, got "
            f"{len(outputs)} calls ({', '.join(str(tuple(output.shape)) for output in outputs)}) and logits "
            f"{tuple(logits.shape)}. {_REMEDY}"
        )
    _check_equal(prepared.class_name, "its head", outputs[0].float(), logits.float(), tolerance=0.0)


def _head_outputs(prepared: PreparedModel, head: Head, tokens: torch.Tensor) -> tuple[list[torch.Tensor], Any]:
    """Return what the head computes in a forward pass, copied, and what the model returns."""
    outputs: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda *call: outputs.append(call[2].clone())) for layer in head.layers]
    try:
        return outputs, prepared.wrapped(tokens)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _check_equal(name: str, what: str, expected: torch.Tensor, got: torch.Tensor, tolerance: float) -> None:
    difference = (expected - got).abs().max().item()
    if not difference <= tolerance * max(1.0, got.abs().max().item()):
        worst = int((expected - got).abs().argmax())
        raise UnsupportedOperationError(
            f"{CALL}: expected {name} to return the output of {what}, got logits that differ by up to {difference:.3g} "
            f"({got.flatten()[worst].item():.6g} instead of {expected.flatten()[worst].item():.6g}): the model changes them "
            f"afterwards. {_REMEDY}"
        )
