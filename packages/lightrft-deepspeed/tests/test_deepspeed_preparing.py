"""What a prepared model is: its weights, names, master weights and averages."""

from pathlib import Path

import ds_cases_preparing as cases
import preparing
import pytest
import torch
from programs import Program, mixed, tokens
from torch import nn
from workers import Workers, WorkersError

STAGES = (0, 1, 2, 3)
BF16 = pytest.mark.parametrize("bf16", [False, True])
EACH_STAGE = pytest.mark.parametrize("stage", STAGES)
BOTH = pytest.mark.parametrize("persist", [True, False])


def equal(got: dict[str, torch.Tensor], model: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Whether ``got`` has the parameters and buffers of ``model``, tied ones once, and nothing else."""
    wanted = {name: tensor.detach().to(dtype) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return got.keys() == wanted.keys() and all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@BF16
@BOTH
@EACH_STAGE
def test_the_weights_are_rank_0s_and_the_master_weights_are_not_rounded(
    two: Workers, stage: int, persist: bool, bf16: bool
) -> None:
    for fp32, low in two.run(cases.prepared_for_training, persist=persist, zero_stage=stage, bf16=bf16):
        wanted = mixed()
        if bf16 and stage:  # DeepSpeed stores frozen parameters in bfloat16, and they have no master weights
            wanted.frozen.to(torch.bfloat16).float()
        assert equal(fp32, wanted)
        assert equal(low, mixed(), torch.bfloat16)


@BF16
@EACH_STAGE
def test_preparing_does_not_change_the_outputs(two: Workers, stage: int, bf16: bool) -> None:
    for wanted, *got in two.run(cases.called_before_and_after, zero_stage=stage, bf16=bf16):
        for output in got:
            torch.testing.assert_close(output, wanted, atol=0.05 if bf16 else 1e-6, rtol=0.05 if bf16 else 1e-6)


@pytest.mark.parametrize("in_training", [True, False])
@EACH_STAGE
def test_a_model_that_only_rank_0_built_is_complete_on_every_rank(two: Workers, stage: int, in_training: bool) -> None:
    for got in two.run(cases.built_on_rank_0_alone, in_training=in_training, zero_stage=stage):
        assert equal(got, mixed())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BF16
@EACH_STAGE
def test_a_model_for_inference_never_changes(two: Workers, stage: int, bf16: bool, dtype: torch.dtype) -> None:
    got = two.run(cases.for_inference, dtype=dtype, zero_stage=stage, bf16=bf16)
    for same, _, moves in got:
        assert not moves
        assert equal(same, mixed().to(dtype), torch.bfloat16 if bf16 else dtype)
    elements = sum(tensor.numel() for tensor in mixed().parameters())
    held = [number for _, number, _ in got]
    assert sum(held) == elements if stage == 3 else held == [elements, elements]


@BF16
@EACH_STAGE
def test_an_average_follows_the_master_weights_and_stays_fp32(two: Workers, stage: int, bf16: bool) -> None:
    for got, wanted, dtype, outputs in two.run(cases.averaged, zero_stage=stage, bf16=bf16):
        assert dtype is torch.float32
        for name, tensor in wanted.items():
            torch.testing.assert_close(got[name], tensor, atol=1e-7, rtol=1e-6)
        plain = mixed()
        plain.load_state_dict({**plain.state_dict(), **got, "head.weight": got["embed.weight"]})
        tolerance = 0.05 if bf16 else 1e-5
        torch.testing.assert_close(outputs, plain(tokens(5)).detach(), atol=tolerance, rtol=tolerance)


@BF16
@EACH_STAGE
def test_shards_are_views_of_the_master_weights(two: Workers, stage: int, bf16: bool) -> None:
    wanted = mixed(11)
    if bf16 and stage:
        wanted.frozen.to(torch.bfloat16).float()
    for fp32, low, outputs in two.run(cases.written_through_shards, zero_stage=stage, bf16=bf16):
        assert equal(fp32, wanted)
        assert equal(low, wanted, torch.bfloat16)
        tolerance = 0.05 if bf16 else 1e-5
        torch.testing.assert_close(outputs, wanted(tokens(5)).detach(), atol=tolerance, rtol=tolerance)


@BF16
@EACH_STAGE
def test_two_models_in_training_share_nothing(two: Workers, stage: int, bf16: bool) -> None:
    settings = {"zero_stage": stage, "bf16": bf16}
    together = two.run(cases.actor_and_critic, **settings)
    actor = two.run(cases.alone, seed=3, program=Program(updates=4, accumulation_steps=2, max_norm=0.3), **settings)
    critic = two.run(
        cases.alone, seed=4, program=Program(updates=4, accumulation_steps=2, max_norm=0.3, poisoned=(1,)), **settings
    )
    for rank in range(2):
        for got, wanted in zip(together[rank], (actor[rank], critic[rank]), strict=True):
            assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_empty_group_is_refused(two: Workers, stage: int) -> None:
    with pytest.raises(WorkersError, match=r"of the optimizer \(SGD\), got none in group 1 of 2"):
        two.run(cases.with_groups, empty=True, stepped=False, optimizer_class="SGD", zero_stage=stage)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_optimizer_that_deepspeed_would_empty_or_replace_is_refused(two: Workers, stage: int) -> None:
    with pytest.raises(WorkersError, match="got one that has stepped"):
        two.run(cases.with_groups, empty=False, stepped=True, optimizer_class="AdamW", zero_stage=stage)
    with pytest.raises(WorkersError, match=r"got Adagrad\. DeepSpeed replaces it"):
        two.run(cases.with_groups, empty=False, stepped=False, optimizer_class="Adagrad", zero_stage=stage)


@pytest.mark.parametrize("optimizer_class", ["Adagrad", "AdamW"])
def test_at_stage_0_the_optimizer_stays_whole(two: Workers, optimizer_class: str) -> None:
    two.run(cases.with_groups, empty=False, stepped=True, optimizer_class=optimizer_class, zero_stage=0)


def test_parameters_without_elements_are_refused_by_zero_3_alone(two: Workers) -> None:
    two.run(cases.with_an_empty_parameter, zero_stage=2)
    with pytest.raises(WorkersError, match="got none in nothing of Linear, which ZeRO-3 cannot gather"):
        two.run(cases.with_an_empty_parameter, zero_stage=3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sparse_gradients_and_batch_norm_in_bf16_are_refused_by_name(two: Workers, stage: int) -> None:
    with pytest.raises(WorkersError, match=r"UnsupportedOperationError: .* expected dense gradients of Lookup"):
        two.run(cases.with_sparse_gradient, zero_stage=stage)
    with pytest.raises(WorkersError, match=rf"UnsupportedOperationError: prepare: .*got norm of Lookup. ZeRO-{stage}"):
        two.run(cases.with_sparse_gradient, zero_stage=stage, bf16=True)


def test_a_model_that_a_closed_strategy_sharded_is_refused(one: Workers) -> None:
    with pytest.raises(WorkersError, match="sharded already, by a strategy that was closed"):
        one.run(cases.prepared_twice, zero_stage=3)


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_of_full_matrices_is_refused(two: Workers, stage: int, name: str) -> None:
    with pytest.raises(WorkersError, match=rf"StrategyError: prepare: .*got {name}.*ZeRO flattens"):
        two.run(cases.with_optimizer, name=name, zero_stage=stage)


@BF16
@pytest.mark.parametrize(("stage", "how"), [(0, "directly"), (1, "directly"), (2, "directly"), (3, "gathered")])
def test_weights_that_a_script_writes_are_kept(two: Workers, stage: int, how: str, bf16: bool) -> None:
    for before, after in two.run(cases.written_by_script, zero_stage=stage, how=how, bf16=bf16):
        rows = before["out.weight"][:3]
        before["out.weight"][:3] = (rows.bfloat16() if bf16 and stage else rows) * 0.5
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_write_to_sharded_weights_is_refused_until_weights_are_loaded(two: Workers, tmp_path: Path) -> None:
    for first, again, applied in two.run(cases.written_to_sharded, zero_stage=3, path=str(tmp_path)):
        assert first == again
        assert "Use load_model" in first
        assert applied == "True"


@pytest.mark.parametrize("beside_a_forward", [False, True])
def test_a_penalty_on_an_empty_parameter_is_refused_by_name(two: Workers, beside_a_forward: bool) -> None:
    for error in two.run(cases.penalty_on_a_parameter, beside_a_forward=beside_a_forward):
        assert error.startswith(
            "backward: expected a loss from the forward pass of Mixed, got one that uses its parameters"
        )
        assert error.endswith("Compute penalties over parameters in the model's forward")


def test_a_weight_used_outside_the_forward_pass_raises_what_the_documentation_explains(two: Workers) -> None:
    for error, goes_on in two.run(preparing.weight_outside_forward, strategy="deepspeed", zero_stage=3):
        assert "size mismatch" in error
        assert goes_on
