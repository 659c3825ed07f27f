"""Operations that save and load checkpoints, list them, and damage them.

The checkpoints of a program are below one directory, the same for all ranks, which `empty_disk` clears.
"""

import copy
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightrft.conformance import models
from lightrft.conformance.interpreter.session import Session, operation
from lightrft.conformance.scratch import scratch
from lightrft.conformance.values import digest
from lightrft.strategy import FakeStrategy, StrategyBase, StrategyConfig

GLOBAL_ROWS = 12
"""Rows of one update over all ranks; divisible by 1, 2, 3, 4, 6 and 12 ranks."""

CLIENT_STATES: Mapping[str, Any] = {
    "none": {},
    "plain": {"step": 3, "name": "run", "rate": 0.1, "flags": [True, False, None], "nested": {"a": {"b": [1, 2.5]}}},
    "exact": {
        "tuple": (1, (2, [3, ()])),
        7: "an int key",
        "bytes": b"\x00\xff",
        "big": 2**80 + 1,
        "ends": [1e308, 5e-324],
    },
    "infinite": {"best": float("inf"), "worst": float("-inf")},
    "marked": {"$tuple": [1], "$": {"$dict": 2}, "text": "\u00e9\u4e2d\ud800"},
}
UNSTORABLE = ("object", "function", "tensor", "set", "recursive", "deep key")


def _unstorable(what: str) -> dict[Any, Any]:
    recursive: dict[Any, Any] = {}
    recursive["self"] = recursive
    values: dict[str, dict[Any, Any]] = {
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


def _models(session: Session, model: str | list[str]) -> Any:
    if isinstance(model, str):
        return session.models[model].model
    return {name: session.models[name].model for name in model}


@operation
def save(
    session: Session, model: str | list[str], store: str = "s", client: str | None = None, explicit: bool = False,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """save_ckpt; the path, and whether the state of this process is unchanged.

    ``explicit``: pass the optimizer and the scheduler as arguments.
    """
    if client is not None:
        more["client_state"] = _unstorable(client) if client in UNSTORABLE else copy.deepcopy(CLIENT_STATES[client])
    if explicit and isinstance(model, str):
        entry = session.models[model]
        more |= {"optimizer": entry.optimizer, "scheduler": entry.scheduler}
    before = _fingerprint(session)
    path = session.strategy.save_ckpt(_models(session, model), disk() / store, **more)
    more.get("client_state", {}).clear()  # as a script may change its own dict afterwards
    return {"path": str(path.relative_to(disk())), "unchanged": _fingerprint(session) == before}


@operation
def load(
    session: Session, model: str | list[str], store: str = "s", client: str = "none", **more: Any
) -> dict[str, Any]:
    """load_ckpt; the path, and whether the client state equals ``client``, including the types of containers."""
    path, state = session.strategy.load_ckpt(_models(session, model), disk() / store, **more)
    return {"path": str(path.relative_to(disk())), "client": _alike(state, CLIENT_STATES[client])}


@operation
def fingerprint(session: Session) -> str:
    """A digest of everything that a load may change on this rank: weights, optimizer, scheduler, random states, positions."""
    return _fingerprint(session)


def _fingerprint(session: Session) -> str:
    values = _random_states()
    for name, entry in sorted(session.models.items()):
        module = session.strategy.unwrap_model(entry.model)
        stream = session.strategy.full_parameters(entry.model, dtype=torch.float32)
        values += [name, *(tensor.clone() for bucket in stream for _, tensor in bucket)]
        values += [*module.buffers(), *(parameter.grad for parameter in module.parameters())]
        if entry.optimizer is not None:
            values += [dict(sorted(state.items())) for state in entry.optimizer.state.values()]
            values += [[(k, v) for k, v in group.items() if k != "params"] for group in entry.optimizer.param_groups]
        if entry.scheduler is not None:
            values.append(sorted(entry.scheduler.state_dict().items()))
    values += [value.state_dict() for value in session.memory.values() if hasattr(value, "consumed_samples")]
    return digest(values)


def _alike(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(_alike(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(_alike(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


@operation
def random_state(session: Session) -> str:
    """A digest of the random states of this process."""
    return digest(_random_states())


def _random_states() -> list[Any]:
    return [random.getstate(), repr(np.random.get_state()), torch.get_rng_state()]


@operation
def rest_of_epoch(session: Session, name: str) -> list[Any]:
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

    def __reduce__(self) -> Any:
        return os.makedirs, (self.path,)


@operation
def plant_pickles(session: Session, replace: bool, store: str = "s", tag: str = "t") -> None:
    """Put pickles that run code into a checkpoint: in place of its files, or beside them under likely names."""
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
    stream = session.strategy.full_parameters(session.models[model].model, dtype=torch.float32)
    return digest([tensor.clone() for bucket in stream for _, tensor in bucket])


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
    _train(session.strategy, entry.model, entry.optimizer, entry.scheduler, first, count)


def _train(strategy: StrategyBase, model: Any, optimizer: Any, scheduler: Any, first: int, count: int) -> None:
    rank, ranks = strategy.get_rank(), strategy.world_size
    share = slice(rank * GLOBAL_ROWS // ranks, (rank + 1) * GLOBAL_ROWS // ranks)
    language = models.is_language(strategy.unwrap_model(model))
    for number in range(first, first + count):
        inputs, targets = models.batch(number, 0, GLOBAL_ROWS, language)
        loss = models.loss_of(model, inputs[share].to(strategy.device), targets[share].to(strategy.device))
        strategy.backward(loss, model, optimizer)
        strategy.optimizer_step(optimizer, model, scheduler, boundary=True)


@operation
def on_fake_strategy(
    session: Session, kind: str, seed: int, first: int = 0, count: int = 0, load_from: str | None = None,
    save_to: str | None = None, lr: float = 1e-3,
) -> dict[str, Any]:  # fmt: skip
    """On rank 0, build, optionally load, train and optionally save a model on FakeStrategy; its weights."""
    if session.rank != 0:
        return {}
    from lightrft.strategy.telemetry.log import set_rank

    shared = {"bf16", "max_norm", "adam_betas", "seed"}
    fake = FakeStrategy(
        StrategyConfig(
            strategy="fake", device="cpu", train_batch_size=GLOBAL_ROWS, micro_train_batch_size=GLOBAL_ROWS,
            **{name: value for name, value in session.settings.items() if name in shared},
        )
    )  # fmt: skip
    try:
        model = models.build(kind, seed)
        optimizer = fake.create_optimizer(model, lr=lr, weight_decay=0.01)
        fake.prepare((model, optimizer, None))
        if load_from is not None:
            fake.load_ckpt(model, disk() / load_from, load_lr_scheduler_states=False)
        _train(fake, model, optimizer, None, first, count)
        if save_to is not None:
            fake.save_ckpt(model, disk() / save_to, tag="t")
        return {"weights": {name: tensor.detach().clone() for name, tensor in model.named_parameters()}}
    finally:
        fake.close()
        set_rank(session.rank)
