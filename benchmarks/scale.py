"""How the work of one rank grows with the number of ranks, from 8 to 100,000 simulated ranks in one process.

``python scale.py``. The messages of other ranks are simulated; what a rank does with them is the layer's own code. Growth is
the exponent k of time ~ ranks^k between the two largest sizes that take long enough; n log n is about 1.1 there. Time on the
network is left out: at 100,000 ranks, a message of 1 KiB from each is 100 MB for every rank.
"""

import base64
import gc
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measure import Goal, Report, parser
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightrft.strategy.checkpoint import format, plan
from lightrft.strategy.checkpoint.checkpoint_reader import fragments
from lightrft.strategy.checkpoint.format import File, Manifest, Piece, Stamp
from lightrft.strategy.checkpoint.load_checkpoint import _check_same, digest_of
from lightrft.strategy.data.loaders import ElasticSampler
from lightrft.strategy.distributed.collectives import Collectives
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.distributed.world import World
from lightrft.strategy.tensors import grouped

SIZES = (8, 100, 1_000, 10_000, 100_000)
TENSORS = 10
"""Tensors of the model; a rank holds a shard of each."""
SHARDS = 4
"""Ranks that share one copy of the parameters."""
ALLOWED = Goal(1.2)
LEAST_SECONDS = 0.001
"""Shorter times are left out of the fit."""

Prepared = Callable[[], object]


def main() -> int:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--largest", type=int, default=SIZES[-1])
    args = arguments.parse_args()
    report = Report(args.output)
    sizes = [size for size in SIZES if size <= args.largest]
    for name, prepare in CASES.items():
        seconds = {ranks: least_seconds(prepare(ranks), args.rounds) for ranks in sizes}
        for ranks, taken in seconds.items():
            report.add(name, f"{ranks:,} ranks", [1000 * taken], unit="ms")
        exponent = growth(seconds)
        if exponent is not None:
            report.add(name, "exponent", [exponent], goal=ALLOWED)
    return 0


def least_seconds(action: Prepared, rounds: int) -> float:
    """The least of a few processor times. As in timeit, the garbage collector is off."""
    taken = []
    for _ in range(rounds):
        gc.collect()
        gc.disable()
        start = time.process_time()
        action()
        taken.append(time.process_time() - start)
        gc.enable()
    return min(taken)


def growth(seconds: dict[int, float]) -> float | None:
    """The exponent between the largest sizes; None if even these take almost no time."""
    large = [(ranks, taken) for ranks, taken in seconds.items() if taken >= LEAST_SECONDS][-2:]
    if len(large) < 2:
        return None
    (few, less), (many, more) = large
    return log(more / less) / log(many / few)


class OtherRanks(RankConsensus):
    """Consensus with simulated ranks that send what this rank sends, with other numbers in their frames."""

    def _gather_bytes(self, text: bytes, size: int) -> list[bytes]:
        before, key, frame = text.ljust(size, b"\0").partition(b'"frame": "')
        return [before + key + (b"%08d" % rank + frame[8:] if key else b"") for rank in range(self._world.size)]


def consensus(ranks: int) -> RankConsensus:
    world: Any = SimpleNamespace(size=ranks, rank=0, cpu_group=None, device_group=None)
    return OtherRanks(world)


# What a rank does


def agree(ranks: int) -> Prepared:
    group = consensus(ranks)
    return lambda: group.agree("save_ckpt", ["checkpoints", "global_step100", {"boundary": True}])


def all_reduce(ranks: int) -> Prepared:
    group = consensus(ranks)
    collectives = Collectives(group._world, group)
    collectives._reduce = lambda buffer_N, op: buffer_N  # type: ignore[method-assign]
    metrics = {f"metric {index}": float(index) for index in range(30)}
    return lambda: collectives.all_reduce(metrics)


def construct_groups(ranks: int) -> Prepared:
    """Make the group of all ranks for messages, one of a few ranks, and the mesh of hybrid sharding, without a network."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    world: Any = SimpleNamespace(timeout=timedelta(minutes=1))

    def construct() -> None:
        dist.new_group(backend="fake")
        World.new_group(world, list(range(SHARDS)))
        init_device_mesh("cpu", (ranks // SHARDS, SHARDS), mesh_dim_names=("replicate", "shard"))

    return construct


def sample(ranks: int) -> Prepared:
    sampler = ElasticSampler(1_000_000, rank=0, ranks=ranks, shuffle=True, seed=0, drop_last=True)
    return lambda: list(sampler)


def assign(ranks: int) -> Prepared:
    """Decode the ranges that all ranks hold, and choose who writes each."""
    texts = [
        base64.b64encode(
            np.array([[tensor, rank * 64, 64] for tensor in range(TENSORS)], dtype="<i8").tobytes()
        ).decode()
        for rank in range(ranks)
    ]
    return lambda: plan.choose_writers([plan._decode_ranges(text) for text in texts])


def manifest_of(ranks: int) -> Manifest:
    files = tuple(File(name=format.file_name(rank, ranks), nbytes=1000, header="0" * 16) for rank in range(ranks))
    facts = {"class": "Model", "lineage": "0", "average": None, "scheduler": None, "training": None}
    state: dict[str, Any] = {"models": {"actor": facts}, "loaders": {}, "client_state": {}}
    return Manifest(
        stamp=Stamp(tag="t", nonce="0"), sequence=1, latest=True, checksum="crc32", files=files, state=state
    )


def write_manifest(ranks: int) -> Prepared:
    manifest = manifest_of(ranks)
    return manifest.to_text


def read_manifest(ranks: int) -> Prepared:
    text = manifest_of(ranks).to_text()
    return lambda: Manifest.from_text(text)


def compare_headers(ranks: int) -> Prepared:
    """Check that all ranks opened the same files."""
    headers = [file.header for file in manifest_of(ranks).files]
    return lambda: _check_same(Path("checkpoint"), [digest_of(headers)] * ranks)


def find_pieces(ranks: int) -> Prepared:
    """Find this rank's shards in a checkpoint that ``ranks`` wrote, on as many ranks plus one."""
    pieces = [
        (rank, Piece(entry=f"tensor {tensor}", dtype=torch.float32, shape=(64 * ranks,), offset=64 * rank, numel=64))
        for rank in range(ranks)
        for tensor in range(TENSORS)
    ]
    length = 64 * ranks // (ranks + 1)
    start = ranks // 2 * length

    def find() -> Sequence[object]:
        index = grouped((piece.entry, (number, piece)) for number, piece in pieces)
        return [list(fragments(index, entry, start, length)) for entry in index]

    return find


def read_headers(ranks: int) -> Prepared:
    """Decode the headers of all files."""
    piece = [
        Piece(entry=f"tensor {tensor}", dtype=torch.float32, shape=(64 * ranks,), offset=0, numel=64, checksum="0" * 16)
        for tensor in range(TENSORS)
    ]
    header = format.encode_header(piece, Stamp(tag="t", nonce="0"))
    return lambda: [format.decode_header(header) for _ in range(ranks)]


CASES: dict[str, Callable[[int], Prepared]] = {
    "construct process groups": construct_groups,
    "agree on arguments": agree,
    "all_reduce, a dict of 30 numbers": all_reduce,
    "order of an epoch": sample,
    "choose writers of a checkpoint": assign,
    "write a manifest": write_manifest,
    "read a manifest": read_manifest,
    "compare opened checkpoints": compare_headers,
    "read all headers": read_headers,
    "find shards in another world's checkpoint": find_pieces,
}


if __name__ == "__main__":
    sys.exit(main())
