"""LOGP: per-token log-probabilities and entropies."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error
from lightrft.conformance.contract import tolerances
from lightrft.conformance.contract.program_parts import SEEDS, program, trained
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS, assert_close, assert_values


def policy_updates(kind: str, temperature: float, count: int = 3, seed: int = 5, **more: Any) -> list[Operation]:
    """Train a policy for ``count`` updates.

    With a large eps, the rounding of small gradients, which differs between the two computations, stays small in Adam.
    """
    build, optimizer, *prepare = trained(kind=kind, seed=seed)
    operations: list[Operation] = [build, {**optimizer, "eps": 1e-3}, *prepare]
    for batch in range(count):
        operations += [
            {"do": "policy_backward", "model": "a", "batch": batch, "temperature": temperature, **more},
            {"do": "step", "model": "a"},
        ]
    return operations


@CONTRACT.add
class TokenLogProbs(Clause):
    """token_log_probs returns the log-probability of each next token and the entropy of its distribution, at a given
    temperature, and 0 at padding and at the first token of a sequence. Packed sequences, whose position ids restart, do
    not depend on each other. Values, gradients and updates equal the reference, with and without fused_linear_logprob."""

    id = "LOGP-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        extreme = self._program(target, False, 0.3, seed=460, rows=1)  # log-probabilities down to -78
        return [
            *(self._program(target, fused, temperature) for fused in (True, False) for temperature in (1.0, 0.5)),
            extreme,
            *(self._program(target, fused, 1.0, kind="grouped", packed=True) for fused in (True, False)),
        ]

    def _program(
        self, target: Target, fused: bool, temperature: float, seed: int = 5, rows: int = 2, kind: str = "policy",
        **more: Any,
    ) -> Program:  # fmt: skip
        operations = policy_updates(kind, temperature, seed=seed, rows=rows, **more)
        return program(target, *operations, READ_WEIGHTS, fused_linear_logprob=fused)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        temperatures = st.sampled_from([0.3, 1.0, 2.0])
        return st.builds(self._program, st.just(target), st.booleans(), temperatures, SEEDS, st.integers(1, 3))

    @override
    def check(self, execution: Execution) -> None:
        assert_values(self, execution, "policy_backward")
        assert_close(self, execution, bound=tolerances.OTHER_SUMMATION_ORDER)


@CONTRACT.add
class ChangedLogits(Clause):
    """With fused_linear_logprob, token_log_probs of a model that changes its logits after the head is correct, or
    raises UnsupportedOperationError and names the setting. Without it, it is correct."""

    id = "LOGP-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            program(target, *policy_updates("scaled policy", 1.0, count=1, may_fail=fused), fused_linear_logprob=fused)
            for fused in (True, False)
        ]

    @override
    def check(self, execution: Execution) -> None:
        refused = execution.program.settings["fused_linear_logprob"]
        assert_values_or_refusal(self, execution, "fused_linear_logprob" if refused else None)


@CONTRACT.add
class ModelsWithoutPacking(Clause):
    """token_log_probs of packed sequences in a model that would attend across them is correct, or raises
    UnsupportedOperationError. An attention mask that pads them makes it correct."""

    id = "LOGP-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            program(
                target, *policy_updates("opt", 1.0, count=1, may_fail=packed, packed=packed), fused_linear_logprob=fused
            )
            for packed, fused in ((True, True), (True, False), (False, True))
        ]

    @override
    def check(self, execution: Execution) -> None:
        packed = any(operation.get("packed") for operation in execution.program.operations)
        assert_values_or_refusal(self, execution, "position_ids" if packed else None)


def assert_values_or_refusal(clause: Clause, execution: Execution, word: str | None) -> None:
    """Require the log-probabilities of the reference, or `UnsupportedOperationError` with ``word``; None: no error."""
    for index, _, seen in execution.each("policy_backward"):
        for rank, observed in enumerate(seen):
            where = f"rank {rank}, policy_backward (operation {index})"
            if is_error(observed):
                message = observed["message"]
                clause.require(word is not None, f"{where}: expected log-probabilities, got {message}")
                clause.require_error(observed, "UnsupportedOperationError", "token_log_probs", str(word), where=where)
                return
    assert_values(clause, execution, "policy_backward")
