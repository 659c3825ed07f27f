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
    index, _, seen = [look for look in trial.each("weights") if look[1]["model"] == model][-1]
    fault = astray(trial, index, seen[0])
    clause.require(fault is None, f"the weights are not those of the reference: {fault}")
    clause.require_alike(trial, "weights")


def astray(trial: Trial, index: int, seen: compare.Weights, bound: float = compare.ABSOLUTE) -> str | None:
    """How ``seen`` differs from what the reference says of operation ``index``, or None where one family fits."""
    fault = compare.absolute(seen, trial.predicted("once")[index], bound)
    if fault is None or compare.absolute(seen, trial.predicted("each")[index], bound) is None:
        return None
    return fault


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
