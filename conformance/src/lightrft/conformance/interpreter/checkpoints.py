"""Operations that save and load checkpoints, list them, and damage them.

The checkpoints of a program are below one directory, the same for all ranks, which `empty_disk` clears.
"""

import contextlib
import copy
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.interpreter.session import Session, operation
from lightrft.conformance.interpreter.training import optimizer_state
from lightrft.conformance.scratch import scratch
from lightrft.conformance.values import digest, plain
from lightrft.strategy import FakeStrategy, StrategyBase, StrategyConfig
from lightrft.strategy.backend import World
from lightrft.strategy.checkpoint.checkpoint_items import Models
from lightrft.strategy.fake_strategy import FakeBackend

GLOBAL_ROWS = 12
"""Rows of one update over all ranks; divisible by 1, 2, 3, 4, 6 and 12 ranks."""

CLIENT_STATES: Mapping[str, dict[object, object]] = {
    "none": {},
    "plain": {"step": 3, "name": "run", "rate": 0.1, "flags": [True, False, None], "nested": {"a": {"b": [1, 2.5]}}},
    "exact": {
        "tuple": (1, (2, [3, ()]), True, None),
        7: "an int key",
        "bytes": b"\x00\xff",
        "big": 2**80 + 1,
        "ends": [1e308, 5e-324, -0.0],
    },
    "infinite": {"best": float("inf"), "worst": float("-inf")},
    "marked": {"$tuple": [1], "$": {"$dict": 2}, "text": "\u00e9\u4e2d\ud800"},
}
UNSTORABLE = ("object", "function", "tensor", "set", "recursive", "deep key")


def _unstorable(what: str) -> dict[object, object]:
    recursive: dict[object, object] = {}
    recursive["self"] = recursive
    values: dict[str, dict[object, object]] = {
        "object": {"a": [object()]},
        "function": {"a": _unstorable},
        "tensor": {"a": torch.zeros(2)},
        "set": {"a": {1, 2}},
        "recursive": recursive,
        "deep key": {"a": {frozenset({1}): 2}},
    }
    return values[what]


def disk() -> Path:
    """The directory of the checkpoints."""
    return scratch("checkpoints")


@operation
def empty_disk(session: Session, keep: bool = True) -> None:
    """Remove all checkpoints; without ``keep``, their directory too."""
    allow_writes(session)
    if session.rank == 0:
        shutil.rmtree(disk(), ignore_errors=True)
        if keep:
            disk().mkdir(parents=True)


def _models(session: Session, model: str | list[str]) -> Models:
    if isinstance(model, str):
        return session.models[model].model
    return {name: session.models[name].model for name in model}


@operation
def save(
    session: Session, model: str | list[str], store: str = "s", client: str | None = None, explicit: bool = False,
    room: float | None = None, **more: Any,
) -> dict[str, object]:  # fmt: skip
    """save_ckpt; the path, and the names of what changed in the state of this process.

    ``explicit``: pass the optimizer and the scheduler as arguments. ``room``: max_mem, as a multiple of the largest
    checkpoint in the store.
    """
    if room is not None:
        more["max_mem"] = room * _largest(session, store) / 1e9
    if client is not None:
        more["client_state"] = _unstorable(client) if client in UNSTORABLE else copy.deepcopy(CLIENT_STATES[client])
    if explicit and isinstance(model, str):
        entry = session.models[model]
        more |= {"optimizer": entry.optimizer, "scheduler": entry.scheduler}
    before = _fingerprint(session)
    path = session.strategy.save_ckpt(_models(session, model), disk() / store, **more)
    more.get("client_state", {}).clear()  # as a script may change its own dict afterwards
    after = _fingerprint(session)
    changed = sorted(
        name for name in before.keys() | after.keys() if digest(before.get(name)) != digest(after.get(name))
    )
    return {"path": str(path.relative_to(disk())), "changed": changed}


def _largest(session: Session, store: str) -> int:
    """The bytes of tensors in the largest checkpoint of the store. Ranks wait for each other before going on."""
    folders = [path for path in (disk() / store).iterdir() if path.is_dir()]
    largest = max(sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders)
    session.strategy.sync_and_clear_cache()
    return largest


