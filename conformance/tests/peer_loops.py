"""Training loops in one process, for tests of the promises: one that keeps them, and others that each break one."""

import os
import pickle
import random
import time
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from lightrft.conformance.peers import LoopSettings, NotOffered, Update

LINK = "https://example.org/collectives"


class Loop:
    """Keeps the promises of one process, except that collectives are not offered."""

    def __init__(self, settings: LoopSettings) -> None:
        self.settings, self.trained, self.counts = settings, {}, {}
        self.last = False

    def prepare(self, model: nn.Module, make_optimizer: Any, make_scheduler: Any = None) -> nn.Module:
        optimizer = make_optimizer(model.parameters())
        self.trained[model] = optimizer, make_scheduler(optimizer) if make_scheduler else None
        self.counts[model] = 0
        return model

    def batches(
        self, dataset: Any, *, batch_size: int, shuffle: bool = False, epoch: int = 0, consumed: int = 0
    ) -> Any:
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(epoch)) if shuffle else None
        return list(DataLoader(dataset, batch_size, sampler=sampler))[consumed:]

    def micro_batch(self, model: nn.Module, *, last: bool = False) -> Any:
        self.counts[model] += 1
        self.last = last
        return nullcontext()

    def backward(self, loss: torch.Tensor, model: nn.Module, *, retain_graph: bool = False) -> None:
        loss.backward(retain_graph=retain_graph)

    def step(self, model: nn.Module) -> Update | None:
        if self.counts[model] < self.settings.accumulation_steps and not self.last:
            return None
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= self.counts[model]
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.settings.max_norm or float("inf"))
        self.counts[model] = 0
        self.update(model, norm)
        self.trained[model][0].zero_grad()
        return Update(norm=float(norm))

    def update(self, model: nn.Module, norm: torch.Tensor) -> None:
        optimizer, scheduler = self.trained[model]
        if norm.isfinite():
            optimizer.step()
            if scheduler:
                scheduler.step()

    def weights(self, model: nn.Module) -> Mapping[str, torch.Tensor]:
        return model.state_dict()

    def learning_rate(self, model: nn.Module) -> float:
        return float(self.trained[model][0].param_groups[0]["lr"])

    def all_reduce(self, value: Any, op: str) -> Any:
        raise NotOffered("one process", LINK)

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotOffered("one process", LINK)

    def save(self, folder: Path, model: nn.Module, progress: Mapping[str, int]) -> None:
        folder.mkdir(exist_ok=True)
        optimizer, scheduler = self.trained[model]
        states = [model.state_dict(), optimizer.state_dict(), scheduler and scheduler.state_dict()]
        streams = [
            random.getstate(),
            torch.get_rng_state(),
            list(np.random.get_state())[2:],
            np.random.get_state()[1].tolist(),
        ]
        torch.save([*states, streams, dict(progress)], folder / "new")
        content = (folder / "new").read_bytes()
        (folder / "new").write_bytes(zlib.crc32(content).to_bytes(4) + content)
        os.replace(folder / "new", folder / "state")

    def load(self, folder: Path, model: nn.Module) -> Mapping[str, int]:
        content = (folder / "state").read_bytes()
        if zlib.crc32(content[4:]).to_bytes(4) != content[:4]:
            raise ValueError("damaged")
        (folder / "copy").write_bytes(content[4:])
        weights, moments, schedule, streams, progress = torch.load(folder / "copy")
        (folder / "copy").unlink()
        model.load_state_dict(weights)
        optimizer, scheduler = self.trained[model]
        optimizer.load_state_dict(moments)
        if scheduler:
            scheduler.load_state_dict(schedule)
        python, torchs, (position, *gauss), keys = streams
        random.setstate((python[0], tuple(python[1]), python[2]))
        torch.set_rng_state(torchs)
        np.random.set_state(("MT19937", np.array(keys, np.uint32), position, *gauss))
        return progress

    def close(self) -> None:
        pass


class Sums(Loop):
    """Adds up the gradients of a window."""

    def step(self, model: nn.Module) -> Update | None:
        for parameter in model.parameters():
            if parameter.grad is not None and self.counts[model] == self.settings.accumulation_steps:
                parameter.grad *= self.counts[model]
        return super().step(model)


class TakesAll(Loop):
    """Applies gradients that are not finite."""

    def update(self, model: nn.Module, norm: torch.Tensor) -> None:
        self.trained[model][0].step()


class Refuses(Loop):
    """Raises where the gradient is not finite."""

    def update(self, model: nn.Module, norm: torch.Tensor) -> None:
        if not norm.isfinite():
            raise FloatingPointError("not finite")
        super().update(model, norm)


class Raises(Loop):
    """Raises in every update."""

    def update(self, model: nn.Module, norm: torch.Tensor) -> None:
        raise RuntimeError("every update fails")


class Hangs(Loop):
    """Never ends an update."""

    def update(self, model: nn.Module, norm: torch.Tensor) -> None:
        time.sleep(10_000)


class Careless(Loop):
    """Writes checkpoints in place, as pickles, and believes what it reads; forgets the random streams."""

    def save(self, folder: Path, model: nn.Module, progress: Mapping[str, int]) -> None:
        folder.mkdir(exist_ok=True)
        state = model.state_dict(), self.trained[model][0].state_dict(), dict(progress)
        (folder / "state").write_bytes(pickle.dumps(_exchange(state, torch.Tensor, torch.Tensor.numpy)))

    def load(self, folder: Path, model: nn.Module) -> Mapping[str, int]:
        state = _exchange(pickle.loads((folder / "state").read_bytes()), np.ndarray, torch.from_numpy)
        model.load_state_dict(state[0])
        self.trained[model][0].load_state_dict(state[1])
        progress: Mapping[str, int] = state[2]
        return progress


class Forgets(Loop):
    """Loads all but the state of the optimizer."""

    def load(self, folder: Path, model: nn.Module) -> Mapping[str, int]:
        progress = super().load(folder, model)
        self.trained[model][0].state.clear()
        return progress


class Postpones(Loop):
    """Writes the second checkpoint after `close`, if there is one."""

    def save(self, folder: Path, model: nn.Module, progress: Mapping[str, int]) -> None:
        if not folder.exists():
            super().save(folder, model, progress)


class Narrow(Loop):
    """Shows weights with the first column only."""

    def weights(self, model: nn.Module) -> Mapping[str, torch.Tensor]:
        return {name: tensor[..., 0] if tensor.ndim > 1 else tensor for name, tensor in super().weights(model).items()}


def _exchange(value: Any, kind: type, made: Any) -> Any:
    """A nested value with ``made(leaf)`` for each leaf of ``kind``."""
    if isinstance(value, kind):
        return made(value)
    if isinstance(value, dict):
        return {key: _exchange(each, kind, made) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_exchange(each, kind, made) for each in value)
    return value


class Restarts(Loop):
    """Begins each resumed epoch anew, in another order."""

    def batches(self, dataset: Any, **position: Any) -> Any:
        return super().batches(dataset, **position | {"consumed": 0})
