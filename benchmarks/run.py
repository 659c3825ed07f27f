"""Run benchmarks by name: ``python benchmarks/run.py [NAME ...] [--output FOLDER] [--compare] [--save-baseline]``.

Without names, all run that need no engine of their own environment. Prints every figure, and writes them to FOLDER: a JSON file
per benchmark, one table (``table.md``) with versions, machine and command on top, and a picture of the ratios. ``--compare``
says which ratios moved beyond the bounds in ``baseline.json``; ``--save-baseline`` writes that file: what was run replaces
what it has of the same benchmarks. A missed goal or a ratio that moved is printed, and is not an error: these figures depend
on the machine.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from measure import Row

HERE = Path(__file__).parent
BASELINE = HERE / "baseline.json"
SLACK = 0.02
"""A ratio moved if it is further than this share from the quartiles of the baseline."""
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "lightning-fabric", "safetensors")


@dataclass(frozen=True)
class Benchmark:
    """A script, its arguments and its number of processes."""

    script: str
    arguments: tuple[str, ...] = ()
    ranks: int = 1

    @property
    def command(self) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        return [sys.executable, *(launcher if self.ranks > 1 else []), str(HERE / self.script), *self.arguments]


STRATEGIES = {"fake": 1, "fsdp": 2, "hsdp": 4, "zero0": 2, "zero1": 2, "zero2": 2, "zero3": 2}
"""The strategies whose updates are measured, with their numbers of ranks."""
REPEATED = {"fake", "fsdp", "zero1", "zero2", "zero3"}
"""Those measured with eight micro-batches and with a large model, too."""


def _steps() -> dict[str, Benchmark]:
    """An update of 1 ms, of 20 ms, of eight micro-batches, with denominators and a large one; and where its time goes."""
    sizes: dict[str, tuple[tuple[str, ...], Set[str]]] = {
        "1ms": (("--size=1 ms", "--rounds=200"), STRATEGIES.keys()),
        "20ms": (("--size=20 ms", "--rounds=300"), STRATEGIES.keys() - {"hsdp"}),
        "20ms.K8": (("--size=20 ms", "--accumulation=8", "--rounds=40"), REPEATED),
        "denominators": (("--size=20 ms", "--rounds=300", "--denominators"), {"fake", "fsdp", "zero2"}),
        "large": (("--size=large", "--rounds=12"), REPEATED),
        "profile": (("--size=1 ms", "--profile"), {"fake", "fsdp", "zero2"}),
    }
    return {
        f"step.{strategy}.{size}": Benchmark("steps.py", (strategy, *arguments), ranks)
        for size, (arguments, measured) in sizes.items()
        for strategy, ranks in STRATEGIES.items()
        if strategy in measured
    }


def _syncs(*engines: str) -> dict[str, Benchmark]:
    return {
        f"sync.{engine}.{name}": Benchmark("weight_sync.py", (engine, f"--strategy={strategy}"), ranks=ranks)
        for engine in engines
        for name, strategy, ranks in (("fake", "fake", 1), ("fsdp", "fsdp", 2), ("zero3", "deepspeed", 2))
    }


BENCHMARKS = {
    **_steps(),
    "collectives": Benchmark("collectives.py", ranks=2),
    "checkpoint": Benchmark("checkpoints.py"),
    "memory": Benchmark("memory.py"),
    "offload.fsdp": Benchmark("offload.py", ("fsdp",)),
    "planning": Benchmark("planning.py"),
    "log_probs": Benchmark("log_probs.py"),
    "sequence_parallel": Benchmark("sequence_parallel.py", ranks=2),
    **_syncs("transformers"),
    "imports": Benchmark("imports.py"),
    "conformance": Benchmark("certification.py"),
    "scale": Benchmark("scale.py"),
}
SYNCS = _syncs("vllm", "sglang")


def main() -> int:
    known = BENCHMARKS | SYNCS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"{', '.join(known)}; a prefix selects all that begin with it")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--save-baseline", action="store_true")
    args = parser.parse_args()
    unknown = [name for name in args.names if not _selected(known, [name])]
    if unknown:
        print(f"unknown benchmark: {', '.join(unknown)}; expected one of {', '.join(known)}", file=sys.stderr)
        return 2
    if args.compare and not BASELINE.exists():
        print(
            f"expected a baseline to compare with in {BASELINE}, found none; make one with --save-baseline",
            file=sys.stderr,
        )
        return 2
    names = _selected(known, args.names) if args.names else list(BENCHMARKS)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = measured(names, args.output)
    (args.output / "table.md").write_text(table(rows), encoding="utf-8")
    draw(rows, args.output / "ratios.png")
    if args.save_baseline:
        BASELINE.write_text(json.dumps(baseline(rows, stored_runs()), indent=0) + "\n", encoding="utf-8")
    if args.compare:
        print(*moved_ratios(rows, stored_runs()), sep="\n")
    missed = [row for found in rows.values() for row in found if row.met is False]
    print(f"\n{len(missed)} goals missed" + "".join(f"\n{row}" for row in missed))
    failed = [name for name, found in rows.items() if not found]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def _selected(known: Iterable[str], names: Sequence[str]) -> list[str]:
    return [name for name in known if any(name == chosen or name.startswith(f"{chosen}.") for chosen in names)]


def measured(names: Sequence[str], output: Path) -> dict[str, list[Row]]:
    """Run the benchmarks; return the rows of each, none for one that failed."""
    rows = {}
    for name in names:
        path = output / f"{name}.json"
        path.unlink(missing_ok=True)
        print(f"\n{name}", flush=True)
        start = time.monotonic()
        succeeded = succeeds((BENCHMARKS | SYNCS)[name], path)
        print(f"{time.monotonic() - start:.0f} s", flush=True)
        found = json.loads(path.read_text(encoding="utf-8")) if succeeded and path.exists() else []
        rows[name] = [Row(**row) for row in found]
    return rows


def succeeds(benchmark: Benchmark, output: Path) -> bool:
    threads = str(max(1, len(os.sched_getaffinity(0)) // benchmark.ranks))
    command = [*benchmark.command, f"--output={output.resolve()}"]
    return subprocess.call(command, env={"OMP_NUM_THREADS": threads, **os.environ}) == 0


# What is written


def machine() -> list[str]:
    """What the figures depend on."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    processor = next(
        (line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return [
        f"Python {platform.python_version()}, {', '.join(versions)}",
        f"{len(os.sched_getaffinity(0))} cores of {processor}, load {os.getloadavg()[0]:.1f} at the end",
        f"`python benchmarks/run.py {shlex.join(sys.argv[1:])}`".replace(" `", "`"),
    ]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def table(rows: dict[str, list[Row]]) -> str:
    """All rows as Markdown."""
    lines = ["# Benchmarks", "", *(f"- {line}" for line in machine()), ""]
    lines += ["Medians, and the quartiles of the rounds.", "", "| case | figure | median | quartiles | goal |"]
    lines += ["|---|---|---:|---:|---|"]
    for row in (row for found in rows.values() for row in found):
        spread = "" if row.low == row.high else f"{row.low:.3f} to {row.high:.3f}"
        goal = f"{row.goal}: {'met' if row.met else 'missed'}" if row.goal else ""
        lines.append(f"| {row.case} | {row.what} | {row.value:.3f} {row.unit} | {spread} | {goal} |")
    return "\n".join(lines) + "\n"


def draw(rows: dict[str, list[Row]], path: Path) -> None:
    """Draw the ratios between 0 and 3, with their quartiles."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    ratios = [row for found in rows.values() for row in found if not row.unit and " / " in row.what and row.value < 3]
    if not ratios:
        return
    figure, axes = pyplot.subplots(figsize=(10, 0.22 * len(ratios) + 1))
    positions = range(len(ratios), 0, -1)
    for position, row in zip(positions, ratios, strict=True):
        colour = "tab:blue" if row.what.startswith("ours") else "tab:gray"
        axes.plot([row.low, row.high], [position, position], color=colour)
        axes.plot(row.value, position, "o", color=colour)
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_yticks(list(positions), [f"{row.case}: {row.what}" for row in ratios], fontsize=7)
    axes.set_xlabel("ratio")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


# The baseline


def stored_runs() -> list[dict[str, Any]]:
    """The runs in the baseline: each with its commit, machine and figures."""
    runs: list[dict[str, Any]] = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else []
    return runs


def baseline(rows: dict[str, list[Row]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``before`` and a run with ``rows``, which replace earlier ones of the same benchmarks.

    docs/build.py makes the tables of docs/performance.md from it.
    """
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True).stdout
    figures = [
        {
            "benchmark": name, "case": row.case, "what": row.what, "unit": row.unit, "goal": row.goal,
            **{key: float(f"{getattr(row, key):.4g}") for key in ("value", "low", "high")},
        }
        for name, found in rows.items()
        for row in found
    ]  # fmt: skip
    kept = [{**run, "rows": [row for row in run["rows"] if not rows.get(row["benchmark"])]} for run in before]
    run = {"commit": commit.strip(), "machine": machine(), "rows": figures}
    return [each for each in (*kept, run) if each["rows"]]


def moved_ratios(rows: dict[str, list[Row]], stored: list[dict[str, Any]]) -> list[str]:
    """A line for each ratio whose median is not between the quartiles of the baseline, within `SLACK`."""
    now = {
        f"{name}: {row.case}: {row.what}": row.value for name, found in rows.items() for row in found if not row.unit
    }
    before = {
        f"{row['benchmark']}: {row['case']}: {row['what']}": row
        for run in stored
        for row in run["rows"]
        if not row["unit"]
    }
    lines = []
    for name, value in now.items():
        if name not in before:
            lines.append(f"new: {name}: {value:.3f}")
            continue
        low, high = before[name]["low"], before[name]["high"]
        if not low - SLACK * abs(low) <= value <= high + SLACK * abs(high):
            lines.append(f"moved: {name}: {low:.3f} to {high:.3f} in the baseline, {value:.3f} now")
    missing = sorted(before.keys() - now.keys())
    lines += [f"missing: {name}" for name in missing if before[name]["benchmark"] in rows]
    commits = ", ".join(dict.fromkeys(run["commit"] for run in stored))
    return lines or [f"no ratio moved beyond the baseline of {commits}"]


if __name__ == "__main__":
    sys.exit(main())
