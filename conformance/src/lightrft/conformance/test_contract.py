"""The contract as tests, one per clause; `lightrft.conformance.plugin` has the options."""

import pytest

from lightrft.conformance.certification import Certification
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.rendering import failure
from lightrft.conformance.requests import selected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per clause, in the order to judge them; none without ``--strategy``."""
    chosen = [clause.id for clause in selected(())] if metafunc.config.getoption("--strategy") else []
    metafunc.parametrize("clause_id", chosen)


def test_clause(clause_id: str, certification: Certification) -> None:
    """Judge one clause."""
    clause = CONTRACT[clause_id]
    result = certification.judge(clause)
    if result.verdict == "skip":
        pytest.skip(result.message)
    if result.verdict == "xfail":
        pytest.xfail(result.message)
    if result.verdict == "pass":
        return
    text = failure(result, clause, certification.request)
    if clause.level == "SHOULD":
        pytest.xfail(f"SHOULD does not hold: {result.message}")
    pytest.fail(text, pytrace=False)
