"""The cost of starting the commands and importing the settings, relative to the library that each is built on.

``python imports.py``. Wall times are medians of interleaved runs; imports are medians of the sums of
``python -X importtime``. The limits are those that this project sets itself.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NOTHING = "pass"
TYPER = "import typer"
PYDANTIC = "from pydantic import BaseModel"


@dataclass(frozen=True)
class Case:
    """Code, the code to compare it with, and the largest ratio of wall times, Python's start included."""

    name: str
    code: str
    reference: str
    limit: float | None = None


CASES = [
    Case("lightrft --help", "from lightrft_cli.main import app; app(['--help'])", TYPER, 5),
    Case("lightrft-conformance --help", "from lightrft.conformance.cli import app; app(['--help'])", TYPER, 5),
    Case("import lightrft.config", "import lightrft.config", PYDANTIC, 1.3),
    Case("from lightrft.config import StrategyConfig", "from lightrft.config import StrategyConfig", PYDANTIC),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds: int = parser.parse_args().rounds
    codes = list(dict.fromkeys([NOTHING, *(code for case in CASES for code in (case.reference, case.code))]))
    walls = medians_of(wall_time, codes, rounds)
    imports = medians_of(import_time, codes, rounds)
    print(f"{'':45} wall time  ratio  limit  without Python's start  imports")
    for case in CASES:
        ratio = walls[case.code] / walls[case.reference]
        own = (walls[case.code] - walls[NOTHING]) / (walls[case.reference] - walls[NOTHING])
        limit = "" if case.limit is None else f"{case.limit:.1f}"
        print(
            f"{case.name:45} {walls[case.code] * 1000:6.0f} ms {ratio:6.2f} {limit:>6} {own:23.2f} "
            f"{imports[case.code] / imports[case.reference]:8.2f}"
        )
    return 0


def medians_of(measure: Callable[[str], float], codes: Sequence[str], rounds: int) -> dict[str, float]:
    """The median of each code, measured in turn so that load on the machine affects all equally."""
    measured: dict[str, list[float]] = {code: [] for code in codes}
    for _ in range(rounds):
        for code in codes:
            measured[code].append(measure(code))
    return {code: statistics.median(times) for code, times in measured.items()}


def wall_time(code: str) -> float:
    """Seconds that a process running ``code`` takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def import_time(code: str) -> float:
    """The sum of the times of all imports, in microseconds."""
    command = [sys.executable, "-X", "importtime", "-c", code]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"^import time:\s+(\d+) \|", listing, re.MULTILINE)))


if __name__ == "__main__":
    sys.exit(main())
