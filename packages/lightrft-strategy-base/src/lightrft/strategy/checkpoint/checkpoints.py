"""The checkpoints of one strategy: saving, now or in the background, and loading.

Save: look (nothing is pending, all can be stored), deal out who writes what, then write and publish (`saving`).
Load: find, compare, verify, and only then change anything (`loading`).
"""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightrft.config import ConfigError, StrategyError
from lightrft.strategy.backend import Backend
from lightrft.strategy.checkpoint import capture, store
from lightrft.strategy.checkpoint.agreement import Agreement
from lightrft.strategy.checkpoint.background import Background
from lightrft.strategy.checkpoint.fit import Options
from lightrft.strategy.checkpoint.loading import Loaded, Loading
from lightrft.strategy.checkpoint.plain_values import dumps, to_json
from lightrft.strategy.checkpoint.saving import Saving, Target, share_of
from lightrft.strategy.checkpoint.subjects import Subject
from lightrft.strategy.distributed.collectives import Collectives
from lightrft.strategy.distributed.operations import Operations
from lightrft.strategy.training.data import ResumableLoader
from lightrft.strategy.training.moving_average import MovingAverages


class Checkpoints:
    """Saves and loads for one strategy. Every rank makes the same calls."""

    def __init__(
        self, backend: Backend, collectives: Collectives, operations: Operations, averages: MovingAverages
    ) -> None:
        self._backend, self._collectives, self._averages = backend, collectives, averages
        self._background = Background(backend.world, operations) if backend.config.async_ckpt else None
        self._loaders: list[weakref.ref[ResumableLoader]] = []
        self._written: dict[Path, list[weakref.ref[nn.Module]]] = {}

    def track(self, loader: ResumableLoader) -> None:
        """Save the position of ``loader``, as long as it lives."""
        self._loaders.append(weakref.ref(loader))

    @property
    def _living(self) -> list[ResumableLoader]:
        return [loader for it in self._loaders if (loader := it()) is not None]

    def _agreement(self, call: str) -> Agreement:
        return Agreement(self._collectives, call, self._backend.world.rank)

    def save(self, subjects: Sequence[Subject], target: Target, client_state: object) -> Path:
        """Save ``subjects`` to ``target``; in the background where the settings say so."""
        self.finish()
        agreement = self._agreement("save_ckpt")
        agreement.alike([str(target.path), target.latest, target.max_num, target.max_mem, [it.name for it in subjects]])
        state: dict[str, Any] = {}
        agreement.everywhere("looking", lambda: state.update(self._look(subjects, target, client_state)))
        shared = capture.shared_buffers(subjects, agreement)
        held: list[Any] = []
        agreement.everywhere("collecting", lambda: held.extend(capture.tensors(self._backend, subjects, shared)))
        world = self._backend.world
        saving = Saving(
            target=target, rank=world.rank, ranks=world.size, state=state,
            share=share_of(held, self._collectives, world),
        )  # fmt: skip
        if self._background is None:
            saving.write(agreement)
        else:
            self._background.start(saving)
        self._written[target.path] = [weakref.ref(it.module) for it in subjects]
        return target.path

    def _look(self, subjects: Sequence[Subject], target: Target, client_state: object) -> dict[str, Any]:
        """What is no tensor, once it is known that a checkpoint may be made now. Raises before anything is written."""
        store.check_tag(target.tag)
        _check_limits(target)
        _check_settled(subjects, "save_ckpt")
        self._check_same_models(subjects, target.path)
        state = capture.facts(self._backend, subjects, self._averages, self._living)
        state["client_state"] = to_json({} if client_state is None else client_state, "client_state")
        dumps(state)  # raises for what JSON has no form for
        return state

    def _check_same_models(self, subjects: Sequence[Subject], path: Path) -> None:
        """Raise where this run saved other models under the same tag: the one would take the place of the other."""
        before = [it() for it in self._written.get(path, [])]
        if before and None not in before and before != [it.module for it in subjects]:
            raise StrategyError(
                f"save_ckpt: {path} holds {', '.join(type(it).__name__ for it in before)}, which this run saved there, and "
                f"would be lost; save models together, as save_ckpt({{'actor': actor, 'critic': critic}}, ...), or each to a "
                f"directory of its own"
            )

    def load(self, subjects: Sequence[Subject], directory: Path, tag: str | None, options: Options) -> Loaded:
        """Load ``subjects`` from checkpoint ``tag`` in ``directory``, or from the newest."""
        self.finish()
        agreement = self._agreement("load_ckpt")
        agreement.alike([str(directory), tag, repr(options), [it.name for it in subjects]])
        agreement.everywhere("looking", lambda: _check_settled(subjects, "load_ckpt"))
        return Loading(self._backend, agreement, self._averages, self._living, subjects, options).run(directory, tag)

    def finish(self) -> None:
        """Wait for what is written in the background; raises where that failed."""
        if self._background is not None:
            self._background.finish()


def _check_settled(subjects: Sequence[Subject], call: str) -> None:
    for subject in subjects:
        subject.check_settled(call)


def _check_limits(target: Target) -> None:
    if target.max_num < 1:
        raise ConfigError(f"save_ckpt: max_num={target.max_num}; wanted at least 1, the checkpoint that is being saved")
    if not target.max_mem > 0:
        raise ConfigError(f"save_ckpt: max_mem={target.max_mem} GB; wanted more than 0")
