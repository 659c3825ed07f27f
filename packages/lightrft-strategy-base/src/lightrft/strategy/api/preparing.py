"""Making models, optimizers and data ready."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, final

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler

from lightrft.config import ArgumentError, ConfigError, StrategyConfig, StrategyError
from lightrft.strategy.api.lifecycle import Lifecycle
from lightrft.strategy.backend import WrapOptions
from lightrft.strategy.training.data import ResumableLoader, make_loader
from lightrft.strategy.training.meta_loading import nothing_loaded
from lightrft.strategy.training.optimizers import check_kinds
from lightrft.strategy.training.schedules import cosine_schedule

FOREVER = int(1e8)
"""Updates over which a schedule decays where nobody says how many there will be."""


class Preparing(Lifecycle):
    """From what a script builds to what a strategy trains."""

    @contextmanager
    def init_model_context(self, meta_init: bool = False) -> Iterator[None]:
        """Build models in here, or load them with ``from_pretrained``.

        With ``meta_init`` only rank 0 gives them memory, and reads their weights, and preparing hands these round.
        """
        elsewhere = meta_init and self.world.rank != 0
        context: AbstractContextManager[object] = nothing_loaded() if elsewhere else nullcontext()
        with context:
            yield

    @final
    def create_optimizer(self, model: nn.Module, **settings: Any) -> Optimizer:
        """AdamW over the trainable parameters; biases and norms are spared from ``weight_decay``.

        ``settings`` (``lr``, ``betas``, ...) are ``torch.optim.AdamW``'s; ``weight_decay`` is 0 unless given. ``model`` may be
        bare, for `prepare` to wrap with the optimizer, or wrapped by `prepare_model`, and is then in training.
        """
        with self._running("create_optimizer"):
            check_kinds("create_optimizer", model)
            found = self._models.find(model)
            if found is not None and found.trained is not None:
                raise StrategyError(f"create_optimizer: {found.kind.__name__} has an optimizer already")
            if found is not None and not found.options.training:
                raise StrategyError(f"create_optimizer: {found.kind.__name__} was prepared for inference")
            optimizer = self._create_optimizer(self._models.unwrap(model), **settings)
            if found is not None:
                self._preparation.bind(model, optimizer)
            return optimizer

    @final
    def prepare(self, *models: Any, is_rlhf: bool = False) -> Any:
        """Make models ready, each argument in the structure in which it came; a single one comes back bare.

        A model is prepared for inference, ``(model, optimizer, scheduler)`` for training, a list of models one
        by one, None stays None. The optimizer and the scheduler are the caller's own objects.
        ``is_rlhf`` is LightRFT's; what it chose there holds here always.
        """
        with self._running("prepare"):
            results = [self._preparation.prepare(model) for model in models]
            return results[0] if len(results) == 1 else tuple(results)

    @final
    def prepare_model(
        self, model: Any, is_training: bool = False, shard_size: int = -1, reshard_after_forward: bool = True
    ) -> Any:
        """Make one model ready, before there is an optimizer; what is no module is returned as it is.

        ``shard_size``: ranks over which parameters are sharded, the rest being replicas; -1 is the setting.
        ``reshard_after_forward``: whether gathered parameters are given back between forward and backward.
        """
        if not isinstance(model, nn.Module):
            return model
        if not (isinstance(shard_size, int) and (shard_size == -1 or shard_size > 0)):
            raise ConfigError(
                f"prepare_model: shard_size={shard_size!r}; allowed is a number of ranks, or -1 for the setting"
            )
        options = WrapOptions(training=is_training, shard_size=shard_size, reshard_after_forward=reshard_after_forward)
        with self._running("prepare_model"):
            return self._preparation.model(model, options)

    @final
    def prepare_models_and_optimizers(
        self,
        actor: nn.Module,
        critic: nn.Module | None,
        reward_models: Any,
        initial_model: nn.Module | None,
        args: object,
        max_steps: int,
    ) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any], Any, Any]:
        """Prepare a whole RLHF set: the actor, and with ``critic_pretrain`` the critic, with AdamW and a cosine schedule.

        Rates, betas, decay and warm-up are the settings', read from ``args`` where they differ from this
        strategy's; ``max_steps`` updates. Returns ``((actor, optimizer, scheduler), (critic, optimizer,
        scheduler), reward_models, initial_model)``, with None where there is none.
        """
        config = self._config_of(args)
        if not isinstance(max_steps, int) or max_steps < 1:
            raise ArgumentError(f"prepare_models_and_optimizers: max_steps={max_steps!r}; allowed is an integer >= 1")
        check_kinds("prepare_models_and_optimizers", actor)
        actor.is_actor = True  # type: ignore[assignment]
        trained_actor = self._with_optimizer(actor, config, config.actor_learning_rate, max_steps)
        trained_critic: tuple[Any, Any, Any] = (None, None, None)
        if critic is not None and config.critic_pretrain:
            trained_critic = self._with_optimizer(critic, config, config.critic_learning_rate, max_steps)
        elif critic is not None:
            trained_critic = (self.prepare(critic), None, None)
        rewards = reward_models if config.remote_rm_url else self.prepare(reward_models)
        return trained_actor, trained_critic, rewards, self.prepare(initial_model)

    @final
    def prepare_reward_model(
        self, reward_model: nn.Module, args: object = None, max_steps: int = FOREVER
    ) -> tuple[Any, Any, Any]:
        """Prepare a reward model for training, with the actor's rate; returns (model, optimizer, scheduler)."""
        config = self._config_of(args)
        return self._with_optimizer(reward_model, config, config.actor_learning_rate, max_steps)

    def _with_optimizer(
        self, model: nn.Module, config: StrategyConfig, rate: float, max_steps: int
    ) -> tuple[Any, Any, Any]:
        optimizer = self.create_optimizer(model, lr=rate, betas=config.adam_betas, weight_decay=config.l2)
        scheduler = cosine_schedule(optimizer, config.lr_warmup_ratio, max_steps)
        prepared: tuple[Any, Any, Any] = self.prepare((model, optimizer, scheduler))
        return prepared

    def _config_of(self, args: object) -> StrategyConfig:
        return self.config if args is None or args is self.args else self.config.overlaid(args)

    @final
    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """The model itself, below an actor's wrapper and the backend's; the same however often it is applied."""
        return self._models.unwrap(model)

    # Data

    @final
    def setup_dataloader(
        self, replay_buffer: Any, batch_size: int, pin_memory: bool = False, shuffle: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None, drop_last: bool = True, sampler: Sampler[int] | None = None,
        consumed_samples: int = 0,
    ) -> DataLoader[Any]:  # fmt: skip
        """This rank's share of a map-style dataset, ``batch_size`` samples at a time.

        The order depends on the seed and the epoch (``loader.set_epoch``) alone. ``consumed_samples`` of the
        epoch, over all ranks, are passed over. With ``drop_last`` what does not fill the last round and batch
        is left out; without, each rank gets as many, by repeating at most one sample fewer than there are ranks.
        Its position is in every checkpoint, as long as it is alive and unless it has a ``sampler`` of the caller's own,
        and goes back to the loader that is made in the same place of the order, before `load_ckpt` or after it.
        Raises `CheckpointError` where a loaded checkpoint has the position of another one.
        """
        loader = make_loader(
            replay_buffer, batch_size, rank=self.world.rank, ranks=self.world.size, seed=self.config.seed,
            shuffle=shuffle, drop_last=drop_last, sampler=sampler, consumed_samples=consumed_samples,
            collate_fn=collate_fn, pin_memory=pin_memory,
        )  # fmt: skip
        if isinstance(loader, ResumableLoader):
            self._checkpoints.loaders.add(loader)
        return loader
