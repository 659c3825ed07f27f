"""The gradient of one update: whether a loss leads to it, its global norm, its clip factor, and what a script may not do.

A gradient may consist of several sets of shards, each sharded over one process group (FSDP2 meshes, for example). Every
element counts once in the norm, whichever rank holds it. Until the update, a script may neither clear or change the
gradient nor step the optimizer.
"""

import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import BackwardCFunction

from lightrft.config import ArgumentError, StrategyError, UnsupportedOperationError
from lightrft.config.validation import shown
from lightrft.strategy import log_probs
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.types import GradientShards, TrainedModel
from lightrft.strategy.parallel.exchange import OWN_NODES

_SPARSE = re.compile(r"'Sparse\w+' backend|dense and sparse Tensors")
"""torch's message for an operation that sparse tensors lack."""


def depends_on(loss: torch.Tensor, leaves: Collection[int], transparent: Collection[str] = ()) -> bool:
    """Return whether the graph of ``loss`` leads to one of ``leaves``, as far as the graph is visible.

    A custom autograd function, such as activation checkpointing, hides what is behind it, so it counts as leading there.
    The search is breadth-first, because the last layers are near.

    Args:
        loss: A scalar with a graph.
        leaves: The ``id`` of each tensor to look for.
        transparent: Class names of custom autograd functions behind which the graph is visible.
    """
    if id(loss) in leaves:
        return True
    pending: deque[Any] = deque([] if loss.grad_fn is None else [loss.grad_fn])
    seen = set(pending)
    while pending:
        node = pending.popleft()
        if id(getattr(node, "variable", None)) in leaves:
            return True
        if isinstance(node, BackwardCFunction) and type(node).__name__ not in transparent:
            return True
        inputs = [function for function, _ in node.next_functions if function is not None and function not in seen]
        seen.update(inputs)
        pending.extend(inputs)
    return False


def global_norm(shards: Sequence[GradientShards]) -> torch.Tensor:
    """Return the 2-norm over all elements of all shards on all ranks: fp32, 0-dim, equal on every rank of the groups.

    The host does not wait for the device. Every rank of the groups must call this. As in DeepSpeed, the norm is infinite if
    its square exceeds fp32, even if every element is finite.
    """
    squares = [_squared_norm(part) for part in shards] or [torch.zeros((), dtype=torch.float64)]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().float().sqrt()


def _squared_norm(shards: GradientShards) -> torch.Tensor:
    norms = list(torch._foreach_norm(list(shards.tensors))) if shards.tensors else []
    device = shards.tensors[0].device if shards.tensors else torch.device("cpu")
    squared = (
        torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
    )
    if shards.group is not None:
        dist.all_reduce(squared, group=shards.group)
    return squared


