"""The command `lightrft`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from lightrft.config import LightRFTError
from lightrft.strategy.export.converting import Conversion
from lightrft.strategy.export.plan import bytes_of_size

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


class Precision(StrEnum):
    """Types of floating tensors."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.callback()
def lightrft() -> None:
    """Work on what LightRFT's training leaves behind."""


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a directory of several: the newest is taken")],
    output: Annotated[Path, typer.Argument(help="The directory to write")],
    base: Annotated[
        Path | None, typer.Option(help="The model that training began from; its tokenizer and configuration are copied")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Which of several checkpoints")] = None,
    model: Annotated[str | None, typer.Option(help="Which of several models in a checkpoint")] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Of floating tensors; by default they stay as they are")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest file")] = "5GB",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read files that may run code")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that stands in the base model's directory")
    ] = False,
) -> None:
    """Make a model that from_pretrained opens of a checkpoint: LightRFT's, of any version, or DeepSpeed's or PyTorch's.

    Needs one process, no accelerator, and none of the code that trained it.
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
