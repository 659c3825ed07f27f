"""The plan of a save: what to store, and which rank writes which range of it.

`describe` captures everything that is not a tensor as JSON values. `assign` collects the tensors that this rank holds, as
views where possible, and returns those that it writes: ranks may hold the same range, as replicas of a model, a shard or
a buffer, and each range is written once, by the holder that has the least to write so far. The names of entries are in
`format`.
"""

import base64
import copy
import json
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from lightrft.config import CheckpointError, UnsupportedOperationError
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.types import Shard, StateSlice, TrainedModel
from lightrft.strategy.checkpoint.checkpoint_items import CheckpointItem, RunState, rng_states
from lightrft.strategy.checkpoint.format import RANKS, Piece, dtype_name
from lightrft.strategy.models.hf_metadata import adapter_configuration
from lightrft.strategy.storage import files
from lightrft.strategy.storage.safe_json import to_json
from lightrft.strategy.tensors import elements, grouped, local_part, memory_of

CALL = "save_ckpt"
IMPLEMENTATION = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Keys of a parameter group that choose an implementation, not a result."""
Range = tuple[int, int, int]
"""Fingerprint of the entry, index of the first element, number of elements."""

# Everything that is not a tensor


def describe(run: RunState, items: Sequence[CheckpointItem]) -> dict[str, Any]:
    """Return everything that is not a tensor, as JSON values.

    Equal on all ranks, except for hyperparameters that a script sets differently.
    """
    return {
        "strategy": run.strategy,
        "ranks": run.backend.world.size,
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightrft-strategy-base": version("lightrft-strategy-base"),
        },
        "models": {item.name: _describe_model(run, item) for item in items},
        "loaders": run.loaders.positions(),
    }


def _describe_model(run: RunState, item: CheckpointItem) -> dict[str, Any]:
    facts: dict[str, Any] = {"class": item.model_class.__name__, **_describe_configuration(item)}
    facts |= {"average": run.updates_averaged(item), "scheduler": None, "training": None}
    if item.scheduler is not None:
        facts["scheduler"] = {
            "class": item.scheduler_class,
            "state": to_json(item.scheduler.state_dict(), "the state of the scheduler", exact=False),
        }
    if item.trained is not None:
        facts["training"] = {
            **item.trained.state_dict(),
            "optimizer": type(item.trained.optimizer).__name__,
            "algorithm": run.backend.algorithm(item.trained.optimizer),
            "groups": _describe_groups(item.trained),
        }
    return facts


def _describe_configuration(item: CheckpointItem) -> dict[str, Any]:
    """Return the configuration files of a transformers model, by name, and PEFT's configuration of its adapters."""
    transformers, peft = sys.modules.get("transformers"), sys.modules.get("peft")
    adapted: Any = item.module if peft is not None and isinstance(item.module, peft.PeftModel) else None
    model: Any = item.module if adapted is None else adapted.get_base_model()
    texts, adapters = {}, {}
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        config = copy.deepcopy(model.config)
        config.architectures = [(type(model) if adapted is not None else item.model_class).__name__]
        texts["config.json"] = config.to_json_string()
        generation_config = getattr(item.module, "generation_config", None)  # a PEFT model may have its own
        if model.can_generate() and generation_config is not None:
            texts["generation_config.json"] = generation_config.to_json_string()
    for name in () if adapted is None else adapted.peft_config:
        adapter = adapter_configuration(item.module, name).to_dict()
        adapters[name] = json.loads(json.dumps(adapter, default=list))
    return {"configuration": texts, "adapters": adapters}


def _describe_groups(trained: TrainedModel) -> list[dict[str, Any]]:
    """Return the parameter groups: names of parameters, and hyperparameters."""
    return [
        {
            "names": names,
            "settings": {
                key: to_json(_number(value), f"param_groups[{index}][{key!r}]", exact=False)
                for key, value in group.items()
                if key not in IMPLEMENTATION
            },
        }
        for index, (names, group) in enumerate(zip(trained.group_names, trained.optimizer.param_groups, strict=True))
    ]


def _number(value: object) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


# Tensors


def assign(run: RunState, items: Sequence[CheckpointItem]) -> list[tuple[Piece, torch.Tensor]]:
    """Return the pieces that this rank writes, with their values, 1-D. All ranks must call this.

    Raises:
        CheckpointError: On every rank, if files cannot hold a dtype, or if no rank holds some elements.
    """
    consensus, rank = run.consensus, run.backend.world.rank
    checksums = consensus.everywhere(CALL, "comparing buffers", lambda: [_buffer_checksums(item) for item in items])
    held: list[Shard] = []

    def collect() -> str:
        held.extend(_held(run.backend, items, _shared_buffers(checksums, rank)))
        return _encode_ranges(map(_range, held))

    ranges = consensus.everywhere(CALL, "collecting tensors", collect)
    with consensus.together(CALL, "assigning tensors"):
        return share_of(held, [_decode_ranges(text) for text in ranges], rank)


def _buffer_checksums(item: CheckpointItem) -> dict[str, str]:
    buffers = ((name, buffer.detach().cpu().contiguous()) for name, buffer in item.buffers().items())
    return {name: files.checksum_of(memory_of(buffer), "crc32") for name, buffer in buffers}


def _shared_buffers(checksums: Sequence[Sequence[dict[str, str]]], rank: int) -> list[list[str]]:
    """Return, for each item, the buffers that are the same on all ranks.

    Args:
        checksums: By rank and item, the checksums of the buffers by name.
    """
    return [
        [name for name in mine if all(other[index].get(name) == mine[name] for other in checksums)]
        for index, mine in enumerate(checksums[rank])
    ]


