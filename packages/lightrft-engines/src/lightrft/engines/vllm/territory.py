"""A place inside this process for a library that takes the whole process for its own.

vLLM in process makes the default process group, seeds every random stream, sets environment variables and replaces
`torch.set_num_threads`. Training has all of these too. Inside a `Territory` they are the library's, and persist from
one visit to the next; outside they are the training's, untouched.
"""

import os
import random
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, distributed_c10d  # type: ignore[attr-defined]
from typing_extensions import override


class Groups(distributed_c10d._World):
    """Process groups that know nothing of those outside; torch's multi-threaded tests replace them in the same way."""

    def __init__(self, first_number: int) -> None:
        super().__init__()
        self._maps: dict[str, dict[Any, Any]] = {}
        self._number = first_number  # groups are also registered by number, for the whole process

    def _map(self, name: str) -> dict[Any, Any]:
        return self._maps.setdefault(name, {})

    pg_map = property(lambda self: self._map("pg_map"))
    pg_names = property(lambda self: self._map("pg_names"))
    pg_group_ranks = property(lambda self: self._map("pg_group_ranks"))
    pg_backend_config = property(lambda self: self._map("pg_backend_config"))
    tags_to_pg = property(lambda self: self._map("tags_to_pg"))
    pg_to_tag = property(lambda self: self._map("pg_to_tag"))

    @property
    @override
    def group_count(self) -> int:
        return self._number

    @group_count.setter
    def group_count(self, value: int) -> None:
        self._number = value


@dataclass(kw_only=True)
class _State:
    """What is swapped at the border."""

    groups: distributed_c10d._World
    streams: tuple[Any, ...]
    environment: dict[str, str]
    set_num_threads: Any

    @classmethod
    def current(cls) -> Self:
        return cls(
            groups=distributed_c10d._world,
            streams=_streams(),
            environment=dict(os.environ),
            set_num_threads=torch.set_num_threads,
        )

    def enter(self) -> None:
        distributed_c10d._world = self.groups
        torch.set_num_threads = self.set_num_threads
        _set_streams(self.streams)
        _set_environment(self.environment)


class Territory:
    """One library's place. Enter it with `inside`; step out of it for a while with `outside`."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, timeout: timedelta) -> None:
        """``group``: the ranks whose territories together are one world; None for a world of this process alone."""
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._device, self._timeout = device, timeout
        self._token = _agree_on_token(group)
        self.number = int(self._token, 16)
        """No other territory has it; the same on all ranks of ``group``."""
        self._store: Store = HashStore() if group is None else distributed_c10d._get_default_store()
        self._own = _State.current()
        self._own.groups = Groups(first_number=self.number)
        self._other: _State | None = None  # the state outside, while inside

    def set_variables(self, variables: Mapping[str, str]) -> None:
        """Environment variables that hold inside."""
        self._own.environment.update(variables)

    def found(self) -> None:
        """Make the default process group inside."""
        with self.inside():
            backend = "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo"
            store = PrefixStore(f"lightrft/territory/{self._token}", self._store)
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=self._timeout,
                device_id=self._device if self._device.type == "cuda" else None,
            )  # fmt: skip

    def abandon(self) -> None:
        """Destroy the process groups inside; those outside stay, by their names too."""
        with self.inside():
            if dist.is_initialized():
                dist.destroy_process_group()
        _register_names(distributed_c10d._world)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The library's state, for the body; may be nested."""
        if self._other is not None:
            yield
            return
        self._other = _State.current()
        self._own.enter()
        try:
            yield
        finally:
            self._own = _State.current()
            self._other.enter()
            self._other = None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """The training's state, for the body of a call that comes from inside."""
        if self._other is None:
            yield
            return
        own, other = _State.current(), self._other
        other.enter()
        self._other = None
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            self._other = _State.current()
            own.enter()


def _agree_on_token(group: dist.ProcessGroup | None) -> str:
    """A name that no other territory has, the same on all ranks of ``group``."""
    token = [uuid.uuid4().hex[:11]]  # with room above it, in 64 bits, for numbers of groups
    if group is not None:
        dist.broadcast_object_list(token, src=dist.get_global_rank(group, 0), group=group)
    return token[0]


def _register_names(groups: distributed_c10d._World) -> None:
    """Torch finds groups by name too, device meshes do it so, and forgets all names when any default group is destroyed."""
    known = torch._C._distributed_c10d
    for group, name in groups.pg_names.items():
        try:
            known._resolve_process_group(name)
        except RuntimeError:
            known._register_process_group(name, group)


def _streams() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_streams(streams: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = streams
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


def _set_environment(wanted: Mapping[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
