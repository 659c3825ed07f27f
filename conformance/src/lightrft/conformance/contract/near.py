"""What clauses about training have in common: looking, and comparing with the reference."""

import math
from typing import Any

from lightrft.conformance.clause import Clause, Operation, Trial
from lightrft.conformance.contract import compare
from lightrft.conformance.reference import Family

LOOK: Operation = {"do": "weights", "model": "a"}
STATE: Operation = {"do": "state", "model": "a"}


def near(clause: Clause, trial: Trial, model: str = "a") -> None:
    """Require the last weights to be the reference's, in one family or the other, within rounding."""
    fits = [
        compare.absolute(trial.last("weights")[0], reference_weights(trial, family, model))
        for family in ("once", "each")
    ]
    clause.require(None in fits, f"the weights are not those of the reference: {fits[0]}")
    clause.require_alike(trial, "weights")


def reference_weights(trial: Trial, family: Family, model: str = "a") -> compare.Weights:
    predicted = trial.predicted(family)
    looks = [index for index, operation, _ in trial.each("weights") if operation["model"] == model]
    found: compare.Weights = predicted[looks[-1]]
    return found


def close(found: Any, expected: float, bound: float = 1e-5) -> bool:
    return isinstance(found, float) and math.isclose(found, expected, rel_tol=bound, abs_tol=1e-6)


def norm_fits(found: Any, expected: float) -> bool:
    return isinstance(found, float) and (
        close(found, expected) if math.isfinite(expected) else not math.isfinite(found)
    )
