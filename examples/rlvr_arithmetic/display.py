"""What a run shows of the metrics that it logged: a progress bar, a page of plots, a table."""

from pathlib import Path
from typing import Self

from plots import Row, draw_page, logged, measured
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class Display:
    """Prints on one rank only, and draws ``page.png`` there."""

    def __init__(self, folder: Path, steps: int, title: str, *, is_shown: bool) -> None:
        self._folder, self._title, self._is_shown = folder, title, is_shown
        self._rows: list[Row] = []
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn()]
        self._console = Console(soft_wrap=True)
        self._progress = Progress(
            *columns, TextColumn("{task.fields[facts]}"), console=self._console, disable=not is_shown
        )
        self._task = self._progress.add_task("training", total=steps, facts="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        if self._rows:
            self._draw()
            self._say_table()
            self._say_padding()
            self._console.print(f"metrics and plots: {self._folder}", highlight=False)
        elif self._is_shown:
            self._console.print("it ended before anything was measured")

    def show(self, step: int) -> None:
        """Show what was logged last, and move the bar to ``step``."""
        self._rows = logged(self._folder) if self._is_shown else []
        if not self._rows:
            return
        if "exact_match" in self._rows[-1]:
            self._draw()  # now, so that there is a plot even if the run is interrupted
        facts = _facts(self._rows[-1])
        self._progress.update(self._task, completed=step, facts=facts)
        if not self._console.is_terminal:  # no progress bar: print a line instead
            self._console.print(f"step {step}  {facts}", highlight=False)

    def _draw(self) -> None:
        draw_page(self._folder / "page.png", {self._title: self._rows})

    def _say_table(self) -> None:
        values = measured(self._rows, "exact_match")
        before, after = values[0], values[-1]
        table = Table(title=f"exact match on held-out questions, {self._title}")
        for column in ("before", "after", "gain"):
            table.add_column(column, justify="right")
        table.add_row(f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points")
        self._console.print(table)

    def _say_padding(self) -> None:
        tokens, planned, fixed = (
            int(sum(measured(self._rows, name))) for name in ("tokens", "padding/planned", "padding/fixed")
        )
        if fixed:
            self._console.print(
                f"padding: {planned:,} tokens beside {tokens:,} of sequences; in micro-batches of a fixed size it would "
                f"be {fixed:,}: {1 - planned / fixed:.0%} saved",
                highlight=False,
            )


def _facts(row: Row) -> str:
    parts = {
        "exact match": ("exact_match", ".1%"), "reward": ("reward", ".2f"), "kl": ("kl", ".3f"),
        "norm": ("actor/grad_norm", ".2f"), "skipped": ("actor/skipped", ".0f"), "padding": ("padding/fraction", ".1%"),
        "seconds": ("seconds/total", ".0f"), "generation": ("seconds/generate", ".0f"),
    }  # fmt: skip
    return "  ".join(f"{label} {row[name]:{form}}" for label, (name, form) in parts.items() if name in row)
