"""Operations that damage checkpoints, replace them by pickles that run code, and kill a process while it saves."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from lightrft.conformance.interpreter.checkpoints import named_models
from lightrft.conformance.interpreter.disk import disk
from lightrft.conformance.interpreter.session import Session, operation


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
            session.strategy.load_ckpt(named_models(session, model), disk() / store, tag)
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
