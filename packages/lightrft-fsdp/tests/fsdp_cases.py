"""What a rank does in the tests: functions that `workers` call in their processes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import training
from fsdp_models import Layered, layered
from programs import DECAY, RATE, Observed, Program, tokens
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from lightrft.fsdp import FSDPV2Strategy, sharding
from lightrft.fsdp.backend import FSDPBackend
from lightrft.strategy.backend import WrapOptions


@contextmanager
def strategy(
    program: Program, kind: type[FSDPV2Strategy] = FSDPV2Strategy, **settings: Any
) -> Iterator[FSDPV2Strategy]:
    """A strategy for ``program``, closed in the end."""
    batch = program.accumulation_steps * int(os.environ["WORLD_SIZE"])
    with kind(device="cpu", max_norm=program.max_norm, train_batch_size=batch, **{"bf16": False, **settings}) as made:
        yield made


def prepared(made: FSDPV2Strategy, model: nn.Module | None = None) -> tuple[nn.Module, Optimizer]:
    """``model``, or a `Layered`, in training."""
    bare = layered(3 + made.get_rank()) if model is None else model
    optimizer = made.create_optimizer(bare, lr=RATE, weight_decay=DECAY)
    got: tuple[nn.Module, Optimizer, None] = made.prepare((bare, optimizer, None))
    return got[0], got[1]


def train_laid_out_otherwise(program: Program) -> Observed:
    """`train`, of a model whose matrices lie column by column."""
    with strategy(program) as made:
        bare = layered(3 + made.get_rank())
        for parameter in bare.parameters():
            parameter.data = parameter.data.t().contiguous().t() if parameter.ndim == 2 else parameter.data
        model, optimizer = prepared(made, bare)
        training.run(program, made, model, optimizer)
        return Observed(parameters=training.full_parameters(made, model))


def train(program: Program, build: Callable[[int], nn.Module] = layered, **settings: Any) -> Observed:
    """Run ``program``; every rank's model begins with other weights, of which rank 0's count."""
    with strategy(program, **settings) as made:
        model, optimizer = prepared(made, build(3 + made.get_rank()))
        results = training.run(program, made, model, optimizer)
        norms = [result.grad_norm for result in results if result.applied or result.skipped]
        return Observed(parameters=training.full_parameters(made, model), norms=norms)


def held(**settings: Any) -> tuple[int, list[int], set[torch.dtype]]:
    """Elements that this rank holds of a model in training, the sizes of its mesh, and their types."""
    with strategy(Program(), **settings) as made:
        model, _ = prepared(made)
        shards = made.backend.shards(made.unwrap_model(model))
        (mesh,) = {parameter.device_mesh for parameter in model.parameters()}
        return sum(shard.values.numel() for shard in shards), list(mesh.shape), {shard.values.dtype for shard in shards}


class TwoMeshBackend(FSDPBackend):
    """The second layer is whole on every rank, as experts may be sharded otherwise than what is around them."""

    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        assert isinstance(module, Layered)
        full_tensors = dict(module.named_parameters()) if self.world.rank == 0 else {}
        fully_shard(module.layers[1], mesh=self._mesh(1))
        fully_shard(module, mesh=self._mesh(-1))
        sharding.load_from_rank_0(module, full_tensors, self.world)
        return module


class OnTwoMeshes(FSDPV2Strategy):
    """Its backend has parameters on two meshes."""

    backend_class = TwoMeshBackend


def train_on_two_meshes(program: Program) -> Observed:
    return train(program, kind=OnTwoMeshes)


def prepared_in_two_ways(**settings: Any) -> list[dict[str, torch.Tensor]]:
    """The weights after preparing for training, and for inference."""
    with strategy(Program(), **settings) as made:
        model, _ = prepared(made)
        other = made.prepare(layered(3 + made.get_rank()))
        return [training.full_parameters(made, tensor) for tensor in (model, other)]


def built_on_rank_0_alone(in_training: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The weights, and an output, of a model whose memory only rank 0 had."""
    with strategy(Program()) as made:
        with made.init_model_context(meta_init=True):
            model: nn.Module = Layered() if made.get_rank() else layered()
        assert made.get_rank() == 0 or all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        model = prepared(made, model)[0] if in_training else made.prepare(model)
        inner = made.unwrap_model(model)
        assert isinstance(inner, Layered)
        assert inner.head.weight is inner.embed.weight
        return training.full_parameters(made, model), model(tokens(1)).detach()


def moved_about(cycles: bool, **settings: Any) -> dict[str, torch.Tensor]:
    """The weights after a few updates, with the model and the optimizer sent away and back before each."""
    program = Program(updates=4, accumulation_steps=2)
    with strategy(program, **settings) as made:
        model, optimizer = prepared(made)
        for update, micro, _ in program.micro_batches():
            made.backward(program.loss(model, update, micro, made.get_rank()), model, optimizer)
            if cycles:
                before = training.full_parameters(made, model)
                for _ in range(2):
                    made.offload_model(model)
                    made.maybe_offload_optimizer(optimizer)
                for _ in range(2):
                    made.reload_model(model)
                    made.maybe_load_optimizer(optimizer)
                assert all(
                    torch.equal(before[name], loader) for name, loader in training.full_parameters(made, model).items()
                )
            made.optimizer_step(optimizer, model)
        return training.full_parameters(made, model)


def stumbled(program: Program) -> dict[str, torch.Tensor]:
    """The weights after ``program``, with a forward that failed half-way before each update."""
    with strategy(program) as made:
        model, optimizer = prepared(made)
        for update, micro, _ in program.micro_batches():
            try:
                model(torch.full((1, 2), 99))  # no such token
            except IndexError:
                pass
            else:
                raise AssertionError("a token that is not in the vocabulary was taken")
            made.backward(program.loss(model, update, micro, made.get_rank()), model, optimizer)
            made.optimizer_step(optimizer, model)
        return training.full_parameters(made, model)


def saved(path: str) -> dict[str, torch.Tensor]:
    """The weights of a model that `save_model` wrote."""
    with strategy(Program()) as made:
        model, _ = prepared(made)
        made.save_model(model, None, path, dtype=torch.float32)
        return training.full_parameters(made, model)


class Matrices(nn.Module):
    """Matrices alone, whose rows do not divide among the ranks."""

    _no_split_modules = ["Linear"]

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.up, self.head = nn.Linear(6, 13, bias=False), nn.Linear(13, 17, bias=False)

    def forward(self, tokens_BT: torch.Tensor, detour: bool = False) -> torch.Tensor:
        logits_BTV: torch.Tensor = self.head(torch.tanh(self.up(self.embed(tokens_BT))))
        return logits_BTV


def matrices() -> Matrices:
    """A `Matrices`, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Matrices()


def with_optimizer(name: str, updates: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights after training with an optimizer of torch, and those of plain torch."""
    program = Program(updates=updates)
    with strategy(program) as made:
        model, reference = matrices(), matrices()
        model, optimizer, _ = made.prepare((model, getattr(torch.optim, name)(model.parameters(), lr=1e-2), None))
        training.run(program, made, model, optimizer)
        got = training.full_parameters(made, model)
        stepped = getattr(torch.optim, name)(reference.parameters(), lr=1e-2)
        for update in range(updates):
            for rank in range(made.world_size):
                (program.loss(reference, update, 0, rank) / made.world_size).backward()
            stepped.step()
            stepped.zero_grad()
    return got, {name: parameter.detach() for name, parameter in reference.named_parameters()}
