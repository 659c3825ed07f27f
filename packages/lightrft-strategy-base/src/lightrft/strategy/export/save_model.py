"""`save_model`, top to bottom: from a prepared model to a directory that Hugging Face tools open.

The tensors and the files are planned first. Then the weights come as a stream: all ranks gather a bucket, rank 0 writes
it to its positions in the files, and the bucket is freed before the next one.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from lightrft.config import ArgumentError
from lightrft.config.validation import shown
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.export.atomic_directory import AtomicDirectory
from lightrft.strategy.export.parts import ExportPart, export_parts
from lightrft.strategy.export.tensor_files import FileLayout, TensorWriter, file_layouts
from lightrft.strategy.models import hf_metadata, weight_stream
from lightrft.strategy.models.registry import PreparedModel, outside_of_wrapped
from lightrft.strategy.models.state_dict_adapter import Unit
from lightrft.strategy.storage import files
from lightrft.strategy.telemetry.log import is_silent

CALL = "save_model"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_HALF = (torch.float16, torch.bfloat16)


def save_model(
    backend: Backend, consensus: RankConsensus, model: PreparedModel, output_dir: Path, *,
    dtype: torch.dtype | None, max_shard_size: int | str, merge_adapters: bool, processors: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Write ``model`` to ``output_dir``; see `StrategyBase.save_model`. All ranks must call this, and fail together."""
    target = output_dir.resolve()
    with ExitStack() as stack:
        output: Output | None = None
        with consensus.together(CALL, "planning"):
            options = SaveOptions(
                dtype=dtype or (torch.bfloat16 if backend.config.bf16 else None), merge_adapters=merge_adapters,
                shard_bytes=bytes_of_size(max_shard_size), bucket_bytes=backend.config.weight_sync_bucket_bytes,
                processors=processors,
            )  # fmt: skip
            backend.reshard(model.module)
            saved = model.exported
            if saved is not model:
                _warn_of_weights_outside(model.module)
            parts = export_parts(
                saved.module, saved.names_model, saved.model_class, merge_adapters=options.merge_adapters
            )
            plans = [TensorPlan(backend, saved.module, part, options) for part in parts]
            if backend.world.rank == 0:
                output = stack.enter_context(Output(target, plans, options))
        with consensus.together(CALL, "writing"):
            _write(plans, output)
            if output is not None:
                output.publish()
    return target


def _warn_of_weights_outside(wrapper: nn.Module) -> None:
    """Warn of weights that are not written because ``is_actor`` asks for the model in the wrapper alone."""
    names = outside_of_wrapped(wrapper)
    if names and not is_silent():
        warnings.warn(
            f"save_model: {type(wrapper).__name__} has is_actor, so only its .model is written, without {', '.join(names[:3])} "
            f"({len(names)} outside of it). Remove is_actor to write all weights",
            stacklevel=5,
        )


def bytes_of_size(size: int | str) -> int:
    """Return a size in bytes, from a number or text such as "5GB". Raise `ArgumentError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    number = float(match[1]) * _UNITS.get(match[2].upper(), math.nan) if match else math.nan
    if not number >= 1:
        raise ArgumentError(
            f"expected max_shard_size to be a number of bytes or text such as '5GB', got max_shard_size={shown(size)}. "
            f"Pass a positive size"
        )
    return int(number)


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """What the caller asked for."""

    dtype: torch.dtype | None
    """Dtype of floating tensors; None: that of each tensor."""
    shard_bytes: int
    """Largest file, unless one tensor is larger."""
    bucket_bytes: int
    """Bytes that are gathered at a time."""
    merge_adapters: bool = False
    processors: Mapping[str, Any] = field(default_factory=dict)
    """Tokenizer and processor, by the names of their arguments."""


class TensorPlan:
    """The tensors of one part: the dtypes in which they are gathered and written, and the files that hold them."""

    def __init__(self, backend: Backend, module: nn.Module, part: ExportPart, options: SaveOptions) -> None:
        self.part, self._backend, self._options = part, backend, options
        self._fp32 = kept_in_fp32(module, options.dtype)
        self.contents = part.converter.convert(
            {name: self._empty(name, tensor) for name, tensor in part.converter.tensors.items()}
        )

    def _empty(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the full tensor as it will be written, on the meta device."""
        dtype = tensor.dtype
        if self._options.dtype is not None and tensor.is_floating_point():
            dtype = torch.float32 if self._is_kept_in_fp32(name) else self._options.dtype
        return torch.empty(self._backend.full_shape(tensor), dtype=dtype, device="meta")

    def _is_kept_in_fp32(self, name: str) -> bool:
        return self._fp32 is not None and self._fp32.search(name) is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.contents.values())

    def layouts(self) -> list[FileLayout]:
        """Return the files to write."""
        limit = self._options.shard_bytes if self.part.splits else self.nbytes
        return file_layouts(self.contents, self.part.stem, limit)

    def stream(self) -> Iterator[weight_stream.Bucket]:
        """Yield the full tensors, on every rank; in fp32 if they are kept in fp32 or merged, and cast when written."""
        plain: list[Unit] = []
        fp32: list[Unit] = []
        for unit in self.part.converter.units:
            in_fp32 = self.part.merges(unit) or any(self._is_kept_in_fp32(name) for name in unit)
            (fp32 if in_fp32 else plain).append(unit)
        backend, converter, limit = self._backend, self.part.converter, self._options.bucket_bytes
        yield from weight_stream.stream(backend, converter, plain, limit, self._options.dtype)
        yield from weight_stream.stream(backend, converter, fp32, limit, torch.float32)


def kept_in_fp32(module: object, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """Return a pattern of names that transformers keeps in fp32 in half precision, such as biases of routers."""
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        kept |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if not kept or dtype not in _HALF:
        return None
    return re.compile("|".join(rf"((^|\.){re.escape(name)}($|\.))" for name in sorted(kept)))


class Output:
    """The directory being written, on rank 0; a context manager."""

    def __init__(self, target: Path, plans: Iterable[TensorPlan], options: SaveOptions) -> None:
        self._stack = ExitStack()
        self._directory = AtomicDirectory(target)
        self._stack.callback(self._directory.discard)
        self._writers: list[TensorWriter] = []
        try:
            self._directory.check_space(sum(plan.nbytes for plan in plans))
            with files.explain_os_errors(self._directory.folder, "cannot write"):
                for plan in plans:
                    self._writers.append(self._begin(plan))
                hf_metadata.write_processors(options.processors, self._directory.folder)
        except BaseException:
            self._stack.close()
            raise

    def _begin(self, plan: TensorPlan) -> TensorWriter:
        folder = self._directory.folder / plan.part.folder
        folder.mkdir(exist_ok=True)
        plan.part.write_configuration(folder, plan.contents)
        return self._stack.enter_context(TensorWriter(folder, plan.layouts()))

    def write(self, part: int, bucket: weight_stream.Bucket) -> None:
        """Write a bucket of one part."""
        for name, tensor in bucket:
            self._writers[part].write(name, tensor)

    def publish(self) -> None:
        """Finish the files and rename the directory to its target."""
        for writer in self._writers:
            writer.finish()
        self._directory.publish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _write(plans: Iterable[TensorPlan], output: Output | None) -> None:
    stream = ((part, bucket) for part, plan in enumerate(plans) for bucket in plan.stream())
    try:
        for part, bucket in stream:
            if output is not None:
                output.write(part, bucket)
            bucket.clear()
    finally:
        for _ in stream:  # after a failure here, the other ranks still gather with this one
            pass
