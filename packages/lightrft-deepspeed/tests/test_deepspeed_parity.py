"""Updates are those of plain torch, on every stage."""

import ds_cases
import pytest
from programs import Observed, Program, furthest, reference, relative
from workers import Workers, WorkersError

STAGES = (0, 1, 2, 3)
TWO_LOSSES = (
    "forward, backward, forward, backward",
    "forward, forward, backward, backward",
    "forward, forward, one backward",
)


def trained(workers: Workers, program: Program, **settings: object) -> Observed:
    """What ``program`` gives on all ranks, which must be the same."""
    observed: list[Observed] = workers.run(ds_cases.train, program=program, **settings)
    for other in observed[1:]:
        assert furthest(other, observed[0]) == 0
        assert other.norms == observed[0].norms
    return observed[0]


@pytest.mark.parametrize("stage", STAGES)
def test_one_micro_batch_without_clipping_is_bitwise_plain_torch_on_one_rank(one: Workers, stage: int) -> None:
    program = Program()
    assert furthest(trained(one, program, zero_stage=stage), reference(program, 1)) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_one_micro_batch_without_clipping_is_bitwise_plain_torch_on_two_ranks(two: Workers, stage: int) -> None:
    program = Program()
    assert furthest(trained(two, program, zero_stage=stage), reference(program, 2)) == 0


def test_sharded_parameters_give_the_same_result(two: Workers) -> None:
    program = Program()
    assert furthest(trained(two, program, zero_stage=3, persist=False), reference(program, 2)) == 0


@pytest.mark.parametrize("accumulation_steps", [2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_several_micro_batches_give_their_mean(two: Workers, stage: int, accumulation_steps: int) -> None:
    program = Program(updates=10, accumulation_steps=accumulation_steps)
    assert relative(trained(two, program, zero_stage=stage), reference(program, 2)) < 5e-5


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_uses_one_norm_over_all_groups_and_ranks(two: Workers, stage: int) -> None:
    program = Program(updates=10, max_norm=0.3)
    got, wanted = trained(two, program, zero_stage=stage), reference(program, 2)
    assert furthest(got, wanted) < 1e-6
    assert min(wanted.norms) > 0.3
    assert got.norms == pytest.approx(wanted.norms, rel=1e-6)


@pytest.mark.parametrize("losses", TWO_LOSSES)
@pytest.mark.parametrize("stage", STAGES)
def test_two_losses_in_a_micro_batch_add(two: Workers, stage: int, losses: str) -> None:
    program = Program(updates=5, accumulation_steps=2, losses=losses)
    assert relative(trained(two, program, zero_stage=stage), reference(program, 2)) < 5e-5


@pytest.mark.parametrize("stage", STAGES)
def test_two_losses_in_a_micro_batch_add_in_bfloat16(two: Workers, stage: int) -> None:
    program = Program(updates=5, accumulation_steps=2, losses="forward, forward, backward, backward")
    assert relative(trained(two, program, zero_stage=stage, bf16=True), reference(program, 2)) < 0.1


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_an_update_of_another_length_still_gives_the_mean(two: Workers, stage: int, bf16: bool) -> None:
    program = Program(updates=6, accumulation_steps=2, lengths=(3, 1, 2, 1, 4, 2), max_norm=0.3)
    got, wanted = trained(two, program, zero_stage=stage, bf16=bf16), reference(program, 2)
    assert relative(got, wanted) < (0.1 if bf16 else 5e-5)
    assert got.norms == pytest.approx(wanted.norms, rel=0.1 if bf16 else 1e-5)


@pytest.mark.parametrize("accumulation_steps", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_stays_near_the_fp32_reference(two: Workers, stage: int, accumulation_steps: int) -> None:
    program = Program(accumulation_steps=accumulation_steps)
    assert relative(trained(two, program, zero_stage=stage, bf16=True), reference(program, 2)) < 0.1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_accumulate_in_bfloat16_if_configured(two: Workers, stage: int) -> None:
    program = Program(updates=10, accumulation_steps=3)
    got = trained(two, program, zero_stage=stage, bf16=True, grad_accum_dtype="bf16")
    assert relative(got, reference(program, 2)) < 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_without_a_gradient_counts_as_having_a_zero_one(two: Workers, stage: int) -> None:
    # used first, then not at all, then late in the update only: what was left behind would show
    program = Program(updates=5, accumulation_steps=2, detours=[(0, 0), (0, 1), (2, 1), (3, 0)])
    assert relative(trained(two, program, zero_stage=stage), reference(program, 2)) < 5e-5


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"bf16": True, "grad_accum_dtype": "bf16"}])
@pytest.mark.parametrize("stage", [0, 1])
def test_ranks_may_use_different_modules_at_stages_0_and_1(
    two: Workers, stage: int, settings: dict[str, object]
) -> None:
    if stage == 0 and "grad_accum_dtype" in settings:
        return
    program = Program(updates=4, accumulation_steps=2, detours=[(0, 0), (2, 1)], detour_of=1)
    got = trained(two, program, zero_stage=stage, **settings)
    assert relative(got, reference(program, 2)) < (0.1 if settings else 5e-5)


def test_different_modules_are_an_error_on_every_rank_where_gradients_would_mix(two: Workers) -> None:
    program = Program(updates=4, detours=[(1, 0)], detour_of=1)
    with pytest.raises(WorkersError) as caught:
        two.run(ds_cases.train, program=program, zero_stage=2)
    assert (
        str(caught.value).count("StrategyError: backward: expected all ranks to use the same modules of this model")
        == 2
    )


def test_different_modules_are_an_error_within_the_timeout_where_parameters_are_gathered(two: Workers) -> None:
    program = Program(updates=4, detours=[(1, 0)], detour_of=1)
    with pytest.raises(WorkersError) as caught:
        two.run(ds_cases.train, program=program, zero_stage=3, timeout=3.0)
    assert str(caught.value).count("did not make the same call within 3 s") == 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_scheduler_drives_the_rate_of_the_callers_optimizer(two: Workers, stage: int) -> None:
    program = Program(updates=6, decaying_rate=True)
    assert furthest(trained(two, program, zero_stage=stage), reference(program, 2)) == 0


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_wrapping_before_creating_the_optimizer_gives_the_same_result(two: Workers, stage: int, bf16: bool) -> None:
    program = Program(updates=5)
    settings = {"zero_stage": stage, "bf16": bf16}
    first, after = trained(two, program, wrap_first=True, **settings), trained(two, program, **settings)
    assert furthest(first, after) == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_reducing_during_backward_gives_the_same_result(two: Workers, stage: int) -> None:
    program = Program(updates=6, accumulation_steps=2)
    got = trained(two, program, zero_stage=stage, overlap_comm=True)
    assert relative(got, reference(program, 2)) < 5e-5


def test_a_secondary_partition_gives_the_same_result(two: Workers) -> None:
    program = Program(updates=6, accumulation_steps=2)
    got = trained(two, program, zero_stage=3, zpg=2, persist=False)
    assert relative(got, reference(program, 2)) < 5e-5
