"""Checkpoints that are damaged, replaced, or half-written."""

import os
import pickle
import re
import resource
import shutil
import signal
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightrft.conformance.peers.promises.checkpoints import checkpoint_files
from lightrft.conformance.peers.protocol import TrainingLoop
from lightrft.conformance.peers.ranks import Differs, NotJudged, Outcome, Ranks
from lightrft.conformance.peers.registry import promise
from lightrft.conformance.peers.training import (
    SmallModel,
    Weights,
    adamw,
    copied,
    expect_weights,
    micro_batch,
    reference,
    seeded,
    train_one,
)
from lightrft.conformance.peers.worker import Rank
from lightrft.conformance.values import Record

WIDTH = 4096
"""Weights of 100 KiB: most of a checkpoint is weights, not its metadata."""


def wide_model() -> nn.Module:
    """A `SmallModel` with more weights."""
    return seeded(lambda: SmallModel(WIDTH))


def wide_history(updates: int) -> Sequence[Weights]:
    """What the weights should be before and after each update."""
    micro_batches = [[micro_batch(number, 0)] for number in range(updates)]
    history, _ = reference(micro_batches, model=wide_model(), optimizer="adamw")
    return history


def _train_wide(loop: TrainingLoop, model: nn.Module, number: int) -> None:
    """The ``number``-th update, from the same data on all ranks."""
    train_one(loop, model, micro_batch(number, 0))


def save_wide(rank: Rank) -> None:
    """Train once, and save."""
    loop = rank.loop()
    model = loop.prepare(wide_model(), adamw)
    _train_wide(loop, model, 0)
    loop.save(rank.folder / "last", model, {"updates": 1})
    loop.close()


def load_wide(rank: Rank) -> Record:
    """Load, and train once more, which needs the state of the optimizer; the weights and the number of updates."""
    loop = rank.loop()
    model = loop.prepare(wide_model(), adamw)
    with rank.may_refuse():
        updates = loop.load(rank.folder / "last", model)["updates"]
    _train_wide(loop, model, updates)
    weights = copied(loop.weights(model))
    loop.close()
    return {"weights": weights, "updates": updates + 1}


def save_intact(ranks: Ranks) -> None:
    """Save, and see that what was saved can be loaded: otherwise damage to it would show nothing.

    Raises:
        NotJudged: It cannot.
    """
    expected = wide_history(2)[-1]
    ranks.run(save_wide)
    try:
        for rank, loaded in enumerate(ranks.run(load_wide)):
            expect_weights(expected, loaded["weights"], f"rank {rank}, after loading and an update", tolerance=1e-4)
    except Differs as difference:
        raise NotJudged(f"a checkpoint without damage is not resumed: {difference}") from None


@promise("flipped-bit", "A checkpoint with a flipped bit is refused on every rank, or the bit does not matter.")
def flipped_bit(ranks: Ranks) -> None:
    history = wide_history(2)
    save_intact(ranks)
    for damaged in checkpoint_files(ranks.folder / "last")[:2]:
        content = damaged.read_bytes()
        for position in range(len(content) // 2, len(content) // 2 + 4):  # one of them is in the exponent of a number
            changed = bytearray(content)
            changed[position] ^= 1 << 6
            damaged.write_bytes(changed)
            for rank, outcome in enumerate(ranks.attempt(load_wide)):
                if outcome.finished:
                    where = f"rank {rank} loads {damaged.name} with a flipped bit in byte {position}, and trains on"
                    expect_weights(history[-1], outcome.result["weights"], where, tolerance=1e-4)
                elif not outcome.refused:
                    raise Differs(f"rank {rank} {outcome}")
        damaged.write_bytes(content)


@promise("pickles", "Loading a checkpoint runs no code from it, whichever of its files is replaced.")
def pickles(ranks: Ranks) -> None:
    save_intact(ranks)
    folder, intact = ranks.folder / "last", ranks.folder / "intact"
    folder.rename(intact)
    canary = ranks.folder / "ran"
    kinds = {re.sub(r"\d+", "", str(path.relative_to(intact))): path for path in checkpoint_files(intact)}
    for path in kinds.values():
        shutil.copytree(intact, folder)
        _replace(folder / path.relative_to(intact), Trap(canary))
        ranks.attempt(load_wide)
        if canary.exists():
            raise Differs(f"loading ran code from {path.relative_to(intact)}")
        shutil.rmtree(folder)


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.canary), 0o777, True)


def _replace(path: Path, trap: Trap) -> None:
    if zipfile.is_zipfile(path):
        torch.save(trap, path)
    else:
        path.write_bytes(pickle.dumps(trap))


@promise("killed-save", "A process that is killed while it overwrites a checkpoint leaves the old one or the new one.")
def killed_save(ranks: Ranks) -> None:
    history = wide_history(3)
    save_intact(ranks)
    outcomes = ranks.attempt(save_limited, limit=_limit(ranks), by_ranks=list(range(ranks.world)), signalled=True)
    if all(outcome.finished for outcome in outcomes):
        raise NotJudged("the save ended before it was killed")
    for rank, loaded in enumerate(ranks.run(load_wide)):
        if loaded["updates"] not in (2, 3):
            raise Differs(f"rank {rank} loads a checkpoint of {loaded['updates'] - 1} updates; 1 and 2 were saved")
        where = f"rank {rank} loads a checkpoint of {loaded['updates'] - 1} updates, and trains on"
        expect_weights(history[loaded["updates"]], loaded["weights"], where)


def _limit(ranks: Ranks) -> int:
    """Enough for the weights, not for the largest file of the checkpoint: the state of the optimizer, or all in one."""
    return checkpoint_files(ranks.folder / "last")[0].stat().st_size * 3 // 4


@promise(
    "failed-write", "If a write of one rank fails (a full disk, say) while saving, every rank raises.", smallest_world=2
)
def failed_write(ranks: Ranks) -> None:
    save_intact(ranks)
    outcomes = ranks.attempt(save_limited, limit=_limit(ranks), by_ranks=[0], signalled=False)
    if not all(outcome.refused for outcome in outcomes):
        raise Differs("; ".join(f"rank {rank} {_brief(outcome)}" for rank, outcome in enumerate(outcomes)))


def save_limited(rank: Rank, *, limit: int, by_ranks: Sequence[int], signalled: bool) -> None:
    """Load, train once more, and save where no file may get larger than ``limit``.

    Args:
        rank: This rank.
        limit: In bytes.
        by_ranks: The ranks to limit.
        signalled: Whether a write beyond the limit kills the process; otherwise it raises.
    """
    loop = rank.loop()
    model = loop.prepare(wide_model(), adamw)
    loop.load(rank.folder / "last", model)
    _train_wide(loop, model, 1)
    if rank.number in by_ranks:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if signalled else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with rank.may_refuse():
        loop.save(rank.folder / "last", model, {"updates": 2})


def _brief(outcome: Outcome) -> str:
    return str(outcome).splitlines()[0]
