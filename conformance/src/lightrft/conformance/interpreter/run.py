"""Runs one program, operation by operation."""

import contextlib
import gc
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lightrft.config import StrategyConfig
from lightrft.conformance.interpreter import (  # noqa: F401 - each module registers its operations
    checkpoints,
    denominators,
    direct_calls,
    disk,
    exporting,
    fingerprints,
    lifecycle,
    micro_batches,
    on_fake_strategy,
    preparing,
    rollouts,
    sequence_parallel,
    storage_faults,
    tracking,
    training,
)
from lightrft.conformance.interpreter.session import OPERATIONS, Session
from lightrft.conformance.values import Record, encode, error_record
from lightrft.strategy import StrategyBase
from lightrft.strategy.strategy import strategy_class


def maker(name: str, fixed: Record) -> Callable[[Record], StrategyBase]:
    """A function that creates the strategy ``name`` from the settings of the certification and of a program."""

    def make(settings: Record) -> StrategyBase:
        merged = {**fixed, **settings}
        if isinstance(merged.get("adam_betas"), list):
            merged["adam_betas"] = tuple(merged["adam_betas"])
        return strategy_class(name)(StrategyConfig(**merged))

    return make


def run_program(program: Record, rank: int) -> list[object]:
    """Run ``program`` on this rank.

    An operation with ``ranks`` runs on these ranks only; the others observe None. An error ends the program, unless the
    operation has ``may_fail``.

    Returns:
        An observation per operation that ran.
    """
    environment = dict(os.environ)
    session = Session(make=maker(program["strategy"], program["fixed"]), settings=program["settings"], rank=rank)
    _freeze_imports(len(sys.modules))
    _seed_all(program.get("seed", 0))
    observations: list[object] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for operation in program["operations"]:
                observation = _run(session, operation)
                observations.append(observation)
                if isinstance(observation, dict) and "error" in observation and not operation.get("may_fail"):
                    break
    finally:
        _clean_up(session)
        if os.environ != environment:
            os.environ.clear()
            os.environ.update(environment)
    return observations


@cache
def _freeze_imports(count: int) -> None:
    """Exclude what is imported now from garbage collection: traversing it takes longer than a program.

    ``count`` is the number of loaded modules: it makes the cache call this again after an import.
    """
    gc.collect()
    gc.freeze()


def _run(session: Session, operation: Record) -> object:
    arguments = {key: value for key, value in operation.items() if key not in ("do", "ranks", "may_fail")}
    if session.rank not in operation.get("ranks", [session.rank]):
        return None
    function = OPERATIONS[operation["do"]]
    try:
        return encode(function(session, **arguments))
    except BaseException as error:  # noqa: BLE001 - any error of the code under test is an observation
        record = error_record(error)
        if _read_wrong_type(error):
            record["message"] += ", because a call returned something of the wrong type"
        error.__traceback__ = None
        return record


def _read_wrong_type(error: BaseException) -> bool:
    """Whether an operation of the suite itself failed on what the strategy returned."""
    frames = list(traceback.walk_tb(error.__traceback__))
    inside = frames[-1][0].f_code.co_filename.startswith(str(Path(__file__).parent))
    return inside and isinstance(error, (AttributeError, TypeError))


def _clean_up(session: Session) -> None:
    """Reset the process, whatever the strategy under test left behind."""
    with contextlib.suppress(BaseException):
        session.close()
    if dist.is_initialized():
        with contextlib.suppress(BaseException):
            dist.destroy_process_group()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
