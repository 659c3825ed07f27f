"""Log-probabilities and the updates that are made from them are those of plain torch, with a sharded head."""

import fsdp_cases_log_probs as cases
import policies
import pytest
from llamas import llama
from workers import Workers


def check(got: list[policies.Trained], tied: bool = True) -> None:
    for rank, here in enumerate(got):
        wanted = policies.reference(lambda: llama(tied), len(got), rank)
        assert here.distance(wanted) < 1e-5
        assert here.parameter_distance(wanted) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_on_one_rank_and_on_two(one: Workers, two: Workers, tied: bool, fused: bool) -> None:
    for workers in (one, two):
        check(workers.run(cases.trained, tied=tied, fused_linear_logprob=fused), tied)


def test_gradient_checkpointing(two: Workers) -> None:
    check(two.run(cases.trained, checkpointing=True, fused_linear_logprob=True))


def test_copies_of_the_head_that_are_sharded_over_some_ranks(four: Workers) -> None:
    check(four.run(cases.trained, fsdp_shard_size=2, fused_linear_logprob=True))


@pytest.mark.parametrize("settings", [{"adapter": True}, {"bf16": True}, {"fsdp_cpu_offload": True}], ids=str)
def test_the_setting_changes_no_result(two: Workers, settings: dict[str, object]) -> None:
    fused, plain = (two.run(cases.trained, fused_linear_logprob=fused, **settings) for fused in (True, False))
    for here, wanted in zip(fused, plain, strict=True):
        assert here.distance(wanted) < 1e-5
        assert here.parameter_distance(wanted) < (5e-4 if settings.get("bf16") else 1e-5)


def test_the_loss_of_another_model_is_refused(two: Workers) -> None:
    for error in two.run(cases.refused):
        assert "expected a loss that depends on a trainable parameter" in error


def test_packed_sequences_of_one_rank_are_refused_on_all(two: Workers) -> None:
    ours, others = two.run(cases.packed_on_rank_0)
    assert (ours[0], others[0]) == ("", "")
    assert "expected a model that keeps packed sequences apart" in ours[1]
    assert "failed on another rank; rank 0: UnsupportedOperationError" in others[1]
