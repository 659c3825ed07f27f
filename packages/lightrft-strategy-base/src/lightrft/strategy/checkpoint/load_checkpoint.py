"""`load_ckpt`, top to bottom: find, open, check and verify everything on all ranks, and only then change anything.

Each rank reads the ranges that it holds, no matter which ranks wrote them, so the number of ranks and the strategy may
differ from those that saved.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.backend.types import Shard, TrainedModel
from lightrft.strategy.checkpoint import compatibility, restore_optimizer
from lightrft.strategy.checkpoint.checkpoint_items import CheckpointItem, RunState, restore_rng_states
from lightrft.strategy.checkpoint.checkpoint_reader import CheckpointReader
from lightrft.strategy.checkpoint.compatibility import LoadOptions
from lightrft.strategy.checkpoint.format import RANKS
from lightrft.strategy.checkpoint.restore_optimizer import Allocation, Numbers, StoredTypes
from lightrft.strategy.checkpoint.store import Store, check_tag
from lightrft.strategy.storage.files import user_path
from lightrft.strategy.storage.safe_json import from_json
from lightrft.strategy.tensors import elements

CALL = "load_ckpt"


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What one item gets of a checkpoint."""

    item: CheckpointItem
    name: str
    """Name of the model in the checkpoint."""
    state: Sequence[Allocation] = ()
    numbers: Numbers | None = None
    """Numbers of the optimizer's state; None: the optimizer is not loaded."""
    scheduler: Mapping[str, Any]
    """State of the scheduler; empty: it is not loaded."""


def load_checkpoint(
    run: RunState, items: Sequence[CheckpointItem], load_dir: str | PathLike[str], tag: str | None, options: LoadOptions
) -> tuple[Path, Any]:
    """Load checkpoint ``tag`` in ``load_dir``, or the newest, into ``items``. All ranks must call this.

    Returns:
        The path of the checkpoint and the client state.
    """
    consensus = run.consensus
    with consensus.together(CALL, "checking arguments"):
        directory = user_path(load_dir, "load_dir")
        if tag is not None:
            check_tag(tag)
    consensus.agree(CALL, [str(directory), tag, repr(options), [item.name for item in items]])
    with consensus.together(CALL, "looking at the models"):
        for item in items:
            item.check_no_pending_gradient()
    path = Path(consensus.on_rank_0(CALL, "finding the checkpoint", lambda: str(Store(directory).find(tag))))
    opened: list[CheckpointReader] = []
    try:
        _check_same(path, consensus.everywhere(CALL, "opening the files", lambda: _open(path, opened)))
        loading = CheckpointLoading(run, items, options, opened[0])
        with consensus.together(CALL, "verifying"):
            plans, client_state = loading.check()
        with consensus.together(CALL, "reading"):
            loading.read(plans)
        for item in items:
            run.backend.sync_from_master(item.module)
        if not options.module_only:
            loading.restore_run(plans)
    except CheckpointError as error:
        error.add_note(f"while {path} was loaded")
        raise
    finally:
        for checkpoint in opened:
            checkpoint.close()
    return path, client_state


def _open(path: Path, opened: list[CheckpointReader]) -> str:
    """Open the checkpoint; return a digest of the checksums of its headers."""
    if not path.is_dir():
        raise CheckpointError(
            f"expected a directory at {path}, as on rank 0, found none. Load from a file system that all hosts share"
        )
    opened.append(CheckpointReader(path))
    return digest_of([file.header for file in opened[0].manifest.files])


def digest_of(headers: Sequence[str]) -> str:
    """Return a digest of a checkpoint's headers: as many ranks as there are files exchange it."""
    return sha256("\n".join(headers).encode()).hexdigest()


def _check_same(path: Path, digests: Sequence[str]) -> None:
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise CheckpointError(
            f"{CALL}: expected all ranks to see the same checkpoint at {path}, got another one on rank {differing[0]}. Load "
            f"from a file system that all hosts share"
        )


