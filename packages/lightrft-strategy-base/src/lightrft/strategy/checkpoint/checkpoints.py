"""The checkpoints of one strategy: saving, now or in the background, and loading.

Save: look (nothing is pending, all can be stored), deal out who writes what, then write and publish (`saving`).
Load: find, compare, verify, and only then change anything (`loading`).
"""

import secrets
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightrft.config import ArgumentTypeError, ConfigError, StrategyError
from lightrft.strategy.backend import Backend
from lightrft.strategy.checkpoint import capture, store
from lightrft.strategy.checkpoint.agreement import Agreement
from lightrft.strategy.checkpoint.background import Background
from lightrft.strategy.checkpoint.fit import Options
from lightrft.strategy.checkpoint.loaders import Loaders
from lightrft.strategy.checkpoint.loading import Loaded, Loading
from lightrft.strategy.checkpoint.plain_values import dumps, to_json
from lightrft.strategy.checkpoint.saving import Saving, Target, held_everywhere, share_of
from lightrft.strategy.checkpoint.subjects import Subject
from lightrft.strategy.distributed.collectives import Collectives
from lightrft.strategy.distributed.operations import Operations
from lightrft.strategy.training.moving_average import MovingAverages


class Checkpoints:
    """Saves and loads for one strategy. Every rank makes the same calls."""

    def __init__(
        self, backend: Backend, collectives: Collectives, operations: Operations, averages: MovingAverages
    ) -> None:
        self._backend, self._collectives, self._averages = backend, collectives, averages
        self._background = Background(backend.world, operations) if backend.config.async_ckpt else None
        self.loaders = Loaders()
        self._lineages: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._written: dict[Path, list[weakref.ref[nn.Module]]] = {}

    def _agreement(self, call: str) -> Agreement:
        return Agreement(self._collectives, call, self._backend.world.rank)

    def subjects(self, call: str, look: Callable[[], Sequence[Subject]]) -> Sequence[Subject]:
        """What ``look`` finds in the arguments of ``call``, which raises on every rank where it raises on one."""
        self.finish()
        return self._agreement(call).here("looking at the arguments", look)

    def save(self, subjects: Sequence[Subject], target: Target, client_state: object) -> Path:
        """Save ``subjects`` to ``target``; in the background where the settings say so."""
        agreement = self._agreement("save_ckpt")
        agreement.everywhere("checking", lambda: _check_target(target))
        agreement.alike([str(target.path), target.latest, target.max_num, target.max_mem, [it.name for it in subjects]])
        state = agreement.here("looking", lambda: self._look(subjects, target, client_state))
        shared = capture.shared_buffers(subjects, agreement)
        held = agreement.here("collecting", lambda: capture.tensors(self._backend, subjects, shared))
        world = self._backend.world
        everywhere = held_everywhere(held, self._collectives, world)
        share = agreement.here("sharing", lambda: share_of(held, everywhere, world.rank))
        saving = Saving(target=target, rank=world.rank, ranks=world.size, state=state, share=share)
        if self._background is None:
            saving.write(agreement)
        else:
            self._background.start(agreement.here("copying", partial(self._background.copied, saving)))
        self._written[target.path] = [weakref.ref(it.module) for it in subjects]
        return target.path

    def _look(self, subjects: Sequence[Subject], target: Target, client_state: object) -> dict[str, Any]:
        """What is no tensor, once it is known that a checkpoint may be made now. Raises before anything is written."""
        _check_settled(subjects, "save_ckpt")
        self._check_same_models(subjects, target.path)
        state = capture.facts(self._backend, subjects, self._averages, self.loaders)
        for it in subjects:
            state["models"][it.name]["lineage"] = self._lineages.setdefault(it.module, secrets.token_hex(8))
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
        agreement = self._agreement("load_ckpt")
        agreement.everywhere("checking", lambda: store.check_tag(tag) if tag is not None else None)
        agreement.alike([str(directory), tag, repr(options), [it.name for it in subjects]])
        agreement.everywhere("looking", lambda: _check_settled(subjects, "load_ckpt"))
        loaded = Loading(self._backend, agreement, self._averages, self.loaders, subjects, options).run(directory, tag)
        if not options.module_only:
            self._lineages.update((it.module, loaded.lineages[it.name]) for it in subjects)
        return loaded

    def finish(self) -> None:
        """Wait for what is written in the background; raises where that failed."""
        if self._background is not None:
            self._background.finish()


def _check_settled(subjects: Sequence[Subject], call: str) -> None:
    for subject in subjects:
        subject.check_settled(call)


def _check_target(target: Target) -> None:
    store.check_tag(target.tag)
    for name, value, kinds in (("max_num", target.max_num, (int,)), ("max_mem", target.max_mem, (int, float))):
        if isinstance(value, bool) or not isinstance(value, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ArgumentTypeError(f"save_ckpt: {name}={value!r} ({type(value).__name__}); wanted {wanted}")
    if target.max_num < 1:
        raise ConfigError(f"save_ckpt: max_num={target.max_num}; wanted at least 1, the checkpoint that is being saved")
    if not target.max_mem > 0:
        raise ConfigError(f"save_ckpt: max_mem={target.max_mem} GB; wanted more than 0")
