"""The corpus of saboteurs and controls covers the contract."""

import faulthandler
import tempfile
from collections import Counter
from importlib import import_module
from typing import Any

import pytest

from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.judge import ClauseResult
from lightrft.conformance.saboteurs import runner
from lightrft.conformance.saboteurs.catalogue import Saboteur, strategy_around
from lightrft.conformance.saboteurs.corpus import corpus, saboteurs
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import EngineBase, FakeStrategy, StrategyBase
from lightrft.strategy.backend import ReplicatedBackend
from lightrft.strategy.fake_strategy import FakeBackend


def test_every_must_that_can_be_judged_here_has_a_defect_that_only_it_is_asked_to_find() -> None:
    covered = {entry.clause for entry in saboteurs()}
    musts = {clause.id for clause in CONTRACT if clause.level == "MUST" and not clause.needs_cuda}
    assert musts <= covered, f"without a saboteur: {sorted(musts - covered)}"


def test_every_saboteur_names_a_clause_that_applies_where_it_runs() -> None:
    for entry in saboteurs():
        assert entry.clause in CONTRACT.ids, entry
        assert CONTRACT[entry.clause].smallest_world <= entry.world, entry


def test_every_saboteur_says_what_is_wrong_with_it() -> None:
    assert all(entry.defect for entry in corpus())


def test_there_are_controls_at_both_world_sizes() -> None:
    assert {entry.world for entry in corpus() if not entry.clause} >= {1, 2}


def test_each_seed_tries_what_no_pinned_example_has_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, drawn, survivor, *_ = saboteurs()
    control = next(entry for entry in corpus() if not entry.clause)

    def judged(saboteur: Saboteur, *_: Any) -> runner.Outcome:  # in a process that is forked from this one
        verdict = "pass" if saboteur.name in (survivor.name, control.name) else "fail"
        result = ClauseResult(id="-", level="MUST", verdict=verdict, pinned=saboteur.name == pinned.name)
        return runner.Outcome(saboteur=saboteur, killed=verdict == "fail", results=[result])

    monkeypatch.setattr(runner, "run_one", judged)
    got = runner.run_corpus([pinned, drawn, survivor, control], "smoke", range(3))
    times = Counter(tensor.saboteur.name for tensor in got)
    assert times == {pinned.name: 1, drawn.name: 3, survivor.name: 3, control.name: 3}
    assert {tensor.saboteur.name for tensor in got if not tensor.right} == {survivor.name}


@pytest.mark.parametrize(("controls_profile", "profile"), [("smoke", "smoke"), (None, "ci")])
def test_controls_may_have_a_profile_of_their_own(
    controls_profile: str | None, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = next(entry for entry in corpus() if not entry.clause)
    pinned, drawn, *_ = saboteurs()
    chosen = [pinned, drawn, control]

    def judged(saboteur: Saboteur, group: Any, profile: str, seed: int) -> runner.Outcome:  # in a forked process
        result = ClauseResult(id="-", level="MUST", verdict="fail", message=profile)
        return runner.Outcome(saboteur=saboteur, killed=True, results=[result])

    monkeypatch.setattr(runner, "run_one", judged)
    got = runner.run_corpus(chosen, "ci", range(1), controls_profile=controls_profile)
    used = {outcome.saboteur.name: outcome.results[0].message for outcome in got}
    assert used == {**dict.fromkeys((entry.name for entry in chosen), "ci"), control.name: profile}


class Waits:
    def wait(self) -> str:
        """Return the stack at which it would wait."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            return file.read()


class WaitsElsewhere(Waits):
    def wait(self) -> str:
        return super().wait()


@pytest.mark.parametrize(("waits", "counts"), [(Waits, True), (WaitsElsewhere, False)])
def test_an_expected_hang_counts_only_at_a_line_of_the_saboteur(waits: type[Waits], counts: bool) -> None:
    target = f"{__name__}:{waits.__name__}"
    saboteur = Saboteur(name="-", target=target, defect="-", clause="GEN-1", verdict="hang")
    assert runner.hangs_in(saboteur, f"no answer within 6 s\nrank 0 hung:\n{waits().wait()}") is counts


def test_the_target_of_every_saboteur_is_a_strategy_or_an_engine() -> None:
    for each in corpus():
        module, _, name = each.target.partition(":")
        assert issubclass(getattr(import_module(module), name), EngineBase if each.engine else StrategyBase), each


@pytest.mark.parametrize(("base", "strategy"), [(FakeBackend, FakeStrategy), (ReplicatedBackend, PlainStrategy)])
def test_a_defective_backend_gets_a_strategy_around_it(base: type, strategy: type) -> None:
    backend = type("Defective", (base,), {})
    around = strategy_around(backend)
    assert issubclass(around, strategy)
    assert (around.__name__, around.backend_class) == ("Defective", backend)
