"""Patches of transformers: a vanished target is an error, and nothing stays patched."""

from functools import wraps

import pytest
from export_models import llama, mixture_of_experts
from transformers import LlamaForCausalLM, PreTrainedModel

from lightrft.config import StrategyError
from lightrft.strategy import FakeStrategy
from lightrft.strategy.models import state_dict_adapter, transformers_4
from lightrft.strategy.models.transformers_patches import CONVERSION, META_LOADING, is_version_4

if is_version_4():
    META_LOADING, CONVERSION = transformers_4.META_LOADING, transformers_4.NAMING
of_version_5 = pytest.mark.skipif(is_version_4(), reason="needs transformers 5, which converts tensors")


def label(target):
    return target.target.rpartition(":")[2]


def remove(target, monkeypatch):
    owner = target.owner()
    for base in getattr(owner, "__mro__", (owner,)):  # a method may be inherited
        if target.name in vars(base):
            monkeypatch.delattr(base, target.name)


@pytest.fixture
def strategy_on_rank_1():
    with FakeStrategy() as strategy:
        strategy.world.rank = 1
        yield strategy


@pytest.mark.parametrize("target", META_LOADING, ids=label)
def test_meta_init_names_a_target_that_is_gone(strategy_on_rank_1, target, monkeypatch):
    remove(target, monkeypatch)
    with (
        pytest.raises(StrategyError, match=rf"init_model_context.*transformers.*{target.name}.*pip install"),
        strategy_on_rank_1.init_model_context(meta_init=True),
    ):
        pass


@pytest.mark.parametrize("target", CONVERSION, ids=label)
def test_prepare_names_a_target_that_is_gone(target, monkeypatch):
    model = llama()
    remove(target, monkeypatch)
    with FakeStrategy() as strategy, pytest.raises(StrategyError, match=rf"prepare.*transformers.*{target.name}"):
        strategy.prepare(model)


@of_version_5
def test_prepare_notices_that_transformers_looks_for_conversions_elsewhere(monkeypatch):
    from transformers import core_model_loading

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", lambda model, state_dict: state_dict)
    with FakeStrategy() as strategy, pytest.raises(StrategyError, match="does not read _weight_conversions"):
        strategy.prepare(llama())


def test_from_pretrained_of_a_subclass_works_after_meta_init(strategy_on_rank_1, tmp_path):
    llama().save_pretrained(tmp_path)
    before = vars(PreTrainedModel)["from_pretrained"], vars(PreTrainedModel)["_load_pretrained_model"]
    with strategy_on_rank_1.init_model_context(meta_init=True):
        without_values = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (vars(PreTrainedModel)["from_pretrained"], vars(PreTrainedModel)["_load_pretrained_model"]) == before
    with_values = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(with_values) is LlamaForCausalLM
    assert {parameter.device.type for parameter in without_values.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in with_values.parameters()} == {"cpu"}


@of_version_5
def test_meta_init_reads_no_weights(strategy_on_rank_1, tmp_path, monkeypatch):
    from transformers import core_model_loading

    llama().save_pretrained(tmp_path)
    materialize = core_model_loading._materialize_copy
    read = []

    @wraps(materialize)
    def recorded(tensor, *args):
        read.append(tensor)
        return materialize(tensor, *args)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", recorded)
    with strategy_on_rank_1.init_model_context(meta_init=True):
        LlamaForCausalLM.from_pretrained(tmp_path)
    assert not read
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert read


@of_version_5
def test_converting_leaves_no_attribute_on_the_model():
    model = mixture_of_experts()
    state_dict_adapter.remember_conversions(model)
    converted = state_dict_adapter.convert(model, state_dict_adapter.saved_tensors(model))
    assert any(".experts.3." in name for name in converted)
    assert "_weight_conversions" not in vars(model)


@pytest.mark.parametrize("patch", META_LOADING, ids=label)
def test_every_patch_cites_its_upstream(patch):
    assert patch.upstream.startswith("https://github.com/huggingface/transformers/")
    assert all((patch.why, patch.versions, patch.until))
