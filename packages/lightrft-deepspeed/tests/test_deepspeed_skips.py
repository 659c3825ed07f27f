"""An update with a gradient that is not finite leaves no trace."""

import ds_cases_skips as cases
import pytest
import torch
from programs import Program
from workers import Workers

STAGES = (0, 1, 2, 3)
State = list[dict[str, torch.Tensor]]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_update_does_not_affect_later_ones(two: Workers, stage: int, bf16: bool) -> None:
    settings = {"zero_stage": stage, "bf16": bf16}
    # the layer "detour" gets a gradient in the bad update only: what it leaves there would show
    bad = Program(updates=5, accumulation_steps=2, max_norm=0.5, poisoned=(2,), detours=[(0, 0), (2, 1)])
    good = Program(updates=5, accumulation_steps=2, max_norm=0.5, skipped=(2,), detours=[(0, 0)])
    with_it, without_it = two.run(cases.after, program=bad, **settings), two.run(cases.after, program=good, **settings)
    for (parameters, state, seen), (wanted_parameters, wanted_state, _) in zip(with_it, without_it, strict=True):
        assert seen == [(True, False)] * 2 + [(False, True)] + [(True, False)] * 2
        assert all(torch.equal(parameters[name], tensor) for name, tensor in wanted_parameters.items())
        assert len(state) == len(wanted_state) > 0
        for state_of_rank, wanted in zip(state, wanted_state, strict=True):
            assert all(torch.equal(state_of_rank[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_finite_gradients_with_an_infinite_norm_are_skipped(two: Workers, stage: int, bf16: bool) -> None:
    assert two.run(cases.overflowing, scale=1e22, zero_stage=stage, bf16=bf16) == [(False, True, False)] * 2
    assert two.run(cases.overflowing, scale=1e6, zero_stage=stage, bf16=bf16) == [(True, False, True)] * 2
