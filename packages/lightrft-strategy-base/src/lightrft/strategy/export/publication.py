"""A directory that appears whole, under its name, or not at all.

It is written under another name beside its own, and renamed. Where there is a directory of that name, the old one
steps aside and the new one takes its place; what was in the old one and no export wrote moves over:

    .NAME.lightrft-lock     held while an export to NAME is under way
    .NAME.TOKEN.writing     being written
    .NAME.TOKEN.replaced    was NAME, until NAME is there again and has what moves over

What a killed process left of this, the next export to the same place brings to an end. A directory that cannot be
renamed, because it is a mount point or in one that may not be written to, is filled file by file instead, and has
no configuration, so that nothing opens it, until all the rest is there. Checkpoints are no models: a directory that
is one, or holds some, is refused.
"""

import os
import re
import secrets
import shutil
from pathlib import Path

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint import files
from lightrft.strategy.checkpoint.lock import Lock
from lightrft.strategy.checkpoint.store import checkpoints_at
from lightrft.strategy.log import logger

_CONFIGURATION = re.compile(r"^(config|adapter_config)\.json$")
_OF_AN_EXPORT = re.compile(
    r"^((model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|(config|adapter_config|generation_config)\.json)$"
)
"""Files that an export wrote, and that must not stay beside those of a new one."""


class Publication:
    """A directory in the making, at `folder`, until `publish` makes it ``target``; `discard` is the end of it."""

    def __init__(self, target: Path) -> None:
        """Raises `CheckpointError` where there can be no such directory."""
        self.target = target
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target} is a file; a model is a directory: give another path, or remove it")
        with files.naming(target, "cannot make"):
            self._refuse_checkpoints()
            files.make_directory(target.parent)
            self._fixed = target.is_dir() and (target.is_mount() or not os.access(target.parent, os.W_OK))
            self._place = target if self._fixed else target.parent
            token = secrets.token_hex(8)
            self.folder = self._place / f".{target.name}.{token}.writing"
            self._replaced = self._place / f".{target.name}.{token}.replaced"
            self._lock = Lock(self._place, target.name)
            if not self._lock.take():
                raise CheckpointError(
                    f"another process is writing {target}, and holds {self._lock.path}; give another path, or wait for it"
                )
            try:
                self._recover()
                self.folder.mkdir()
            except BaseException:
                self._lock.release()
                raise

    def _refuse_checkpoints(self) -> None:
        found = checkpoints_at(self.target)
        if found:
            raise CheckpointError(
                f"{self.target} holds checkpoints ({', '.join(map(str, found[:3]))}), which a model in its place would "
                f"destroy; give another path"
            )

    def _recover(self) -> None:
        """Bring to an end what was interrupted. The lock is held: nobody else is at it."""
        aside = re.compile(rf"^\.{re.escape(self.target.name)}\.[0-9a-f]{{16}}\.(writing|replaced)$")
        for path in list(self._place.iterdir()):
            found = aside.match(path.name)
            if found is None or path.is_symlink():
                continue
            if found[1] == "writing":
                shutil.rmtree(path)
            elif self.target.exists():
                self._move_over(path, self.target)
            else:
                files.rename(path, self.target)

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
        with files.naming(self.target, "cannot write"):
            files.synchronise_all(self.folder)
            self._refuse_checkpoints()
            if self._fixed:
                self._fill()
                return
            if self.target.exists():
                files.rename(self.target, self._replaced)
            files.rename(self.folder, self.target)
            if self._replaced.exists():
                self._move_over(self._replaced, self.target)

    def _move_over(self, old: Path, new: Path) -> None:
        """What no export wrote, and ``new`` does not have; the rest of ``old`` is removed."""
        for path in list(old.iterdir()):
            place = new / path.name
            if path.is_dir() and not path.is_symlink() and place.is_dir():
                self._move_over(path, place)
            elif _OF_AN_EXPORT.match(path.name) or os.path.lexists(place):
                path.unlink()
            else:
                path.rename(place)
        files.synchronise(new)
        old.rmdir()

    def _fill(self) -> None:
        """Put the new files in the place of the old ones, the configuration last."""
        for path in sorted(self.target.iterdir(), key=lambda it: not _CONFIGURATION.match(it.name)):
            if _OF_AN_EXPORT.match(path.name):
                path.unlink()
        for path in sorted(self.folder.iterdir(), key=lambda it: bool(_CONFIGURATION.match(it.name))):
            place = self.target / path.name
            if path.is_dir() and place.is_dir():
                self._move_over(place, path)
            path.replace(place)
        files.synchronise(self.target)
        self.folder.rmdir()

    def discard(self) -> None:
        """Remove what was not published, and put back what stepped aside for it."""
        try:
            with files.naming(self._place, "cannot clean up"):
                try:
                    self._recover()
                finally:
                    self._lock.release()
        except CheckpointError as error:
            logger.warning("%s; the next export to %s tries again", error, self.target)
