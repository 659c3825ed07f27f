"""`save_ckpt`, top to bottom: check, plan, write, commit.

Every rank writes its share to a hidden directory; when all files are on disk, rank 0 adds the manifest and renames the
directory to its tag. With ``async_ckpt`` the write and the commit run in `background`, from copies of the tensors.
"""

import os
import secrets
import socket
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightrft.config import ArgumentTypeError, CheckpointError, ConfigError, StrategyError
from lightrft.config.validation import shown
from lightrft.strategy.checkpoint import format, plan
from lightrft.strategy.checkpoint.background import BackgroundWriter
from lightrft.strategy.checkpoint.checkpoint_items import CheckpointItem, RunState
from lightrft.strategy.checkpoint.format import MANIFEST, File, Manifest, Piece, Stamp
from lightrft.strategy.checkpoint.plan import CALL
from lightrft.strategy.checkpoint.store import (
    LOCK_TIMEOUT,
    TOKEN,
    Store,
    check_tag,
    read_manifest,
    recover,
    temporary_path,
    warn_on_failure,
)
from lightrft.strategy.distributed.operations import Operations
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.storage import files
from lightrft.strategy.storage.files import ChecksumKind
from lightrft.strategy.storage.locks import Lock
from lightrft.strategy.storage.safe_json import dumps, to_json

VISIBILITY_TIMEOUT = 5.0
"""Seconds within which other hosts must see what one host wrote to a shared file system."""


@dataclass(frozen=True, kw_only=True)
class SaveTarget:
    """Where to save a checkpoint, and which older ones to keep."""

    directory: Path
    tag: str
    latest: bool
    max_num: int
    max_mem: float
    """GB."""
    keep: Sequence[str] = ()
    """Tags that are neither removed nor counted."""
    first: bool = False
    """Whether the strategy has not saved to `directory` before."""
    checksum: ChecksumKind = "crc32"

    @property
    def path(self) -> Path:
        """The directory of the checkpoint."""
        return self.directory / self.tag

    def check(self) -> None:
        """Raise `ArgumentTypeError`, `ArgumentError` or `ConfigError` for an invalid tag or limit."""
        check_tag(self.tag)
        for tag in self.keep:
            check_tag(tag, "a tag in keep")
        for name, value, types in (("max_num", self.max_num, (int,)), ("max_mem", self.max_mem, (int, float))):
            if isinstance(value, bool) or not isinstance(value, types):
                expected = " or ".join(cls.__name__ for cls in types)
                raise ArgumentTypeError(f"expected {name} to be {expected}, got {shown(value)}. Pass a number")
        if self.max_num < 1:
            raise ConfigError(f"expected max_num to be at least 1, got {self.max_num}. Pass 1 to keep only the newest")
        if not self.max_mem > 0:
            raise ConfigError(f"expected max_mem to be above 0 GB, got {self.max_mem}. Pass float('inf') for no limit")


