"""A directory of checkpoints: finding one, updating `latest`, removing old and interrupted ones.

A checkpoint gets its tag by one rename. Unfinished directories have names that begin with a dot, so that every other
directory is complete:

    .TAG.writing         being written
    .TAG.replaced        the previous TAG, until the new TAG is in place; counts as TAG if there is no other
    .TAG.removing        being removed
    .TAG.lightrft-lock   held by the process that does one of these

A checkpoint is recognised by its manifest, which names the tag; other or renamed directories are never changed. Only
files that belong to a checkpoint are removed; other files in its directory are kept, under the tag. Nothing is done
through symbolic links, or to a tag that another process is saving. A failure to remove is a warning.
"""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightrft.config import ArgumentError, ArgumentTypeError, CheckpointError, CheckpointNotFoundError
from lightrft.config.validation import shown
from lightrft.strategy.checkpoint.format import LATEST, MANIFEST, Manifest
from lightrft.strategy.storage import files, locks
from lightrft.strategy.storage.locks import holding
from lightrft.strategy.telemetry.log import logger

TOKEN = "token"
"""A file of a checkpoint being written, by which ranks see that they share its directory."""
LOCK_TIMEOUT = 1.0
"""Seconds to wait for a lock that other processes hold for a moment."""
GB = 10**9
_TEMPORARY = re.compile(rf"^\.(?P<tag>.+)\.(?P<state>writing|replaced|removing|{locks.SUFFIX})$")
_CHECKPOINT_FILE = re.compile(rf"^(manifest\.json|{TOKEN}|rank-\d{{5,}}-of-\d{{5,}}\.safetensors)$")


def temporary_path(target: Path, state: str) -> Path:
    """Return the path of the checkpoint at ``target`` while it is "writing", "replaced" or "removing"."""
    return target.with_name(f".{target.name}.{state}")


