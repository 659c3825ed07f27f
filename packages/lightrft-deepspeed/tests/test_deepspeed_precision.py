"""What is fp32 where the model computes in bfloat16."""

import ds_cases_precision as cases
import pytest
import torch
from workers import Workers

STAGES = (0, 1, 2, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_add_in_fp32(two: Workers, stage: int) -> None:
    # bfloat16 knows no number between 256 and 258: it would lose each of the small ones
    gradients = [256.0] + [0.5] * 31
    for weights, (norm,) in two.run(
        cases.descended, gradients=gradients, accumulation_steps=32, rate=1.0, zero_stage=stage
    ):
        mean = sum(gradients) / 32
        assert norm == pytest.approx(mean * 2**0.5, rel=1e-6)
        assert weights == pytest.approx([1 - mean, 2 - mean], rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_updates_below_the_resolution_of_bfloat16_add_up(two: Workers, stage: int) -> None:
    for weights, _ in two.run(
        cases.descended, gradients=[1.0] * 64, accumulation_steps=1, rate=2.0**-14, zero_stage=stage
    ):
        assert weights == [1 - 2.0**-8, 2 - 2.0**-8]


@pytest.mark.parametrize("stage", STAGES)
def test_fp32_inputs_are_taken_and_the_model_computes_in_bfloat16(two: Workers, stage: int) -> None:
    for outputs, dtype, input_dtype in two.run(cases.called_with_floats, zero_stage=stage):
        assert dtype is torch.bfloat16
        assert input_dtype is torch.float32
        assert torch.equal(outputs, torch.full((5, 2), 1.5))
