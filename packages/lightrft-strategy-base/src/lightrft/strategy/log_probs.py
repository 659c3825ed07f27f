"""Per-token log-probabilities and entropies of a language model, from hidden states, without the logits of the batch.

`linear_log_probs` computes the logits of a few tokens at a time, in the forward pass and again in the backward pass, so
that memory holds the logits of one chunk. `logit_log_probs` is the plain computation, from logits; both give the same
numbers. Pure functions over full tensors: `lightrft.strategy.models.token_log_probs` applies them to prepared models.

Shapes: B sequences, T tokens each, H hidden size, V vocabulary, N tokens with a target, C tokens of a chunk.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lightrft.config import ArgumentError, ArgumentTypeError
from lightrft.config.validation import shown
from lightrft.strategy.tensors import is_dtensor

IGNORED = -100
"""The target of tokens that are left out, as in ``torch.nn.functional.cross_entropy``."""
CHUNK_SIZE = 128
"""Tokens whose logits are in memory at a time."""


class LogProbs(NamedTuple):
    """Log-probabilities and entropies of given tokens; 0 where the target is -100."""

    log_probs: torch.Tensor
    """Log-probability of each target: the shape of the targets, fp32."""
    entropy: torch.Tensor | None
    """Entropy of each distribution, in nats: the same shape, fp32; None unless requested."""


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    chunk_size: int = CHUNK_SIZE,
    entropy: bool = False,
) -> LogProbs:
    """Return log-probabilities of ``targets`` under ``softmax((hidden @ weight.T + bias) / temperature)``.

    The logits of ``chunk_size`` tokens are in memory at a time, and are computed again in the backward pass. Targets
    are not shifted. Tokens with target -100 cost nothing. Under autocast, the product is computed in its dtype; softmax
    and entropy are always computed in fp32 (fp64 for fp64 inputs). The gradient of a bf16 or fp16 ``weight`` is
    accumulated in fp32. Any rank may call this.

    Args:
        hidden: (B, T, H), or (..., H). Hidden states before the head.
        weight: (V, H). Full weight of the head.
        targets: (B, T), or (...). Token ids of dtype int64, or -100.
        bias: (V,). Bias of the head.
        temperature: Positive number by which logits are divided.
        soft_cap: Replace logits by ``soft_cap * tanh(logits / soft_cap)`` before the temperature, as in Gemma 2
            (https://arxiv.org/abs/2408.00118, section 2).
        chunk_size: Tokens per chunk.
        entropy: Compute the entropy too, with its gradient.

    Returns:
        Log-probabilities, and entropies if asked for, in the shape of ``targets``.

    Raises:
        ArgumentError, ArgumentTypeError: A shape, dtype, device or value does not fit.
    """
    call = "linear_log_probs"
    _check_options(call, temperature, soft_cap, chunk_size)
    _check_tensors(call, hidden, weight, bias)
    check_targets(call, targets, tuple(hidden.shape[:-1]), vocabulary=weight.shape[0])
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    flat, rows = targets.reshape(-1), (targets.reshape(-1) != IGNORED).nonzero().squeeze(1)
    hidden_NH = hidden.reshape(-1, hidden.shape[-1])
    if rows.numel() < flat.numel():
        hidden_NH, flat = hidden_NH[rows], flat[rows]
    computed: tuple[torch.Tensor, ...] = ChunkedLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight, bias, flat, _Options(temperature, soft_cap, chunk_size, entropy, dtype)
    )
    results = [_put_back(values, rows, targets.shape) for values in computed]
    return LogProbs(results[0], results[1] if entropy else None)


def logit_log_probs(
    logits: torch.Tensor, targets: torch.Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> LogProbs:
    """Return log-probabilities of ``targets`` (B, T) from ``logits`` (B, T, V), as `linear_log_probs` does."""
    kept = targets != IGNORED
    log_softmax_BTV = (
        (logits.double() if logits.dtype is torch.float64 else logits.float()).div(temperature).log_softmax(-1)
    )
    log_probs = log_softmax_BTV.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    result = LogProbs(torch.where(kept, log_probs, 0.0), None)
    if entropy:
        entropies = -(log_softmax_BTV.exp() * log_softmax_BTV).sum(-1)
        result = result._replace(entropy=torch.where(kept, entropies, 0.0))
    return result


def _put_back(values_N: torch.Tensor, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return ``values_N`` at the positions ``rows`` of a flattened tensor of ``shape``, and 0 elsewhere."""
    if values_N.numel() == shape.numel():
        return values_N.view(shape)
    return values_N.new_zeros(shape.numel()).index_copy(0, rows, values_N).view(shape)


class _Options(NamedTuple):
    temperature: float
    soft_cap: float | None
    chunk_size: int
    entropy: bool
    dtype: torch.dtype
    """Dtype of the matrix products."""


class ChunkedLogProbs(torch.autograd.Function):
    """Log-probabilities, and entropies if asked for, of N tokens, from hidden states and the head."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets_N: torch.Tensor,
        options: _Options,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        with torch.autocast(hidden_NH.device.type, enabled=False):
            head = _Head(weight, bias, options, rows=hidden_NH.shape[0])
            log_sum_exp_N, log_probs_N, entropy_N = (head.buffer.new_empty(hidden_NH.shape[0]) for _ in range(3))
            for chunk in head.chunks(hidden_NH.shape[0]):
                logits_CV = head.logits(hidden_NH[chunk])
                log_sum_exp_N[chunk] = logits_CV.logsumexp(-1)
                chosen_C = logits_CV.gather(1, targets_N[chunk].unsqueeze(1)).squeeze(1)
                log_probs_N[chunk] = chosen_C - log_sum_exp_N[chunk]
                if options.entropy:
                    log_softmax_CV = logits_CV.sub_(log_sum_exp_N[chunk].unsqueeze(1))
                    softmax_CV = torch.exp(log_softmax_CV, out=head.spare[: log_softmax_CV.shape[0]])
                    entropy_N[chunk] = -softmax_CV.mul_(log_softmax_CV).sum(1)
        ctx.options = options
        ctx.set_materialize_grads(False)
        # The caller's own weight: a backend that frees gathered weights after the forward pass gathers it again.
        ctx.save_for_backward(hidden_NH, weight, bias, targets_N, log_sum_exp_N, entropy_N if options.entropy else None)
        return (log_probs_N, entropy_N) if options.entropy else (log_probs_N,)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, log_probs_grad_N: torch.Tensor | None, entropy_grad_N: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, weight, bias, targets_N, log_sum_exp_N, entropy_N = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden_NH.device.type, enabled=False):
            head = _Head(weight, bias, ctx.options, rows=hidden_NH.shape[0])
            hidden_grad_NH = torch.empty_like(hidden_NH) if of_hidden else None
            weight_grad = torch.zeros_like(weight, dtype=head.buffer.dtype) if of_weight else None
            bias_grad = torch.zeros_like(bias, dtype=head.buffer.dtype) if of_bias else None
            for chunk in head.chunks(hidden_NH.shape[0]):
                grad_CV = head.logits_grad(
                    hidden_NH[chunk], targets_N[chunk], log_sum_exp_N[chunk],
                    None if log_probs_grad_N is None else log_probs_grad_N[chunk],
                    None if entropy_grad_N is None else (entropy_grad_N[chunk], entropy_N[chunk]),
                )  # fmt: skip
                if bias_grad is not None:
                    bias_grad += grad_CV.sum(0)
                grad_CV = grad_CV.to(ctx.options.dtype)
                if hidden_grad_NH is not None:
                    hidden_grad_NH[chunk] = grad_CV @ head.weight
                if weight_grad is not None:
                    _add_product(weight_grad, grad_CV.t(), hidden_NH[chunk].to(ctx.options.dtype))
        return (
            hidden_grad_NH,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None else bias_grad.to(bias.dtype),
            None,
            None,
        )


TRANSPARENT = frozenset({f"{ChunkedLogProbs.__name__}Backward"})
"""Class names of the autograd functions of this module, behind which the graph of a loss continues."""


class _Head:
    """The head of a model, with memory for the logits of one chunk."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, options: _Options, rows: int) -> None:
        self.options, self.weight = options, weight.to(options.dtype)
        self.bias = None if bias is None else bias.to(options.dtype)
        self.buffer = torch.empty(
            min(options.chunk_size, rows), weight.shape[0], device=weight.device,
            dtype=torch.float64 if options.dtype is torch.float64 else torch.float32,
        )  # fmt: skip
        self.spare = torch.empty_like(self.buffer) if options.entropy else self.buffer
        """For entropies, which need the softmax and its logarithm at the same time."""

    def chunks(self, rows: int) -> list[slice]:
        return [slice(start, start + self.options.chunk_size) for start in range(0, rows, self.options.chunk_size)]

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """Return capped logits over the temperature, in the buffer."""
        logits_CV, hidden_CH = self.buffer[: hidden_CH.shape[0]], hidden_CH.to(self.options.dtype)
        if self.options.dtype is not logits_CV.dtype:
            logits_CV.copy_(linear(hidden_CH, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(hidden_CH, self.weight.t(), out=logits_CV)
        else:
            torch.addmm(self.bias, hidden_CH, self.weight.t(), out=logits_CV)
        if self.options.soft_cap is not None:
            logits_CV.div_(self.options.soft_cap).tanh_().mul_(self.options.soft_cap)
        return logits_CV if self.options.temperature == 1 else logits_CV.div_(self.options.temperature)

    def logits_grad(
        self, hidden_CH: torch.Tensor, targets_C: torch.Tensor, log_sum_exp_C: torch.Tensor,
        log_probs_grad_C: torch.Tensor | None, entropy_terms: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:  # fmt: skip
        """Return the gradient of the logits of one chunk, before the cap and the temperature.

        With p the softmax, g and h the gradients of log-probability and entropy E, it is
        ``g (onehot - p) - h p (log p + E)``.

        Args:
            hidden_CH: Hidden states.
            targets_C: Token ids.
            log_sum_exp_C: Computed in the forward pass.
            log_probs_grad_C: g; None if the loss does not use log-probabilities.
            entropy_terms: h and E; None if the loss does not use entropies.
        """
        logits_CV = self.logits(hidden_CH)
        slope_CV = None
        if self.options.soft_cap is not None:  # of the cap: 1 - tanh^2
            slope_CV = 1 - (logits_CV * (self.options.temperature / self.options.soft_cap)).square()
        log_softmax_CV = logits_CV.sub_(log_sum_exp_C.unsqueeze(1))
        if entropy_terms is None:
            grad_CV = log_softmax_CV.exp_()
            factor_C = torch.zeros_like(log_sum_exp_C) if log_probs_grad_C is None else -log_probs_grad_C
            grad_CV.mul_(factor_C.unsqueeze(1))
        else:
            entropy_grad_C, entropy_C = entropy_terms
            grad_CV = torch.exp(log_softmax_CV, out=self.spare[: log_softmax_CV.shape[0]])
            factor_CV = log_softmax_CV.add_(entropy_C.unsqueeze(1)).mul_(-entropy_grad_C.unsqueeze(1))
            if log_probs_grad_C is not None:
                factor_CV.sub_(log_probs_grad_C.unsqueeze(1))
            grad_CV.mul_(factor_CV)
        if log_probs_grad_C is not None:
            grad_CV.scatter_add_(1, targets_C.unsqueeze(1), log_probs_grad_C.unsqueeze(1))
        if self.options.temperature != 1:
            grad_CV.div_(self.options.temperature)
        return grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right`` to ``total``, which may have a higher precision."""
    if total.dtype is left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


# Checks


def _check_options(call: str, temperature: float, soft_cap: float | None, chunk_size: int) -> None:
    check_temperature(call, temperature)
    if soft_cap is not None and not _is_positive(soft_cap):
        raise ArgumentError(f"{call}: expected soft_cap to be a number above 0, or None, got {shown(soft_cap)}")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ArgumentError(f"{call}: expected chunk_size to be an integer of at least 1, got {shown(chunk_size)}")


def check_temperature(call: str, temperature: object) -> None:
    """Raise `ArgumentError` unless ``temperature`` is a positive, finite number."""
    if not _is_positive(temperature):
        raise ArgumentError(
            f"{call}: expected temperature to be a finite number above 0, got {shown(temperature)}. Pass 1.0 for the "
            f"model's own probabilities"
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _check_tensors(call: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    for name, value in {"hidden": hidden, "weight": weight, **({} if bias is None else {"bias": bias})}.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            got = str(value.dtype) if isinstance(value, torch.Tensor) else shown(value)
            raise ArgumentTypeError(f"{call}: expected {name} to be a floating-point tensor, got {got}")
        if is_dtensor(value):
            raise ArgumentTypeError(
                f"{call}: expected {name} to be a full tensor, got a DTensor, of which this rank holds a part. For a prepared "
                f"model, call strategy.token_log_probs"
            )
        if value.device != hidden.device:
            raise ArgumentError(
                f"{call}: expected {name} on the device of hidden ({hidden.device}), got {value.device}. Move it"
            )
        if value.dtype is not hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise ArgumentTypeError(
                f"{call}: expected {name} to have the dtype of hidden ({hidden.dtype}), got {value.dtype}. Convert one of "
                f"them, or call this under torch.autocast"
            )
    if hidden.ndim < 1 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        empty = ". A sharded model has no weights outside of its forward pass: call strategy.token_log_probs"
        raise ArgumentError(
            f"{call}: expected hidden (..., H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
            f"{'. Pass the weight of the head as nn.Linear has it' if weight.numel() else empty}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError(
            f"{call}: expected bias to be ({weight.shape[0]},), one for each row of weight, got {tuple(bias.shape)}"
        )


def check_targets(call: str, targets: object, shape: tuple[int, ...], vocabulary: int | None = None) -> None:
    """Raise unless ``targets`` are token ids, or -100, of ``shape``, below ``vocabulary`` if that is known."""
    if not isinstance(targets, torch.Tensor) or targets.dtype is not torch.int64:
        got = str(targets.dtype) if isinstance(targets, torch.Tensor) else shown(targets)
        raise ArgumentTypeError(
            f"{call}: expected targets to be a tensor of token ids (torch.int64), got {got}. Convert it with .long()"
        )
    if tuple(targets.shape) != shape:
        raise ArgumentError(
            f"{call}: expected targets to be {shape}, one for each token, got {tuple(targets.shape)}. Targets are not "
            f"shifted here: pass for each position the token whose log-probability is read there"
        )
    if vocabulary is None or not targets.numel():
        return
    lowest, highest = torch.where(targets == IGNORED, 0, targets).aminmax()
    if lowest < 0 or highest >= vocabulary:
        wrong = int(lowest if lowest < 0 else highest)
        raise ArgumentError(
            f"{call}: expected targets from 0 to {vocabulary - 1}, the ids of the vocabulary, or {IGNORED} to leave a token out, "
            f"got {wrong}. Check the tokenizer, and mask padding with {IGNORED}"
        )
