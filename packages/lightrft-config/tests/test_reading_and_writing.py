"""from_args, files, the command line: what goes in comes out."""

import argparse
import dataclasses
import json
import types
import warnings
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from lightrft.config import ConfigError, StrategyConfig
from lightrft.config.settings import Settings

RATE = st.floats(0, 1, allow_nan=False)
POSITIVE = st.integers(1, 2**31)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@st.composite
def settings(draw):
    """Any valid settings, as keyword arguments."""
    micro = draw(st.integers(1, 64))
    return draw(
        st.fixed_dictionaries(
            {"micro_train_batch_size": st.just(micro), "train_batch_size": st.integers(1, 64).map(lambda n: n * micro)},
            optional={
                "seed": st.integers(0, 2**32 - 1), "max_norm": st.none() | RATE, "timeout": st.floats(1e-3, 1e9),
                "bf16": st.booleans(), "strategy": st.just("auto") | TEXT, "device": st.sampled_from(["auto", "cpu", "cuda"]),
                "grad_accum_dtype": st.sampled_from([None, "fp32", "bf16"]), "zero_stage": st.integers(0, 3), "zpg": POSITIVE,
                "adam_betas": st.tuples(RATE.filter(lambda b: b < 1), RATE.filter(lambda b: b < 1)),
                "actor_learning_rate": RATE, "remote_rm_url": st.none() | TEXT | st.lists(TEXT, max_size=3).map(tuple),
                "n_samples_per_prompt": st.integers(2, 64), "use_tensorboard": st.none() | st.booleans() | TEXT,
                "kl_estimator": st.sampled_from(["k1", "k2", "k3"]), "pretrain_data": st.none() | TEXT,
                "weight_sync_bucket_bytes": POSITIVE, "local_rank": st.integers(-1, 64),
            },
        )
    )  # fmt: skip


EXTRA = st.dictionaries(
    TEXT.map("mine_".__add__), st.none() | st.integers() | TEXT | st.lists(st.integers(), max_size=2), max_size=3
)


@given(settings(), EXTRA)
def test_any_valid_config_survives_each_round_trip(tmp_path_factory, given_settings, extra):
    config = StrategyConfig(**given_settings, extra_args=extra)
    folder = tmp_path_factory.mktemp("config")
    config.to_json(folder / "config.json")
    config.to_yaml(folder / "config.yaml")
    assert StrategyConfig.from_json(folder / "config.json") == config
    assert StrategyConfig.from_yaml(folder / "config.yaml") == config
    assert StrategyConfig(**config.to_dict()) == config
    assert StrategyConfig.from_args(config.to_dict()) == config
    assert StrategyConfig.from_args(argparse.Namespace(**config.to_dict())) == config


@given(settings())
def test_any_valid_config_survives_the_command_line(given_settings):
    config = StrategyConfig(**given_settings)
    argv = []
    for name, value in config.changed().items():
        if value is True or value is False:
            flag = name if value else f"no-{name}"
            argv += [f"--{flag}"] if Settings.model_fields[name].annotation is bool else [f"--{name}={value}"]
        elif isinstance(value, tuple) and name == "adam_betas":
            argv += [f"--{name}", *map(repr, value)]
        elif isinstance(value, tuple) or (
            str(value).lower() in ("none", "null", "true", "false") and isinstance(value, str)
        ):
            return  # a list of URLs, or a string that the command line reads as a word
        else:
            argv += [f"--{name}={value}"]
    parsed = StrategyConfig.add_arguments(argparse.ArgumentParser()).parse_args(argv)
    assert StrategyConfig.from_args(parsed) == config


class ClassHolder:
    seed = 7
    mine = "x"

    def method(self): ...


class SlotHolder:
    __slots__ = ("mine", "never_set", "seed")

    def __init__(self):
        self.seed, self.mine = 7, "x"


@dataclasses.dataclass
class DataHolder:
    seed: int = 7
    mine: str = "x"


class ModelHolder(BaseModel, extra="allow"):
    seed: int = 7


