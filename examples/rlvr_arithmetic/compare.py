"""Draw the learning curves of several runs into one picture: ``python compare.py PICTURE NAME=RUN [NAME=RUN ...]``."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> int:
    picture, *runs = sys.argv[1:]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    for index, (name, _, folder) in enumerate(run.partition("=") for run in runs):
        points = measured(Path(folder))
        style = {"marker": "os^Dv"[index % 5], "markersize": 9 - 2 * index, "linewidth": 4 - index}
        axes.plot([step for step, _ in points], [part for _, part in points], label=name, alpha=0.8, **style)
    axes.set(xlabel="step", ylabel="exact match on held-out questions", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(picture)
    return 0


def measured(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["exact_match"]) for row in rows if row.get("exact_match") is not None]


if __name__ == "__main__":
    sys.exit(main())
