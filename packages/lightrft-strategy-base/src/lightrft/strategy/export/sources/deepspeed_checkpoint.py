"""Checkpoints of DeepSpeed, which LightRFT's own DeepSpeed strategy wrote.

From ZeRO stage 1 on, each rank wrote its flat partition of the fp32 master weights; the shapes to split them by are in
the files of the model's state. DeepSpeed itself is not needed. Its files are pickles of tensors, plain values and a few
classes of DeepSpeed, which are read as empty objects.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.export.sources.source import REMEDY, empty, reading
from lightrft.strategy.export.sources.torch_files import load_torch_file

_MODEL = re.compile(r"^(zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<part>\d+)_model_states\.pt$")
_OPTIMIZER = re.compile(r"^(bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_optim_states\.pt$")
_PARTITIONS, _SHARDS = "single_partition_of_fp32_groups", "fp32_flat_groups"
"""Keys of the master weights: of stages 1 and 2, and of stage 3."""
_EXPECTED = "a file of a DeepSpeed checkpoint"
Tensors = dict[str, tuple[torch.Tensor, Callable[[], torch.Tensor]]]
"""By name: each tensor on the meta device, and a function that reads it."""


class DeepspeedSource:
    """The parameters, in fp32 if DeepSpeed had master weights, and the buffers of a model."""

    names: Literal["saved", "in memory"] = "in memory"
    opened = nullcontext
    """The files stay mapped as long as this object exists."""

    def __init__(self, path: Path, *, allow_pickle: bool) -> None:
        self.path = path
        models, optimizers = _by_rank(path, _MODEL), _by_rank(path, _OPTIMIZER)
        states = [_loaded(path, "module", allow_pickle) for path in models]
        optimizer_states = [_loaded(path, "optimizer_state_dict", allow_pickle) for path in optimizers]
        with reading(models[0], _EXPECTED):
            self._tensors = _tensors(path, states, [state["optimizer_state_dict"] for state in optimizer_states])
        self.contents: Mapping[str, torch.Tensor] = {name: tensor for name, (tensor, _) in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return a full tensor, assembled from the parts of the ranks."""
        tensor, read = self._tensors[name]
        return read().view(tensor.shape)


def found_in(directory: Path) -> bool:
    """Return whether ``directory`` has the files of a DeepSpeed checkpoint."""
    return any(_MODEL.match(path.name) for path in directory.iterdir())


def _loaded(path: Path, key: str, allow_pickle: bool) -> Mapping[str, Any]:
    """Return the contents of a DeepSpeed file. Raise `CheckpointError` if it has no ``key``."""
    contents = load_torch_file(path, allow_pickle=allow_pickle)
    if not isinstance(contents, Mapping) or key not in contents:
        raise CheckpointError(f"expected {path} to be {_EXPECTED} with the key {key!r}, got one without it; {REMEDY}")
    return contents


