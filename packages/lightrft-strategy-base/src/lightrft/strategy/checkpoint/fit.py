"""Whether a checkpoint fits what it is to be loaded into: found before anything changes, and said by name."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.backend import Backend
from lightrft.strategy.checkpoint import optimizer_state
from lightrft.strategy.checkpoint.optimizer_state import Allocation, Numbers
from lightrft.strategy.checkpoint.plain_values import from_json
from lightrft.strategy.checkpoint.reading import Checkpoint
from lightrft.strategy.checkpoint.subjects import ALONE, Subject
from lightrft.strategy.training.trained_model import TrainedModel


@dataclass(frozen=True, kw_only=True)
class Options:
    """What of a checkpoint to load."""

    strict: bool = True
    optimizer: bool = True
    scheduler: bool = True
    module_only: bool = False

    @classmethod
    def of(cls, *, strict: bool, optimizer: bool, scheduler: bool, module_only: bool) -> "Options":
        """``module_only`` switches the others off but for ``strict``."""
        return cls(
            strict=strict, optimizer=optimizer and not module_only, scheduler=scheduler and not module_only,
            module_only=module_only,
        )  # fmt: skip


def names_in(checkpoint: Checkpoint, subjects: Sequence[Subject]) -> dict[str, str]:
    """The name that each subject has in the checkpoint: its own; a model by itself is the only one there is."""
    there = checkpoint.models
    if [it.name for it in subjects] == [ALONE] and len(there) == 1:
        return {ALONE: there[0]}
    unknown = [it.name for it in subjects if it.name not in there]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path} holds {', '.join(map(repr, there))}, and not {', '.join(map(repr, unknown))}; load it with "
            f"load_ckpt({{{', '.join(f'{name!r}: ...' for name in there)}}}, ...), or some of these"
        )
    return {it.name: it.name for it in subjects}


def check(backend: Backend, checkpoint: Checkpoint, subject: Subject, name: str, options: Options) -> None:
    """Raise `CheckpointError` unless model ``name`` of the checkpoint fits ``subject``."""
    kind = subject.kind.__name__
    parameters = {it: backend._full_shape(tensor) for it, tensor in subject.module.named_parameters()}
    _check_tensors(checkpoint, f"{name}/parameters/", parameters, f"the parameters of {kind}", strict=options.strict)
    buffers = {it: tensor.shape for it, tensor in subject.buffers().items()}
    _check_buffers(checkpoint, name, buffers, kind, strict=options.strict)
    training, schedule = (checkpoint.state["models"][name][it] for it in ("training", "scheduler"))
    if options.optimizer:
        there = None if training is None else training["algorithm"]
        here = None if subject.trained is None else backend._algorithm(subject.trained.optimizer)
        _check_kind(checkpoint, there, here, "optimizer", kind)
    if options.scheduler:
        there = None if schedule is None else schedule["class"]
        _check_kind(checkpoint, there, subject.schedule, "scheduler", kind)
    if options.optimizer and subject.trained is not None:
        optimizer_state.check_groups(subject.trained, training["groups"])


def _check_tensors(
    checkpoint: Checkpoint, prefix: str, here: dict[str, torch.Size], what: str, *, strict: bool
) -> None:
    there = checkpoint.names(prefix)
    for name, shape in here.items():
        if there.get(name, shape) != shape:
            raise CheckpointError(
                f"{what}: {name} has shape {tuple(shape)}, and {tuple(there[name])} in {checkpoint.path}; build the model "
                f"that was saved"
            )
    missing, unexpected = here.keys() - there.keys(), there.keys() - here.keys()
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"{what} are not those in {checkpoint.path}: {_listed('not there', missing)}{_listed('only there', unexpected)}"
            f"build the model that was saved, or pass load_module_strict=False"
        )


def _check_buffers(checkpoint: Checkpoint, name: str, here: dict[str, torch.Size], kind: str, *, strict: bool) -> None:
    apart = checkpoint.names(f"ranks/0/buffers/{name}/")
    shared = {it: shape for it, shape in here.items() if it not in apart}
    _check_tensors(checkpoint, f"{name}/buffers/", shared, f"the buffers of {kind}", strict=strict)
    own = {it: here[it] for it in apart if it in here}
    _check_tensors(checkpoint, f"ranks/0/buffers/{name}/", own, f"the buffers of {kind}", strict=strict)


def _listed(what: str, names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{what}: {', '.join(found[:3])}{more}; " if found else ""


def _check_kind(checkpoint: Checkpoint, there: str | None, here: str | None, what: str, kind: str) -> None:
    if there == here:
        return
    option = {"optimizer": "load_optimizer_states=False", "scheduler": "load_lr_scheduler_states=False"}[what]
    if here is None:
        raise CheckpointError(
            f"{checkpoint.path} has the state of the {what} of {kind}, and none is known here; prepare the model with its "
            f"{what}, or pass {what}=..., or {option}, or load_module_only=True"
        )
    if there is None:
        raise CheckpointError(
            f"{checkpoint.path} has no state for the {what} of {kind}: it was saved without one; pass {option}, or "
            f"load_module_only=True"
        )
    raise CheckpointError(
        f"{checkpoint.path} has the state of {there} for the {what} of {kind}, which is {here} here; make it as it was, or "
        f"pass {option}, or load_module_only=True"
    )


def schedule(checkpoint: Checkpoint, subject: Subject, name: str) -> Mapping[str, Any]:
    """The state of ``subject``'s schedule that is stored for model ``name``; nothing where it has none."""
    if subject.scheduler is None:
        return {}
    found = from_json(checkpoint.state["models"][name]["scheduler"]["state"])
    if not isinstance(found, dict):
        raise CheckpointError(f"the state of a schedule in {checkpoint.path} is a {type(found).__name__}, and no dict")
    return found


def numbers(checkpoint: Checkpoint, trained: TrainedModel, name: str, state: Iterable[Allocation]) -> Numbers:
    """Those of the optimizer's ``state`` that are stored for model ``name``.

    Raises `CheckpointError` where they differ between parameters that share one.
    """
    prefix, stored = f"{name}/optimizer/", checkpoint.state["models"][name]["training"]
    values = dict(pair for allocation in state for pair in _numbers(checkpoint, allocation, prefix))
    return Numbers(values=values, same_optimizer=stored["optimizer"] == type(trained.optimizer).__name__)


def _numbers(checkpoint: Checkpoint, allocation: Allocation, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for kind in allocation.kinds:
        first: torch.Tensor | None = None
        for part in allocation.slices:
            name = f"{kind}/{part.shard.name}"
            piece = checkpoint.index[prefix + name][0][1]
            if not optimizer_state.is_number(name, torch.Size(piece.shape), part.shard.shape):
                break
            value = checkpoint.tensor(prefix + name)
            first = value if first is None else first
            if not torch.equal(first, value):
                raise CheckpointError(
                    f"the optimizer keeps {allocation.slices[0].shard.name} and {part.shard.name} together, and {kind} is "
                    f"{first.item()} of the one and {value.item()} of the other; load it with a strategy that keeps them apart"
                )
            yield name, value
