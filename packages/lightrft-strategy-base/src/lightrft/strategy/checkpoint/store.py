"""A directory of checkpoints: what is in it, publishing one more, and removing the oldest. One process does this.

What is not finished has a name that begins with a dot; a checkpoint appears under its tag by one rename. So at
any instant a directory is either a whole checkpoint or visibly none:

    .TAG.writing    being written
    .TAG.replaced   was TAG, until a new TAG is there; counts as TAG as long as there is no other
    .TAG.removing   being removed

A checkpoint is known by its manifest, which names the tag: a directory that is none, or that somebody renamed,
is never touched.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightrft.config import ArgumentError, CheckpointError, CheckpointNotFoundError
from lightrft.strategy.checkpoint import files
from lightrft.strategy.checkpoint.layout import LATEST, MANIFEST, Manifest
from lightrft.strategy.log import logger

_ASIDE = re.compile(r"^\.(?P<tag>.+)\.(?P<what>writing|replaced|removing)$")
_OURS = re.compile(r"^(manifest\.json|token|rank-\d{5,}-of-\d{5,}\.safetensors)$")
GB = 10**9


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
            aside = _ASIDE.match(path.name)
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
        named = self._named_latest()
        if named is not None and (not visible or named not in {it.tag for it in known}):
            return self.directory / named
        return visible[-1].path if visible else None

    def _named_latest(self) -> str | None:
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

    # Writing

    def begin(self, tag: str) -> Path:
        """A new directory in which to write checkpoint ``tag``; what a killed process left behind is removed.

        Raises `CheckpointError` where ``tag`` is there, and is not a checkpoint.
        """
        with files.naming(self.directory, "cannot make"):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clean()
            target, aside = self.directory / tag, self._aside(tag, "writing")
            if target.exists():
                self._check_replaceable(target)
            aside.mkdir()
        return aside

    def _aside(self, tag: str, what: str) -> Path:
        return self.directory / f".{tag}.{what}"

    def _check_replaceable(self, target: Path) -> None:
        try:
            read_manifest(target)
        except CheckpointError as error:
            raise CheckpointError(
                f"{target} is there, and is no checkpoint that could be replaced ({error}); use another tag, or remove it"
            ) from error

    def next_sequence(self) -> int:
        """The number of the next checkpoint."""
        return max((it.manifest.sequence for it in self.committed()), default=0) + 1

    def commit(self, written: Path, manifest: Manifest) -> Path:
        """Publish what `begin` gave and all ranks filled. Before this returns, or fails, the old state is the store's."""
        files.write_text(written / MANIFEST, manifest.to_text())
        (written / "token").unlink(missing_ok=True)
        files.synchronise(written)
        target, replaced = self.directory / manifest.tag, self._aside(manifest.tag, "replaced")
        if target.exists():
            files.rename(target, replaced)
        files.rename(written, target)
        self._remove(replaced)
        if manifest.latest:
            files.replace_text(self.directory / LATEST, f"{manifest.tag}\n")
        return target

    def abandon(self, written: Path) -> None:
        """Remove what was not committed."""
        shutil.rmtree(written, ignore_errors=True)

    # Removing

    def rotate(self, max_num: int, max_mem: float) -> None:
        """Remove the oldest checkpoints until there are ``max_num`` and ``max_mem`` GB at most; the newest stays."""
        kept = [it for it in self.committed() if it.manifest.tag == it.path.name]
        protected = {self._named_latest(), *(it.tag for it in kept[-1:])}
        for oldest in [it for it in kept if it.tag not in protected]:
            if len(kept) <= max_num and sum(it.manifest.nbytes for it in kept) <= max_mem * GB:
                return
            removing = self._aside(oldest.tag, "removing")
            files.rename(oldest.path, removing)
            self._remove(removing)
            kept.remove(oldest)

    def _clean(self) -> None:
        """Remove what is half-written or half-removed, and put back what was about to be replaced."""
        for path in list(self.directory.iterdir()):
            aside = _ASIDE.match(path.name)
            if aside is None or not path.is_dir() or not _has_only_ours(path):
                continue
            target = self.directory / aside["tag"]
            if aside["what"] == "replaced" and not target.exists():
                files.rename(path, target)
            else:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        with files.naming(path, "cannot remove"):
            if path.exists():
                shutil.rmtree(path)


def _has_only_ours(path: Path) -> bool:
    return all(_OURS.match(it.name) and it.is_file() for it in path.iterdir())
