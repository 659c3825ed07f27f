"""Defects of prepared models: tied weights, buffers, frozen weights, parameter groups, and training or evaluation mode."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import Loaded
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import ReplicatedBackend, TrainedModel, WrapOptions, broadcast, materialize
from lightrft.strategy.checkpoint.checkpoint_items import Models
from lightrft.strategy.export.load_model import LoadedNames
from lightrft.strategy.fake_strategy import FakeBackend

# mypy: disable-error-code="misc, union-attr, arg-type"


@saboteur("PREP-2")
class UntiesInference(FakeBackend):
    """Tied weights of models prepared for inference are untied."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        head = getattr(module, "head", None)
        if not options.training and isinstance(head, nn.Linear):
            head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        return super().wrap(module, options)


@saboteur("PREP-3")
class CastsBuffers(FakeBackend):
    """With bf16, buffers are cast to bf16 too."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        for buffer in module.buffers() if self.config.bf16 else ():
            buffer.data = buffer.data.bfloat16()
        return super().wrap(module, options)


@saboteur("PREP-6", world=2)
class OnlyWhatIsSaved(ReplicatedBackend):
    """Non-persistent buffers stay uninitialised on ranks other than 0."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        materialize(module, self.world.device)
        for tensor in module.state_dict(keep_vars=True).values():
            broadcast(tensor.data, self.world)
        return module


@saboteur("PREP-7")
class OneRate(FakeStrategy):
    """The critic trains with the actor's learning rate."""

    def prepare_models_and_optimizers(self, *arguments: Any) -> Any:
        self.config = self.config.replace(critic_learning_rate=self.config.actor_learning_rate)
        return super().prepare_models_and_optimizers(*arguments)


@saboteur("PREP-10")
class ListsTrain(FakeStrategy):
    """Models prepared in a list stay in training mode."""

    def prepare(self, *models: object, is_rlhf: bool = False) -> Any:
        result = super().prepare(*models)
        for model in models[0] if isinstance(models[0], list) else ():
            model.train()
        return result


@saboteur("PREP-4", world=2)
class KeepsLocalFrozenWeights(ReplicatedBackend):
    """Frozen parameters of the ranks stay as each rank built them."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
        wrapped = super().wrap(module, options)
        for name, parameter in module.named_parameters() if options.training else ():
            parameter.data.copy_(frozen.get(name, parameter.data))
        return wrapped


@saboteur("PREP-9")
class FixedEps(FakeBackend):
    """A change of eps in param_groups has no effect."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        super().reduce(trained)
        for group in trained.optimizer.param_groups:
            group["eps"] = 1e-8


@saboteur("PREP-9")
class OneRateForAll(FakeBackend):
    """All parameter groups train with the learning rate of the last one."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        super().reduce(trained)
        for group in trained.optimizer.param_groups:
            group["lr"] = trained.optimizer.param_groups[-1]["lr"]


@saboteur("PREP-10")
class AveragesInEvaluation(FakeStrategy):
    """moving_average leaves the model in evaluation mode."""

    def moving_average(self, model: nn.Module, model_ema: nn.Module, *arguments: Any, **options: Any) -> None:
        super().moving_average(model, model_ema, *arguments, **options)
        model.eval()


@saboteur("PREP-10")
class LoadsIntoTraining(FakeStrategy):
    """load_ckpt leaves the models in training mode, also those prepared for inference."""

    def load_ckpt(self, model: Models, *arguments: Any, **options: Any) -> Loaded:
        loaded = super().load_ckpt(model, *arguments, **options)
        for each in model.values() if isinstance(model, Mapping) else [model]:
            self.unwrap_model(each).train()
        return loaded


@saboteur("PREP-9")
class DecayOfOneGroupStays(FakeBackend):
    """A change of the weight decay of the second parameter group has no effect."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        super().reduce(trained)
        trained.optimizer.param_groups[-1]["weight_decay"] = 0.0


@saboteur("PREP-11")
class ReloadUnfreezes(FakeStrategy):
    """reload_model lets all parameters train that trained when they were prepared."""

    def reload_model(self, models: Any) -> None:
        super().reload_model(models)
        prepared = self._models.find(models)
        for parameter in prepared.trained.parameters if prepared.trained is not None else ():
            parameter.requires_grad_(True)


@saboteur("PREP-10")
class ReloadsIntoTraining(FakeStrategy):
    """load_model puts every part of a model that trains in training mode."""

    def load_model(self, model: nn.Module, *arguments: Any, **more: Any) -> LoadedNames:
        names = super().load_model(model, *arguments, **more)
        self.unwrap_model(model).train(self._models.find(model).trained is not None)
        return names


@saboteur("PREP-10")
class ExportsInEvaluation(FakeStrategy):
    """save_model leaves the model in evaluation mode."""

    def save_model(self, model: nn.Module, *arguments: Any, **more: Any) -> Path:
        folder = super().save_model(model, *arguments, **more)
        self.unwrap_model(model).eval()
        return folder


@saboteur("PREP-10")
class ExportsInTraining(FakeStrategy):
    """save_model puts every part of a model that trains in training mode."""

    def save_model(self, model: nn.Module, *arguments: Any, **more: Any) -> Path:
        folder = super().save_model(model, *arguments, **more)
        self.unwrap_model(model).train(self._models.find(model).trained is not None)
        return folder
