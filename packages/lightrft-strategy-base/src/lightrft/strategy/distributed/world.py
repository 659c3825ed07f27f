"""The ranks that train together: this process's place among them, and the process groups that join them.

A `World` is either joined (a process group: torchrun's, the caller's own, or a world of one made here) or
alone (no process group at all). What it made, `close` gives back; what it found, it leaves alone.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, distributed_c10d, rendezvous  # type: ignore[attr-defined]

from lightrft.config import ConfigError, StrategyConfig


@dataclass(kw_only=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta
    control: dist.ProcessGroup | None = None
    """A gloo group of all ranks, for messages in host memory; None where there is no process group."""
    owns_default_group: bool = False
    _found_groups: frozenset[dist.ProcessGroup] = frozenset()
    _environment: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def alone(cls, config: StrategyConfig) -> "World":
        """One process, no process group, no environment variables."""
        return cls(rank=0, size=1, device=device_of(config), timeout=timedelta(seconds=config.timeout))

    @classmethod
    def join(cls, config: StrategyConfig) -> "World":
        """The caller's process group, else the one that torchrun announces, else a world of one."""
        device, timeout = device_of(config), timedelta(seconds=config.timeout)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        found, owns = frozenset(_groups()), not dist.is_initialized()
        if owns:
            _init_process_group(device, timeout)
        # The caller's default group may lack gloo, and has a timeout of its own: control messages get a group.
        control = dist.group.WORLD if owns else dist.new_group(backend="gloo", timeout=timeout)
        # A rank that leaves at once, by a ConfigError say, must not break up the connecting of the others.
        dist.all_reduce(torch.zeros(1), group=control)
        return cls(
            rank=dist.get_rank(), size=dist.get_world_size(), device=device, timeout=timeout, control=control,
            owns_default_group=owns, _found_groups=found,
        )  # fmt: skip

    @property
    def payload(self) -> dist.ProcessGroup | None:
        """The group over which tensors of `device` travel."""
        return self.control if self.device.type == "cpu" else dist.group.WORLD

    def new_group(self, ranks: list[int]) -> dist.ProcessGroup:
        """A group of some ranks, with the timeout. Only its members call this."""
        group: dist.ProcessGroup = dist.new_group(ranks, timeout=self.timeout, use_local_synchronization=True)
        return group

    def impose_timeout(self) -> None:
        """Give the timeout to every process group made since this world began, a backend's own included.

        `new_group` does not inherit the timeout of the default group, and backends make groups of their own.
        """
        for group in self._own_groups():
            distributed_c10d._set_pg_timeout(self.timeout, group)

    @contextmanager
    def remembering_environment(self) -> Iterator[None]:
        """Note the environment variables that the body sets, for `close` to put back."""
        before = dict(os.environ)
        try:
            yield
        finally:
            for name in before.keys() | os.environ.keys():
                if before.get(name) != os.environ.get(name):
                    self._environment.setdefault(name, before.get(name))

    def close(self) -> None:
        """Destroy the process groups, and put back the environment variables, that came with this world."""
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment.clear()
        if self.owns_default_group and dist.is_initialized():
            dist.destroy_process_group()
        for group in self._own_groups():
            dist.destroy_process_group(group)

    def _own_groups(self) -> set[dist.ProcessGroup]:
        """Those made since this world began; none where it is alone, whatever else has groups in this process."""
        return set() if self.control is None else set(_groups()) - self._found_groups


def current_rank() -> int:
    """This process's rank in the default process group; 0 where there is none."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill the rows of a contiguous 2-D tensor, one for each rank, of which this rank has filled its own."""
    # In place, since gloo takes as much again for itself. torch 2.13 renamed all_gather_into_tensor; 2.11 has only that.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    if rows.shape[0] > 1:
        gather(rows.view(-1), rows[dist.get_rank(group)], group=group)


def device_of(config: StrategyConfig) -> torch.device:
    """The device that the settings, and for its index the environment, give this process."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda' was asked for, and torch finds no CUDA device; use device='cpu' or 'auto'")
    index, count = local_rank(config), torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"local rank {index} has no CUDA device of its own: torch finds {count} on this host")
    return torch.device("cuda", index)


def local_rank(config: StrategyConfig) -> int:
    """The explicit ``local_rank``, else LOCAL_RANK of the environment, else 0."""
    return config.local_rank if config.local_rank >= 0 else int(os.environ.get("LOCAL_RANK", "0"))


def _groups() -> Iterator[dist.ProcessGroup]:
    yield from distributed_c10d._world.pg_map


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, size = _meeting_place(timeout)
    else:
        store, rank, size = HashStore(), 0, 1
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)


_stores: dict[tuple[str | None, str | None], tuple[Store, int, int]] = {}
"""The store of each rendezvous of this process, by address and port; it lives as long as the process."""
_lifetimes = itertools.count()


def _meeting_place(timeout: timedelta) -> tuple[Store, int, int]:
    """The store of the ordinary rendezvous, under keys of this lifetime's own, with rank and world size.

    A process group leaves its addresses in the store. Under the same keys, a second one would find the
    addresses of the first, where nobody listens any more. All ranks count their lifetimes alike.
    """
    place = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))
    if place not in _stores:
        _stores[place] = next(rendezvous("env://", timeout=timeout))
    store, rank, size = _stores[place]
    return PrefixStore(f"lightrft/{next(_lifetimes)}", store), rank, size
