"""Operations that save and load, look at what is on disk, and damage it.

A program's checkpoints are below one directory that all ranks know without asking, which `empty_disk` clears.
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
from lightrft.conformance.driver.scratch import scratch
from lightrft.conformance.interpreter.session import Session, operation
from lightrft.conformance.values import digest
from lightrft.strategy import FakeStrategy, StrategyBase, StrategyConfig

GLOBAL_ROWS = 12
"""Rows of one update over all ranks: whole shares for 1, 2, 3, 4, 6 and 12 of them."""

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
    """Where the checkpoints are."""
    return scratch("checkpoints")


@operation
def empty_disk(session: Session, keep: bool = True) -> None:
    """Begin with nothing on disk, or, without ``keep``, leave nothing."""
    allow(session)
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
    session: Session, model: str | list[str], store: str = "s", client: str | None = None, handed: bool = False,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """save_ckpt; the path, and whether anything of this process changed.

    ``handed``: with the optimizer and the scheduler as arguments.
    """
    if client is not None:
        more["client_state"] = _unstorable(client) if client in UNSTORABLE else copy.deepcopy(CLIENT_STATES[client])
    if handed and isinstance(model, str):
        entry = session.models[model]
        more |= {"optimizer": entry.optimizer, "scheduler": entry.scheduler}
    before = _fingerprint(session)
    path = session.strategy.save_ckpt(_models(session, model), disk() / store, **more)
    more.get("client_state", {}).clear()  # the script's own, which goes on changing
    return {"path": str(path.relative_to(disk())), "unchanged": _fingerprint(session) == before}


@operation
def load(
    session: Session, model: str | list[str], store: str = "s", client: str = "none", **more: Any
) -> dict[str, Any]:
    """load_ckpt; the path, and whether the client state is equal to ``client``, types of containers included."""
    path, state = session.strategy.load_ckpt(_models(session, model), disk() / store, **more)
    return {"path": str(path.relative_to(disk())), "client": _alike(state, CLIENT_STATES[client])}


@operation
def fingerprint(session: Session) -> str:
    """Everything that a load may change, on this rank: weights, optimizer, rates, schedules, streams, positions."""
    return _fingerprint(session)


def _fingerprint(session: Session) -> str:
    found = _streams()
    for name, entry in sorted(session.models.items()):
        module = session.strategy.unwrap_model(entry.model)
        stream = session.strategy.full_parameters(entry.model, dtype=torch.float32)
        found += [name, *(tensor.clone() for bucket in stream for _, tensor in bucket)]
        found += [*module.buffers(), *(parameter.grad for parameter in module.parameters())]
        if entry.optimizer is not None:
            found += [dict(sorted(state.items())) for state in entry.optimizer.state.values()]
            found += [[(k, v) for k, v in group.items() if k != "params"] for group in entry.optimizer.param_groups]
        if entry.scheduler is not None:
            found.append(sorted(entry.scheduler.state_dict().items()))
    found += [value.state_dict() for value in session.memory.values() if hasattr(value, "consumed_samples")]
    return digest(found)


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
    """The random streams of this process."""
    return digest(_streams())


def _streams() -> list[Any]:
    return [random.getstate(), repr(np.random.get_state()), torch.get_rng_state()]


@operation
def go_on(session: Session, name: str) -> list[Any]:
    """The samples of a loader from its position to the end of the epoch."""
    found = session.memory[name]
    found.set_epoch(found.epoch)
    return [batch.tolist() for batch in found]


@operation
def refuse(session: Session) -> None:
    """From now on the system writes no more than a few bytes to any file of this process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@operation
def allow(session: Session) -> None:
    """The opposite of `refuse`."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


# The disk


@operation
def kept(session: Session, store: str = "s") -> list[str]:
    """The names in a store that a listing shows, sorted; no rank goes on before all have looked."""
    found = sorted(path.name for path in (disk() / store).iterdir() if path.is_dir())
    session.strategy.sync_and_clear_cache()
    return found


@operation
def strange(session: Session, store: str, name: str, text: str = "keep me") -> None:
    """Somebody else's directory in the store."""
    if session.rank == 0:
        (disk() / store / name).mkdir(parents=True)
        (disk() / store / name / "notes.txt").write_text(text)


@operation
def rename(session: Session, store: str, old: str, new: str) -> None:
    """Somebody renames a directory of the store."""
    if session.rank == 0:
        (disk() / store / old).rename(disk() / store / new)


