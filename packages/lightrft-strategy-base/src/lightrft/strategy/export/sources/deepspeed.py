"""DeepSpeed's checkpoints, which are what LightRFT's own DeepSpeed strategy wrote.

From ZeRO stage 1 on each rank wrote its partition of the fp32 master weights, flat; the shapes by which they are taken
apart are beside the model's state. DeepSpeed itself is not needed. Its files are pickles of tensors and plain values,
with a few classes of DeepSpeed's, of which empty objects are made.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.export.sources.source import REMEDY, empty, reading
from lightrft.strategy.export.sources.torch_files import load_torch_file

_MODEL = re.compile(r"^(zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<part>\d+)_model_states\.pt$")
_OPTIMIZER = re.compile(r"^(bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_optim_states\.pt$")
_PARTITIONS, _SHARDS = "single_partition_of_fp32_groups", "fp32_flat_groups"
"""Where the master weights are, of stages 1 and 2 and of stage 3."""
_EXPECTED = "one of DeepSpeed's files of a checkpoint"
Tensors = dict[str, tuple[torch.Tensor, Callable[[], torch.Tensor]]]
"""Each tensor on the meta device, and how to read it, by name."""


class DeepspeedSource:
    """The parameters, in fp32 where DeepSpeed had masters of them, and buffers of a model."""

    names: Literal["saved", "in memory"] = "in memory"

    def __init__(self, place: Path, *, allow_pickle: bool) -> None:
        self.place = place
        models, optimizers = _by_rank(place, _MODEL), _by_rank(place, _OPTIMIZER)
        states = [_loaded(path, "module", allow_pickle) for path in models]
        masters = [_loaded(path, "optimizer_state_dict", allow_pickle) for path in optimizers]
        with reading(models[0], _EXPECTED):
            self._tensors = _tensors(place, states, [it["optimizer_state_dict"] for it in masters])
        self.contents: Mapping[str, torch.Tensor] = {name: it for name, (it, _) in self._tensors.items()}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The files are mapped for as long as this object lives."""
        yield

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, put together from the ranks' parts."""
        whole, read = self._tensors[name]
        return read().view(whole.shape)


def is_here(place: Path) -> bool:
    """Whether ``place`` has a DeepSpeed checkpoint's files."""
    return any(_MODEL.match(path.name) for path in place.iterdir())


def _loaded(path: Path, key: str, allow_pickle: bool) -> Mapping[str, Any]:
    """What is in a file of DeepSpeed's. Raises `CheckpointError` where it has no ``key``, as all of its kind have."""
    found = load_torch_file(path, allow_pickle=allow_pickle)
    if not isinstance(found, Mapping) or key not in found:
        raise CheckpointError(f"{path} has no {key!r}, and is not {_EXPECTED}; {REMEDY}")
    return found


def _by_rank(place: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files that match, by rank. Raises `CheckpointError` where one is missing, or the model was split."""
    found = {}
    for path in place.iterdir():
        match = pattern.match(path.name)
        if match and int(match["part"]):
            raise CheckpointError(f"{path} belongs to a model that was split by tensor parallelism; that is not read")
        if match:
            found[int(match["rank"] or 0)] = path
    missing = [rank for rank in range(max(found, default=0)) if rank not in found]
    if missing:
        raise CheckpointError(f"the file of rank {missing[0]} beside {found[max(found)]} is missing; {REMEDY}")
    return [found[rank] for rank in sorted(found)]


def _tensors(place: Path, states: Sequence[Mapping[str, Any]], masters: Sequence[Mapping[str, Any]]) -> Tensors:
    first = states[0]
    sharded = bool(masters) and _SHARDS in masters[0]
    ranks = int(first["dp_world_size"])
    if (masters and len(masters) != ranks) or (sharded and len(states) != ranks):
        raise CheckpointError(f"{place} lacks files: {ranks} ranks wrote it, and {len(masters)} are there; {REMEDY}")
    if len(states) > 1 and not sharded:
        raise CheckpointError(
            f"{place} has a sharded model, and no optim_states files, where its weights are; {REMEDY}"
        )
    module = first["module"]
    found = _whole({name: module[name] for name in (first["buffer_names"] if sharded else module)})
    if sharded:
        found |= _frozen_shards(first["frozen_param_shapes"] or {}, [it["frozen_param_fragments"] for it in states])
        found |= _shards(first["param_shapes"], [it[_SHARDS] for it in masters])
    elif masters:
        paddings = masters[0].get("param_alignment_paddings")
        found |= _partitions(first["param_shapes"], [it[_PARTITIONS] for it in masters], paddings)
    shared = (first["shared_params"] or {}) if masters else {}
    return found | {alias: found[name] for alias, name in shared.items() if name in found}


def _whole(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: (tensor.to("meta"), lambda tensor=tensor: tensor) for name, tensor in tensors.items()}  # type: ignore[misc]


def _partitions(
    groups: Iterable[Mapping[str, torch.Size]], ranks: Sequence[Sequence[torch.Tensor]], paddings: Any
) -> Tensors:
    """Stages 1 and 2: the parameters of a group follow one another over the partitions of all ranks."""
    found: Tensors = {}
    for index, shapes in enumerate(groups):
        flat, offset = [partitions[index] for partitions in ranks], 0
        for number, (name, shape) in enumerate(shapes.items()):
            size = torch.Size(shape).numel()
            found[name] = empty(shape, flat[0].dtype), lambda flat=flat, at=offset, size=size: _take(flat, at, size)  # type: ignore[misc]
            offset += size + (paddings[index][number] if paddings is not None else 0)
    return found


def _shards(groups: Iterable[Mapping[str, torch.Size]], ranks: Sequence[Sequence[torch.Tensor]]) -> Tensors:
    """Stage 3: each rank has an equal part of each parameter, the last ones padded, of all groups one after the other."""
    found: Tensors = {}
    offset = 0
    for name, shape in ((name, torch.Size(shape)) for shapes in groups for name, shape in shapes.items()):
        part = -(-shape.numel() // len(ranks))

        def read(at: int = offset, part: int = part, size: int = shape.numel()) -> torch.Tensor:
            return torch.cat([_take(flat, at, part) for flat in ranks])[:size]

        found[name] = empty(shape, ranks[0][0].dtype), read
        offset += part
    return found


def _frozen_shards(shapes: Mapping[str, torch.Size], ranks: Sequence[Mapping[str, torch.Tensor]]) -> Tensors:
    """Stage 3: each rank has an equal part of each parameter that did not train."""
    found: Tensors = {}
    for name, shape in ((name, torch.Size(shape)) for name, shape in shapes.items()):

        def read(name: str = name, size: int = shape.numel()) -> torch.Tensor:
            return torch.cat([fragments[name].view(-1) for fragments in ranks])[:size]

        found[name] = empty(shape, ranks[0][name].dtype), read
    return found


def _take(flat: Iterable[torch.Tensor], begin: int, size: int) -> torch.Tensor:
    """``size`` elements from ``begin`` of 1-D tensors that follow one another."""
    parts = []
    for tensor in flat:
        if begin < tensor.numel() and size:
            part = tensor[begin : begin + size]
            parts.append(part)
            size -= part.numel()
        begin = max(0, begin - tensor.numel())
    if size or not parts:
        raise CheckpointError(f"the ranks' partitions end {size} elements too early; {REMEDY}")
    return torch.cat(parts) if len(parts) > 1 else parts[0]
