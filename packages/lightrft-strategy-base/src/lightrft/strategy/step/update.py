"""One update, from top to bottom: guard, backward, accumulate, normalise, reduce, norm, skip, clip, step, schedule.

An update takes K micro-batches on each rank. In a micro-batch `backward` may be called any number of times and
`optimizer_step` once; the K-th `optimizer_step` makes the update from the mean of the losses over the micro-batches and
the ranks. What differs between backends is behind the hooks of `lightrft.strategy.backend.contract.Step`.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightrft.config import ArgumentError, ArgumentTypeError, StrategyError
from lightrft.config.validation import shown
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.replicated import fill_missing
from lightrft.strategy.backend.types import TrainedModel
from lightrft.strategy.step.gradients import clip_factor, depends_on, global_norm, scale


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one `optimizer_step` did."""

    applied: bool
    """Whether the weights were updated."""
    skipped: bool
    """Whether the update was skipped, because the gradient was not finite on some rank."""
    grad_norm: float | None
    """Global 2-norm of the gradient before clipping; None between updates; not finite if skipped."""


BETWEEN_UPDATES = StepResult(applied=False, skipped=False, grad_norm=None)


def backward(backend: Backend, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
    """Add the gradient of ``loss``, a scalar with a graph, to the gradient of the update in progress."""
    _check_loss(backend, trained, loss)
    if not isinstance(retain_graph, bool):
        raise ArgumentTypeError(f"backward: expected retain_graph to be True or False, got {shown(retain_graph)}")
    _check_untouched(trained, "backward")
    # The mean over K micro-batches; `optimizer_step` corrects it if an update has another number of them.
    share = loss if trained.accumulation_steps == 1 else loss / trained.accumulation_steps
    backend.backward(trained, share, retain_graph=retain_graph)
    trained.backwards += 1
    trained.gradients_seen = _gradients(trained)


def optimizer_step(
    backend: Backend, trained: TrainedModel, scheduler: LRScheduler | None, boundary: bool | None,
    agree: Callable[[object], None],
) -> StepResult:  # fmt: skip
    """End a micro-batch and, if it is the last of its update, make the update. All ranks must call this.

    Args:
        backend: Reduces the gradient, and may fuse the rest of the update.
        trained: The model and its optimizer.
        scheduler: Stepped after an update that was applied.
        boundary: Whether this micro-batch is the last. None: the K-th is.
        agree: Raises on every rank unless all ranks pass the same value. A counted boundary needs no agreement,
            because all ranks count alike.

    Raises:
        StrategyError: There was no backward since the last update, or too many updates in a row were not finite.
    """
    _check_scheduler(trained, scheduler)
    _check_untouched(trained, "optimizer_step")
    if not (boundary is None or isinstance(boundary, bool)):
        raise ArgumentTypeError(
            f"optimizer_step: expected boundary to be True, False or None, got {shown(boundary)}. Pass a bool"
        )
    trained.micro_batches += 1
    if boundary is not None:
        agree({"boundary": boundary, "micro-batches": trained.micro_batches})
    if not (trained.micro_batches >= trained.accumulation_steps if boundary is None else boundary):
        return BETWEEN_UPDATES
    if not trained.backwards:
        trained.micro_batches = 0
        raise StrategyError(
            f"optimizer_step: expected a backward since the last update of this model ({trained.class_name}), got none. "
            f"Call strategy.backward(loss, model, optimizer) for each micro-batch"
        )
    _check_frozen(trained)
    factor = trained.accumulation_steps / trained.micro_batches  # for the mean over the actual number of micro-batches
    trained.updating = True
    try:
        if backend.fused_step is not None:
            norm = backend.fused_step(trained, factor)
        else:
            norm = reduce_clip_and_step(backend, trained, factor)
    finally:
        trained.updating = False
    trained.gradients_seen = _gradients(trained)
    trained.micro_batches = trained.backwards = 0
    if not math.isfinite(norm):
        return _skip(trained, norm, backend.config.max_skipped_updates)
    trained.updates += 1
    trained.skipped_in_a_row = 0
    _schedule(trained, scheduler)
    return StepResult(applied=True, skipped=False, grad_norm=norm)


def reduce_clip_and_step(backend: Backend, trained: TrainedModel, factor: float) -> float:
    """Reduce the gradient, multiply it by ``factor``, clip it, step the optimizer, and clear the gradient.

    Returns:
        The norm before clipping, equal on all ranks. If it is not finite, every rank skips the optimizer's step.
    """
    backend.reduce(trained)
    _require_gradient(trained)
    fill_missing(trained.parameters)
    shards = backend.gradient_shards(trained)
    norm = global_norm(shards).item() * factor
    if math.isfinite(norm):
        scale(shards, factor * clip_factor(norm, backend.config.max_norm))
        trained.optimizer.step()
    for parameter in trained.parameters:
        parameter.grad = None
    return norm


def _schedule(trained: TrainedModel, scheduler: LRScheduler | None) -> None:
    """Step the scheduler after an update that was applied."""
    if scheduler is not None:
        trained.scheduler = scheduler
        scheduler.step()
    elif trained.scheduler is not None and trained.updates == 1:
        warnings.warn(
            f"optimizer_step: {trained.class_name} was prepared with a scheduler ({type(trained.scheduler).__name__}), "
            f"which steps only if it is passed. Call optimizer_step(optimizer, model, scheduler)",
            stacklevel=5,
        )


def _skip(trained: TrainedModel, norm: float, max_skipped_updates: int) -> StepResult:
    """Count a skipped update. Raise `StrategyError` after ``max_skipped_updates`` in a row; 0 means never."""
    trained.skipped += 1
    trained.skipped_in_a_row += 1
    if max_skipped_updates and trained.skipped_in_a_row >= max_skipped_updates:
        raise StrategyError(
            f"optimizer_step: expected a finite gradient of {trained.class_name}, got {trained.skipped_in_a_row} updates "
            f"in a row that are not finite (norm {norm}). The weights are those of update {trained.updates}. Check the "
            f"loss and the learning rate, or raise max_skipped_updates={max_skipped_updates} to tolerate more"
        )
    return StepResult(applied=False, skipped=True, grad_norm=norm)


# Guards


def _check_loss(backend: Backend, trained: TrainedModel, loss: object) -> None:
    """Raise unless ``loss`` is a scalar tensor with a graph that leads to the parameters of ``trained``."""
    if not isinstance(loss, torch.Tensor):
        raise ArgumentError(f"backward: expected the loss to be a scalar tensor, got {shown(loss)}")
    if loss.numel() != 1 or loss.ndim > 1:
        raise ArgumentError(
            f"backward: expected the loss to be a scalar, got shape {tuple(loss.shape)}. Reduce it, for example with .mean()"
        )
    if not loss.requires_grad:
        raise StrategyError(
            "backward: expected a loss with a graph, got requires_grad=False. The loss was detached, computed under "
            "torch.no_grad, or depends on no trainable parameter. Compute it from the model's outputs, with gradients enabled"
        )
    if not depends_on(loss, backend.graph_leaves(trained), backend.transparent):
        raise StrategyError(
            f"backward: expected a loss that depends on a trainable parameter of {trained.class_name}, got one that does "
            f"not. Pass the model that computed it"
        )


def _check_scheduler(trained: TrainedModel, scheduler: LRScheduler | None) -> None:
    """Raise, before anything changes, if ``scheduler`` cannot be stepped with an update of ``trained``."""
    if scheduler is None:
        return
    name = type(scheduler).__name__
    if not callable(getattr(scheduler, "step", None)):
        raise ArgumentTypeError(f"optimizer_step: expected a scheduler with step(), got {shown(scheduler)}")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ArgumentError(
            f"optimizer_step: expected a scheduler that steps by updates, got {name}, which steps by a metric. Step it "
            f"yourself, and pass no scheduler"
        )
    if getattr(scheduler, "optimizer", trained.optimizer) is not trained.optimizer:
        raise StrategyError(
            f"optimizer_step: expected the scheduler of this model's optimizer ({trained.class_name}), got a {name} of "
            f"another optimizer"
        )


def _gradients(trained: TrainedModel) -> list[tuple[torch.Tensor | None, int]]:
    """Return the gradients of the first and the last parameter with their versions: enough to notice what a script does."""
    gradients = [parameter.grad for parameter in trained.parameters[:1] + trained.parameters[-1:]]
    local = [
        getattr(gradient, "_local_tensor", gradient) for gradient in gradients
    ]  # a DTensor has no version of its own
    return [(gradient, 0 if part is None else part._version) for gradient, part in zip(gradients, local, strict=True)]


def _check_untouched(trained: TrainedModel, call: str) -> None:
    """Raise `StrategyError` for what a script did to the optimizer or the gradients since the last call."""
    if [len(group["params"]) for group in trained.optimizer.param_groups] != trained.group_sizes:
        raise StrategyError(
            f"{call}: expected the parameter groups with which {trained.class_name} was prepared, got others. Give the optimizer "
            f"all parameters before prepare, those that train later with a learning rate of 0 until then"
        )
    for (now, version), (left, left_version) in zip(_gradients(trained), trained.gradients_seen, strict=True):
        if now is not left or version != left_version:
            raise StrategyError(
                f"{call}: expected gradients of {trained.class_name} that strategy.backward made, got some that were cleared, made "
                f"or changed by hand, or by a backward that failed. Leave out zero_grad, loss.backward and clip_grad_norm_: strategy.backward adds up the "
                f"gradients of an update, and optimizer_step clips and clears them"
            )


def _check_frozen(trained: TrainedModel) -> None:
    unfrozen = [name for name, parameter in trained.frozen.items() if parameter.requires_grad]
    if unfrozen:
        raise StrategyError(
            f"optimizer_step: expected the {len(unfrozen)} parameters of {trained.class_name} that were frozen when it was "
            f"prepared to stay frozen, got requires_grad=True ({unfrozen[0]} first). Prepare the model with every parameter "
            f"trainable that is to train later"
        )


def _require_gradient(trained: TrainedModel) -> None:
    if all(parameter.grad is None for parameter in trained.parameters):
        raise StrategyError(
            f"optimizer_step: expected a gradient of {trained.class_name}, got none, although backward was called. The "
            f"loss was another model's, or depends on no parameter"
        )
