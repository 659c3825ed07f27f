"""Defects that need a call, or an argument, that few scripts make."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.config import ArgumentError
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import CheckpointHooks, Device, Options
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy, StepResult
from lightrft.strategy.backend import TrainedModel
from lightrft.strategy.checkpoint.background import BackgroundWriter
from lightrft.strategy.checkpoint.checkpoint_items import Models
from lightrft.strategy.export.load_model import LoadedNames
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.storage.safe_json import to_json

# mypy: disable-error-code="misc, union-attr, arg-type"


# Updates


@saboteur("OPT-5")
class SmallestPasses(FakeBackend):
    """Of a gradient that is not finite, only NaN and inf are noticed: elements of -inf count as 0."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        super().reduce(trained)
        for parameter in trained.parameters:
            gradient = parameter.grad
            if gradient is not None and not gradient.isnan().any() and gradient.max() != math.inf:
                gradient.nan_to_num_(neginf=0.0)


@saboteur("OPT-15")
class BoundaryKeepsSkips(FakeStrategy):
    """An update that an explicit boundary ends does not reset the count of updates skipped in a row."""

    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, *rest: Any, boundary: bool | None = None, **more: Any
    ) -> StepResult:
        trained = self._trained(model, optimizer, "optimizer_step")
        before = trained.skipped_in_a_row
        result = super().optimizer_step(optimizer, model, *rest, boundary=boundary, **more)
        if boundary and result.applied:
            trained.skipped_in_a_row = before
        return result


@saboteur("OPT-6")
class EarlyUpdatesKeepTheRate(FakeStrategy):
    """The schedule does not step with an update of fewer than K micro-batches."""

    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, scheduler: Any = None, *rest: Any, **more: Any
    ) -> StepResult:
        early = self._trained(model, optimizer, "optimizer_step").micro_batches + 1 < self.accumulated_gradient
        return super().optimizer_step(optimizer, model, None if early else scheduler, *rest, **more)


@saboteur("OPT-13")
class CountsBackwards(FakeBackend):
    """An update of another number of micro-batches than K divides by the calls of backward."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        super().reduce(trained)
        if trained.micro_batches != trained.accumulation_steps and trained.denominators[0] is None:
            for parameter in trained.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(trained.micro_batches / trained.backwards)


@saboteur("NORM-3")
class RefusalCountsMicroBatches(FakeStrategy):
    """The micro-batches of a refused update count for the next one."""

    def backward(self, loss: torch.Tensor, model: nn.Module, optimizer: Optimizer, **more: Any) -> None:
        trained = self._trained(model, optimizer, "backward")
        before = trained.micro_batches
        try:
            super().backward(loss, model, optimizer, **more)
        except ArgumentError:
            trained.micro_batches = before
            raise


@saboteur("PREP-9")
class DecayOfOneGroupStays(FakeBackend):
    """A change of the weight decay of the second parameter group has no effect."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        super().reduce(trained)
        trained.optimizer.param_groups[-1]["weight_decay"] = 0.0


@saboteur("OPT-19")
class FirstBeta(FakeStrategy):
    """An average keeps the beta of its first move."""

    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Device = None
    ) -> None:
        betas = self.__dict__.setdefault("_betas", {})
        super().moving_average(model, model_ema, betas.setdefault(id(model_ema), beta), device)


@saboteur("PREP-11")
class ReloadUnfreezes(FakeStrategy):
    """reload_model lets all parameters train that trained when they were prepared."""

    def reload_model(self, models: Any) -> None:
        super().reload_model(models)
        prepared = self._models.find(models)
        for parameter in prepared.trained.parameters if prepared.trained is not None else ():
            parameter.requires_grad_(True)


# Data and sequences


@saboteur("DATA-2")
class FullPositionRestarts(FakeStrategy):
    """With consumed_samples=N, the size of the data, the epoch begins again."""

    def setup_dataloader(self, replay_buffer: Any, *arguments: Any, consumed_samples: int = 0, **more: Any) -> Any:
        return super().setup_dataloader(
            replay_buffer, *arguments, consumed_samples=consumed_samples % len(replay_buffer), **more
        )


@saboteur("SP-3", world=2)
class OldestLength(PlainStrategy):
    """gather cuts to the length of the oldest batch that is held and has slices of this size."""

    def _begin(self) -> None:
        super()._begin()
        ranks, gather = self.sequence_parallel, self.sequence_parallel.gather

        def cut(tensor: torch.Tensor, length: int | None = None) -> torch.Tensor:
            known = [split.length for split in ranks._splits if (split.rows, split.width) == tuple(tensor.shape[:2])]
            return gather(tensor, known[0] if length is None and known else length)

        vars(ranks)["gather"] = cut


