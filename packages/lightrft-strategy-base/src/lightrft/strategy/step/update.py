"""One update, from top to bottom: guard, backward, accumulate, normalise, reduce, norm, skip, clip, step, schedule.

An update takes K micro-batches on each rank. In a micro-batch `backward` may be called any number of times and
`optimizer_step` once; the K-th `optimizer_step` makes the update from the mean of the losses over the micro-batches and
the ranks or, with denominators, from the sum of the losses over the sum of the denominators. What differs between
backends is behind the hooks of `lightrft.strategy.backend.contract.Step`.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.optim.lr_scheduler import LRScheduler

from lightrft.config import ArgumentTypeError, LightRFTError, StrategyError
from lightrft.config.validation import shown
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.replicated import fill_missing_gradients
from lightrft.strategy.backend.types import GradientShards, TrainedModel
from lightrft.strategy.distributed.rank_consensus import RankConsensus, require_equal
from lightrft.strategy.distributed.world import World
from lightrft.strategy.step import denominators
from lightrft.strategy.step.denominators import Denominator, PendingTotals, Totals
from lightrft.strategy.step.gradients import (
    check_dense,
    check_frozen,
    check_loss,
    check_untouched,
    clip_factor,
    global_norm,
    refusing_sparse_gradients,
    require_gradient,
    scale,
    versions,
)
from lightrft.strategy.step.result import BETWEEN_UPDATES, StepResult
from lightrft.strategy.step.schedules import check_scheduler


def backward(
    backend: Backend, trained: TrainedModel, loss: torch.Tensor, *, denominator: object, retain_graph: bool
) -> None:
    """Add the gradient of ``loss``, a scalar with a graph, to the gradient of the update in progress."""
    check_loss(backend, trained, loss)
    try:
        items = denominators.validated(denominator, backend.world.device)
    except LightRFTError:
        if backend.world.size == 1:
            raise
        items = denominators.NotANumber(denominator)
    if not isinstance(retain_graph, bool):
        raise ArgumentTypeError(f"backward: expected retain_graph to be True or False, got {shown(retain_graph)}")
    check_untouched(trained, "backward")
    _check_denominator(backend, trained, items)
    # The mean over K micro-batches; `optimizer_step` corrects it if an update has another number of them.
    share = loss if items is not None or trained.accumulation_steps == 1 else loss / trained.accumulation_steps
    with refusing_sparse_gradients(trained, "backward"):
        backend.backward(trained, share, retain_graph=retain_graph)
    trained.backward_calls += 1
    trained.denominators.append(items)
    value = getattr(loss, "_local_tensor", loss).detach().reshape(())
    trained.losses.append(value.to(backend.world.device, torch.float64, copy=True))
    trained.gradients_seen = versions(trained)


def optimizer_step(
    backend: Backend, trained: TrainedModel, scheduler: LRScheduler | None, boundary: bool | None,
    consensus: RankConsensus,
) -> StepResult:  # fmt: skip
    """End a micro-batch and, if it is the last of its update, make the update. All ranks must call this.

    Args:
        backend: Reduces the gradient, and may fuse the rest of the update.
        trained: The model and its optimizer.
        scheduler: Stepped after an update that was applied.
        boundary: Whether this micro-batch is the last. None: the K-th is.
        consensus: Checks that all ranks pass the same ``boundary``. Without ``boundary`` no check is needed, because
            the count is the same on all ranks.

    Raises:
        ArgumentError: A denominator of the update was negative or not finite.
        StrategyError: There was no backward since the last update, losses came with and without denominators, or too many
            updates in a row were not finite.
    """
    if scheduler is not None:
        try:
            check_scheduler(trained, scheduler)
        except LightRFTError as error:
            defer_to_boundary(error, trained, backend.world)
    check_untouched(trained, "optimizer_step")
    with _micro_batch(trained):
        if boundary is not None:
            _agree_on_boundary(consensus, boundary, trained.micro_batches)
        if not (trained.micro_batches >= trained.accumulation_steps if boundary is None else boundary):
            return BETWEEN_UPDATES
        if not trained.backward_calls:
            trained.micro_batches = 0
            raise StrategyError(
                f"optimizer_step: expected a backward since the last update of this model ({trained.class_name}), got "
                f"none. Call strategy.backward(loss, model, optimizer) for each micro-batch"
            )
        check_frozen(trained)
        totals, norm, loss = _make_update(backend, trained)
    deferred, given = trained.deferred_error, _end_update(trained)
    if totals.update_is_invalid:
        with consensus.together("optimizer_step", report=lambda: denominators.report(given)) as reports:
            if deferred is not None:
                raise deferred
        only = totals.differ and not totals.invalid and not (totals.with_denominator and totals.without_denominator)
        raise denominators.invalid_update_error("optimizer_step", trained.class_name, reports, differ=only)
    if totals.denominator == 0:
        trained.skipped += 1
        return StepResult(applied=False, skipped=True, grad_norm=None, denominator=0.0)
    if not math.isfinite(norm):
        return _skip(trained, norm, totals.denominator, loss, backend.config.max_skipped_updates)
    trained.updates += 1
    trained.skipped_in_a_row = 0
    _schedule(trained, scheduler)
    return StepResult(applied=True, skipped=False, grad_norm=norm, denominator=totals.denominator, loss=loss)


def defer_to_boundary(error: LightRFTError, trained: TrainedModel, world: World) -> None:
    """Keep an error until the call that ends the update, where all ranks raise it and the update is dropped.

    If one of several ranks raised alone, the others would wait for it in the update. A single rank raises at once, and so
    does one without a gradient, which makes no update.
    """
    if world.size == 1 or not trained.backward_calls:
        raise error
    if trained.deferred_error is None:
        error.args = (f"{error}. The update was dropped, and {trained.class_name} and its optimizer are unchanged",)
        trained.deferred_error = error


@contextmanager
def _micro_batch(trained: TrainedModel) -> Iterator[None]:
    """Count a micro-batch, unless the body refuses to end it: a call that is repeated must not count it again."""
    trained.micro_batches += 1
    try:
        yield
    except LightRFTError:
        if trained.micro_batches:
            trained.micro_batches -= 1
        raise


def _agree_on_boundary(consensus: RankConsensus, boundary: object, micro_batches: int) -> None:
    """Raise on every rank unless all pass the same ``boundary``, a bool, after the same number of micro-batches."""
    own = {"boundary": boundary if isinstance(boundary, bool) else shown(boundary), "micro-batches": micro_batches}
    with consensus.together("optimizer_step", report=lambda: own) as reports:
        if not isinstance(boundary, bool):
            raise ArgumentTypeError(
                f"optimizer_step: expected boundary to be True, False or None, got {shown(boundary)}. Pass a bool"
            )
    require_equal("optimizer_step", reports)


@contextmanager
def _dropping(trained: TrainedModel) -> Iterator[None]:
    """End the update if the body raises because there is no gradient, or none any more."""
    try:
        yield
    except LightRFTError:
        _end_update(trained)
        raise


def _make_update(backend: Backend, trained: TrainedModel) -> tuple[Totals, float, float | None]:
    """Reduce, normalise, clip and step, unless the norm is not finite or there is nothing to update from; clear the gradient.

    Returns:
        The totals of the denominators, the norm before clipping, and the loss, equal on all ranks.
    """
    sharing = backend.config.sp_size
    data_ranks = backend.world.size // sharing
    # Summed over the ranks while the gradient is reduced.
    pending = PendingTotals(
        trained.denominators,
        backend.world,
        sharing=sharing,
        losses=trained.losses,
        other_error=trained.deferred_error is not None,
    )
    # For the mean over the actual number of micro-batches.
    mean = trained.accumulation_steps / trained.micro_batches
    trained.updating = True
    try:
        if backend.fused_step is not None:
            totals = pending.read()
            with refusing_sparse_gradients(trained, "optimizer_step"):
                norm = backend.fused_step(trained, totals.factor(data_ranks, mean))
        else:
            shards = _reduced_gradient(backend, trained)
            totals, norm = pending.read_with(global_norm(shards))
            norm = _clip_and_step(backend, trained, shards, norm, totals.factor(data_ranks, mean))
        return totals, norm, totals.mean_of(pending.losses(), data_ranks * trained.micro_batches)
    finally:
        trained.updating = False


def reduce_clip_and_step(backend: Backend, trained: TrainedModel, factor: float) -> float:
    """Do what a `fused_step` does, with the separate hooks."""
    shards = _reduced_gradient(backend, trained)
    return _clip_and_step(backend, trained, shards, global_norm(shards).item(), factor)


def _reduced_gradient(backend: Backend, trained: TrainedModel) -> Sequence[GradientShards]:
    with _dropping(trained):
        check_dense(trained)
    backend.reduce(trained)
    with _dropping(trained):
        require_gradient(trained)
    fill_missing_gradients(trained.parameters)
    return backend.gradient_shards(trained)


def _clip_and_step(
    backend: Backend, trained: TrainedModel, shards: Sequence[GradientShards], norm: float, factor: float
) -> float:
    """Multiply the gradient, which has ``norm``, by ``factor``, clip it, step the optimizer, and clear the gradient.

    Returns:
        The norm before clipping. If it is not finite, the optimizer does not step.
    """
    norm *= factor
    if math.isfinite(norm):
        scale(shards, factor * clip_factor(norm, backend.config.max_norm))
        trained.optimizer.step()
    for parameter in trained.parameters:
        parameter.grad = None
    return norm


def _end_update(trained: TrainedModel) -> list[Denominator]:
    """Reset the counters of the update, after its gradient was cleared. Return its denominators."""
    given, trained.denominators, trained.losses = trained.denominators, [], []
    trained.micro_batches, trained.backward_calls, trained.deferred_error = 0, 0, None
    trained.gradients_seen = versions(trained)
    return given


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


def _skip(
    trained: TrainedModel, norm: float, denominator: float | None, loss: float | None, max_skipped_updates: int
) -> StepResult:
    """Count an update that is not finite. Raise `StrategyError` after ``max_skipped_updates`` in a row; 0 means never."""
    trained.skipped += 1
    trained.skipped_in_a_row += 1
    if max_skipped_updates and trained.skipped_in_a_row >= max_skipped_updates:
        raise StrategyError(
            f"optimizer_step: expected a finite gradient of {trained.class_name}, got {trained.skipped_in_a_row} updates "
            f"in a row that are not finite (norm {norm}). The weights are those of update {trained.updates}. Check the "
            f"loss and the learning rate, or raise max_skipped_updates={max_skipped_updates} to tolerate more"
        )
    return StepResult(applied=False, skipped=True, grad_norm=norm, denominator=denominator, loss=loss)


# Guards


def _check_denominator(backend: Backend, trained: TrainedModel, denominator: Denominator) -> None:
    """Raise, on a single rank, for a denominator that no update can be made with, and drop the update in progress.

    One of several ranks must not raise alone, because the others continue. There, `optimizer_step` raises on all.
    """
    if backend.world.size > 1 or not denominators.invalidates_update(denominator, trained.denominators):
        return
    given = [*trained.denominators, denominator]
    if trained.backward_calls and backend.fused_step is not None:
        backend.fused_step(trained, math.nan)
    for parameter in trained.parameters:
        parameter.grad = None
    _end_update(trained)
    raise denominators.invalid_update_error("backward", trained.class_name, [denominators.report(given)])
