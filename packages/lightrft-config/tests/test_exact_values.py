"""Every source of settings stores a value exactly or refuses it by name."""

import argparse
import enum
import json
from collections import namedtuple
from decimal import Decimal
from fractions import Fraction

import numpy
import pytest

from lightrft.config import ConfigError, StrategyConfig
from lightrft.config.settings import Settings

INEXACT = 2**53 + 1
"""The smallest positive integer that a float does not hold."""
Pair = namedtuple("Pair", "first second")


class Three(enum.IntEnum):
    VALUE = 3


class Name(enum.StrEnum):
    K1 = "k1"


class Convertible:
    """Like a NumPy scalar or a 0-dimensional tensor: Python converts it to any number."""

    def __float__(self):
        return 3.0

    def __index__(self):
        return 3

    def __bool__(self):
        return True


def read_json(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    return StrategyConfig.from_json(tmp_path / "c.json")


def read_yaml(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return StrategyConfig.from_yaml(tmp_path / "c.yaml")


def parse(*argv):
    return StrategyConfig.from_args(StrategyConfig.add_arguments(argparse.ArgumentParser()).parse_args(argv))


SOURCES = {
    "constructor": lambda _, value: StrategyConfig(timeout=value),
    "replace": lambda _, value: StrategyConfig().replace(timeout=value),
    "model_validate": lambda _, value: StrategyConfig.model_validate({"timeout": value}),
    "namespace": lambda _, value: StrategyConfig.from_args(argparse.Namespace(timeout=value)),
    "mapping": lambda _, value: StrategyConfig.from_args({"timeout": value}),
    "overlaid": lambda _, value: StrategyConfig().overlaid({"timeout": value}),
    "json": lambda tmp_path, value: read_json(tmp_path, json.dumps({"timeout": value})),
    "yaml": lambda tmp_path, value: read_yaml(tmp_path, f"timeout: {value}"),
    "command line": lambda _, value: parse(f"--timeout={value}"),
}


@pytest.mark.parametrize("read", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("value", [INEXACT, 10**23, 10**400])
def test_an_integer_that_a_float_cannot_hold_is_refused_by_name(tmp_path, read, value):
    with pytest.raises(ConfigError, match=r"timeout: expected a number > 0, got int \(\d+.*a decimal point to accept"):
        read(tmp_path, value)


@pytest.mark.parametrize("read", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("value", [1, 2**53, 2**53 + 2, 2**60])
def test_an_integer_that_a_float_holds_is_kept(tmp_path, read, value):
    timeout = read(tmp_path, value).timeout
    assert timeout == value and type(timeout) is float


@pytest.mark.parametrize(
    "name", [name for name, field in Settings.model_fields.items() if "float" in str(field.annotation)]
)
def test_every_float_setting_is_exact(name):
    value = (INEXACT, 0.5) if name == "adam_betas" else INEXACT
    with pytest.raises(ConfigError, match=rf"{name}: expected .*A float cannot represent this integer exactly"):
        StrategyConfig(**{name: value})


REFUSED = [
    ("timeout", True), ("timeout", "3"), ("timeout", b"3"), ("timeout", Decimal("0.1")), ("timeout", Fraction(1, 3)),
    ("timeout", 1 + 0j), ("timeout", Convertible()), ("timeout", float("nan")), ("timeout", float("inf")),
    ("max_norm", float("inf")), ("max_norm", Convertible()), ("max_norm", True),
    ("seed", 3.0), ("seed", "3"), ("seed", True), ("seed", Decimal(3)), ("seed", Convertible()), ("seed", float("nan")),
    ("bf16", 1), ("bf16", 0.0), ("bf16", "true"), ("bf16", Three.VALUE), ("bf16", Convertible()),
    ("strategy", b"fake"), ("strategy", bytearray(b"fake")), ("strategy", True),
    ("use_tensorboard", 1), ("use_tensorboard", Convertible()),
    ("adam_betas", {0.9, 0.95}), ("adam_betas", {0.9: 1, 0.95: 2}), ("adam_betas", (0.9, True)), ("adam_betas", range(2)),
    ("adam_betas", (0.9, float("nan"))), ("adam_betas", (0.9, Convertible())), ("remote_rm_url", {"a"}), ("remote_rm_url", ("a", 1)),
    ("extra_args", [("mine", 1)]), ("train_batch_size", 2**63), ("train_batch_size", 10**5000), ("timeout", 10**5000),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda value: type(value).__name__)
def test_a_value_that_would_be_changed_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"{name}: expected .*, got \w+ \(") as error:
        StrategyConfig(**{name: value})
    assert len(str(error.value)) < 500


KEPT = [
    ("timeout", 0.1), ("timeout", Three.VALUE), ("l2", -0.0), ("seed", Three.VALUE), ("train_batch_size", 2**63 - 1),
    ("kl_estimator", Name.K1), ("pretrain_data", Name.K1), ("adam_betas", (0, 0.5)), ("adam_betas", Pair(0.1, 0.2)),
    ("remote_rm_url", ("a", "b")), ("extra_args", {"mine": INEXACT}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), KEPT)
def test_a_value_that_the_setting_holds_is_kept(name, value):
    config = StrategyConfig(**{name: value})
    assert getattr(config, name) == value
    assert type(getattr(config, name)) in (bool, int, float, str, tuple, dict)


def test_numpy_scalars_are_kept_exactly_or_refused():
    assert StrategyConfig(l2=numpy.float64(0.1)).l2 == 0.1
    refused = {"l2": numpy.float32(0.1), "timeout": numpy.int64(3), "seed": numpy.int64(3), "bf16": numpy.bool_(True)}
    for name, value in {**refused, "adam_betas": numpy.array([0.9, 0.95])}.items():
        with pytest.raises(ConfigError, match=f"{name}: expected"):
            StrategyConfig(**{name: value})


@pytest.mark.parametrize(
    ("text", "words"),
    [("seed: 010", r"seed: .*, got str \('010'\)"), ("seed: 1:30", r"got str \('1:30'\)"), ("timeout: 1:30.5", "timeout: "),
     ("seed: 1_000", "got str"), ("bf16: no", r"bf16: .*, got str \('no'\)"), ("timeout: .inf", r"got float \(inf\)"),
     ("timeout: 1e400", r"got float \(inf\)"), ("seed: 1.0", "got float"), (f"seed: {'1' * 5000}", "4300 digits"),
     ("extra_args: {mine: 1e400}", r"extra_args\['mine'\]: .*, got float \(inf\)")],
)  # fmt: skip
def test_yaml_that_would_be_read_as_another_value_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=rf"c\.yaml: .*{words}"):
        read_yaml(tmp_path, text)


@pytest.mark.parametrize("text", ["no", "on", "010", "1:30", "2026-01-31", "2026-99-99", "1_000", "0b1"])
def test_yaml_that_1_1_and_1_2_read_differently_is_a_string(tmp_path, text):
    assert read_yaml(tmp_path, f"extra_args: {{mine: {text}}}").extra_args == {"mine": text}


@pytest.mark.parametrize(("text", "value"), [("0o17", 15), ("0x1f", 31), ("+7", 7), ("0", 0)])
def test_yaml_reads_integers(tmp_path, text, value):
    assert read_yaml(tmp_path, f"seed: {text}").seed == value


@pytest.mark.parametrize(
    "text", ['{"extra_args": {"mine": 1e400}}', '{"extra_args": {"mine": NaN}}', f'{{"seed": {"1" * 5000}}}']
)
def test_json_that_would_be_read_as_another_value_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"c\.json: .*(mine|digits)"):
        read_json(tmp_path, text)


def test_two_values_for_one_extra_argument_are_refused():
    with pytest.raises(ConfigError, match="'mine' is given twice"):
        StrategyConfig.from_args({"mine": 1, "extra_args": {"mine": 2}})


@pytest.mark.parametrize("extra", [[], 0, "", False])
def test_extra_arguments_that_are_no_dict_are_refused(extra):
    with pytest.raises(ConfigError, match="extra_args: expected a dict, got"):
        StrategyConfig.from_args({"extra_args": extra})
