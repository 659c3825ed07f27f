"""Writing while training goes on: one checkpoint at a time, and what went wrong with it, told at the next occasion."""

import sys
import threading
from dataclasses import replace

import torch.distributed as dist

from lightrft.config import CheckpointError, LightRFTError
from lightrft.strategy.checkpoint.agreement import Agreement
from lightrft.strategy.checkpoint.saving import Saving
from lightrft.strategy.checkpoint.staging import Staging
from lightrft.strategy.distributed.collectives import Collectives
from lightrft.strategy.distributed.operations import Operations, is_lost_peer
from lightrft.strategy.distributed.world import World


class Background:
    """A thread on each rank that writes; they agree over a process group of their own. A process that ends waits for it."""

    def __init__(self, world: World, operations: Operations) -> None:
        """Every rank makes one."""
        control = world.control and dist.new_group(backend="gloo", timeout=world.timeout)
        self._world, self._operations = replace(world, control=control), operations
        self._collectives = Collectives(self._world, operations)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def copied(self, saving: Saving) -> Saving:
        """``saving`` with copies of its values, in memory that the next one uses again."""
        return saving.detached(self._staging)

    def start(self, saving: Saving) -> None:
        """Begin to write ``saving``, whose values are `copied`. `finish` was called before."""
        self._thread = threading.Thread(target=self._run, args=(saving,), name="lightrft-save")
        self._thread.start()

    def _run(self, saving: Saving) -> None:
        try:
            saving.write(Agreement(self._collectives, "save_ckpt", self._world.rank))
        except BaseException as error:  # noqa: BLE001 - raised by `finish`
            error.add_note(f"while {saving.target.path} was written in the background")
            self._failure = error
            # The logger speaks on rank 0 only, and nobody may ever ask.
            reason = f"{saving.target.path} was not saved: {type(error).__name__}: {error}"
            print(f"lightrft: rank {self._world.rank}: {reason}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises `CheckpointError` where it failed, on every rank, once."""
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
