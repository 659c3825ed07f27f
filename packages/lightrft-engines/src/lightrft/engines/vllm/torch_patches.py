"""Patches of torch that give vLLM separate process groups in the training's process; see `process_state`.

They hold only while vLLM runs: `ProcessState` puts torch's own values back whenever it leaves vLLM's state.
"""

from collections.abc import Callable
from typing import Any

from torch.distributed import distributed_c10d
from typing_extensions import override

from lightrft.strategy.patching import Patch, Target

SUPPORTED = ">=2.11"
_SOURCE = "https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/distributed_c10d.py"


def process_groups(world: object) -> Patch:
    """Make ``world`` the process groups that `torch.distributed` knows."""
    return Patch(
        target="torch.distributed.distributed_c10d:_world",
        replacement=lambda _: world,
        why="vLLM in process makes the default process group, and the training has one already. torch keeps one per "
        "process in this variable; torch's own multi-threaded tests replace it in the same way.",
        upstream=f"{_SOURCE}#L805",
        versions="2.11 to 2.13",
        until="vLLM can run on process groups that it is given.",
    )


def thread_setter(function: Callable[[int], None]) -> Patch:
    """Make ``function`` the `torch.set_num_threads` of this process."""
    return Patch(
        target="torch:set_num_threads",
        replacement=lambda _: function,
        why="vLLM's CPU worker replaces it with a function that does nothing, for the whole process.",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/worker/cpu_worker.py#L145",
        versions="vLLM 0.30 to 0.32",
        until="vLLM leaves `torch.set_num_threads` alone.",
    )


USED = tuple(
    Target(target=f"torch.distributed.distributed_c10d:{name}")
    for name in ("_World.group_count", "_get_default_store", "_resolve_process_group", "_register_process_group")
)
TARGETS = (process_groups(None), thread_setter(lambda count: None), *USED)
"""All that must exist."""


def isolated_groups(first_number: int) -> Any:
    """An empty set of process groups, independent of those in use.

    Args:
        first_number: The number of the first group. torch also registers groups by number, for the whole process.
    """

    class Groups(distributed_c10d._World):
        def __init__(self) -> None:
            super().__init__()
            self._maps: dict[str, dict[Any, Any]] = {}
            self._number = first_number

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

    return Groups()


def register_group_names() -> None:
    """Register the names of all process groups again.

    Device meshes find groups by name. torch forgets all names when any default group is destroyed:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/distributed_c10d.py#L2417
    """
    for group, name in distributed_c10d._world.pg_names.items():
        try:
            distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined]
        except RuntimeError:
            distributed_c10d._register_process_group(name, group)  # type: ignore[attr-defined]
