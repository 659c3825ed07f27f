"""A directory of checkpoints: what is in it, and which to load.

What is not finished has a name that begins with a dot; a checkpoint appears under its tag by one rename. So at
any instant a directory is either a whole checkpoint or visibly none:

    .TAG.writing         being written
    .TAG.replaced        was TAG, until a new TAG is there; counts as TAG as long as there is no other
    .TAG.removing        being removed
    .TAG.lightrft-lock   held by the process that is doing one of these

A checkpoint is known by its manifest, which names the tag: a directory that is none, or that somebody renamed,
is never touched.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightrft.config import ArgumentError, ArgumentTypeError, CheckpointError, CheckpointNotFoundError
from lightrft.strategy.checkpoint import files, lock
from lightrft.strategy.checkpoint.layout import LATEST, MANIFEST, Manifest
from lightrft.strategy.log import logger

ASIDE = re.compile(rf"^\.(?P<tag>.+)\.(?P<what>writing|replaced|removing|{lock.SUFFIX})$")


def aside(target: Path, what: str) -> Path:
    """Where the checkpoint at ``target`` is while it is "writing", "replaced" or "removing"."""
    return target.with_name(f".{target.name}.{what}")


def check_tag(tag: object) -> None:
    """Raise `ArgumentTypeError` for a tag that is no string, `ArgumentError` for one that is no plain name."""
    if not isinstance(tag, str):
        raise ArgumentTypeError(f"tag={tag!r} ({type(tag).__name__}); wanted a string, the name of a directory")
    if not tag.isprintable() or tag != tag.strip() or tag.startswith(".") or "/" in tag or tag in ("", LATEST):
        raise ArgumentError(
            f"tag={tag!r}; wanted the name of a directory: printable, without '/', not beginning with '.' or a space, nor "
            f"ending with one, other than {LATEST!r}"
        )


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A checkpoint of a store."""

    tag: str
    path: Path
    manifest: Manifest

    @property
    def is_in_place(self) -> bool:
        """Whether it is where it was saved, and not behind a link or under a name that somebody gave it."""
        return self.path.name == self.manifest.tag and not self.path.is_symlink()


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``. Raises `CheckpointError` that names the file."""
    file = path / MANIFEST
    try:
        return Manifest.from_text(file.read_bytes().decode("ascii"))
    except (CheckpointError, OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot read {file}: {reason}") from error


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is the directory of a checkpoint, be it damaged or unfinished."""
    return path.is_dir() and ((path / MANIFEST).exists() or any(path.glob("rank-*-of-*.safetensors")))


def checkpoints_at(path: Path) -> list[Path]:
    """What of checkpoints is at ``path``, or in it."""
    if is_checkpoint(path):
        return [path]
    return sorted(it for it in path.iterdir() if is_checkpoint(it)) if path.is_dir() else []


class Store:
    """The checkpoints below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # Finding

    def committed(self) -> list[Committed]:
        """The checkpoints whose manifests are whole, oldest first."""
        return sorted(self._look()[0], key=lambda it: it.manifest.sequence)

    def _damaged(self) -> dict[str, CheckpointError]:
        """What is wrong with the manifests of the others, by tag."""
        return self._look()[1]

    def _look(self) -> tuple[list[Committed], dict[str, CheckpointError]]:
        committed, damaged = [], {}
        with files.naming(self.directory, "cannot look into"):
            found = list(self._directories())
        for tag, path in found:
            try:
                committed.append(Committed(tag=tag, path=path, manifest=read_manifest(path)))
            except CheckpointError as error:
                damaged[tag] = error
        return committed, damaged

    def _directories(self) -> Iterator[tuple[str, Path]]:
        if not self.directory.is_dir():
            return
        for path in sorted(self.directory.iterdir()):
            left = ASIDE.match(path.name)
            if not is_checkpoint(path):
                continue
            if not path.name.startswith("."):
                yield path.name, path
            elif left and left["what"] == "replaced" and not is_checkpoint(self.directory / left["tag"]):
                yield left["tag"], path

    def find(self, tag: str | None) -> Path:
        """Where checkpoint ``tag`` is, or, with None, the newest that was saved with ``latest``.

        Raises `CheckpointNotFoundError`, which lists those that are there, and `CheckpointError` where the manifest is
        damaged, also of what may be the newest one: going back further than was asked for is for people to decide.
        """
        return self._newest() if tag is None else self._tagged(tag)

    def _tagged(self, tag: str) -> Path:
        check_tag(tag)
        damaged = self._damaged()
        if tag in damaged:
            raise self._error_of_damage(damaged[tag])
        for it in self.committed():
            if it.tag == tag:
                return it.path
        raise self._error_of_absence(f"no checkpoint {tag!r}")

    def _newest(self) -> Path:
        damaged, named = self._damaged(), self.named_latest()
        if damaged and (named is None or named in damaged):
            raise self._error_of_damage(damaged.get(named or "", next(iter(damaged.values()))))
        for error in damaged.values():
            logger.warning("%s; passed over, for a newer one", error)
        newest = self.newest()
        if newest is None:
            raise self._error_of_absence("no checkpoint that may be loaded without its tag")
        return newest.path

    def newest(self) -> Committed | None:
        """The newest whole checkpoint that was saved with ``latest``."""
        return next((it for it in reversed(self.committed()) if it.manifest.latest), None)

    def named_latest(self) -> str | None:
        """What the file ``latest`` names, if there is such a checkpoint, be it damaged."""
        try:
            tag = (self.directory / LATEST).read_text(encoding="utf-8").strip()
            check_tag(tag)
        except (OSError, ValueError):
            return None
        return tag if is_checkpoint(self.directory / tag) else None

    def _error_of_damage(self, error: CheckpointError) -> CheckpointError:
        tags = self._tags() or "none"
        return CheckpointError(f"{error}; load another tag (those with a whole manifest: {tags})")

    def _error_of_absence(self, what: str) -> CheckpointNotFoundError:
        tags = self._tags()
        hint = f"there are: {tags}" if tags else "there are none; was it saved here?"
        if (self.directory / MANIFEST).exists():
            hint = f"it is a checkpoint itself: load from {self.directory.parent} with tag={self.directory.name!r}"
        return CheckpointNotFoundError(f"there is {what} in {self.directory}; {hint}")

    def _tags(self) -> str:
        return ", ".join(it.tag for it in self.committed())

    def next_sequence(self) -> int:
        """The number of the next checkpoint."""
        return max((it.manifest.sequence for it in self.committed()), default=0) + 1