def clip_factor(norm: float, max_norm: float | None) -> float:
    """Return the factor that clips a gradient of ``norm``: ``min(1, max_norm / (norm + 1e-6))``, as in torch.

    ``max_norm`` None or 0 means no clipping.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0


def scale(shards: Sequence[GradientShards], factor: float) -> None:
    """Multiply every gradient by ``factor``, in place. A factor of 1 leaves it bit-identical."""
    if factor != 1.0:
        for part in shards:
            if part.tensors:
                torch._foreach_mul_(list(part.tensors), factor)


# What a script may have done


def check_loss(backend: Backend, trained: TrainedModel, loss: object) -> None:
    """Raise unless ``loss`` is a scalar tensor with a graph that leads to the parameters of ``trained``."""
    if not isinstance(loss, torch.Tensor):
        raise ArgumentError(
            f"backward: expected the loss to be a scalar tensor, got {shown(loss)}. Pass the tensor that the loss function returned"
        )
    if loss.numel() != 1 or loss.ndim > 1:
        raise ArgumentError(
            f"backward: expected the loss to be a scalar, got shape {tuple(loss.shape)}. Reduce it, for example with .mean()"
        )
    if not loss.requires_grad:
        raise StrategyError(
            "backward: expected a loss with a graph, got requires_grad=False. The loss was detached, computed under "
            "torch.no_grad, or depends on no trainable parameter. Compute it from the model's outputs, with gradients enabled"
        )
    if not depends_on(loss, backend.graph_leaves(trained), backend.transparent | OWN_NODES | log_probs.TRANSPARENT):
        raise StrategyError(
            f"backward: expected a loss that depends on a trainable parameter of {trained.class_name}, got one that does "
            f"not. Pass the model that computed it"
        )


def check_untouched(trained: TrainedModel, call: str) -> None:
    """Raise `StrategyError` for what a script did to the optimizer or the gradients since the last call."""
    if [len(group["params"]) for group in trained.optimizer.param_groups] != trained.group_sizes:
        raise StrategyError(
            f"{call}: expected the parameter groups with which {trained.class_name} was prepared, got others. Give the optimizer "
            f"all parameters before prepare; give those that train later a learning rate of 0 until then"
        )
    for (now, version), (left, left_version) in zip(versions(trained), trained.gradients_seen, strict=True):
        if now is not left or version != left_version:
            raise StrategyError(
                f"{call}: expected gradients of {trained.class_name} that only strategy.backward made, got gradients that "
                f"the script or a failed backward made, changed or cleared. Leave out zero_grad, loss.backward and "
                f"clip_grad_norm_: strategy.backward adds up the gradients of an update, and optimizer_step clips and clears them"
            )


def check_zero_grad(trained: TrainedModel | None, call: str) -> None:
    """Raise `StrategyError` within an update, whose gradients would be lost."""
    if trained is not None and trained.has_pending_gradient and not trained.updating:
        raise StrategyError(
            f"{call}: expected no call within an update of {trained.class_name}, got one after {trained.backward_calls} calls of "
            f"backward, whose gradients would be lost. Leave it out: optimizer_step clears the gradients after each update"
        )


def guard_optimizer(trained: TrainedModel) -> Callable[[], None]:
    """Refuse what a script may do to the optimizer of a model in training, and what backends would take differently.

    Direct ``step`` calls, ``add_param_group``, and ``zero_grad`` within an update.

    Returns:
        A function that undoes this.
    """
    optimizer, name = trained.optimizer, type(trained.optimizer).__name__
    clear = optimizer.zero_grad

    def check_step(*_: object) -> None:
        if not trained.updating:
            raise StrategyError(
                f"{name}.step: expected {trained.class_name} to be stepped by the strategy, which reduces and clips its "
                f"gradients, got a direct call. Call strategy.optimizer_step(optimizer, model, scheduler) instead"
            )

    def add_param_group(*_: object) -> None:
        raise StrategyError(
            f"{name}.add_param_group: expected the parameter groups with which {trained.class_name} was prepared, got another. "
            f"Give the optimizer all parameters before prepare; give those that train later a learning rate of 0 until then"
        )

    def zero_grad(*args: Any, **kwargs: Any) -> None:
        check_zero_grad(trained, f"{name}.zero_grad")
        clear(*args, **kwargs)

    handle = optimizer.register_step_pre_hook(check_step)
    vars(optimizer).update(zero_grad=zero_grad, add_param_group=add_param_group)

    def undo() -> None:
        handle.remove()
        for attribute in ("zero_grad", "add_param_group"):
            vars(optimizer).pop(attribute, None)

    return undo


def versions(trained: TrainedModel) -> list[tuple[torch.Tensor | None, int]]:
    """Return the gradients of the first and the last parameter with their versions: enough to notice what a script does."""
    gradients = [parameter.grad for parameter in trained.parameters[:1] + trained.parameters[-1:]]
    local = [getattr(gradient, "_local_tensor", gradient) for gradient in gradients]  # a DTensor has no version counter
    return [(gradient, 0 if part is None else part._version) for gradient, part in zip(gradients, local, strict=True)]


def check_dense(trained: TrainedModel) -> None:
    """Raise if a parameter of ``trained`` has a sparse gradient, and drop the gradient."""
    sparse = [parameter for parameter in trained.parameters if parameter.grad is not None and parameter.grad.is_sparse]
    if not sparse:
        return
    for parameter in trained.parameters:
        parameter.grad = None
    raise UnsupportedOperationError(
        f"optimizer_step: expected dense gradients of {trained.class_name}, got a sparse one for a parameter of shape "
        f"{tuple(sparse[0].shape)}. Pass sparse=False to its embedding"
    )


@contextmanager
def refusing_sparse_gradients(trained: TrainedModel, call: str) -> Iterator[None]:
    """Name the cause if a backend that shards gradients fails at a sparse one in the body."""
    try:
        yield
    except RuntimeError as error:
        if not _SPARSE.search(str(error)):
            raise
        raise UnsupportedOperationError(
            f"{call}: expected dense gradients of {trained.class_name}, got a sparse one, which cannot be sharded "
            f"({str(error).splitlines()[0][:100]}). Pass sparse=False to its embedding"
        ) from error


def require_gradient(trained: TrainedModel) -> None:
    """Raise if no parameter of ``trained`` has a gradient."""
    if all(parameter.grad is None for parameter in trained.parameters):
        raise StrategyError(
            f"optimizer_step: expected a gradient of {trained.class_name}, got none, although backward was called. The "
            f"loss was another model's, or depends on no parameter"
        )


def check_frozen(trained: TrainedModel) -> None:
    """Raise if a parameter that was frozen when it was prepared is to train now."""
    unfrozen = [name for name, parameter in trained.frozen.items() if parameter.requires_grad]
    if unfrozen:
        raise StrategyError(
            f"optimizer_step: expected the {len(unfrozen)} parameters of {trained.class_name} that were frozen when it was "
            f"prepared to stay frozen, got requires_grad=True ({unfrozen[0]} first). Set requires_grad=True before prepare for "
            f"every parameter that will train later"
        )
