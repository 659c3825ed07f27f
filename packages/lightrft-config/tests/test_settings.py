"""Building a configuration directly: exact names, exact types, clear refusals."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft.config import ConfigError, StrategyConfig
from lightrft.config.settings import Settings

LIGHTRFT_DEFAULTS = {
    "seed": 42, "max_norm": 1.0, "micro_train_batch_size": 1, "train_batch_size": 128, "bf16": True,
    "zero_stage": 2, "fsdp": False, "fsdp_cpu_offload": False, "adam_offload": False, "zpg": 1,
    "grad_accum_dtype": None, "overlap_comm": False, "engine_type": "vllm", "engine_tp_size": 1,
    "enable_engine_sleep": False, "local_rank": -1, "sp_size": 1, "actor_learning_rate": 1e-5,
    "critic_learning_rate": 1e-5, "adam_betas": (0.9, 0.95), "l2": 0.0, "lr_warmup_ratio": 0.03,
    "critic_pretrain": False, "remote_rm_url": None, "pretrain_data": None, "fused_linear_logprob": False,
    "reward_running_norm": False, "reward_running_norm_minus_mean": False, "advantages_norm": False,
    "advantage_clip": 0.0, "reward_clip": 0.0, "micro_rollout_batch_size": 2, "n_samples_per_prompt": 8,
    "overlong_buffer": False, "overlong_buffer_len": 1024, "overlong_buffer_penalty_factor": 1.0,
    "dynamic_sampling": False, "advantage_estimator": "group_norm", "use_kl_loss": False, "kl_estimator": "k3",
    "mixed_mm_data": False, "use_mp_opt": False, "plot_every": -1, "use_tensorboard": False,
}  # fmt: skip
ADDED = {"strategy", "device", "timeout", "max_skipped_updates", "async_ckpt", "ckpt_checksum", "fsdp_shard_size",
         "engine_mem_util", "weight_sync_bucket_bytes", "extra_args", "log_dir", "log_name", "log_project", "trackers"}  # fmt: skip


def test_names_and_defaults_are_lightrfts():
    config = StrategyConfig()
    assert {name: getattr(config, name) for name in LIGHTRFT_DEFAULTS} == LIGHTRFT_DEFAULTS
    assert set(StrategyConfig.model_fields) == set(LIGHTRFT_DEFAULTS) | ADDED


def test_every_setting_has_a_description_and_an_owner():
    for name, field in StrategyConfig.model_fields.items():
        assert field.description, name
        assert StrategyConfig.owner(name) in ("strategy", "engine", "trainer")


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"'train_batch_sise' is not a setting, got int \(64\)\. Did you mean 'train_batch_size'"
    ):
        StrategyConfig(train_batch_sise=64)


def test_an_error_lists_everything_that_is_wrong():
    with pytest.raises(ConfigError) as error:
        StrategyConfig(zero_stage="three", zpg=0)
    assert "zero_stage: expected an integer >= 0 and <= 3, got str ('three')" in str(error.value)
    assert "zpg: expected an integer > 0, got int (0)" in str(error.value)


BAD = {
    int: ["1", 1.5, True, None, math.nan, [1]],
    float: ["1e-5", True, math.nan, math.inf, [0.1]],
    bool: [1, 0, "true", None, 0.0],
    str: [3, b"x", True],
}
OUT_OF_RANGE = {
    "zero_stage": [-1, 4], "seed": [-1, 2**32], "local_rank": [-2], "timeout": [0, -1.0], "max_norm": [-0.5],
    "micro_train_batch_size": [0], "train_batch_size": [0, -8], "adam_betas": [(0.9, 1.0), (0.9,), (0.9, 0.95, 0.99), "ab"],
    "lr_warmup_ratio": [1.1], "engine_mem_util": [0, 1.5], "strategy": [""], "kl_estimator": ["k4"],
    "grad_accum_dtype": ["float32", 32], "device": ["gpu", None], "sp_size": [0], "fsdp_shard_size": [-2],
    "weight_sync_bucket_bytes": [0], "remote_rm_url": [5, (1, 2)], "use_tensorboard": [1.5], "extra_args": [5, {1: 2}],
    "trackers": ["wandb", (1,), None], "log_dir": ["", 5], "log_name": ["", 5], "log_project": ["", None],
}  # fmt: skip


def bad_values():
    for name, default in LIGHTRFT_DEFAULTS.items():
        for value in BAD.get(type(default), []):
            if not (value is None and name == "max_norm"):
                yield name, value
    for name, values in OUT_OF_RANGE.items():
        yield from ((name, value) for value in values)


@pytest.mark.parametrize(
    ("name", "value"),
    [v for v in bad_values() if not (v[0] in ("use_tensorboard", "critic_pretrain") and v[1] in ("true", None))],
)
def test_a_single_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"(?m)^(StrategyConfig:|) *{name}: expected \S.*, got \S"):
        StrategyConfig(**{name: value})


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers(), max_size=3)
)


@given(name=st.sampled_from(sorted(Settings.model_fields)), value=ANYTHING)
def test_any_value_is_either_kept_or_refused_by_name(name, value):
    try:
        config = StrategyConfig(**{name: value})
    except ConfigError as error:
        assert name in str(error)
    else:
        kept = getattr(config, name)
        assert kept == value or (isinstance(value, list) and kept == tuple(value))
        assert type(kept) is type(value) or isinstance(kept, (float, tuple))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fsdp": True, "strategy": "deepspeed"}, "fsdp=True selects FSDP2, but strategy='deepspeed'"),
        ({"train_batch_size": 10, "micro_train_batch_size": 4}, "train_batch_size=10 is not a multiple of micro_train_batch_size=4"),
        ({"fsdp_cpu_offload": True, "adam_offload": True}, "Remove adam_offload"),
        ({"reward_running_norm_minus_mean": True}, "requires reward_running_norm=True"),
        ({"n_samples_per_prompt": 1}, "compares the completions of a prompt, but n_samples_per_prompt=1"),
        ({"n_samples_per_prompt": 1, "advantage_estimator": "gae", "dynamic_sampling": True}, "dynamic_sampling=True selects prompts"),
    ],
)  # fmt: skip
def test_conflicting_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        StrategyConfig(**settings)
    with pytest.raises(ConfigError, match=words):
        StrategyConfig.from_args(settings)


def test_replace_checks_what_it_changes():
    config = StrategyConfig.from_args({"seed": 7, "mine": 1}).replace(zero_stage=3)
    assert (config.seed, config.zero_stage, config.get_extra_arg("mine")) == (7, 3, 1)
    with pytest.raises(ConfigError, match="zero_stage"):
        config.replace(zero_stage=4)
    with pytest.raises(ConfigError, match="zero_stage"):
        config.model_copy(update={"zero_stage": 4})


def test_it_survives_pickling():
    config = StrategyConfig.from_args({"seed": 7, "mine": 1})
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config and copy.args == {"seed": 7, "mine": 1}
