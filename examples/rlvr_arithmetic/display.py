"""What a run shows and leaves behind: a progress bar, ``metrics.jsonl``, a picture, a table."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class Display:
    """Prints and writes on one rank only."""

    def __init__(self, output: Path, steps: int, title: str, *, speaks: bool) -> None:
        self._output, self._title, self._speaks = output, title, speaks
        self._rows: list[dict[str, Any]] = []
        self._seconds: dict[str, float] = {}
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn()]
        self._console = Console(soft_wrap=True)
        self._progress = Progress(
            *columns, TextColumn("{task.fields[facts]}"), console=self._console, disable=not speaks
        )
        self._task = self._progress.add_task("training", total=steps, facts="")
        if speaks:
            output.mkdir(parents=True, exist_ok=True)
            (output / "metrics.jsonl").write_text("")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        if self._speaks and not self._rows:
            self._console.print("it ended before anything was measured")
        elif self._speaks:
            self._draw()
            self._say_table()
            self._console.print(f"metrics and picture: {self._output}", highlight=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body as ``name``."""
        begun = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begun

    def record(self, step: int, **facts: Any) -> None:
        """Write one line of metrics, and move the bar. The line is on disk when this returns."""
        row = {"step": step, **facts, **{f"seconds_{name}": round(it, 3) for name, it in self._seconds.items()}}
        self._seconds.clear()
        if not self._speaks:
            return
        self._rows.append(row)
        with (self._output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if row.get("exact_match") is not None:
            self._draw()  # now, so that there is a plot even if the run is interrupted
        self._progress.update(self._task, completed=step, facts=_facts(row))
        if not self._console.is_terminal:  # no progress bar: print a line instead
            self._console.print(f"step {step}  {_facts(row)}", highlight=False)

    def _draw(self) -> None:
        draw(self._rows, self._output / "curve.png", self._title)

    def _say_table(self) -> None:
        measured = [row for row in self._rows if row.get("exact_match") is not None]
        if len(measured) < 2:
            return
        before, after = measured[0]["exact_match"], measured[-1]["exact_match"]
        table = Table(title=f"exact match on held-out questions, {self._title}")
        for column in ("before", "after", "gain"):
            table.add_column(column, justify="right")
        table.add_row(f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points")
        self._console.print(table)
        self._say_padding()

    def _say_padding(self) -> None:
        tokens, padding, fixed = (
            int(sum(row.get(name, 0) for row in self._rows)) for name in ("tokens", "padding", "fixed_padding")
        )
        if fixed:
            self._console.print(
                f"padding: {padding:,} tokens beside {tokens:,} of sequences; in micro-batches of a fixed size it would "
                f"be {fixed:,}: {1 - padding / fixed:.0%} saved",
                highlight=False,
            )


def _facts(row: dict[str, Any]) -> str:
    exact_match = "" if row.get("exact_match") is None else f"exact match {row['exact_match']:.1%}  "
    if "reward" not in row:
        return exact_match
    seconds = " ".join(
        f"{name} {row[f'seconds_{name}']:.1f}s" for name in ("rollout", "train", "sync") if f"seconds_{name}" in row
    )
    facts = f"reward {row['reward']:.2f}  kl {row['kl']:.3f}  norm {row['grad_norm']:.2f}  skipped {row['skipped']}"
    padding = f"padding {row['padding'] / max(1, row['tokens']):.1%}"
    return f"{exact_match}{facts}  {padding}  {seconds}"


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """The learning curve: sampled reward at every step, exact match where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trained = [row for row in rows if "reward" in row]
    measured = [row for row in rows if row.get("exact_match") is not None]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    axes.plot(
        [row["step"] for row in trained], [row["reward"] for row in trained], color="0.6", label="reward of samples"
    )
    axes.plot(
        [row["step"] for row in measured], [row["exact_match"] for row in measured], "o-", color="tab:blue",
        label="exact match, held-out questions",
    )  # fmt: skip
    axes.set(xlabel="step", ylabel="part answered right, in the asked form", ylim=(0, 1), title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    temporary_path = path.with_name(f".{path.name}")
    figure.savefig(temporary_path, format="png")
    plt.close(figure)
    temporary_path.replace(path)  # atomic: a reader or an interrupt never sees a partial file
