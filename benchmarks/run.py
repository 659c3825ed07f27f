"""Run benchmarks by name: ``python benchmarks/run.py [steps.fsdp ...]``. Each prints its ratios.

The default is all but ``weight_sync.ENGINE.STRATEGY``, which needs an environment with the engine.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


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


BENCHMARKS = {
    "steps.fake": Benchmark("steps.py", ("fake", "--rounds=1000")),
    "steps.fake.denominators": Benchmark("steps.py", ("fake", "--rounds=1000", "--denominators")),
    "steps.fsdp": Benchmark("steps.py", ("fsdp",), ranks=2),
    "steps.fsdp.denominators": Benchmark("steps.py", ("fsdp", "--denominators"), ranks=2),
    "steps.zero2": Benchmark("steps.py", ("zero2",), ranks=2),
    "steps.zero3": Benchmark("steps.py", ("zero3",), ranks=2),
    "checkpoints": Benchmark("checkpoints.py"),
    "memory": Benchmark("memory.py", ("fsdp",)),
    "planning": Benchmark("planning.py"),
    "log_probs": Benchmark("log_probs.py"),
    "sequence_parallel": Benchmark("sequence_parallel.py", ranks=2),
    "imports": Benchmark("imports.py"),
}
SYNCS = {
    f"weight_sync.{engine}.{name}": Benchmark("weight_sync.py", (engine, f"--strategy={strategy}"), ranks=ranks)
    for engine in ("transformers", "vllm", "sglang")
    for name, strategy, ranks in (("fake", "fake", 1), ("zero3", "deepspeed", 2))
}


def main() -> int:
    known = BENCHMARKS | SYNCS
    unknown = [name for name in sys.argv[1:] if name not in known]
    if unknown:
        print(f"unknown benchmark: {', '.join(unknown)}; expected one of {', '.join(known)}", file=sys.stderr)
        return 2
    failed = [name for name in sys.argv[1:] or BENCHMARKS if not succeeds(known[name])]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def succeeds(benchmark: Benchmark) -> bool:
    threads = str(max(1, len(os.sched_getaffinity(0)) // benchmark.ranks))
    return subprocess.call(benchmark.command, env={"OMP_NUM_THREADS": threads, **os.environ}) == 0


if __name__ == "__main__":
    sys.exit(main())
