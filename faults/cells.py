"""The strategies and world sizes that exchange checkpoints, and the process groups that run programs on them."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightrft.conformance import scratch
from lightrft.conformance.driver.worker_group import WorkerGroup
from lightrft.conformance.values import decode

Operation = dict[str, Any]
ROWS = 12

STRATEGIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "fake": ("fake", {}),
    "fsdp": ("fsdp", {}),
    "hsdp": ("fsdp", {"fsdp_shard_size": 1}),
    **{f"zero{stage}": ("deepspeed", {"zero_stage": stage}) for stage in range(4)},
}
WORLDS = (1, 2, 3)


class Failed(Exception):
    """An operation raised, or a rank did not answer in time."""


@dataclass(frozen=True)
class Cell:
    """A cell of the test matrix: a strategy at a world size."""

    strategy: str
    world: int

    def __str__(self) -> str:
        return f"{self.strategy} x {self.world}"

    def command(self, operations: list[Operation], **settings: Any) -> dict[str, Any]:
        """The program that a worker group of this world size runs."""
        name, fixed = STRATEGIES[self.strategy]
        geometry = {"train_batch_size": ROWS, "micro_train_batch_size": ROWS // self.world}
        merged = {"bf16": False, "max_norm": None, **geometry, **settings}
        fixed = {"device": "cpu", **fixed}
        return {"program": {"strategy": name, "fixed": fixed, "settings": merged, "operations": operations}}


def cells(strategies: list[str] | None = None, worlds: tuple[int, ...] = WORLDS) -> list[Cell]:
    """All cells, or those of ``strategies``. FakeStrategy has one rank."""
    chosen = strategies or list(STRATEGIES)
    return [Cell(name, world) for world in worlds for name in chosen if name != "fake" or world == 1]


class Groups:
    """One process group per world size, started at first use; all share one directory."""

    def __init__(self) -> None:
        self._groups: dict[int, WorkerGroup] = {}
        self._directory = scratch.choose()

    def __getitem__(self, world: int) -> WorkerGroup:
        if world not in self._groups:
            self._groups[world] = WorkerGroup(world, directory=self._directory)
        return self._groups[world]

    def run(self, cell: Cell, operations: list[Operation], seconds: float = 120.0, **settings: Any) -> list[list[Any]]:
        """Observations of ``operations``, by rank. Raises `Failed` if one without ``may_fail`` raised."""
        reports = self[cell.world].run(cell.command(operations, **settings), seconds)
        by_rank = []
        for rank, report in enumerate(reports):
            if report.state != "answered" or "broken" in report.answer:
                raise Failed(f"{cell}, rank {rank} {report.state}: {report.detail}{report.answer.get('broken', '')}")
            observations = [decode(observation) for observation in report.answer["observations"]]
            for seen, operation in zip(observations, operations, strict=False):
                if isinstance(seen, dict) and "error" in seen and not operation.get("may_fail"):
                    raise Failed(f"{cell}, rank {rank}: {operation['do']} raised {seen['error'][0]}: {seen['message']}")
            by_rank.append(observations)
        return by_rank

    def close(self) -> None:
        """End all processes and remove their directory."""
        for group in self._groups.values():
            group.close()
        shutil.rmtree(self._directory, ignore_errors=True)


@contextmanager
def open_groups() -> Iterator[Groups]:
    """`Groups`, closed at the end."""
    groups = Groups()
    try:
        yield groups
    finally:
        groups.close()


def setup(seed: int = 1, kind: str = "regressor") -> list[Operation]:
    """Build a model, with an optimizer and a schedule, and prepare it."""
    return [
        {"do": "build", "model": "a", "kind": kind, "seed": seed},
        {"do": "optimizer", "model": "a", "lr": 1e-3, "weight_decay": 0.01},
        {"do": "schedule", "model": "a"},
        {"do": "prepare", "model": "a"},
    ]


def train(first: int, count: int) -> Operation:
    """``count`` updates; update n uses the same rows at any world size."""
    return {"do": "train_shared", "model": "a", "first": first, "count": count}


LOOK: Operation = {"do": "weights", "model": "a"}
