"""Loading one checkpoint: everything is compared and verified, on all ranks, before anything changes.

Each rank reads the ranges that it holds, whatever ranks wrote them; so the number of ranks and the strategy
may be others than those that saved.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightrft.config import CheckpointError
from lightrft.strategy import flat
from lightrft.strategy.backend import Backend
from lightrft.strategy.checkpoint import fit, optimizer_state, streams
from lightrft.strategy.checkpoint.agreement import Agreement
from lightrft.strategy.checkpoint.fit import Options
from lightrft.strategy.checkpoint.loaders import Loaders
from lightrft.strategy.checkpoint.optimizer_state import Allocation, Numbers, Types
from lightrft.strategy.checkpoint.plain_values import from_json
from lightrft.strategy.checkpoint.reading import Checkpoint
from lightrft.strategy.checkpoint.store import Store
from lightrft.strategy.checkpoint.subjects import RANKS, Subject
from lightrft.strategy.shards import Shard
from lightrft.strategy.training.moving_average import MovingAverages
from lightrft.strategy.training.trained_model import TrainedModel


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What loading gives back."""

    path: Path
    client_state: Any
    lineages: dict[str, str]
    """By the subjects' names."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What of a checkpoint one subject gets."""

    subject: Subject
    name: str
    """The model's name in the checkpoint."""
    state: Sequence[Allocation] = ()
    numbers: Numbers | None = None
    """Those of the optimizer's state; None: the optimizer stays as it is."""
    schedule: Mapping[str, Any]
    """The schedule's state; empty: it stays as it is."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What is known once all is verified, and before anything changes."""

    plans: Sequence[Plan]
    client_state: Any


