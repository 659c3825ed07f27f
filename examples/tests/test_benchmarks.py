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


def test_a_ratio_outside_the_quartiles_of_the_baseline_has_moved(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = runpy.run_path(str(BENCHMARKS / "run.py"))

    def run(ratio):
        return {
            "step.fake.1ms": [
                names["Row"]("update", "bare", 100 * ratio, 0, 0, unit="ms"),
                names["Row"]("update", "ours / bare", ratio, ratio - 0.01, ratio + 0.01, goal="<= 1.01", met=True),
            ]
        }

    stored = names["baseline"](run(1.0), [])
    assert stored[0]["rows"][1] == {
        "benchmark": "step.fake.1ms", "case": "update", "what": "ours / bare", "unit": "", "goal": "<= 1.01",
        "value": 1.0, "low": 0.99, "high": 1.01,
    }  # fmt: skip
    (line,) = names["moved_ratios"](run(1.02), stored)
    assert line.startswith("no ratio moved beyond the baseline of ")
    assert names["moved_ratios"](run(1.1), stored) == [
        "moved: step.fake.1ms: update: ours / bare: 0.990 to 1.010 in the baseline, 1.100 now"
    ]
    assert names["moved_ratios"]({"step.fake.1ms": run(1.0)["step.fake.1ms"][:1]}, stored) == [
        "missing: step.fake.1ms: update: ours / bare"
    ]


def test_a_run_replaces_the_same_benchmarks_in_the_baseline_and_keeps_the_others(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = runpy.run_path(str(BENCHMARKS / "run.py"))

    def rows(value):
        return [names["Row"]("case", "ours / bare", value, value, value)]

    first = names["baseline"]({"memory": rows(1.0), "scale": rows(2.0)}, [])
    second = names["baseline"]({"scale": rows(3.0), "planning": []}, first)  # planning failed
    assert [[(row["benchmark"], row["value"]) for row in run["rows"]] for run in second] == [
        [("memory", 1.0)],
        [("scale", 3.0)],
    ]
    assert len(names["baseline"]({"memory": rows(1.0), "scale": rows(2.0)}, second)) == 1
