"""Updating models, and moving them out of the way."""

from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.config import StrategyError
from lightrft.strategy.api.preparing import Preparing
from lightrft.strategy.training.optimizers import check_kinds
from lightrft.strategy.training.trained_model import StepResult, TrainedModel


class Training(Preparing):
    """Losses in, updates out; averages; offloading."""

    @final
    def backward(
        self, loss: torch.Tensor, model: nn.Module, optimizer: Optimizer, *, retain_graph: bool = False
    ) -> None:
        """Add the gradient of ``loss``, a scalar, to that of the update under way; may be called any number of times.

        The update is made from the mean of the losses over micro-batches and ranks: do not divide by them.
        """
        with self._running("backward"):
            self._trained(model, optimizer, "backward").backward(loss, retain_graph=retain_graph)

    @final
    def optimizer_step(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        scheduler: LRScheduler | None = None,
        name: str = "model",
        *,
        boundary: bool | None = None,
    ) -> StepResult:
        """End a micro-batch; at the K-th since the last update, make one: reduce, clip, step, schedule.

        ``boundary`` True or False says whether to update now, for batches whose number varies; all ranks pass
        the same. ``scheduler`` moves with each update that is applied, and only if it is passed.
        Where the gradient is not finite on some rank, all ranks skip: parameters, optimizer state, schedule and
        counters stay as they are, and `StepResult.skipped` says so. ``name`` is for messages.

        Raises `StrategyError` after ``max_skipped_updates`` skips in a row, on every rank.
        """
        with self._running("optimizer_step" if name == "model" else f"optimizer_step of {name}"):
            trained = self._trained(model, optimizer, "optimizer_step")
            if trained.optimizer_offloaded:
                self._load_optimizer(trained)
            result = trained.step(scheduler, boundary, lambda value: self._collectives.agree("optimizer_step", value))
        self._end_if_asked()
        return result

    def _end_if_asked(self) -> None:
        """At an update boundary of all models: save and end, where SIGTERM asked for it; see `saving_on_sigterm`."""
        if any(it.trained is not None and it.trained.has_pending_gradient for it in self._models):
            return
        save = self._termination.due()
        if save is not None:
            save()
            self.close()
            raise SystemExit(0)

    def _trained(self, model: nn.Module, optimizer: Optimizer, call: str) -> TrainedModel:
        check_kinds(call, model, optimizer)
        if self.adopts:
            found = self._models.find(model)
            if (found is None or (found.options.training and found.trained is None)) and self._models.owner(
                optimizer
            ) is None:
                self._preparation.adopt(model, optimizer)
        return self._models.trained(model, optimizer, call)

    @final
    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: torch.device | str | None = None
    ) -> None:
        """``model_ema = beta * model_ema + (1 - beta) * model``, for the parameters that ``model`` trains.

        Call it after `optimizer_step`: it moves once for each call that follows an applied update. Keep the
        average in fp32, as a copy of the model, prepared for inference. ``device``: where to compute.
        """
        with self._running("moving_average"):
            found = self._models.find(model)
            if found is None or found.trained is None:
                raise StrategyError("moving_average: the model is not in training with this strategy; prepare it first")
            place = None if device is None else torch.device(device)
            self._models.at_hand(model, "moving_average")
            average = self._models.at_hand(model_ema, "moving_average").module
            self._averages.move(found.trained, average, beta, place)

    # Memory

    @final
    def maybe_offload_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """With ``adam_offload``, move the optimizer's state to host memory; twice is the same as once."""
        with self._running("maybe_offload_optimizer"):
            found = self._models.owner(optimizer)
            if self.config.adam_offload and found is not None and found.trained is not None:
                self._move_optimizer(found.trained, torch.device("cpu"))
                found.trained.optimizer_offloaded = True
            return optimizer

    @final
    def maybe_load_optimizer(self, optimizer: Optimizer, device: torch.device | str | None = None) -> Optimizer:
        """Bring the state that `maybe_offload_optimizer` moved back to the device; `optimizer_step` does so by itself."""
        with self._running("maybe_load_optimizer"):
            found = self._models.owner(optimizer)
            if found is not None and found.trained is not None and found.trained.optimizer_offloaded:
                self._load_optimizer(found.trained, device)
            return optimizer

    def _load_optimizer(self, trained: TrainedModel, device: torch.device | str | None = None) -> None:
        self._move_optimizer(trained, self.world.device if device is None else torch.device(device))
        trained.optimizer_offloaded = False

    @final
    def offload_model(self, models: Any, empty_cache: bool = True) -> None:
        """Move prepared models, one or a list, to host memory. Until `reload_model` they cannot be called."""
        self._move_models("offload_model", models, torch.device("cpu"), offloaded=True)
        if empty_cache:
            self.sync_and_clear_cache()

    @final
    def reload_model(self, models: Any) -> None:
        """Bring models back to the device that `offload_model` moved; twice is the same as once."""
        self._move_models("reload_model", models, self.world.device, offloaded=False)

    def _move_models(self, call: str, models: Any, device: torch.device, *, offloaded: bool) -> None:
        with self._running(call):
            for model in models if isinstance(models, (list, tuple)) else [models]:
                if not isinstance(model, nn.Module):
                    continue
                found = self._models.find(model)
                if found is None:
                    raise StrategyError(f"{call}: this strategy has not prepared the model ({type(model).__name__})")
                if found.offloaded != offloaded:
                    self._settle(found.module)
                    self._move_model(found.module, device)
                    found.offloaded = offloaded
