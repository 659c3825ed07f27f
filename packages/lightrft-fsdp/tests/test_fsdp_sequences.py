"""Ranks that share sequences: training, generation and mistakes."""

import fsdp_cases_sequences as cases
import pytest
import sequences
from workers import Workers

pytestmark = sequences.of_version_5


@pytest.mark.parametrize("kind", ["plain", "recomputed", "reentrant", "adapter"])
def test_two_ranks_that_share_sequences_train_as_plain_torch(two: Workers, kind: str) -> None:
    sequences.assert_alike(two.run(cases.trained, kind=kind), kind, 1, cases.MAX_NORM)


@pytest.mark.parametrize("shard_size", [-1, 2])
def test_two_pairs_of_ranks_train_as_plain_torch(four: Workers, shard_size: int) -> None:
    observed = four.run(cases.trained, kind="recomputed", fsdp_shard_size=shard_size)
    sequences.assert_alike(observed, "recomputed", 2, cases.MAX_NORM)


def test_ranks_that_share_sequences_generate_alike_and_leave_the_model_as_it_was(two: Workers) -> None:
    for wanted, got, attention in two.run(cases.generated):
        assert got == wanted
        assert attention == "sdpa"


def test_batches_that_are_split_before_they_are_used_keep_their_lengths(two: Workers) -> None:
    assert two.run(cases.with_sharing, function=sequences.used_in_another_order) == 2 * [[True, True]]


def test_a_forward_pass_that_was_interrupted_leaves_nothing_to_the_next(two: Workers) -> None:
    assert max(two.run(cases.with_sharing, function=sequences.after_an_interruption)) < 1e-5


@pytest.mark.parametrize("what", sequences.MISTAKES)
def test_a_mistake_with_shared_sequences_is_explained_on_every_rank(two: Workers, what: str) -> None:
    _, kind, words = sequences.MISTAKES[what]
    for got, message in two.run(cases.with_sharing, function=sequences.mistaken, what=what):
        assert got == kind, message
        assert [word for word in words if word not in message] == [], message


def test_a_size_that_does_not_divide_the_ranks_is_refused(two: Workers) -> None:
    for message in two.run(cases.three_ranks_per_sequence):
        assert "sp_size=3: expected a divisor of the number of ranks, got 2 ranks" in message


def test_lists_are_gathered_and_divided_again(two: Workers) -> None:
    for rank, (collected, scattered, message) in enumerate(
        two.run(cases.with_sharing, function=sequences.shared_lists)
    ):
        assert collected == ["0a", "0b", "1a", "1b"]
        assert scattered == [f"{rank}a", f"{rank}b"]
        assert "a multiple of sp_size=2, got 5" in message


def test_ranks_that_share_sequences_share_the_work_of_the_same_prompts(two: Workers) -> None:
    for rank, (same, counts, apart) in enumerate(two.run(cases.with_sharing, function=sequences.shared_prompts)):
        assert same == [[1, 5], [1, 5], [2, 6, 7], [2, 6, 7], [3], [3]]
        assert counts == [2 - rank, 2]
        assert apart == [[4 + rank], [4 + rank], [9], [9]]


def test_ranks_that_share_sequences_and_an_engine_get_the_same_completions(two: Workers) -> None:
    observed = two.run(cases.with_sharing, function=sequences.shared_prompts, engine_tp_size=2)
    for rank, (same, _, apart) in enumerate(observed):
        assert same == [[1, 5], [1, 5], [2, 6, 7], [2, 6, 7], [3], [3]]
        assert apart == [[4 + rank], [4 + rank], [9], [9]]


@pytest.mark.parametrize("fused", [False, True])
def test_token_log_probs_are_those_of_full_sequences(two: Workers, fused: bool) -> None:
    observed = two.run(cases.with_sharing, function=sequences.with_token_log_probs, fused_linear_logprob=fused)
    assert max(max(distances) for distances in observed) < 1e-5


def test_other_samples_in_one_pair_of_ranks_are_an_error_on_all_four(four: Workers) -> None:
    for kind, message in four.run(cases.with_sharing, function=sequences.samples_of_another_rank):
        assert kind == "StrategyError"
        assert "rank 2: input_ids [2, 11]" in message
        assert "rank 3: input_ids [2, 11]" in message