class CheckpointSaver:
    """Saves the checkpoints of one strategy. All ranks make the same calls."""

    def __init__(self, run: RunState, operations: Operations) -> None:
        self._run, world = run, run.backend.world
        self._background = BackgroundWriter(world, operations) if run.backend.config.async_ckpt else None
        self._saved: dict[Path, list[weakref.ref[nn.Module]]] = {}

    def save(
        self, items: Sequence[CheckpointItem], save_dir: str | PathLike[str], tag: str | None, max_num: int, max_mem: float,
        client_state: object, latest: bool, keep: Collection[str] = (),
    ) -> Path:  # fmt: skip
        """Save ``items``, in the background if the settings say so; return the path of the checkpoint."""
        self.finish()
        consensus, world = self._run.consensus, self._run.backend.world
        updates = next((item.trained.updates for item in items if item.trained is not None), 0)
        with consensus.together(CALL, "checking arguments"):
            directory = files.user_path(save_dir, "save_dir")
            target = SaveTarget(
                directory=directory, tag=f"global_step{updates}" if tag is None else tag, latest=latest, max_num=max_num,
                max_mem=max_mem, keep=_listed_tags(keep), first=all(path.parent != directory for path in self._saved),
                checksum=self._run.backend.config.ckpt_checksum,
            )  # fmt: skip
            target.check()
        consensus.agree(CALL, [str(target.path), latest, max_num, max_mem, target.keep, [item.name for item in items]])
        with consensus.together(CALL, "describing the models"):
            self._check_models(items, target.path)
            state = plan.describe(self._run, items)
            for item in items:
                state["models"][item.name]["lineage"] = self._run.lineages.setdefault(item.module, secrets.token_hex(8))
            state["client_state"] = to_json({} if client_state is None else client_state, f"{CALL}: client_state")
            dumps(state)  # raises for values that are not JSON
        share = plan.assign(self._run, items)
        write = CheckpointWrite(target=target, rank=world.rank, ranks=world.size, share=share, state=state)
        if self._background is None:
            write.run(consensus)
        else:
            with consensus.together(CALL, "copying tensors"):
                copies = self._background.staging.copies([values for _, values in share])
            copied = replace(write, share=[(piece, tensor) for (piece, _), tensor in zip(share, copies, strict=True)])
            self._background.start(target.path, copied.run)
        self._saved[target.path] = [weakref.ref(item.module) for item in items]
        return target.path

    def _check_models(self, items: Sequence[CheckpointItem], path: Path) -> None:
        """Raise `StrategyError` if gradients are pending, or if this run saved other models under the same tag."""
        for item in items:
            item.check_no_pending_gradient()
        saved = [reference() for reference in self._saved.get(path, [])]
        if saved and None not in saved and saved != [item.module for item in items]:
            raise StrategyError(
                f"expected a tag that this run has not used for other models, got {path}, which holds "
                f"{', '.join(type(model).__name__ for model in saved)} and would be replaced. Save models together, as "
                f"save_ckpt({{'actor': actor, 'critic': critic}}, ...), or in different directories"
            )

    def finish(self) -> None:
        """Wait for the checkpoint that is written in the background. Raise on every rank if that failed."""
        if self._background is not None:
            self._background.finish()

    def release_group(self) -> None:
        """Drop the reference to the background writer's process group; `finish` was called before."""
        self._background = None


@dataclass(frozen=True, kw_only=True)
class CheckpointWrite:
    """One checkpoint to be written, independent of the strategy."""

    target: SaveTarget
    rank: int
    ranks: int
    share: Sequence[tuple[Piece, torch.Tensor]]
    """What this rank writes."""
    state: dict[str, Any]
    """JSON values; those of rank 0 are written."""

    @cached_property
    def _tag_writer(self) -> "TagWriter":
        return TagWriter(self.target.directory, self.target.tag)

    def run(self, consensus: RankConsensus) -> None:
        """Write and commit, or raise on all ranks and leave the store unchanged. All ranks must call this."""
        try:
            token = consensus.on_rank_0(CALL, "making the directory", self._begin)
            consensus.everywhere(CALL, "looking for the directory", lambda: self._check_shared(token))
            written = consensus.everywhere(CALL, "writing", lambda: self._write(token))
            consensus.on_rank_0(CALL, "committing", lambda: self._commit([File(**fields) for fields in written], token))
        finally:
            self._tag_writer.end()

    def _begin(self) -> str:
        token = secrets.token_hex(16)
        self._tag_writer.begin(token, self.state["models"])
        return token

    def _check_shared(self, token: str) -> None:
        folder = self._tag_writer.folder
        if not _becomes_true(lambda: (folder / TOKEN).read_text(encoding="utf-8") == token):
            raise CheckpointError(
                f"expected host {socket.gethostname()} to see what rank 0 wrote to {folder}, got nothing. Save to a file "
                f"system that all hosts share"
            )

    def _write(self, token: str) -> dict[str, Any]:
        path = self._tag_writer.folder / format.file_name(self.rank, self.ranks)
        stamp = Stamp(tag=self.target.tag, nonce=token)
        return vars(format.write_tensors(path, self.share, stamp, self.target.checksum))

    def _commit(self, written: Sequence[File], token: str) -> None:
        for rank, file in enumerate(written):
            path = self._tag_writer.folder / file.name
            if not _becomes_true(lambda path=path, file=file: path.stat().st_size == file.nbytes):  # type: ignore[misc]
                raise CheckpointError(
                    f"expected rank 0 to see {file.nbytes} bytes at {path}, which rank {rank} wrote, got fewer. Save to a file "
                    f"system that all hosts share"
                )
        store = Store(self.target.directory)
        manifest = Manifest(
            stamp=Stamp(tag=self.target.tag, nonce=token), sequence=store.next_sequence(), latest=self.target.latest,
            checksum=self.target.checksum, files=tuple(written), state=self.state,
        )  # fmt: skip
        self._tag_writer.commit(manifest)
        store.update_latest(manifest)
        store.rotate(manifest, self.target.max_num, self.target.max_mem, self.target.keep)
        if self.target.first:
            store.warn_of_other_runs(manifest)


