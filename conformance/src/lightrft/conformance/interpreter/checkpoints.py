"""Operations that save and load checkpoints."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from lightrft.conformance.interpreter.disk import disk
from lightrft.conformance.interpreter.fingerprints import fingerprint
from lightrft.conformance.interpreter.session import Session, operation
from lightrft.conformance.values import digest
from lightrft.strategy.checkpoint.checkpoint_items import Models

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


def named_models(session: Session, model: str | list[str]) -> Models:
    """What save_ckpt and load_ckpt take: a model, or a dict of models by name."""
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
    before = fingerprint(session)
    path = session.strategy.save_ckpt(named_models(session, model), disk() / store, **more)
    more.get("client_state", {}).clear()  # as a script may change its own dict afterwards
    after = fingerprint(session)
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
    path, state = session.strategy.load_ckpt(named_models(session, model), disk() / store, **more)
    return {"path": str(path.relative_to(disk())), "client": _alike(state, CLIENT_STATES[client])}


def _alike(left: object, right: object) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(_alike(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(_alike(a, b) for a, b in zip(left, right, strict=True))
    return repr(left) == repr(right)  # 0.0 equals -0.0


@operation
def rest_of_epoch(session: Session, name: str) -> list[object]:
    """The samples of a loader from its position to the end of the epoch."""
    data_loader = session.memory[name]
    data_loader.set_epoch(data_loader.epoch)
    return [batch.tolist() for batch in data_loader]
