"""The corpus: what it must have for the suite to be believed."""

from collections import Counter
from typing import Any

import pytest

from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.judge import ClauseResult
from lightrft.conformance.saboteurs import runner
from lightrft.conformance.saboteurs.catalogue import Saboteur, corpus, saboteurs


def test_every_must_that_can_be_judged_here_has_a_defect_that_only_it_is_asked_to_find() -> None:
    covered = {it.clause for it in saboteurs()}
    musts = {clause.id for clause in CONTRACT if clause.level == "MUST" and not clause.needs_cuda}
    assert musts <= covered, f"without a saboteur: {sorted(musts - covered)}"


def test_every_saboteur_names_a_clause_that_applies_where_it_runs() -> None:
    for it in saboteurs():
        assert it.clause in CONTRACT.ids, it
        assert CONTRACT[it.clause].smallest_world <= it.world, it


def test_every_saboteur_says_what_is_wrong_with_it() -> None:
    assert all(it.defect for it in corpus())


def test_there_are_controls_at_both_world_sizes() -> None:
    assert {it.world for it in corpus() if not it.clause} >= {1, 2}


def test_each_seed_tries_what_no_pinned_witness_has_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, drawn, survivor, *_ = saboteurs()
    control = next(it for it in corpus() if not it.clause)

    def judged(saboteur: Saboteur, *_: Any) -> runner.Outcome:  # in a process that is forked from this one
        verdict = "pass" if saboteur.name in (survivor.name, control.name) else "fail"
        result = ClauseResult(id="-", level="MUST", verdict=verdict, pinned=saboteur.name == pinned.name)
        return runner.Outcome(saboteur=saboteur, killed=verdict == "fail", results=[result])

    monkeypatch.setattr(runner, "run_one", judged)
    found = runner.run_corpus([pinned, drawn, survivor, control], "smoke", range(3))
    times = Counter(it.saboteur.name for it in found)
    assert times == {pinned.name: 1, drawn.name: 3, survivor.name: 3, control.name: 3}
    assert {it.saboteur.name for it in found if not it.right} == {survivor.name}
