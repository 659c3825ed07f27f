"""Saving what a run is made of, and going on from it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, final

from torch import nn
from torch.optim import Optimizer

from lightrft.config import StrategyError
from lightrft.strategy.api.training import Training
from lightrft.strategy.checkpoint.fit import Options
from lightrft.strategy.checkpoint.saving import Target
from lightrft.strategy.checkpoint.subjects import Subject, check_names, named

Models = nn.Module | Mapping[str, nn.Module]
"""One model, or several by name."""


class Checkpointing(Training):
    """Checkpoints: one format for every strategy and every number of ranks."""

    @final
    def save_ckpt(
        self, model: Models, save_dir: str | PathLike[str], tag: str | None = None, max_num: int = 3,
        max_mem: float = 1000, client_state: Mapping[str, Any] | None = None, save_latest: bool = True,
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None, scheduler: Any = None,
    ) -> Path:  # fmt: skip
        """Save to ``save_dir/tag`` all that it takes to go on as if nothing had been: weights, masters, optimizer,
        schedule, counters, the random streams of every rank, the position of loaders, and ``client_state``.

        ``model``: one, or several by name, which are then in one checkpoint: ``{"actor": actor, "critic": critic}``.
        ``tag``: by default ``global_stepN``, N updates; what was saved under it before is replaced when the new one
        is there, unless it is of other models. ``max_num`` and ``max_mem`` (GB) limit the checkpoints in ``save_dir``
        that hold the same models and are of this run, or of one from which it went on by `load_ckpt`: the oldest go,
        after this one is committed; those of other runs stay. ``save_latest``: whether `load_ckpt` without a tag may
        find it; the newest of these stays, whatever the limits. ``client_state``: None, bool, int, float, str, bytes,
        list, tuple, dict, and no subclasses of these; rank 0's is stored. Optimizer and scheduler are those of
        `prepare`; a model that has none is saved alone. With ``async_ckpt`` this returns as soon as the state is copied;
        what then goes wrong is written to stderr at once, and raised by the next save, load or `close`. A process that
        ends without any of these waits for what is being written.

        Returns the path, the same on every rank; hosts must share the file system. Raises on every rank, and leaves
        older checkpoints as they were: `StrategyError` for a gradient that awaits its update, `ArgumentTypeError` for
        a client state that cannot be stored, `ArgumentError` for a tag that is no name of a directory, `ConfigError`
        for limits below 1, `CheckpointError` for what cannot be written, or is being written by another process.
        """
        with self._running("save_ckpt"):
            subjects = self._checkpoints.subjects(
                "save_ckpt", lambda: self._subjects("save_ckpt", model, optimizer, scheduler)
            )
            updates = next((it.trained.updates for it in subjects if it.trained is not None), 0)
            target = Target(
                directory=Path(save_dir).absolute(), tag=f"global_step{updates}" if tag is None else tag, latest=save_latest,
                max_num=max_num, max_mem=max_mem, checksum=self.config.ckpt_checksum,
            )  # fmt: skip
            return self._checkpoints.save(subjects, target, client_state)

    @final
    def load_ckpt(
        self, model: Models, load_dir: str | PathLike[str], tag: str | None = None, load_module_strict: bool = True,
        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True, load_module_only: bool = False,
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None, scheduler: Any = None,
    ) -> tuple[Path, Any]:  # fmt: skip
        """Go on from checkpoint ``tag`` in ``load_dir``, by default from the newest, whatever strategy and however
        many ranks saved it. Returns its path and the client state.

        ``model``: one, or several by name, all of a checkpoint's or some. Prepare first: models and optimizers must be
        there; loaders are made before or after, in the order in which the run that saved made its own. Rank r takes the
        random streams of rank r modulo the number of ranks that saved.
        ``load_module_strict`` False loads the parameters that both have. ``load_optimizer_states`` False leaves the
        optimizer's state and hyperparameters as they are, ``load_lr_scheduler_states`` False the schedule;
        ``load_module_only`` loads weights and buffers, and nothing else.

        Everything is verified before anything changes. Raises on every rank: `CheckpointNotFoundError`, which lists
        the tags that are there; `CheckpointError`, which names the file that is damaged or what does not fit.
        """
        options = Options.of(
            strict=load_module_strict, optimizer=load_optimizer_states, scheduler=load_lr_scheduler_states,
            module_only=load_module_only,
        )  # fmt: skip
        with self._running("load_ckpt"):
            subjects = self._checkpoints.subjects(
                "load_ckpt", lambda: self._subjects("load_ckpt", model, optimizer, scheduler)
            )
            loaded = self._checkpoints.load(subjects, Path(load_dir), tag, options)
            return loaded.path, loaded.client_state

    @contextmanager
    def saving_on_sigterm(self, save: Callable[[], object]) -> Iterator[None]:
        """In the body, SIGTERM on any rank, a scheduler's warning, ends the run at the next update boundary.

        All ranks then call ``save``, which calls `save_ckpt`, close this strategy and end with exit status 0. The
        boundary is the return of `optimizer_step` where no model has a gradient pending. Every rank enters this, in
        its main thread.
        """
        with self._termination.watching(save):
            yield

    def _subjects(self, call: str, model: Models, optimizer: Any, scheduler: Any) -> list[Subject]:
        several = isinstance(model, Mapping)
        if isinstance(model, Mapping):
            check_names(model)
        names = list(model) if isinstance(model, Mapping) else None
        models = named("model", model, names) if not several else dict(model)  # type: ignore[arg-type]
        optimizers, schedulers = named("optimizer", optimizer, names), named("scheduler", scheduler, names)
        return [self._subject(call, name, it, optimizers[name], schedulers[name]) for name, it in models.items()]

    def _subject(self, call: str, name: str, model: nn.Module, optimizer: Optimizer | None, scheduler: Any) -> Subject:
        if not isinstance(model, nn.Module):
            raise StrategyError(f"{call}: {name} is {model!r} ({type(model).__name__}), and no model")
        trained = None if optimizer is None else self._trained(model, optimizer, call)
        found = self._models.find(model)
        if found is None and not self.adopts:
            raise StrategyError(f"{call}: this strategy has not prepared the model ({type(model).__name__})")
        if found is not None and found.offloaded:
            raise StrategyError(f"{call}: {found.kind.__name__} was offloaded; call reload_model before")
        trained = found.trained if found is not None else trained
        known = None if trained is None else trained.scheduler
        module = self._models.unwrap(model)
        return Subject(
            name=name, module=module, kind=type(module) if found is None else found.kind, trained=trained,
            scheduler=scheduler if scheduler is not None else known,
        )  # fmt: skip
