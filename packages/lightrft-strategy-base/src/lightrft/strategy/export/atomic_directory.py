"""Atomic replacement of a model's directory.

The directory is written under a temporary name next to the target, and renamed. An existing target is renamed first; files
in it that no export wrote are moved to the new directory:

    .NAME.lightrft-lock     held during an export to NAME
    .NAME.TOKEN.writing     being written
    .NAME.TOKEN.replaced    the previous NAME, until its other files have been moved

The next export to the same target finishes or undoes what a killed process left behind. A target that cannot be renamed,
such as a mount point, is filled file by file; its configuration is written last, so that nothing opens an incomplete
model. A target that is a checkpoint, or contains checkpoints, is refused.
"""

import os
import re
import secrets
import shutil
from pathlib import Path

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint.store import checkpoints_at
from lightrft.strategy.storage import files
from lightrft.strategy.storage.locks import Lock
from lightrft.strategy.telemetry.log import logger

_CONFIGURATION = re.compile(r"^(config|adapter_config)\.json$")
_EXPORTED = re.compile(
    r"^((model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|(config|adapter_config|generation_config)\.json)$"
)
"""Files that exports write; a new export removes those of an older one."""


class AtomicDirectory:
    """A directory that is written at `folder`, until `publish` renames it to ``target``; `discard` ends it in any case."""

    def __init__(self, target: Path) -> None:
        """Make `folder`. Raise `CheckpointError` if ``target`` cannot be such a directory."""
        self.target = target
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"expected {target} to be a directory, got a file. Use another path, or remove it")
        with files.explain_os_errors(target, "cannot make"):
            self._refuse_checkpoints()
            files.make_directory(target.parent)
            self._in_place = target.is_dir() and (target.is_mount() or not os.access(target.parent, os.W_OK))
            self._parent = target if self._in_place else target.parent
            token = secrets.token_hex(8)
            self.folder = self._parent / f".{target.name}.{token}.writing"
            self._previous = self._parent / f".{target.name}.{token}.replaced"
            self._lock = Lock(self._parent, target.name)
            if not self._lock.acquire():
                raise CheckpointError(
                    f"expected {target} to have one writer, got another process that is writing it and holds {self._lock.path}. Use "
                    f"another path, or wait for it"
                )
            try:
                self._recover()
                self.folder.mkdir()
            except BaseException:
                self._lock.release()
                raise

    def _refuse_checkpoints(self) -> None:
        checkpoints = checkpoints_at(self.target)
        if checkpoints:
            raise CheckpointError(
                f"expected {self.target} to hold no checkpoints, which a model would replace, got "
                f"{', '.join(map(str, checkpoints[:3]))}. Use another path"
            )

    def _recover(self) -> None:
        """Finish or undo an interrupted export. The lock is held."""
        temporary = re.compile(rf"^\.{re.escape(self.target.name)}\.[0-9a-f]{{16}}\.(writing|replaced)$")
        for path in list(self._parent.iterdir()):
            match = temporary.match(path.name)
            if match is None or path.is_symlink():
                continue
            if match[1] == "writing":
                shutil.rmtree(path)
            elif self.target.exists():
                self._move_others(path, self.target)
            else:
                files.rename(path, self.target)

    def check_space(self, needed: int) -> None:
        """Raise `CheckpointError` if the disk has fewer than ``needed`` bytes free."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"expected {needed / 1e9:.2f} GB free for {self.target}, got {free / 1e9:.2f} GB. Free space, or use another path"
            )

    def publish(self) -> None:
        """Rename `folder` to ``target``."""
        with files.explain_os_errors(self.target, "cannot write"):
            files.synchronise_all(self.folder)
            self._refuse_checkpoints()
            if self._in_place:
                self._fill()
                return
            if self.target.exists():
                files.rename(self.target, self._previous)
            files.rename(self.folder, self.target)
            if self._previous.exists():
                self._move_others(self._previous, self.target)

    def _move_others(self, old: Path, new: Path) -> None:
        """Move what no export wrote and ``new`` does not have; remove the rest of ``old``."""
        for path in list(old.iterdir()):
            moved = new / path.name
            if path.is_dir() and not path.is_symlink() and moved.is_dir():
                self._move_others(path, moved)
            elif _EXPORTED.match(path.name) or os.path.lexists(moved):
                path.unlink()
            else:
                path.rename(moved)
        files.synchronise(new)
        old.rmdir()

    def _fill(self) -> None:
        """Replace the old files by the new ones in place, the configuration last."""
        for path in sorted(self.target.iterdir(), key=lambda file: not _CONFIGURATION.match(file.name)):
            if _EXPORTED.match(path.name):
                path.unlink()
        for path in sorted(self.folder.iterdir(), key=lambda file: bool(_CONFIGURATION.match(file.name))):
            replaced = self.target / path.name
            if path.is_dir() and replaced.is_dir():
                self._move_others(replaced, path)
            path.replace(replaced)
        files.synchronise(self.target)
        self.folder.rmdir()

    def discard(self) -> None:
        """Remove what was not published, restore what was to be replaced, and release the lock."""
        try:
            with files.explain_os_errors(self._parent, "cannot clean up"):
                try:
                    self._recover()
                finally:
                    self._lock.release()
        except CheckpointError as error:
            logger.warning("%s. The next export to %s retries", error, self.target)