def _held(backend: Backend, items: Sequence[CheckpointItem], shared: Sequence[Sequence[str]]) -> list[Shard]:
    """Return everything that this rank holds, under its entries."""
    rank = backend.world.rank
    held = [shard for item in items for shard in _model_shards(backend, item)]
    for item, same in zip(items, shared, strict=True):
        for name, buffer in item.buffers().items():
            entry = f"{item.name}/buffers/{name}" if name in same else f"{RANKS}/{rank}/buffers/{item.name}/{name}"
            held.append(_unsharded(entry, buffer))
    held += [
        _unsharded(f"{RANKS}/{rank}/random/{name}", state) for name, state in rng_states(backend.world.device).items()
    ]
    for shard in held:
        dtype_name(shard.name, shard.values.dtype)
    return [shard for shard in held if shard.values.numel() or not shard.shape.numel()]


def _model_shards(backend: Backend, item: CheckpointItem) -> Iterator[Shard]:
    backend.reshard(item.module)
    yield from item.parameters_of(backend)
    if item.trained is not None:
        for part in backend.state_slices(item.trained):
            for state, value in item.trained.optimizer.state.get(part.key, {}).items():
                if value is not None:
                    yield _state_shard(part, state, value).renamed(f"{item.name}/optimizer/{state}/{part.shard.name}")


def _state_shard(part: StateSlice, state: str, value: object) -> Shard:
    """Return the range of an optimizer's ``state``, such as exp_avg: of the parameter's shape, or a single number."""
    parameter = part.shard
    if isinstance(value, (bool, int, float)):
        dtype = torch.float64 if isinstance(value, float) else torch.int64
        return _unsharded(state, torch.tensor(value, dtype=dtype))
    if isinstance(value, torch.Tensor) and "/" not in state:
        if value.ndim == 0 and (state == "step" or parameter.shape):
            return _unsharded(state, value)
        values = elements(local_part(value.detach()))
        if values.numel() == local_part(part.key).numel():
            return part.of(values, state)
        if part.is_full:
            return Shard(name=state, shape=value.shape, offset=0, values=values)
    if not isinstance(value, torch.Tensor):
        raise UnsupportedOperationError(
            f"expected the optimizer's {state!r} of {parameter.name} to be a tensor or a number, got a "
            f"{type(value).__name__}, which checkpoints do not hold. Keep it in the optimizer's param_groups, or as a tensor"
        )
    raise UnsupportedOperationError(
        f"expected the optimizer's {state!r} of {parameter.name} to be a number or of the parameter's shape "
        f"{tuple(parameter.shape)}, got a tensor of shape {tuple(value.shape)}, which cannot be stored from shards. Use "
        f"another optimizer, or a strategy that does not shard"
    )


def _unsharded(name: str, tensor: torch.Tensor) -> Shard:
    return Shard(name=name, shape=tensor.shape, offset=0, values=elements(tensor))


# Who writes what


def share_of(held: Sequence[Shard], ranges: Sequence[Sequence[Range]], rank: int) -> list[tuple[Piece, torch.Tensor]]:
    """Return the pieces of ``held`` that ``rank`` writes.

    Args:
        held: What this rank holds.
        ranges: What every rank holds, by rank.
        rank: This rank.

    Raises:
        CheckpointError: No rank holds some elements of a tensor.
    """
    writers = choose_writers(ranges)
    _check_covered(held, writers)
    return [
        (
            Piece(
                entry=shard.name,
                dtype=shard.values.dtype,
                shape=tuple(shard.shape),
                offset=shard.offset,
                numel=shard.values.numel(),
            ),
            shard.values.contiguous().view(-1),
        )
        for shard in held
        if writers[_range(shard)] == rank
    ]


def choose_writers(ranges: Sequence[Sequence[Range]]) -> dict[Range, int]:
    """Return the rank that writes each range, from the ranges of every rank. The same on all ranks."""
    holders = grouped((range_, rank) for rank, held in enumerate(ranges) for range_ in held)
    load = [0] * len(ranges)
    writers: dict[Range, int] = {}
    for range_, ranks in sorted(holders.items(), key=lambda pair: (len(pair[1]) > 1, -pair[0][2], pair[0])):
        rank = ranks[0] if len(ranks) == 1 else min(ranks, key=lambda rank: (load[rank], rank))
        writers[range_] = rank
        load[rank] += range_[2]
    return writers


def _check_covered(held: Sequence[Shard], ranges: Iterable[Range]) -> None:
    by_entry = grouped((entry, (offset, numel)) for entry, offset, numel in ranges)
    for shard in held:
        check_covered(shard.name, shard.shape.numel(), by_entry[_fingerprint(shard.name)])


def check_covered(entry: str, numel: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Raise `CheckpointError` unless ``ranges``, (offset, length), cover all ``numel`` elements of ``entry``."""
    covered = 0
    for offset, length in sorted(ranges):
        if offset > covered:
            break
        covered = max(covered, offset + length)
    if covered < numel:
        raise CheckpointError(
            f"expected the ranks to hold all {numel} elements of {entry}, found no rank with those from {covered} on. The "
            f"backend's shards or state_slices must cover every tensor"
        )


def _range(shard: Shard) -> Range:
    return _fingerprint(shard.name), shard.offset, shard.values.numel()


def _fingerprint(entry: str) -> int:
    """Return an int64 for a name, the same in every process."""
    return int.from_bytes(blake2b(entry.encode(), digest_size=8).digest(), signed=True)


def _encode_ranges(ranges: Iterable[Range]) -> str:
    return base64.b64encode(np.array(list(ranges), dtype="<i8").tobytes()).decode()


def _decode_ranges(text: str) -> list[Range]:
    return [(entry, offset, numel) for entry, offset, numel in np.frombuffer(base64.b64decode(text), "<i8").reshape(-1, 3).tolist()]  # fmt: skip
