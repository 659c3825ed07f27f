"""The strategies and world sizes between which checkpoints move, and groups of processes that run programs on them."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightrft.conformance.driver import scratch
from lightrft.conformance.driver.group import WorkerGroup
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
    """An operation raised, or a rank did not answer."""


@dataclass(frozen=True)
class Cell:
    """A strategy on a number of ranks."""

    strategy: str
    world: int

    def __str__(self) -> str:
        return f"{self.strategy} x {self.world}"

    def command(self, operations: list[Operation], **settings: Any) -> dict[str, Any]:
        """As it is sent to the workers of this many ranks."""
        name, fixed = STRATEGIES[self.strategy]
        geometry = {"train_batch_size": ROWS, "micro_train_batch_size": ROWS // self.world}
        merged = {"bf16": False, "max_norm": None, **geometry, **settings}
        fixed = {"device": "cpu", **fixed}
        return {"program": {"strategy": name, "fixed": fixed, "settings": merged, "operations": operations}}


def cells(strategies: list[str] | None = None, worlds: tuple[int, ...] = WORLDS) -> list[Cell]:
    """All, or those of some; FakeStrategy has one rank."""
    chosen = strategies or list(STRATEGIES)
    return [Cell(it, world) for world in worlds for it in chosen if it != "fake" or world == 1]


class Groups:
    """A group of processes for each world size, started when it is needed; all see the same files."""

    def __init__(self) -> None:
        self._groups: dict[int, WorkerGroup] = {}
        self._place = scratch.choose()

    def __getitem__(self, world: int) -> WorkerGroup:
        if world not in self._groups:
            self._groups[world] = WorkerGroup(world, place=self._place)
        return self._groups[world]

    def run(self, cell: Cell, operations: list[Operation], seconds: float = 120.0, **settings: Any) -> list[list[Any]]:
        """The observations by rank. Raises `Failed` where an operation raised that must not."""
        reports = self[cell.world].run(cell.command(operations, **settings), seconds)
        found = []
        for rank, report in enumerate(reports):
            if report.state != "answered" or "broken" in report.answer:
                raise Failed(f"{cell}, rank {rank} {report.state}: {report.detail}{report.answer.get('broken', '')}")
            seen = [decode(it) for it in report.answer["observations"]]
            for it, operation in zip(seen, operations, strict=False):
                if isinstance(it, dict) and "error" in it and not operation.get("may_fail"):
                    raise Failed(f"{cell}, rank {rank}: {operation['do']} raised {it['error'][0]}: {it['message']}")
            found.append(seen)
        return found

    def close(self) -> None:
        """End all processes, and remove what they wrote."""
        for group in self._groups.values():
            group.close()
        shutil.rmtree(self._place, ignore_errors=True)


@contextmanager
def groups() -> Iterator[Groups]:
    """Groups for the time of the body."""
    made = Groups()
    try:
        yield made
    finally:
        made.close()


def setup(seed: int = 1, kind: str = "regressor") -> list[Operation]:
    """A model in training, with a schedule."""
    return [
        {"do": "build", "model": "a", "kind": kind, "seed": seed},
        {"do": "optimizer", "model": "a", "lr": 1e-3, "weight_decay": 0.01},
        {"do": "schedule", "model": "a"},
        {"do": "prepare", "model": "a"},
    ]


def train(first: int, count: int) -> Operation:
    """Updates from the same rows on any number of ranks."""
    return {"do": "train_shared", "model": "a", "first": first, "count": count}


LOOK: Operation = {"do": "weights", "model": "a"}
