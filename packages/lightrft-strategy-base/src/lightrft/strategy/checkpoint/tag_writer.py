"""Saving one checkpoint into a store: what the one process does that makes the directory, and publishes it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint import files, leftovers
from lightrft.strategy.checkpoint.layout import LATEST, MANIFEST, Manifest
from lightrft.strategy.checkpoint.lock import Lock, holding
from lightrft.strategy.checkpoint.store import Store, aside, read_manifest

TOKEN = "token"
GB = 10**9
Models = Mapping[str, Mapping[str, Any]]
"""What a manifest says of each model."""
_PATIENCE = 1.0
"""Seconds in which another process may be done with what takes but a moment."""


class TagWriter:
    """`begin`, `commit` and `rotate`, and at the end of it, however it went, `end`."""

    def __init__(self, directory: Path, tag: str) -> None:
        self._store, self._lock = Store(directory), Lock(directory, tag)
        self.target = directory / tag
        self.folder = aside(self.target, "writing")

    def begin(self, token: str, models: Models) -> None:
        """Make `folder`, in which all ranks write; what killed processes left behind in the store is removed.

        Raises `CheckpointError` where another process is saving the tag, or where it is there, and is no checkpoint of
        such ``models``.
        """
        directory = self._store.directory
        with files.naming(directory, "cannot save to"):
            files.make_directory(directory)
            if not self._lock.take(_PATIENCE):
                raise CheckpointError(
                    f"another process is saving {self.target}, and holds {self._lock.path}; give each run a directory of its "
                    f"own, or wait until it has ended"
                )
            leftovers.settle(self.target)
            leftovers.clean(directory)
            self._check_replaceable(models)
            self.folder.mkdir()
        files.write_text(self.folder / TOKEN, token)

    def _check_replaceable(self, models: Models) -> None:
        if not os.path.lexists(self.target):
            return
        try:
            if self.target.is_symlink():
                raise CheckpointError("it is a symbolic link")
            there, new = _kinds(read_manifest(self.target).state["models"]), _kinds(models)
            if there != new:
                raise CheckpointError(f"it holds other models: {_listed(there)}, and here {_listed(new)}")
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.target} is there, and is no checkpoint that could be replaced ({error}); use another tag or "
                f"directory, or remove it"
            ) from error

    def commit(self, manifest: Manifest) -> None:
        """Publish `folder`, which all ranks filled. Where this raises, the store is as it was."""
        files.write_text(self.folder / MANIFEST, manifest.to_text())
        with files.naming(self.folder, "cannot write"):
            (self.folder / TOKEN).unlink(missing_ok=True)
            files.synchronise(self.folder)
        if self.target.exists():
            files.rename(self.target, aside(self.target, "replaced"))
        files.rename(self.folder, self.target)
        directory = self._store.directory
        with leftovers.warned(directory / LATEST, "cannot write"), holding(directory, LATEST, _PATIENCE) as alone:
            if alone:
                self._update_latest(manifest)

    def _update_latest(self, manifest: Manifest) -> None:
        """``latest`` names the newest that may be loaded without its tag; it is not there where there is none."""
        latest = self._store.directory / LATEST
        if not manifest.latest and self._store.named_latest() not in (None, manifest.tag):
            return
        newest = self._store.newest()
        if newest is None:
            latest.unlink(missing_ok=True)
        else:
            files.replace_text(latest, f"{newest.tag}\n")

    def rotate(self, newest: Manifest, max_num: int, max_mem: float) -> None:
        """Remove the oldest checkpoints of the same lineages until there are ``max_num`` and ``max_mem`` GB at most.

        The newest stays, and so does the one that is loaded without a tag.
        """
        alike = [it for it in self._store.committed() if it.manifest.lineages == newest.lineages]
        kept = [it for it in alike if it.is_in_place]
        loadable = [it.tag for it in kept if it.manifest.latest]
        protected = {self.target.name, self._store.named_latest(), *loadable[-1:]}
        for oldest in [it for it in kept if it.tag not in protected]:
            if len(kept) <= max_num and sum(it.manifest.nbytes for it in kept) <= max_mem * GB:
                return
            leftovers.remove(oldest.path)
            kept.remove(oldest)

    def end(self) -> None:
        """Remove what was not committed, or was replaced, and let others save under the tag."""
        if self._lock.held:
            leftovers.settle(self.target)
            with leftovers.warned(self._lock.path, "cannot remove"):
                self._lock.release()


def _kinds(models: Models) -> dict[str, str]:
    """The class of each model, by name."""
    return {name: facts["class"] for name, facts in models.items()}


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name!r} ({kind})" for name, kind in kinds.items())