def _listed_tags(keep: object) -> list[str]:
    """Return ``keep``, tags of checkpoints, as a list."""
    if isinstance(keep, str) or not isinstance(keep, Collection):
        raise ArgumentTypeError(
            f"expected keep to be a list of tags, got {shown(keep)}. Pass keep=['best'], for example"
        )
    return list(keep)


def _becomes_true(condition: Callable[[], bool]) -> bool:
    """Wait until ``condition()`` is true, up to `VISIBILITY_TIMEOUT`; an `OSError` counts as false."""
    deadline = time.monotonic() + VISIBILITY_TIMEOUT
    while True:
        try:
            if condition():
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


class TagWriter:
    """The directory of one checkpoint, on rank 0: `begin`, `commit` and, in any case, `end`."""

    def __init__(self, directory: Path, tag: str) -> None:
        self._lock = Lock(directory, tag)
        self.target = directory / tag
        self.folder = temporary_path(self.target, "writing")

    def begin(self, token: str, models: Mapping[str, Mapping[str, Any]]) -> None:
        """Create `folder`, to which all ranks write, and remove unfinished saves of killed processes.

        Raises:
            CheckpointError: Another process is saving the tag, or the tag exists and is not a checkpoint of such ``models``.
        """
        directory = self.target.parent
        with files.explain_os_errors(directory, "cannot save to"):
            files.make_directory(directory)
            if not self._lock.acquire(LOCK_TIMEOUT):
                raise CheckpointError(
                    f"expected {self.target} to have one writer, got another process that is saving it and holds "
                    f"{self._lock.path}. Use a directory for each run, or wait until that process has ended"
                )
            recover(self.target)
            Store(directory).clean()
            self._check_replaceable(models)
            self.folder.mkdir()
        files.write_text(self.folder / TOKEN, token)

    def _check_replaceable(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        if not os.path.lexists(self.target):
            return
        try:
            if self.target.is_symlink():
                raise CheckpointError("it is a symbolic link")
            saved, new = (_listed(described) for described in (read_manifest(self.target).state["models"], models))
            if saved != new:
                raise CheckpointError(f"it is a checkpoint of other models: {saved} instead of {new}")
        except CheckpointError as error:
            raise CheckpointError(
                f"expected {self.target} to be new, or a checkpoint of these models that can be replaced: {error}. Use "
                f"another tag or directory, or remove it"
            ) from error

    def commit(self, manifest: Manifest) -> None:
        """Publish `folder`, which all ranks filled. If this raises, the store is unchanged."""
        files.write_text(self.folder / MANIFEST, manifest.to_text())
        with files.explain_os_errors(self.folder, "cannot write"):
            (self.folder / TOKEN).unlink(missing_ok=True)
            files.synchronise(self.folder)
        if self.target.exists():
            files.rename(self.target, temporary_path(self.target, "replaced"))
        files.rename(self.folder, self.target)

    def end(self) -> None:
        """Remove what was not committed or was replaced, and release the tag."""
        if self._lock.held:
            recover(self.target)
            with warn_on_failure(self._lock.path, "cannot remove"):
                self._lock.release()


def _listed(models: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name!r} ({facts['class']})" for name, facts in sorted(models.items()))