def _by_rank(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Return the files that match, by rank. Raise `CheckpointError` if one is missing, or the model was split."""
    paths = {}
    for path in directory.iterdir():
        match = pattern.match(path.name)
        if match and int(match["part"]):
            raise CheckpointError(
                f"expected a model without tensor parallelism, got {path}, one of several parts. Merge the parts with DeepSpeed first"
            )
        if match:
            paths[int(match["rank"] or 0)] = path
    missing = [rank for rank in range(max(paths, default=0)) if rank not in paths]
    if missing:
        raise CheckpointError(
            f"expected the file of rank {missing[0]} next to {paths[max(paths)]}, found none; {REMEDY}"
        )
    return [paths[rank] for rank in sorted(paths)]


def _tensors(path: Path, states: Sequence[Mapping[str, Any]], optimizer_states: Sequence[Mapping[str, Any]]) -> Tensors:
    first = states[0]
    sharded = bool(optimizer_states) and _SHARDS in optimizer_states[0]
    ranks = int(first["dp_world_size"])
    if (optimizer_states and len(optimizer_states) != ranks) or (sharded and len(states) != ranks):
        raise CheckpointError(f"expected the files of {ranks} ranks in {path}, found {len(optimizer_states)}; {REMEDY}")
    if len(states) > 1 and not sharded:
        raise CheckpointError(
            f"expected optim_states files, which hold the weights of a sharded model, in {path}, found none; {REMEDY}"
        )
    module = first["module"]
    tensors = _full({name: module[name] for name in (first["buffer_names"] if sharded else module)})
    if sharded:
        tensors |= _frozen_shards(
            first["frozen_param_shapes"] or {}, [state["frozen_param_fragments"] for state in states]
        )
        tensors |= _shards(first["param_shapes"], [state[_SHARDS] for state in optimizer_states])
    elif optimizer_states:
        paddings = optimizer_states[0].get("param_alignment_paddings")
        tensors |= _partitions(first["param_shapes"], [state[_PARTITIONS] for state in optimizer_states], paddings)
    shared = (first["shared_params"] or {}) if optimizer_states else {}
    return tensors | {alias: tensors[name] for alias, name in shared.items() if name in tensors}


def _full(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: (tensor.to("meta"), lambda tensor=tensor: tensor) for name, tensor in tensors.items()}  # type: ignore[misc]


def _partitions(
    groups: Iterable[Mapping[str, torch.Size]], ranks: Sequence[Sequence[torch.Tensor]], paddings: Any
) -> Tensors:
    """Return the tensors of stages 1 and 2: the parameters of a group are consecutive over the partitions of all ranks."""
    tensors: Tensors = {}
    for index, shapes in enumerate(groups):
        flat, offset = [partitions[index] for partitions in ranks], 0
        for number, (name, shape) in enumerate(shapes.items()):
            size = torch.Size(shape).numel()
            tensors[name] = empty(shape, flat[0].dtype), lambda flat=flat, at=offset, size=size: _take(flat, at, size)  # type: ignore[misc]
            offset += size + (paddings[index][number] if paddings is not None else 0)
    return tensors


def _shards(groups: Iterable[Mapping[str, torch.Size]], ranks: Sequence[Sequence[torch.Tensor]]) -> Tensors:
    """Return the tensors of stage 3: each rank has an equal part of each parameter, padded, in the order of the groups."""
    tensors: Tensors = {}
    offset = 0
    for name, shape in ((name, torch.Size(shape)) for shapes in groups for name, shape in shapes.items()):
        part = -(-shape.numel() // len(ranks))

        def read(at: int = offset, part: int = part, size: int = shape.numel()) -> torch.Tensor:
            return torch.cat([_take(flat, at, part) for flat in ranks])[:size]

        tensors[name] = empty(shape, ranks[0][0].dtype), read
        offset += part
    return tensors


def _frozen_shards(shapes: Mapping[str, torch.Size], ranks: Sequence[Mapping[str, torch.Tensor]]) -> Tensors:
    """Return the frozen tensors of stage 3: each rank has an equal part of each parameter."""
    tensors: Tensors = {}
    for name, shape in ((name, torch.Size(shape)) for name, shape in shapes.items()):

        def read(name: str = name, size: int = shape.numel()) -> torch.Tensor:
            return torch.cat([fragments[name].view(-1) for fragments in ranks])[:size]

        tensors[name] = empty(shape, ranks[0][name].dtype), read
    return tensors


def _take(flat: Iterable[torch.Tensor], begin: int, size: int) -> torch.Tensor:
    """Return ``size`` elements from ``begin`` of consecutive 1-D tensors."""
    parts = []
    for tensor in flat:
        if begin < tensor.numel() and size:
            part = tensor[begin : begin + size]
            parts.append(part)
            size -= part.numel()
        begin = max(0, begin - tensor.numel())
    if size or not parts:
        raise CheckpointError(f"expected {size} more elements in the partitions of the ranks, got none; {REMEDY}")
    return torch.cat(parts) if len(parts) > 1 else parts[0]
