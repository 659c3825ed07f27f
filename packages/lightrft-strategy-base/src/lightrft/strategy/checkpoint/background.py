"""Writing a checkpoint while training continues: copies of the tensors, and a thread on each rank.

One checkpoint is written at a time. A failure is printed when it occurs, and raised by the next save, load or `close`.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist

from lightrft.config import CheckpointError, LightRFTError
from lightrft.strategy.distributed.operations import Operations, is_lost_peer
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.distributed.world import World

_ALIGNMENT = 64
"""Bytes to which each copy is aligned."""


class Staging:
    """Host memory for copies, reused by the next save: allocating it takes longer than copying."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copies(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies of ``tensors``, 1-D on any device, which replace the copies made before."""
        *begins, end = accumulate((-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors), initial=0)
        if self._memory.nbytes < end:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old memory first
            self._memory = torch.empty(end, dtype=torch.uint8)
        parts = (self._memory[begin : begin + tensor.nbytes] for begin, tensor in zip(begins, tensors, strict=True))
        return [part.view(tensor.dtype).copy_(tensor) for part, tensor in zip(parts, tensors, strict=True)]


class BackgroundWriter:
    """A writing thread on each rank, with its own process group. The process waits for it before it exits."""

    def __init__(self, world: World, operations: Operations) -> None:
        """Make the process group. All ranks must call this."""
        cpu_group = world.cpu_group and dist.new_group(backend="gloo", timeout=world.timeout)
        self._world, self._operations = replace(world, cpu_group=cpu_group), operations
        self._consensus = RankConsensus(self._world)
        self.staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, path: Path, write: Callable[[RankConsensus], None]) -> None:
        """Begin to ``write`` the checkpoint at ``path``, from tensors that do not change. `finish` was called before."""
        self._thread = threading.Thread(target=self._run, args=(path, write), name="lightrft-save")
        self._thread.start()

    def _run(self, path: Path, write: Callable[[RankConsensus], None]) -> None:
        try:
            write(self._consensus)
        except BaseException as error:  # noqa: BLE001 - raised by `finish`
            error.add_note(f"while {path} was written in the background")
            self._failure = error
            # Not the logger, which is silent on ranks other than 0. Print now, because `finish` may never be called.
            reason = f"{path} was not saved: {type(error).__name__}: {error}"
            print(f"lightrft: rank {self._world.rank}: {reason}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raise `CheckpointError` on every rank, once, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if is_lost_peer(failure):
            raise CheckpointError(self._operations.lost_peer("save_ckpt, in the background")) from failure
        if isinstance(failure, LightRFTError):
            raise failure
        raise CheckpointError(f"save_ckpt, in the background: {type(failure).__name__}: {failure}") from failure
