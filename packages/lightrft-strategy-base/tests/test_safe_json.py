"""Python values as JSON: restored unchanged, or refused with their path."""

import enum
from collections import OrderedDict

import numpy as np
import pytest
from checkpoint_models import in_training
from hypothesis import given
from hypothesis import strategies as st

from lightrft.config import (
    ArgumentTypeError,
)
from lightrft.strategy import StepResult, get_fake_strategy
from lightrft.strategy.storage.safe_json import from_json, to_json


@pytest.fixture
def strategy():
    with get_fake_strategy(bf16=False, train_batch_size=1) as made:
        yield made


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
def test_plain_values_are_restored_with_their_types(value):
    import json

    assert repr(from_json(json.loads(json.dumps(to_json(value, "v"))))) == repr(value)


class Mode(enum.StrEnum):
    FAST = "fast"


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    "value",
    [Mode.FAST, Level.HIGH, np.float64(0.5), np.int64(1), np.bool_(True), OrderedDict(a=1), StepResult(applied=True, skipped=False, grad_norm=None)],
    ids=repr,
)  # fmt: skip
def test_a_value_that_json_would_change_is_refused_before_anything_is_written(strategy, tmp_path, value):
    model, _ = in_training(strategy)
    with pytest.raises(
        ArgumentTypeError,
        match=r"save_ckpt: client_state\['run'\]\[0\]: expected None, bool, .* got a .*would not load as the same type",
    ):
        strategy.save_ckpt(model, tmp_path, client_state={"run": [value]})
    assert not list(tmp_path.iterdir())


def test_a_key_may_have_more_digits_than_python_prints():
    value = {10**5000: [1]}
    assert from_json(to_json(value, "client_state")) == value


def test_a_key_that_json_would_change_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"v \(key\): expected .* got a .*\.Mode, which"):
        to_json({Mode.FAST: 1}, "v")


def test_a_value_without_a_safe_form_is_named_by_its_path():
    with pytest.raises(ArgumentTypeError, match=r"v\['a'\]\[1\]: expected .* got a builtins.object"):
        to_json({"a": [1, object()]}, "v")
