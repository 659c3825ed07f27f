"""Operations on the strategy itself: its place, its lifetimes, its collectives, its voice."""

import contextlib
import gc
import io
import logging
import os
import random
import threading
import time
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightrft.conformance.interpreter.session import Session, operation
from lightrft.conformance.provenance import origin_of
from lightrft.conformance.values import digest, materialize
from lightrft.strategy.registry import engine_class

PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@operation
def place(session: Session) -> dict[str, Any]:
    """Who the strategy says that it is, and who the process group says."""
    strategy = session.strategy
    group = [dist.get_world_size(), dist.get_rank()] if dist.is_initialized() else None
    return {
        "world_size": strategy.world_size,
        "rank": strategy.get_rank(),
        "is_rank_0": strategy.is_rank_0(),
        "window": strategy.accumulated_gradient,
        "group": group,
        "environment": [name for name in PLACES if name in os.environ],
    }


@operation
def settings(session: Session, names: list[str]) -> list[Any]:
    """The settings as the strategy has them."""
    return [getattr(session.strategy.config, name) for name in names]


@operation
def setup_again(session: Session, timeout: float | None = None) -> None:
    """Call setup_distributed once more, with another timeout, in seconds, where one is given."""
    session.strategy.setup_distributed(None if timeout is None else timedelta(seconds=timeout))


@operation
def close(session: Session) -> None:
    """Close the strategy, and keep it: a later operation may use it, or close it again."""
    session.strategy.close()


@operation
def begin_again(session: Session) -> None:
    """Close the strategy and make another one in this process."""
    session.close()
    _ = session.strategy


@operation
def leave(session: Session, raising: bool = False) -> bool:
    """Use the strategy as a context manager, whose body may raise; whether process group and engine are gone then."""
    with contextlib.suppress(LookupError), session.strategy:
        if raising:
            raise LookupError
    return not dist.is_initialized() and session.strategy.inference_engine is None


@operation
def resources(session: Session, remember: str | None = None, compare: str | None = None) -> dict[str, Any]:
    """Threads, open files and environment; what there is more of than at ``compare``."""
    gc.collect()
    time.sleep(0.05)  # threads of destroyed process groups take a moment
    found: dict[str, Any] = {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": _open_files(),
        "children": _children(),
        "environment": dict(os.environ),
    }
    if remember is not None:
        session.memory[remember] = found
    if compare is None:
        return {}
    before = session.memory[compare]
    return {
        "threads": len(found["threads"]) - len(before["threads"]),
        "files": found["files"] - before["files"],
        "children": found["children"] - before["children"],
        "environment": sorted(
            name
            for name in found["environment"].keys() | before["environment"].keys()
            if found["environment"].get(name) != before["environment"].get(name)
        ),
        "initialized": dist.is_initialized(),
    }


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _children() -> int:
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        return len(children.read().split())


@operation
def surroundings(session: Session) -> dict[str, Any]:
    """What belongs to the whole process, and the state of its random streams."""
    state: Any = np.random.get_state()
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "autograd": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads of torch": torch.get_num_threads(),
        "working directory": os.getcwd(),
        "Python's stream": digest(list(random.getstate()[1])),
        "NumPy's stream": digest([state[1].tolist(), state[2]]),
        "torch's stream": digest(torch.get_rng_state()),
    }


@operation
def environ(session: Session, **variables: str) -> None:
    """Set environment variables, as a launcher would."""
    os.environ.update(variables)


@operation
def own_group(session: Session) -> None:
    """Make a process group before the strategy does, as a script may."""
    from lightrft.conformance.interpreter.group import join

    join()


@operation
def group_alive(session: Session) -> bool:
    """Whether the default process group is there, and works."""
    if not dist.is_initialized():
        return False
    dist.all_reduce(torch.ones(1))
    return True


@operation
def seed(session: Session, value: int) -> None:
    """set_seed."""
    session.strategy.set_seed(value)


@operation
def draw(session: Session) -> list[Any]:
    """A number from each random stream; a normal one has a twin, which the stream keeps for the next time."""
    return [random.gauss(0, 1), float(np.random.standard_normal()), torch.rand(3)]


@operation
def speak(session: Session, text: str) -> dict[str, str]:
    """What print, and the logger at whatever level, write."""
    printed, logged = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(logged)
    logger = logging.getLogger("lightrft")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            session.strategy.print(text)
        for level in (logging.WARNING, logging.ERROR, logging.CRITICAL):
            logger.log(level, text)
    finally:
        logger.removeHandler(handler)
    return {"printed": printed.getvalue(), "logged": logged.getvalue()}


@operation
def idle(session: Session, seconds: float, until: list[int]) -> None:
    """Take no part in what the other ranks do, for ``seconds``, or until the ranks ``until`` are `through` with it."""
    _ = session.strategy
    store, end, keys = _store(), time.monotonic() + seconds, [f"through/{rank}" for rank in until]
    while time.monotonic() < end and not store.check(keys):
        time.sleep(0.05)
    for key in keys:
        store.delete_key(key)


@operation
def through(session: Session) -> None:
    """Tell the rank that idles."""
    _store().set(f"through/{session.rank}", "yes")


def _store() -> Any:
    """The driver's store: what ranks say to each other when they cannot by the strategy."""
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


@operation
def end(session: Session) -> None:
    """Die, without a word."""
    os._exit(7)


# Collectives


@operation
def all_reduce(session: Session, data: Any, op: str | None = None) -> dict[str, Any]:
    """Reduce; also whether the argument was left alone, and whether the result shares its memory or has a graph."""
    argument = materialize(data, session.rank, session.strategy.device)
    before = digest(argument)
    result = session.strategy.all_reduce(argument) if op is None else session.strategy.all_reduce(argument, op)  # type: ignore[arg-type]
    return _outcome(argument, before, result)


@operation
def all_gather(session: Session, data: Any) -> dict[str, Any]:
    """Gather; also whether the argument was left alone, and whether the result shares its memory or has a graph."""
    argument = materialize(data, session.rank, session.strategy.device)
    before = digest(argument)
    return _outcome(argument, before, session.strategy.all_gather(argument))


def _outcome(argument: Any, before: str, result: Any) -> dict[str, Any]:
    return {
        "result": result,
        "untouched": digest(argument) == before,
        "apart": not _share(argument, result),
        "graph": any(tensor.requires_grad for tensor in _tensors(result)),
    }


def _share(left: Any, right: Any) -> bool:
    pointers = {tensor.untyped_storage().data_ptr() for tensor in _tensors(left) if tensor.numel()}
    return any(tensor.untyped_storage().data_ptr() in pointers for tensor in _tensors(right) if tensor.numel())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


@operation
def local_device(session: Session) -> list[int | None]:
    """The index of this process's device, as the strategy says it and as it is; None on the CPU."""
    return [session.strategy.local_rank, session.strategy.device.index]


@operation
def identity(session: Session, name: str = "", engine: str = "") -> dict[str, Any]:
    """What is under test: where it comes from, and what it says that it can do."""
    strategy = session.strategy
    found: dict[str, Any] = {
        "class": f"{type(strategy).__module__}.{type(strategy).__qualname__}",
        "capabilities": sorted(strategy.capabilities),
        "grouped": dist.is_initialized(),
        **origin_of(name, type(strategy)),
    }
    if engine:
        kind = engine_class(engine)
        found["engine"] = {"class": f"{kind.__module__}.{kind.__qualname__}", **origin_of(engine, kind)}
    return found
