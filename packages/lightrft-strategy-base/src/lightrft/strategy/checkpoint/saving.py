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
from lightrft.strategy.checkpoint.layout import File, Manifest, Piece, Stamp
from lightrft.strategy.checkpoint.staging import Staging
from lightrft.strategy.checkpoint.store import Store
from lightrft.strategy.checkpoint.tag_writer import TOKEN, TagWriter
from lightrft.strategy.distributed.collectives import Collectives
from lightrft.strategy.distributed.world import World
from lightrft.strategy.shards import Shard

PATIENCE = 5.0
"""Seconds in which a shared file system may show another host what one host wrote."""


def ranges_of(held: Sequence[Shard]) -> list[ranges.Range]:
    """The range of each shard."""
    return [(ranges.fingerprint(it.name), it.offset, it.values.numel()) for it in held]


def held_everywhere(held: Sequence[Shard], collectives: Collectives, world: World) -> list[list[ranges.Range]]:
    """What every rank holds, by rank. Every rank calls it."""
    rows = torch.tensor([(world.rank, *it) for it in ranges_of(held)], dtype=torch.int64).view(-1, 4)
    everywhere: list[list[ranges.Range]] = [[] for _ in range(world.size)]
    for holder, entry, offset, numel in collectives.all_gather(rows).tolist():
        everywhere[holder].append((entry, offset, numel))
    return everywhere


def share_of(
    held: Sequence[Shard], everywhere: Sequence[Sequence[ranges.Range]], rank: int
) -> list[tuple[Piece, torch.Tensor]]:
    """What ``rank`` writes of what it holds: each range once over all ranks.

    Raises `CheckpointError` where some elements are on no rank.
    """
    chosen = ranges.owners(everywhere)
    _check_covered(held, chosen)
    return [
        (
            Piece(entry=it.name, dtype=it.values.dtype, shape=tuple(it.shape), offset=it.offset, numel=key[2]),
            it.values.contiguous().view(-1),
        )
        for it, key in zip(held, ranges_of(held), strict=True)
        if chosen[key] == rank
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
    def _writer(self) -> TagWriter:
        return TagWriter(self.target.directory, self.target.tag)

    def write(self, agreement: Agreement) -> Path:
        """Write and publish, or raise on all ranks and leave the store as it was. Every rank calls it."""
        try:
            token = agreement.on_rank_0("beginning", self._begin)
            agreement.everywhere("looking at the directory", lambda: self._check_shared(token))
            written = agreement.everywhere("writing", lambda: self._write(token))
            agreement.on_rank_0("publishing", lambda: self._publish([File(**it) for it in written], token))
        finally:
            self._writer.end()
        return self.target.path

    def _begin(self) -> str:
        token = secrets.token_hex(16)
        self._writer.begin(token, self.state["models"])
        return token

    def _check_shared(self, token: str) -> None:
        """Raise `CheckpointError` unless this rank sees what rank 0 wrote."""
        if not _appears(lambda: (self._writer.folder / TOKEN).read_text(encoding="utf-8") == token):
            raise CheckpointError(
                f"{socket.gethostname()} does not see what rank 0 wrote to {self._writer.folder}; save to a file system "
                f"that all hosts share"
            )

    def _write(self, token: str) -> dict[str, Any]:
        name = layout.file_name(self.rank, self.ranks)
        return vars(
            files.write_tensors(self._writer.folder / name, self.share, self._stamp(token), self.target.checksum)
        )

    def _stamp(self, token: str) -> Stamp:
        return Stamp(tag=self.target.tag, nonce=token)

    def _publish(self, written: Sequence[File], token: str) -> None:
        for rank, file in enumerate(written):
            place = self._writer.folder / file.name
            if not _appears(lambda place=place, file=file: place.stat().st_size == file.nbytes):
                raise CheckpointError(
                    f"rank 0 does not see {file.nbytes} bytes at {place}, which rank {rank} wrote; save to a file system "
                    f"that all hosts share"
                )
        manifest = Manifest(
            stamp=self._stamp(token), sequence=Store(self.target.directory).next_sequence(), latest=self.target.latest,
            checksum=self.target.checksum, files=tuple(written), state=self.state,
        )  # fmt: skip
        self._writer.commit(manifest)
        self._writer.rotate(manifest, self.target.max_num, self.target.max_mem)


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
