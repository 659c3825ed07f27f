"""The ranks that train together: this process's rank, and the process groups.

A `World` is either joined (with a process group: the caller's, torchrun's, or one of a single rank) or alone (without a
process group). `close` destroys the process groups that were made for it, and never the caller's.
"""

import importlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, distributed_c10d, rendezvous  # type: ignore[attr-defined]

from lightrft.config import ConfigError, StrategyConfig

T = TypeVar("T")


@dataclass(kw_only=True)
class World:
    """This process and its peers."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta
    cpu_group: dist.ProcessGroup | None = None
    """A gloo group of all ranks, for messages in host memory; None without a process group."""
    owns_default_group: bool = False
    """Whether `join` made the default process group."""
    _earlier_groups: frozenset[dist.ProcessGroup] = frozenset()
    """Process groups that existed before this world."""
    _environment: dict[str, str | None] = field(default_factory=dict)
    """Environment variables to restore, with their values; None: was not set."""

    @classmethod
    def alone(cls, config: StrategyConfig) -> "World":
        """Return a world of one process, without a process group; sets no environment variables."""
        return cls(rank=0, size=1, device=_use_device(config), timeout=timedelta(seconds=config.timeout))

    @classmethod
    def join(cls, config: StrategyConfig) -> "World":
        """Join the caller's process group, else the one that torchrun describes, else one of this process alone.

        All ranks must call this.

        Raises:
            ConfigError: The settings ask for a CUDA device that torch does not find, or a launcher started several processes
                without telling each its rank.
        """
        device, timeout = _use_device(config), timedelta(seconds=config.timeout)
        earlier_groups, owns = frozenset(_groups()), not dist.is_initialized()
        if owns:
            _init_process_group(device, timeout)
        # The caller's default group may lack gloo, and has its own timeout: control messages get a separate group.
        cpu_group = dist.group.WORLD if owns else dist.new_group(backend="gloo", timeout=timeout)
        # Connect now: a rank that fails right afterwards, with a ConfigError for example, must not break the others' setup.
        dist.all_reduce(torch.zeros(1, device="cpu"), group=cpu_group)
        return cls(
            rank=dist.get_rank(), size=dist.get_world_size(), device=device, timeout=timeout, cpu_group=cpu_group,
            owns_default_group=owns, _earlier_groups=earlier_groups,
        )  # fmt: skip

    @property
    def device_group(self) -> dist.ProcessGroup | None:
        """The process group for tensors on `device`."""
        return self.cpu_group if self.device.type == "cpu" else dist.group.WORLD

    def new_group(self, ranks: list[int]) -> dist.ProcessGroup:
        """Return a new group of ``ranks``, with the timeout. Its members must call this, and other ranks need not."""
        return cast(dist.ProcessGroup, dist.new_group(ranks, timeout=self.timeout, use_local_synchronization=True))

    def set_group_timeouts(self) -> None:
        """Set the timeout of every process group made since this world began, those of backends included.

        `new_group` does not inherit the timeout of the default group, and backends make groups themselves.
        """
        for group in self._new_groups():
            distributed_c10d._set_pg_timeout(self.timeout, group)

    @contextmanager
    def remembering_environment(self) -> Iterator[None]:
        """Record the environment variables that the body sets, for `close` to restore."""
        before = dict(os.environ)
        try:
            yield
        finally:
            for name in before.keys() | os.environ.keys():
                if before.get(name) != os.environ.get(name):
                    self._environment.setdefault(name, before.get(name))

    def close(self) -> None:
        """Destroy the process groups made since this world began, and restore the environment variables. Idempotent."""
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment.clear()
        if self.owns_default_group and dist.is_initialized():
            dist.destroy_process_group()
        for group in self._new_groups():
            dist.destroy_process_group(group)
        # torch joins a group's threads when its last reference is dropped. A gloo thread that still holds a tensor when
        # the interpreter exits aborts the process: "terminate called without an active exception".
        self.cpu_group, self._earlier_groups = None, frozenset()

    def _new_groups(self) -> set[dist.ProcessGroup]:
        """Return the groups created since this world joined; empty if it is alone."""
        return set() if self.cpu_group is None else set(_groups()) - self._earlier_groups


def current_rank() -> int:
    """Return this process's rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Gather the rows of all ranks, in place. All ranks of ``group`` must call this.

    Args:
        rows: Contiguous, of shape (ranks, elements). This rank's row is filled; the others are overwritten.
        group: The ranks that gather.
    """
    # In place, because gloo allocates a buffer of the same size. torch 2.13 renamed all_gather_into_tensor; 2.11 has only that.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    if rows.shape[0] > 1:
        gather(rows.view(-1), rows[dist.get_rank(group)], group=group)


def all_gather_objects(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Return the values of all ranks, in rank order; pickle copies them. All ranks of ``group`` must call this."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def device_of(config: StrategyConfig) -> torch.device:
    """Return the device of this process: its type from the settings, its index from `local_rank`.

    Raises:
        ConfigError: The settings ask for a CUDA device that torch does not find.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "device='cuda': expected a CUDA device, got none: torch.cuda.is_available() is false. Use device='cpu' or 'auto'"
        )
    index, count = local_rank(config), torch.cuda.device_count()
    if index >= count:
        raise ConfigError(
            f"local_rank={index}: expected a CUDA device for each local rank, got {count} on this host. Start at most "
            f"{count} processes on it"
        )
    return torch.device("cuda", index)


