"""The corpus: what it must have for the suite to be believed."""

from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.saboteurs.catalogue import corpus, saboteurs


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
