"""Keeping the optimizer, or a model, in host memory."""

from pathlib import Path

import ds_cases
import ds_cases_offload as cases
import pytest
import torch
from programs import Program, furthest, mixed, reference, relative
from workers import Workers

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def _compiled(one: Workers) -> None:
    """What takes a minute the first time, and has no place in a test's deadline."""
    one.run(cases.compiled, deadline=500)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_cpu_adam_takes_over_with_adam_offload(two: Workers, stage: int, bf16: bool) -> None:
    # the layer "detour" gets a gradient now and then
    program = Program(updates=6, accumulation_steps=2, max_norm=0.5, detours=[(0, 0), (3, 1)])
    settings = {"zero_stage": stage, "bf16": bf16, "adam_offload": True, "persist": False}
    got = two.run(ds_cases.train, program=program, **settings)
    assert furthest(got[0], got[1]) == 0
    assert relative(got[0], reference(program, 2)) < (0.1 if bf16 else 1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_of_the_callers_can_be_offloaded_too(two: Workers, stage: int) -> None:
    program = Program(updates=3, poisoned=(1,))
    first, other = two.run(cases.with_the_callers_adamw, program=program, zero_stage=stage)
    assert furthest(first, other) == 0
    left_out = two.run(cases.with_the_callers_adamw, program=Program(updates=3, skipped=(1,)), zero_stage=stage)
    assert furthest(first, left_out[0]) == 0


@pytest.mark.parametrize("adam_offload", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_training_with_offload_cycles_equals_training_without(
    two: Workers, stage: int, bf16: bool, adam_offload: bool
) -> None:
    settings = {"zero_stage": stage, "bf16": bf16, "adam_offload": adam_offload}
    with_them, without = (two.run(cases.moved_about, cycles=cycles, **settings)[0] for cycles in (True, False))
    assert all(torch.equal(with_them[name], tensor) for name, tensor in without.items())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_an_offloaded_model_frees_its_memory_and_is_reloaded_bit_for_bit(two: Workers, stage: int, bf16: bool) -> None:
    settings = {"zero_stage": stage, "bf16": bf16}
    elements = sum(tensor.numel() for tensor in mixed().parameters())
    wanted = two.run(cases.moved_about, cycles=False, **settings)
    for (freed, got), other in zip(two.run(cases.offloaded, **settings), wanted, strict=True):
        assert freed >= elements * (2 if bf16 and stage else 4) / (2 if stage == 3 else 1)
        assert all(torch.equal(got[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_of_the_cpu_adam_is_resumed_bit_for_bit(
    one: Workers, two: Workers, tmp_path: Path, ranks: int, stage: int, bf16: bool
) -> None:
    workers = {1: one, 2: two}[ranks]
    for wanted, got in workers.run(cases.resumed, path=str(tmp_path), zero_stage=stage, bf16=bf16):
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_torchs_adamw_resumes_from_the_cpu_adam(two: Workers, tmp_path: Path) -> None:
    wanted, _ = two.run(cases.saved_offloaded, path=str(tmp_path))
    got, _ = two.run(cases.loaded_onto_the_device, path=str(tmp_path))
    assert max(float((got[name] - tensor).abs().max()) for name, tensor in wanted.items()) < 1e-4
