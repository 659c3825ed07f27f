"""Operations of the strategy itself: its world, lifecycle, collectives and logging."""

import contextlib
import gc
import io
import logging
import os
import random
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightrft.conformance.interpreter.session import OPERATIONS, Session, operation
from lightrft.conformance.provenance import origin_of
from lightrft.conformance.values import Record, digest, materialize
from lightrft.strategy.rollout.engine import engine_class

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@operation
def world(session: Session) -> dict[str, object]:
    """The rank and world size as the strategy and the process group report them."""
    strategy = session.strategy
    group = [dist.get_world_size(), dist.get_rank()] if dist.is_initialized() else None
    return {
        "world_size": strategy.world_size,
        "rank": strategy.get_rank(),
        "is_rank_0": strategy.is_rank_0(),
        "accumulation_steps": strategy.accumulated_gradient,
        "group": group,
        "environment": [name for name in LAUNCHER_VARIABLES if name in os.environ],
    }


@operation
def settings(session: Session, names: list[str]) -> list[object]:
    """Settings of the strategy."""
    return [getattr(session.strategy.config, name) for name in names]


@operation
def setup_again(session: Session, timeout: float | None = None) -> None:
    """Call setup_distributed again, with a timeout in seconds if one is given."""
    session.strategy.setup_distributed(None if timeout is None else timedelta(seconds=timeout))


@operation
def close(session: Session) -> None:
    """Close the strategy but keep the object: a later operation may use or close it again."""
    session.strategy.close()


@operation
def restart(session: Session, settings: Record | None = None) -> None:
    """Close the strategy and create another one in this process, with some ``settings`` changed."""
    session.close()
    session.settings = {**session.settings, **(settings or {})}
    _ = session.strategy


@operation
def leave_context(session: Session, raising: bool = False) -> bool:
    """Use the strategy as a context manager; whether the process group and the engine are gone afterwards."""
    with contextlib.suppress(LookupError), session.strategy:
        if raising:
            raise LookupError
    return not dist.is_initialized() and session.strategy.inference_engine is None


@operation
def save_on_sigterm(session: Session, operations: list[Record], raising: bool = False) -> dict[str, object]:
    """Run ``operations`` inside saving_on_sigterm, whose block may raise at the end.

    Returns:
        stop_requested before the first operation and after each; the number of calls of ``save`` so far: when the
        block ends, and after it was left; and whether the handler that was set before is in place again.
    """
    strategy, saves = session.strategy, []
    before = signal.signal(signal.SIGTERM, _ignore)
    requested = [strategy.stop_requested]
    with contextlib.suppress(LookupError), strategy.saving_on_sigterm(lambda: saves.append("saved")):
        for inner in operations:
            arguments = {name: value for name, value in inner.items() if name not in ("do", "ranks")}
            if session.rank in inner.get("ranks", [session.rank]):
                OPERATIONS[inner["do"]](session, **arguments)
            requested.append(strategy.stop_requested)
        inside = len(saves)
        if raising:
            raise LookupError
    restored = signal.signal(signal.SIGTERM, before) is _ignore
    return {"stop_requested": requested, "saves": [inside, len(saves)], "handler": restored}


def _ignore(number: int, frame: object) -> None:
    """A handler of a script."""


@operation
def sigterm(session: Session) -> None:
    """Send SIGTERM to this process."""
    os.kill(os.getpid(), signal.SIGTERM)


@operation
def resources(session: Session, remember: str | None = None, compare: str | None = None) -> dict[str, object]:
    """Count threads, open files, child processes and variables; the differences from an earlier ``remember``.

    Threads of process groups are counted apart: they are not Python's, and must all end.
    """
    gc.collect()
    time.sleep(0.05)  # threads of destroyed process groups, and their sockets, end with a delay
    if remember is None and compare is not None:
        _wait_for_ends(session.memory[compare])
    current: Record = {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "group threads": _group_threads(),
        "files": _open_files(),
        "children": _children(),
        "environment": dict(os.environ),
    }
    if remember is not None:
        session.memory[remember] = current
    if compare is None:
        return {}
    before = session.memory[compare]
    return {
        "threads": len(current["threads"]) - len(before["threads"]),
        "group threads": current["group threads"] - before["group threads"],
        "files": current["files"] - before["files"],
        "children": current["children"] - before["children"],
        "environment": sorted(
            name
            for name in current["environment"].keys() | before["environment"].keys()
            if current["environment"].get(name) != before["environment"].get(name)
        ),
        "initialized": dist.is_initialized(),
    }


def _wait_for_ends(before: Record) -> None:
    """Wait, 2 s at most, until there are no more files and threads of process groups than before."""
    end = time.monotonic() + 2
    while time.monotonic() < end and (_open_files() > before["files"] or _group_threads() > before["group threads"]):
        time.sleep(0.05)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _group_threads() -> int:
    """Number of threads that gloo has started, by their names."""
    count = 0
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            count += "gloo" in name.read_text(encoding="utf-8")
    return count


def _children() -> int:
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        return len(children.read().split())


