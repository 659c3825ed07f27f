"""What a rank does in `test_deepspeed_offload`."""

from typing import Any

import ds_cases
import torch
import training
from programs import DECAY, RATE, Observed, Program, loss_of, mixed, tokens
from torch import nn

from lightrft.strategy import StrategyBase


def compiled() -> None:
    """Build DeepSpeed's CPU Adam, if it has not been built."""
    with ds_cases.strategy(Program(), zero_stage=1, adam_offload=True) as made:
        made.create_optimizer(mixed())


def with_the_callers_adamw(program: Program, **settings: Any) -> Observed:
    with ds_cases.strategy(program, adam_offload=True, **settings) as made:
        model: nn.Module = mixed()
        optimizer = torch.optim.AdamW(
            [tensor for tensor in model.parameters() if tensor.requires_grad], lr=RATE, weight_decay=0.0
        )
        model, optimizer, _ = made.prepare((model, optimizer, None))
        training.run(program, made, model, optimizer)
        return Observed(parameters=training.full_parameters(made, model))


def moved_about(cycles: bool, **settings: Any) -> dict[str, torch.Tensor]:
    program = Program(updates=4, accumulation_steps=2)
    with ds_cases.strategy(program, persist=True, **settings) as made:
        model: nn.Module = mixed()
        model, optimizer, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        for update, micro, _ in program.micro_batches():
            made.backward(loss_of(model, tokens(update, micro, made.get_rank())), model, optimizer)
            if cycles:
                before = training.full_parameters(made, model)
                for _ in range(2):
                    made.offload_model(model)
                    made.maybe_offload_optimizer(optimizer)
                for _ in range(2):
                    made.reload_model(model)
                    made.maybe_load_optimizer(optimizer)
                now = training.full_parameters(made, model)
                assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
            made.optimizer_step(optimizer, model)
        return training.full_parameters(made, model)


def offloaded(**settings: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """Offload a model as on a device: bytes it held beside its optimizer's state, and the weights that follow."""
    program = Program(updates=4, accumulation_steps=2)
    with ds_cases.strategy(program, persist=False, **settings) as made:
        model: nn.Module = mixed()
        model, optimizer, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        backend, inner, freed = made.backend, made.unwrap_model(model), 0
        for update, micro, _ in program.micro_batches():
            made.backward(loss_of(model, tokens(update, micro, made.get_rank())), model, optimizer)
            backend.reshard(inner)
            tensors = [tensor for tensor in backend.tensors_on_device(inner) if tensor.numel()]
            storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
            before = sum(storage.nbytes() for storage in storages.values())
            backend.offload(inner)
            freed = before - sum(storage.nbytes() for storage in storages.values())
            backend.reload(inner)
            made.optimizer_step(optimizer, model)
        return freed, training.full_parameters(made, model)


def resumed(path: str, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights after an uninterrupted run, and after one that went on from a checkpoint, twice, of its optimizer."""
    with ds_cases.strategy(Program(), adam_offload=True, **settings) as made:
        model, optimizer = _updated(made, *_in_training(made), range(26))
        made.save_ckpt(model, path)
        uninterrupted = training.full_parameters(made, _updated(made, model, optimizer, range(26, 32))[0])
        other, its = _in_training(made)
        for _ in range(2):
            made.load_ckpt(other, path)
            _updated(made, other, its, range(26, 32))
        return uninterrupted, training.full_parameters(made, other)


def _in_training(made: StrategyBase) -> tuple[nn.Module, Any]:
    model: nn.Module = mixed()
    model, optimizer, _ = made.prepare((model, made.create_optimizer(model, lr=0.1, weight_decay=DECAY), None))
    return model, optimizer


def _updated(made: StrategyBase, model: nn.Module, optimizer: Any, updates: range) -> tuple[nn.Module, Any]:
    for update in updates:
        made.backward(loss_of(model, tokens(update, 0, made.get_rank())), model, optimizer)
        made.optimizer_step(optimizer, model)
    return model, optimizer


def saved_offloaded(path: str) -> dict[str, torch.Tensor]:
    """Save a model that DeepSpeed's CPU Adam trained; its weights after one update more."""
    with ds_cases.strategy(Program(), zero_stage=2, adam_offload=True) as made:
        model, optimizer = _updated(made, *_in_training(made), range(2))
        made.save_ckpt(model, path)
        return training.full_parameters(made, _updated(made, model, optimizer, range(2, 3))[0])


def loaded_onto_the_device(path: str) -> dict[str, torch.Tensor]:
    """The weights after one update by torch's AdamW that went on from `saved_offloaded`."""
    with ds_cases.strategy(Program(), zero_stage=3) as made:
        model, optimizer = _in_training(made)
        made.load_ckpt(model, path)
        return training.full_parameters(made, _updated(made, model, optimizer, range(2, 3))[0])
