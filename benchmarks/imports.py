"""The cost of starting the commands and importing the settings, relative to the library that each is built on.

``python imports.py``. Wall times are medians of interleaved runs; imports are medians of the sums of
``python -X importtime``. The limits are those that this project sets itself.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from measure import Goal, Report, parser

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
    args = parser(__doc__, rounds=7).parse_args()
    report = Report(args.output)
    codes = list(dict.fromkeys([NOTHING, *(code for case in CASES for code in (case.reference, case.code))]))
    walls = by_code(wall_time, codes, args.rounds)
    imports = by_code(import_time, codes, args.rounds)
    for case in CASES:
        goal = None if case.limit is None else Goal(case.limit)
        ours, theirs, start = (walls[code] for code in (case.code, case.reference, NOTHING))
        report.add(case.name, "time", [1000 * seconds for seconds in ours], unit="ms")
        report.add(
            case.name,
            f"ours / {case.reference}",
            [own / other for own, other in zip(ours, theirs, strict=True)],
            goal=goal,
        )
        beyond = [(own - least) / (other - least) for own, other, least in zip(ours, theirs, start, strict=True)]
        report.add(case.name, "without Python's start", beyond)
        pairs = zip(imports[case.code], imports[case.reference], strict=True)
        report.add(case.name, "imports alone", [own / other for own, other in pairs])
    return 0


def by_code(measure: Callable[[str], float], codes: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """What each code takes in each round, measured in turn so that load on the machine affects all equally."""
    measured: dict[str, list[float]] = {code: [] for code in codes}
    for _ in range(rounds):
        for code in codes:
            measured[code].append(measure(code))
    return measured


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
