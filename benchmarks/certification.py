"""The speed of the conformance suite: programs a second, and the seconds to find a defect and shrink the program that shows it.

``python certification.py``. Runs `lightrft-conformance` on FakeStrategy, and on strategies of this file that have one defect.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import Report, parser
from typing_extensions import override

from lightrft.strategy import FakeStrategy

HERE = Path(__file__).parent


class ScalesTheNorm(FakeStrategy):
    """A defect in every update: found by the first program."""

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(*args, **kwargs)
        return replace(result, grad_norm=result.grad_norm * 1.001) if result.grad_norm else result


class ForgetsTheFifth(FakeStrategy):
    """A defect that shows late: the fifth update of a model is reported as not applied."""

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(*args, **kwargs)
        self._applied = getattr(self, "_applied", 0) + bool(result.applied)
        return replace(result, applied=False) if self._applied == 5 and result.applied else result


def main() -> int:
    args = parser(__doc__, rounds=1).parse_args()
    report = Report(args.output)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        seconds = certify("fake", path)
        clauses = json.loads(path.read_text(encoding="utf-8"))["clauses"]
        programs = sum(clause["examples"] for clause in clauses)
        report.add("certification, fake, profile ci", "programs a second", [programs / seconds], unit="/s")
        for defect, clause in ((ScalesTheNorm, "OPT-3"), (ForgetsTheFifth, "OPT-4")):
            taken = certify(f"certification:{defect.__name__}", path, f"--clause={clause}")
            if json.loads(path.read_text(encoding="utf-8"))["clauses"][0]["verdict"] != "fail":
                raise SystemExit(f"certification: expected {clause} to find {defect.__name__}, got another verdict")
            report.add(f"certification, {defect.__name__}, {clause}", "found and shrunk", [taken], unit="s")
    return 0


def certify(strategy: str, path: Path, *arguments: str) -> float:
    """Run the suite and write its report; return the seconds that it took."""
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "lightrft.conformance.cli", "run", strategy, f"--report={path}", *arguments]
    start = time.perf_counter()
    subprocess.run(
        command, cwd=path.parent, env={**os.environ, "PYTHONPATH": str(HERE)}, stdout=subprocess.DEVNULL, check=False
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