@operation
def process_state(session: Session) -> dict[str, object]:
    """Process-wide state, including that of the random number generators."""
    state = np.random.get_state(legacy=False)["state"]
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "autograd enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "working directory": os.getcwd(),
        **{f"the handler of {name}": str(signal.getsignal(getattr(signal, name))) for name in ("SIGINT", "SIGTERM")},
        "Python's generator": digest(list(random.getstate()[1])),
        "NumPy's generator": digest([state["key"].tolist(), state["pos"]]),
        "torch's generator": digest(torch.get_rng_state()),
    }


@operation
def attachments(session: Session, model: str) -> dict[str, list[str]]:
    """What is attached to the original model, its modules and parameters: hooks with their number, and methods. And the
    parameters by type and shape, which sharding changes."""
    module = session.models[model].module
    held = [
        (name or "the model", key, value) for name, part in module.named_modules() for key, value in vars(part).items()
    ]
    methods = [f"the method {key} of {name}" for name, key, value in held if callable(value)]
    held += [
        (name, key, getattr(parameter, key, None))
        for name, parameter in module.named_parameters()
        for key in ("_backward_hooks", "_post_accumulate_grad_hooks")
    ]
    hooks = [f"{len(value)} {key} of {name}" for name, key, value in held if "hooks" in key and value]
    shapes = [f"{type(parameter.data).__name__} {list(parameter.shape)}" for parameter in module.parameters()]
    return {"attached": methods + hooks, "parameters": shapes}


@operation
def environ(session: Session, **variables: str) -> None:
    """Set environment variables, as a launcher does."""
    os.environ.update(variables)


@operation
def make_process_group(session: Session) -> None:
    """Create a process group before the strategy does, as a script may."""
    from lightrft.conformance.interpreter.process_groups import join

    join()


@operation
def group_alive(session: Session) -> bool:
    """Whether the default process group exists and works."""
    if not dist.is_initialized():
        return False
    dist.all_reduce(torch.ones(1))
    return True


@operation
def seed(session: Session, value: int) -> None:
    """set_seed."""
    session.strategy.set_seed(value)


@operation
def draw(session: Session) -> list[object]:
    """A sample from each random number generator. Normal samples come in pairs, of which a generator caches the second."""
    return [random.gauss(0, 1), float(np.random.standard_normal()), torch.rand(3)]


@operation
def print_and_log(session: Session, text: str) -> dict[str, str]:
    """The output of print, and of the logger at several levels."""
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
def idle(session: Session, seconds: float, until: list[int]) -> bool:
    """Do nothing for ``seconds``, or until the ranks ``until`` call `report_done`; returns whether they did."""
    _ = session.strategy
    store, end, keys = _store(), time.monotonic() + seconds, [f"done/{rank}" for rank in until]
    while not (done := store.check(keys)) and time.monotonic() < end:
        time.sleep(0.05)
    for key in keys:
        store.delete_key(key)
    return bool(done)


@operation
def report_done(session: Session) -> None:
    """Tell the idle rank that this rank is done."""
    _store().set(f"done/{session.rank}", "yes")


def _store() -> TCPStore:
    """The driver's store, through which ranks communicate without the strategy."""
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


@operation
def exit_process(session: Session) -> None:
    """Exit the process immediately."""
    os._exit(7)


# Collectives


@operation
def all_reduce(session: Session, data: object, op: str | None = None) -> dict[str, object]:
    """all_reduce; the result, and whether it is independent of the argument, which must not change."""
    argument = materialize(data, session.rank, session.strategy.device)
    before = digest(argument)
    result = session.strategy.all_reduce(argument) if op is None else session.strategy.all_reduce(argument, op)  # type: ignore[call-overload]
    return _outcome(argument, before, result)


@operation
def all_gather(session: Session, data: object) -> dict[str, object]:
    """all_gather; the result, and whether it is independent of the argument, which must not change."""
    argument = materialize(data, session.rank, session.strategy.device)
    before = digest(argument)
    return _outcome(argument, before, session.strategy.all_gather(argument))


def _outcome(argument: object, before: str, result: object) -> dict[str, object]:
    return {
        "result": result,
        "argument_unchanged": digest(argument) == before,
        "separate_memory": not _share(argument, result),
        "has_graph": any(tensor.requires_grad for tensor in _tensors(result)),
    }


def _share(left: object, right: object) -> bool:
    pointers = {tensor.untyped_storage().data_ptr() for tensor in _tensors(left) if tensor.numel()}
    return any(tensor.untyped_storage().data_ptr() in pointers for tensor in _tensors(right) if tensor.numel())


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


@operation
def local_device(session: Session) -> list[int | None]:
    """The local rank of the strategy and the index of its device; the index is None on the CPU."""
    return [session.strategy.local_rank, session.strategy.device.index]


@operation
def identity(session: Session, name: str = "", engine: str = "") -> dict[str, object]:
    """The class, origin and capabilities of what is under test."""
    strategy = session.strategy
    answer: dict[str, object] = {
        "class": f"{type(strategy).__module__}.{type(strategy).__qualname__}",
        "capabilities": sorted(strategy.capabilities),
        "grouped": dist.is_initialized(),
        **origin_of(name, type(strategy)),
    }
    if engine:
        cls = engine_class(engine)
        answer["engine"] = {"class": f"{cls.__module__}.{cls.__qualname__}", **origin_of(engine, cls)}
    return answer
