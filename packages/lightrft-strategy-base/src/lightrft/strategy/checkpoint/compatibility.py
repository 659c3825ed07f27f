"""Checks, before anything changes, that a checkpoint matches the objects it is loaded into."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.types import TrainedModel
from lightrft.strategy.checkpoint import restore_optimizer
from lightrft.strategy.checkpoint.checkpoint_items import SINGLE, CheckpointItem
from lightrft.strategy.checkpoint.checkpoint_reader import CheckpointReader
from lightrft.strategy.checkpoint.restore_optimizer import Allocation, Numbers
from lightrft.strategy.storage.safe_json import from_json


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What to load of a checkpoint."""

    strict: bool = True
    optimizer: bool = True
    scheduler: bool = True
    module_only: bool = False

    @classmethod
    def of(cls, *, strict: bool, optimizer: bool, scheduler: bool, module_only: bool) -> "LoadOptions":
        """Return the options; ``module_only`` excludes the optimizer and the scheduler."""
        return cls(
            strict=strict, optimizer=optimizer and not module_only, scheduler=scheduler and not module_only,
            module_only=module_only,
        )  # fmt: skip


def names_in(checkpoint: CheckpointReader, items: Sequence[CheckpointItem]) -> dict[str, str]:
    """Return the name of each item in the checkpoint: its own, or the only one if a single model is loaded."""
    saved = checkpoint.models
    if [item.name for item in items] == [SINGLE] and len(saved) == 1:
        return {SINGLE: saved[0]}
    unknown = [item.name for item in items if item.name not in saved]
    if unknown:
        raise CheckpointError(
            f"expected models that {checkpoint.path} holds ({', '.join(map(repr, saved))}), got "
            f"{', '.join(map(repr, unknown))}. Call load_ckpt({{{', '.join(f'{name!r}: ...' for name in saved)}}}, ...), with "
            f"all or some of these"
        )
    return {item.name: item.name for item in items}


def check(
    backend: Backend, checkpoint: CheckpointReader, item: CheckpointItem, name: str, options: LoadOptions
) -> None:
    """Raise `CheckpointError` unless model ``name`` of the checkpoint fits ``item``."""
    class_name = item.model_class.__name__
    parameters = {parameter: backend.full_shape(tensor) for parameter, tensor in item.module.named_parameters()}
    _check_tensors(checkpoint, f"{name}/parameters/", parameters, f"parameters of {class_name}", strict=options.strict)
    buffers = {buffer: tensor.shape for buffer, tensor in item.buffers().items()}
    _check_buffers(checkpoint, name, buffers, class_name, strict=options.strict)
    training, scheduler = (checkpoint.state["models"][name][key] for key in ("training", "scheduler"))
    if options.optimizer:
        saved = None if training is None else training["algorithm"]
        current = None if item.trained is None else backend.algorithm(item.trained.optimizer)
        _check_state(checkpoint, saved, current, "optimizer", class_name)
    if options.scheduler:
        saved = None if scheduler is None else scheduler["class"]
        _check_state(checkpoint, saved, item.scheduler_class, "scheduler", class_name)
    if options.optimizer and item.trained is not None:
        restore_optimizer.check_groups(item.trained, training["groups"])


def _check_tensors(
    checkpoint: CheckpointReader, prefix: str, current: dict[str, torch.Size], what: str, *, strict: bool
) -> None:
    saved = checkpoint.shapes(prefix)
    for name, shape in current.items():
        if saved.get(name, shape) != shape:
            raise CheckpointError(
                f"{what}: expected {name} to have shape {tuple(saved[name])}, as in {checkpoint.path}, got {tuple(shape)}. Build "
                f"the model that was saved"
            )
    missing, unexpected = sorted(current.keys() - saved.keys()), sorted(saved.keys() - current.keys())
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"expected the same {what} as in {checkpoint.path}, got other names: "
            f"{listed('not in the checkpoint', missing)}{listed('only in the checkpoint', unexpected)}Build the model that "
            f"was saved, or pass load_module_strict=False"
        )


def _check_buffers(
    checkpoint: CheckpointReader, name: str, current: dict[str, torch.Size], class_name: str, *, strict: bool
) -> None:
    of_ranks = checkpoint.shapes(f"ranks/0/buffers/{name}/")
    shared = {buffer: shape for buffer, shape in current.items() if buffer not in of_ranks}
    _check_tensors(checkpoint, f"{name}/buffers/", shared, f"buffers of {class_name}", strict=strict)
    local = {buffer: current[buffer] for buffer in of_ranks if buffer in current}
    _check_tensors(checkpoint, f"ranks/0/buffers/{name}/", local, f"buffers of {class_name}", strict=strict)


def listed(what: str, names: Sequence[str]) -> str:
    """Return a sentence with the first of ``names``; empty if there are none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}. " if names else ""


def _check_state(
    checkpoint: CheckpointReader, saved: str | None, current: str | None, what: str, class_name: str
) -> None:
    """Raise `CheckpointError` unless the ``saved`` optimizer or scheduler is the ``current`` one; None: there is none."""
    if saved == current:
        return
    remedy = {
        "optimizer": "pass load_optimizer_states=False or load_module_only=True",
        "scheduler": "pass load_lr_scheduler_states=False or load_module_only=True",
    }[what]
    if current is None:
        remedy = f"prepare the model with its {what}, pass {what}=..., or {remedy}"
    raise CheckpointError(
        f"expected the {what} of {class_name} to be {saved or 'none'}, as in {checkpoint.path}, got {current or 'none'}. Create "
        f"it as it was, or {remedy}"
    )


def scheduler_state(checkpoint: CheckpointReader, item: CheckpointItem, name: str) -> Mapping[str, Any]:
    """Return the stored state of ``item``'s scheduler for model ``name``; empty if it has none."""
    if item.scheduler is None:
        return {}
    state = from_json(checkpoint.state["models"][name]["scheduler"]["state"])
    if not isinstance(state, dict):
        raise CheckpointError(
            f"expected the state of the scheduler in {checkpoint.path} to be a dict, got a {type(state).__name__}. Pass "
            f"load_lr_scheduler_states=False"
        )
    return state


def stored_numbers(
    checkpoint: CheckpointReader, trained: TrainedModel, name: str, state: Iterable[Allocation]
) -> Numbers:
    """Return the numbers in the stored optimizer ``state`` of model ``name``.

    Raises:
        CheckpointError: They differ between parameters that share one.
    """
    prefix, training = f"{name}/optimizer/", checkpoint.state["models"][name]["training"]
    values = dict(pair for allocation in state for pair in _numbers(checkpoint, allocation, prefix))
    return Numbers(values=values, same_optimizer=training["optimizer"] == type(trained.optimizer).__name__)


def _numbers(checkpoint: CheckpointReader, allocation: Allocation, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for state in allocation.states:
        first: torch.Tensor | None = None
        for part in allocation.slices:
            name = f"{state}/{part.shard.name}"
            piece = checkpoint.index[prefix + name][0][1]
            if not restore_optimizer.is_number(name, torch.Size(piece.shape), part.shard.shape):
                break
            value = checkpoint.tensor(prefix + name)
            first = value if first is None else first
            if not torch.equal(first, value):
                raise CheckpointError(
                    f"expected the same {state} for {allocation.slices[0].shard.name} and {part.shard.name}, which this "
                    f"optimizer stores in one tensor, got {first.item()} and {value.item()}. Load it with a strategy whose "
                    f"optimizer stores them separately"
                )
            yield name, value
