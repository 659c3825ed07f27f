"""DeepSpeed's compiled operators: built once in an environment, by one process at a time, and not in silence."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import cpuinfo
import torch
from cpuinfo import get_cpu_info
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch.optim import Optimizer

from lightrft.config import StrategyError
from lightrft.deepspeed.environment import extensions_dir
from lightrft.strategy import log


def cpu_adam(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """DeepSpeed's CPU AdamW, over parameters of which ZeRO will keep the masters in host memory.

    Raises `StrategyError` where it cannot be built.
    """
    _build(CPUAdamBuilder())
    with _processor_known():
        optimizer: Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return optimizer


def resume_cpu_adam(optimizer: Any) -> None:
    """Bring the powers of the betas, which the operator keeps for itself, to where the loaded steps left them.

    It multiplies them up from step to step, and takes ``std::pow``, which rounds otherwise, where a step does not follow
    the last one (0.19.8). So a new operator makes all steps again, on nothing; a million take seconds.
    """
    lr, betas, eps, decay = (optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay"))
    operator, number, nothing = optimizer.ds_opt_adam, optimizer.opt_id, torch.empty(0)
    operator.create_adam(number, lr, *betas, eps, decay, optimizer.adam_w_mode, False)
    for step in range(1, max((int(state["step"]) for state in optimizer.state.values()), default=0) + 1):
        for group in optimizer.param_groups:
            settings = (*group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
            operator.adam_update(number, step, group["lr"], *settings, nothing, nothing, nothing, nothing)


@cache
def _processor() -> dict[str, Any]:
    return get_cpu_info()  # type: ignore[no-any-return]


@contextmanager
def _processor_known() -> Iterator[None]:
    """Every optimizer asks who made the processor, which py-cpuinfo finds out in a new Python process, in over a second."""
    cpuinfo.get_cpu_info = _processor
    try:
        yield
    finally:
        cpuinfo.get_cpu_info = get_cpu_info


def _build(builder: Any) -> None:
    """Build and load an operator, unless DeepSpeed was installed with it."""
    if installed_ops.get(builder.name):
        return
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / builder.name
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder), _tools_on_path():
        if not (folder / f"{builder.name}.so").exists():
            log.say(f"building DeepSpeed's {builder.name} operator in {folder}; this takes about a minute, once")
        _load(builder)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes. Unlike torch's lock file, this one ends with its process.

    torch waits for ever on the file that a killed build left behind; in a folder that is ours alone, whoever
    holds this lock may remove it.
    """
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.parent == extensions_dir():
            (folder / "lock").unlink(missing_ok=True)
        yield


@contextmanager
def _tools_on_path() -> Iterator[None]:
    """Let torch find the ``ninja`` beside this Python, also where the environment was not activated."""
    found = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found])
    try:
        yield
    finally:
        os.environ["PATH"] = found


def _load(builder: Any) -> None:
    try:
        builder.load(verbose=False)
    except Exception as error:  # the compiler's, ninja's and torch's failures have no common type
        raise StrategyError(
            f"create_optimizer: adam_offload needs DeepSpeed's {builder.name} operator, which could not be built: {error}. "
            f"Install a C++ compiler (g++), or leave adam_offload out"
        ) from error
