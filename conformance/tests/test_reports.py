"""Reports and expected failures; the same seed gives the same report."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightrft.conformance.certification import Report, certify
from lightrft.conformance.clause import Program, Target, difference
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.contract.program_parts import FP32, geometry, micro_batch, trained
from lightrft.conformance.expectations import Expectations
from lightrft.conformance.judge import ClauseResult, Verdict
from lightrft.conformance.provenance import digest_of_code, origin_of
from lightrft.conformance.rendering import failure
from lightrft.conformance.requests import Request, impossible, setting
from lightrft.strategy import FakeStrategy


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    clauses = [{**clause, "seconds": 0} for clause in report["clauses"]]
    return {**report, "clauses": clauses, "environment": {**report["environment"], "date": ""}}


def test_the_same_seed_gives_the_same_report_and_another_seed_other_programs() -> None:
    def run(seed: int) -> dict[str, Any]:
        target = "lightrft.conformance.saboteurs.updates:SumOverMicroBatches"
        asked = Request(strategy=target, profile="ci", clauses=("OPT-2", "OPT-6", "LIFE-2"), seed=seed)
        return without_times(certify(asked).to_json())

    first, again = run(3), run(3)
    assert json.dumps(first) == json.dumps(again)
    assert [clause["verdict"] for clause in first["clauses"]].count("fail") >= 1


def test_a_report_names_the_distribution_and_what_it_requires() -> None:
    origin = origin_of("fake", FakeStrategy)
    assert origin["distribution"] == "lightrft-strategy-base"
    assert origin["version"]
    assert isinstance(origin["requirements"], dict) and "torch" in origin["requirements"]


def test_code_of_no_distribution_is_known_by_a_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loose_strategy.py").write_text("class Loose:\n    pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from loose_strategy import Loose  # type: ignore[import-not-found]

    origin = origin_of("loose_strategy:Loose", Loose)
    sys.modules.pop("loose_strategy")
    assert origin["distribution"] == ""
    assert str(origin["source"]).startswith("loose_strategy.py sha256:")


def test_the_digest_of_a_strategy_changes_with_its_code_and_that_of_its_base_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_strategy"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "helper.py").write_text("RATE = 1\n", encoding="utf-8")
    (package / "main.py").write_text(
        "from lightrft.strategy import FakeStrategy\nclass Mine(FakeStrategy):\n    pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from some_strategy.main import Mine  # type: ignore[import-not-found]

    digests = [digest_of_code(Mine.__mro__), digest_of_code([Mine]), digest_of_code(FakeStrategy.__mro__)]
    (package / "helper.py").write_text("RATE = 2\n", encoding="utf-8")
    digests += [digest_of_code(Mine.__mro__), digest_of_code([Mine])]
    for name in ("some_strategy.main", "some_strategy"):
        sys.modules.pop(name)
    assert len(set(digests)) == 5


def result(verdict: Verdict, **more: Any) -> ClauseResult:
    return ClauseResult(id="OPT-1", level=more.pop("level", "MUST"), verdict=verdict, **more)


@pytest.mark.parametrize(
    ("verdict", "level", "code"),
    [
        ("pass", "MUST", 0), ("skip", "MUST", 0), ("xfail", "MUST", 0), ("fail", "SHOULD", 0),
        ("fail", "MUST", 1), ("hang", "MUST", 1), ("error", "MUST", 2), ("error", "SHOULD", 2),
    ],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_worst_must(verdict: Verdict, level: str, code: int) -> None:
    report = Report(request=Request(strategy="fake"), identity={}, results=[result(verdict, level=level)])
    assert report.exit_code == code


def test_a_clause_asked_for_by_name_that_judges_nothing_is_exit_code_2() -> None:
    report = certify(Request(strategy="fake", clauses=("LIFE-2", "COLL-1")))
    assert {result.id: result.verdict for result in report.results} == {"LIFE-2": "pass", "COLL-1": "skip"}
    assert (report.exit_code, report.unjudged) == (2, "COLL-1 needs world size 2")


def test_a_clause_that_is_not_about_engines_is_not_judged_on_one() -> None:
    report = certify(Request(strategy="fake", engine="fake", clauses=("LIFE-2",)))
    assert report.exit_code == 2
    assert "LIFE-2: not about engines" in report.unjudged


def test_the_command_that_repeats_a_run_has_its_paths_settings_and_clauses() -> None:
    settings = {"bf16": False, "text": "1", "extra": {"a b": [None]}, "name": "x y"}
    asked = Request(
        strategy="fake", settings=settings, expectations=Path("some where/expected.toml"), clauses=("A-1", "A-2")
    )
    words = shlex.split(asked.command())
    assert dict(setting(words[at + 1]) for at, word in enumerate(words) if word == "--set") == settings
    assert words[words.index("--expected") + 1] == "some where/expected.toml"
    assert words[-4:] == ["--clause", "A-1", "--clause", "A-2"]
    assert asked.command("A-2").endswith("expected.toml' --clause A-2")


def expectations(tmp_path: Path, text: str, **settings: Any) -> Expectations:
    path = tmp_path / "expected.toml"
    path.write_text(text, encoding="utf-8")
    return Expectations.read(path, "fake", settings)


def test_an_expected_failure_is_none_and_one_that_passes_is_a_failure(tmp_path: Path) -> None:
    got = expectations(tmp_path, '["fake"]\n"OPT-1" = "upstream"\n')
    assert got.applied(result("fail")).verdict == "xfail"
    assert got.applied(result("pass")).verdict == "fail"
    assert got.applied(result("error")).verdict == "error"
    assert got.applied(result("skip")).verdict == "skip"


def test_expected_failures_are_of_one_strategy_with_its_settings(tmp_path: Path) -> None:
    text = '["other"]\n"OPT-1" = "x"\n["fake[bf16=False]"]\n"OPT-2" = "y"\n'
    assert not expectations(tmp_path, text).reasons
    assert expectations(tmp_path, text, bf16=False).reasons == {"OPT-2": "y"}


def test_an_expected_failure_of_no_clause_is_found(tmp_path: Path) -> None:
    unknown = expectations(tmp_path, '["fake"]\n"NO-1" = "x"\n').unknown(["OPT-1"])
    assert "unknown clauses: NO-1; `lightrft-conformance clauses` lists those that exist" in unknown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fake = 3", "expected a table of clauses with their reasons, got fake = 3"),
        ("[fake]\nOPT-1 = 3", "expected a table of clauses with their reasons, got fake = {'OPT-1': 3}"),
        ('["fake[bf16]"]\nOPT-1 = "x"', "expected settings NAME=VALUE in brackets, got 'fake[bf16]'"),
        ("[fake", "cannot read the file of expected failures"),
    ],
)
def test_a_file_of_expected_failures_in_another_form_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "expected.toml"
    path.write_text(text, encoding="utf-8")
    assert words in impossible(Request(strategy="fake", expectations=path))


def test_a_drawn_program_that_fails_is_printed_as_a_pinned_example() -> None:
    target = Target(strategy="fake", world=2)
    operations = (*trained(), *micro_batch(1, poison="nan"))
    program = Program(operations=operations, settings={**FP32, **geometry(target, 3)}, seconds=90, seed=4)
    names = {"Program": Program, "geometry": geometry, "target": target}
    assert eval(program.source(target), names) == program
    elsewhere = eval(program.source(target), {**names, "target": Target(strategy="fake", world=1)})
    assert elsewhere.settings["train_batch_size"] == 3 * elsewhere.settings["micro_train_batch_size"]
    drawn = result("fail", program=program.command(target)["program"], pinned_example=program.source(target))
    text = failure(drawn, CONTRACT["OPT-1"], Request(strategy="fake"))
    assert f"pinned example to add to Accumulation.pinned_examples:\n    {program.source(target)},\n" in text


def test_batch_sizes_that_do_not_divide_are_printed_as_they_are() -> None:
    target = Target(strategy="fake", world=2)
    program = Program(operations=({"do": "world"},), settings={"micro_train_batch_size": 3, "train_batch_size": 7})
    assert eval(program.source(target), {"Program": Program}) == program


def test_a_pinned_example_that_fails_is_not_printed_as_one_to_add() -> None:
    target = "lightrft.conformance.saboteurs.updates:SumOverMicroBatches"
    (failed,) = certify(Request(strategy=target, profile="smoke", clauses=("OPT-2",))).results
    assert failed.verdict == "fail" and failed.pinned and not failed.pinned_example


def test_a_difference_names_what_differs_and_shows_the_numbers_in_full() -> None:
    expected = {"head.bias": torch.tensor([0.5, 0.1, 2.0]), "rates": [0.1, 0.2]}
    got = {"head.bias": torch.tensor([0.5, 0.1 + 1e-7, 2.0]), "rates": [0.1, 0.2]}
    numbers = "expected 0.10000000149011612, got 0.10000009834766388"
    assert difference(expected, got) == f"head.bias: 1 of 3 elements differ, most at [1]: {numbers}"
    assert difference(expected, {**expected, "rates": [0.1, 0.3]}) == "rates[1]: expected 0.2, got 0.3"
    assert "expected the names ['head.bias', 'rates']" in str(difference(expected, {"rates": [0.1, 0.2]}))
    assert "torch.float32(3,), got torch.float64(1,)" in str(
        difference(expected, {**expected, "head.bias": torch.zeros(1, dtype=torch.float64)})
    )
    assert difference(torch.tensor([0.0, torch.nan]), torch.tensor([0.0, torch.nan])) is None
    assert "the bits differ" in str(difference(torch.tensor([0.0]), torch.tensor([-0.0])))
    assert difference(expected, expected) is None
