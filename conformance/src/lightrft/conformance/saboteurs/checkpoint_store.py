"""Defects of the directory of checkpoints: tags, replacing, deleting and verifying."""

import pickle
import shutil
from pathlib import Path
from unittest.mock import patch

from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.checkpoints import Saves
from lightrft.conformance.saboteurs.hooks import CheckpointHooks, Loaded, Options
from lightrft.strategy import FakeStrategy
from lightrft.strategy.checkpoint import store
from lightrft.strategy.checkpoint.checkpoint_items import Models
from lightrft.strategy.checkpoint.format import Manifest
from lightrft.strategy.checkpoint.load_checkpoint import CheckpointLoading
from lightrft.strategy.checkpoint.save_checkpoint import TagWriter
from lightrft.strategy.checkpoint.store import Store

# mypy: disable-error-code="misc, union-attr, arg-type"


@saboteur("CKPT-2")
class KeepsTheOld(Saves):
    """Saving under an existing tag does nothing."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        if tag is not None and (directory / tag).is_dir():
            return directory / tag
        return super().save(model, directory, tag, options)


@saboteur("CKPT-2")
class AlwaysLatest(Saves):
    """save_latest is ignored."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        return super().save(model, directory, tag, {**options, "save_latest": True})


@saboteur("CKPT-2")
class LastByName(Saves):
    """Without a tag, the last checkpoint by name is loaded."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        tags = sorted(checkpoint.tag for checkpoint in Store(directory).committed())
        return super().load(model, directory, tags[-1] if tag is None and tags else tag, options)


@saboteur("CKPT-2")
class FallsBackToHidden(Saves):
    """Without a tag, if no checkpoint was saved with save_latest, the newest of the others is loaded."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        try:
            return super().load(model, directory, tag, options)
        except FileNotFoundError:
            committed = Store(directory).committed() if directory.is_dir() else []
            if tag is not None or not committed:
                raise
            return super().load(model, directory, committed[-1].tag, options)


@saboteur("CKPT-4")
class KeepsHidden(Saves):
    """Checkpoints saved without save_latest are never deleted."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        remove = store._remove
        kept = lambda target: None if not store.read_manifest(target).latest else remove(target)  # noqa: E731
        with patch.object(store, "_remove", kept):
            return super().save(model, directory, tag, options)


@saboteur("CKPT-4")
class DeletesTheLoadable(Saves):
    """Saving without save_latest deletes the newest checkpoint that loads without a tag."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        path = super().save(model, directory, tag, options)
        tags = [checkpoint.tag for checkpoint in Store(directory).committed()]
        if not options.get("save_latest", True) and len(tags) >= options.get("max_num", 3):
            shutil.rmtree(directory / tags[0])
        return path


@saboteur("CKPT-5")
class RemovesTheReplaced(Saves):
    """Saving under an existing tag removes that checkpoint before the new one is in its place."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        commit = TagWriter.commit

        def remove_and_commit(writer: TagWriter, manifest: Manifest) -> None:
            if writer.target.exists():
                for file in writer.target.iterdir():
                    file.unlink()
                writer.target.rmdir()
            commit(writer, manifest)

        with patch.object(TagWriter, "commit", remove_and_commit):
            return super().save(model, directory, tag, options)


@saboteur("CKPT-11")
class RemovesTheReplacedFirst(Saves):
    """Saving under an existing tag removes that checkpoint before anything is written."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        if tag is not None and (directory / tag).is_dir():
            shutil.rmtree(directory / tag)
        return super().save(model, directory, tag, options)


@saboteur("CKPT-10")
class ExtraPickle(Saves):
    """Checkpoints contain a pickle, which loading unpickles after the other files were verified."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        path = super().save(model, directory, tag, options)
        (path / "run.meta").write_bytes(pickle.dumps({"saved": True}))
        return path

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        path, state = super().load(model, directory, tag, options)
        if (path / "run.meta").exists():
            pickle.loads((path / "run.meta").read_bytes())  # noqa: S301 - the defect
        return path, state


@saboteur("CKPT-6")
class OptimizerUnverified(Saves):
    """The optimizer's state is not verified before it is loaded."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        is_loaded = CheckpointLoading._is_loaded
        without_optimizer = lambda loading, parts, names: "optimizer" not in parts and is_loaded(loading, parts, names)  # noqa: E731
        with patch.object(CheckpointLoading, "_is_loaded", without_optimizer):
            return super().load(model, directory, tag, options)


@saboteur("CKPT-4")
class BinaryGigabytes(CheckpointHooks, FakeStrategy):
    """max_mem counts units of 2**30 bytes."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        options["max_mem"] = options.get("max_mem", 1000) * 2**30 / 10**9
        return super().save(model, directory, tag, options)