def local_rank(config: StrategyConfig) -> int:
    """Return the setting ``local_rank``, else LOCAL_RANK from the environment, else 0."""
    return config.local_rank if config.local_rank >= 0 else int(os.environ.get("LOCAL_RANK", "0"))


def _use_device(config: StrategyConfig) -> torch.device:
    """Return `device_of` the settings, and make it the current one, so that nothing is allocated on another GPU."""
    device = device_of(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _groups() -> Iterator[dist.ProcessGroup]:
    yield from distributed_c10d._world.pg_map


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    # Its functions have the process group of the moment of import as a default argument, and would keep it after `close`.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if _is_ranked():
        store, rank, size = _rendezvous(timeout)
    else:
        _check_alone()
        store, rank, size = HashStore(), 0, 1
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)


_SIZES = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun", "SLURM_STEP_NUM_TASKS": "srun"}
"""Variables in which a launcher that does not set RANK and WORLD_SIZE gives the number of processes, and its command."""


class Launch(NamedTuple):
    """How this script was started."""

    processes: int
    launcher: str
    variable: str = ""
    """The environment variable that gives the number of processes."""


def launch() -> Launch:
    """Return the processes as which this script was started: those of the caller's process group, else of a launcher."""
    if dist.is_initialized():
        return Launch(dist.get_world_size(), "a process group of the caller")
    sizes = {"WORLD_SIZE": "torchrun"} if _is_ranked() else _SIZES
    for variable, launcher in sizes.items():
        text = os.environ.get(variable, "1")
        if text.isdecimal() and text != "1":
            return Launch(int(text), launcher, variable)
    return Launch(1, "no launcher")


def _is_ranked() -> bool:
    """Return whether a launcher such as torchrun gave this process its rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _check_alone() -> None:
    """Raise `ConfigError` if a launcher started several processes and told none of them its rank."""
    processes, launcher, variable = launch()
    if processes > 1:
        raise ConfigError(
            f"get_strategy: expected RANK and WORLD_SIZE in each of the {processes} processes of {launcher} ({variable}), "
            f"got none. Each would train by itself and overwrite the others' checkpoints. Set RANK, WORLD_SIZE, "
            f"LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or use torchrun; for independent runs, unset {variable}"
        )


_stores: dict[tuple[str | None, str | None], tuple[Store, int, int]] = {}
"""The store, rank and world size of each rendezvous, by address and port. A store exists as long as the process."""
_lifetimes = itertools.count()


def _rendezvous(timeout: timedelta) -> tuple[Store, int, int]:
    """Return the store of torch's rendezvous, with a new prefix for its keys, the rank, and the world size.

    A process group leaves its addresses in the store. With the same keys, a second group would find the addresses of
    the first, which are closed. All ranks number their process groups in the same way.
    """
    address = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))
    if address not in _stores:
        _stores[address] = next(rendezvous("env://", timeout=timeout))
    store, rank, size = _stores[address]
    return PrefixStore(f"lightrft/{next(_lifetimes)}", store), rank, size
