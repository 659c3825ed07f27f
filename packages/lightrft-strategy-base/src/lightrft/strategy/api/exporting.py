"""Models that leave as Hugging Face directories, and come in from them."""

import os
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from lightrft.config import StrategyError
from lightrft.strategy.api.training import Training
from lightrft.strategy.export import loading, saving
from lightrft.strategy.export.loading import LoadedNames
from lightrft.strategy.export.plan import Options, bytes_of_size
from lightrft.strategy.training.prepared import PreparedModel


class Exporting(Training):
    """Weights alone, in the form that other tools read; whole training states are checkpoints."""

    @final
    def save_model(
        self, model: nn.Module, tokenizer: Any, output_dir: str | os.PathLike[str], *, processor: Any = None,
        dtype: torch.dtype | None = None, max_shard_size: int | str = "5GB", merge_adapters: bool = False,
    ) -> Path:  # fmt: skip
        """Write a prepared model as a directory that ``from_pretrained`` opens; returns its path, on every rank.

        Rank 0 writes safetensors files of at most ``max_shard_size`` (bytes, or text such as "5GB"), with
        configuration, generation configuration and custom code; ``tokenizer`` and ``processor``, either may be
        None, write themselves beside them. A model that is not transformers' gives its weights alone. Floating
        tensors are written in ``dtype``, by default that in which the model computes. Of a model with PEFT
        adapters these are written, or with ``merge_adapters`` the whole model with them merged in; the model
        itself stays as it is.

        The directory appears whole, or not at all, and then takes the place of an older one of that name.
        Raises `CheckpointError` on every rank where it cannot be written.
        """
        with self._running(saving.CALL):
            found = self._exportable(model, saving.CALL)
            options = Options(
                dtype=dtype or (torch.bfloat16 if self.config.bf16 else None),
                shard_bytes=bytes_of_size(max_shard_size),
                bucket_bytes=self.config.weight_sync_bucket_bytes,
                merge_adapters=merge_adapters,
                processors={"tokenizer": tokenizer, "processor": processor},
            )
            target = Path(output_dir).expanduser().resolve()
            saving.save(self, self._collectives, found, target, options)
            return target

    @final
    def load_model(
        self, model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True, allow_pickle: bool = False
    ) -> LoadedNames:
        """Read the weights at ``path`` into a prepared model, master weights included; nothing else of it changes.

        ``path``: a Hugging Face directory, of a model or, for a model with PEFT adapters, of these; or a checkpoint
        that LightRFT itself wrote with torch.distributed.checkpoint (FSDP) or DeepSpeed. Every rank reads there
        what it holds. ``strict``: raise where names are missing or unknown; else they are left alone, and returned.
        ``allow_pickle``: load files that can run code as they are read, if they cannot be read otherwise.

        Raises `CheckpointError` before anything changes, on every rank, where files are missing or damaged, or
        shapes differ.
        """
        with self._running(loading.CALL):
            found = self._exportable(model, loading.CALL)
            place = Path(path).expanduser()
            return loading.load(self, self._collectives, found, place, strict=strict, allow_pickle=allow_pickle)

    def _exportable(self, model: nn.Module, call: str) -> PreparedModel:
        found = self._models.find(model)
        if found is None:
            raise StrategyError(f"{call}: this strategy has not prepared the model ({type(model).__name__})")
        if found.offloaded:
            raise StrategyError(f"{call}: {found.kind.__name__} was offloaded; call reload_model before")
        return found
