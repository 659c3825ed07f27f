"""Every benchmark that can be chosen exists and takes the options that benchmarks/run.py passes."""

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def known():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        names = runpy.run_path(str(BENCHMARKS / "run.py"))
    return names["BENCHMARKS"] | names["SYNCS"]


def test_every_benchmark_is_a_script_with_the_common_options(known):
    for name, benchmark in known.items():
        script = BENCHMARKS / benchmark.script
        assert script.is_file(), name
        assert "parser(__doc__, rounds=" in script.read_text(encoding="utf-8"), name
