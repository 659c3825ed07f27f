"""Log-probabilities and the updates that are made from them are those of plain torch, at every stage of ZeRO."""

import ds_cases_log_probs as cases
import policies
import pytest
from llamas import llama
from workers import Workers

STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])


def check(got: list[policies.Trained], tied: bool = True) -> None:
    for rank, here in enumerate(got):
        wanted = policies.reference(lambda: llama(tied), len(got), rank)
        assert here.distance(wanted) < 1e-5
        assert here.parameter_distance(wanted) < 1e-5


@STAGES
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_two_ranks(two: Workers, stage: int, tied: bool) -> None:
    check(two.run(cases.trained, tied=tied, zero_stage=stage, fused_linear_logprob=True), tied)


def test_gradient_checkpointing(two: Workers) -> None:
    check(two.run(cases.trained, checkpointing=True, zero_stage=3, fused_linear_logprob=True))


@pytest.mark.parametrize("settings", [{"adapter": True}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("stage", [2, 3])
def test_the_setting_changes_no_result(two: Workers, stage: int, settings: dict[str, object]) -> None:
    fused, plain = (
        two.run(cases.trained, zero_stage=stage, fused_linear_logprob=fused, **settings) for fused in (True, False)
    )
    for here, wanted in zip(fused, plain, strict=True):
        assert here.distance(wanted) < 1e-5
        assert here.parameter_distance(wanted) < (5e-4 if settings.get("bf16") else 1e-5)


@STAGES
def test_the_loss_of_another_model_is_refused(two: Workers, stage: int) -> None:
    for error in two.run(cases.refused, zero_stage=stage):
        assert "expected a loss that depends on a trainable parameter" in error


@pytest.mark.parametrize("stage", [2, 3])
def test_packed_sequences_of_one_rank_are_refused_on_all(two: Workers, stage: int) -> None:
    ours, others = two.run(cases.packed_on_rank_0, zero_stage=stage)
    assert (ours[0], others[0]) == ("", "")
    assert "expected a model that keeps packed sequences apart" in ours[1]
    assert "failed on another rank; rank 0: UnsupportedOperationError" in others[1]
