"""A directory that appears whole, under its name, or not at all.

It is written under another name beside its own, and renamed. Where there is a directory of that name, the old one
steps aside and the new one takes its place; what was in the old one and is no part of a model moves over:

    .NAME.writing    being written
    .NAME.replaced   was NAME, until NAME is there again and has what moves over

What a killed process left of this, the next export to the same place brings to an end. A directory that cannot be
renamed, because it is a mount point or in one that may not be written to, is filled file by file instead, and has
no configuration, so that nothing opens it, until all the rest is there.
"""

import os
import re
import shutil
from pathlib import Path

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint import files

_CONFIGURATION = re.compile(r"^(config|adapter_config)\.json$")
_OF_A_MODEL = re.compile(
    r"^(.*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?|adapter_model.*"
    r"|(config|adapter_config|generation_config)\.json)$"
)
"""Files that say what the old model was, and must not stay beside a new one."""


class Publication:
    """A directory in the making, at `folder`, until `publish` makes it ``target``."""

    def __init__(self, target: Path) -> None:
        """Raises `CheckpointError` where there can be no such directory."""
        self.target = target
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target} is a file; a model is a directory: give another path, or remove it")
        with files.naming(target, "cannot make"):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._fixed = target.is_dir() and (target.is_mount() or not os.access(target.parent, os.W_OK))
            place = target if self._fixed else target.parent
            self.folder, self._replaced = place / f".{target.name}.writing", place / f".{target.name}.replaced"
            self._recover()
            self.folder.mkdir()

    def _recover(self) -> None:
        """Bring to an end what was interrupted."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        if self._replaced.exists() and not self.target.exists():
            files.rename(self._replaced, self.target)
        self._move_over()

    def check_space(self, needed: int) -> None:
        """Raise `CheckpointError` where the disk has fewer than ``needed`` bytes left."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"cannot write {self.target}: it takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there; free "
                f"some, or give another path"
            )

    def publish(self) -> None:
        """Make `folder` the ``target``."""
        files.synchronise(self.folder)
        if self._fixed:
            self._fill()
            return
        if self.target.exists():
            files.rename(self.target, self._replaced)
        files.rename(self.folder, self.target)
        self._move_over()

    def _move_over(self) -> None:
        """What is no part of a model, from the directory that was replaced; the rest of it is removed."""
        if not self._replaced.exists():
            return
        with files.naming(self._replaced, "cannot move"):
            for path in self._replaced.iterdir():
                place = self.target / path.name
                if not _OF_A_MODEL.match(path.name) and not place.exists():
                    path.rename(place)
            shutil.rmtree(self._replaced)

    def _fill(self) -> None:
        """Put the new files in the place of the old ones, the configuration last."""
        with files.naming(self.target, "cannot write"):
            for path in sorted(self.target.iterdir(), key=lambda it: not _CONFIGURATION.match(it.name)):
                if _OF_A_MODEL.match(path.name):
                    path.unlink()
            for path in sorted(self.folder.iterdir(), key=lambda it: bool(_CONFIGURATION.match(it.name))):
                path.replace(self.target / path.name)
            files.synchronise(self.target)
            self.folder.rmdir()

    def discard(self) -> None:
        """Remove what was not published."""
        shutil.rmtree(self.folder, ignore_errors=True)
