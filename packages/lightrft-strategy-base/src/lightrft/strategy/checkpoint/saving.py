"""Writing one checkpoint: every rank its share, rank 0 the manifest; published when all is on disk."""

import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint import checksums, files, layout, ranges
from lightrft.strategy.checkpoint.agreement import Agreement
from lightrft.strategy.checkpoint.layout import File, Manifest, Piece
from lightrft.strategy.checkpoint.staging import Staging
from lightrft.strategy.checkpoint.store import Store
from lightrft.strategy.distributed.collectives import Collectives
from lightrft.strategy.distributed.world import World
from lightrft.strategy.log import logger
from lightrft.strategy.shards import Shard

TOKEN = "token"
PATIENCE = 5.0
"""Seconds in which a shared file system may show another host what one host wrote."""


def share_of(held: Sequence[Shard], collectives: Collectives, world: World) -> list[tuple[Piece, torch.Tensor]]:
    """What this rank writes of what it holds: each range once over all ranks. Every rank calls it.

    Raises `CheckpointError` where some elements are on no rank.
    """
    own = [(ranges.fingerprint(it.name), it.offset, it.values.numel()) for it in held]
    rows = torch.tensor([(world.rank, *it) for it in own], dtype=torch.int64).view(-1, 4)
    everywhere: list[list[ranges.Range]] = [[] for _ in range(world.size)]
    for holder, entry, offset, numel in collectives.all_gather(rows).tolist():
        everywhere[holder].append((entry, offset, numel))
    chosen = ranges.owners(everywhere)
    _check_covered(held, chosen)
    return [
        (Piece(entry=it.name, dtype=it.values.dtype, shape=tuple(it.shape), offset=it.offset, numel=key[2]), it.values)
        for it, key in zip(held, own, strict=True)
        if chosen[key] == world.rank
    ]


def _check_covered(held: Sequence[Shard], chosen: dict[ranges.Range, int]) -> None:
    parts: dict[int, list[tuple[int, int]]] = {}
    for entry, offset, numel in chosen:
        parts.setdefault(entry, []).append((offset, numel))
    for shard in held:
        ranges.check_covered(shard.name, shard.shape.numel(), parts[ranges.fingerprint(shard.name)])


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a checkpoint goes, and what stays beside it."""

    directory: Path
    tag: str
    latest: bool
    max_num: int
    max_mem: float
    """GB."""
    checksum: checksums.Kind = "crc32"

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.directory / self.tag


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A checkpoint to be written: it needs nothing of the strategy any more."""

    target: Target
    rank: int
    ranks: int
    share: Sequence[tuple[Piece, torch.Tensor]]
    """What this rank writes."""
    state: dict[str, Any]
    """JSON values; rank 0's are written."""

    def detached(self, staging: Staging) -> "Saving":
        """The same, with copies of the values, in ``staging``: training may go on."""
        copies = staging.copies([values for _, values in self.share])
        return replace(self, share=[(piece, it) for (piece, _), it in zip(self.share, copies, strict=True)])

    @cached_property
    def _store(self) -> Store:
        return Store(self.target.directory)

    @property
    def _aside(self) -> Path:
        return self.target.directory / f".{self.target.tag}.writing"

    def write(self, agreement: Agreement) -> Path:
        """Write and publish, or raise on all ranks and leave the store as it was. Every rank calls it."""
        token = agreement.on_rank_0("beginning", self._begin)
        try:
            agreement.everywhere("looking at the directory", lambda: self._check_shared(token))
            written = agreement.everywhere("writing", self._write)
            agreement.on_rank_0("publishing", lambda: self._publish([File(**it) for it in written]))
        except BaseException:
            if self.rank == 0:
                self._store.abandon(self._aside)
            raise
        return self.target.path

    def _begin(self) -> str:
        self._store.begin(self.target.tag)
        token = secrets.token_hex(16)
        files.write_text(self._aside / TOKEN, token)
        return token

    def _check_shared(self, token: str) -> None:
        """Raise `CheckpointError` unless this rank sees what rank 0 wrote."""
        if not _appears(lambda: (self._aside / TOKEN).read_text(encoding="utf-8") == token):
            raise CheckpointError(
                f"{socket.gethostname()} does not see what rank 0 wrote to {self.target.directory}; save to a file system "
                f"that all hosts share"
            )

    def _write(self) -> dict[str, Any]:
        name = layout.file_name(self.rank, self.ranks)
        return vars(files.write_tensors(self._aside / name, self.share, self.target.checksum))

    def _publish(self, written: Sequence[File]) -> None:
        for rank, file in enumerate(written):
            place = self._aside / file.name
            if not _appears(lambda place=place, file=file: place.stat().st_size == file.nbytes):
                raise CheckpointError(
                    f"rank 0 does not see {file.nbytes} bytes at {place}, which rank {rank} wrote; save to a file system "
                    f"that all hosts share"
                )
        manifest = Manifest(
            tag=self.target.tag, sequence=self._store.next_sequence(), latest=self.target.latest,
            checksum=self.target.checksum, files=tuple(written), state=self.state,
        )  # fmt: skip
        self._store.commit(self._aside, manifest)
        try:
            self._store.rotate(self.target.max_num, self.target.max_mem)
        except CheckpointError as error:
            logger.warning("save_ckpt: %s is saved, and an older checkpoint could not go: %s", self.target.path, error)


def _appears(seen: Any) -> bool:
    """Whether ``seen()`` becomes true within the patience; a file that is not there is not seen."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if seen():
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        os.sched_yield()
        time.sleep(0.05)
