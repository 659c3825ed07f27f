"""Metrics of runs, read from the JSON lines that `strategy.log` wrote, and pictures of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = Mapping[str, float]
"""The metrics of a step, by name."""
PANELS = {
    "exact_match": "exact match, held-out questions",
    "reward": "reward of samples",
    "kl": "KL divergence from the initial model",
    "actor/loss": "loss",
    "actor/grad_norm": "gradient norm",
    "rollout/completion_tokens/mean": "tokens of a completion",
    "seconds/total": "seconds of a step",
    "seconds/generate": "seconds in generation",
    "seconds/backward": "seconds in backward passes",
}
"""What the page shows, and its titles."""


def logged(folder: Path) -> list[Row]:
    """Return what the last run in ``folder`` logged: one row for each step, from step 0 on."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    begin = max((index for index, row in enumerate(rows) if row["step"] == 0), default=0)
    return [{name: float(value) for name, value in row.items()} for row in rows[begin:]]  # NaN is the string "NaN"


def measured(rows: Sequence[Row], name: str) -> list[float]:
    """Return the values of one metric, in the order of steps."""
    return [row[name] for row in rows if name in row]


def draw_curves(path: Path, runs: Mapping[str, Sequence[Row]]) -> None:
    """Draw held-out exact match of several runs in one picture."""
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    _draw_metric(axes, runs, "exact_match")
    axes.set(xlabel="step", ylabel="exact match on held-out questions", ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def draw_page(path: Path, runs: Mapping[str, Sequence[Row]]) -> None:
    """Draw all metrics of `PANELS`, each with the curves of all runs."""
    figure, grid = plt.subplots(3, 3, figsize=(12, 8), dpi=100, layout="constrained", sharex=True)
    for axes, (name, title) in zip(grid.flat, PANELS.items(), strict=True):
        _draw_metric(axes, runs, name)
        axes.set_title(title, fontsize="medium")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    figure.legend(*grid[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(runs))
    _save(figure, path)


def _draw_metric(axes: Axes, runs: Mapping[str, Sequence[Row]], name: str) -> None:
    for index, (run, rows) in enumerate(runs.items()):
        style = {"marker": "os^Dv"[index % 5], "markersize": max(3, 9 - 2 * index), "linewidth": max(1, 4 - index)}
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot([step for step, _ in points], [value for _, value in points], label=run, alpha=0.8, **style)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    temporary_path = path.with_name(f".{path.name}")
    figure.savefig(temporary_path, format="png")
    plt.close(figure)
    temporary_path.replace(path)  # atomic: a reader or an interrupt never sees a partial file
