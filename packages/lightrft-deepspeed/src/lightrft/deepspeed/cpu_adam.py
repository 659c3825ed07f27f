"""DeepSpeed's Adam on the CPU: compiled once in an environment, by one process at a time, with a message."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch.optim import Optimizer

from lightrft.config import StrategyError
from lightrft.deepspeed.ds_environment import extensions_dir
from lightrft.deepspeed.patches import CPU_INFO
from lightrft.strategy.storage.locks import holding
from lightrft.strategy.telemetry import log


def cpu_adam(groups: list[dict[str, Any]], **settings: object) -> Optimizer:
    """Return DeepSpeed's AdamW on the CPU; ZeRO keeps the master weights of its parameters in host memory.

    Args:
        groups: Parameter groups, as torch's optimizers take them.
        **settings: The optimizer's own, for example ``lr``.

    Raises:
        StrategyError: The operator cannot be built.
    """
    _build(CPUAdamBuilder())
    restore = CPU_INFO.apply()
    try:
        optimizer: Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    finally:
        restore()
    return optimizer


def resume_cpu_adam(optimizer: Any) -> None:
    """Restore the powers of the betas, which the operator keeps, for the step that was loaded.

    The operator multiplies them from step to step. If a step does not follow the last one, it uses ``std::pow``, which
    rounds differently: https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/csrc/includes/cpu_adam.h#L77-L89. So a new
    operator repeats all steps on an empty tensor; a million steps take seconds.
    """
    lr, betas, eps, decay = (optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay"))
    operator, number, nothing = optimizer.ds_opt_adam, optimizer.opt_id, torch.empty(0)
    operator.create_adam(number, lr, *betas, eps, decay, optimizer.adam_w_mode, False)
    for step in range(1, max((int(state["step"]) for state in optimizer.state.values()), default=0) + 1):
        for group in optimizer.param_groups:
            settings = (*group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
            operator.adam_update(number, step, group["lr"], *settings, nothing, nothing, nothing, nothing)


def _build(builder: Any) -> None:
    """Build and load an operator, unless DeepSpeed was installed with it."""
    if installed_ops.get(builder.name):
        return
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / builder.name
    folder.mkdir(parents=True, exist_ok=True)
    with holding(folder.parent, folder.name, math.inf), _tools_on_path():
        if folder.parent == extensions_dir():
            # torch waits forever for the file that a killed build left behind. In a folder that only we use, no other
            # process builds while we hold the lock.
            (folder / "lock").unlink(missing_ok=True)
        if not (folder / f"{builder.name}.so").exists():
            log.print_on_rank_0(
                f"building DeepSpeed's {builder.name} operator in {folder}; this takes about a minute, once"
            )
        _load(builder)


@contextmanager
def _tools_on_path() -> Iterator[None]:
    """Let torch find the ``ninja`` of this Python environment, even if the environment is not activated."""
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _load(builder: Any) -> None:
    try:
        builder.load(verbose=False)
    except Exception as error:  # the failures of the compiler, ninja and torch have no common type
        raise StrategyError(
            f"create_optimizer: expected DeepSpeed's {builder.name} operator for adam_offload=True, got a failed build: "
            f"{error}. Install a C++ compiler (g++), or use adam_offload=False"
        ) from error