@operation
def load(
    session: Session, model: str | list[str], store: str = "s", client: str = "none", **more: Any
) -> dict[str, object]:
    """load_ckpt; the path, and whether the client state equals ``client``, including the types of containers."""
    path, state = session.strategy.load_ckpt(_models(session, model), disk() / store, **more)
    return {"path": str(path.relative_to(disk())), "client": _alike(state, CLIENT_STATES[client])}


@operation
def fingerprint(session: Session) -> dict[str, object]:
    """Everything that a load may change on this rank: weights, optimizer, scheduler, random states, positions."""
    return _fingerprint(session)


def _fingerprint(session: Session) -> dict[str, object]:
    values = _random_states()
    for model, entry in sorted(session.models.items()):
        module = session.strategy.unwrap_model(entry.model)
        parts: dict[str, object] = dict(session.weights(entry.model))
        parts |= {f"buffer {name}": buffer for name, buffer in module.named_buffers()}
        parts |= {f"gradient of {name}": parameter.grad for name, parameter in module.named_parameters()}
        parts |= optimizer_state(session, entry)
        for number, group in enumerate(entry.optimizer.param_groups if entry.optimizer is not None else ()):
            parts |= {f"{name} of group {number}": value for name, value in group.items() if name != "params"}
        if entry.scheduler is not None:
            parts |= {f"scheduler {name}": value for name, value in entry.scheduler.state_dict().items()}
        values |= {f"model {model}: {name}": plain(value) for name, value in parts.items()}
    for name, value in session.memory.items():
        if hasattr(value, "consumed_samples"):
            values |= {f"loader {name}: {part}": position for part, position in value.state_dict().items()}
    return values


