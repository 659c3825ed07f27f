"""A separate process state for a library that changes process-wide state.

vLLM in process makes the default process group, seeds every random generator, sets environment variables and replaces
`torch.set_num_threads`. The training has all of these too. Inside a `ProcessState` they are the library's, and they
persist from one visit to the next. Outside they are the training's, unchanged.
"""

import os
import random
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, distributed_c10d  # type: ignore[attr-defined]

from lightrft.engines.vllm import torch_patches


@dataclass(kw_only=True)
class _State:
    """What is exchanged on entering and leaving."""

    groups: object
    generators: tuple[Any, ...]
    environment: dict[str, str]
    set_num_threads: Callable[[int], None]

    @classmethod
    def current(cls) -> Self:
        return cls(
            groups=distributed_c10d._world,
            generators=_generator_states(),
            environment=dict(os.environ),
            set_num_threads=torch.set_num_threads,
        )

    def enter(self) -> None:
        torch_patches.process_groups(self.groups).apply()
        torch_patches.thread_setter(self.set_num_threads).apply()
        _set_generator_states(self.generators)
        _set_environment(self.environment)


class ProcessState:
    """One library's process state. Enter it with `inside`, and leave it for a while with `outside`."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, timeout: timedelta) -> None:
        """Start from a copy of the current state, without its process groups.

        Args:
            group: The ranks whose states together form one world; None for a world of this process alone.
            device: The device of the process groups inside.
            timeout: The timeout of the process groups inside.
        """
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._device, self._timeout = device, timeout
        self._token = _shared_token(group)
        self.number = int(self._token, 16)
        """Unique to this object, and the same on all ranks of ``group``."""
        self._store: Store = HashStore() if group is None else distributed_c10d._get_default_store()
        self._inner = _State.current()
        self._inner.groups = torch_patches.isolated_groups(self.number)
        self._outer: _State | None = None  # set while inside

    def set_variables(self, variables: Mapping[str, str]) -> None:
        """Set environment variables inside."""
        self._inner.environment.update(variables)

    def initialize(self) -> None:
        """Make the default process group inside. All ranks of the group must call this."""
        with self.inside():
            backend = "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo"
            store = PrefixStore(f"lightrft/process_state/{self._token}", self._store)
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=self._timeout,
                device_id=self._device if self._device.type == "cuda" else None,
            )  # fmt: skip

    def destroy(self) -> None:
        """Destroy the process groups inside. Those outside stay, with their names."""
        with self.inside():
            if dist.is_initialized():
                dist.destroy_process_group()
        torch_patches.register_group_names()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Run the body in the library's state. May be nested."""
        if self._outer is not None:
            yield
            return
        self._outer = _State.current()
        self._inner.enter()
        try:
            yield
        finally:
            self._inner = _State.current()
            self._outer.enter()
            self._outer = None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Run the body, part of a call from inside, in the training's state."""
        if self._outer is None:
            yield
            return
        inner, outer = _State.current(), self._outer
        outer.enter()
        self._outer = None
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            self._outer = _State.current()
            inner.enter()


def _shared_token(group: dist.ProcessGroup | None) -> str:
    """A unique name, the same on all ranks of ``group``."""
    token = [uuid.uuid4().hex[:11]]  # as a number it leaves room in 64 bits for the groups that follow it
    if group is not None:
        dist.broadcast_object_list(token, src=dist.get_global_rank(group, 0), group=group)
    return token[0]


def _generator_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_generator_states(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


def _set_environment(variables: Mapping[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    for name, value in variables.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
