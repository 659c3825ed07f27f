"""Measuring contenders side by side in one process, and the rows that every benchmark reports.

Other load on the machine changes times, but hardly their ratios: contenders take turns, round by
round, and what is reported is the median and the quartiles of the ratios of the rounds.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles

import torch

Action = Callable[[], object]


@dataclass(frozen=True)
class Goal:
    """A bound that a figure of this project should keep."""

    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One figure: ``value``, and the quartiles of the rounds around it."""

    case: str
    """What was done, and how much of it."""
    what: str
    """Who did it, compared with whom."""
    value: float
    low: float
    high: float
    unit: str = ""
    """Empty for a ratio."""
    goal: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        spread = "" if self.low == self.high else f" [{self.low:.3f}, {self.high:.3f}]"
        goal = f"   goal {self.goal}: {'met' if self.met else 'MISSED'}" if self.goal else ""
        return f"{self.case:44} {self.what:36} {self.value:9.3f} {self.unit:3}{spread}{goal}"


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--output", type=Path, help="write the rows to this JSON file, too")
    return made


class Report:
    """Prints rows as they are added, on rank 0, and writes them to ``output`` as JSON after each, so that none is lost."""

    def __init__(self, output: Path | None, rank: int = 0) -> None:
        self._output, self._rank = output, rank
        self.rows: list[Row] = []

    def compare(
        self,
        case: str,
        seconds: Mapping[str, Sequence[float]],
        reference: str,
        goals: Mapping[str, Goal] | None = None,
        *,
        inverse: bool = False,
    ) -> None:
        """Add a ratio to ``reference`` for each other contender. ``inverse``: of speeds instead of times."""
        for contender, taken in seconds.items():
            if contender != reference:
                ratios = [own / other for own, other in zip(taken, seconds[reference], strict=True)]
                ratios = [1 / ratio for ratio in ratios] if inverse else ratios
                self.add(case, f"{contender} / {reference}", ratios, goal=(goals or {}).get(contender))

    def add(self, case: str, what: str, values: Sequence[float], *, unit: str = "", goal: Goal | None = None) -> None:
        """Add a figure with one value per round."""
        low, middle, high = quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
        bound, met = ("", None) if goal is None else (str(goal), goal.met(middle))
        self.rows.append(Row(case, what, middle, low, high, unit, bound, met))
        if self._rank:
            return
        print(self.rows[-1], flush=True)
        if self._output is not None:
            self._output.write_text(json.dumps([asdict(row) for row in self.rows], indent=1) + "\n", encoding="utf-8")

    def times(self, case: str, seconds: Mapping[str, Sequence[float]]) -> None:
        """Add the milliseconds of each contender."""
        for contender, taken in seconds.items():
            self.add(case, contender, [1000 * second for second in taken], unit="ms")


def interleaved(
    contenders: Mapping[str, Action],
    rounds: int,
    device: torch.device,
    *,
    warm_up: int = 1,
    before: Action = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round. Every other round runs in reverse order.

    Args:
        contenders: By name.
        rounds: How many rounds count.
        device: What to wait for.
        warm_up: Rounds before them.
        before: Called before each turn, and not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + rounds):
        order = list(contenders.items())
        for name, action in reversed(order) if turn % 2 else order:
            before()
            seconds[name].append(seconds_of(action, device))
    return {name: taken[warm_up:] for name, taken in seconds.items()}


def seconds_of(action: Action, device: torch.device) -> float:
    """Seconds that ``action`` takes, with what it started on ``device``."""
    wait(device)
    start = time.perf_counter()
    action()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait for ``device`` to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def collectives_of(action: Action) -> int:
    """The collectives that this rank starts in one call."""
    with torch.profiler.profile() as profiler:
        action()
    return sum(event.count for event in profiler.key_averages() if event.key.startswith("c10d::"))
