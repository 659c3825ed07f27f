"""A model of the reference: plain PyTorch training, in one process, for all ranks at once.

A backend has one free choice that changes rounding: gradients are averaged over the ranks once per update, or
at each micro-batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lightrft.conformance import models, sequences
from lightrft.conformance.values import Record

Averaging = Literal["per update", "per micro-batch"]
FP32_MAX = torch.finfo(torch.float32).max


@dataclass(kw_only=True)
class ReferenceModel:
    """One model in training."""

    kind: str
    module: nn.Module
    world: int
    accumulation_steps: int
    max_norm: float | None
    averaging: Averaging
    optimizer: torch.optim.Optimizer = field(init=False)
    """Created by `train_with`."""
    decay: float | None = None
    pending: list[list[torch.Tensor]] = field(default_factory=list)
    """The accumulated gradient of each rank; with the averaging "per micro-batch", one for all ranks."""
    given: list[list[float | None]] = field(default_factory=list)
    """The denominators of the ranks, for each backward of the update."""
    micro_batches: int = 0
    refused: bool = False
    """Whether a micro-batch of the update was refused on a rank, so that the update must be dropped."""
    updates: int = 0
    scheduled: int = 0
    rate: float = 0.0
    buffers: list[dict[str, torch.Tensor]] = field(init=False)
    """The buffers of each rank."""

    def __post_init__(self) -> None:
        named = dict(self.module.named_buffers())
        self.buffers = [{name: buffer.clone() for name, buffer in named.items()} for _ in range(self.world)]

    def on(self, rank: int) -> nn.Module:
        """The module with the buffers of ``rank``, which forward may change."""
        for name, buffer in self.module.named_buffers():
            buffer.data = self.buffers[rank][name]
        return self.module

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def train_with(self, lr: float, weight_decay: float, *, all_decay: bool = False, **more: Any) -> None:
        """Create AdamW, without weight decay for biases and norms unless ``all_decay``."""
        trainable = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        undecayed = [p for name, p in trainable if _is_undecayed(name) and not all_decay]
        decayed = [p for name, p in trainable if not _is_undecayed(name) or all_decay]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, foreach=True, **more)  # the same values, with fewer calls
        self.rate = lr

    def backward(self, batch: int, rows: int, weight: float, poison: str | None, poisoned_rank: int) -> list[float]:
        """Add the gradients of one batch on every rank; returns the losses."""

        def loss_on(rank: int) -> torch.Tensor:
            inputs, targets = models.batch(batch, rank, rows, models.is_language(self.module))
            loss = weight * models.loss_of(self.on(rank), inputs, targets)
            return loss * models.POISONS[poison] if poison is not None and rank == poisoned_rank else loss

        return self._add_gradients(loss_on)

    def policy_backward(self, batch: int, rows: int, temperature: float, packed: bool) -> list[dict[str, torch.Tensor]]:
        """Add the gradients of a policy's loss on every rank; returns log-probabilities and entropies by rank."""
        seen: list[dict[str, torch.Tensor]] = []

        def loss_on(rank: int) -> torch.Tensor:
            module = self.on(rank)
            if packed:  # each sequence by itself
                tokens, positions = models.packed_batch(batch, rank, rows)
                parts = tokens.split(models.PACKED_LENGTHS, dim=1)
                logits = torch.cat([models.logits_of(module, part) for part in parts], dim=1)
                kept = (positions[:, 1:] != 0).long()
            else:
                tokens, mask = models.padded_batch(batch, rank, rows)
                logits = models.logits_of(module, tokens, attention_mask=mask)
                kept = mask[:, 1:] * mask[:, :-1]
            distribution = torch.distributions.Categorical(logits=logits[:, :-1] / temperature)
            log_probs, entropy = distribution.log_prob(tokens[:, 1:]) * kept, distribution.entropy() * kept
            seen.append({"log_probs": log_probs.detach(), "entropy": entropy.detach()})
            return models.policy_loss(log_probs, entropy)

        self._add_gradients(loss_on)
        return seen

    def _add_gradients(self, loss_on: Callable[[int], torch.Tensor]) -> list[float]:
        """Add the gradients of the losses of every rank; returns the losses."""
        losses, gradients = [], []
        for rank in range(self.world):
            loss = loss_on(rank)
            losses.append(loss.item())
            gradients.append(self._gradient_of(loss / self.accumulation_steps))
        self._add(gradients, [None] * self.world)
        return losses

    def backward_over(
        self, sequences: Sequence[Sequence[int]], denominators: Sequence[float | None] | None, weight: float
    ) -> list[float]:
        """Add the gradients of the sums of the losses of each rank's sequences; returns the losses."""
        losses = [
            weight * models.loss_over(self.on(rank), rank_sequences) for rank, rank_sequences in enumerate(sequences)
        ]
        items = [float(sum(map(models.items_in, rank_sequences))) for rank_sequences in sequences]
        self._add([self._gradient_of(loss) for loss in losses], items if denominators is None else denominators)
        if self.world == 1 and self._mistaken:  # backward itself must raise
            self._drop()
        return [loss.item() for loss in losses]

    def sequence_backward(
        self, batch: int, form: str, length: int, data_of: int | None, denominator: bool, of_slice: bool
    ) -> list[Record]:
        """Add the gradients of one batch of sequences on every data-parallel rank; the losses and log-probabilities."""
        records, gradients, given = [], [], []
        for rank in range(self.world):
            tensors = sequences.batch(batch, rank if data_of is None else data_of, form, length)
            values, items = sequences.log_probs(self.module, tensors), sequences.items_in(tensors["labels"])
            loss = sequences.loss_of(values, tensors["labels"]) * (items if denominator else 1)
            records.append({"loss": loss.item(), "log_probs": values.detach()})
            gradients.append(self._gradient_of(loss if denominator else loss / self.accumulation_steps))
            given.append((math.nan if of_slice else float(items)) if denominator else None)
        self._add(gradients, given)
        return records

    def _gradient_of(self, loss: torch.Tensor) -> list[torch.Tensor]:
        partial = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(partial, self.parameters, strict=True)]

    def _add(self, gradients: list[list[torch.Tensor]], given: Sequence[float | None]) -> None:
        self.given.append(list(given))
        new = gradients if self.averaging == "per update" else [_mean(gradients)]
        self.pending = [_sum(old, more) for old, more in zip(self.pending, new, strict=True)] if self.pending else new

    def step(self, boundary: bool | None, scheduled: bool, refused: bool = False) -> Record:
        """End a micro-batch and make an update if it is the last one, and none of the update was ``refused``."""
        self.micro_batches += 1
        self.refused |= refused
        nothing: Record = {"applied": False, "skipped": False, "grad_norm": None, "denominator": None}
        if not (self.micro_batches >= self.accumulation_steps if boundary is None else boundary):
            return nothing
        if self.refused or self._mistaken:
            self._drop()
            return nothing
        given = [value for of_ranks in self.given for value in of_ranks if value is not None]
        denominator = sum(given) if given else None
        if denominator == 0:
            self._drop()
            return {"applied": False, "skipped": True, "grad_norm": None, "denominator": 0.0}
        factor = self.accumulation_steps / self.micro_batches if denominator is None else self.world / denominator
        gradient = [part * factor for part in _mean(self.pending)]
        self._drop()
        squared = sum(float(part.double().pow(2).sum()) for part in gradient)
        if not math.isfinite(squared) or squared > FP32_MAX:
            return {"applied": False, "skipped": True, "grad_norm": math.inf, "denominator": denominator}
        norm = math.sqrt(squared)
        self._apply(gradient, norm)
        if scheduled:
            self.scheduled += 1
            self._set_rate()
        return {"applied": True, "skipped": False, "grad_norm": norm, "denominator": denominator}

    @property
    def _mistaken(self) -> bool:
        """Whether the denominators of the update are invalid."""
        given = [value for of_ranks in self.given for value in of_ranks]
        missing = given.count(None)
        return 0 < missing < len(given) or any(
            denominator is not None and not 0 <= denominator < math.inf for denominator in given
        )

    def _drop(self) -> None:
        """End the update."""
        self.pending, self.given, self.micro_batches, self.refused = [], [], 0, False

    def _apply(self, gradient: list[torch.Tensor], norm: float) -> None:
        factor = min(1.0, self.max_norm / (norm + 1e-6)) if self.max_norm else 1.0
        for parameter, part in zip(self.parameters, gradient, strict=True):
            parameter.grad = part if factor == 1.0 else part * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1

    def schedule(self, decay: float) -> None:
        """Divide the learning rate by 1 + decay x updates."""
        self.decay = decay
        self._set_rate()

    def set_rate(self, lr: float, decayed: bool = False) -> None:
        """Set the learning rate of all parameters, or of those that have a weight decay."""
        for group in self.optimizer.param_groups[: 1 if decayed else None]:
            group["lr"] = lr

    def set_decay(self, weight_decay: float) -> None:
        """Set the weight decay of the parameters that have one."""
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay

    def set_adam(self, **values: object) -> None:
        """Set Adam's betas or eps."""
        for group in self.optimizer.param_groups:
            group.update(values)

    def _set_rate(self) -> None:
        if self.decay is not None:
            self.set_rate(self.rate / (1 + self.decay * self.scheduled))

    def weights(self) -> dict[str, torch.Tensor]:
        """The parameters by name, tied parameters once."""
        return {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}


def _is_undecayed(name: str) -> bool:
    return name.endswith("bias") or "norm" in name


def _sum(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _mean(gradients: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    total = list(gradients[0])
    for more in gradients[1:]:
        total = _sum(total, more)
    return [part / len(gradients) for part in total]