def check_tag(tag: object, what: str = "tag") -> None:
    """Raise `ArgumentTypeError` for a tag that is not a string, `ArgumentError` for one that is not a plain name."""
    if not isinstance(tag, str):
        raise ArgumentTypeError(f"expected {what} to be a string, got {shown(tag)}. Pass the name of a directory")
    if not tag.isprintable() or tag != tag.strip() or tag.startswith(".") or "/" in tag or tag in ("", LATEST):
        raise ArgumentError(
            f"expected {what} to be a directory name, got {tag!r}. Use printable characters without '/'; it must not "
            f"begin with '.', begin or end with a space, or be {LATEST!r}"
        )


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A complete checkpoint of a store."""

    tag: str
    path: Path
    manifest: Manifest

    @property
    def is_in_place(self) -> bool:
        """Whether it is still where it was saved: not renamed, and not behind a symbolic link."""
        return self.path.name == self.manifest.tag and not self.path.is_symlink()


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the checkpoint at ``path``. Raise `CheckpointError` that names the file."""
    file = path / MANIFEST
    try:
        return Manifest.from_text(file.read_bytes().decode("ascii"))
    except (CheckpointError, OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot read {file}: {reason}") from error


def is_checkpoint(path: Path) -> bool:
    """Return whether ``path`` is the directory of a checkpoint, even a damaged or unfinished one."""
    return path.is_dir() and ((path / MANIFEST).exists() or any(path.glob("rank-*-of-*.safetensors")))


def checkpoints_at(path: Path) -> list[Path]:
    """Return ``path`` if it is a checkpoint, else the checkpoints in it."""
    if is_checkpoint(path):
        return [path]
    return sorted(entry for entry in path.iterdir() if is_checkpoint(entry)) if path.is_dir() else []


class Store:
    """The checkpoints in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # Finding

    def committed(self) -> list[Committed]:
        """Return the checkpoints whose manifests are intact, oldest first."""
        return sorted(self.scan()[0], key=lambda checkpoint: checkpoint.manifest.sequence)

    def scan(self) -> tuple[list[Committed], dict[str, CheckpointError]]:
        """Return the checkpoints with intact manifests, and the errors of the others by tag."""
        committed, damaged = [], {}
        with files.explain_os_errors(self.directory, "cannot list"):
            directories = list(self._directories())
        for tag, path in directories:
            try:
                committed.append(Committed(tag=tag, path=path, manifest=read_manifest(path)))
            except CheckpointError as error:
                damaged[tag] = error
        return committed, damaged

    def _directories(self) -> Iterator[tuple[str, Path]]:
        if not self.directory.is_dir():
            return
        for path in sorted(self.directory.iterdir()):
            temporary = _TEMPORARY.match(path.name)
            if not is_checkpoint(path):
                continue
            if not path.name.startswith("."):
                yield path.name, path
            elif (
                temporary and temporary["state"] == "replaced" and not is_checkpoint(self.directory / temporary["tag"])
            ):
                yield temporary["tag"], path

    def find(self, tag: str | None) -> Path:
        """Return the path of checkpoint ``tag``, or, for None, of the newest one saved with ``latest``.

        Raises:
            CheckpointNotFoundError: There is none; lists those that exist.
            CheckpointError: Its manifest is damaged, or that of a checkpoint that may be the newest: whether to go back
                further is for the caller to decide.
        """
        committed, damaged = self.scan()
        if tag is None:
            return self._newest(damaged)
        check_tag(tag)
        if tag in damaged:
            raise self._damage_error(damaged[tag])
        path = next((checkpoint.path for checkpoint in committed if checkpoint.tag == tag), None)
        if path is None:
            raise self._not_found_error(f"checkpoint {tag!r}")
        return path

    def _newest(self, damaged: dict[str, CheckpointError]) -> Path:
        named = self.named_latest()
        if damaged and (named is None or named in damaged):
            raise self._damage_error(damaged.get(named or "", next(iter(damaged.values()))))
        for error in damaged.values():
            logger.warning("%s; skipped, since a newer checkpoint exists", error)
        newest = self.newest()
        if newest is None:
            raise self._not_found_error("a checkpoint that can be loaded without its tag")
        return newest.path

    def newest(self) -> Committed | None:
        """Return the newest intact checkpoint that was saved with ``latest``."""
        return next((checkpoint for checkpoint in reversed(self.committed()) if checkpoint.manifest.latest), None)

    def named_latest(self) -> str | None:
        """Return the tag in the file ``latest`` if there is such a checkpoint, even a damaged one."""
        try:
            tag = (self.directory / LATEST).read_text(encoding="utf-8").strip()
            check_tag(tag)
        except (OSError, ValueError):
            return None
        return tag if is_checkpoint(self.directory / tag) else None

    def _damage_error(self, error: CheckpointError) -> CheckpointError:
        return CheckpointError(f"{error}; load another tag (intact: {self._tags() or 'none'})")

    def _not_found_error(self, what: str) -> CheckpointNotFoundError:
        tags = self._tags()
        remedy = f"Available: {tags}" if tags else "There are none: check the directory"
        if (self.directory / MANIFEST).exists():
            remedy = f"This is a checkpoint itself: load from {self.directory.parent} with tag={self.directory.name!r}"
        return CheckpointNotFoundError(f"expected {what} in {self.directory}, found none. {remedy}")

    def _tags(self) -> str:
        return ", ".join(checkpoint.tag for checkpoint in self.committed())

    def next_sequence(self) -> int:
        """Return the number of the next checkpoint."""
        return max((checkpoint.manifest.sequence for checkpoint in self.committed()), default=0) + 1

    # After a commit

    def update_latest(self, committed: Manifest) -> None:
        """Make the file ``latest`` name the newest checkpoint that can be loaded without its tag; remove it if none."""
        file = self.directory / LATEST
        with warn_on_failure(file, "cannot write"), holding(self.directory, LATEST, LOCK_TIMEOUT) as acquired:
            if not acquired or (not committed.latest and self.named_latest() not in (None, committed.tag)):
                return
            newest = self.newest()
            if newest is None:
                file.unlink(missing_ok=True)
            else:
                files.replace_text(file, f"{newest.tag}\n")

    def rotate(self, committed: Manifest, max_num: int, max_mem: float, keep: Collection[str]) -> None:
        """Remove the oldest checkpoints of the same lineages, down to ``max_num`` checkpoints and ``max_mem`` GB.

        Keeps the one that was just committed and the one that is loaded without a tag. The tags in ``keep`` are neither
        removed nor counted.
        """
        existing = self.committed()
        missing = sorted(set(keep) - {checkpoint.tag for checkpoint in existing})
        if missing:
            logger.warning(
                "save_ckpt: expected keep to be tags of checkpoints in %s, got %s, which is not there (there are %s)",
                self.directory, ", ".join(map(repr, missing)), self._tags(),
            )  # fmt: skip
        kept = [
            checkpoint
            for checkpoint in existing
            if checkpoint.manifest.lineages == committed.lineages
            and checkpoint.is_in_place
            and checkpoint.tag not in keep
        ]
        loadable = [checkpoint.tag for checkpoint in kept if checkpoint.manifest.latest]
        protected = {committed.tag, self.named_latest(), *loadable[-1:]}
        for oldest in [checkpoint for checkpoint in kept if checkpoint.tag not in protected]:
            if len(kept) <= max_num and sum(checkpoint.manifest.nbytes for checkpoint in kept) <= max_mem * GB:
                return
            _remove(oldest.path)
            kept.remove(oldest)

    def warn_of_other_runs(self, committed: Manifest) -> None:
        """Warn if there are checkpoints of the same models from other runs, which `rotate` never removes."""
        others = [
            checkpoint.tag
            for checkpoint in self.committed()
            if checkpoint.manifest.lineages != committed.lineages and checkpoint.manifest.classes == committed.classes
        ]
        if others:
            logger.warning(
                "save_ckpt: %s has %d checkpoints of these models from other runs (%s), which max_num and max_mem do not "
                "count or remove. Load one with load_ckpt to continue its run, remove them, or use a directory for each run",
                self.directory, len(others), ", ".join(others[:4]) + (", ..." if len(others) > 4 else ""),
            )  # fmt: skip

    # Cleaning up

    def clean(self) -> None:
        """Complete or undo the unfinished saves and removals of killed processes."""
        tags = {temporary["tag"] for entry in self.directory.iterdir() if (temporary := _TEMPORARY.match(entry.name))}
        for tag in sorted(tags):
            target = self.directory / tag
            with warn_on_failure(target, "cannot clean up after"), holding(self.directory, tag) as acquired:
                if acquired:
                    recover(target)


def recover(target: Path) -> None:
    """Remove partial files of ``target``, and restore a checkpoint that was not replaced yet. The lock is held."""
    for state in ("replaced", "removing", "writing"):
        left = temporary_path(target, state)
        with warn_on_failure(left, "cannot remove"):
            if not _is_of_checkpoint(left, target.name):
                continue
            if state == "replaced" and not os.path.lexists(target):
                files.rename(left, target)
            elif state != "replaced" or (target / MANIFEST).exists():
                _remove_files(left, target)


def _is_of_checkpoint(path: Path, tag: str) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    if all(_CHECKPOINT_FILE.match(file.name) for file in path.iterdir()):
        return True
    try:
        return read_manifest(path).tag == tag
    except CheckpointError:
        return False


def _remove(target: Path) -> None:
    """Remove the checkpoint at ``target``, unless another process is replacing it."""
    removing = temporary_path(target, "removing")
    with warn_on_failure(removing, "cannot remove"), holding(target.parent, target.name) as acquired:
        if acquired:
            files.rename(target, removing)
            _remove_files(removing, target)


def _remove_files(left: Path, target: Path) -> None:
    """Remove a checkpoint at ``left``: first move other files back to ``target``; remove the manifest last."""
    others = [file for file in left.iterdir() if not _CHECKPOINT_FILE.match(file.name)]
    if others:
        target.mkdir(exist_ok=True)
    for path in others:
        if not os.path.lexists(target / path.name):
            path.rename(target / path.name)
    if others:
        files.synchronise(target)
        if not (target / MANIFEST).exists():
            logger.warning("%s was removed, except files that are not part of it, such as %s", target, others[0].name)
    for path in sorted(left.iterdir(), key=lambda file: file.name == MANIFEST):
        if _CHECKPOINT_FILE.match(path.name):
            path.unlink()
    left.rmdir()


@contextmanager
def warn_on_failure(path: Path, failure: str) -> Iterator[None]:
    """Convert an error of the file system in the body to a warning that names ``path``."""
    try:
        with files.explain_os_errors(path, failure):
            yield
    except CheckpointError as error:
        logger.warning("%s. The save continues, and the next save retries; if this repeats, fix %s", error, path)