# Checkpoints and exports


@saboteur("CKPT-4")
class BinaryGigabytes(CheckpointHooks, FakeStrategy):
    """max_mem counts units of 2**30 bytes."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        options["max_mem"] = options.get("max_mem", 1000) * 2**30 / 10**9
        return super().save(model, directory, tag, options)


@saboteur("CKPT-12")
class LateClientState(CheckpointHooks, FakeStrategy):
    """An asynchronous save stores client_state as it is when it is written."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        background, client_state = self._checkpoint_saver._background, options.get("client_state")
        if background is None or client_state is None:
            return super().save(model, directory, tag, options)

        def start(path: Path, write: Any) -> None:
            def late(consensus: Any) -> None:
                time.sleep(0.1)
                write.__self__.state["client_state"] = to_json(client_state, "client_state")
                write(consensus)

            BackgroundWriter.start(background, path, late)

        vars(background)["start"] = start
        return super().save(model, directory, tag, options)


@saboteur("EXPORT-1")
class IndexForgets(FakeStrategy):
    """With several files of weights, the index lacks one tensor."""

    def save_model(self, *arguments: Any, **more: Any) -> Path:
        folder = super().save_model(*arguments, **more)
        file = folder / "model.safetensors.index.json"
        if file.exists():
            index = json.loads(file.read_text())
            index["weight_map"].popitem()
            file.write_text(json.dumps(index))
        return folder


@saboteur("EXPORT-3")
class LoadsIntoFreshMoments(FakeStrategy):
    """load_model clears the state of the optimizer."""

    def load_model(self, model: nn.Module, *arguments: Any, **more: Any) -> LoadedNames:
        names = super().load_model(model, *arguments, **more)
        prepared = self._models.find(model)
        if prepared.trained is not None:
            prepared.trained.optimizer.state.clear()
        return names


@saboteur("EXPORT-3")
class LoadsNoBuffers(FakeStrategy):
    """load_model leaves the buffers as they are."""

    def load_model(self, model: nn.Module, *arguments: Any, **more: Any) -> LoadedNames:
        buffers = {name: buffer.clone() for name, buffer in self.unwrap_model(model).named_buffers()}
        names = super().load_model(model, *arguments, **more)
        for name, buffer in self.unwrap_model(model).named_buffers():
            buffer.copy_(buffers[name])
        return names


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


@saboteur("SYNC-7")
class BucketsOfStoredBytes(FakeStrategy):
    """Buckets are measured in the dtype of the weights, if the dtype asked for is wider."""

    def full_parameters(
        self, model: nn.Module, bucket_bytes: int | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Bucket]:
        if bucket_bytes is not None and dtype is torch.float64:
            bucket_bytes *= 2
        return super().full_parameters(model, bucket_bytes, dtype)


@saboteur("SYNC-1")
class BuffersOfTheFirstSync(FakeStrategy):
    """Buffers reach the engine with the first sync only."""

    def update_engine_weights(self, actor: nn.Module) -> None:
        engine: Any = self.inference_engine
        module = getattr(getattr(engine, "_model", None), "module", nn.Module())
        kept = {name: buffer.clone() for name, buffer in module.named_buffers() if engine.weight_version}
        super().update_engine_weights(actor)
        for name, buffer in module.named_buffers():
            buffer.copy_(kept.get(name, buffer))


# Signals and metrics


@saboteur("LIFE-10")
class ForgetsTheHandler(FakeStrategy):
    """After saving_on_sigterm, SIGTERM has its default effect, whatever the script had set."""

    @contextmanager
    def saving_on_sigterm(self, save: Callable[[], object]) -> Iterator[None]:
        with super().saving_on_sigterm(save):
            yield
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@saboteur("LIFE-9")
class HandlesSignals(FakeStrategy):
    """A strategy handles SIGTERM from its creation on."""

    def _begin(self) -> None:
        super()._begin()
        signal.signal(signal.SIGTERM, lambda number, frame: None)


@saboteur("LIFE-9")
class OneThread(FakeStrategy):
    """A strategy sets the number of torch's threads when it is created."""

    def _begin(self) -> None:
        super()._begin()
        torch.set_num_threads(torch.get_num_threads() + 1)


@saboteur("LOG-2")
class ZerosAreDropped(FakeStrategy):
    """log leaves out metrics that are 0."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        super().log({name: value for name, value in metrics.items() if value != 0}, step)
