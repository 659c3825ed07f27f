"""`lightrft convert`: see `lightrft.strategy.export.convert_checkpoint`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lightrft_cli.errors import require_our_packages


class Precision(StrEnum):
    """Dtypes of floating tensors."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or a directory of checkpoints, of which the newest is converted")
    ],
    output: Annotated[Path, typer.Argument(help="Output directory")],
    base: Annotated[
        Path | None, typer.Option(help="Directory of the base model, to copy its tokenizer and configuration")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Tag of the checkpoint, if the directory has several")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model, if the checkpoint has several")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Dtype of floating-point tensors. Default: as stored")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of one safetensors file")] = "5GB",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Allow pickle files, which can run code")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow running Python code from the base model's directory")
    ] = False,
    merge_adapters: Annotated[
        bool, typer.Option("--merge-adapters", help="Write the whole model with its adapter merged in, not the adapter")
    ] = False,
) -> None:
    """Convert a LightRFT, DeepSpeed or PyTorch checkpoint to a Hugging Face model.

    Runs in one process, on the CPU, and needs neither the training script nor its strategy.
    """
    require_our_packages()
    import torch

    from lightrft.strategy.export.convert_checkpoint import Conversion
    from lightrft.strategy.export.save_model import bytes_of_size

    conversion = Conversion(
        checkpoint=checkpoint, output=output, base=base, tag=tag, model=model,
        dtype=None if dtype is None else getattr(torch, dtype), shard_bytes=bytes_of_size(max_shard_size),
        allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
        merge_adapters=merge_adapters,
    )  # fmt: skip
    typer.echo(conversion.run())
