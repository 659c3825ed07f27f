"""What a rank does in `test_fsdp_checkpoints`."""

import os
import signal
from typing import Any
from unittest.mock import patch

import fsdp_cases
import pytest
import torch
import training
from programs import Program, tokens

from lightrft.config import CheckpointError, LightRFTError, StrategyError
from lightrft.strategy.checkpoint import background, plan


def failing(step: str, path: str) -> str:
    """What a rank is told where ``step`` of a save in the background fails on rank 1."""

    def fails(*_: Any) -> None:
        raise CheckpointError("no memory")

    steps = {
        "comparing": (plan, "_buffer_checksums"),
        "assigning": (plan, "_check_covered"),
        "copying": (background.Staging, "copies"),
    }
    with fsdp_cases.strategy(Program(), async_ckpt=True, timeout=10.0) as made:
        model, _ = fsdp_cases.prepared(made)
        replaced = patch.object(*steps[step], fails if made.get_rank() else getattr(*steps[step]))
        with replaced, pytest.raises(LightRFTError) as caught:
            made.save_ckpt(model, path)
        made.save_ckpt(model, path)  # nobody was left waiting
        return str(caught.value)


def terminated(path: str) -> int:
    """The index of the last update of a run of which rank 1 alone gets SIGTERM, in its third update."""
    program = Program(updates=6)
    with fsdp_cases.strategy(program) as made:
        model, optimizer = fsdp_cases.prepared(made)
        with made.saving_on_sigterm(lambda: made.save_ckpt(model, path)):
            for update, micro, _ in program.micro_batches():
                training.backward(program, made, model, optimizer, update, micro)
                if update == 2 and made.get_rank() == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                made.optimizer_step(optimizer, model)
                if made.stop_requested:
                    break
        return update


def went_on(path: str, done: int) -> dict[str, torch.Tensor]:
    """The weights after six updates, the first ``done`` of which are in a checkpoint.

    A forward before it is loaded leaves the root's parameters gathered.
    """
    program = Program(updates=6, skipped=range(done))
    with fsdp_cases.strategy(program) as made:
        model, optimizer = fsdp_cases.prepared(made)
        if done:
            with torch.no_grad():
                model(tokens(0))
            made.load_ckpt(model, path)
        training.run(program, made, model, optimizer)
        return training.full_parameters(made, model)


def sample_order(path: str, first: int | None = None) -> list[list[int]]:
    """The samples that this rank sees in an epoch: with ``first`` so many batches, then saved; without, what is left."""
    with fsdp_cases.strategy(Program()) as made:
        model, _ = fsdp_cases.prepared(made)
        if first is None:
            made.load_ckpt(model, path)
        batches = iter(made.setup_dataloader(list(range(48)), batch_size=2))
        if first is None:
            return [batch.tolist() for batch in batches]
        seen = [next(batches).tolist() for _ in range(first)]
        made.save_ckpt(model, path)
        return seen


def named_on_one_rank(path: str) -> str:
    """What a rank is told where rank 1 alone passes no model."""
    with fsdp_cases.strategy(Program(), timeout=20.0) as made:
        model, _ = fsdp_cases.prepared(made)
        with pytest.raises(StrategyError) as caught:
            made.save_ckpt(None if made.get_rank() else model, path)
        made.save_ckpt(model, path)
        return str(caught.value)