MOCK = MagicMock()
MOCK.seed, MOCK.mine = 7, "x"
SOURCES = [
    argparse.Namespace(seed=7, mine="x"), {"seed": 7, "mine": "x"}, types.MappingProxyType({"seed": 7, "mine": "x"}),
    types.SimpleNamespace(seed=7, mine="x"), ClassHolder(), SlotHolder(), DataHolder(), ModelHolder(mine="x"), MOCK,
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
def test_from_args_reads_any_kind_of_object(source):
    config = StrategyConfig.from_args(source)
    assert config.seed == 7
    assert config.get_extra_arg("mine") == "x"
    assert config.get_extra_arg("absent", "default") == "default"
    assert config.args is source
    assert config.from_script and not StrategyConfig().from_script


@pytest.mark.parametrize("source", [None, "seed=7", 7, [("seed", 7)], StrategyConfig, {1: 2}], ids=repr)
def test_from_args_refuses_what_has_no_names(source):
    with pytest.raises(ConfigError, match="from_args"):
        StrategyConfig.from_args(source)


def test_from_args_returns_a_config_as_it_is():
    config = StrategyConfig(seed=7)
    assert StrategyConfig.from_args(config) is config
    assert config.args is config


def test_from_args_refuses_ill_typed_settings():
    with pytest.raises(ConfigError, match="zero_stage: got 'three'"):
        StrategyConfig.from_args({"zero_stage": "three"})


def test_a_near_miss_is_kept_and_warned_of():
    with pytest.warns(UserWarning, match="'train_batch_sise' is not a setting.*did you mean 'train_batch_size'"):
        config = StrategyConfig.from_args({"train_batch_sise": 64})
    assert config.get_extra_arg("train_batch_sise") == 64


@pytest.mark.parametrize(
    "name", ["rollout_batch_size", "max_ckpt_num", "pretrain", "prompt_max_len", "max_num", "fp16", "lora_rank"]
)
def test_the_other_arguments_of_lightrft_scripts_do_not_warn(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StrategyConfig.from_args({name: 1})


def test_yaml_reads_exponents_as_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("actor_learning_rate: 1e-6\nadam_betas: [0.9, 0.99]\n")
    config = StrategyConfig.from_yaml(tmp_path / "c.yaml")
    assert (config.actor_learning_rate, config.adam_betas) == (1e-6, (0.9, 0.99))


@pytest.mark.parametrize(("name", "content", "words"), [
    ("c.yaml", "seed: [", "cannot be read"), ("c.json", "{", "cannot be read"), ("c.json", "[1]", "holds list"),
    ("c.yaml", "1: 2", "wanted settings by name"), ("c.yaml", "sed: 3", "did you mean 'seed'"), ("c.json", '{"l2": NaN}', "l2: got nan"),
])  # fmt: skip
def test_a_bad_file_is_refused(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    read = StrategyConfig.from_yaml if name.endswith("yaml") else StrategyConfig.from_json
    with pytest.raises(ConfigError, match=words):
        read(path)


def test_an_empty_yaml_file_means_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert StrategyConfig.from_yaml(tmp_path / "c.yaml") == StrategyConfig()


def test_what_cannot_be_written_is_refused_and_nothing_is_written(tmp_path):
    config = StrategyConfig.from_args({"mine": object()})
    for write in (config.to_json, config.to_yaml):
        with pytest.raises(ConfigError, match="extra_args cannot be written"):
            write(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_parser_keeps_its_own_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    args = StrategyConfig.add_arguments(parser).parse_args(["--no-bf16", "--max_norm", "none"])
    config = StrategyConfig.from_args(args)
    assert (config.seed, config.bf16, config.max_norm) == (1, False, None)


def test_help_can_be_printed():
    text = StrategyConfig.add_arguments(argparse.ArgumentParser()).format_help()
    assert "--zero_stage" in text and "What ZeRO shards" in text


def test_the_json_schema_describes_each_setting():
    schema = StrategyConfig.json_schema()
    json.dumps(schema)
    assert schema["properties"]["zero_stage"]["maximum"] == 3
    assert "ZeRO" in schema["properties"]["zero_stage"]["description"]
    assert schema["additionalProperties"] is False


def test_the_summary_shows_what_differs():
    assert StrategyConfig().summary() == "All settings have their defaults."
    lines = StrategyConfig.from_args({"zero_stage": 3, "mine": 1}).summary().splitlines()
    assert [line.split()[0] for line in lines] == ["setting", "-" * 18, "zero_stage", "extra_args['mine']"]
    assert lines[2].split() == ["zero_stage", "3", "2", "strategy"]
