"""Which layers are sharded: those that a model declares, and no others."""

import pytest
import torch
from fsdp_models import Layer, Layered
from torch import nn

from lightrft.config import UnsupportedOperationError
from lightrft.fsdp.wrapping import layer_classes, layers_to_shard

transformers = pytest.importorskip("transformers")
ARCHITECTURES = [
    "bloom", "falcon", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "phi3", "qwen2", "qwen2_moe",
    "qwen3",
]  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_layers_of_a_transformers_model_are_found_by_its_own_declaration(name: str) -> None:
    config = transformers.AutoConfig.for_model(name, num_hidden_layers=2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert len(layers_to_shard(model)) == 2
    assert len({type(layer) for layer in layers_to_shard(model)}) == 1


def test_vision_layers_are_found_too_unless_modalities_are_mixed() -> None:
    config = transformers.AutoConfig.for_model(
        "qwen2_vl", text_config={"num_hidden_layers": 2}, vision_config={"depth": 3}
    )
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    of_both = layers_to_shard(model)
    of_text = layers_to_shard(model, mixed_modalities=True)
    assert (len(of_both), len(of_text)) == (5, 2)
    assert {type(layer).__name__ for layer in of_both} > {type(layer).__name__ for layer in of_text}


def test_a_part_declares_for_itself_and_inner_layers_come_first() -> None:
    class Outer(nn.Module):
        _no_split_modules = "Outer"

        def __init__(self) -> None:
            super().__init__()
            self.inner = Layered()

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Outer()

    wrapper = Wrapper()
    assert layer_classes(wrapper) == {"Layer", "Outer"}
    layers = layers_to_shard(wrapper)
    assert layers[-1] is wrapper.model
    assert [type(layer) for layer in layers[:-1]] == [Layer] * 3


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        (None, "it declares no layer classes"),
        (["Block"], r"it contains none of the classes that it declares \(Block\)"),
    ],
)
def test_a_model_without_layers_is_refused_with_the_remedy(declared: list[str] | None, reason: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model._no_split_modules = declared
    with pytest.raises(UnsupportedOperationError, match=rf"Sequential has no layers to wrap: {reason}\. Set _no_split"):
        layers_to_shard(model)