class Loading:
    """One `load_ckpt`."""

    def __init__(
        self, backend: Backend, agreement: Agreement, averages: MovingAverages, loaders: Loaders,
        subjects: Sequence[Subject], options: Options,
    ) -> None:  # fmt: skip
        self._backend, self._agreement = backend, agreement
        self._averages, self._loaders = averages, loaders
        self._subjects, self._options = subjects, options

    def run(self, directory: Path, tag: str | None) -> Loaded:
        """Load checkpoint ``tag``, or the newest. Every rank calls it."""
        path = Path(self._agreement.on_rank_0("finding", lambda: str(Store(directory).find(tag))))
        opened: list[Checkpoint] = []
        try:
            found = self._agreement.everywhere("opening", lambda: self._open(path, opened))
            self._check_same(path, found)
            client_state = self._load(opened[0])
        except CheckpointError as error:
            error.add_note(f"while {path} was loaded")
            raise
        finally:
            for checkpoint in opened:
                checkpoint.close()
        names, lineages = fit.names_in(opened[0], self._subjects), opened[0].manifest.lineages
        return Loaded(
            path=path, client_state=client_state,
            lineages={own: lineages[its] for own, its in names.items()},
        )  # fmt: skip

    def _open(self, path: Path, opened: list[Checkpoint]) -> Any:
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is not there, and rank 0 sees it; load from a file system that all hosts share"
            )
        opened.append(Checkpoint(path))
        return [file.header for file in opened[0].manifest.files]

    def _check_same(self, path: Path, found: Sequence[Any]) -> None:
        strange = [rank for rank, headers in enumerate(found) if headers != found[0]]
        if strange:
            raise CheckpointError(
                f"at {path} rank {strange[0]} sees another checkpoint than rank 0; load from a file system that all hosts share"
            )

    def _load(self, checkpoint: Checkpoint) -> Any:
        """Load it; returns the client state."""
        checked = self._agreement.here("checking", lambda: self._check(checkpoint))
        self._agreement.everywhere("reading", lambda: self._read(checkpoint, checked.plans))
        for subject in self._subjects:
            self._backend._refresh(subject.module)
        if not self._options.module_only:
            self._go_on(checkpoint, checked.plans)
        return checked.client_state

    # Before anything changes

    def _check(self, checkpoint: Checkpoint) -> Checked:
        """Verify everything, and find that it fits."""
        names = fit.names_in(checkpoint, self._subjects)
        with checkpoint.verifying(self._mine(checkpoint, set(names.values()))):
            plans = [self._plan(checkpoint, subject, names[subject.name]) for subject in self._subjects]
            if not self._options.module_only:
                self._loaders.check(checkpoint.state["loaders"])
            client_state = from_json(checkpoint.state["client_state"])
        return Checked(plans=plans, client_state=client_state)

    def _plan(self, checkpoint: Checkpoint, subject: Subject, name: str) -> Plan:
        self._backend._settle(subject.module)
        fit.check(self._backend, checkpoint, subject, name, self._options)
        schedule = fit.schedule(checkpoint, subject, name) if self._options.scheduler else {}
        if subject.trained is None or not self._options.optimizer:
            return Plan(subject=subject, name=name, schedule=schedule)
        prefix, slices = f"{name}/optimizer/", self._backend._state_slices(subject.trained)
        state = optimizer_state.plan(subject.trained.optimizer, slices, checkpoint.names(prefix))
        numbers = fit.numbers(checkpoint, subject.trained, name, state)
        return Plan(subject=subject, name=name, state=state, numbers=numbers, schedule=schedule)

    def _mine(self, checkpoint: Checkpoint, names: set[str]) -> Callable[[int, int], bool]:
        """Of what will be read each piece is verified on some rank: files by their own, where there are as many ranks."""
        rank, ranks = self._backend.world.rank, self._backend.world.size
        wanted = {
            number
            for number, (_, piece) in enumerate(checkpoint.pieces)
            if self._is_read(piece.entry.split("/"), names)
        }
        alike = checkpoint.manifest.ranks == ranks
        return lambda file, number: number in wanted and (file if alike else number) % ranks == rank

    def _is_read(self, parts: list[str], names: set[str]) -> bool:
        if parts[0] == RANKS:
            return True
        return parts[0] in names and (parts[1] != "optimizer" or self._options.optimizer)

    # Changing

    def _read(self, checkpoint: Checkpoint, plans: Sequence[Plan]) -> None:
        wanted: list[Shard] = []
        for plan in plans:
            wanted += self._parameters(checkpoint, plan.subject, plan.name)
            wanted += self._buffers(checkpoint, plan.subject, plan.name)
            if plan.subject.trained is not None and plan.numbers is not None:
                wanted += self._optimizer(checkpoint, plan.subject.trained, plan, plan.numbers)
        checkpoint.read((it.name, it.offset, it.values) for it in wanted)
        for plan in plans:
            if plan.subject.trained is not None and plan.numbers is not None:
                self._backend._resume_optimizer(plan.subject.trained)
                if plan.subject.trained.optimizer_offloaded:
                    self._backend._move_optimizer(plan.subject.trained, torch.device("cpu"))

    def _parameters(self, checkpoint: Checkpoint, subject: Subject, name: str) -> list[Shard]:
        there = checkpoint.names(f"{name}/parameters/")
        shards = self._backend._shards(subject.module)
        return [it.renamed(f"{name}/parameters/{it.name}") for it in shards if it.name in there]

    def _buffers(self, checkpoint: Checkpoint, subject: Subject, name: str) -> list[Shard]:
        own, shared = f"{self._redealt(checkpoint)}buffers/{name}/", f"{name}/buffers/"
        found = []
        for buffer, tensor in subject.buffers().items():
            entry = next((it + buffer for it in (own, shared) if it + buffer in checkpoint.index), None)
            if entry is not None:
                found.append(Shard(name=entry, shape=tensor.shape, offset=0, values=flat.elements(tensor)))
        return found

    def _redealt(self, checkpoint: Checkpoint) -> str:
        """Where the entries are of the rank whose place this one takes: r modulo the number that saved."""
        return f"{RANKS}/{self._backend.world.rank % checkpoint.manifest.ranks}/"

    def _optimizer(self, checkpoint: Checkpoint, trained: TrainedModel, plan: Plan, numbers: Numbers) -> list[Shard]:
        prefix = f"{plan.name}/optimizer/"
        stored = checkpoint.names(prefix)
        types = Types(state=checkpoint.types(prefix), parameters=checkpoint.types(f"{plan.name}/parameters/"))
        made = [
            shard.renamed(prefix + shard.name)
            for allocation in plan.state
            for shard in optimizer_state.allocate(trained.optimizer, allocation, stored, types, numbers)
        ]
        facts = checkpoint.state["models"][plan.name]["training"]
        optimizer_state.restore_groups(trained, facts["groups"], numbers.same_optimizer)
        return made

    def _go_on(self, checkpoint: Checkpoint, plans: Sequence[Plan]) -> None:
        for plan in plans:
            subject, facts = plan.subject, checkpoint.state["models"][plan.name]
            self._averages.set_seen(subject.module, facts["average"])
            if plan.schedule:
                subject.scheduler.load_state_dict(plan.schedule)
            if subject.trained is not None and facts["training"] is not None:
                for counter in ("updates", "skipped", "skipped_in_a_row"):
                    setattr(subject.trained, counter, facts["training"][counter])
        self._loaders.restore(checkpoint.state["loaders"])
        prefix = f"{self._redealt(checkpoint)}random/"
        found = {name: checkpoint.tensor(prefix + name) for name in checkpoint.names(prefix)}
        streams.restore(found, self._backend.world.device)
