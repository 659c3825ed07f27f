"""Writing while training goes on: one checkpoint at a time, and what went wrong with it, told at the next occasion."""

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
    """A thread on each rank that writes; they agree over a process group of their own."""

    def __init__(self, world: World, operations: Operations) -> None:
        """Every rank makes one."""
        control = world.control and dist.new_group(backend="gloo", timeout=world.timeout)
        self._world, self._operations = replace(world, control=control), operations
        self._collectives = Collectives(self._world, operations)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, saving: Saving) -> None:
        """Copy what ``saving`` holds, and begin to write the copies. `finish` was called before."""
        copied = saving.detached(self._staging)
        self._thread = threading.Thread(target=self._run, args=(copied,), name="lightrft-save")
        self._thread.start()

    def _run(self, saving: Saving) -> None:
        try:
            saving.write(Agreement(self._collectives, "save_ckpt", self._world.rank))
        except BaseException as error:  # noqa: BLE001 - raised by `finish`
            error.add_note(f"while {saving.target.path} was written in the background")
            self._failure = error

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
