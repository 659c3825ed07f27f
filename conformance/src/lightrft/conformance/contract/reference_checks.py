"""What clauses about training share: looking at a model, and comparing it with the reference."""

import math
from collections.abc import Sequence

from typing_extensions import override

from lightrft.conformance.clause import Clause, Execution, Operation, Record, is_error
from lightrft.conformance.contract import tolerances
from lightrft.conformance.reference_model import Averaging

READ_WEIGHTS: Operation = {"do": "weights", "model": "a"}
READ_STATE: Operation = {"do": "state", "model": "a"}
VALUES = 1e-5
"""Bound on the error of per-token values in fp32."""


def assert_close(clause: Clause, execution: Execution, model: str = "a", bound: float = tolerances.ABSOLUTE) -> None:
    """Require the last weights of ``model`` to match the reference with either way of averaging, within rounding."""
    index, _, seen = [look for look in execution.each("weights") if look[1]["model"] == model][-1]
    mismatch = first_mismatch(execution, index, seen[0], bound)
    clause.require(mismatch is None, f"the weights do not match the reference: {mismatch}")
    clause.require_same_on_all_ranks(execution, "weights")


class FollowsReference(Clause):
    """A clause whose programs must train the model as the reference does."""

    @override
    def check(self, execution: Execution) -> None:
        assert_close(self, execution)


def first_mismatch(
    execution: Execution, index: int, weights: tolerances.Weights, bound: float = tolerances.ABSOLUTE
) -> str | None:
    """How ``weights`` differ from the reference for operation ``index``, or None if they match with one way of averaging."""
    mismatch = tolerances.absolute(weights, execution.predicted("per update")[index], bound)
    if mismatch is None or tolerances.absolute(weights, execution.predicted("per micro-batch")[index], bound) is None:
        return None
    return mismatch


def assert_flags(clause: Clause, execution: Execution, *flags: str) -> None:
    """Require every step to report the reference's ``flags`` ("applied", "skipped") on all ranks."""
    for index, operation, seen in execution.each("step"):
        for flag in flags:
            expected, reported = execution.predicted()[index][flag], [result[flag] for result in seen]
            clause.require(
                reported == [expected] * len(seen),
                f"step (operation {index}) of model {operation['model']}: expected {flag}={expected}, got {reported}",
            )


def assert_unchanged(clause: Clause, before: Sequence[Record], after: Sequence[Record], by: str) -> None:
    """Require all that training changes to be the same on every rank in two observations of ``state``."""
    for rank, (earlier, later) in enumerate(zip(before, after, strict=True)):
        for part in ("parameters", "optimizer", "rates", "schedule"):
            clause.require_same(earlier[part], later[part], f"rank {rank}: {part} changed in {by}")


def assert_norms(clause: Clause, execution: Execution) -> None:
    """Require every update that is not refused to report the reference's gradient norm."""
    for index, _, seen in execution.each("step"):
        if all(map(is_error, seen)):
            continue
        expected, norm = execution.predicted()[index]["grad_norm"], seen[0]["grad_norm"]
        fits = expected is None or close(norm, expected)
        clause.require(fits, f"step (operation {index}): expected the gradient norm {expected}, got {norm}")


def assert_values(clause: Clause, execution: Execution, operation: str, *, sharing: int = 1) -> None:
    """Require the tensors, by name, that each ``operation`` returns to match the reference on every rank.

    ``sharing`` ranks return the same. The bound is relative to the largest value if that exceeds 1.
    """
    for index, _, seen in execution.each(operation):
        for rank, observed in enumerate(seen):
            expected = execution.predicted()[index][rank // sharing]
            scale = max(1.0, *(value.abs().max().item() for value in expected.values()))
            mismatch = tolerances.absolute(observed, expected, VALUES * scale)
            clause.require(mismatch is None, f"rank {rank}, {operation} (operation {index}): {mismatch}")


def reference_weights(execution: Execution, averaging: Averaging, model: str = "a") -> tolerances.Weights:
    """The reference's weights at the last look at ``model``."""
    looks = [index for index, operation, _ in execution.each("weights") if operation["model"] == model]
    weights: tolerances.Weights = execution.predicted(averaging)[looks[-1]]
    return weights


def close(value: object, expected: float, bound: float = 1e-5) -> bool:
    """Whether ``value`` is a float close to ``expected``."""
    return isinstance(value, float) and math.isclose(value, expected, rel_tol=bound, abs_tol=1e-6)


def norm_fits(norm: object, expected: float) -> bool:
    """Whether ``norm`` is close to ``expected``; any non-finite norm fits a non-finite one."""
    return isinstance(norm, float) and (close(norm, expected) if math.isfinite(expected) else not math.isfinite(norm))
