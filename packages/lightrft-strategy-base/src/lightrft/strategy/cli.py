"""The command `lightrft`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from lightrft.config import LightRFTError
from lightrft.strategy.export.convert_checkpoint import Conversion
from lightrft.strategy.export.save_model import bytes_of_size

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


class Precision(StrEnum):
    """Dtypes of floating tensors."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.callback()
def lightrft() -> None:
    """Tools for the checkpoints of LightRFT."""


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or a directory of several, of which the newest is converted")
    ],
    output: Annotated[Path, typer.Argument(help="Directory to write")],
    base: Annotated[
        Path | None, typer.Option(help="Directory of the base model, whose tokenizer and configuration are copied")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Tag of the checkpoint, in a directory of several")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model, in a checkpoint of several")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Dtype of floating tensors; default: as stored")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file")] = "5GB",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read files that can run code")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code in the directory of the base model")
    ] = False,
) -> None:
    """Convert a checkpoint of LightRFT, DeepSpeed or PyTorch to a model that from_pretrained opens.

    Runs in one process, without an accelerator and without the code that trained the model.
    """
    try:
        conversion = Conversion(
            checkpoint=checkpoint, output=output, base=base, tag=tag, model=model,
            dtype=None if dtype is None else getattr(torch, dtype), shard_bytes=bytes_of_size(max_shard_size),
            allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        typer.echo(conversion.run())
    except LightRFTError as error:
        typer.echo(f"lightrft convert: {error}", err=True)
        raise typer.Exit(1) from error
