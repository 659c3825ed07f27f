"""Check this project on a machine with a GPU, without a network, in a limited time.

``python3 run.py [--device cuda] [--output FOLDER] [--minutes 14.5]``, in the folder that ``nox -s gpu_kit`` made. Installs the
wheels beside this file into the Python that runs it, then runs `CHECKS` the most important first, each with its own time limit.
Neither a failure nor a hang stops the run. After each check FOLDER holds what is known so far:

- ``results.json``: the machine, and for each check its command, exit status, seconds, last lines, and the verdicts of a
  certification
- ``summary.txt``: one line for each check
- ``log.txt``: all output

Exit status: 0 if every check passed, 1 if one did not or was left out for want of time, 2 if the wheels cannot be installed.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
JOBS = max(1, (os.cpu_count() or 1) // 2)
"""Clauses to judge at a time; they share the GPU."""


@dataclass(frozen=True)
class Check:
    """A command of this Python, and the seconds that it may take."""

    name: str
    command: tuple[str, ...]
    limit: float
    certifies: bool = False
    """Whether it takes ``--report``."""


@dataclass
class Result:
    """What became of a check."""

    name: str
    outcome: str
    """passed, failed, "timed out", or "no time left"."""
    seconds: float = 0.0
    status: int | None = None
    command: list[str] = field(default_factory=list)
    last_lines: list[str] = field(default_factory=list)
    report: dict[str, Any] | None = None
    """The JSON report of a certification."""

    @property
    def line(self) -> str:
        said = self.last_lines[-1] if self.last_lines else ""
        return f"{self.outcome:12} {self.seconds:6.1f} s  {self.name}: {said}"


def certification(strategy: str, *options: str, device: str, profile: str, limit: float, name: str = "") -> Check:
    """A check that certifies a strategy on one rank."""
    form = (f"--device={device}", f"--profile={profile}", f"--jobs={JOBS}", *options)
    command = ("-m", "lightrft.conformance.cli", "run", strategy, *form)
    return Check(f"{name or strategy}, {profile}", command, limit, certifies=True)


def checks(device: str) -> Iterator[Check]:
    """All checks, the most valuable first."""
    strategies = {
        "fake": ("fake",),
        "fsdp": ("fsdp",),
        "zero3": ("deepspeed", "--set=zero_stage=3"),
        "zero2": ("deepspeed", "--set=zero_stage=2"),
    }
    for name, arguments in strategies.items():
        yield certification(*arguments, device=device, profile="smoke", limit=150, name=name)
    if device == "cuda":  # judged on CUDA only
        for name in ("fsdp", "zero3"):
            arguments = (*strategies[name], "--clause=OFF-3")
            yield certification(
                *arguments, device=device, profile="smoke", limit=60, name=f"{name}, memory of offloading"
            )
    for name in ("fsdp", "zero3"):
        yield benchmark("offload.py", name, device=device, limit=90)
    for name in ("fsdp", "zero2", "zero3"):
        size = ("--size=large",) if device == "cuda" else ()
        yield benchmark("steps.py", name, *size, "--rounds=20", device=device, limit=90)
    yield benchmark("weight_sync.py", "transformers", "--rounds=3", "--generations=1", device=device, limit=90)
    yield benchmark(
        "weight_sync.py", "transformers", "--strategy=fsdp", "--rounds=3", "--generations=1", device=device, limit=90
    )
    rounds = 2 if device == "cuda" else 1  # two take 107 s on two cores
    yield benchmark("checkpoints.py", f"--rounds={rounds}", device=device, limit=120)
    for name, arguments in strategies.items():
        yield certification(*arguments, device=device, profile="ci", limit=300, name=name)


def benchmark(script: str, *arguments: str, device: str, limit: float) -> Check:
    """A check that runs a benchmark; missing a target on a machine like this is reported and is no failure of the layer."""
    command = (str(HERE / "benchmarks" / script), *arguments, f"--device={device}")
    return Check(" ".join((script.removesuffix(".py"), *arguments)), command, limit)


class Run:
    """The checks of one run, and its files."""

    def __init__(self, folder: Path, device: str, seconds: float) -> None:
        self.folder, self.device = folder, device
        self.end = time.monotonic() + seconds
        self.results: list[Result] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (folder / "log.txt").open("wb", buffering=0)

    def take(self, check: Check) -> Result:
        """Run a check, within its limit and the time that is left, and write what is known."""
        command = [sys.executable, *check.command]
        left = self.end - time.monotonic()
        if left < 10:
            result = Result(check.name, "no time left", command=command)
        else:
            result = self._run(check, command, min(check.limit, left))
        self.results.append(result)
        self._write()
        print(result.line, flush=True)
        return result

    def _run(self, check: Check, command: list[str], limit: float) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            report, output = Path(folder, "report.json"), Path(folder, "output.txt")
            full = [*command, f"--report={report}"] if check.certifies else command
            start = time.monotonic()
            with output.open("wb") as file:
                status = _status(full, file, limit)
            seconds = time.monotonic() - start
            text = output.read_bytes()
            self.log.write(f"\n===== {check.name}: {' '.join(full)}\n".encode() + text)
            outcome = "timed out" if status is None else "passed" if status == 0 else "failed"
            lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
            judged = None
            if report.is_file():
                with suppress(ValueError):
                    judged = json.loads(report.read_text("utf-8"))
            return Result(check.name, outcome, seconds, status, command, lines[-20:], judged)

    def _write(self) -> None:
        known = {"machine": MACHINE, "device": self.device, "results": [asdict(result) for result in self.results]}
        for name, text in (
            ("results.json", json.dumps(known, indent=1)),
            ("summary.txt", "".join(f"{result.line}\n" for result in self.results)),
        ):
            path = self.folder / f"{name}.new"
            path.write_text(text, encoding="utf-8")
            path.replace(self.folder / name)


def _status(command: list[str], output: Any, limit: float) -> int | None:
    """The exit status of ``command``; None if it took longer than ``limit`` seconds and was killed with its processes."""
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what the command left running
        process.wait()


def machine() -> dict[str, Any]:
    """What this machine is; each fact that cannot be had is its error."""
    program = (
        "import json, torch; cuda = torch.cuda.is_available(); "
        "print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, "
        "'gpus': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    facts = json.loads(done.stdout) if done.returncode == 0 else {"torch": done.stderr[-500:]}
    return {"python": platform.python_version(), "cpus": os.cpu_count(), "kernel": platform.release(), **facts}


MACHINE = machine() if __name__ == "__main__" else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--minutes", type=float, default=14.5, help="for all checks together")
    args = parser.parse_args()
    run = Run(args.output, args.device, 60 * args.minutes)
    wheels = sorted(map(str, (HERE / "wheels").glob("*.whl")))
    install = ("-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--quiet", *wheels)
    if run.take(Check("install", install, 120)).outcome != "passed":
        return 2
    for check in checks(args.device):
        run.take(check)
    return int(any(result.outcome != "passed" for result in run.results))


if __name__ == "__main__":
    sys.exit(main())
