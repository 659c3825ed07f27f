"""Pure functions: DeepSpeed's configuration, what a stage supports, and where master weights lie."""

import warnings

import pytest
import torch
from torch import nn

from lightrft.config import ConfigError, StrategyConfig
from lightrft.deepspeed.ds_config import computes_in_bf16, eval_config, fit_bucket, train_config
from lightrft.deepspeed.master_weights import owned_ranges
from lightrft.deepspeed.model_offload import OffloadedStorages
from lightrft.deepspeed.stage_limits import unsupported, validate
from lightrft.strategy.distributed.world import World

STAGES = (0, 1, 2, 3)


def settings(**given: object) -> StrategyConfig:
    return StrategyConfig(device="cpu", **given)


def world(size: int = 2, rank: int = 0) -> World:
    alone = World.alone(settings())
    alone.size, alone.rank = size, rank
    return alone


@pytest.mark.parametrize("stage", STAGES)
def test_counting_and_scaling_are_not_deepspeeds(stage: int) -> None:
    made = train_config(settings(zero_stage=stage))
    assert made["managed_gradient_accumulation"] is False
    assert made["gradient_accumulation_steps"] == made["train_micro_batch_size_per_gpu"] == 1
    assert made["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(("max_norm", "clipping"), [(None, 0.0), (0.0, 0.0), (0.7, 0.7)])
def test_no_norm_means_no_clipping(max_norm: float | None, clipping: float) -> None:
    assert train_config(settings(max_norm=max_norm))["gradient_clipping"] == clipping


@pytest.mark.parametrize(
    ("given", "bf16", "accumulate"),
    [
        ({"zero_stage": 2}, True, "fp32"),
        ({"zero_stage": 2, "grad_accum_dtype": "fp32"}, True, "fp32"),
        ({"zero_stage": 2, "grad_accum_dtype": "bf16"}, True, "bf16"),
        ({"zero_stage": 2, "bf16": False}, False, "fp32"),
        ({"zero_stage": 0}, False, "fp32"),
    ],
)
def test_gradients_are_reduced_and_accumulated_in_the_configured_dtype(
    given: dict[str, object], bf16: bool, accumulate: str
) -> None:
    made = train_config(settings(**given))
    assert made["bf16"]["enabled"] is computes_in_bf16(settings(**given)) is bf16
    assert made["data_types"]["grad_accum_dtype"] == made["communication_data_type"] == accumulate


def test_options_of_one_stage_appear_on_that_stage_alone() -> None:
    made = train_config(settings(zero_stage=3, zpg=2, overlap_comm=True, adam_offload=True), pin_memory=True)
    zero = made["zero_optimization"]
    assert zero["zero_hpz_partition_size"] == 2
    assert zero["overlap_comm"] is True
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    plain = train_config(settings(zero_stage=2))["zero_optimization"]
    assert plain.keys() == {"stage", "overlap_comm", "reduce_bucket_size"}


def test_a_small_model_gets_a_small_bucket() -> None:
    made = train_config(settings(zero_stage=2))
    assert fit_bucket(made, 1000)["zero_optimization"]["reduce_bucket_size"] == 1000
    assert fit_bucket(made, 10**12) == made
    assert made["zero_optimization"]["reduce_bucket_size"] == 50_000_000


def test_models_that_do_not_train_are_sharded_at_stage_3_only_and_keep_their_type() -> None:
    assert eval_config(settings(zero_stage=2))["zero_optimization"] == {"stage": 0}
    made = eval_config(settings(zero_stage=3), offload=True)
    assert made["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": False}}
    assert made["bf16"] == {"enabled": False}


@pytest.mark.parametrize("given", [{"zero_stage": stage, "bf16": bf16} for stage in STAGES for bf16 in (True, False)])
def test_deepspeed_accepts_every_key_of_the_configuration(given: dict[str, object]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for made in (train_config(settings(**given)), eval_config(settings(**given))):
        assert DeepSpeedZeroConfig(**made["zero_optimization"]).stage == made["zero_optimization"]["stage"]


@pytest.mark.parametrize(
    ("given", "ranks", "name", "reason"),
    [
        ({"zero_stage": 1, "overlap_comm": True}, 2, "overlap_comm", "from zero_stage 2 on"),
        ({"zero_stage": 2, "zpg": 2}, 2, "zpg", "at zero_stage 3 only"),
        ({"zero_stage": 3, "zpg": 3}, 4, "zpg", "4 ranks do not divide into partitions of 3"),
        ({"zero_stage": 0, "grad_accum_dtype": "bf16"}, 2, "grad_accum_dtype", "accumulates in fp32"),
    ],
)
def test_unsupported_settings_of_a_stage_are_refused_or_warned_of(
    given: dict[str, object], ranks: int, name: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*{reason}"):
        validate(settings(**given), world(ranks))
    from_script = StrategyConfig.from_args({"device": "cpu", **given})
    with pytest.warns(UserWarning, match=f"{name}=.*{reason}"):
        left = validate(from_script, world(ranks))
    assert name not in left.changed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert validate(from_script, world(ranks, rank=1)) == left


@pytest.mark.parametrize(
    "given",
    [
        {"zero_stage": 3, "zpg": 2, "overlap_comm": True, "adam_offload": True, "grad_accum_dtype": "bf16"},
        {"zero_stage": 1, "adam_offload": True, "grad_accum_dtype": "fp32"},
        {"zero_stage": 0, "bf16": False, "adam_offload": True},
    ],
)
def test_supported_settings_of_a_stage_are_unchanged(given: dict[str, object]) -> None:
    assert list(unsupported(settings(**given), 4)) == []
    assert validate(settings(**given), world(4)) == settings(**given)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [[7], [4, 4], [1, 0, 13, 2], [3, 1, 1, 1, 1, 1]])
def test_every_element_is_owned_by_one_rank(sizes: list[int], ranks: int) -> None:
    owned = [owned_ranges(sizes, ranks, rank) for rank in range(ranks)]
    for index, size in enumerate(sizes):
        elements = [element for parts in owned for element in parts[index]]
        assert elements == list(range(size))


def test_offloaded_memory_is_reloaded_under_every_view() -> None:
    flat = torch.arange(12.0)
    view, other = flat[3:7].view(2, 2), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    offloaded = OffloadedStorages([flat, view, other])
    assert flat.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
    offloaded.reload()
    assert torch.equal(flat, torch.arange(12.0))
    assert torch.equal(other, torch.ones(3, dtype=torch.bfloat16))
    view.zero_()
    assert flat[3:7].tolist() == [0.0] * 4
    offloaded.reload()
    assert flat[0:3].tolist() == [0.0, 1.0, 2.0]
