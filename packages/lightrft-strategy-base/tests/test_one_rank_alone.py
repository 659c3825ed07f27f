"""An argument that is wrong on one rank alone is an error on every rank, at once, and the ranks go on together."""

import alone_cases as cases
import pytest
from workers import Workers


@pytest.mark.parametrize("what", sorted(cases.CALLS))
def test_every_rank_is_told(two: Workers, what: str) -> None:
    (other, goes_on), (wrong, also) = two.run(cases.errors, what=what)
    assert goes_on and also
    assert f"{what.partition(',')[0]} failed on another rank; rank 1: " in other.replace(": checking arguments", "")
    kind, _, message = wrong.partition(": ")
    assert f"rank 1: {kind}: " in other
    assert message.startswith(what.partition(",")[0])


def test_a_wrong_argument_of_one_rank_is_raised_at_the_end_of_the_update(two: Workers) -> None:
    (other, *after), (wrong, *also) = two.run(cases.wrong_argument_within_an_update)
    assert after == also == [True, True]
    assert wrong.startswith("ArgumentTypeError: optimizer_step: expected a scheduler with step(), got str")
    assert "The update was dropped" in wrong
    assert f"ArgumentTypeError: optimizer_step failed on another rank; rank 1: {wrong}" == other


def test_a_target_that_is_no_token_is_told_without_logits_too(two: Workers) -> None:
    other, wrong = two.run(cases.errors, what="token_log_probs, targets", fused=True)
    assert other[1] and wrong[1]
    assert "failed on another rank; rank 1: ArgumentError: token_log_probs: expected targets from 0 to 16" in other[0]


def test_no_forward_pass_runs_where_ranks_must_not_wait_for_each_other(two: Workers) -> None:
    for noted in two.run(cases.forward_passes_in_consensus):
        assert noted == [False, False]
