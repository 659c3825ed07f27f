"""Updates are those of plain torch, however the model is sharded."""

import fsdp_cases as cases
import pytest
import torch
from fsdp_models import layered, routed
from programs import Observed, Program, furthest, reference, relative
from workers import Workers


def trained(workers: Workers, program: Program, **settings: object) -> Observed:
    """What ``program`` gives on all ranks, which must be the same."""
    return same(workers.run(cases.train, program=program, **settings))


def same(observed: list[Observed]) -> Observed:
    for other in observed[1:]:
        assert furthest(other, observed[0]) == 0
        assert other.norms == pytest.approx(observed[0].norms, rel=0, abs=0, nan_ok=True)
    return observed[0]


def plain(program: Program, ranks: int) -> Observed:
    """``program`` in plain torch, with the saved names: buffers are none of a reference's parameters."""
    return reference(program, ranks, layered)


def test_one_micro_batch_without_clipping_is_bitwise_plain_torch(one: Workers, two: Workers) -> None:
    program = Program()
    assert furthest(trained(one, program), plain(program, 1)) == 0
    assert furthest(trained(two, program), plain(program, 2)) == 0


def test_column_major_parameters_train_like_others(two: Workers) -> None:
    program = Program(updates=2)
    assert furthest(same(two.run(cases.train_laid_out_otherwise, program=program)), plain(program, 2)) == 0


def test_several_micro_batches_and_two_losses_in_each_give_their_mean(two: Workers) -> None:
    program = Program(updates=6, accumulation_steps=2, losses="forward, forward, backward, backward")
    assert relative(trained(two, program), plain(program, 2), layered) < 5e-5


def test_copies_that_are_sharded_over_some_ranks_are_replicas(four: Workers) -> None:
    program = Program(updates=8, accumulation_steps=2, max_norm=0.3)
    got, wanted = trained(four, program, fsdp_shard_size=2), plain(program, 4)
    assert relative(got, wanted, layered) < 5e-5
    assert got.norms == pytest.approx(wanted.norms, rel=1e-5)
    assert min(wanted.norms) > 0.3


def test_each_replica_is_complete_over_its_ranks(four: Workers) -> None:
    got = four.run(cases.held, fsdp_shard_size=2)
    elements = sum(parameter.numel() for parameter in layered().parameters())
    assert {tuple(mesh) for _, mesh, _ in got} == {(2, 2)}
    held = [number for number, _, _ in got]
    assert held[0] + held[1] == held[2] + held[3] == elements
    assert max(held) < 0.75 * elements


def test_a_layer_on_another_mesh_is_clipped_with_the_rest(two: Workers) -> None:
    program = Program(updates=8, accumulation_steps=2, max_norm=0.3)
    got, wanted = same(two.run(cases.train_on_two_meshes, program=program)), plain(program, 2)
    assert got.norms == pytest.approx(wanted.norms, rel=1e-5)
    assert relative(got, wanted, layered) < 5e-5
    assert min(wanted.norms) > 0.3


@pytest.mark.parametrize(
    "settings",
    [{"fsdp_cpu_offload": True}, {"fsdp_shard_size": 1}, {"mixed_mm_data": True}, {"grad_accum_dtype": "fp32"}],
    ids=str,
)
def test_offload_and_resharding_change_no_update(two: Workers, settings: dict[str, object]) -> None:
    program = Program(updates=6, accumulation_steps=2, max_norm=0.3)
    assert relative(trained(two, program, **settings), plain(program, 2), layered) < 5e-5


@pytest.mark.parametrize("given", [None, "bf16"])
def test_bfloat16_stays_near_the_fp32_reference_and_the_masters_are_fp32(two: Workers, given: str | None) -> None:
    program = Program(accumulation_steps=2)
    got = trained(two, program, bf16=True, grad_accum_dtype=given)
    assert 0 < relative(got, plain(program, 2), layered) < 0.1
    assert {str(dtype) for _, _, dtypes in two.run(cases.held, bf16=True) for dtype in dtypes} == {"torch.float32"}


def test_a_layer_that_only_some_updates_use_moves_as_in_plain_torch(two: Workers) -> None:
    program = Program(updates=6, accumulation_steps=2, detours=[(0, 0), (3, 1)])
    assert relative(trained(two, program), plain(program, 2), layered) < 5e-5


PARTS = Program(updates=6, accumulation_steps=2, max_norm=0.3, detours=[(0, 0), (3, 1)], detour_of=1)
"""Ranks choose different experts of a layer, and only rank 1 uses the vision layer."""


def test_a_part_that_one_rank_does_not_use_gets_a_zero_gradient_there(two: Workers) -> None:
    got, wanted = trained(two, PARTS, build=routed, mixed_mm_data=True), reference(PARTS, 2, routed)
    assert relative(got, wanted, routed) < 5e-5
    assert got.norms == pytest.approx(wanted.norms, rel=1e-5)


def test_replicas_may_use_different_parts(four: Workers) -> None:
    got = trained(four, PARTS, build=routed, mixed_mm_data=True, fsdp_shard_size=2)
    assert relative(got, reference(PARTS, 4, routed), routed) < 5e-5


def test_a_nan_gradient_on_one_rank_skips_the_update_on_all(two: Workers) -> None:
    bad, good = Program(updates=5, max_norm=0.5, poisoned=(2,)), Program(updates=5, max_norm=0.5, skipped=(2,))
    assert furthest(trained(two, bad), trained(two, good)) == 0


def test_a_forward_that_failed_half_way_changes_nothing(two: Workers) -> None:
    program = Program(updates=3)
    for got, wanted in zip(
        two.run(cases.stumbled, program=program), two.run(cases.train, program=program), strict=True
    ):
        assert furthest(Observed(parameters=got), wanted) == 0


def test_muon_orthogonalizes_full_matrices(two: Workers) -> None:
    for got, wanted in two.run(cases.with_optimizer, name="Muon"):
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