class CheckpointLoading:
    """One call of `load_ckpt`, on an open checkpoint."""

    def __init__(
        self, run: RunState, items: Sequence[CheckpointItem], options: LoadOptions, checkpoint: CheckpointReader
    ) -> None:
        self._run, self._backend, self._checkpoint = run, run.backend, checkpoint
        self._items, self._options = items, options

    # Before anything changes

    def check(self) -> tuple[list[LoadPlan], Any]:
        """Verify the checksums while comparing everything; return what to load, and the client state."""
        checkpoint = self._checkpoint
        names = compatibility.names_in(checkpoint, self._items)
        with checkpoint.verifying(self._verified_here(set(names.values()))):
            plans = [self._plan(item, names[item.name]) for item in self._items]
            if not self._options.module_only:
                self._run.loaders.check(checkpoint.state["loaders"])
            return plans, from_json(checkpoint.state["client_state"])

    def _plan(self, item: CheckpointItem, name: str) -> LoadPlan:
        checkpoint = self._checkpoint
        self._backend.reshard(item.module)
        compatibility.check(self._backend, checkpoint, item, name, self._options)
        scheduler = compatibility.scheduler_state(checkpoint, item, name) if self._options.scheduler else {}
        if item.trained is None or not self._options.optimizer:
            return LoadPlan(item=item, name=name, scheduler=scheduler)
        prefix, slices = f"{name}/optimizer/", self._backend.state_slices(item.trained)
        state = restore_optimizer.plan(item.trained.optimizer, slices, checkpoint.shapes(prefix))
        numbers = compatibility.stored_numbers(checkpoint, item.trained, name, state)
        return LoadPlan(item=item, name=name, state=state, numbers=numbers, scheduler=scheduler)

    def _verified_here(self, names: set[str]) -> Callable[[int, int], bool]:
        """Return which pieces this rank verifies: of those that are loaded, each is verified on one rank.

        A rank verifies its own file if the same number of ranks saved, and every n-th piece otherwise.
        """
        rank, ranks = self._backend.world.rank, self._backend.world.size
        loaded = {
            number
            for number, (_, piece) in enumerate(self._checkpoint.pieces)
            if self._is_loaded(piece.entry.split("/"), names)
        }
        by_file = self._checkpoint.manifest.ranks == ranks
        return lambda file, number: number in loaded and (file if by_file else number) % ranks == rank

    def _is_loaded(self, parts: list[str], names: set[str]) -> bool:
        if parts[0] == RANKS:
            return True
        return parts[0] in names and (parts[1] != "optimizer" or self._options.optimizer)

    # Changing

    def read(self, plans: Sequence[LoadPlan]) -> None:
        """Read the tensors of ``plans`` into the models and their optimizers."""
        shards: list[Shard] = []
        for plan in plans:
            shards += self._parameters(plan)
            shards += self._buffers(plan)
            if plan.item.trained is not None and plan.numbers is not None:
                shards += self._optimizer(plan, plan.item.trained, plan.numbers)
        self._checkpoint.read((shard.name, shard.offset, shard.values) for shard in shards)
        for plan in plans:
            if plan.item.trained is not None and plan.numbers is not None:
                self._backend.resume_optimizer(plan.item.trained)
                if plan.item.trained.optimizer_offloaded:
                    self._backend.move_optimizer(plan.item.trained, torch.device("cpu"))

    def _parameters(self, plan: LoadPlan) -> list[Shard]:
        prefix = f"{plan.name}/parameters/"
        saved = self._checkpoint.shapes(prefix)
        shards = self._backend.shards(plan.item.module)
        return [shard.renamed(prefix + shard.name) for shard in shards if shard.name in saved]

    def _buffers(self, plan: LoadPlan) -> list[Shard]:
        prefixes = f"{self._rank_entries}buffers/{plan.name}/", f"{plan.name}/buffers/"
        shards = []
        for name, tensor in plan.item.buffers().items():
            entry = next((prefix + name for prefix in prefixes if prefix + name in self._checkpoint.index), None)
            if entry is not None:
                shards.append(Shard(name=entry, shape=tensor.shape, offset=0, values=elements(tensor)))
        return shards

    @property
    def _rank_entries(self) -> str:
        """The entries of the saved rank that this rank restores: r modulo the number of ranks that saved."""
        return f"{RANKS}/{self._backend.world.rank % self._checkpoint.manifest.ranks}/"

    def _optimizer(self, plan: LoadPlan, trained: TrainedModel, numbers: Numbers) -> list[Shard]:
        checkpoint, prefix = self._checkpoint, f"{plan.name}/optimizer/"
        saved = checkpoint.shapes(prefix)
        types = StoredTypes(states=checkpoint.dtypes(prefix), parameters=checkpoint.dtypes(f"{plan.name}/parameters/"))
        shards = [
            shard.renamed(prefix + shard.name)
            for allocation in plan.state
            for shard in restore_optimizer.allocate(trained.optimizer, allocation, saved, types, numbers)
        ]
        groups = checkpoint.state["models"][plan.name]["training"]["groups"]
        restore_optimizer.restore_groups(trained, groups, numbers.same_optimizer)
        return shards

    def restore_run(self, plans: Sequence[LoadPlan]) -> None:
        """Restore everything except tensors: counters, schedulers, loaders, random number generators."""
        run, checkpoint = self._run, self._checkpoint
        for plan in plans:
            item, facts = plan.item, checkpoint.state["models"][plan.name]
            run.lineages[item.module] = facts["lineage"]
            if item.trained is None:
                run.averages.restore(item.module, facts["average"])
            if plan.scheduler:
                item.scheduler.load_state_dict(plan.scheduler)
            if item.trained is not None and facts["training"] is not None:
                item.trained.load_state_dict(facts["training"])
        run.loaders.restore(checkpoint.state["loaders"])
        prefix = f"{self._rank_entries}random/"
        states = {name: checkpoint.tensor(prefix + name) for name in checkpoint.shapes(prefix)}
        restore_rng_states(states, self._backend.world.device)
