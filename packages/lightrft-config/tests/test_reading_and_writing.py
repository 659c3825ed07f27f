"""from_args, files, the command line: what goes in comes out."""

import argparse
import dataclasses
import json
import types
import warnings
from unittest.mock import MagicMock

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel

from lightrft.config import ConfigError, ConfigFileError, StrategyConfig
from lightrft.config.settings import Settings

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
LIKE_NUMBERS = st.from_regex(r"[-+]?[0-9.]{1,3}([eE][-+]?[0-9]{1,2})?", fullmatch=True)
SCHEMA = StrategyConfig.json_schema()["properties"]


def values_of(schema):
    """Any value that a JSON schema allows, as `StrategyConfig` takes it."""
    if "anyOf" in schema:
        return st.one_of(*map(values_of, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return st.tuples(*map(values_of, schema["prefixItems"]))
    if schema["type"] == "array":
        return st.lists(values_of(schema["items"]), max_size=3).map(tuple)
    bounds = {
        "min_value": schema.get("minimum", schema.get("exclusiveMinimum")),
        "max_value": schema.get("maximum", schema.get("exclusiveMaximum", 2**31)),
    }
    if schema["type"] == "integer":
        low = bounds["min_value"] + ("exclusiveMinimum" in schema) if bounds["min_value"] is not None else -(2**31)
        return st.integers(low, bounds["max_value"] - ("exclusiveMaximum" in schema))
    if schema["type"] == "number":
        excluded = {"exclude_min": "exclusiveMinimum" in schema, "exclude_max": "exclusiveMaximum" in schema}
        return st.floats(**bounds, **excluded, allow_nan=False, allow_infinity=False)
    return {"boolean": st.booleans(), "string": TEXT | LIKE_NUMBERS, "null": st.none()}[schema["type"]]


@st.composite
def settings(draw):
    """Any valid settings, as keyword arguments."""
    some = draw(st.lists(st.sampled_from(sorted(SCHEMA.keys() - {"extra_args"})), unique=True, max_size=12))
    given = {name: draw(values_of(SCHEMA[name])) for name in some}
    micro = given["micro_train_batch_size"] = draw(st.integers(1, 64))
    given["train_batch_size"] = micro * draw(st.integers(1, 64))
    try:
        StrategyConfig(**given)
    except ConfigError:
        assume(False)
    return given


EXTRA = st.dictionaries(
    TEXT.map("mine_".__add__),
    st.none() | st.integers() | TEXT | LIKE_NUMBERS | st.lists(st.integers(), max_size=2),
    max_size=3,
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
    with pytest.raises(ConfigError, match=r"zero_stage: expected .*, got str \('three'\)"):
        StrategyConfig.from_args({"zero_stage": "three"})


def test_a_near_miss_in_the_arguments_of_a_script_is_kept_and_warned_of():
    with pytest.warns(UserWarning, match="'train_batch_sise' is not a setting.*Did you mean 'train_batch_size'"):
        config = StrategyConfig.from_args(argparse.Namespace(train_batch_sise=64))
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
    ("c.yaml", "seed: [", "c.yaml: expected valid YAML"), ("c.json", "{", "c.json: expected valid JSON, got: Expecting property name"), ("c.json", "[1]", "expected a mapping of setting names to values, got list"),
    ("c.yaml", "1: 2", "expected a mapping of setting names"), ("c.yaml", "sed: 3", "Did you mean 'seed'"), ("c.json", '{"l2": NaN}', r"l2: expected a number >= 0, got float \(nan\)"),
    ("c.json", '{"seed": "1"}', "c.json: .*seed: expected an integer"), ("c.yaml", "self: 1", "'self' is not a setting"),
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


def test_the_parser_keeps_its_own_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    args = StrategyConfig.add_arguments(parser).parse_args(["--no-bf16", "--max_norm", "none"])
    config = StrategyConfig.from_args(args)
    assert (config.seed, config.bf16, config.max_norm) == (1, False, None)


def test_help_can_be_printed():
    text = StrategyConfig.add_arguments(argparse.ArgumentParser()).format_help()
    assert "--zero_stage" in text and "ZeRO stage" in text


def test_the_json_schema_describes_each_setting():
    schema = StrategyConfig.json_schema()
    json.dumps(schema)
    assert schema["properties"]["zero_stage"]["maximum"] == 3
    assert "ZeRO" in schema["properties"]["zero_stage"]["description"]
    assert schema["additionalProperties"] is False


def test_the_summary_shows_what_differs():
    assert StrategyConfig().summary() == "All settings have their default values."
    lines = StrategyConfig.from_args({"zero_stage": 3, "mine": 1}).summary().splitlines()
    assert [line.split()[0] for line in lines] == ["setting", "-" * 18, "zero_stage", "extra_args['mine']"]
    assert lines[2].split() == ["zero_stage", "3", "2", "strategy"]


@pytest.mark.parametrize(
    "text", ["1e5", "1E-5", "-3e2", ".5e3", "1.e4", "+1e5", "1e+5", "0x1f", "yes", "null", "~", ""]
)
def test_a_string_that_looks_like_something_else_stays_a_string(tmp_path, text):
    config = StrategyConfig(**({"pretrain_data": text} if text else {}), extra_args={"mine": text, "more": [text]})
    config.to_yaml(tmp_path / "c.yaml")
    assert StrategyConfig.from_yaml(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("value", "words"),
    [((1, 2), r"\['mine'\]: expected .*, got tuple \(\(1, 2\)\)"), ({1: 2}, r"\['mine'\]: .*, got int \(1\)"),
     ([float("nan")], r"\['mine'\]\[0\]: .*, got float \(nan\)"), ({"a": object()}, r"\['mine'\]\['a'\]")],
)  # fmt: skip
@pytest.mark.parametrize("form", ["json", "yaml"])
def test_a_value_that_would_not_be_read_back_unchanged_is_not_written(tmp_path, value, words, form):
    config = StrategyConfig(extra_args={"mine": value})
    with pytest.raises(ConfigError, match=words):
        getattr(config, f"to_{form}")(tmp_path / "config")
    assert not (tmp_path / "config").exists()


@pytest.mark.parametrize(("form", "text"), [("yaml", "seed: 1\nseed: 2\n"), ("json", '{"seed": 1, "seed": 2}')])
def test_a_duplicate_key_in_a_file_is_refused(tmp_path, form, text):
    (tmp_path / "config").write_text(text)
    with pytest.raises(ConfigError, match=r"config: duplicate key 'seed'"):
        getattr(StrategyConfig, f"from_{form}")(tmp_path / "config")


class Raising:
    @property
    def seed(self):
        raise OSError("no disk")


@pytest.mark.parametrize(
    "source",
    [(name for name in ()), frozenset(), bytearray(), 1j, len, test_a_duplicate_key_in_a_file_is_refused, json],
)
def test_what_has_no_names_is_refused(source):
    with pytest.raises(ConfigError, match="expected an argparse Namespace, a mapping"):
        StrategyConfig.from_args(source)


def test_an_attribute_that_cannot_be_read_is_named():
    with pytest.raises(ConfigError, match="reading 'seed' of the Raising raised OSError: no disk"):
        StrategyConfig.from_args(Raising())


@pytest.mark.parametrize(
    ("name", "meant"), [("fspd", "fsdp"), ("bf61", "bf16"), ("sed", "seed"), ("zgp", "zpg"), ("timeuot", "timeout")]
)
def test_a_typo_in_a_short_name_is_noticed(name, meant):
    with pytest.warns(UserWarning, match=f"Did you mean '{meant}'"):
        StrategyConfig.from_args(argparse.Namespace(**{name: 1}))
    with pytest.raises(ConfigError, match=f"'{name}' is not a setting. Did you mean '{meant}'.*extra_args"):
        StrategyConfig.from_args({name: 1})
    assert StrategyConfig.from_args({"extra_args": {name: 1}}).get_extra_arg(name) == 1


def test_every_near_miss_in_a_mapping_is_named():
    with pytest.raises(ConfigError, match=r"(?s)'zero_stag' .*'max_nrom'"):
        StrategyConfig.from_args({"zero_stag": 3, "max_nrom": 1.0, "lora_rank": 8})


def test_a_near_miss_warns_on_rank_0_alone(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StrategyConfig.from_args(argparse.Namespace(train_batch_sise=64))


@pytest.mark.parametrize("call", ["from_yaml", "from_json"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, call):
    read = getattr(StrategyConfig, call)
    for path, reason in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(
            ConfigFileError, match=rf"StrategyConfig.{call}: cannot read {path}: {reason}.*Check"
        ) as caught:
            read(path)
        assert isinstance(caught.value, (OSError, ValueError))
    for wrong in (5, None, b"x"):
        with pytest.raises(ConfigError, match=rf"StrategyConfig.{call}: expected the path of a file, got"):
            read(wrong)
    with pytest.raises(ConfigFileError, match="cannot find ~nobody-of-this-name"):
        read("~nobody-of-this-name/config")


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_files_in_the_home_directory(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = StrategyConfig(seed=7)
    getattr(config, f"to_{kind}")("~/config")
    assert (tmp_path / "config").exists()
    assert getattr(StrategyConfig, f"from_{kind}")("~/config") == config
    with pytest.raises(ConfigFileError, match=rf"to_{kind}: cannot write .*No such file"):
        getattr(config, f"to_{kind}")("~/none/config")


def test_json_texts_are_read_as_files_are():
    assert StrategyConfig.model_validate_json('{"seed": 7, "adam_betas": [0.5, 0.6]}').adam_betas == (0.5, 0.6)
    for text, message in [
        ('{"seed": "7"}', r"model_validate_json: .*seed: expected an integer.*got str \('7'\)"),
        ('{"sed": 7}', "model_validate_json: .*'sed' is not a setting.*Did you mean 'seed'"),
        ('{"seed": 7, "seed": 8}', "duplicate key 'seed'"),
        ("{", "model_validate_json: expected valid JSON, got: Expecting"),
        ("[1]", "model_validate_json: .*expected a mapping of settings, got list"),
        (5, "expected a JSON text, got int"),
    ]:
        with pytest.raises(ConfigError, match=message):
            StrategyConfig.model_validate_json(text)
    with pytest.raises(ConfigError, match=r"model_validate_strings: .*Parse strings with add_arguments"):
        StrategyConfig.model_validate_strings({"seed": "7"})
    with pytest.raises(ConfigError, match="expected names that are strings, got int"):
        StrategyConfig.model_validate({1: 2})


def test_the_owner_of_what_is_no_setting_is_refused():
    with pytest.raises(ConfigError, match=r"expected the name of a setting, got str \('sed'\). Did you mean 'seed'"):
        StrategyConfig.owner("sed")


def test_options_are_added_to_a_parser_only():
    with pytest.raises(ConfigError, match=r"add_arguments: expected an argparse.ArgumentParser, got NoneType|None"):
        StrategyConfig.add_arguments(None)


@pytest.mark.parametrize("name", ["lr", "l1", "fp16", "max_len", "learning_rate", "lora_rank"])
def test_a_name_of_its_own_does_not_warn(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StrategyConfig.from_args({name: 1})


def test_a_setting_among_the_extra_arguments_is_refused():
    with pytest.raises(ConfigError, match="extra_args: 'seed' is a setting"):
        StrategyConfig.from_args({"extra_args": {"seed": 1}})


def test_several_urls_can_be_given():
    parser = StrategyConfig.add_arguments(argparse.ArgumentParser())
    assert StrategyConfig.from_args(parser.parse_args(["--remote_rm_url", "a", "b"])).remote_rm_url == ("a", "b")
    assert StrategyConfig.from_args(parser.parse_args(["--remote_rm_url", "a"])).remote_rm_url == "a"


def test_several_trackers_can_be_named():
    parser = StrategyConfig.add_arguments(argparse.ArgumentParser())
    for names, expected in [(["wandb", "tensorboard"], ("wandb", "tensorboard")), (["wandb"], ("wandb",)), ([], ())]:
        args = parser.parse_args(["--log-dir", "runs", "--trackers", *names])
        assert StrategyConfig.from_args(args).trackers == expected
    assert StrategyConfig.from_args(parser.parse_args([])).trackers == ()


def test_a_tracker_that_writes_to_a_directory_needs_one():
    with pytest.raises(ConfigError, match=r"trackers: 'jsonl' writes to a directory, but log_dir is None. Set log_dir"):
        StrategyConfig(trackers=["wandb", "jsonl"])


def test_a_script_of_lightrft_passes_the_critics_path():
    args = argparse.Namespace(critic_pretrain="some/critic")
    config = StrategyConfig.from_args(args)
    assert (config.critic_pretrain, config.args.critic_pretrain) == ("some/critic", "some/critic")
    parser = StrategyConfig.add_arguments(argparse.ArgumentParser())
    for options, value in [([], True), (["some/critic"], "some/critic"), (["false"], False), (["none"], None)]:
        assert parser.parse_args(["--critic_pretrain", *options]).critic_pretrain == value


def test_pydantics_own_ways_raise_our_errors():
    with pytest.raises(ConfigError, match=r"seed: expected .*, got str \('x'\)"):
        StrategyConfig.model_validate({"seed": "x"})
    with pytest.raises(
        ConfigError, match=r"seed: cannot assign 1, a config is immutable\. .*config\.replace\(seed=1\)"
    ):
        StrategyConfig().seed = 1


def test_overlaid_takes_what_is_named_and_keeps_the_rest():
    config = StrategyConfig(seed=1, l2=0.5, extra_args={"mine": 1})
    combined = config.overlaid({"seed": 2, "yours": 3})
    assert (combined.seed, combined.l2, combined.extra_args) == (2, 0.5, {"mine": 1, "yours": 3})
    other = StrategyConfig(seed=3)
    assert config.overlaid(other) is other
