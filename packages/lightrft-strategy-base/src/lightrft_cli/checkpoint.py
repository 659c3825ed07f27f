"""`lightrft checkpoint`: list, show and verify what `save_ckpt` wrote.

Reads with the code that `load_ckpt` uses, so that what is intact here can be loaded. Changes nothing.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightrft_cli.errors import CommandError, CommandGroup, require_our_packages
from lightrft_cli.output import Json, Row, print_facts, print_json, print_rows, size

if TYPE_CHECKING:
    from lightrft.strategy.checkpoint.checkpoint_reader import CheckpointReader
    from lightrft.strategy.checkpoint.format import Manifest

app = typer.Typer(cls=CommandGroup, rich_markup_mode=None, help="List, show and verify checkpoints.")
Directory = Annotated[Path, typer.Argument(help="A directory of checkpoints, or one checkpoint")]
Tag = Annotated[str | None, typer.Option(help="Tag of a checkpoint. Default: show the newest, verify all")]


@app.command("list")
def list_(directory: Directory, as_json: Json = False) -> None:
    """List the checkpoints in a directory, oldest first."""
    rows: list[Row] = [_row(tag, manifest, as_json) for tag, _, manifest in _checkpoints(directory)]
    print_rows(rows, as_json=as_json, empty=f"There are no checkpoints in {directory}.")


@app.command()
def show(directory: Directory, tag: Tag = None, as_json: Json = False) -> None:
    """Show what is in one checkpoint."""
    path = _find(directory, tag)
    from lightrft.strategy.checkpoint.checkpoint_reader import CheckpointReader

    with CheckpointReader(path) as checkpoint:
        manifest, state = checkpoint.manifest, checkpoint.state
        facts: dict[str, Any] = {
            "tag": manifest.tag, "path": str(path), "saved_at": state.get("saved_at"), "strategy": state.get("strategy"),
            "ranks": manifest.ranks, "bytes": manifest.nbytes, "loaded_by_default": manifest.latest,
            "checksum": manifest.checksum, "versions": state.get("versions", {}), "loaders": len(state["loaders"]),
        }  # fmt: skip
        models = [_model_row(checkpoint, name, as_json) for name in checkpoint.models]
    if as_json:
        print_json({**facts, "models": models})
        return
    print_facts({**facts, "bytes": size(manifest.nbytes)})
    typer.echo()
    print_rows(models, as_json=False)


@app.command()
def verify(directory: Directory, tag: Tag = None, as_json: Json = False) -> None:
    """Read checkpoints in full and compare their checksums: all in a directory, or one.

    Exit codes: 0, all are intact; 1, at least one is damaged; 2, there are none.
    """
    paths = [_find(directory, tag)] if tag is not None else [path for _, path, _ in _checkpoints(directory)]
    if not paths:
        raise CommandError(f"expected checkpoints in {directory}, found none. Check the directory")
    from lightrft.config import CheckpointError

    rows: list[Row] = []
    for path in paths:
        try:
            nbytes = _verify(path)
            row: Row = {"tag": path.name, "size": nbytes if as_json else size(nbytes), "intact": True, "error": ""}
        except CheckpointError as error:
            row = {"tag": path.name, "size": None, "intact": False, "error": str(error)}
        rows.append(row)
    print_rows(rows, as_json=as_json)
    raise typer.Exit(0 if all(row["intact"] for row in rows) else 1)


def _verify(path: Path) -> int:
    """Verify the checkpoint at ``path``; return its bytes. Raises CheckpointError if it is damaged."""
    from lightrft.strategy.checkpoint.checkpoint_reader import CheckpointReader

    with CheckpointReader(path) as checkpoint:
        checkpoint.verify()
        return checkpoint.manifest.nbytes


def _checkpoints(directory: Path) -> "list[tuple[str, Path, Manifest | None]]":
    """Return tag, path and manifest of each checkpoint, oldest first; those with damaged manifests last, with None."""
    path = _existing(directory)
    from lightrft.config import CheckpointError
    from lightrft.strategy.checkpoint.format import MANIFEST
    from lightrft.strategy.checkpoint.store import Store, read_manifest

    if (path / MANIFEST).is_file():
        try:
            return [(path.name, path, read_manifest(path))]
        except CheckpointError:
            return [(path.name, path, None)]
    committed, damaged = Store(path).scan()
    committed.sort(key=lambda checkpoint: checkpoint.manifest.sequence)
    intact = [(checkpoint.tag, checkpoint.path, checkpoint.manifest) for checkpoint in committed]
    return [*intact, *((tag, path / tag, None) for tag in damaged)]


def _find(directory: Path, tag: str | None) -> Path:
    path = _existing(directory)
    from lightrft.strategy.checkpoint.format import MANIFEST
    from lightrft.strategy.checkpoint.store import Store

    return path if tag is None and (path / MANIFEST).is_file() else Store(path).find(tag)


def _existing(directory: Path) -> Path:
    require_our_packages()
    path = directory.expanduser().absolute()
    if not path.is_dir():
        raise CommandError(
            f"expected a directory of checkpoints, got {directory}, which is not a directory. Check the path"
        )
    return path


def _row(tag: str, manifest: "Manifest | None", exact: bool) -> Row:
    nbytes = manifest.nbytes if manifest else 0
    return {
        "tag": tag,
        "updates": _updates(manifest.state) if manifest else None,
        "saved_at": manifest.state.get("saved_at") if manifest else None,
        "strategy": manifest.state.get("strategy") if manifest else None,
        "ranks": manifest.ranks if manifest else None,
        "size": None if manifest is None else nbytes if exact else size(nbytes),
        "models": list(manifest.state["models"]) if manifest else [],
        "status": "manifest intact" if manifest else "manifest damaged",
    }


def _updates(state: dict[str, Any]) -> int | None:
    """Return the number of updates of the model that has had the most."""
    counts = [facts["training"]["updates"] for facts in state["models"].values() if facts["training"]]
    return max(counts, default=None)


def _model_row(checkpoint: "CheckpointReader", name: str, exact: bool) -> Row:
    facts = checkpoint.state["models"][name]
    training = facts["training"] or {}
    prefix = f"{name}/parameters/"
    shapes, dtypes = checkpoint.shapes(prefix), checkpoint.dtypes(prefix)
    elements = Counter[str]()
    for parameter, shape in shapes.items():
        elements[str(dtypes[parameter]).removeprefix("torch.")] += shape.numel()
    nbytes = sum(piece.nbytes for _, piece in checkpoint.pieces if piece.entry.startswith(f"{name}/"))
    return {
        "model": name, "class": facts["class"], "parameters": elements.total(), "dtype": sorted(elements),
        "size": nbytes if exact else size(nbytes), "optimizer": training.get("optimizer"),
        "updates": training.get("updates"), "skipped": training.get("skipped"),
        "scheduler": (facts["scheduler"] or {}).get("class"), "adapters": sorted(facts.get("adapters", {})),
    }  # fmt: skip
