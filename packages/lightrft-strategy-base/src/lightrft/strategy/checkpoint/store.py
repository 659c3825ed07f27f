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

from lightrft.config import ArgumentError, CheckpointError, CheckpointNotFoundError
from lightrft.strategy.checkpoint import files, lock
from lightrft.strategy.checkpoint.layout import LATEST, MANIFEST, Manifest
from lightrft.strategy.log import logger

ASIDE = re.compile(rf"^\.(?P<tag>.+)\.(?P<what>writing|replaced|removing|{lock.SUFFIX})$")


def aside(target: Path, what: str) -> Path:
    """Where the checkpoint at ``target`` is while it is "writing", "replaced" or "removing"."""
    return target.with_name(f".{target.name}.{what}")


def check_tag(tag: str) -> None:
    """Raise `ArgumentError` for a tag that is no plain name of a directory."""
    if not isinstance(tag, str) or not tag or tag.startswith(".") or "/" in tag or "\0" in tag or tag == LATEST:
        raise ArgumentError(
            f"tag={tag!r}; wanted the name of a directory: a string without '/', not beginning with '.', other than {LATEST!r}"
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
    """The manifest of the checkpoint at ``path``. Raises `CheckpointError` that names the file where it is damaged."""
    file = path / MANIFEST
    with files.naming(file, "cannot read"):
        data = file.read_bytes()
    try:
        return Manifest.from_text(data.decode("ascii"))
    except (CheckpointError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}; load another tag") from error


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
        """The whole checkpoints, oldest first; what is damaged or none is left out."""
        return sorted(self._committed(), key=lambda it: it.manifest.sequence)

    def _committed(self) -> Iterator[Committed]:
        for tag, path in self._directories():
            if (path / MANIFEST).is_file():
                try:
                    manifest = read_manifest(path)
                except CheckpointError as error:
                    logger.warning("%s; passed over", error)
                else:
                    yield Committed(tag=tag, path=path, manifest=manifest)

    def _directories(self) -> Iterator[tuple[str, Path]]:
        if not self.directory.is_dir():
            return
        for path in sorted(self.directory.iterdir()):
            aside = ASIDE.match(path.name)
            if not aside and not path.name.startswith(".") and path.is_dir():
                yield path.name, path
            elif aside and aside["what"] == "replaced" and not (self.directory / aside["tag"]).exists():
                yield aside["tag"], path

    def find(self, tag: str | None) -> Path:
        """Where checkpoint ``tag`` is, or, with None, the newest one.

        Raises `CheckpointNotFoundError`, which lists those that are there.
        """
        if tag is not None:
            check_tag(tag)
            found = next((path for name, path in self._directories() if name == tag), None)
            if found is not None and (any(found.glob("rank-*.safetensors")) or (found / MANIFEST).exists()):
                return found
        else:
            newest = self._newest()
            if newest is not None:
                return newest
        tags = ", ".join(it.tag for it in self.committed())
        what = "no checkpoint" if tag is None else f"no checkpoint {tag!r}"
        raise CheckpointNotFoundError(f"there is {what} in {self.directory}; {self._hint(tags)}")

    def _newest(self) -> Path | None:
        """The newest one, damaged or not: going back further than was asked for is for people to decide."""
        known = self.committed()
        visible = [it for it in known if it.manifest.latest] or known
        named = self.named_latest()
        if named is not None and (not visible or named not in {it.tag for it in known}):
            return self.directory / named
        return visible[-1].path if visible else None

    def named_latest(self) -> str | None:
        """What the file ``latest`` names, if there is such a directory."""
        try:
            tag = (self.directory / LATEST).read_text(encoding="utf-8").strip()
            check_tag(tag)
        except (OSError, ValueError):
            return None
        return tag if (self.directory / tag).is_dir() else None

    def _hint(self, tags: str) -> str:
        if (self.directory / MANIFEST).exists():
            return f"it is a checkpoint itself: load from {self.directory.parent} with tag={self.directory.name!r}"
        return f"there are: {tags}" if tags else "there are none; was it saved here?"

    def next_sequence(self) -> int:
        """The number of the next checkpoint."""
        return max((it.manifest.sequence for it in self.committed()), default=0) + 1
