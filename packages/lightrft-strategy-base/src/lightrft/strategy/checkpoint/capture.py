"""What a checkpoint holds of a strategy at one moment: tensors by entry, and the rest as JSON values.

MODEL/parameters/NAME           in master precision
MODEL/optimizer/KIND/NAME       such as exp_avg; one number for ``step``
MODEL/buffers/NAME              persistent ones, that are alike on all ranks
ranks/R/buffers/MODEL/NAME      others, rank R's own
ranks/R/random/STREAM           see `streams`
"""

import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from lightrft.strategy import flat
from lightrft.strategy.backend import Backend
from lightrft.strategy.checkpoint import checksums, files, optimizer_state, streams
from lightrft.strategy.checkpoint.agreement import Agreement
from lightrft.strategy.checkpoint.loaders import Loaders
from lightrft.strategy.checkpoint.plain_values import to_json
from lightrft.strategy.checkpoint.subjects import RANKS, Subject
from lightrft.strategy.export.companions import adapter_configurations, configuration_texts
from lightrft.strategy.shards import Shard
from lightrft.strategy.training.moving_average import MovingAverages


def tensors(backend: Backend, subjects: Sequence[Subject], shared: Sequence[Sequence[str]]) -> list[Shard]:
    """Everything that this rank holds, views of it where that is possible, by entry.

    ``shared``: for each subject the buffers that are alike on all ranks, as `shared_buffers` says. Raises
    `CheckpointError` for a type that files cannot hold.
    """
    rank = backend.world.rank
    found = [shard for subject in subjects for shard in _sharded(backend, subject)]
    for subject, alike in zip(subjects, shared, strict=True):
        for name, buffer in subject.buffers().items():
            entry = (
                f"{subject.name}/buffers/{name}" if name in alike else f"{RANKS}/{rank}/buffers/{subject.name}/{name}"
            )
            found.append(_whole(entry, buffer))
    for name, values in streams.capture(backend.world.device).items():
        found.append(_whole(f"{RANKS}/{rank}/random/{name}", values))
    for shard in found:
        files.type_name(shard.name, shard.values.dtype)
    return [shard for shard in found if shard.values.numel() or not shard.shape.numel()]


def _sharded(backend: Backend, subject: Subject) -> Iterator[Shard]:
    backend._settle(subject.module)
    yield from subject.parameters_of(backend)
    if subject.trained is not None:
        for shard in optimizer_state.held(subject.trained.optimizer, backend._state_slices(subject.trained)):
            yield shard.renamed(f"{subject.name}/optimizer/{shard.name}")


def _whole(entry: str, tensor: torch.Tensor) -> Shard:
    return Shard(name=entry, shape=tensor.shape, offset=0, values=flat.elements(tensor))


def shared_buffers(subjects: Sequence[Subject], agreement: Agreement) -> list[list[str]]:
    """For each subject the buffers that are alike on all ranks. Every rank calls it."""
    prints = agreement.everywhere("comparing buffers", lambda: [_prints(subject) for subject in subjects])
    return [
        [name for name in own if all(other[index].get(name) == own[name] for other in prints)]
        for index, own in enumerate(prints[agreement.rank])
    ]


def _prints(subject: Subject) -> dict[str, str]:
    """A checksum of each buffer."""
    buffers = ((name, buffer.detach().cpu().contiguous()) for name, buffer in subject.buffers().items())
    return {name: checksums.of(files.bytes_of(buffer), "crc32") for name, buffer in buffers}


def facts(backend: Backend, subjects: Sequence[Subject], averages: MovingAverages, loaders: Loaders) -> dict[str, Any]:
    """What is no tensor, as JSON values; the same on all ranks but for hyperparameters that a script makes differ."""
    return {
        "strategy": backend.name,
        "ranks": backend.world.size,
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **_own_version()},
        "models": {subject.name: _model_facts(backend, subject, averages) for subject in subjects},
        "loaders": loaders.positions(),
    }


def _own_version() -> dict[str, str]:
    return {"lightrft-strategy-base": version("lightrft-strategy-base")}


def _model_facts(backend: Backend, subject: Subject, averages: MovingAverages) -> dict[str, Any]:
    trained, scheduler = subject.trained, subject.scheduler
    return {
        "class": subject.kind.__name__,
        "configuration": configuration_texts(subject.module, subject.kind),
        "adapters": adapter_configurations(subject.module),
        "average": averages.seen(subject.module),
        "scheduler": None
        if scheduler is None
        else {
            "class": subject.schedule,
            "state": to_json(scheduler.state_dict(), "the scheduler's state", exact=False),
        },
        "training": None
        if trained is None
        else {
            "updates": trained.updates,
            "skipped": trained.skipped,
            "skipped_in_a_row": trained.skipped_in_a_row,
            "optimizer": type(trained.optimizer).__name__,
            "algorithm": backend._algorithm(trained.optimizer),
            "groups": optimizer_state.groups(trained),
        },
    }