def _alike(left: object, right: object) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(_alike(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(_alike(a, b) for a, b in zip(left, right, strict=True))
    return repr(left) == repr(right)  # 0.0 equals -0.0


@operation
def random_state(session: Session) -> dict[str, object]:
    """Digests of the random states of this process."""
    return _random_states()


def _random_states() -> dict[str, object]:
    states = {"Python": random.getstate(), "NumPy": repr(np.random.get_state()), "torch": torch.get_rng_state()}
    return {f"{library}'s generator": digest(state) for library, state in states.items()}


@operation
def rest_of_epoch(session: Session, name: str) -> list[object]:
    """The samples of a loader from its position to the end of the epoch."""
    data_loader = session.memory[name]
    data_loader.set_epoch(data_loader.epoch)
    return [batch.tolist() for batch in data_loader]


@operation
def refuse_writes(session: Session) -> None:
    """Limit every file of this process to a few bytes, so that the system refuses writes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@operation
def allow_writes(session: Session) -> None:
    """Undo `refuse_writes`."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


# The disk


@operation
def visible_names(session: Session, store: str = "s") -> list[str]:
    """The directories in a store, sorted. Ranks wait for each other before going on."""
    names = sorted(path.name for path in (disk() / store).iterdir() if path.is_dir())
    session.strategy.sync_and_clear_cache()
    return names


@operation
def foreign_directory(session: Session, store: str, name: str, text: str = "keep me") -> None:
    """Create a directory in the store that is not a checkpoint."""
    if session.rank == 0:
        (disk() / store / name).mkdir(parents=True)
        (disk() / store / name / "notes.txt").write_text(text)


@operation
def rename(session: Session, store: str, old: str, new: str) -> None:
    """Rename a directory in the store."""
    if session.rank == 0:
        (disk() / store / old).rename(disk() / store / new)


@operation
def damage(
    session: Session, what: str, file: int, at: float = 0.5, bit: int = 0, store: str = "s", tag: str = "t"
) -> str:
    """Damage the ``file``-th file of a checkpoint; returns its name.

    ``what``: "flip" a bit, "flip in optimizer" a bit of optimizer state if the file has any, "truncate" or "remove".
    """
    if session.rank != 0:
        return ""
    paths = sorted((disk() / store / tag).iterdir())
    path = paths[file % len(paths)]
    size = path.stat().st_size
    offset = min(size - 1, int(at * size))
    if what == "remove":
        path.unlink()
    elif what == "truncate":
        os.truncate(path, offset)
    else:
        data = bytearray(path.read_bytes())
        data[_in_optimizer(data) or offset if "optimizer" in what else offset] ^= 1 << bit
        path.write_bytes(data)
    return path.name


def _in_optimizer(data: bytearray) -> int | None:
    """The offset of optimizer state in a safetensors file, or None."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        return None
    header = json.loads(data[8 : 8 + length])
    begins = (entry["data_offsets"][0] for name, entry in header.items() if "/optimizer/exp_avg/" in name)
    return next((8 + length + begin for begin in begins), None)


class _Canary:
    """Creates a directory when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.makedirs, (self.path,)


@operation
def plant_pickles(session: Session, replace: bool, store: str = "s", tag: str = "t") -> None:
    """Put pickles that run code into a checkpoint: in place of its files, or next to them under likely names."""
    if session.rank != 0:
        return
    poison = pickle.dumps(_Canary(str(disk() / "executed")))
    folder = disk() / store / tag
    likely = [
        ".metadata",
        "data.pkl",
        "mp_rank_00_model_states.pt",
        "random_states.pkl",
        "client_state.pt",
        "state.bin",
    ]
    for path in [*folder.iterdir()] if replace else [folder / name for name in likely]:
        path.write_bytes(poison)


@operation
def pickle_executed(session: Session) -> bool:
    """Whether one of these pickles was loaded."""
    return (disk() / "executed").exists()


@operation
def load_poisoned(session: Session, model: str, store: str = "s", tag: str = "t") -> dict[str, bool]:
    """For each file of a checkpoint, put such a pickle in its place, and load; whether the pickle was loaded."""
    folder, executed = disk() / store / tag, {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    poison = pickle.dumps(_Canary(str(disk() / "executed")))
    for name in names:
        content = (folder / name).read_bytes()
        session.strategy.sync_and_clear_cache()
        _on_rank_0(session, lambda name=name: (folder / name).write_bytes(poison))  # type: ignore[misc]
        with contextlib.suppress(Exception):
            session.strategy.load_ckpt(_models(session, model), disk() / store, tag)
        session.strategy.sync_and_clear_cache()
        executed[name] = pickle_executed(session)
        session.strategy.sync_and_clear_cache()
        _on_rank_0(session, lambda name=name, content=content: (folder / name).write_bytes(content))  # type: ignore[misc]
        _on_rank_0(session, lambda: shutil.rmtree(disk() / "executed", ignore_errors=True))
    return executed


def _on_rank_0(session: Session, change: Callable[[], object]) -> None:
    """Change files on rank 0. The other ranks wait for it."""
    if session.rank == 0:
        change()
    session.strategy.sync_and_clear_cache()


# Kills


class _ChangeCounter:
    """Counts this process's changes in the store "s", from Python's audit events, and kills it at a given one."""

    CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"})

    def __init__(self) -> None:
        self.changes, self.last = 0, 0
        self.prefix = f"{disk() / 's'}/"
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_change(event, arguments) and self.prefix in str(arguments[:2]):
            self.changes += 1
            if self.changes == self.last:
                os.kill(os.getpid(), signal.SIGKILL)

    def _is_change(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        return event in self.CHANGES


@cache
def _change_counter() -> _ChangeCounter:
    return _ChangeCounter()


@operation
def count_changes(session: Session) -> None:
    """Start counting this process's changes in the store."""
    _change_counter().changes, _change_counter().last = 0, 0


@operation
def kill_within(session: Session, part: float) -> None:
    """Kill this process after ``part`` of as many changes as were counted."""
    counter = _change_counter()
    counter.changes, counter.last = 0, max(1, round(part * counter.changes))


@operation
def record_weights(session: Session, model: str, name: str) -> None:
    """Write a digest of the weights to disk, for later processes."""
    weights_digest = _digest_of_weights(session, model)
    if session.rank == 0:
        (disk() / f"{name}.weights").write_text(weights_digest)


@operation
def recorded_weights(session: Session, model: str) -> list[str]:
    """The names under which these weights were recorded."""
    weights_digest = _digest_of_weights(session, model)
    return sorted(path.stem for path in disk().glob("*.weights") if path.read_text() == weights_digest)


def _digest_of_weights(session: Session, model: str) -> str:
    return digest([tensor for _, tensor in session.weights(session.models[model].model)])


@operation
def hidden_names(session: Session, store: str = "s") -> list[str]:
    """The hidden names in a store, sorted. Ranks wait for each other before going on."""
    names = sorted(path.name for path in (disk() / store).iterdir() if path.name.startswith("."))
    session.strategy.sync_and_clear_cache()
    return names


# Other strategies


@operation
def train_shared(session: Session, model: str, first: int, count: int = 1) -> None:
    """Make ``count`` updates, each from the same `GLOBAL_ROWS` rows for any number of ranks."""
    entry = session.models[model]
    _train(session.strategy, entry.model, session.optimizer(model), entry.scheduler, first, count)


def _train(
    strategy: StrategyBase,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    first: int,
    count: int,
) -> None:
    rank, ranks = strategy.get_rank(), strategy.world_size
    share = slice(rank * GLOBAL_ROWS // ranks, (rank + 1) * GLOBAL_ROWS // ranks)
    language = models.is_language(strategy.unwrap_model(model))
    for number in range(first, first + count):
        inputs, targets = models.batch(number, 0, GLOBAL_ROWS, language)
        loss = models.loss_of(model, inputs[share].to(strategy.device), targets[share].to(strategy.device))
        strategy.backward(loss, model, optimizer)
        strategy.optimizer_step(optimizer, model, scheduler, boundary=True)


class AloneBackend(FakeBackend):
    """FakeStrategy's, on one of several ranks."""

    @classmethod
    @override
    def join(cls, config: StrategyConfig) -> World:
        return World.alone(config)


class Alone(FakeStrategy):
    """FakeStrategy on one of several ranks."""

    backend_class = AloneBackend


@operation
def on_fake_strategy(
    session: Session, kind: str, seed: int, first: int = 0, count: int = 0, load_from: str | None = None,
    save_to: str | None = None, lr: float = 1e-3, samples: int = 12, batches: int = 0,
) -> dict[str, object]:  # fmt: skip
    """On rank 0, build, optionally load, train and optionally save a model on FakeStrategy.

    ``samples``: the length of a data loader, of which ``batches`` of two samples are used in epoch 1.

    Returns:
        The weights, and the other samples of the epoch.
    """
    if session.rank != 0:
        return {}
    with _fake_strategy(session) as fake:
        model = models.build(kind, seed)
        optimizer = fake.create_optimizer(model, lr=lr, weight_decay=0.01)
        fake.prepare((model, optimizer, None))
        loader: Any = fake.setup_dataloader(list(range(samples)), 2, shuffle=True, drop_last=True)
        loader.set_epoch(1)
        for _ in zip(range(batches), loader, strict=False):
            pass
        if load_from is not None:
            fake.load_ckpt(model, disk() / load_from, load_lr_scheduler_states=False)
        _train(fake, model, optimizer, None, first, count)
        if save_to is not None:
            fake.save_ckpt(model, disk() / save_to, tag="t")
        loader.set_epoch(loader.epoch)
        weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        return {"weights": weights, "rest": [int(sample) for batch in loader for sample in batch]}


@operation
def order_on_fake_strategy(session: Session, samples: int, epochs: list[int]) -> list[list[int]]:
    """On rank 0, the order of the numbers 0 to ``samples`` - 1 in each epoch on FakeStrategy."""
    if session.rank != 0:
        return []
    with _fake_strategy(session) as fake:
        loader: Any = fake.setup_dataloader(list(range(samples)), 1, shuffle=True, drop_last=False)
        orders = []
        for epoch in epochs:
            loader.set_epoch(epoch)
            orders.append([int(batch) for batch in loader])
        return orders


@contextlib.contextmanager
def _fake_strategy(session: Session) -> Iterator[FakeStrategy]:
    """A FakeStrategy with the settings of the program."""
    from lightrft.strategy.telemetry.log import set_rank

    shared = {"bf16", "max_norm", "adam_betas", "seed"}
    fake = Alone(
        StrategyConfig(
            strategy="fake", device="cpu", train_batch_size=GLOBAL_ROWS, micro_train_batch_size=GLOBAL_ROWS,
            **{name: value for name, value in session.settings.items() if name in shared},
        )
    )  # fmt: skip
    try:
        yield fake
    finally:
        fake.close()
        set_rank(session.rank)
