"""The training loops that are compared: this layer, the bare backend, Accelerate and Lightning Fabric.

Each loop makes the same update: the mean gradient of K micro-batches over all ranks, clipped, then AdamW with one parameter
group, since DeepSpeed has collectives for each group. Each uses what its library offers for accumulation and clipping, as its
documentation shows.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightrft.strategy import StrategyBase

Update = Callable[[Sequence[torch.Tensor]], object]
"""An update from one micro-batch per element."""
MAX_NORM, RATE = 1.0, 1e-4


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    if batch.is_floating_point():
        return model(batch).square().mean()
    return model(batch, labels=batch).loss


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)


def with_strategy(strategy: StrategyBase, model: nn.Module, *, denominators: bool = False) -> Update:
    """This layer; with ``denominators``, each loss counts as a sum over the elements of its micro-batch."""
    model, optimizer, _ = strategy.prepare((model, adamw(model), None))

    def update(batches: Sequence[torch.Tensor]) -> None:
        for batch in batches:
            items = batch.numel() if denominators else None
            strategy.backward(loss_of(model, batch), model, optimizer, denominator=items)
            strategy.optimizer_step(optimizer, model)

    return update


# Bare backends


def plain(model: nn.Module) -> Update:
    """PyTorch in one process or, on several ranks, with `DistributedDataParallel`."""
    wrapped: Any = DistributedDataParallel(model, broadcast_buffers=False) if dist.is_initialized() else model
    optimizer = adamw(model)

    def update(batches: Sequence[torch.Tensor]) -> None:
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last or wrapped is model else wrapped.no_sync():
                (loss_of(wrapped, batch) / len(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return update


def fsdp(model: Any, *, shards: int | None = None) -> Update:
    """FSDP2, which reduces the gradient in each backward pass unless told otherwise; so does this layer.

    With ``shards``, that many ranks share one copy of the parameters.
    """
    shard(model, shards)
    optimizer = adamw(model)

    def update(batches: Sequence[torch.Tensor]) -> None:
        for batch in batches:
            (loss_of(model, batch) / len(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return update


def shard(model: Any, shards: int | None = None) -> Any:
    mesh = None
    if shards is not None:
        shape = (dist.get_world_size() // shards, shards)
        mesh = init_device_mesh(next(model.parameters()).device.type, shape, mesh_dim_names=("replicate", "shard"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def zero(stage: int, accumulation: int) -> Callable[[nn.Module], Update]:
    def make(model: nn.Module) -> Update:
        engine = zero_engine(stage, accumulation, model)

        def update(batches: Sequence[torch.Tensor]) -> None:
            for batch in batches:
                engine.backward(loss_of(engine, batch))
                engine.step()

        return update

    return make


def zero_engine(stage: int, accumulation: int, model: nn.Module) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model), config=ds_config(stage, accumulation))
    return engine


def ds_config(stage: int, accumulation: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": stage, "overlap_comm": False},  # as in this layer
        "zero_allow_untested_optimizer": True,
    }


# Accelerate


def accelerate(accumulation: int, *, stage: int | None = None) -> Callable[[nn.Module], Update]:
    """Accelerate in one process, with DDP or, with ``stage``, with DeepSpeed. Its FSDP2 plugin is ignored on CPUs."""

    def make(model: nn.Module) -> Update:
        from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs

        device = next(model.parameters()).device
        plugin = None
        if stage is not None:
            plugin = DeepSpeedPlugin(hf_ds_config=ds_config(stage, accumulation))
        accelerator = Accelerator(
            cpu=device.type == "cpu" and stage is None,  # with cpu=True, it ignores the plugin and uses DDP
            gradient_accumulation_steps=accumulation,
            deepspeed_plugin=plugin,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        wrapped, optimizer = accelerator.prepare(model, adamw(model))
        if stage is not None and not hasattr(wrapped, "zero_optimization_stage"):
            raise RuntimeError(f"accelerate: expected a DeepSpeed engine from prepare(), got {type(wrapped).__name__}")

        def update(batches: Sequence[torch.Tensor]) -> None:
            for batch in batches:
                with accelerator.accumulate(wrapped):
                    accelerator.backward(loss_of(wrapped, batch))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), MAX_NORM)
                    optimizer.step()
                    optimizer.zero_grad()

        return update

    return make


# Lightning Fabric


def fabric(*, sharded: bool = False) -> Callable[[nn.Module], Update]:
    """Lightning Fabric in one process, with DDP or, ``sharded``, with FSDP2."""

    def make(model: nn.Module) -> Update:
        import lightning_fabric
        from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

        device = next(model.parameters()).device
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        strategy: Any = "auto" if ranks == 1 else DDPStrategy(process_group_backend="gloo", broadcast_buffers=False)
        if sharded:
            strategy = ModelParallelStrategy(
                parallelize_fn=lambda module, _: shard(module),
                data_parallel_size=ranks,
                tensor_parallel_size=1,
                process_group_backend="gloo",
            )
        made = lightning_fabric.Fabric(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=ranks, strategy=strategy
        )
        made.launch()
        wrapped: Any = made.setup_module(model)
        optimizer: Any = made.setup_optimizers(adamw(wrapped))

        def update(batches: Sequence[torch.Tensor]) -> None:
            for index, batch in enumerate(batches):
                last = index == len(batches) - 1
                # FSDP2 reduces in each backward pass, as in the other loops
                with nullcontext() if last or sharded or ranks == 1 else made.no_backward_sync(wrapped):
                    made.backward(loss_of(wrapped, batch) / len(batches))
            made.clip_gradients(wrapped, optimizer, max_norm=MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()

        return update

    return make
