"""The reference: the same programs in plain PyTorch, in one process, for all ranks at once.

It shares no code with what it judges, and predicts the results of training, not how a backend computes them.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightrft.conformance import models, sequences
from lightrft.conformance.reference_model import Averaging, ReferenceModel
from lightrft.conformance.values import Record


class Reference:
    """Runs a program in plain PyTorch, and predicts the observation of each operation."""

    def __init__(self, world: int, averaging: Averaging = "per update") -> None:
        self.world, self.averaging = world, averaging
        self.models: dict[str, ReferenceModel] = {}
        self.averaged: dict[tuple[str, str], int] = {}
        """By average and model, the updates of the model that the average includes."""
        self.engine, self.sleeping, self.version = "absent", False, 0
        self.synced: nn.Module | None = None

    def run(self, settings: Record, operations: Sequence[Record]) -> list[Any]:
        """The prediction for each operation, or None if there is none."""
        self.world //= settings.get("sp_size", 1)  # ranks that share sequences count as one
        accumulation_steps = settings.get("train_batch_size", 128) // (
            settings.get("micro_train_batch_size", 1) * self.world
        )
        max_norm = settings.get("max_norm", 1.0)
        self.sleeping = settings.get("enable_engine_sleep", False)
        predictions: list[Any] = []
        for operation in operations:
            if {"optimizer_of", "loss_of"} & operation.keys():  # must raise
                predictions.append(None)
                continue
            arguments = {key: value for key, value in operation.items() if key not in ("do", "ranks", "may_fail")}
            handler = getattr(self, "_" + operation["do"], None)
            if operation["do"] == "build":
                self._build(accumulation_steps=accumulation_steps, max_norm=max_norm, **arguments)
                predictions.append(None)
            else:
                predictions.append(None if handler is None else handler(**arguments))
        return predictions

    def _build(
        self,
        accumulation_steps: int,
        max_norm: float | None,
        model: str,
        kind: str = "regressor",
        seed: int = 0,
        **_: object,
    ) -> None:
        self.models[model] = ReferenceModel(
            kind=kind,
            module=models.build(kind, seed),
            world=self.world,
            accumulation_steps=accumulation_steps,
            max_norm=max_norm,
            averaging=self.averaging,
        )
        self.averaged |= {(model, source): trained.updates for source, trained in self.models.items()}

    def _optimizer(
        self, model: str, lr: float = 1e-3, weight_decay: float = 0.0, plain_adamw: bool = False, **more: object
    ) -> None:
        self.models[model].train_with(lr, weight_decay, all_decay=plain_adamw, **more)

    def _own_optimizer(self, model: str, algorithm: str, lr: float) -> None:
        trained = self.models[model]
        trained.optimizer = models.OPTIMIZERS[algorithm](trained.module.parameters(), lr=lr)

    def _add_group(self, model: str, part: str, lr: float) -> None:
        trained = self.models[model]
        module = trained.module.get_submodule(part).requires_grad_(True)
        trained.optimizer.add_param_group({"params": list(module.parameters()), "lr": lr})

    def _write_weights(self, model: str, part: str, factor: float) -> None:
        with torch.no_grad():
            for parameter in self.models[model].module.get_submodule(part).parameters():
                parameter.mul_(factor)

    def _schedule(self, model: str, decay: float = 0.5) -> None:
        self.models[model].schedule(decay)

    def _backward(
        self,
        model: str,
        batch: int,
        rows: int = 2,
        weight: float = 1.0,
        poison: str | None = None,
        poisoned_rank: int = 0,
        **_: object,
    ) -> list[float]:
        return self.models[model].backward(batch, rows, weight, poison, poisoned_rank)

    def _backward_over(
        self, model: str, sequences: Sequence[Sequence[int]], denominators: Sequence[float | None] | None = None,
        weight: float = 1.0, **_: object,
    ) -> list[float]:  # fmt: skip
        return self.models[model].backward_over(sequences, denominators, weight)

    def _sequence_backward(
        self, model: str, batch: int, form: str, length: int = 13, gathered: bool = True, data_of: int | None = None,
        denominator: bool = False, denominator_of_slice: bool = False,
    ) -> list[Record] | None:  # fmt: skip
        if not gathered:
            return None
        return self.models[model].sequence_backward(batch, form, length, data_of, denominator, denominator_of_slice)

    def _sequence_forward(
        self, model: str, batch: int, form: str, length: int = 13, **_: object
    ) -> list[dict[str, torch.Tensor]]:
        module = self.models[model].module
        batches = [sequences.batch(batch, rank, form, length) for rank in range(self.world)]
        with torch.no_grad():
            return [{"log_probs": sequences.log_probs(module, tensors)} for tensors in batches]

    def _policy_backward(
        self, model: str, batch: int, rows: int = 2, temperature: float = 1.0, packed: bool = False
    ) -> list[dict[str, torch.Tensor]]:
        return self.models[model].policy_backward(batch, rows, temperature, packed)

    def _step(
        self, model: str, boundary: bool | None = None, scheduled: bool = False, wrong: str | None = None, **_: object
    ) -> Record:
        return self.models[model].step(boundary, scheduled, refused=wrong is not None)

    def _train_planned(self, model: str, sequences: Sequence[Sequence[int]], **_: object) -> Record:
        self.models[model].backward_over(sequences, None, 1.0)
        return self.models[model].step(boundary=True, scheduled=False)

    def _weights(self, model: str) -> dict[str, torch.Tensor]:
        return self.models[model].weights()

    def _buffers(self, model: str) -> list[dict[str, torch.Tensor]]:
        return [{name: buffer.clone() for name, buffer in rank.items()} for rank in self.models[model].buffers]

    def _prepare_inference(self, model: str, **_: object) -> None:
        self.models[model].module.eval()

    def _set_mode(self, model: str, part: str, training: bool) -> None:
        self.models[model].module.get_submodule(part).train(training)

    def _freeze(self, model: str, part: str, trainable: bool = False) -> None:
        self.models[model].module.get_submodule(part).requires_grad_(trainable)

    def _hook(self, model: str, parameter: str) -> None:
        self.models[model].module.get_parameter(parameter).register_hook(models.every_other_row)

    def _set_rate(self, model: str, lr: float, decayed: bool = False) -> None:
        self.models[model].set_rate(lr, decayed)

    def _set_decay(self, model: str, weight_decay: float) -> None:
        self.models[model].set_decay(weight_decay)

    def _set_betas(self, model: str, betas: Sequence[float]) -> None:
        self.models[model].set_adam(betas=tuple(betas))

    def _set_group(self, model: str, group: int, values: Record) -> None:
        self.models[model].optimizer.param_groups[group].update(values)

    def _set_eps(self, model: str, eps: float) -> None:
        self.models[model].set_adam(eps=eps)

    def _backward_twice(self, model: str, batch: int) -> None:
        self.models[model].backward(batch, 2, 1.5, None, 0)

    def _forward(self, model: str, batch: int, rows: int = 2, **more: object) -> list[torch.Tensor]:
        source = self.models[model]
        language = models.is_language(source.module)
        with torch.no_grad():
            return [
                models.logits_of(source.on(rank), models.batch(batch, rank, rows, language)[0], **more)
                for rank in range(self.world)
            ]

    def _average(self, model: str, into: str, beta: float) -> None:
        source, target = self.models[model], self.models[into]
        if self.averaged.get((into, model), 0) == source.updates:
            return
        self.averaged[into, model] = source.updates
        for averaged, trained in zip(target.module.parameters(), source.module.parameters(), strict=True):
            if trained.requires_grad:
                averaged.data.mul_(beta).add_(trained.data, alpha=1 - beta)

    # The engine: absent, awake or asleep, with the weights of the last sync

    def _engine(self, actor: str | None = None, **_: object) -> str:
        self.engine = "awake"
        if actor is not None:
            self._sync(actor)
        return self._sleep()

    def _sync(self, model: str) -> int:
        self.synced, self.engine = copy.deepcopy(self.models[model].module), "awake"
        self.version += 1
        return self.version

    def _sleep(self, **_: object) -> str:
        if self.sleeping and self.engine == "awake":
            self.engine = "asleep"
        return self.engine

    def _wake(self) -> str:
        self.engine = "awake" if self.engine == "asleep" else self.engine
        return self.engine

    def _status(self) -> str:
        return self.engine

    def _generate(self, stay_awake: bool = False, **_: object) -> nn.Module | None:
        """The model that generates the completions."""
        self._wake()
        if not stay_awake:
            self._sleep()
        return self.synced