@operation
def megabytes(session: Session, store: str, tag: str) -> float:
    """The size of one checkpoint."""
    return sum(path.stat().st_size for path in (disk() / store / tag).iterdir()) / 1e6


@operation
def damage(
    session: Session, what: str, file: int, at: float = 0.5, bit: int = 0, store: str = "s", tag: str = "t"
) -> str:
    """Spoil the ``file``-th file of a checkpoint: "flip" a bit, "flip in optimizer" one of its state, where the file has
    any, "truncate", "remove". Returns the file's name."""
    if session.rank != 0:
        return ""
    paths = sorted((disk() / store / tag).iterdir())
    path = paths[file % len(paths)]
    size = path.stat().st_size
    place = min(size - 1, int(at * size))
    if what == "remove":
        path.unlink()
    elif what == "truncate":
        os.truncate(path, place)
    else:
        data = bytearray(path.read_bytes())
        data[_in_optimizer(data) or place if "optimizer" in what else place] ^= 1 << bit
        path.write_bytes(data)
    return path.name


def _in_optimizer(data: bytearray) -> int | None:
    """Where a safetensors file has state of an optimizer, if it has."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        return None
    header = json.loads(data[8 : 8 + length])
    begins = (it["data_offsets"][0] for name, it in header.items() if "/optimizer/exp_avg/" in name)
    return next((8 + length + begin for begin in begins), None)


class _Trap:
    """Unpickled, makes a directory."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.makedirs, (self.canary,)


@operation
def trap(session: Session, replace: bool, store: str = "s", tag: str = "t") -> None:
    """Put pickles that act where one might be read: in the place of the files, or beside them under likely names."""
    if session.rank != 0:
        return
    poison = pickle.dumps(_Trap(str(disk() / "sprung")))
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
def sprung(session: Session) -> bool:
    """Whether one of the traps went off."""
    return (disk() / "sprung").exists()


# Being killed


class _Watch:
    """Counts the changes that this process makes in the store "s", as Python's audit events, and kills it at one."""

    CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"})

    def __init__(self) -> None:
        self.changes, self.last = 0, 0
        self.inside = f"{disk() / 's'}/"
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_change(event, arguments) and self.inside in str(arguments[:2]):
            self.changes += 1
            if self.changes == self.last:
                os.kill(os.getpid(), signal.SIGKILL)

    def _is_change(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        return event in self.CHANGES


@cache
def _watch() -> _Watch:
    return _Watch()


@operation
def count_changes(session: Session) -> None:
    """Count what this process changes in the store from now on."""
    _watch().changes, _watch().last = 0, 0


@operation
def kill_within(session: Session, part: float) -> None:
    """Kill this process in the midst of as many changes as were counted: at this part of them."""
    watch = _watch()
    watch.changes, watch.last = 0, max(1, round(part * watch.changes))


@operation
def note_weights(session: Session, model: str, name: str) -> None:
    """Write down what the weights are, for processes to come."""
    found = _digest_of_weights(session, model)
    if session.rank == 0:
        (disk() / f"{name}.weights").write_text(found)


@operation
def noted_weights(session: Session, model: str) -> list[str]:
    """The names under which these weights were written down."""
    found = _digest_of_weights(session, model)
    return sorted(path.stem for path in disk().glob("*.weights") if path.read_text() == found)


def _digest_of_weights(session: Session, model: str) -> str:
    stream = session.strategy.full_parameters(session.models[model].model, dtype=torch.float32)
    return digest([tensor.clone() for bucket in stream for _, tensor in bucket])


@operation
def hidden(session: Session, store: str = "s") -> list[str]:
    """The names in a store that a listing does not show; no rank goes on before all have looked."""
    found = sorted(path.name for path in (disk() / store).iterdir() if path.name.startswith("."))
    session.strategy.sync_and_clear_cache()
    return found


# Other strategies


@operation
def train_shared(session: Session, model: str, first: int, count: int = 1) -> None:
    """``count`` updates, each from the same `GLOBAL_ROWS` rows however many ranks there are."""
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
def elsewhere(
    session: Session, kind: str, seed: int, first: int = 0, count: int = 0, load_from: str | None = None,
    save_to: str | None = None, lr: float = 1e-3,
) -> dict[str, Any]:  # fmt: skip
    """On rank 0 a FakeStrategy: build, perhaps load, train, perhaps save. Its weights and steps."""
    if session.rank != 0:
        return {}
    from lightrft.strategy.log import speak_as

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
        speak_as(session.rank)
