"""Removing checkpoints, and what processes left behind that were killed while they saved or removed some.

Only files that belong to a checkpoint are removed: what else is in its directory stays there, under the tag. Nothing is
done through symbolic links, nor to a tag that another process is saving. What cannot be removed is a warning.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint import files
from lightrft.strategy.checkpoint.layout import MANIFEST
from lightrft.strategy.checkpoint.lock import holding
from lightrft.strategy.checkpoint.store import ASIDE, aside, read_manifest
from lightrft.strategy.log import logger

_OURS = re.compile(r"^(manifest\.json|token|rank-\d{5,}-of-\d{5,}\.safetensors)$")


@contextmanager
def warned(path: Path, doing: str) -> Iterator[None]:
    """Turn what goes wrong in the body into a warning that names ``path``."""
    try:
        with files.naming(path, doing):
            yield
    except CheckpointError as error:
        logger.warning(
            "%s; saving went on, and the next save tries this again: if it stays, see to %s yourself", error, path
        )


def clean(directory: Path) -> None:
    """Bring to an end what killed processes left behind in ``directory``."""
    for tag in sorted({found["tag"] for it in directory.iterdir() if (found := ASIDE.match(it.name))}):
        with warned(directory / tag, "cannot clean up after"), holding(directory, tag) as alone:
            if alone:
                settle(directory / tag)


def settle(target: Path) -> None:
    """Remove what is half-written or half-removed of ``target``, and put back what was about to be replaced."""
    for what in ("replaced", "removing", "writing"):
        left = aside(target, what)
        with warned(left, "cannot remove"):
            if not _is_of_a_checkpoint(left, target.name):
                continue
            if what == "replaced" and not os.path.lexists(target):
                files.rename(left, target)
            elif what != "replaced" or (target / MANIFEST).exists():
                _dismiss(left, target)


def _is_of_a_checkpoint(path: Path, tag: str) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    if all(_OURS.match(it.name) for it in path.iterdir()):
        return True
    try:
        return read_manifest(path).tag == tag
    except CheckpointError:
        return False


def remove(target: Path) -> None:
    """Remove the checkpoint at ``target``, unless another process is replacing it."""
    removing = aside(target, "removing")
    with warned(removing, "cannot remove"), holding(target.parent, target.name) as alone:
        if alone:
            files.rename(target, removing)
            _dismiss(removing, target)


def _dismiss(left: Path, target: Path) -> None:
    """Remove the files of a checkpoint, by which it is known to the last, after others' went back to ``target``."""
    others = [it for it in left.iterdir() if not _OURS.match(it.name)]
    if others:
        target.mkdir(exist_ok=True)
    for path in others:
        if not os.path.lexists(target / path.name):
            path.rename(target / path.name)
    if others:
        files.synchronise(target)
        if not (target / MANIFEST).exists():
            logger.warning("%s was removed, but for what is not of the checkpoint, such as %s", target, others[0].name)
    for path in sorted(left.iterdir(), key=lambda it: it.name == MANIFEST):
        if _OURS.match(path.name):
            path.unlink()
    left.rmdir()
